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
#define ACROSS 16     /* lines whose greatest entries are found together */
#define TILE 64       /* columns whose greatest entries stay in the L1 cache */
#define AT_ONCE 4     /* rows of a column's entries that are sorted in together */
#define PIECE 65536   /* entries of a unit of parallel work, more or less */
#define BATCH 4       /* divides WORD, so that no more is overwritten than there are entries */
#define SAMPLE 8192
#define KEPT (1 << 23)  /* integers, 32 MiB */
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
    int64_t size = smaller(SAMPLE, n / 16), expected = k * (double)size / n, above;
    int64_t rank = expected + expected / 8 + 24; /* 3.5 sigma at 1 % */
    if (rank >= size) return 1;
    int64_t step = (int64_t)(0.6180339887 * n) | 1, at = 0; /* the golden section spreads over rows and columns */
    for (int64_t i = 0; i < size; i++) {
        sample[i] = magnitude(x[at]);
        at = at + step < n ? at + step : at + step - n;
    }
    return (int32_t)larger(1, kth_greatest(sample, size, rank, &above));
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

/* Writes the places of those of n entries that reach a bound, counted from `first`, and returns how many there are.
   BATCH are written at a time, since the end of a few is hard to predict; what follows them is overwritten. */
static inline __attribute__((always_inline)) int64_t gather(const int32_t *x, int64_t n, int32_t bound,
                                                            const int32_t *column_bounds, int64_t first,
                                                            int32_t *places) {
    int32_t *next = places;
    int64_t i = 0;
    for (; i + WORD <= n; i += WORD) {
        uint64_t left = reaching(x + i, bound, column_bounds ? column_bounds + i : 0);
        int32_t *end = next + __builtin_popcountll(left);
        do {
            for (int b = 0; b < BATCH; b++, left &= left - 1)
                next[b] = (int32_t)(first + i + __builtin_ctzll(left | (uint64_t)1 << WORD));
            next += BATCH;
        } while (next < end);
        next = end;
    }
    for (; i < n; i++) {
        *next = (int32_t)(first + i);
        next += (x[i] & SIGNLESS) >= bound || (column_bounds && (x[i] & SIGNLESS) >= column_bounds[i]);
    }
    return next - places;
}

/* Keeps the j greatest of what `top` holds and n new ones in each lane, falling; its vectors are `stride` apart. */
static inline __attribute__((always_inline)) void sort_in(ints *top, int64_t stride, int64_t j, ints *new,
                                                          const int n) {
    for (int64_t i = 0; i < j; i++) {
        ints most = top[i * stride];
        for (int r = 0; r < n; r++) {
            ints other = least(most, new[r]);
            most = greatest(most, new[r]);
            new[r] = other;
        }
        top[i * stride] = most;
    }
}

/* At most the j-th greatest magnitude of a row, and at least 1: the j-th of the greatest of GROUPS groups. */
static int32_t row_bound(const int32_t *x, int64_t n, int64_t j) {
    union { ints vector[GROUPS / LANES]; int32_t group[GROUPS]; } top = {{{0}}}, reach = {{{0}}};
    if (j > GROUPS) return 1;
    int64_t i = 0;
    for (; i + GROUPS <= n; i += GROUPS)
        for (int v = 0; v < GROUPS / LANES; v++)
            top.vector[v] = greatest(top.vector[v], *(const ints *)(x + i + v * LANES) & SIGNLESS);
    for (; i < n; i++) top.group[i % GROUPS] = (int32_t)larger(top.group[i % GROUPS], x[i] & SIGNLESS);
    for (int g = 0; g < GROUPS; g++) /* how many groups reach each one's greatest; true is -1 */
        for (int v = 0; v < GROUPS / LANES; v++) reach.vector[v] -= top.group[g] >= top.vector[v];
    int32_t bound = 1;
    for (int g = 0; g < GROUPS; g++) bound = reach.group[g] >= j && top.group[g] > bound ? top.group[g] : bound;
    return (int32_t)smaller(bound, INFINITE + 1);
}

/* Lets a floor keep the j greatest nonzeros of each line; of equal keys those that come first. Line i has the entries
   offsets[i] to offsets[i + 1], and `at` says where their keys are (null: in order). Lines are taken ACROSS at a time,
   a lane each, since no branch can be predicted within one. `top` holds j * ACROSS keys. */
