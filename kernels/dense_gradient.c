/* The gradient of a dense weight, G = sum over blocks of y[b] x[b]^T, where many entries of y are exactly zero.
 *
 * Behind AbsTopK three quarters of y are zero: for each row of G only the tokens that matter are listed, and their x
 * added up. G is made in tiles that stay in the L2 cache; a sub-tile of x, transposed so that its channels are
 * contiguous, stays in the L1 cache while the rows of the tile pass over it. Sums are fp32, in the order of the
 * tokens, whatever the threads.
 */
#ifndef ELEMENT /* The file includes itself, once for each type of activation: see its end. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));

#define LANES 8
#define ROWS 256 /* of a tile of G */
#define COLUMNS 512
#define TOKENS 64  /* taken at once */
#define WORD 32    /* values whose zeros are told apart at once */
#define BATCH 4
#define STRIP 64   /* columns whose sums stay in registers */
#define UNROLL _Pragma("GCC unroll 8")
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAMED(name) JOIN(name, SUFFIX)

typedef struct {
    int32_t token;
    float value;
} Entry;

typedef struct { /* the entries of y that are not zero: some tokens of each row of a tile */
    int32_t count[ROWS];
    Entry entry[ROWS][TOKENS + BATCH];
} List;

typedef float Strip[TOKENS][STRIP]; /* of x: its tokens, each with its channels contiguous */
typedef float Sums[ROWS][STRIP];

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline float get_float32(const float *p) { return *p; }
static inline float get_bfloat16(const uint16_t *p) {
    union { uint32_t bits; float value; } word = {(uint32_t)*p << 16};
    return word.value;
}

/* Which of WORD values are not zero: a bit each. */
static inline uint32_t nonzero(const float *values) {
    union { ints lane; int64_t quarter[4]; } found = {{0}};
    ints bit = {1, 2, 4, 8, 16, 32, 64, 128};
    for (int v = 0; v < WORD / LANES; v++, bit <<= 8) found.lane |= (((const ints *)values)[v] << 1 != 0) & bit;
    uint64_t both = found.quarter[0] | found.quarter[1] | found.quarter[2] | found.quarter[3];
    return (uint32_t)both | (uint32_t)(both >> 32);
}

/* Writes those of WORD values from `start` that are not zero; returns what comes after them. BATCH are written at a
   time, since the end of a few is hard to predict; what follows them is overwritten. */
static inline Entry *append(Entry *next, const float *values, int32_t start) {
    uint64_t left = nonzero(values + start);
    Entry *end = next + __builtin_popcountll(left);
    while (next < end) {
        for (int b = 0; b < BATCH; b++, left &= left - 1) {
            int32_t t = start + __builtin_ctzll(left | (uint64_t)1 << (WORD - 1));
            next[b] = (Entry){t, values[t]};
        }
        next += BATCH;
    }
    return end;
}

/* Three rounds of interleaving rows that are 4 apart. */
static inline void transpose(const float (*square)[LANES], float *to) {
    const ints low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
    floats a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i++) a[i] = *(const floats *)square[i];
    UNROLL for (int round = 0; round < 3; round++) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + LANES / 2], low);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + LANES / 2], high);
        }
        UNROLL for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) *(floats *)(to + i * STRIP) = a[i];
}

/* sums (height, COLUMNS) += listed entries of y times x (TOKENS, COLUMNS). */
static void add(const List *list, const Strip *x, Sums *sums, int64_t height, int64_t strips) {
    for (int64_t strip = 0; strip < strips; strip++)
        for (int64_t row = 0; row < height; row++) {
            floats *sum = (floats *)sums[strip][row], kept[STRIP / LANES];
            UNROLL for (int i = 0; i < STRIP / LANES; i++) kept[i] = sum[i];
            for (int32_t e = 0; e < list->count[row]; e++) {
                Entry y = list->entry[row][e];
                const floats *source = (const floats *)x[strip][y.token];
                UNROLL for (int i = 0; i < STRIP / LANES; i++) kept[i] += source[i] * y.value;
            }
            UNROLL for (int i = 0; i < STRIP / LANES; i++) sum[i] = kept[i];
        }
}

