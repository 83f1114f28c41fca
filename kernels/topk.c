/* Exact selection of the k entries of greatest magnitude in each row, or in each column, for CPUs.
 *
 * The magnitudes of IEEE floats order like their bits without the sign, so the k-th largest is found by bisecting
 * an integer threshold; each step counts one row, which stays in the L1 cache and vectorises. Columns are taken 16 at
 * a time, each with a threshold of its own. Ties at the threshold go to the lowest index. NaN counts as larger than
 * every number.
 */
#ifndef WORD /* The file includes itself, once for each type of float: see its end. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ACROSS 16   /* columns taken together: two vectors of fp32, one of bf16 */
#define FLUSH 16384 /* rows whose count fits the smallest type */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAMED(name) JOIN(name, SUFFIX)

typedef int32_t lanes_float32 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int16_t lanes_bfloat16 __attribute__((vector_size(32), aligned(2), may_alias));

#define WORD uint32_t
#define COUNT int32_t
#define SIGNLESS 0x7fffffffu
#define SUFFIX _float32
#include "topk.c"
#undef WORD
#undef COUNT
#undef SIGNLESS
#undef SUFFIX
#undef LANES
#undef VECTORS
#define WORD uint16_t
#define COUNT int16_t
#define SIGNLESS 0x7fffu
#define SUFFIX _bfloat16
#include "topk.c"

#else

/* How many of at most FLUSH magnitudes are `least` or more; the sum is of the smallest type, so the most lanes. */
static inline int64_t NAMED(count_few)(const WORD *x, int64_t n, COUNT least) {
    COUNT above = 0;
    for (int64_t i = 0; i < n; i++) above += (COUNT)(x[i] & SIGNLESS) >= least;
    return above;
}

static int64_t NAMED(count)(const WORD *x, int64_t d, COUNT least, int32_t threads) {
    int64_t above = 0;
    if (threads > 1) {
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : above)
        for (int64_t from = 0; from < d; from += FLUSH) above += NAMED(count_few)(x + from, smaller(FLUSH, d - from), least);
    } else {
        for (int64_t from = 0; from < d; from += FLUSH) above += NAMED(count_few)(x + from, smaller(FLUSH, d - from), least);
    }
    return above;
}

/* y = the k entries of x (d of them) that are greatest in magnitude, the others zero. */
static void NAMED(keep)(const WORD *restrict x, WORD *restrict y, int64_t d, int64_t k, int32_t threads) {
    COUNT top = 0;
    int64_t low = 0, high; /* count(>= low) >= k > count(>= high); wider than COUNT, since high may pass its end */
    for (int64_t i = 0; i < d; i++) {
        COUNT magnitude = (COUNT)(x[i] & SIGNLESS);
        top = magnitude > top ? magnitude : top;
    }
    high = (int64_t)top + 1;
    int64_t kept = d; /* how many are >= low */
    while (high - low > 1 && kept != k) {
        COUNT middle = (COUNT)((low + high) / 2);
        int64_t above = NAMED(count)(x, d, middle, threads);
        if (above >= k) {
            low = middle;
            kept = above;
        } else {
            high = middle;
        }
    }
    for (int64_t i = 0; i < d; i++) y[i] = (COUNT)(x[i] & SIGNLESS) >= (COUNT)low ? x[i] : 0;
    for (int64_t i = d - 1; kept > k && i >= 0; i--) {
        if ((COUNT)(x[i] & SIGNLESS) == low) {
            y[i] = 0;
            kept--;
        }
    }
}

#define LANES NAMED(lanes)
#define VECTORS (ACROSS * (int)sizeof(WORD) / 32)

/* The same down each of `width` neighbouring columns of a matrix of d rows, `stride` apart; `copy` holds the
   magnitudes, d * VECTORS. */
