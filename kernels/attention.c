/* Causal attention with sinks on channel-major activations, for CPUs.
 *
 * q, k, v and z are (sequences, channels, tokens) with the tokens contiguous; vectors run along the queries. A head is
 * copied into tiles that stay in cache, (channels, TILE) of queries or (channels, keys of a block), with one bit for
 * each entry of k and v that is not zero: products read the rows whose bits are set and skip the others. Nothing of
 * tokens x tokens is kept: the forward pass rescales its sums as the greatest logit grows, and saves that logit and
 * the reciprocal of the sum; the backward pass recomputes the probabilities. A head belongs to one thread, so results
 * do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t word; /* one bit for each of WORD entries */

#define LANES 8
#define WORD 32
#define TILE 64       /* queries of a tile of the forward pass, and keys of a block: 16 KB of scores */
#define HALF 32       /* keys of a word: where the diagonal of a tile is cut */
#define KEYS 16       /* keys of a block of the backward pass */
#define CHUNK 128     /* queries of a chunk of the backward pass: 8 KB of probabilities, 8 KB of their gradients */
#define LOG2E 1.44269504088896f
#define LN2 0.693147180559945f
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

static const ints ORDER = {0, 1, 2, 3, 4, 5, 6, 7};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE floats load(const float *p) { return *(const floats *)p; }
INLINE void store(float *p, floats a) { *(floats *)p = a; }
INLINE floats only(floats a, ints mask) { return (floats)((ints)a & mask); }

/* 2^x for x <= 0: relative error below 2e-7; 0 below 2^-126 and at -infinity, NaN at NaN. */
INLINE floats exp2_(floats x) {
    floats shifted = x + 0x1.8p23f; /* the nearest integer, in the low bits */
    floats f = x - (shifted - 0x1.8p23f);
    floats p = f * 1.32647157e-3f + 9.67151299e-3f;
    p = p * f + 5.55073395e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    return only((floats)((ints)p + ((ints)shifted << 23)), ~(x < -126.0f));
}

INLINE floats greater(floats a, floats b) {
    ints above = a > b;
    return (floats)(((ints)a & above) | ((ints)b & ~above));
}

/* sums[0 .. n) += the rows whose bits are set, each times its weight; the weights are `step` apart. */
INLINE void add_rows(floats *sums, const int n, const float *weights, int64_t step, const word *words, int64_t n_words,
                     const float *rows, int64_t width) {
    for (int64_t w = 0; w < n_words; w++)
        for (word bits = words[w]; bits; bits &= bits - 1) {
            int64_t i = WORD * w + __builtin_ctz(bits);
            float weight = weights[i * step];
            const float *row = rows + i * width;
            UNROLL for (int j = 0; j < n; j++) sums[j] += load(row + j * LANES) * weight;
        }
}

/* Copy rows (channels, tokens), `stride` apart, times `scale`, to blocks (channels, width) padded with zeros. */
static void pack(const float *rows, int64_t stride, int64_t channels, int64_t tokens, int64_t width, float scale,
                 float *blocks) {
    for (int64_t start = 0; start < tokens; start += width)
        for (int64_t c = 0; c < channels; c++, blocks += width) {
            int64_t n = smaller(width, tokens - start);
            for (int64_t t = 0; t < n; t++) blocks[t] = rows[c * stride + start + t] * scale;
            for (int64_t t = n; t < width; t++) blocks[t] = 0;
        }
}

/* For each token of the blocks (channels, width), the words of its channels that are not zero. */
static void find_channels(const float *blocks, int64_t n_blocks, int64_t channels, int64_t width, word *words) {
    int64_t n_words = ceiling(channels, WORD);
    for (int64_t b = 0; b < n_blocks; b++, blocks += channels * width)
        for (int64_t t = 0; t < width; t += LANES, words += LANES * n_words)
            for (int64_t w = 0; w < n_words; w++) {
                ints found = {0};
                for (int64_t c = w * WORD; c < smaller((w + 1) * WORD, channels); c++)
                    found |= (load(blocks + c * width + t) != 0.0f) & (int32_t)(1u << c % WORD);
                for (int l = 0; l < LANES; l++) words[l * n_words + w] = (word)found[l];
            }
}

