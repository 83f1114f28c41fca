/* From a dense matrix to a sparse one, for CPUs: the projection to the k entries of greatest magnitude, and the
 * nonzeros in both orders.
 *
 * A magnitude is an integer, the bits of the float without the sign: it orders as the magnitudes do, with every NaN
 * made one key above infinity. The projection guesses from a sample a bound that a little more than k entries reach,
 * gathers those and what the floors need in one pass, selects among them exactly, and writes zeros in place between
 * those that stay. A bound that turns out too high costs a second pass, never a wrong result. Zeros are never
 * gathered: kept or not, they are zero.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint64_t longs __attribute__((vector_size(32)));

#define LANES 8
#define WORD 32       /* entries that are compared at once, a bit of a word each */
#define GROUPS 16     /* whose greatest entries bound the j-th greatest of a row from below, for j up to GROUPS */
#define TILE 64       /* columns whose greatest entries stay in the L1 cache */
#define AT_ONCE 4     /* rows of a column's entries that are sorted in together */
#define PIECE 65536   /* entries of a unit of parallel work, more or less: their nonzeros' places start together */
#define SAMPLE 8192
#define SIGNLESS 0x7fffffff
#define INFINITE 0x7f800000
#define UNFORCED INT32_MIN /* the bit of a key that puts it below those that a floor keeps */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int32_t magnitude(int32_t bits) { return (int32_t)smaller(bits & SIGNLESS, INFINITE + 1); }

static inline ints least(ints a, ints b) {
    ints c;
    for (int l = 0; l < LANES; l++) c[l] = a[l] < b[l] ? a[l] : b[l];
    return c;
}
static inline ints greatest(ints a, ints b) {
    ints c;
    for (int l = 0; l < LANES; l++) c[l] = a[l] > b[l] ? a[l] : b[l];
    return c;
}

static int64_t count(const int32_t *keys, int64_t n, int32_t at_least) {
    int64_t above = 0;
    for (int64_t from = 0; from < n; from += INT16_MAX) {
        int32_t some = 0;
        for (int64_t i = from; i < smaller(from + INT16_MAX, n); i++) some += keys[i] >= at_least;
        above += some;
    }
    return above;
}

/* The k-th greatest of n keys, 1 <= k <= n, by bisection; `above` becomes how many reach it. Where no other key lies
   between, what is returned may be a little less. */
static int32_t kth_greatest(const int32_t *keys, int64_t n, int64_t k, int64_t *above) {
    int32_t top = INT32_MIN, bottom = INT32_MAX;
    for (int64_t i = 0; i < n; i++) {
        top = keys[i] > top ? keys[i] : top;
        bottom = keys[i] < bottom ? keys[i] : bottom;
    }
    int64_t low = bottom, high = (int64_t)top + 1; /* count(low) = above >= k > count(high) */
    *above = n;
    while (high - low > 1 && *above != k) {
        int32_t middle = (int32_t)((low + high) >> 1);
        int64_t reaching = count(keys, n, middle);
        if (reaching >= k) {
            low = middle;
            *above = reaching;
        } else {
            high = middle;
        }
    }
    return (int32_t)low;
}

/* A magnitude that, by a sample, a little more than k of n entries reach; at least 1. */
static int32_t guess(const int32_t *x, int64_t n, int64_t k, int32_t *sample) {
    int64_t expected = k * (double)SAMPLE / n, rank = expected + expected / 8 + 24, above; /* 3.5 sigma at 1 % */
    if (n < 4 * SAMPLE || rank >= SAMPLE) return 1;
    int64_t step = (int64_t)(0.6180339887 * n) | 1, at = 0; /* the golden section spreads over rows and columns */
    for (int64_t i = 0; i < SAMPLE; i++) {
        sample[i] = magnitude(x[at]);
        at = at + step < n ? at + step : at + step - n;
    }
    return (int32_t)larger(1, kth_greatest(sample, SAMPLE, rank, &above));
}