static void force(int32_t *keys, const int32_t *at, const int32_t *offsets, int64_t n_lines, int64_t j, int32_t *top) {
    for (int64_t first = 0; first < n_lines; first += ACROSS) {
        int32_t from[ACROSS] = {0}, length[ACROSS] = {0}, longest = 0;
        for (int64_t l = 0; l < smaller(ACROSS, n_lines - first); l++) {
            from[l] = offsets[first + l];
            length[l] = offsets[first + l + 1] - from[l];
            longest = length[l] > longest ? length[l] : longest;
        }
        memset(top, 0, j * ACROSS * sizeof(int32_t));
        for (int32_t i = 0; i < longest; i++) {
            union { ints vector[ACROSS / LANES]; int32_t lane[ACROSS]; } new;
            for (int l = 0; l < ACROSS; l++) {
                int32_t inside = i < length[l], e = (from[l] + i) * inside; /* past a line's end: any key, as 0 */
                new.lane[l] = keys[at ? at[e] : e] & SIGNLESS & -inside;
            }
            for (int v = 0; v < ACROSS / LANES; v++) sort_in((ints *)top + v, ACROSS / LANES, j, new.vector + v, 1);
        }
        for (int l = 0; l < ACROSS; l++) {
            int32_t last = top[(j - 1) * ACROSS + l], ties = 0;
            for (int64_t i = 0; last && i < j; i++) ties += top[i * ACROSS + l] == last;
            for (int32_t e = from[l]; e < from[l] + length[l]; e++) {
                int32_t *place = keys + (at ? at[e] : e), key = *place & SIGNLESS, tied = key == last;
                ties -= tied;
                *place &= (key > last) | (tied & (ties >= 0)) ? SIGNLESS : -1;
            }
        }
    }
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
            sort_in((ints *)(top + c), TILE / LANES, j, new, AT_ONCE);
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

/* The j-th greatest magnitude of each column of a tile, and how many of those equal to it its floor keeps. Returns how
   many the floors of the tile keep in all. */
static int64_t bound_columns(const projection *p, int64_t tile, int32_t *top) {
    int64_t from = tile * TILE, width = smaller(TILE, p->columns - from), j = p->min_per_column, n_forced = 0;
    column_tops(p->x + from, p->n / p->columns, p->columns, width, j, top);
    for (int64_t c = 0; c < width; c++) {
        int32_t last = top[(j - 1) * TILE + c], ties = last ? 0 : INT32_MAX; /* of too few nonzeros all are kept */
        for (int64_t i = 0; i < j; i++) {
            n_forced += top[i * TILE + c] != 0;
            ties += last && top[i * TILE + c] == last;
        }
        p->column_bounds[from + c] = last ? last : 1;
        p->column_ties[from + c] = ties;
    }
    return n_forced;
}

/* Gathers from piece i what reaches `bound` and what the floors need. Where a column's floor has a choice among equal
   entries all of them are kept, unless pieces come in turn. Returns how many the floors of columns keep. */
static int64_t gather_piece(const projection *p, int64_t i, int32_t bound, int in_turn, int32_t *offsets,
                            int32_t *top) {
    int64_t first = i * p->piece, size = smaller(p->piece, p->n - first), n_found = 0, n_forced = 0;
    int64_t run = p->min_per_row || p->min_per_column ? p->columns : size, j = p->min_per_row;
    offsets[0] = 0;
    for (int64_t from = 0; from < size; from += run) {
        const int32_t *x = p->x + first + from, *bounds = p->min_per_column ? p->column_bounds : 0;
        int32_t *places = p->places + first + n_found, *keys = p->keys + first + n_found;
        int32_t lowest = j ? (int32_t)smaller(bound, row_bound(x, run, j)) : bound;
        int64_t more = bounds ? gather(x, run, lowest, bounds, from, places) : gather(x, run, lowest, 0, from, places);
        for (int64_t e = 0; e < more; e++) keys[e] = magnitude(x[places[e] - from]) | UNFORCED;
        for (int64_t e = 0; bounds && e < more; e++) {
            int64_t column = places[e] - from;
            int32_t key = keys[e] & SIGNLESS;
            int keeps = key > bounds[column] || (key == bounds[column] && (!in_turn || p->column_ties[column]-- > 0));
            keys[e] &= keeps ? SIGNLESS : -1;
            n_forced += keeps;
        }
        n_found += more;
        offsets[from / run + 1] = (int32_t)n_found;
    }
    if (j) force(p->keys + first, 0, offsets, size / run, j, top);
    p->n_found[i] = n_found;
    return n_forced;
}

/* Moves the keys and places of all pieces together; returns how many there are. */
static int64_t join(const projection *p) {
    int64_t total = 0;
    for (int64_t i = 0; i < p->n_pieces; i++) {
        p->starts[i] = total;
        memmove(p->places + total, p->places + i * p->piece, p->n_found[i] * sizeof(int32_t));
        memmove(p->keys + total, p->keys + i * p->piece, p->n_found[i] * sizeof(int32_t));
        total += p->n_found[i];
    }
    return total;
}

/* Writes the entries of piece i that stay, and zeros for the others. */
static void write_piece(const projection *p, int64_t i, int32_t least_kept) {
    int32_t *x = p->x + i * p->piece, *keys = p->keys + p->starts[i];
    const int32_t *places = p->places + p->starts[i];
    for (int64_t e = 0; e < p->n_found[i]; e++) keys[e] = keys[e] >= least_kept ? x[places[e]] : 0;
    memset(x, 0, smaller(p->piece, p->n - i * p->piece) * sizeof(int32_t));
    for (int64_t e = 0; e < p->n_found[i]; e++) x[places[e]] = keys[e];
}

/* Memory for n integers, kept by the thread up to KEPT of them: the pages of fresh memory cost more than the work. */
static int32_t *borrow(int64_t n) {
    static _Thread_local int32_t *kept;
    static _Thread_local int64_t size;
    if (n > KEPT) return malloc(n * sizeof(int32_t));
    if (n > size) {
        free(kept);
        kept = malloc((size = n) * sizeof(int32_t));
    }
    return kept;
}

/* Projects n entries, `columns` a row, in place; see `reference.project`. */
void project(int32_t *x, int64_t n, int64_t columns, int64_t k, int64_t min_per_row, int64_t min_per_column,
             int32_t threads) {
    int64_t piece = min_per_row || min_per_column ? larger(1, PIECE / columns) * columns : PIECE;
    int64_t n_pieces = (n + piece - 1) / piece, n_tiles = min_per_column ? (columns + TILE - 1) / TILE : 0;
    int32_t *scratch = borrow(2 * n), *bounds = malloc(2 * columns * sizeof(int32_t));
    int64_t *found = malloc(2 * n_pieces * sizeof(int64_t));
    projection p = {
        .x = x, .places = scratch, .keys = scratch + n, .column_bounds = bounds, .column_ties = bounds + columns,
        .n = n, .columns = columns, .min_per_row = min_per_row, .min_per_column = min_per_column,
        .piece = piece, .n_pieces = n_pieces, .n_found = found, .starts = found + n_pieces,
    };
    int32_t bound = guess(x, n, k, p.keys), least_kept = 0;
    int64_t due = 0, forced = 0; /* how many the floors of columns should keep, and do */
#pragma omp parallel num_threads(threads)
    {
        int32_t *top = malloc(larger(min_per_row * ACROSS, min_per_column * TILE) * sizeof(int32_t));
        int32_t *offsets = malloc((piece / columns + 2) * sizeof(int32_t));
#pragma omp for schedule(dynamic) reduction(+ : due)
        for (int64_t tile = 0; tile < n_tiles; tile++) due += bound_columns(&p, tile, top);
#pragma omp for schedule(dynamic) reduction(+ : forced)
        for (int64_t i = 0; i < n_pieces; i++) forced += gather_piece(&p, i, bound, 0, offsets, top);
#pragma omp single
        {
            int64_t total = join(&p);
            if (forced > due || (bound > 1 && count(p.keys, total, bound | UNFORCED) < k)) {
                for (int64_t i = 0; i < n_pieces; i++) gather_piece(&p, i, 1, 1, offsets, top);
                total = join(&p);
            }
            least_kept = cut(p.keys, total, k);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_pieces; i++) write_piece(&p, i, least_kept);
        free(top), free(offsets);
    }
    free(bounds), free(found);
    if (2 * n > KEPT) free(scratch);
}

/* Projects the values of a support in place: rows are `row_offsets`, columns `column_offsets` of to_column_major. */
void project_support(int32_t *values, const int32_t *row_offsets, const int32_t *column_offsets,
                     const int32_t *to_column_major, int64_t rows, int64_t columns, int64_t k, int64_t min_per_row,
                     int64_t min_per_column) {
    int32_t n = row_offsets[rows];
    int32_t *keys = malloc(n * sizeof(int32_t));
    int32_t *top = malloc(larger(min_per_row, min_per_column) * ACROSS * sizeof(int32_t));
    for (int32_t e = 0; e < n; e++) keys[e] = magnitude(values[e]) | UNFORCED;
    if (min_per_row) force(keys, 0, row_offsets, rows, min_per_row, top);
    if (min_per_column) force(keys, to_column_major, column_offsets, columns, min_per_column, top);
    int32_t least_kept = cut(keys, n, k);
    for (int32_t e = 0; e < n; e++) values[e] = keys[e] >= least_kept ? values[e] : 0;
    free(keys), free(top);
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

/* Where the nonzeros of each row of x (rows, columns) begin among all of them: offsets (rows + 1). */
void count_nonzeros(const int32_t *x, int64_t rows, int64_t columns, int32_t *offsets, int32_t threads) {
    offsets[0] = 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const int32_t *in = x + row * columns;
        int32_t n = 0;
        for (int64_t c = 0; c < columns; c++) n += (in[c] & SIGNLESS) != 0;
        offsets[row + 1] = n;
    }
    for (int64_t row = 0; row < rows; row++) offsets[row + 1] += offsets[row];
}

/* The columns and values of the nonzeros of x, row by row. Returns how many of them are not finite. */
int32_t take_nonzeros(const int32_t *x, int64_t rows, int64_t columns, const int32_t *offsets, int32_t *indices,
                      int32_t *values, int32_t threads) {
    int32_t wrong = 0;
#pragma omp parallel num_threads(threads)
    {
        int32_t *places = malloc(columns * sizeof(int32_t));
#pragma omp for schedule(static) reduction(+ : wrong)
        for (int64_t row = 0; row < rows; row++) {
            const int32_t *in = x + row * columns;
            int64_t n = gather(in, columns, 1, 0, 0, places), first = offsets[row];
            for (int64_t e = 0; e < n; e++) {
                indices[first + e] = places[e];
                values[first + e] = in[places[e]];
                wrong += (in[places[e]] & SIGNLESS) >= INFINITE;
            }
        }
        free(places);
    }
    return wrong;
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