#define ELEMENT float
#define SUFFIX _float32
#include "dense_gradient.c"
#undef ELEMENT
#undef SUFFIX
#define ELEMENT uint16_t
#define SUFFIX _bfloat16
#include "dense_gradient.c"

#else

static void NAMED(list)(List *list, const ELEMENT *y, int64_t height, int64_t tokens, int64_t n) {
    for (int64_t row = 0; row < height; row++) {
        float values[TOKENS] = {0};
        for (int64_t t = 0; t < n; t++) values[t] = NAMED(get)(y + row * tokens + t);
        Entry *next = list->entry[row];
        for (int32_t t = 0; t < n; t += WORD) next = append(next, values, t);
        list->count[row] = (int32_t)(next - list->entry[row]);
    }
}

/* The strips of x (width, tokens), transposed; channels past the last keep what was there, which nobody reads. */
static void NAMED(turn)(const ELEMENT *x, Strip *strips, int64_t width, int64_t tokens, int64_t n) {
    for (int64_t c = 0; c < width; c += LANES) {
        float *to = strips[c / STRIP][0] + c % STRIP;
        int64_t t = 0;
        if (c + LANES <= width)
            for (; t + LANES <= n; t += LANES) {
                float square[LANES][LANES];
                UNROLL for (int i = 0; i < LANES; i++)
                    UNROLL for (int j = 0; j < LANES; j++) square[i][j] = NAMED(get)(x + (c + i) * tokens + t + j);
                transpose(square, to + t * STRIP);
            }
        for (; t < n; t++)
            for (int64_t i = 0; i < smaller(LANES, width - c); i++) to[t * STRIP + i] = NAMED(get)(x + (c + i) * tokens + t);
    }
}

/* grad (rows, channels) = sum over blocks of y (rows, tokens) x (channels, tokens)^T. */
void NAMED(dense_gradient)(const ELEMENT *y, const ELEMENT *x, float *grad, int64_t rows, int64_t channels,
                           int64_t tokens, int64_t blocks, int32_t threads) {
    int64_t down = (rows + ROWS - 1) / ROWS, across = (channels + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads)
    {
        List *list = aligned_alloc(64, sizeof(List));
        Sums *sums = aligned_alloc(64, COLUMNS / STRIP * sizeof(Sums));
        Strip *strips = aligned_alloc(64, COLUMNS / STRIP * sizeof(Strip));
        memset(strips, 0, COLUMNS / STRIP * sizeof(Strip)); /* past the last channel it is read, and must be finite */
#pragma omp for schedule(dynamic, 1)
        for (int64_t tile = 0; tile < down * across; tile++) {
            int64_t row = tile / across * ROWS, column = tile % across * COLUMNS;
            int64_t height = smaller(ROWS, rows - row), width = smaller(COLUMNS, channels - column);
            memset(sums, 0, COLUMNS / STRIP * sizeof(Sums));
            for (int64_t block = 0; block < blocks; block++)
                for (int64_t start = 0; start < tokens; start += TOKENS) {
                    int64_t n = smaller(TOKENS, tokens - start);
                    NAMED(list)(list, y + (block * rows + row) * tokens + start, height, tokens, n);
                    NAMED(turn)(x + (block * channels + column) * tokens + start, strips, width, tokens, n);
                    add(list, (const Strip *)strips, sums, height, (width + STRIP - 1) / STRIP);
                }
            for (int64_t r = 0; r < height; r++)
                for (int64_t c = 0; c < width; c++) grad[(row + r) * channels + column + c] = sums[c / STRIP][r][c % STRIP];
        }
        free(list);
        free(sums);
        free(strips);
    }
}
#endif
