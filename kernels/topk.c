/* Exact selection of the k entries of greatest magnitude in each row, for CPUs.
 *
 * The magnitudes of IEEE floats order like their bits without the sign, so the k-th largest is found by bisecting
 * an integer threshold; each step counts one row, which stays in the L1 cache and vectorises. Ties at the
 * threshold go to the lowest index. NaN counts as larger than every number.
 */
#include <stdint.h>

#define DEFINE_TOPK(NAME, WORD, COUNT, SIGNLESS)                                                            \
    /* Keep the k greatest magnitudes of each of n rows of d, zero the others: out = AbsTopK(in). */        \
    void abs_topk_##NAME(const WORD *restrict in, WORD *restrict out, int64_t n, int64_t d, int64_t k) {    \
        for (int64_t row = 0; row < n; row++) {                                                             \
            const WORD *restrict x = in + row * d;                                                          \
            WORD *restrict y = out + row * d;                                                               \
            COUNT low = 0, high = 0; /* count(>= low) >= k > count(>= high) */                              \
            for (int64_t i = 0; i < d; i++) {                                                               \
                COUNT magnitude = (COUNT)(x[i] & SIGNLESS);                                                 \
                high = magnitude > high ? magnitude : high;                                                 \
            }                                                                                               \
            high += 1;                                                                                      \
            int64_t kept = d; /* how many are >= low */                                                     \
            while (high - low > 1 && kept != k) {                                                           \
                COUNT middle = (COUNT)(low + (high - low) / 2);                                             \
                int32_t above = 0;                                                                          \
                for (int64_t i = 0; i < d; i++) above += (COUNT)(x[i] & SIGNLESS) >= middle;                \
                if (above >= k) {                                                                           \
                    low = middle;                                                                           \
                    kept = above;                                                                           \
                } else {                                                                                    \
                    high = middle;                                                                          \
                }                                                                                           \
            }                                                                                               \
            for (int64_t i = 0; i < d; i++) y[i] = (COUNT)(x[i] & SIGNLESS) >= low ? x[i] : 0;              \
            for (int64_t i = d - 1; kept > k && i >= 0; i--) {                                              \
                if ((COUNT)(x[i] & SIGNLESS) == low) {                                                      \
                    y[i] = 0;                                                                               \
                    kept--;                                                                                 \
                }                                                                                           \
            }                                                                                               \
        }                                                                                                   \
    }                                                                                                       \
    /* Gradient of AbsTopK: passes where the output is not zero. */                                         \
    void abs_topk_backward_##NAME(const WORD *restrict grad, const WORD *restrict out, WORD *restrict in_grad, \
                                  int64_t n) {                                                              \
        for (int64_t i = 0; i < n; i++) in_grad[i] = (out[i] & SIGNLESS) ? grad[i] : 0;                     \
    }

DEFINE_TOPK(float32, uint32_t, int32_t, 0x7fffffffu)
DEFINE_TOPK(bfloat16, uint16_t, int16_t, 0x7fffu)
