/* Causal attention with sinks on channel-major activations, for CPUs.
 *
 * q, k, v and z are (sequences, channels, tokens) with the tokens contiguous; vectors run along the queries. A head is
 * copied to blocks that stay in cache, (channels, tokens of a block). Where few entries of k or v are not zero, as
 * after AbsTopK, each has a bit, and products read the rows whose bits are set alone. Nothing of tokens x tokens is
 * kept: the forward pass rescales its sums as the greatest logit grows, and saves that logit and the reciprocal of the
 * sum; the backward pass recomputes the probabilities. A head belongs to one thread, so results do not depend on how
 * many there are.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t word; /* a bit for each of WORD entries */

#define LANES 8
#define WORD 32
#define TILE 64   /* queries of a tile and keys of a block in the forward pass: 16 KB of scores */
#define HALF 32   /* queries of half a tile: of the keys of their own block they see at least one word */
#define KEYS 16   /* keys of a block of the backward pass */
#define CHUNK 128 /* queries of a block of the backward pass: 8 KB of probabilities */
#define DENSE 0.6  /* share of entries that are not zero above which bits do not pay */
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
INLINE float greater(float a, float b) { return a > b ? a : b; }
INLINE int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE floats load(const float *p) { return *(const floats *)p; }
/* For what is used more than once: gcc would load it anew each time. */
INLINE floats load_once(const float *p) { return *(const volatile floats *)p; }
INLINE void store(float *p, floats a) { *(floats *)p = a; }
INLINE floats only(floats a, ints mask) { return (floats)((ints)a & mask); }

/* An address that gcc keeps in a register: it would compute those of the vectors after it one by one. */
INLINE float *base(const float *p) {
    __asm__("" : "+r"(p));
    return (float *)p;
}

/* Of `exponential`: what rounds to an integer and puts it in the low bits, the least argument, a polynomial. Volatile,
   since gcc would load each anew at each use rather than keep it in a register. */
static const volatile float POWER[8] = {0x1.8p23f,      -126.0f,        1.32647157e-3f, 9.67151299e-3f,
                                        5.55073395e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f};
typedef struct {
    float c[8];
} Power;

INLINE Power power(void) {
    Power of_two;
    UNROLL for (int i = 0; i < 8; i++) of_two.c[i] = POWER[i];
    return of_two;
}

/* 2^x for x <= 0: relative error below 2e-7; 0 below 2^-126 and at -infinity, NaN at NaN. */
INLINE floats exponential(floats x, Power by) {
    floats shifted = x + by.c[0], f = x - (shifted - by.c[0]);
    floats p = f * by.c[2] + by.c[3];
    p = p * f + by.c[4];
    p = p * f + by.c[5];
    p = p * f + by.c[6];
    p = p * f + by.c[7];
    return only((floats)((ints)p + ((ints)shifted << 23)), ~(x < by.c[1]));
}

/* sums[0 .. n) += rows[i] * weights[i * step], over the i < entries whose bits are set, or over all without words. */
INLINE void add_rows(floats *sums, const int n, const float *weights, int64_t step, const word *words, int64_t entries,
                     const float *rows, int64_t width) {
    if (!words) {
        for (int64_t i = 0; i < entries; i++) {
            const float *row = base(rows + i * width);
            UNROLL for (int j = 0; j < n; j++) sums[j] += load(row + j * LANES) * weights[i * step];
        }
        return;
    }
    for (int64_t start = 0; start < entries; start += WORD)
        for (word bits = words[start / WORD]; bits; bits &= bits - 1) {
            int64_t i = start + __builtin_ctz(bits);
            const float *row = base(rows + i * width);
            UNROLL for (int j = 0; j < n; j++) sums[j] += load(row + j * LANES) * weights[i * step];
        }
}

/* out[0 .. n) = the same sums. */
INLINE void sum_rows(float *out, const int n, const float *weights, int64_t step, const word *words, int64_t entries,
                     const float *rows, int64_t width) {
    floats sums[8] = {{0}};
    add_rows(sums, n, weights, step, words, entries, rows, width);
    out = base(out);
    UNROLL for (int j = 0; j < n; j++) store(out + j * LANES, sums[j]);
}