/* For each channel of each block (channels, width), the words of its tokens that are not zero. */
static void find_tokens(const float *blocks, int64_t n_blocks, int64_t channels, int64_t width, word *words) {
    for (int64_t row = 0; row < n_blocks * channels; row++, blocks += width)
        for (int64_t t = 0; t < width; t += WORD, words++) {
            ints found = {0};
            for (int64_t l = 0; l < smaller(WORD, width - t); l += LANES)
                found |= (load(blocks + t + l) != 0.0f) & ((ints){1, 2, 4, 8, 16, 32, 64, 128} << (int32_t)l);
            *words = 0;
            for (int l = 0; l < LANES; l++) *words |= (word)found[l];
        }
}

/* `count` words of 4 bytes, aligned to a cache line, from a buffer that moves on. */
INLINE void *take(char **buffer, int64_t count) {
    void *taken = *buffer;
    *buffer += ceiling(count * 4, 64) * 64;
    return taken;
}

typedef struct {
    float *q, *k, *v, *z, *scores, *greatest, *sum, *shrink;
    word *k_words, *v_words;
} Forward;

static int64_t forward_room(Forward *s, char *buffer, int64_t tokens, int64_t channels) {
    char *at = buffer;
    int64_t padded = ceiling(tokens, TILE) * TILE;
    s->q = take(&at, channels * TILE), s->z = take(&at, channels * TILE), s->scores = take(&at, TILE * TILE);
    s->greatest = take(&at, TILE), s->sum = take(&at, TILE), s->shrink = take(&at, TILE);
    s->k = take(&at, channels * padded), s->v = take(&at, channels * padded);
    s->k_words = take(&at, padded * ceiling(channels, WORD)), s->v_words = take(&at, padded / WORD * channels);
    return at - buffer;
}

/* Logits of n vectors of queries with one key, in powers of two. */
INLINE void score(const Forward *s, const int n, const float *k, const word *words, int64_t n_words, int64_t first,
                  float *scores) {
    floats sums[TILE / LANES] = {{0}};
    add_rows(sums, n, k, TILE, words, n_words, s->q + first, TILE);
    UNROLL for (int j = 0; j < n; j++) store(scores + first + j * LANES, sums[j]);
}

/* z of n vectors of queries and one channel, of which `n_words` words of keys are added. */
INLINE void add_values(const Forward *s, const int n, const float *v, const word *words, int64_t n_words,
                       int64_t first, float *z) {
    floats sums[TILE / LANES];
    UNROLL for (int j = 0; j < n; j++) sums[j] = load(z + first + j * LANES) * load(s->shrink + first + j * LANES);
    add_rows(sums, n, v, 1, words, n_words, s->scores + first, TILE);
    UNROLL for (int j = 0; j < n; j++) store(z + first + j * LANES, sums[j]);
}

/* Logits of 8 queries with `n` keys to exponentials, over the greatest so far; `cut`: the last 8 are the diagonal. */
INLINE void exponentiate(const Forward *s, int64_t first, int64_t n, int cut) {
    float *scores = s->scores + first;
    if (cut)
        for (int64_t key = n - LANES; key < n; key++) {
            ints later = ORDER < (int32_t)(key - (n - LANES));
            store(scores + key * TILE, (floats)(((ints)load(scores + key * TILE) & ~later) |
                                                ((ints)((floats){0} - INFINITY) & later)));
        }
    floats before = load(s->greatest + first), greatest = before, sum = {0};
    for (int64_t key = 0; key < n; key++) greatest = greater(load(scores + key * TILE), greatest);
    for (int64_t key = 0; key < n; key++) {
        floats power = exp2_(load(scores + key * TILE) - greatest);
        sum += power;
        store(scores + key * TILE, power);
    }
    floats shrink = exp2_(before - greatest);
    store(s->greatest + first, greatest);
    store(s->shrink + first, shrink);
    store(s->sum + first, load(s->sum + first) * shrink + sum);
}

