/* AbsTopK and what a training step does around it, for CPUs: 16 tokens at a time with all their channels.
 *
 * A tile holds the channels of 16 neighbouring tokens, a token to a column, and stays in the L2 cache while norm,
 * activation and selection pass over it. Activations are matrices of d channels whose entry (channel, token) lies at
 * channel * step + token * stride: channel-major where stride is 1, token-major where step is 1. What a tile computes
 * does not depend on the thread that does.
 *
 * Selection: the magnitudes of IEEE floats order like their bits without the sign. The upper 16 bits of the k-th
 * greatest of each column are searched first, 16 columns in one vector; the few entries that share them decide the
 * rest. Ties go to the lowest index. NaN counts as larger than every number.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef int16_t keys __attribute__((vector_size(32), aligned(2), may_alias));
typedef float row[16] __attribute__((aligned(32))); /* one channel of a tile */

#define ACROSS 16       /* tokens of a tile */
#define LANES 8         /* floats of a vector */
#define SIGNLESS 0x7fffffff
#define UPPER 0x7fff0000
#define FLUSH 16384     /* rows whose count fits 16 bits */
#define SOON 16         /* channels between a prefetch and its use: each lies on a page of its own or nearly */
#define UNIT 64         /* tokens of one unit of parallel work, whose gradient of the gain is one sum */
#define PART 4096       /* entries of one, where no columns matter */
#define FEW 16          /* terms that are summed by themselves */
#define LEAP 400        /* keys between two neighbours of a normal sample are about this / its size */
#define PATIENCE 8      /* counts before a search falls back on bisection */
#define WIDE 32         /* columns of the table's gradient that are summed at once */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline floats *half(row *tile, int64_t i, int h) { return (floats *)(tile[i] + h * LANES); }
static inline floats choose(ints where, floats a, floats b) { return (floats)((where & (ints)a) | (~where & (ints)b)); }

/* The column of a tile that a lane of keys stands for: words hold columns c and c + 8 in their halves. */
static inline int column_of(int lane) { return (lane & 1) * LANES + lane / 2; }

static void load(const float *x, int64_t d, int64_t step, int64_t stride, int width, row *tile) {
    if (stride == 1 && width == ACROSS) {
        for (int64_t i = 0; i < d; i++) {
            __builtin_prefetch(x + (i + SOON) * step);
            *half(tile, i, 0) = *(const floats *)(x + i * step);
            *half(tile, i, 1) = *(const floats *)(x + i * step + LANES);
        }
        return;
    }
    int64_t i = 0;
    if (step == 1 && width == ACROSS)
        for (; i + ACROSS <= d; i += ACROSS)
            for (int t = 0; t < ACROSS; t++)
                for (int c = 0; c < ACROSS; c++) tile[i + c][t] = x[t * stride + i + c];
    for (; i < d; i++) {
        memset(tile[i], 0, sizeof(row));
        for (int t = 0; t < width; t++) tile[i][t] = x[i * step + t * stride];
    }
}

static void store(row *tile, float *y, int64_t d, int64_t step, int64_t stride, int width) {
    if (stride == 1 && width == ACROSS) {
        for (int64_t i = 0; i < d; i++) {
            __builtin_prefetch(y + (i + SOON) * step, 1);
            memcpy(y + i * step, tile[i], sizeof(row));
        }
        return;
    }
    int64_t i = 0;
    if (step == 1 && width == ACROSS)
        for (; i + ACROSS <= d; i += ACROSS)
            for (int t = 0; t < ACROSS; t++)
                for (int c = 0; c < ACROSS; c++) y[t * stride + i + c] = tile[i + c][t];
    for (; i < d; i++)
        for (int t = 0; t < width; t++) y[i * step + t * stride] = tile[i][t];
}

/* Where the search of each lane stands: n_low keys are >= low, at least k; n_high are >= high, fewer than k. */
typedef struct {
    int32_t low[ACROSS], high[ACROSS], n_low[ACROSS], n_high[ACROSS];
} Bounds;