/* Rows (channels, tokens), `stride` apart, times `scale`, to blocks (channels, width) padded with zeros; returns the
   share that is not zero. */
static double pack(const float *rows, int64_t stride, int64_t channels, int64_t tokens, int64_t width, float scale,
                   float *blocks) {
    int32_t nonzeros = 0;
    for (int64_t start = 0; start < tokens; start += width)
        for (int64_t c = 0; c < channels; c++, blocks += width) {
            const float *row = rows + c * stride + start;
            int64_t n = smaller(width, tokens - start);
            for (int64_t t = 0; t < n; t++) {
                blocks[t] = row[t] * scale;
                nonzeros += row[t] != 0;
            }
            for (int64_t t = n; t < width; t++) blocks[t] = 0;
        }
    return (double)nonzeros / (double)(channels * tokens);
}

/* Blocks (channels, width) times `scale` to rows (channels, tokens). */
static void unpack(const float *blocks, int64_t channels, int64_t tokens, int64_t width, float scale, float *rows) {
    for (int64_t start = 0; start < tokens; start += width)
        for (int64_t c = 0; c < channels; c++, blocks += width) {
            int64_t n = smaller(width, tokens - start);
            for (int64_t t = 0; t < n; t++) rows[c * tokens + start + t] = blocks[t] * scale;
        }
}

/* Words of the nonzero channels of each token of blocks (channels, width). */
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

/* Words of the nonzero tokens of each channel of blocks (channels, width). */
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

/* Room for `count` floats or words at a cache line of its own, from a buffer that moves on. */
INLINE void *take(char **buffer, int64_t count) {
    void *taken = *buffer;
    *buffer += ceiling(count * 4, 64) * 64;
    return taken;
}

typedef struct {
    float *q, *k, *v, *z;                      /* q and z: one tile (channels, TILE); k and v: blocks of it */
    float *scores;                             /* (TILE keys, TILE queries) */
    float *greatest, *sum, *shrink;            /* of each query; shrink: what a block multiplies its sums by */
    word *k_channels, *v_tokens;
    int k_dense, v_dense;
} Forward;

/* Lay the workspace out in `buffer`; returns its size. */
static int64_t forward_room(Forward *s, char *buffer, int64_t tokens, int64_t channels) {
    char *at = buffer;
    int64_t padded = ceiling(tokens, TILE) * TILE;
    s->q = take(&at, channels * TILE), s->z = take(&at, channels * TILE), s->scores = take(&at, TILE * TILE);
    s->greatest = take(&at, TILE), s->sum = take(&at, TILE), s->shrink = take(&at, TILE);
    s->k = take(&at, channels * padded), s->v = take(&at, channels * padded);
    s->k_channels = take(&at, padded * ceiling(channels, WORD)), s->v_tokens = take(&at, padded / WORD * channels);
    return at - buffer;
}

/* Keys after a query get a logit of -infinity. */
static void hide(const Forward *s, int64_t keys) {
    for (int64_t key = 0; key < keys; key++)
        for (int64_t t = 0; t < key; t++) s->scores[key * TILE + t] = -INFINITY;
}

/* The greatest logit of each query, with those of `keys`, a multiple of four; the one before is left in `shrink`. */
static void find_greatest(const Forward *s, int64_t keys) {
    const float *a = s->scores;
    float most[TILE];
    memcpy(s->shrink, s->greatest, sizeof(most));
    memcpy(most, s->greatest, sizeof(most));
    for (int64_t key = 0; key < keys; key += 4, a += 4 * TILE)
        for (int t = 0; t < TILE; t++) {
            float one = greater(a[t], a[TILE + t]), two = greater(a[2 * TILE + t], a[3 * TILE + t]);
            most[t] = greater(greater(one, two), most[t]);
        }
    memcpy(s->greatest, most, sizeof(most));
}

