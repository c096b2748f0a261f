/* matrix.h - matrices in panels, and their products, once per instance (see simd.h). Included
 * without a guard.
 *
 * A matrix lies in panels of WIDTH columns, [panel][row][column]; the last panel is as wide as the
 * columns that are left, in whole vectors. One loop computes every product: of HIGH rows and one
 * panel of the result, in registers, a step adds one unit of B (see units.h) times one vector of A
 * for each.
 */
#ifndef FASTATTN_CPU_MATRIX_H
#define FASTATTN_CPU_MATRIX_H

#define add_steps FN(add_steps)
#define matrix FN(matrix)
#define panel FN(panel)
#define panels FN(panels)
#define place FN(place)
#define product FN(product)
#define product_tile FN(product_tile)
#define rows_of_product FN(rows_of_product)
#define rows_of_transposed FN(rows_of_transposed)
#define transposed_product FN(transposed_product)
#define transposed_tile FN(transposed_tile)
#define transpose_matrix FN(transpose_matrix)
#define whole FN(whole)
#define width_of FN(width_of)

#define NV 4 /* vectors in a panel */
#define WIDTH (NV * LANES)
/* As many accumulators as leave registers for HIGH units of B, or, where a multiplication takes
 * them from memory, for NV vectors of A. */
#define HIGH (FA_BYTES == 64 ? 6 : 3)
/* Terms of a sum that are added in a row, as in the forward (PRODUCTS): one long chain would lose
 * more digits, and scores are to have the very bits that lse was made of. */
#define CHAIN 64

#endif

typedef struct matrix {
    real *data;
    int rows, columns;
} matrix;

/* Rounds up to whole vectors. */
static inline int whole(int n) { return (n + LANES - 1) / LANES * LANES; }

static inline int panels(matrix m) { return (m.columns + WIDTH - 1) / WIDTH; }

static inline int width_of(matrix m, int p) {
    const int left = whole(m.columns) - p * WIDTH;
    return left < WIDTH ? left : WIDTH;
}

static inline real *panel(matrix m, int p) { return m.data + (int64_t)p * WIDTH * m.rows; }

/* Where row `row` of a matrix has its column `column`. */
static inline real *place(matrix m, int row, int column) {
    const int p = column / WIDTH;
    return panel(m, p) + (int64_t)row * width_of(m, p) + column % WIDTH;
}

/* acc[i][j] += sum over steps a[step * across + j] * b[i * row + step * next] */
FA_FAST void add_steps(vec *acc, int high, int nv, const vec *a, int across, const real *numbers,
                       int64_t row, int64_t next, int steps) {
    const unit *b = (const unit *)numbers;
    for (int step = 0; step < steps; step++, a += across, b += next) {
        vec y[HIGH];
#pragma GCC unroll 8
        for (int i = 0; i < high; i++) y[i] = (vec)(b[i * row] - (ivec){0});
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            const vec x = a[j];
#pragma GCC unroll 8
            for (int i = 0; i < high; i++) acc[i * nv + j] = dot(x, y[i], acc[i * nv + j]);
        }
    }
}

/* Rows of one panel of a result: `out`, whose rows are out_row apart, is set or added to. */
FA_FAST void rows_of_product(real *out, int64_t out_row, int adds, int high, int nv,
                             const vec *acc) {
#pragma GCC unroll 8
    for (int i = 0; i < high; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            real *to = out + i * out_row + j * LANES; /* may be an array of the caller's */
            vec x = {0};
            if (adds) memcpy(&x, to, sizeof x);
            x = adds ? x + acc[i * nv + j] : acc[i * nv + j];
            memcpy(to, &x, sizeof x);
        }
    }
}

FA_FAST void product_tile(real *out, int64_t out_row, int adds, int high, int nv, const vec *a,
                          int across, matrix b, int begin, int end, int row) {
    vec acc[HIGH * NV];
    for (int at = begin; at < end;) {
#pragma GCC unroll 32
        for (int i = 0; i < high * nv; i++) acc[i] = (vec){0};
        do {
            const int past = (at / WIDTH + 1) * WIDTH, stop = past < end ? past : end;
            add_steps(acc, high, nv, a + (int64_t)at * across, across, place(b, row, at),
                      width_of(b, at / WIDTH), 1, stop - at);
            at = stop;
        } while (at < end && at % CHAIN);
        rows_of_product(out, out_row, adds, high, nv, acc);
        adds = 1;
    }
}

/* The first `width` columns of a panel of the rows first .. last - 1 of B A: out[row - first] = or
 * += sum over the columns begin .. end - 1 of B. a: that panel of A, a_row wide. */
static __attribute__((noinline)) void product(real *out, int64_t out_row, int adds, int width,
                                              const real *a, int a_row, matrix b, int begin,
                                              int end, int first, int last) {
#define ROWS(high, nv)                                                                   \
    for (; row + high <= last; row += high)                                              \
    product_tile(out + (row - first) * out_row, out_row, adds, high, nv, (const vec *)a, \
                 a_row / LANES, b, begin, end, row)
#define CASE(nv)        \
    case nv:            \
        ROWS(HIGH, nv); \
        ROWS(2, nv);    \
        ROWS(1, nv);    \
        break
    int row = first;
    if (begin == end && !adds)
        for (int i = first; i < last; i++)
            memset(out + (i - first) * out_row, 0, (size_t)width * sizeof(real));
    if (begin == end) return;
    switch (width / LANES) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
    }
#undef ROWS
}

/* out[i] += sum over `steps` rows of B[row][i] times that row of A, for one panel of A (`width`
 * wide), and `count` columns of one panel of B (b_row wide). */
static __attribute__((noinline)) void transposed_product(real *out, int width, const real *a,
                                                         const real *b, int b_row, int count,
                                                         int steps) {
#define ROWS(high, nv)                                                        \
    for (; i + high <= count; i += high) {                                    \
        vec acc[HIGH * NV];                                                   \
        for (int n = 0; n < high * nv; n++) acc[n] = (vec){0};                \
        add_steps(acc, high, nv, (const vec *)a, nv, b + i, 1, b_row, steps); \
        rows_of_product(out + i * width, width, 1, high, nv, acc);            \
    }
    int i = 0;
    switch (width / LANES) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
    }
#undef ROWS
#undef CASE
}

/* to = from', of as many rows as are whole vectors; to.rows is from's columns in whole vectors. */
static void transpose_matrix(matrix to, matrix from, int rows) {
    for (int p = 0; p < panels(from); p++) {
        const int width = width_of(from, p);
        for (int row = 0; row < rows; row += LANES) {
            const int across = width_of(to, row / WIDTH);
            real *out = panel(to, row / WIDTH) + row % WIDTH;
            for (int i = 0; i < width; i += LANES)
                transpose(out + (int64_t)(p * WIDTH + i) * across, across,
                          panel(from, p) + (int64_t)row * width + i, width);
        }
    }
}