/* How many of d keys are >= least, in each lane. */
static void count(const keys *key, int64_t d, keys least, int32_t *n) {
    memset(n, 0, ACROSS * sizeof(int32_t));
    for (int64_t from = 0; from < d; from += FLUSH) {
        union { keys vector; int16_t lane[ACROSS]; } sum;
        keys a = {0}, b = {0}; /* true is -1 */
        int64_t i = from, end = smaller(from + FLUSH, d);
        for (; i + 2 <= end; i += 2) {
            a -= key[i] >= least;
            b -= key[i + 1] >= least;
        }
        if (i < end) a -= key[i] >= least;
        sum.vector = a + b;
        for (int l = 0; l < ACROSS; l++) n[l] += sum.lane[l];
    }
}

/* The greatest `low` of each lane that k or more of its keys reach, or one that exactly k reach. Starts at `guess` and
   leaves there what it found: the next tile is much alike, and the result does not depend on it. From the guess it
   strides until the threshold is enclosed, then interpolates, as the counts are smooth there, and at last bisects. */
static void search(const keys *key, int64_t d, int64_t k, int32_t *guess, Bounds *at) {
    int32_t leap = (int32_t)(LEAP / d + 1), n[ACROSS];
    for (int l = 0; l < ACROSS; l++) {
        at->low[l] = at->n_high[l] = 0;
        at->high[l] = 0x8000;
        at->n_low[l] = (int32_t)d;
    }
    for (int pass = 0;; pass++) {
        union { keys vector; int16_t lane[ACROSS]; } middle;
        int32_t unfinished = 0;
        for (int l = 0; l < ACROSS; l++) {
            int32_t low = at->low[l], high = at->high[l], more = at->n_low[l] - (int32_t)k;
            int32_t less = (int32_t)k - at->n_high[l], next = (low + high) / 2;
            if (pass == 0)
                next = guess[l];
            else if (pass < PATIENCE) {
                int32_t between = (int32_t)((float)(high - low) * ((float)more + 0.5f) / (float)(more + less));
                next = at->n_high[l] == 0 ? low + more * leap : low == 0 ? high - less * leap : low + between;
            }
            next = next < high ? next : high - 1;
            middle.lane[l] = (int16_t)(next > low ? next : low + 1);
            unfinished |= (high - low > 1) & (more != 0);
        }
        if (!unfinished) break;
        count(key, d, middle.vector, n);
        for (int l = 0; l < ACROSS; l++) {
            int open = (at->high[l] - at->low[l] > 1) & (at->n_low[l] != k), up = n[l] >= k;
            at->low[l] = open & up ? middle.lane[l] : at->low[l];
            at->n_low[l] = open & up ? n[l] : at->n_low[l];
            at->high[l] = open & !up ? middle.lane[l] : at->high[l];
            at->n_high[l] = open & !up ? n[l] : at->n_high[l];
        }
        leap = pass < PATIENCE ? 2 * leap : leap;
    }
    for (int l = 0; l < ACROSS; l++) guess[l] = at->low[l];
}

/* The threshold among n magnitudes that r of them reach: ties may make it more, which are returned. */
static int64_t refine(const int32_t *list, int64_t n, int64_t r, int32_t *threshold) {
    int32_t least = list[0], most = list[0];
    for (int64_t i = 1; i < n; i++) {
        least = list[i] < least ? list[i] : least;
        most = list[i] > most ? list[i] : most;
    }
    int64_t low = least, high = (int64_t)most + 1, reached = n;
    while (high - low > 1 && reached != r) {
        int32_t middle = (int32_t)((low + high) / 2), above = 0;
        for (int64_t i = 0; i < n; i++) above += list[i] >= middle;
        if (above >= r) {
            low = middle;
            reached = above;
        } else {
            high = middle;
        }
    }
    *threshold = (int32_t)low;
    return reached - r;
}

/* What a thread works in. */
typedef struct {
    row *tile, *other, *third;
    keys *key;
    int32_t *list; /* per lane, the magnitudes that share the upper bits of the threshold */
    int32_t guess[ACROSS];
    void *memory;
} Work;

static Work work_for(int64_t d, int n_tiles) {
    Work w;
    char *p = w.memory = aligned_alloc(64, (((n_tiles + 1) * d + 1) * sizeof(row) + d * sizeof(keys) + 63) / 64 * 64);
    w.tile = (row *)p;
    w.other = w.tile + d;
    w.third = w.other + d; /* where n_tiles says that there are so many */
    w.list = (int32_t *)(w.tile + n_tiles * d);
    w.key = (keys *)(w.tile + (n_tiles + 1) * d + 1);
    for (int l = 0; l < ACROSS; l++) w.guess[l] = 0x3f80; /* 1.0 */
    return w;
}