/* Logits of 8 queries with `n` keys to exponentials over the greatest. */
INLINE void exponentiate(const Forward *s, int64_t first, int64_t n, Power by) {
    float *scores = s->scores + first;
    floats greatest = load(s->greatest + first), sum = {0};
    for (int64_t key = 0; key < n; key++) {
        floats p = exponential(load(scores + key * TILE) - greatest, by);
        store(scores + key * TILE, p);
        sum += p;
    }
    floats shrink = exponential(load(s->shrink + first) - greatest, by);
    store(s->shrink + first, shrink);
    store(s->sum + first, load(s->sum + first) * shrink + sum);
}

/* z of n vectors of queries and one channel, with the values of `keys` keys. */
INLINE void add_values(const Forward *s, const int n, const float *v, const word *words, int64_t keys, int64_t first,
                       float *z) {
    floats sums[8];
    UNROLL for (int j = 0; j < n; j++) sums[j] = load(z + first + j * LANES) * load(s->shrink + first + j * LANES);
    add_rows(sums, n, v, 1, words, keys, s->scores + first, TILE);
    UNROLL for (int j = 0; j < n; j++) store(z + first + j * LANES, sums[j]);
}

/* Add a block of keys to a tile of queries; `diagonal`: the block holds the tile's own keys, of which there are n. */
INLINE void add_block(const Forward *s, int64_t block, int64_t channels, const int diagonal, int64_t n) {
    const float *k = s->k + block * channels * TILE, *v = s->v + block * channels * TILE;
    int64_t n_words = ceiling(channels, WORD), keys = ceiling(n, LANES) * LANES, both = n > HALF;
    for (int64_t key = 0; key < keys; key++) {
        const word *words = s->k_dense ? NULL : s->k_channels + (block * TILE + key) * n_words;
        float *scores = s->scores + key * TILE;
        int64_t half = key / HALF * HALF;
        if (!diagonal || (both && !half))
            sum_rows(scores, TILE / LANES, k + key, TILE, words, channels, s->q, TILE);
        else
            sum_rows(scores + half, HALF / LANES, k + key, TILE, words, channels, s->q + half, TILE);
    }
    if (diagonal) hide(s, keys);
    find_greatest(s, keys);
    Power by = power();
    for (int64_t t = 0; t < keys; t += LANES) {
        int64_t seen = diagonal ? t + LANES : TILE;
        exponentiate(s, t, seen, by);
        for (int64_t key = seen; key < TILE; key++) store(s->scores + key * TILE + t, (floats){0});
    }
    for (int64_t c = 0; c < channels; c++, v += TILE) {
        const word *words = s->v_dense ? NULL : s->v_tokens + (block * channels + c) * (TILE / WORD);
        if (!diagonal) {
            add_values(s, TILE / LANES, v, words, TILE, 0, s->z + c * TILE);
        } else {
            add_values(s, HALF / LANES, v, words, smaller(HALF, keys), 0, s->z + c * TILE);
            if (both) add_values(s, HALF / LANES, v, words, keys, HALF, s->z + c * TILE);
        }
    }
}