/* Which of WORD entries reach `bound`, or the bound of their column where it is lower: a bit each. */
static inline uint32_t reaching(const int32_t *x, int32_t bound, const int32_t *column_bounds) {
    union { ints lane; longs half; } found = {{0}};
    ints bit = {1, 2, 4, 8, 16, 32, 64, 128};
    for (int v = 0; v < WORD / LANES; v++, bit <<= 8) {
        ints bounds = (ints){0} + bound;
        if (column_bounds) bounds = least(bounds, *(const ints *)(column_bounds + v * LANES));
        found.lane |= ((*(const ints *)(x + v * LANES) & SIGNLESS) >= bounds) & bit;
    }
    uint64_t both = found.half[0] | found.half[1] | found.half[2] | found.half[3];
    return (uint32_t)both | (uint32_t)(both >> 32);
}

/* Appends the places of those of n entries that reach a bound, counted from `first`, and their keys. */
static inline __attribute__((always_inline)) int64_t gather_with(const int32_t *x, int64_t n, int32_t bound,
                                                                 const int32_t *column_bounds, int64_t first,
                                                                 int32_t *places, int32_t *keys) {
    int64_t n_found = 0, i = 0;
    for (; i + WORD <= n; i += WORD)
        for (uint32_t left = reaching(x + i, bound, column_bounds ? column_bounds + i : 0); left; left &= left - 1) {
            int64_t at = i + __builtin_ctz(left);
            places[n_found] = (int32_t)(first + at);
            if (keys) keys[n_found] = magnitude(x[at]) | UNFORCED;
            n_found++;
        }
    for (; i < n; i++)
        if ((x[i] & SIGNLESS) >= bound || (column_bounds && (x[i] & SIGNLESS) >= column_bounds[i])) {
            places[n_found] = (int32_t)(first + i);
            if (keys) keys[n_found] = magnitude(x[i]) | UNFORCED;
            n_found++;
        }
    return n_found;
}

static int64_t gather(const int32_t *x, int64_t n, int32_t bound, const int32_t *column_bounds, int64_t first,
                      int32_t *places, int32_t *keys) {
    if (!keys) return gather_with(x, n, bound, 0, first, places, 0);
    if (!column_bounds) return gather_with(x, n, bound, 0, first, places, keys);
    return gather_with(x, n, bound, column_bounds, first, places, keys);
}

/* At most the j-th greatest magnitude of a row, and at least 1: the j-th of the greatest of GROUPS groups. */
static int32_t row_bound(const int32_t *x, int64_t n, int64_t j) {
    int32_t top[GROUPS] = {0};
    if (j > GROUPS) return 1;
    int64_t i = 0;
    for (; i + GROUPS <= n; i += GROUPS)
        for (int g = 0; g < GROUPS; g++) top[g] = (x[i + g] & SIGNLESS) > top[g] ? x[i + g] & SIGNLESS : top[g];
    for (; i < n; i++) top[i % GROUPS] = (int32_t)larger(top[i % GROUPS], x[i] & SIGNLESS);
    int32_t bound = 0;
    for (int g = 0; g < GROUPS; g++) { /* the greatest value that j groups reach */
        int32_t reach = 0;
        for (int other = 0; other < GROUPS; other++) reach += top[other] >= top[g];
        if (reach >= j && top[g] > bound) bound = top[g];
    }
    return (int32_t)larger(1, smaller(bound, INFINITE + 1));
}

/* Lets a floor keep the j greatest nonzeros of a line of n keys; those of equal keys that come first. `at` says where
   the keys are (null: one after another), and `best` holds j places. */
static void force(int32_t *keys, const int32_t *at, int64_t n, int64_t j, int32_t *best) {
    int64_t n_best = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t place = at ? at[i] : (int32_t)i, key = keys[place] & SIGNLESS;
        if (!key || (n_best == j && key <= (keys[best[j - 1]] & SIGNLESS))) continue;
        int64_t rank = n_best < j ? n_best++ : j - 1;
        for (; rank > 0 && (keys[best[rank - 1]] & SIGNLESS) < key; rank--) best[rank] = best[rank - 1];
        best[rank] = place;
    }
    for (int64_t i = 0; i < n_best; i++) keys[best[i]] &= SIGNLESS;
}