/* Set all but the k entries of greatest magnitude of each column to zero. */
static void select_columns(Work *w, int64_t d, int64_t k) {
    if (k == d) return;
    for (int64_t i = 0; i < d; i++) {
        ints a = (ints)*half(w->tile, i, 0), b = (ints)*half(w->tile, i, 1);
        w->key[i] = (keys)(((a & SIGNLESS) >> 16) | (b & UPPER));
    }
    Bounds at;
    search(w->key, d, k, w->guess, &at);
    union { keys vector; int16_t lane[ACROSS]; } wanted;
    int64_t n[ACROSS] = {0};
    int32_t shared = 0;
    for (int l = 0; l < ACROSS; l++) {
        wanted.lane[l] = at.n_low[l] == k ? -1 : (int16_t)at.low[l];
        shared |= at.n_low[l] != k;
    }
    for (int64_t i = 0; shared && i < d; i++) {
        union { keys vector; int16_t lane[ACROSS]; int64_t any[4]; } equal = {w->key[i] == wanted.vector};
        if (equal.any[0] | equal.any[1] | equal.any[2] | equal.any[3])
            for (int l = 0; l < ACROSS; l++) { /* without branches: which lane is equal cannot be predicted */
                w->list[l * (d + 1) + n[l]] = ((const int32_t *)w->tile[i])[column_of(l)] & SIGNLESS;
                n[l] -= equal.lane[l];
            }
    }
    union { ints vector[2]; int32_t lane[ACROSS]; } least;
    int64_t ties[ACROSS] = {0};
    for (int l = 0; l < ACROSS; l++) {
        int c = column_of(l);
        if (n[l])
            ties[c] = refine(w->list + l * (d + 1), n[l], k - (at.n_low[l] - n[l]), &least.lane[c]);
        else
            least.lane[c] = at.low[l] << 16;
    }
    for (int64_t i = 0; i < d; i++)
        for (int h = 0; h < 2; h++) {
            ints bits = (ints)*half(w->tile, i, h);
            *half(w->tile, i, h) = (floats)(bits & ((bits & SIGNLESS) >= least.vector[h]));
        }
    for (int c = 0; c < ACROSS; c++)
        for (int64_t i = d - 1; ties[c] && least.lane[c] && i >= 0; i--)
            if ((((int32_t *)w->tile[i])[c] & SIGNLESS) == least.lane[c]) {
                w->tile[i][c] = 0;
                ties[c]--;
            }
}

/* One unit of parallel work: some tiles of one matrix. */
typedef struct {
    int64_t block, first, end; /* of its tokens */
} Unit;

static int64_t n_units(int64_t blocks, int64_t tokens) { return blocks * ((tokens + UNIT - 1) / UNIT); }

static Unit unit_of(int64_t i, int64_t tokens) {
    int64_t a_block = (tokens + UNIT - 1) / UNIT, first = i % a_block * UNIT;
    return (Unit){i / a_block, first, smaller(first + UNIT, tokens)};
}

/* exp(x) for x <= 0, to 1e-7 of it; 0 below exp(-87). NaN stays NaN. */
static inline floats exponential(floats x) {
    const float magic = 12582912; /* 1.5 * 2^23: adding it rounds to an integer, which the lowest bits then hold */
    ints tiny = x < -87.0f;
    x = choose(tiny, (floats){0}, x);
    floats n = x * 1.44269504f + magic;
    ints power = ((ints)n << 23) + (127 << 23);
    n -= magic;
    floats r = x - n * 0.693145752f;
    r -= n * 1.42860677e-6f;
    floats p = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    return choose(tiny, (floats){0}, p * (floats)power);
}

/* The normal distribution: its density at x and the mass below x, to 1e-7.
   Source: Abramowitz and Stegun 1964, 7.1.26. */
static inline floats normal_mass(floats x, floats *density) {
    floats z = (floats)((ints)x & SIGNLESS) * 0.707106781f, e = exponential(-z * z), t = 1 / (1 + 0.3275911f * z);
    floats p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    floats tail = 0.5f * p * e;
    *density = 0.398942280f * e;
    return choose(x > 0, 1 - tail, tail);
}

enum { NOTHING, NORM, GELU, RELU }; /* what comes before AbsTopK; as in cpu.py */