static void forward_head(Forward *s, const float *q, const float *k, const float *v, const int64_t *strides,
                         const float *sink, float *z, float *norm, int64_t tokens, int64_t channels) {
    int64_t blocks = ceiling(tokens, TILE);
    float scale = LOG2E / sqrtf((float)channels);
    s->k_dense = pack(k, strides[1], channels, tokens, TILE, 1, s->k) > DENSE;
    s->v_dense = pack(v, strides[2], channels, tokens, TILE, 1, s->v) > DENSE;
    if (!s->k_dense) find_channels(s->k, blocks, channels, TILE, s->k_channels);
    if (!s->v_dense) find_tokens(s->v, blocks, channels, TILE, s->v_tokens);
    for (int64_t tile = 0; tile < blocks; tile++) {
        int64_t start = tile * TILE, n = smaller(TILE, tokens - start);
        pack(q + start, strides[0], channels, n, TILE, scale, s->q);
        memset(s->z, 0, channels * TILE * sizeof(float));
        for (int64_t t = 0; t < TILE; t++) { /* the sink is a key that comes first */
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
   powers of two, and the reciprocal of the sum of exponentials over it. The sequences of q, k and v are *_sequence
   apart, their channels *_channel. */
void attend_float32(const float *q, const float *k, const float *v, const float *sink, float *z, float *norm,
                    int64_t q_sequence, int64_t q_channel, int64_t k_sequence, int64_t k_channel, int64_t v_sequence,
                    int64_t v_channel, int64_t sequences, int64_t heads, int64_t tokens, int64_t channels,
                    int32_t threads) {
    const int64_t strides[3] = {q_channel, k_channel, v_channel};
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
                         v + b * v_sequence + c * v_channel, strides, sink ? sink + h : NULL, z + i * channels * tokens,
                         norm + i * 2 * tokens, tokens, channels);
        }
        free(buffer);
    }
}

typedef struct {
    float *q, *dz, *dq;                 /* blocks of (channels, CHUNK) */
    float *k, *v;                       /* blocks of (channels, KEYS) */
    float *greatest, *inverse, *delta;  /* of each query: `norm`, and the sum of z dz */
    float *p, *ds;                      /* probabilities and gradients of logits, (KEYS, CHUNK) */
    floats *dk, *dv;                    /* of a block of keys: see `add_products` */
    word *k_channels, *k_tokens, *v_channels;
    int k_dense, v_dense;
} Backward;

/* Lay the workspace out in `buffer`; returns its size. */
static int64_t backward_room(Backward *s, char *buffer, int64_t tokens, int64_t channels) {
    char *at = buffer;
    int64_t padded = ceiling(tokens, CHUNK) * CHUNK, n_words = ceiling(channels, WORD), even = channels + channels % 2;
    s->q = take(&at, channels * padded), s->dz = take(&at, channels * padded), s->dq = take(&at, channels * padded);
    s->k = take(&at, channels * padded), s->v = take(&at, channels * padded);
    s->greatest = take(&at, padded), s->inverse = take(&at, padded), s->delta = take(&at, padded);
    s->p = take(&at, KEYS * CHUNK), s->ds = take(&at, KEYS * CHUNK);
    s->dk = take(&at, KEYS * even), s->dv = take(&at, KEYS * even);
    s->k_channels = take(&at, padded * n_words), s->v_channels = take(&at, padded * n_words);
    s->k_tokens = take(&at, padded / KEYS * channels);
    return at - buffer;
}

/* Call f(n, at, ...) on the queries [first, end), vectors of them in pairs: eight at a time, then four, then two. */
#define IN_STRIPS(f, first, end, ...)                                                  \
    do {                                                                               \
        int64_t at = first;                                                            \
        for (; end - at >= 8 * LANES; at += 8 * LANES) f(8, at, __VA_ARGS__);          \
        if (end - at >= 4 * LANES) {                                                   \
            f(4, at, __VA_ARGS__);                                                     \
            at += 4 * LANES;                                                           \
        }                                                                              \
        if (end - at >= 2 * LANES) f(2, at, __VA_ARGS__);                              \
    } while (0)

/* out (KEYS, CHUNK) = the products of each key of k (channels, KEYS) with the queries [first, end) of q. */
static void multiply(const float *k, const word *words, const float *q, float *out, int64_t channels, int64_t first,
                     int64_t end) {
    for (int64_t key = 0; key < KEYS; key++, k++, out += CHUNK) {
#define MULTIPLY(n, at, q) sum_rows(out + at, n, k, KEYS, words, channels, (q) + at, CHUNK)
        IN_STRIPS(MULTIPLY, first, end, q);
        if (words) words += ceiling(channels, WORD);
    }
}