/* The j greatest magnitudes of each of `width` neighbouring columns, falling: `top` (j, TILE). */
static void column_tops(const int32_t *x, int64_t rows, int64_t stride, int64_t width, int64_t j, int32_t *top) {
    memset(top, 0, j * TILE * sizeof(int32_t));
    for (int64_t row = 0; row < rows; row += AT_ONCE) {
        int32_t padded[AT_ONCE][TILE];
        const int32_t *in[AT_ONCE];
        for (int r = 0; r < AT_ONCE; r++) {
            in[r] = x + (row + r) * stride;
            if (row + r >= rows || width < TILE) {
                memset(padded[r], 0, sizeof(padded[r]));
                if (row + r < rows) memcpy(padded[r], in[r], width * sizeof(int32_t));
                in[r] = padded[r];
            }
        }
        for (int c = 0; c < TILE; c += LANES) {
            ints new[AT_ONCE];
            for (int r = 0; r < AT_ONCE; r++)
                new[r] = least(*(const ints *)(in[r] + c) & SIGNLESS, (ints){0} + (INFINITE + 1));
            for (int64_t i = 0; i < j; i++) {
                ints *kept = (ints *)(top + i * TILE + c), most = *kept;
                for (int r = 0; r < AT_ONCE; r++) {
                    ints other = least(most, new[r]);
                    most = greatest(most, new[r]);
                    new[r] = other;
                }
                *kept = most;
            }
        }
    }
}

/* The least key that stays of n where k do; of equal ones the last lose theirs. */
static int32_t cut(int32_t *keys, int64_t n, int64_t k) {
    int64_t above;
    if (k == 0) return INT32_MAX;
    if (k >= n) return INT32_MIN;
    int32_t least_kept = kth_greatest(keys, n, k, &above);
    for (int64_t i = n - 1; above > k && least_kept > UNFORCED; i--) /* at UNFORCED all are zeros */
        if (keys[i] == least_kept) {
            keys[i]--;
            above--;
        }
    return least_kept;
}

/* The projection of n entries in pieces of whole rows (of any size without floors). What is gathered from piece i is
   n_found[i] places within it, and keys, from i * piece on, and from starts[i] on once they are joined. */
typedef struct {
    int32_t *x, *places, *keys, *column_bounds, *column_ties;
    int64_t n, columns, min_per_row, min_per_column, piece, n_pieces, *n_found, *starts;
} projection;

/* The j-th greatest magnitude of each column of a tile, and how many of those equal to it its floor keeps. */
static void bound_columns(const projection *p, int64_t tile, int32_t *top) {
    int64_t from = tile * TILE, width = smaller(TILE, p->columns - from), j = p->min_per_column;
    column_tops(p->x + from, p->n / p->columns, p->columns, width, j, top);
    for (int64_t c = 0; c < width; c++) {
        int32_t last = top[(j - 1) * TILE + c], ties = last ? 0 : INT32_MAX; /* of too few nonzeros all are kept */
        for (int64_t i = 0; last && i < j; i++) ties += top[i * TILE + c] == last;
        p->column_bounds[from + c] = last ? last : 1;
        p->column_ties[from + c] = ties;
    }
}

/* Gathers from piece i what reaches `bound` and what the floors need; those of the rows keep theirs. */
static void gather_piece(const projection *p, int64_t i, int32_t bound, int32_t *best) {
    int64_t first = i * p->piece, size = smaller(p->piece, p->n - first), n_found = 0;
    int64_t run = p->min_per_row || p->min_per_column ? p->columns : size;
    int32_t *places = p->places + first, *keys = p->keys + first;
    for (int64_t from = 0; from < size; from += run) {
        const int32_t *x = p->x + first + from;
        int32_t lowest = p->min_per_row ? (int32_t)smaller(bound, row_bound(x, run, p->min_per_row)) : bound;
        const int32_t *column_bounds = p->min_per_column ? p->column_bounds : 0;
        int64_t more = gather(x, run, lowest, column_bounds, from, places + n_found, keys + n_found);
        if (p->min_per_row) force(keys + n_found, 0, more, p->min_per_row, best);
        n_found += more;
    }
    p->n_found[i] = n_found;
}

/* Moves the keys and places of all pieces together, and lets the floors of the columns keep theirs. */
static int64_t join(const projection *p) {
    int64_t total = 0;
    for (int64_t i = 0; i < p->n_pieces; i++) {
        p->starts[i] = total;
        memmove(p->places + total, p->places + i * p->piece, p->n_found[i] * sizeof(int32_t));
        memmove(p->keys + total, p->keys + i * p->piece, p->n_found[i] * sizeof(int32_t));
        total += p->n_found[i];
    }
    if (p->min_per_column)
        for (int64_t e = 0; e < total; e++) {
            uint32_t column = (uint32_t)p->places[e] % (uint32_t)p->columns;
            int32_t key = p->keys[e] & SIGNLESS, last = p->column_bounds[column];
            if (key > last || (key == last && p->column_ties[column]-- > 0)) p->keys[e] = key;
        }
    return total;
}