/* Each column times scale = 1 / sqrt(mean of its squares + eps), and each channel times its gain. */
static void normalise(row *tile, int64_t d, double eps, const float *gain, row *scale) {
    row sum = {0};
    for (int64_t c = 0; c < d; c++)
        for (int h = 0; h < 2; h++) *half(&sum, 0, h) += *half(tile, c, h) * *half(tile, c, h);
    for (int j = 0; j < ACROSS; j++) (*scale)[j] = (float)(1 / sqrt(sum[j] / (double)d + eps));
    for (int64_t c = 0; c < d; c++)
        for (int h = 0; h < 2; h++) *half(tile, c, h) *= *half(scale, 0, h) * gain[c];
}

/* out = AbsTopK(f(x)), f being what `before` names; the norm has a gain (d) and keeps its scales (blocks, tokens). */
void tile_topk_float32(const float *x, float *out, const float *gain, float *scales, int64_t before, int64_t blocks,
                       int64_t d, int64_t tokens, int64_t step, int64_t stride, int64_t k, double eps,
                       int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Work w = work_for(d, 1);
        row scale;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_units(blocks, tokens); i++) {
            Unit u = unit_of(i, tokens);
            for (int64_t t = u.first; t < u.end; t += ACROSS) {
                int64_t at = u.block * d * tokens + t * stride;
                int width = (int)smaller(ACROSS, u.end - t);
                load(x + at, d, step, stride, width, w.tile);
                floats *all = half(w.tile, 0, 0), density;
                if (before == NORM) {
                    normalise(w.tile, d, eps, gain, &scale);
                    memcpy(scales + u.block * tokens + t, scale, width * sizeof(float));
                } else if (before == GELU) {
                    for (int64_t j = 0; j < 2 * d; j++) all[j] *= normal_mass(all[j], &density);
                } else if (before == RELU) {
                    for (int64_t j = 0; j < 2 * d; j++) all[j] = choose(all[j] < 0, (floats){0}, all[j]);
                }
                select_columns(&w, d, k);
                store(w.tile, out + at, d, step, stride, width);
            }
        }
        free(w.memory);
    }
}

/* Without a call where all 16 are copied. */
static inline void copy_keys(void *to, const void *from, int64_t bytes) {
    if (bytes == sizeof(keys))
        memcpy(to, from, sizeof(keys));
    else
        memcpy(to, from, bytes);
}

/* out = AbsTopK(x) down the channels of channel-major bf16, whose magnitudes are keys themselves. */
void tile_topk_bfloat16(const int16_t *x, int16_t *out, int64_t blocks, int64_t d, int64_t tokens, int64_t k,
                        int32_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Work w = work_for(d, 1);
        keys *in = (keys *)w.tile;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_units(blocks, tokens); i++) {
            Unit u = unit_of(i, tokens);
            for (int64_t t = u.first; t < u.end; t += ACROSS) {
                int64_t at = u.block * d * tokens + t, bytes = smaller(ACROSS, u.end - t) * 2;
                for (int64_t c = 0; c < d; c++) {
                    __builtin_prefetch(x + at + (c + SOON) * tokens);
                    in[c] = (keys){0};
                    copy_keys(in + c, x + at + c * tokens, bytes);
                    w.key[c] = in[c] & 0x7fff;
                }
                Bounds found;
                union { keys vector; int16_t lane[ACROSS]; } least;
                search(w.key, d, k, w.guess, &found);
                for (int l = 0; l < ACROSS; l++) least.lane[l] = (int16_t)found.low[l];
                for (int64_t c = 0; c < d; c++) in[c] &= w.key[c] >= least.vector;
                for (int l = 0; l < ACROSS; l++)
                    for (int64_t c = d - 1; found.n_low[l] > k && found.low[l] && c >= 0; c--)
                        if (((int16_t *)(w.key + c))[l] == found.low[l]) {
                            ((int16_t *)(in + c))[l] = 0;
                            found.n_low[l]--;
                        }
                for (int64_t c = 0; c < d; c++) {
                    __builtin_prefetch(out + at + (c + SOON) * tokens, 1);
                    copy_keys(out + at + c * tokens, in + c, bytes);
                }
            }
        }
        free(w.memory);
    }
}