static void NAMED(keep_down)(const WORD *x, WORD *y, int64_t d, int64_t stride, int width, int64_t k, LANES *copy) {
    WORD padded[ACROSS] = {0};
    union { LANES vector[VECTORS]; COUNT lane[ACROSS]; } top = {{{0}}}, middle = {{{0}}}, some;
    for (int64_t i = 0; i < d; i++) {
        const WORD *row = x + i * stride;
        if (width < ACROSS) row = memcpy(padded, row, width * sizeof(WORD));
        for (int v = 0; v < VECTORS; v++) {
            LANES magnitude = ((const LANES *)row)[v] & (COUNT)SIGNLESS, greater = magnitude > top.vector[v];
            copy[i * VECTORS + v] = magnitude;
            top.vector[v] = (magnitude & greater) | (top.vector[v] & ~greater);
        }
    }
    int64_t low[ACROSS] = {0}, high[ACROSS], kept[ACROSS];
    for (int c = 0; c < ACROSS; c++) {
        high[c] = (int64_t)top.lane[c] + 1;
        kept[c] = d;
    }
    for (int unfinished = 1; unfinished;) {
        int64_t above[ACROSS] = {0};
        unfinished = 0;
        for (int c = 0; c < width; c++) {
            unfinished |= high[c] - low[c] > 1 && kept[c] != k;
            middle.lane[c] = (COUNT)((low[c] + high[c]) / 2);
        }
        for (int64_t from = 0; unfinished && from < d; from += FLUSH) {
            for (int v = 0; v < VECTORS; v++) {
                LANES sum = {0};
                for (int64_t i = from; i < smaller(from + FLUSH, d); i++)
                    sum -= copy[i * VECTORS + v] >= middle.vector[v]; /* true is -1 */
                some.vector[v] = sum;
            }
            for (int c = 0; c < ACROSS; c++) above[c] += some.lane[c];
        }
        for (int c = 0; c < width; c++)
            if (high[c] - low[c] > 1 && kept[c] != k) {
                if (above[c] >= k) {
                    low[c] = middle.lane[c];
                    kept[c] = above[c];
                } else {
                    high[c] = middle.lane[c];
                }
            }
    }
    for (int c = 0; c < ACROSS; c++) middle.lane[c] = (COUNT)low[c];
    for (int64_t i = 0; i < d; i++) {
        const WORD *row = x + i * stride;
        if (width < ACROSS) row = memcpy(padded, row, width * sizeof(WORD));
        for (int v = 0; v < VECTORS; v++)
            some.vector[v] = ((const LANES *)row)[v] & (copy[i * VECTORS + v] >= middle.vector[v]);
        memcpy(y + i * stride, &some, width * sizeof(WORD));
    }
    for (int c = 0; c < width; c++)
        for (int64_t i = d - 1; kept[c] > k && i >= 0; i--)
            if (((COUNT *)(copy + i * VECTORS))[c] == (COUNT)low[c]) {
                y[i * stride + c] = 0;
                kept[c]--;
            }
}

/* out = AbsTopK(in) down the columns of `blocks` matrices of d rows and `tokens` columns. */
void NAMED(abs_topk_down)(const WORD *in, WORD *out, int64_t blocks, int64_t d, int64_t tokens, int64_t k,
                          int32_t threads) {
    int64_t tiles = (tokens + ACROSS - 1) / ACROSS;
#pragma omp parallel num_threads(threads)
    {
        LANES *copy = malloc(d * VECTORS * sizeof(LANES));
#pragma omp for schedule(dynamic, 4)
        for (int64_t tile = 0; tile < blocks * tiles; tile++) {
            int64_t column = tile % tiles * ACROSS, start = tile / tiles * d * tokens + column;
            NAMED(keep_down)(in + start, out + start, d, tokens, (int)smaller(ACROSS, tokens - column), k, copy);
        }
        free(copy);
    }
}

/* out = AbsTopK(in) for n rows of d: rows in parallel, or the counts of a single long one. */
void NAMED(abs_topk)(const WORD *in, WORD *out, int64_t n, int64_t d, int64_t k, int32_t threads) {
    if (n == 1) {
        NAMED(keep)(in, out, d, k, threads);
        return;
    }
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int64_t row = 0; row < n; row++) NAMED(keep)(in + row * d, out + row * d, d, k, 1);
}

/* Gradient of AbsTopK: passes where the output is not zero. */
void NAMED(abs_topk_backward)(const WORD *restrict grad, const WORD *restrict out, WORD *restrict in_grad, int64_t n,
                              int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) in_grad[i] = (out[i] & SIGNLESS) ? grad[i] : 0;
}
#endif
