/* forward_products.h - the loop of both products of forward_kernel.h, which includes it once per
 * instance.
 */
/* acc[i][j] += sum over the steps begin .. end - 1 of a[step][j] * b[i * row + step * next], for
 * j >= from: vectors before that see none of these keys. */
FA_FAST void multiply(vec *acc, int height, int from, int nv, const vec *a, const unit *b,
                      int64_t row, int64_t next, int begin, int end) {
    a += begin * nv, b += begin * next;
    for (int step = begin; step < end; step++, a += nv, b += next) {
        vec x[NV];
#pragma GCC unroll 8
        for (int j = from; j < nv; j++) x[j] = a[j];
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
            vec y = (vec)(b[i * row] - (ivec){0});
#pragma GCC unroll 8
            for (int j = from; j < nv; j++) acc[i * nv + j] = dot(x[j], y, acc[i * nv + j]);
        }
    }
}

/* S^T of `height` keys; raises `top`, the maxima. Long sums in float32 are sums of shorter ones:
 * one chain of d additions would lose more digits than the products of a BLAS do. */
FA_FAST void score(vec *s, vec *top, int height, int from, int nv, const vec *q, const unit *k,
                   int64_t k_row, int units) {
    vec acc[8 * NV];
#pragma GCC unroll 32
    for (int i = 0; i < height * nv; i++) acc[i] = (vec){0};
    int done = 0;
    for (; units - done > PRODUCTS; done += PRODUCTS) {
        multiply(acc, height, from, nv, q, k, k_row, 1, done, done + PRODUCTS);
#pragma GCC unroll 8
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 8
            for (int j = from; j < nv; j++) {
                vec *x = &acc[i * nv + j];
                s[i * nv + j] = done ? s[i * nv + j] + *x : *x;
                *x = (vec){0};
            }
        }
    }
    multiply(acc, height, from, nv, q, k, k_row, 1, done, units);
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 8
        for (int j = from; j < nv; j++) {
            vec x = acc[i * nv + j];
            if (done) x += s[i * nv + j];
            s[i * nv + j] = x;
            top[j] = max_(x, top[j]);
        }
    }
}

/* O^T of `height` columns of V: rescaled, and P V added. ends: of each vector, the steps that it
 * sees, which never decrease. */
FA_FAST void collect(vec *o, const vec *alpha, int height, int nv, const vec *p, const unit *v,
                     int64_t v_row, const int *ends) {
    vec acc[8 * NV];
#pragma GCC unroll 32
    for (int i = 0; i < height * nv; i++) acc[i] = (vec){0};
    multiply(acc, height, 0, nv, p, v, 1, v_row, 0, ends[0]);
    if (nv > 1) multiply(acc, height, 1, nv, p, v, 1, v_row, ends[0], ends[1]);
    if (nv > 2) multiply(acc, height, 2, nv, p, v, 1, v_row, ends[1], ends[2]);
    if (nv > 3) multiply(acc, height, 3, nv, p, v, 1, v_row, ends[2], ends[3]);
#pragma GCC unroll 8
    for (int i = 0; i < height; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++) o[i * nv + j] = fma_(o[i * nv + j], alpha[j], acc[i * nv + j]);
    }
}