/* Add a block of keys to a tile of queries; `diagonal`: the block holds the tile's own keys, `n` of them. */
INLINE void add_block(const Forward *s, int64_t block, int64_t channels, const int diagonal, int64_t n) {
    int64_t n_words = ceiling(channels, WORD), columns = ceiling(n, LANES), both = n > HALF;
    const float *k = s->k + block * channels * TILE, *v = s->v + block * channels * TILE;
    const word *k_words = s->k_words + block * TILE * n_words, *v_words = s->v_words + block * channels * TILE / WORD;
    for (int64_t key = 0; key < columns * LANES; key++, k_words += n_words) {
        float *scores = s->scores + key * TILE;
        if (!diagonal || (key < HALF && both))
            score(s, TILE / LANES, k + key, k_words, n_words, 0, scores);
        else
            score(s, HALF / LANES, k + key, k_words, n_words, key / HALF * HALF, scores);
    }
    for (int64_t i = 0; i < columns; i++) {
        int64_t seen = diagonal ? (i + 1) * LANES : TILE;
        exponentiate(s, i * LANES, seen, diagonal);
        for (int64_t key = seen; diagonal && key < TILE; key++) store(s->scores + key * TILE + i * LANES, (floats){0});
    }
    for (int64_t c = 0; c < channels; c++, v += TILE, v_words += TILE / WORD) {
        float *z = s->z + c * TILE;
        if (!diagonal) {
            add_values(s, TILE / LANES, v, v_words, TILE / WORD, 0, z);
        } else {
            add_values(s, HALF / LANES, v, v_words, 1, 0, z);
            if (both) add_values(s, HALF / LANES, v, v_words, TILE / WORD, HALF, z);
        }
    }
}

static void forward_head(const Forward *s, const float *q, const float *k, const float *v, int64_t q_stride,
                         int64_t k_stride, int64_t v_stride, const float *sink, float *z, float *norm, int64_t tokens,
                         int64_t channels) {
    int64_t blocks = ceiling(tokens, TILE);
    float scale = LOG2E / sqrtf((float)channels);
    pack(k, k_stride, channels, tokens, TILE, 1, s->k);
    pack(v, v_stride, channels, tokens, TILE, 1, s->v);
    find_channels(s->k, blocks, channels, TILE, s->k_words);
    find_tokens(s->v, blocks, channels, TILE, s->v_words);
    for (int64_t tile = 0; tile < blocks; tile++) {
        int64_t start = tile * TILE, n = smaller(TILE, tokens - start);
        pack(q + start, q_stride, channels, n, TILE, scale, s->q);
        memset(s->z, 0, channels * TILE * sizeof(float));
        for (int64_t t = 0; t < TILE; t++) {
            s->greatest[t] = sink ? *sink * LOG2E : -INFINITY;
            s->sum[t] = sink ? 1 : 0;
        }
        for (int64_t block = 0; block < tile; block++) add_block(s, block, channels, 0, TILE);
        add_block(s, tile, channels, 1, n);
        for (int64_t t = 0; t < n; t++) s->sum[t] = 1 / s->sum[t];
        memcpy(norm + start, s->greatest, n * sizeof(float));
        memcpy(norm + tokens + start, s->sum, n * sizeof(float));
        for (int64_t c = 0; c < channels; c++)
            for (int64_t t = 0; t < n; t++) z[c * tokens + start + t] = s->z[c * TILE + t] * s->sum[t];
    }
}

/* z (sequences, heads * channels, tokens) = attention, and norm (sequences, heads, 2, tokens): the greatest logit, in
   powers of two, and the reciprocal of the sum of exponentials over it. Sequences of q, k and v are *_sequence apart,
   their channels *_channel. */
