/* Products of a sparse matrix with channel-major activations, for CPUs.
 *
 * Activations are (blocks, channels, tokens) with the tokens contiguous, so every nonzero is an axpy (or a dot) of
 * contiguous vectors. A tile of tokens stays in registers while a line's nonzeros stream past, and the channels of a
 * tile stay in the L2 cache while all lines do. Sums are fp32, in the order of the nonzeros, whatever the threads.
 */
#ifndef ELEMENT /* The file includes itself, once for each type of activation: see its end. */
#include <stdint.h>

typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32), aligned(2), may_alias));

#define LANES 8           /* floats of one vector */
#define PAIR (2 * LANES)  /* tokens of a pair of vectors */
#define TILE 64           /* tokens whose sums stay in registers */
#define CHUNK 128         /* tokens of one pass of the sampled product: their channels fill the L2 cache */
#define AHEAD 8           /* nonzeros between a prefetch and its use; the fastest of 0, 2, 4 and 8 */
#define LINES_AT_ONCE 512 /* lines of one unit of parallel work */
#define SQUARE 16         /* rows and columns of a tile that is transposed */
#define UNROLL _Pragma("GCC unroll 8")
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAMED(name) JOIN(name, SUFFIX)

/* A pair holds 16 tokens as two vectors: fp32 in order; bf16 as even and odd tokens, the two halves of each word. */
static inline void load_float32(const float *p, floats *a, floats *b) {
    *a = *(const floats *)p;
    *b = *(const floats *)(p + LANES);
}
static inline void store_float32(float *p, floats a, floats b) {
    *(floats *)p = a;
    *(floats *)(p + LANES) = b;
}
static inline float get_float32(const float *p) { return *p; }
static inline void put_float32(float *p, float a) { *p = a; }

/* To bf16 in the upper half of each word: to nearest even, and a NaN stays a NaN. */
static inline words rounded(floats a) {
    words bits = (words)a, is_nan = (words)(a != a);
    return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~is_nan) | (0x7fc00000u & is_nan);
}
static inline void load_bfloat16(const uint16_t *p, floats *a, floats *b) {
    words both = *(const words *)p;
    *a = (floats)(both << 16);
    *b = (floats)(both & 0xffff0000u);
}
static inline void store_bfloat16(uint16_t *p, floats a, floats b) {
    *(words *)p = (rounded(a) >> 16) | (rounded(b) & 0xffff0000u);
}
static inline float get_bfloat16(const uint16_t *p) {
    return ((floats)((words){*p} << 16))[0];
}
static inline void put_bfloat16(uint16_t *p, float a) { *p = (uint16_t)(rounded((floats){a})[0] >> 16); }

static inline float total(floats a) { return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])); }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#define ELEMENT float
#define SUFFIX _float32
#include "sparse_linear.c"
#undef ELEMENT
#undef SUFFIX
#define ELEMENT uint16_t
#define SUFFIX _bfloat16
#include "sparse_linear.c"

#else

/* bias + one line of the matrix times 16 * pairs tokens; `pairs` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void NAMED(tile)(const ELEMENT *x, ELEMENT *y, int64_t tokens,
                                                              const float *values, const int32_t *indices,
                                                              int32_t from, int32_t to, int32_t last, float bias,
                                                              const int pairs) {
    floats even[TILE / PAIR], odd[TILE / PAIR];
    UNROLL for (int i = 0; i < pairs; i++) even[i] = odd[i] = (floats){0} + bias;
    for (int32_t e = from; e < to; e++) {
        const ELEMENT *source = x + indices[e] * tokens;
        const char *next = (const char *)(x + indices[smaller(e + AHEAD, last)] * tokens);
        UNROLL for (int i = 0; i < pairs * PAIR * (int)sizeof(ELEMENT); i += 64) __builtin_prefetch(next + i);
        UNROLL for (int i = 0; i < pairs; i++) {
            floats a, b;
            NAMED(load)(source + i * PAIR, &a, &b);
            even[i] += a * values[e];
            odd[i] += b * values[e];
        }
    }
    UNROLL for (int i = 0; i < pairs; i++) NAMED(store)(y + i * PAIR, even[i], odd[i]);
}

/* y (blocks, lines, tokens) = A x + bias, for x (blocks, channels, tokens) and A compressed by lines. */
void NAMED(matmul)(const ELEMENT *x, ELEMENT *y, const float *values, const int32_t *indices, const int32_t *offsets,
                   const float *bias, int64_t lines, int64_t channels, int64_t tokens, int64_t blocks,
                   int32_t threads) {
    int64_t tiles = (tokens + TILE - 1) / TILE, parts = (lines + LINES_AT_ONCE - 1) / LINES_AT_ONCE;
    int32_t last = offsets[lines] - 1;
#pragma omp parallel for collapse(2) schedule(dynamic, 4) num_threads(threads)
    for (int64_t tile = 0; tile < blocks * tiles; tile++)
        for (int64_t part = 0; part < parts; part++) {
            int64_t block = tile / tiles, start = tile % tiles * TILE, stop = smaller(start + TILE, tokens);
            const ELEMENT *in = x + block * channels * tokens;
            int64_t end = smaller((part + 1) * LINES_AT_ONCE, lines);
            int64_t after = smaller(tile + 1, blocks * tiles - 1);
            const ELEMENT *soon = x + after / tiles * channels * tokens + after % tiles * TILE;
            for (int64_t line = part * LINES_AT_ONCE; line < end; line++) {
                ELEMENT *out = y + (block * lines + line) * tokens;
                /* Nonzeros come in random order, which no hardware prefetches; each line fetches its share of what
                   the next tile will read. */
                for (int64_t c = line * channels / lines; c < (line + 1) * channels / lines; c++)
                    for (int i = 0; i < TILE * (int)sizeof(ELEMENT); i += 64)
                        __builtin_prefetch((const char *)(soon + c * tokens) + i, 0, 2);
                int32_t from = offsets[line], to = offsets[line + 1];
                float add = bias ? bias[line] : 0;
                int64_t t = start;
                for (; t + TILE <= stop; t += TILE)
                    NAMED(tile)(in + t, out + t, tokens, values, indices, from, to, last, add, TILE / PAIR);
                for (; t + PAIR <= stop; t += PAIR)
                    NAMED(tile)(in + t, out + t, tokens, values, indices, from, to, last, add, 1);
                for (; t < stop; t++) {
                    float sum = add;
                    for (int32_t e = from; e < to; e++) sum += values[e] * NAMED(get)(in + indices[e] * tokens + t);
                    NAMED(put)(out + t, sum);
                }
            }
        }
}

