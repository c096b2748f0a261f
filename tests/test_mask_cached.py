"""csrc/mask.h: the rows of sequences whose keys are a cache's, whether they are few, and the page
of a key."""

import numpy as np
import pytest
from test_mask_h import COMPILERS, compiled

DRIVER = r"""
#include <stdio.h>
#include <string.h>
#include "mask.h"
/* in: packed b sq sk total_q stride, cu_q, k_lengths and a table of (b + 1) * stride each, size,
 * count, key (b <= 8, stride <= 3); out: one row a sequence */
int main(void) {
    int32_t in[6], numbers[3][32], page[3];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        const size_t count = (size_t)((in[1] + 1) * in[5]);
        for (int i = 0; i < 3; i++)
            if (fread(numbers[i], sizeof(int32_t), count, stdin) != count) return 1;
        if (fread(page, sizeof page, 1, stdin) != 1) return 1;
        fa_masks m;
        fa_varlen v;
        fa_pages p;
        memset(&m, 0, sizeof m);
        memset(&v, 0, sizeof v);
        m.k_lengths = numbers[1], m.k_lengths_stride = in[5];
        if (in[0]) v.cu_q = numbers[0], v.cu_q_stride = in[5], v.total_q = in[4];
        p.table = numbers[2], p.stride[0] = in[5], p.stride[1] = 1;
        p.size = page[0], p.count = page[1];
        for (int32_t n = 0; n < in[1]; n++) {
            fa_sequence s = fa_find_cached(&v, &m, n, in[2], in[3]);
            int32_t out[7] = {s.q, s.q_end, s.k, s.lengths.sq, s.lengths.sk,
                              fa_find_page(&p, n, page[2]), fa_is_short(s, 4)};
            fwrite(out, sizeof out, 1, stdout);
        }
    }
    return 0;
}
"""


@pytest.mark.parametrize("which", COMPILERS)
def test_whatever_is_said_rows_and_pages_are_there(which, tmp_path):
    rng = np.random.default_rng(0)
    numbers, want = [], []
    for n in range(800):
        b, sq, sk, total = rng.integers(1, 9), *rng.integers(0, 12, 3)
        packed, stride = n % 2, rng.integers(1, 4)
        cu = rng.integers(-3, 16, b + 1)
        if n % 4 == 1:
            cu = np.sort(np.clip(cu, 0, total))
            cu[0] = 0
        lengths, table = rng.integers(-3, 16, b + 1), rng.integers(-3, 9, (b + 1, stride))
        size, count = rng.integers(1, 6), rng.integers(1, 8)
        key = rng.integers(0, size * stride)
        spread = np.full((2, b + 1, stride), 77)
        spread[:, :, 0] = cu, lengths
        numbers += [packed, b, sq, sk, total, stride, *spread.ravel(), *table.ravel()]
        numbers += [size, count, key]
        for i in range(b):
            first, end = 0, sq
            if packed:
                first = np.clip(cu[i], 0, total) if i else 0
                end = np.clip(cu[i + 1], first, total)
            rows = min(end - first, sq)
            page = np.clip(table[i, key // size], 0, count - 1)
            short = end - first <= min(sq, 4)
            want.append([first, end, 0, rows, np.clip(lengths[i], 0, sk), page, short])
    got = compiled(DRIVER, which, tmp_path)(numbers).reshape(-1, 7)
    assert got.tolist() == np.array(want).tolist()
