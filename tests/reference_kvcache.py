"""What attention_kvcache means, in NumPy: append, rotate, gather; then attention (reference.py).

Arrays are (b, h, s, d), pages (num_pages, h, page_size, d).
"""

import numpy as np
import reference


def rounded(x, dtype):
    """float64 to the dtype; to 16 bits by way of float32."""
    return x.astype(dtype) if dtype.itemsize >= 4 else x.astype(np.float32).astype(dtype)


def rotated(x, cos, sin, positions, interleaved):
    """x (..., s, d) with rows at `positions` (..., s): each pair turned by its position's angle."""
    half = cos.shape[1]
    c, s = (table.astype(np.float64)[positions] for table in (cos, sin))
    pair = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if not interleaved:
        pair = (slice(0, half), slice(half, 2 * half))
    first, second = (x[..., p].astype(np.float64) for p in pair)
    y = x.copy()
    y[..., pair[0]] = rounded(first * c - second * s, x.dtype)
    y[..., pair[1]] = rounded(second * c + first * s, x.dtype)
    return y


def rows_of(table, size, sequence, positions):
    """(pages, rows) of a sequence's keys; entries that name no page count as the nearest."""
    return table[sequence][positions // size], positions % size


def appended(cache, rows, table, lengths):
    """The cache with `rows` (b, h, s_new, d) written after the keys that are there."""
    after, (_, _, size, _) = cache.copy(), cache.shape
    for n, before in enumerate(lengths):
        pages, at = rows_of(table, size, n, before + np.arange(rows.shape[2]))
        after[pages, :, at] = rows[n].swapaxes(0, 1)
    return after


def gathered(cache, table, sk):
    """(b, h, sk, d)"""
    count, heads, size, d = cache.shape
    table = np.clip(table, 0, max(count - 1, 0))
    out = np.full((len(table), heads, sk, d), np.nan, cache.dtype)
    for n in range(len(table)):
        pages, at = rows_of(table, size, n, np.arange(sk))
        out[n] = cache[pages, :, at].swapaxes(0, 1)
    return out


def mass(q, k, **keywords):
    """(b, hk, sk): the sum of p over a group's heads and rows."""
    real = reference.real_of(q.dtype, low=False)
    p = reference.weights(q.astype(real), k.astype(real), **keywords, real=real).p
    b, hq, sq, sk = p.shape
    return p.reshape(b, k.shape[1], hq // k.shape[1], sq, sk).sum(axis=(2, 3))