/* q k and dz v, in p and ds, to probabilities and gradients of logits; the block of queries begins at `chunk`. */
static void differentiate(const Backward *s, int64_t chunk, int64_t first, int64_t end) {
    Power by = power();
    for (int64_t t = first; t < end; t += LANES) {
        int64_t query = chunk + t;
        floats greatest = load(s->greatest + query), inverse = load(s->inverse + query), delta = load(s->delta + query);
        float *p = s->p + t, *ds = s->ds + t;
        for (int64_t key = 0; key < KEYS; key++, p += CHUNK, ds += CHUNK) {
            floats probability = exponential(load(p) - greatest, by) * inverse;
            store(ds, probability * (load(ds) - delta));
            store(p, probability);
        }
    }
}

/* Nothing passes from keys after a query: the first KEYS queries of p and ds are the block's own. */
static void cut(float *p, float *ds) {
    for (int64_t key = 0; key < KEYS; key++, p += CHUNK, ds += CHUNK)
        for (int64_t t = 0; t < KEYS; t += LANES) {
            ints seen = ORDER >= (int32_t)(key - t);
            store(p + t, only(load(p + t), seen));
            store(ds + t, only(load(ds + t), seen));
        }
}

/* dq of n vectors of queries and one channel += k dS over a block of keys. */
INLINE void add_keys(const int n, const float *k, const word *words, const float *ds, float *dq) {
    floats sums[8];
    dq = base(dq);
    UNROLL for (int j = 0; j < n; j++) sums[j] = load(dq + j * LANES);
    add_rows(sums, n, k, 1, words, KEYS, ds, CHUNK);
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

/* sums += the products over queries of each row of a (KEYS, CHUNK) with each of x (channels, CHUNK): vectors of four
   keys of one channel and of the next. */
static void add_products(floats *sums, const float *a, const float *x, int64_t channels, int64_t first, int64_t end) {
    for (int64_t c = 0; c < channels; c += 2) {
        const float *one = x + c * CHUNK, *two = c + 1 < channels ? one + CHUNK : one;
        for (int64_t key = 0; key < KEYS; key += 4) {
            floats products[8] = {{0}};
            for (int64_t t = first; t < end; t += LANES) {
                floats by_one = load_once(one + t), by_two = load_once(two + t);
                UNROLL for (int i = 0; i < 4; i++) {
                    floats row = load_once(a + (key + i) * CHUNK + t);
                    products[i] += row * by_one;
                    products[4 + i] += row * by_two;
                }
            }
            *sums++ += totals(products);
        }
    }
}

/* Those sums, times `scale`, to n tokens of rows (channels, tokens). */
static void spread(const floats *sums, int64_t channels, int64_t tokens, int64_t n, float scale, float *rows) {
    for (int64_t c = 0; c < channels; c++, rows += tokens)
        for (int64_t key = 0; key < n; key += 4) {
            floats scaled = sums[c / 2 * (KEYS / 4) + key / 4] * scale;
            const float *four = (const float *)&scaled + c % 2 * 4;
            if (n - key >= 4)
                memcpy(rows + key, four, 4 * sizeof(float));
            else
                memcpy(rows + key, four, (n - key) * sizeof(float));
        }
}

/* Everything that a block of keys and the queries [first, end) after `chunk` add to one another's gradients. */
static void add_pair(const Backward *s, int64_t block, int64_t chunk, int64_t channels, int64_t first, int64_t end,
                     int diagonal) {
    const float *k = s->k + block * KEYS * channels, *v = s->v + block * KEYS * channels;
    const float *q = s->q + chunk * channels, *dz = s->dz + chunk * channels;
    int64_t words = block * KEYS * ceiling(channels, WORD);
    multiply(k, s->k_dense ? NULL : s->k_channels + words, q, s->p, channels, first, end);
    multiply(v, s->v_dense ? NULL : s->v_channels + words, dz, s->ds, channels, first, end);
    differentiate(s, chunk, first, end);
    if (diagonal) cut(s->p + first, s->ds + first);
    add_products(s->dk, s->ds, q, channels, first, end);
    add_products(s->dv, s->p, dz, channels, first, end);
    float *dq = s->dq + chunk * channels;
    for (int64_t c = 0; c < channels; c++, k += KEYS, dq += CHUNK) {
        const word *tokens = s->k_dense ? NULL : s->k_tokens + block * channels + c;
#define ADD_KEYS(n, at, ds) add_keys(n, k, tokens, (ds) + at, dq + at)
        IN_STRIPS(ADD_KEYS, first, end, s->ds);
    }
}

static void backward_head(Backward *s, const float *q, const float *k, const float *v, const float *dz,
                          const int64_t *strides, const float *z, const float *norm, const float *sink, float *dq,
                          float *dk, float *dv, float *dsink, int64_t tokens, int64_t channels) {
    int64_t blocks = ceiling(tokens, KEYS), even = channels + channels % 2;
    float root = 1 / sqrtf((float)channels);
    pack(q, strides[0], channels, tokens, CHUNK, root * LOG2E, s->q);
    pack(dz, strides[3], channels, tokens, CHUNK, 1, s->dz);
    s->k_dense = pack(k, strides[1], channels, tokens, KEYS, 1, s->k) > DENSE;
    s->v_dense = pack(v, strides[2], channels, tokens, KEYS, 1, s->v) > DENSE;
    if (!s->k_dense) find_channels(s->k, blocks, channels, KEYS, s->k_channels);
    if (!s->k_dense) find_tokens(s->k, blocks, channels, KEYS, s->k_tokens);
    if (!s->v_dense) find_channels(s->v, blocks, channels, KEYS, s->v_channels);
    memset(s->dq, 0, channels * ceiling(tokens, CHUNK) * CHUNK * sizeof(float));
    for (int64_t t = 0; t < blocks * KEYS; t++) { /* the probabilities of queries past the end are zero */
        s->greatest[t] = t < tokens ? norm[t] : INFINITY;
        s->inverse[t] = t < tokens ? norm[tokens + t] : 0;
        s->delta[t] = 0;
    }
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < tokens; t++) s->delta[t] += z[c * tokens + t] * dz[c * strides[3] + t];
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * KEYS, n = smaller(KEYS, tokens - start);
        memset(s->dk, 0, KEYS * even * sizeof(float));
        memset(s->dv, 0, KEYS * even * sizeof(float));
        for (int64_t chunk = start / CHUNK * CHUNK; chunk < tokens; chunk += CHUNK) {
            int diagonal = chunk <= start;
            int64_t end = smaller(CHUNK, blocks * KEYS - chunk);
            add_pair(s, block, chunk, channels, diagonal ? start - chunk : 0, end, diagonal);
        }
        spread(s->dk, channels, tokens, n, LN2, dk + start); /* the packed q is times root * log2(e) */
        spread(s->dv, channels, tokens, n, 1, dv + start);
    }
    unpack(s->dq, channels, tokens, CHUNK, root, dq);
    floats sum = {0};
    for (int64_t t = 0; sink && t < blocks * KEYS; t += LANES)
        sum -= exponential(*sink * LOG2E - load(s->greatest + t), power()) * load(s->inverse + t) * load(s->delta + t);
    *dsink = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

/* Gradients of `attend`: dq, dk, dv (sequences, heads * channels, tokens) and, for each sequence, of the sinks,
   dsink (sequences, heads). */
void attend_backward_float32(const float *q, const float *k, const float *v, const float *dz, const float *z,
                             const float *norm, const float *sink, float *dq, float *dk, float *dv, float *dsink,
                             int64_t q_sequence, int64_t q_channel, int64_t k_sequence, int64_t k_channel,
                             int64_t v_sequence, int64_t v_channel, int64_t dz_sequence, int64_t dz_channel,
                             int64_t sequences, int64_t heads, int64_t tokens, int64_t channels, int32_t threads) {
    const int64_t strides[4] = {q_channel, k_channel, v_channel, dz_channel};
    Backward none;
    int64_t room = backward_room(&none, NULL, tokens, channels);
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
