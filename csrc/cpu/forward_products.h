/* forward_products.h - the loop of both products of forward_kernel.h, which includes it once per
 * instance.
 */
/* acc[i][j] += sum over steps a[step][j] * b[i * row + step * next] */
FA_FAST void multiply(vec *acc, int height, int nv, const vec *a, const unit *b, int64_t row,
                      int64_t next, int steps) {
    for (int step = 0; step < steps; step++, a += nv, b += next) {
        vec x[NV];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) x[j] = a[j];
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
            vec y = (vec)(b[i * row] - (ivec){0});
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++) acc[i * nv + j] = dot(x[j], y, acc[i * nv + j]);
        }
    }
}

/* S^T of `height` keys; raises `top`, the maxima. Long sums in float32 are sums of shorter ones:
 * one chain of d additions would lose more digits than the products of a BLAS do. */
FA_FAST void score(vec *s, vec *top, int height, int nv, const vec *q, const unit *k, int64_t k_row,
                   int units) {
    vec acc[8 * NV];
#pragma GCC unroll 32
    for (int i = 0; i < height * nv; i++) acc[i] = (vec){0};
    int done = 0;
    for (; units - done > PRODUCTS; done += PRODUCTS) {
        multiply(acc, height, nv, q + done * nv, k + done, k_row, 1, PRODUCTS);
#pragma GCC unroll 32
        for (int i = 0; i < height * nv; i++) {
            s[i] = done ? s[i] + acc[i] : acc[i];
            acc[i] = (vec){0};
        }
    }
    multiply(acc, height, nv, q + done * nv, k + done, k_row, 1, units - done);
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) {
            vec x = acc[i * nv + j];
            if (done) x += s[i * nv + j];
            s[i * nv + j] = x;
            top[j] = max_(x, top[j]);
        }
    }
}

/* O^T of `height` columns of V: rescaled, and P V added. */
FA_FAST void collect(vec *o, const vec *alpha, int height, int nv, const vec *p, const unit *v,
                     int64_t v_row, int steps) {
    vec acc[8 * NV];
#pragma GCC unroll 32
    for (int i = 0; i < height * nv; i++) acc[i] = (vec){0};
    multiply(acc, height, nv, p, v, 1, v_row, steps);
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) o[i * nv + j] = fma_(o[i * nv + j], alpha[j], acc[i * nv + j]);
    }
}