/* grad[e] = sum over blocks and tokens of y[line of e] * x[index of e]: y x^T at the nonzeros of A. */
void NAMED(sampled_matmul)(const ELEMENT *y, const ELEMENT *x, float *grad, const int32_t *indices,
                           const int32_t *offsets, int64_t lines, int64_t channels, int64_t tokens, int64_t blocks,
                           int32_t threads) {
    int64_t nonzeros = offsets[lines];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int32_t thread = 0; thread < threads; thread++) {
        int64_t first = 0, end; /* this thread's lines: those that start within its share of the nonzeros */
        while (first < lines && offsets[first] < nonzeros * thread / threads) first++;
        for (end = first; end < lines && offsets[end] < nonzeros * (thread + 1) / threads;) end++;
        for (int32_t e = offsets[first]; e < offsets[end]; e++) grad[e] = 0;
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t start = 0; start < tokens; start += CHUNK) {
                const ELEMENT *in = x + block * channels * tokens + start;
                int64_t n = smaller(CHUNK, tokens - start), pairs = n / PAIR;
                for (int64_t line = first; line < end; line++) {
                    const ELEMENT *out = y + (block * lines + line) * tokens + start;
                    floats even[CHUNK / PAIR], odd[CHUNK / PAIR];
                    for (int64_t i = 0; i < pairs; i++) NAMED(load)(out + i * PAIR, even + i, odd + i);
                    for (int32_t e = offsets[line]; e < offsets[line + 1]; e++) {
                        const ELEMENT *source = in + indices[e] * tokens;
                        const ELEMENT *next = in + indices[smaller(e + AHEAD, nonzeros - 1)] * tokens;
                        floats sum = {0}, other = {0};
                        for (int64_t i = 0; i < pairs; i++) {
                            floats a, b;
                            __builtin_prefetch(next + i * PAIR);
                            NAMED(load)(source + i * PAIR, &a, &b);
                            sum += a * even[i];
                            other += b * odd[i];
                        }
                        float rest = 0;
                        for (int64_t t = pairs * PAIR; t < n; t++) rest += NAMED(get)(out + t) * NAMED(get)(source + t);
                        grad[e] += total(sum + other) + rest;
                    }
                }
            }
    }
}

/* y (blocks, columns, rows) = x (blocks, rows, columns), each matrix transposed, by tiles that fit the L1 cache. */
void NAMED(transpose)(const ELEMENT *restrict x, ELEMENT *restrict y, int64_t blocks, int64_t rows, int64_t columns,
                      int32_t threads) {
    int64_t strips = (rows + SQUARE - 1) / SQUARE;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t strip = 0; strip < blocks * strips; strip++) {
        int64_t row = strip % strips * SQUARE, height = smaller(SQUARE, rows - row);
        const ELEMENT *in = x + (strip / strips * rows + row) * columns;
        ELEMENT *out = y + strip / strips * rows * columns + row;
        for (int64_t column = 0; column < columns; column += SQUARE) {
            int64_t width = smaller(SQUARE, columns - column);
            ELEMENT tile[SQUARE][SQUARE];
            if (height == SQUARE && width == SQUARE) {
                for (int r = 0; r < SQUARE; r++)
                    for (int c = 0; c < SQUARE; c++) tile[c][r] = in[r * columns + column + c];
                for (int c = 0; c < SQUARE; c++)
                    for (int r = 0; r < SQUARE; r++) out[(column + c) * rows + r] = tile[c][r];
            } else {
                for (int64_t c = 0; c < width; c++)
                    for (int64_t r = 0; r < height; r++) out[(column + c) * rows + r] = in[r * columns + column + c];
            }
        }
    }
}
#endif