void attend_float32(const float *q, const float *k, const float *v, const float *sink, float *z, float *norm,
                    int64_t q_sequence, int64_t q_channel, int64_t k_sequence, int64_t k_channel, int64_t v_sequence,
                    int64_t v_channel, int64_t sequences, int64_t heads, int64_t tokens, int64_t channels,
                    int32_t threads) {
    Forward none;
    int64_t room = forward_room(&none, NULL, tokens, channels);
#pragma omp parallel num_threads(threads)
    {
        char *buffer = aligned_alloc(64, room);
        Forward s;
        forward_room(&s, buffer, tokens, channels);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < sequences * heads; i++) {
            int64_t b = i / heads, h = i % heads, c = h * channels;
            forward_head(&s, q + b * q_sequence + c * q_channel, k + b * k_sequence + c * k_channel,
                         v + b * v_sequence + c * v_channel, q_channel, k_channel, v_channel, sink ? sink + h : NULL,
                         z + i * channels * tokens, norm + i * 2 * tokens, tokens, channels);
        }
        free(buffer);
    }
}

typedef struct {
    float *q, *dz, *dq, *k, *v, *greatest, *inverse, *delta, *p, *ds, *dk, *dv;
    word *k_channels, *k_tokens, *v_channels;
} Backward;

static int64_t backward_room(Backward *s, char *buffer, int64_t tokens, int64_t channels) {
    char *at = buffer;
    int64_t padded = ceiling(tokens, CHUNK) * CHUNK, n_words = ceiling(channels, WORD);
    s->q = take(&at, channels * padded), s->dz = take(&at, channels * padded), s->dq = take(&at, channels * padded);
    s->k = take(&at, channels * padded), s->v = take(&at, channels * padded);
    s->greatest = take(&at, padded), s->inverse = take(&at, padded), s->delta = take(&at, padded);
    s->p = take(&at, KEYS * CHUNK), s->ds = take(&at, KEYS * CHUNK);
    s->dk = take(&at, KEYS * channels), s->dv = take(&at, KEYS * channels);
    s->k_channels = take(&at, padded * n_words), s->v_channels = take(&at, padded * n_words);
    s->k_tokens = take(&at, padded / KEYS * channels);
    return at - buffer;
}

/* A block of keys against a chunk of queries, [first, end): where each lies. */
typedef struct {
    const float *q, *dz, *k, *v, *greatest, *inverse, *delta;
    float *dq;
    const word *k_channels, *k_tokens, *v_channels;
} Pair;

/* Probabilities of n vectors of queries for one key, and their gradients before the softmax. */
INLINE void recompute(const Backward *s, const Pair *pair, const int n, int64_t key, int64_t n_words, int64_t first) {
    floats sums[8] = {{0}};
    float *p = s->p + key * CHUNK + first, *ds = s->ds + key * CHUNK + first;
    add_rows(sums, n, pair->k + key, KEYS, pair->k_channels + key * n_words, n_words, pair->q + first, CHUNK);
    UNROLL for (int j = 0; j < n; j++) {
        int64_t t = first + j * LANES;
        store(p + j * LANES, exp2_(sums[j] - load(pair->greatest + t)) * load(pair->inverse + t));
        sums[j] = (floats){0};
    }
    add_rows(sums, n, pair->v + key, KEYS, pair->v_channels + key * n_words, n_words, pair->dz + first, CHUNK);
    UNROLL for (int j = 0; j < n; j++)
        store(ds + j * LANES, load(p + j * LANES) * (sums[j] - load(pair->delta + first + j * LANES)));
}

/* dq of n vectors of queries and one channel += k dS of a block of keys. */
INLINE void add_keys(const Backward *s, const Pair *pair, const int n, int64_t c, int64_t first) {
    floats sums[8];
    float *dq = pair->dq + c * CHUNK + first;
    UNROLL for (int j = 0; j < n; j++) sums[j] = load(dq + j * LANES);
    add_rows(sums, n, pair->k + c * KEYS, 1, pair->k_tokens + c, 1, s->ds + first, CHUNK);
    UNROLL for (int j = 0; j < n; j++) store(dq + j * LANES, sums[j]);
}