/* Zeros between those entries of piece i that stay. */
static void clear(const projection *p, int64_t i, int32_t least_kept) {
    int32_t *x = p->x + i * p->piece;
    int64_t done = 0, size = smaller(p->piece, p->n - i * p->piece);
    for (int64_t e = p->starts[i]; e < p->starts[i] + p->n_found[i]; e++)
        if (p->keys[e] >= least_kept) {
            memset(x + done, 0, (p->places[e] - done) * sizeof(int32_t));
            done = p->places[e] + 1;
        }
    memset(x + done, 0, (size - done) * sizeof(int32_t));
}

/* Projects n entries, `columns` a row, in place; see `reference.project`. */
void project(int32_t *x, int64_t n, int64_t columns, int64_t k, int64_t min_per_row, int64_t min_per_column,
             int32_t threads) {
    int64_t piece = min_per_row || min_per_column ? larger(1, PIECE / columns) * columns : PIECE;
    int64_t n_pieces = (n + piece - 1) / piece, n_tiles = min_per_column ? (columns + TILE - 1) / TILE : 0;
    projection p = {x, 0, 0, 0, 0, n, columns, min_per_row, min_per_column, piece, n_pieces, 0, 0};
    p.places = malloc(n * sizeof(int32_t)); /* only pages that something is gathered to are ever touched */
    p.keys = malloc(n * sizeof(int32_t));
    p.column_bounds = malloc(columns * sizeof(int32_t));
    p.column_ties = malloc(columns * sizeof(int32_t));
    p.n_found = malloc(n_pieces * sizeof(int64_t));
    p.starts = malloc(n_pieces * sizeof(int64_t));
    int32_t bound = guess(x, n, k, p.keys), least_kept = 0;
#pragma omp parallel num_threads(threads)
    {
        int32_t *best = malloc(larger(min_per_row, min_per_column * TILE) * sizeof(int32_t));
#pragma omp for schedule(dynamic)
        for (int64_t tile = 0; tile < n_tiles; tile++) bound_columns(&p, tile, best);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_pieces; i++) gather_piece(&p, i, bound, best);
#pragma omp single
        {
            int64_t total = join(&p);
            if (bound > 1 && count(p.keys, total, bound | UNFORCED) < k) { /* the guess was too high: take all */
                for (int64_t tile = 0; tile < n_tiles; tile++) bound_columns(&p, tile, best);
                for (int64_t i = 0; i < n_pieces; i++) gather_piece(&p, i, 1, best);
                total = join(&p);
            }
            least_kept = cut(p.keys, total, k);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_pieces; i++) clear(&p, i, least_kept);
        free(best);
    }
    free(p.places), free(p.keys), free(p.column_bounds), free(p.column_ties), free(p.n_found), free(p.starts);
}

/* Projects the values of a support in place: rows are `row_offsets`, columns `column_offsets` of to_column_major. */
void project_support(int32_t *values, const int32_t *row_offsets, const int32_t *column_offsets,
                     const int32_t *to_column_major, int64_t rows, int64_t columns, int64_t k, int64_t min_per_row,
                     int64_t min_per_column) {
    int32_t n = row_offsets[rows];
    int32_t *keys = malloc(n * sizeof(int32_t)), *best = malloc(larger(min_per_row, min_per_column) * sizeof(int32_t));
    for (int32_t e = 0; e < n; e++) keys[e] = magnitude(values[e]) | UNFORCED;
    for (int64_t row = 0; min_per_row && row < rows; row++)
        force(keys + row_offsets[row], 0, row_offsets[row + 1] - row_offsets[row], min_per_row, best);
    for (int64_t c = 0; min_per_column && c < columns; c++) {
        int32_t from = column_offsets[c], to = column_offsets[c + 1];
        force(keys, to_column_major + from, to - from, min_per_column, best);
    }
    int32_t least_kept = cut(keys, n, k);
    for (int32_t e = 0; e < n; e++) values[e] = keys[e] >= least_kept ? values[e] : 0;
    free(keys), free(best);
}

