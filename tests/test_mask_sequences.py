"""csrc/mask.h: where the rows of a sequence lie that is not packed."""

import numpy as np
import pytest
from test_mask_h import COMPILERS, compiled

DRIVER = r"""
#include <stdio.h>
#include <string.h>
#include "mask.h"
/* in: b sq sk, q_lengths of b, k_lengths of b (b <= 8); out: one row a sequence */
int main(void) {
    int32_t in[3], numbers[2][8];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        for (int i = 0; i < 2; i++)
            if (fread(numbers[i], sizeof(int32_t), (size_t)in[0], stdin) != (size_t)in[0]) return 1;
        fa_masks m;
        fa_varlen v;
        memset(&m, 0, sizeof m);
        memset(&v, 0, sizeof v);
        m.q_lengths = numbers[0], m.k_lengths = numbers[1];
        m.q_lengths_stride = m.k_lengths_stride = 1;
        for (int32_t n = 0; n < in[0]; n++) {
            fa_sequence s = fa_find_sequence(&v, &m, n, in[1], in[2]);
            int32_t out[5] = {s.q, s.q_end, s.k, s.lengths.sq, s.lengths.sk};
            fwrite(out, sizeof out, 1, stdout);
        }
    }
    return 0;
}
"""


@pytest.mark.parametrize("which", COMPILERS)
def test_each_has_all_rows_of_its_own_arrays(which, tmp_path):
    """From row 0 to the last, padding too; of the true lengths only what fits."""
    rng = np.random.default_rng(0)
    numbers, want = [], []
    for _ in range(500):
        b, sq, sk = rng.integers(1, 9), *rng.integers(0, 20, 2)
        lengths = rng.integers(-3, 25, (2, b))
        numbers += [b, sq, sk, *lengths.ravel()]
        want += [[0, sq, 0, *np.clip(mine, 0, (sq, sk))] for mine in lengths.T]
    got = compiled(DRIVER, which, tmp_path)(numbers).reshape(-1, 5)
    assert got.tolist() == np.array(want).tolist()
