/* Exact selection of the k entries of greatest magnitude in each row, for CPUs; tiles.c selects in columns.
 *
 * The magnitudes of IEEE floats order like their bits without the sign, so the k-th largest is found by bisecting
 * an integer threshold; each step counts one row, which stays in the L1 cache and vectorises. Ties at the threshold
 * go to the lowest index. NaN counts as larger than every number.
 */
#ifndef WORD /* The file includes itself, once for each type of float: see its end. */
#include <stdint.h>

#define FLUSH 16384 /* rows whose count fits the smallest type */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAMED(name) JOIN(name, SUFFIX)

#define WORD uint32_t
#define COUNT int32_t
#define SIGNLESS 0x7fffffffu
#define SUFFIX _float32
#include "topk.c"
#undef WORD
#undef COUNT
#undef SIGNLESS
#undef SUFFIX
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