/* The gradients at x and gain; `out` is NULL where all entries were kept. */
void norm_abs_topk_backward_float32(const float *grad, const float *x, const float *gain, const float *scales,
                                    const float *out, float *x_grad, float *gain_grad, int64_t blocks, int64_t d,
                                    int64_t tokens, int64_t step, int64_t stride, int32_t threads) {
    float *parts = malloc(n_units(blocks, tokens) * d * sizeof(floats)); /* of the gain's gradient, by units */
#pragma omp parallel num_threads(threads)
    {
        Work w = work_for(d, 3);
        row *dy = w.tile, *in = w.other, *kept = w.third; /* kept: first the output, then sums for the gain */
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_units(blocks, tokens); i++) {
            Unit u = unit_of(i, tokens);
            floats *sums = (floats *)(parts + i * d * LANES);
            memset(sums, 0, d * sizeof(floats));
            for (int64_t t = u.first; t < u.end; t += ACROSS) {
                int64_t at = u.block * d * tokens + t * stride;
                int width = (int)smaller(ACROSS, u.end - t);
                load(grad + at, d, step, stride, width, dy);
                load(x + at, d, step, stride, width, in);
                if (out) load(out + at, d, step, stride, width, kept);
                row scale = {0}, along = {0};
                memcpy(scale, scales + u.block * tokens + t, width * sizeof(float));
                for (int64_t c = 0; c < d; c++)
                    for (int h = 0; h < 2; h++) {
                        floats *g = half(dy, c, h);
                        if (out) *g = choose(*half(kept, c, h) != 0, *g, (floats){0});
                        floats product = *g * (*half(in, c, h) * *half(&scale, 0, h));
                        sums[c] += product;
                        *half(&along, 0, h) += product * gain[c];
                    }
                for (int h = 0; h < 2; h++) *half(&along, 0, h) *= *half(&scale, 0, h) / (float)d;
                for (int64_t c = 0; c < d; c++)
                    for (int h = 0; h < 2; h++) {
                        floats *g = half(dy, c, h);
                        *g = *half(&scale, 0, h) * (*g * gain[c] - *half(in, c, h) * *half(&along, 0, h));
                    }
                store(dy, x_grad + at, d, step, stride, width);
            }
        }
        free(w.memory);
    }
    for (int64_t c = 0; c < d; c++) {
        floats sum = {0};
        for (int64_t i = 0; i < n_units(blocks, tokens); i++) sum += *(floats *)(parts + (i * d + c) * LANES);
        gain_grad[c] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
    }
    free(parts);
}

static inline floats gelu_slope(floats x) {
    floats density, mass = normal_mass(x, &density);
    return mass + x * density;
}

/* The gradient of AbsTopK(gelu(x)) at n entries x: grad * slope where the output is not zero. */
void gelu_abs_topk_backward_float32(const float *grad, const float *x, const float *out, float *x_grad, int64_t n,
                                    int32_t threads) {
    int64_t parts = (n + PART - 1) / PART;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t part = 0; part < parts; part++) {
        int64_t i = part * PART, end = smaller(i + PART, n);
        for (; i + LANES <= end; i += LANES) {
            floats passed = *(const floats *)(grad + i) * gelu_slope(*(const floats *)(x + i));
            *(floats *)(x_grad + i) = choose(*(const floats *)(out + i) != 0, passed, (floats){0});
        }
        for (; i < end; i++) x_grad[i] = out[i] != 0 ? grad[i] * gelu_slope((floats){x[i]})[0] : 0;
    }
}

/* tile += the table's rows of these tokens, as columns. */
static void add_rows(row *tile, const float *table, const int64_t *token, int64_t vocab, int width) {
    for (int64_t i = 0; i < vocab; i += ACROSS) {
        row square[ACROSS] = {{0}};
        int height = (int)smaller(ACROSS, vocab - i);
        if (height == ACROSS && width == ACROSS) {
            for (int t = 0; t < ACROSS; t++)
                for (int c = 0; c < ACROSS; c++) square[c][t] = table[token[t] * vocab + i + c];
        } else {
            for (int t = 0; t < width; t++)
                for (int c = 0; c < height; c++) square[c][t] = table[token[t] * vocab + i + c];
        }
        for (int c = 0; c < height; c++)
            for (int h = 0; h < 2; h++) *half(tile, i + c, h) += *half(square, c, h);
    }
}

/* losses (blocks, tokens): cross-entropy of logits + table[tokens], in nats; grad, if not NULL, the gradient of their
   mean at the logits. */