/* The sums of the lanes of eight vectors. */
INLINE floats totals(const floats *a) {
    floats pairs[4], fours[2];
    UNROLL for (int i = 0; i < 4; i++)
        pairs[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                   SHUFFLE(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    UNROLL for (int i = 0; i < 2; i++)
        fours[i] = SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                   SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

/* sums (channels, KEYS) += the products over queries of each row of a (KEYS, CHUNK) and of x (channels, CHUNK). */
INLINE void add_products(float *sums, const float *a, const float *x, int64_t channels, int64_t first, int64_t end) {
    for (int64_t c = 0; c < channels; c += 2) {
        const float *one = x + c * CHUNK, *two = c + 1 < channels ? one + CHUNK : one;
        for (int64_t key = 0; key < KEYS; key += 4) {
            floats products[8] = {{0}};
            for (int64_t t = first; t < end; t += LANES)
                UNROLL for (int i = 0; i < 4; i++) {
                    floats row = load(a + (key + i) * CHUNK + t);
                    products[i] += row * load(one + t);
                    products[4 + i] += row * load(two + t);
                }
            floats all = totals(products);
            for (int i = 0; i < 4; i++) sums[c * KEYS + key + i] += all[i];
            if (c + 1 < channels)
                for (int i = 0; i < 4; i++) sums[(c + 1) * KEYS + key + i] += all[4 + i];
        }
    }
}

/* Call `f` on the vectors of queries [first, end), a multiple of two: eight at a time, then four, then two. */
#define IN_STRIPS(f, first, end, ...)                            \
    do {                                                         \
        int64_t at = first;                                      \
        for (; end - at >= 8 * LANES; at += 8 * LANES) f(8, __VA_ARGS__); \
        if (end - at >= 4 * LANES) {                             \
            f(4, __VA_ARGS__);                                   \
            at += 4 * LANES;                                     \
        }                                                        \
        if (end - at >= 2 * LANES) f(2, __VA_ARGS__);            \
    } while (0)

/* Everything that a block of keys and the queries [first, end) of a chunk add to one another's gradients. */
static void add_pair(const Backward *s, const Pair *pair, int64_t channels, int64_t first, int64_t end, int diagonal) {
    int64_t n_words = ceiling(channels, WORD);
#define RECOMPUTE(n, key) recompute(s, pair, n, key, n_words, at)
#define ADD_KEYS(n, c) add_keys(s, pair, n, c, at)
    for (int64_t key = 0; key < KEYS; key++) IN_STRIPS(RECOMPUTE, first, end, key);
    for (int64_t key = 0; diagonal && key < KEYS; key++)
        for (int64_t t = 0; t < KEYS; t += LANES) {
            ints seen = ORDER >= (int32_t)(key - t);
            float *p = s->p + key * CHUNK + first + t, *ds = s->ds + key * CHUNK + first + t;
            store(p, only(load(p), seen));
            store(ds, only(load(ds), seen));
        }
    for (int64_t c = 0; c < channels; c++) IN_STRIPS(ADD_KEYS, first, end, c);
    add_products(s->dk, s->ds, pair->q, channels, first, end);
    add_products(s->dv, s->p, pair->dz, channels, first, end);
}

static void unpack(const float *blocks, int64_t channels, int64_t tokens, int64_t width, float scale, float *rows) {
    for (int64_t start = 0; start < tokens; start += width)
        for (int64_t c = 0; c < channels; c++, blocks += width)
            for (int64_t t = 0; t < smaller(width, tokens - start); t++)
                rows[c * tokens + start + t] = blocks[t] * scale;
}

static void backward_head(const Backward *s, const float *q, const float *k, const float *v, const float *dz,
                          const int64_t *strides, const float *z, const float *norm, const float *sink, float *dq,
                          float *dk, float *dv, float *dsink, int64_t tokens, int64_t channels) {
    int64_t blocks = ceiling(tokens, KEYS), n_words = ceiling(channels, WORD);
    float root = 1 / sqrtf((float)channels);
    pack(q, strides[0], channels, tokens, CHUNK, root * LOG2E, s->q);
    pack(k, strides[1], channels, tokens, KEYS, 1, s->k);
    pack(v, strides[2], channels, tokens, KEYS, 1, s->v);
    pack(dz, strides[3], channels, tokens, CHUNK, 1, s->dz);
    find_channels(s->k, blocks, channels, KEYS, s->k_channels);
    find_channels(s->v, blocks, channels, KEYS, s->v_channels);
    find_tokens(s->k, blocks, channels, KEYS, s->k_tokens);
    memset(s->dq, 0, channels * ceiling(tokens, CHUNK) * CHUNK * sizeof(float));
    for (int64_t t = 0; t < blocks * KEYS; t++) { /* the probabilities of queries past the end are zero */
        s->greatest[t] = t < tokens ? norm[t] : INFINITY;
        s->inverse[t] = t < tokens ? norm[tokens + t] : 0;
        s->delta[t] = 0;
    }
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < tokens; t++) s->delta[t] += z[c * tokens + t] * dz[c * strides[3] + t];
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * KEYS;
        memset(s->dk, 0, KEYS * channels * sizeof(float));
        memset(s->dv, 0, KEYS * channels * sizeof(float));
        for (int64_t chunk = start / CHUNK * CHUNK; chunk < tokens; chunk += CHUNK) {
            Pair pair = {s->q + chunk * channels, s->dz + chunk * channels, s->k + start * channels,
                         s->v + start * channels, s->greatest + chunk, s->inverse + chunk, s->delta + chunk,
                         s->dq + chunk * channels, s->k_channels + start * n_words, s->k_tokens + block * channels,
                         s->v_channels + start * n_words};
            int diagonal = chunk <= start;
            add_pair(s, &pair, channels, diagonal ? start - chunk : 0, smaller(CHUNK, blocks * KEYS - chunk), diagonal);
        }
        int64_t n = smaller(KEYS, tokens - start);
        for (int64_t c = 0; c < channels; c++)
            for (int64_t t = 0; t < n; t++) {
                dk[c * tokens + start + t] = s->dk[c * KEYS + t] * LN2; /* the packed q holds root * log2(e) */
                dv[c * tokens + start + t] = s->dv[c * KEYS + t];
            }
    }
    unpack(s->dq, channels, tokens, CHUNK, root, dq);
    floats sum = {0};
    for (int64_t t = 0; sink && t < blocks * KEYS; t += LANES)
        sum -= exp2_(*sink * LOG2E - load(s->greatest + t)) * load(s->inverse + t) * load(s->delta + t);
    *dsink = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

/* Gradients of `attend`: dq, dk, dv (sequences, heads * channels, tokens) and, for each sequence, of the sinks,
   dsink (sequences, heads). */
void attend_backward_float32(const float *q, const float *k, const float *v, const float *dz, const float *z,
                             const float *norm, const float *sink, float *dq, float *dk, float *dv, float *dsink,
                             int64_t q_sequence, int64_t q_channel, int64_t k_sequence, int64_t k_channel,
                             int64_t v_sequence, int64_t v_channel, int64_t dz_sequence, int64_t dz_channel,
                             int64_t sequences, int64_t heads, int64_t tokens, int64_t channels, int32_t threads) {
    Backward none;
    int64_t room = backward_room(&none, NULL, tokens, channels);
    const int64_t strides[4] = {q_channel, k_channel, v_channel, dz_channel};
#pragma omp parallel num_threads(threads)
    {
        char *buffer = aligned_alloc(64, room);
        Backward s;
        backward_room(&s, buffer, tokens, channels);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < sequences * heads; i++) {
            int64_t b = i / heads, h = i % heads, c = h * channels, at = i * channels * tokens;
            backward_head(&s, q + b * q_sequence + c * q_channel, k + b * k_sequence + c * k_channel,
                          v + b * v_sequence + c * v_channel, dz + b * dz_sequence + c * dz_channel, strides, z + at,
                          norm + i * 2 * tokens, sink ? sink + h : NULL, dq + at, dk + at, dv + at, dsink + i, tokens,
                          channels);
        }
        free(buffer);
    }
}