/* Lines from longest to shortest, those of equal length in order. */
static void sort_by_length(const int32_t *offsets, int64_t lines, int32_t *by_length) {
    int32_t longest = 0;
    for (int64_t i = 0; i < lines; i++) longest = (int32_t)larger(longest, offsets[i + 1] - offsets[i]);
    int32_t *next = calloc(longest + 2, sizeof(int32_t)); /* where the next line of each length goes */
    for (int64_t i = 0; i < lines; i++) next[longest - (offsets[i + 1] - offsets[i]) + 1]++;
    for (int32_t i = 0; i < longest; i++) next[i + 1] += next[i];
    for (int64_t i = 0; i < lines; i++) by_length[next[longest - (offsets[i + 1] - offsets[i])]++] = (int32_t)i;
    free(next);
}

/* The order by column of a matrix compressed by rows, and both orders' lines by length. */
void order_columns(const int32_t *offsets, const int32_t *indices, int64_t rows, int64_t columns,
                   int32_t *rows_by_length, int32_t *column_offsets, int32_t *column_indices,
                   int32_t *columns_by_length, int32_t *to_column_major) {
    int32_t *next = malloc(columns * sizeof(int32_t)); /* where the next nonzero of each column goes */
    memset(column_offsets, 0, (columns + 1) * sizeof(int32_t));
    for (int32_t e = 0; e < offsets[rows]; e++) column_offsets[indices[e] + 1]++;
    for (int64_t c = 0; c < columns; c++) {
        next[c] = column_offsets[c];
        column_offsets[c + 1] += column_offsets[c];
    }
    for (int64_t row = 0; row < rows; row++)
        for (int32_t e = offsets[row]; e < offsets[row + 1]; e++) {
            int32_t to = next[indices[e]]++;
            to_column_major[to] = e;
            column_indices[to] = (int32_t)row;
        }
    sort_by_length(offsets, rows, rows_by_length);
    sort_by_length(column_offsets, columns, columns_by_length);
    free(next);
}

/* Finds the nonzeros of x (rows, columns): offsets (rows + 1) of their rows, and their columns, those of each piece of
   rows from the piece's own place in `found` on. */
void find_nonzeros(const int32_t *x, int64_t rows, int64_t columns, int32_t *offsets, int32_t *found,
                   int32_t threads) {
    int64_t piece = larger(1, PIECE / larger(1, columns));
    offsets[0] = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < rows; first += piece) {
        int32_t *next = found + first * columns;
        for (int64_t row = first; row < smaller(first + piece, rows); row++) {
            offsets[row + 1] = (int32_t)gather(x + row * columns, columns, 1, 0, 0, next, 0);
            next += offsets[row + 1];
        }
    }
    for (int64_t row = 0; row < rows; row++) offsets[row + 1] += offsets[row];
}

/* Takes what `find_nonzeros` found together: the columns and values of all rows, in order. */
void take_nonzeros(const int32_t *x, int64_t rows, int64_t columns, const int32_t *offsets, const int32_t *found,
                   int32_t *indices, int32_t *values) {
    int64_t piece = larger(1, PIECE / larger(1, columns));
    for (int64_t first = 0; first < rows; first += piece) {
        int64_t end = smaller(first + piece, rows);
        memcpy(indices + offsets[first], found + first * columns, (offsets[end] - offsets[first]) * sizeof(int32_t));
        for (int64_t row = first; row < end; row++)
            for (int32_t e = offsets[row]; e < offsets[row + 1]; e++) values[e] = x[row * columns + indices[e]];
    }
}

/* The places of the values that are not zero, and the offsets of their rows. */
void drop_zeros(const int32_t *values, const int32_t *offsets, int64_t rows, int32_t *kept_offsets, int32_t *places) {
    int32_t n = 0;
    kept_offsets[0] = 0;
    for (int64_t row = 0; row < rows; row++) {
        for (int32_t e = offsets[row]; e < offsets[row + 1]; e++) {
            places[n] = e;
            n += (values[e] & SIGNLESS) != 0;
        }
        kept_offsets[row + 1] = n;
    }
}
