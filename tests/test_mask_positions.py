"""mask.h with offsets and windows of any sign, against brute force, also of the largest numbers."""

import itertools

import numpy as np
import pytest
from test_mask_h import COMPILERS, HAS_LEFT, HAS_RIGHT, compiled

DRIVER = r"""
#include <stdio.h>
#include <string.h>
#include "mask.h"
/* in: flags left right offset, a q_offset and whether there is one, q_length k_length k_start, sq
 * sk, first count; out: one row each */
int main(void) {
    int32_t in[13];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        fa_masks m;
        memset(&m, 0, sizeof m);
        m.flags = (uint32_t)in[0], m.left = in[1], m.right = in[2], m.offset = in[3];
        m.q_offset = in[5] ? &in[4] : 0;
        m.q_lengths = &in[6], m.k_lengths = &in[7], m.k_start = &in[8];
        fa_lengths n = fa_sequence_lengths(&m, 0, in[9], in[10]);
        for (int32_t i = in[11]; i < in[11] + in[12]; i++) {
            fa_interval keys = fa_row_interval(n, i);
            int32_t out[3] = {keys.begin, keys.end, i < n.sq ? fa_row_position(n, i) : 0};
            fwrite(out, sizeof out, 1, stdout);
        }
    }
    return 0;
}
"""
HAS_OFFSET, SHIFT, LENGTH = 4, 2**30, 2**30 - 1


@pytest.fixture(scope="module", params=COMPILERS)
def intervals(request, tmp_path_factory):
    ask = compiled(DRIVER, request.param, tmp_path_factory.mktemp("mask_positions"))
    return lambda questions: ask(questions).reshape(-1, 3)


def brute_force(flags, left, right, offset, q_offset, has, q_length, k_length, k_start, rows, keys):
    """(rows, keys) bool of these row and key numbers, and i' of each row; in Python's integers."""
    shift = k_length - q_length
    if flags & HAS_OFFSET:
        shift = offset
    if has:
        shift = min(max(q_offset, -SHIFT), SHIFT)
    i, j = np.array(rows, object)[:, None], np.array(keys, object)
    position = i + shift
    seen = (i < q_length) & (j < k_length) & (j >= min(k_start, k_length))
    if flags & HAS_LEFT:
        seen &= j >= position - left
    if flags & HAS_RIGHT:
        seen &= j <= position + right
    return seen, position[:, 0]


def test_20000_random_sequences(intervals):
    rng = np.random.default_rng(0)
    far = (SHIFT, -SHIFT, SHIFT - 1, 5 - SHIFT, 2**31 - 1, -(2**31))
    questions = []

    def near_or_far(most):
        number = int(rng.choice(far)) if rng.random() < 0.2 else int(rng.integers(-most, most + 1))
        return min(max(number, -SHIFT), SHIFT)

    for _ in range(20000):
        sq, sk = rng.integers(0, 14, 2).tolist()
        q_offset = int(rng.choice(far)) if rng.random() < 0.2 else int(rng.integers(-16, 17))
        lengths = [int(rng.integers(n + 1)) for n in (sq, sk, sk)]
        numbers = [near_or_far(9), near_or_far(9), near_or_far(16), q_offset]
        questions.append(
            [int(rng.integers(8)), *numbers, int(rng.random() < 0.4), *lengths, sq, sk, 0, sq]
        )
    got, at = intervals(questions), 0
    for *asked, sq, sk, _, _ in questions:
        seen, position = brute_force(*asked, range(sq), range(sk))
        begin, end, place = got[at : at + sq].T
        at += sq
        rows, j = asked[6], np.arange(sk)
        assert ((j >= begin[:, None]) & (j < end[:, None]) == seen.astype(bool)).all(), asked
        assert ((begin >= 0) & (begin <= end) & (end <= sk)).all()
        assert (place[:rows] == position[:rows]).all()
        assert (np.diff(begin[:rows]) >= 0).all() and (np.diff(end[:rows]) >= 0).all(), asked
        if rows:  # what some row sees is one piece, and a kernel finds it in the first and last row
            some = np.flatnonzero(seen.any(axis=0))
            assert list(some) == list(range(begin[0], end[rows - 1])), asked
    assert at == len(got)


def test_the_largest_numbers_do_not_overflow(intervals):
    ends, questions = (-SHIFT, -1, 0, SHIFT), []
    for flags, (sq, sk), left, right, offset in itertools.product(
        range(8), ((LENGTH, LENGTH), (LENGTH, 1), (1, LENGTH)), ends, ends, ends
    ):
        ask = [flags, left, right, offset, 0, 0, sq, sk, 0, sq, sk]
        questions += [[*ask, row, 1] for row in sorted({0, sq // 2, sq - 1})]
    for ask, (begin, end, place) in zip(questions, intervals(questions), strict=True):
        sk, row = ask[10:12]
        keys = sorted({0, sk // 2, sk - 1})
        seen, position = brute_force(*ask[:9], [row], keys)
        assert 0 <= begin <= end <= sk and place == position[0]
        assert [begin <= key < end for key in keys] == list(seen[0]), ask