void next_token_loss_float32(const float *logits, const float *table, const int64_t *token, const int64_t *target,
                             float *losses, float *grad, int64_t blocks, int64_t vocab, int64_t tokens, int64_t step,
                             int64_t stride, int32_t threads) {
    const float share = 1 / (float)(blocks * tokens);
#pragma omp parallel num_threads(threads)
    {
        Work w = work_for(vocab, 1);
        row *tile = w.tile;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_units(blocks, tokens); i++) {
            Unit u = unit_of(i, tokens);
            for (int64_t t = u.first; t < u.end; t += ACROSS) {
                int64_t at = u.block * vocab * tokens + t * stride, place = u.block * tokens + t;
                int width = (int)smaller(ACROSS, u.end - t);
                load(logits + at, vocab, step, stride, width, tile);
                if (table) add_rows(tile, table, token + place, vocab, width);
                row most, sum = {0}, right = {0};
                memcpy(most, tile[0], sizeof(row));
                for (int64_t v = 1; v < vocab; v++)
                    for (int h = 0; h < 2; h++) {
                        floats *m = half(&most, 0, h), value = *half(tile, v, h);
                        *m = choose(value > *m, value, *m);
                    }
                for (int j = 0; j < width; j++) right[j] = tile[target[place + j]][j] - most[j];
                for (int64_t from = 0; from < vocab; from += FEW) {
                    row some = {0}; /* few are summed at a time, for precision */
                    for (int64_t v = from; v < smaller(from + FEW, vocab); v++)
                        for (int h = 0; h < 2; h++) {
                            *half(tile, v, h) = exponential(*half(tile, v, h) - *half(&most, 0, h));
                            *half(&some, 0, h) += *half(tile, v, h);
                        }
                    for (int h = 0; h < 2; h++) *half(&sum, 0, h) += *half(&some, 0, h);
                }
                for (int j = 0; j < width; j++) losses[place + j] = (float)(log(sum[j]) - right[j]);
                if (!grad) continue;
                for (int h = 0; h < 2; h++) *half(&sum, 0, h) = share / *half(&sum, 0, h);
                for (int64_t v = 0; v < vocab; v++)
                    for (int h = 0; h < 2; h++) *half(tile, v, h) *= *half(&sum, 0, h);
                for (int j = 0; j < width; j++) tile[target[place + j]][j] -= share;
                store(tile, grad + at, vocab, step, stride, width);
            }
        }
        free(w.memory);
    }
}

/* table_grad (vocab, vocab): to each row the sum of grad over the tokens of that row, in their order. */
void table_gradient_float32(const float *grad, const int64_t *token, float *table_grad, int64_t blocks, int64_t vocab,
                            int64_t tokens, int64_t step, int64_t stride, int32_t threads) {
    int64_t strips = (vocab + WIDE - 1) / WIDE;
#pragma omp parallel num_threads(threads)
    {
        /* Rows of the table lie whole pages apart: the sums are made side by side. */
        float(*sums)[WIDE] = aligned_alloc(64, vocab * sizeof(*sums));
#pragma omp for schedule(dynamic)
        for (int64_t strip = 0; strip < strips; strip++) {
            int64_t from = strip * WIDE, height = smaller(WIDE, vocab - from);
            memset(sums, 0, vocab * sizeof(*sums));
            for (int64_t place = 0; place < blocks * tokens; place += ACROSS) {
                /* a tile of neighbouring tokens, which may not pass the end of a matrix */
                int64_t block = place / tokens, t = place % tokens;
                int width = (int)smaller(ACROSS, tokens - t);
                const float *in = grad + (block * vocab * tokens + t * stride + from * step);
                float some[ACROSS][WIDE] = {{0}};
                if (height == WIDE && width == ACROSS && stride == 1) {
                    for (int c = 0; c < WIDE; c++)
                        for (int j = 0; j < ACROSS; j++) some[j][c] = in[c * step + j];
                } else {
                    for (int j = 0; j < width; j++)
                        for (int c = 0; c < height; c++) some[j][c] = in[c * step + j * stride];
                }
                for (int j = 0; j < width; j++)
                    for (int c = 0; c < WIDE; c++) sums[token[place + j]][c] += some[j][c];
                place -= ACROSS - width;
            }
            for (int64_t r = 0; r < vocab; r++) memcpy(table_grad + r * vocab + from, sums[r], height * sizeof(float));
        }
        free(sums);
    }
}
