"""mask.h's inverse against brute force: the rows that see some, and all, keys of a block."""

import numpy as np
import pytest
from test_mask_h import ABSENT, COMPILERS, HAS_LEFT, HAS_RIGHT, MAX_LENGTH, TOP_LEFT, compiled

DRIVER = r"""
#include <stdio.h>
#include <string.h>
#include "mask.h"
/* in: flags left right offset  q_length k_length k_start q_offset  sq sk  begin end (of the keys);
 * out: the rows that see some of them, that see all, and the first row's interval */
int main(void) {
    int32_t in[12];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        fa_masks m;
        memset(&m, 0, sizeof m);
        m.flags = (uint32_t)in[0], m.left = in[1], m.right = in[2], m.offset = in[3];
        m.q_lengths = in[4] == INT32_MIN ? 0 : &in[4];
        m.k_lengths = in[5] == INT32_MIN ? 0 : &in[5];
        m.k_start = in[6] == INT32_MIN ? 0 : &in[6];
        m.q_offset = in[7] == INT32_MIN ? 0 : &in[7];
        fa_lengths n = fa_sequence_lengths(&m, 0, in[8], in[9]);
        fa_interval keys = {in[10], in[11]};
        fa_row_range some = fa_rows_seeing_some(n, keys), all = fa_rows_seeing_all(n, keys);
        int32_t out[4] = {some.begin, some.end, all.begin, all.end};
        fwrite(out, sizeof out, 1, stdout);
    }
    return 0;
}
"""
FARTHEST = 2**30


@pytest.fixture(scope="module", params=COMPILERS)
def rows(request, tmp_path_factory):
    ask = compiled(DRIVER, request.param, tmp_path_factory.mktemp("mask_rows"))
    return lambda questions: ask(questions).reshape(-1, 4)


def seen_by_definition(flags, left, right, offset, q_length, k_length, k_start, q_offset, sq, sk):
    """(sq, sk) bool, straight from what the arguments mean."""

    def clamp(length, default, limit):
        return default if length == ABSENT else min(max(length, 0), limit)

    q_length, k_length = clamp(q_length, sq, sq), clamp(k_length, sk, sk)
    i, j = np.arange(sq)[:, None], np.arange(sk)
    shift = offset if flags & TOP_LEFT else k_length - q_length
    position = i + (shift if q_offset == ABSENT else q_offset)
    seen = (i < q_length) & (j < k_length) & (j >= clamp(k_start, 0, k_length))
    if flags & HAS_LEFT:
        seen &= j >= position - left
    if flags & HAS_RIGHT:
        seen &= j <= position + right
    return seen


def sequences(rng, number):
    """Random arguments: every flag, windows of any sign, offsets near and far, lengths."""
    for _ in range(number):
        sq, sk = rng.integers(0, 12, 2).tolist()
        left, right, offset, q_offset = rng.integers(-8, 9, 4).tolist()
        if rng.random() < 0.1:
            left, right, offset, q_offset = (
                int(rng.choice([x, FARTHEST, -FARTHEST])) for x in (left, right, offset, q_offset)
            )
        if right + left < 0:
            left, right = -right, -left
        lengths = [ABSENT if rng.random() < 0.5 else int(rng.integers(-2, 14)) for _ in range(3)]
        if rng.random() < 0.6:
            q_offset = ABSENT
        yield [int(rng.integers(8)), left, right, offset, *lengths, q_offset, sq, sk]


def test_the_rows_of_every_block_of_4000_random_sequences(rows):
    rng = np.random.default_rng(0)
    asked, wanted = [], []
    for arguments in sequences(rng, 4000):
        seen = seen_by_definition(*arguments)
        sq, sk = seen.shape
        for begin in range(sk + 2):
            for end in range(begin, sk + 3):
                block = seen[:, begin:end]
                some = block.any(axis=1)
                all_ = block.all(axis=1) & (end <= sk) & (begin < end)
                asked.append([*arguments, begin, end])
                wanted.append((some, all_, sq))
    got = rows(asked)
    assert len(got) == len(wanted) and any(w[1].any() for w in wanted)
    for question, (some, all_, sq), answer in zip(asked, wanted, got.tolist(), strict=True):
        i = np.arange(sq)
        begin, end, first, last = answer
        assert 0 <= begin <= end <= sq and 0 <= first <= last <= sq, question
        assert (((i >= begin) & (i < end)) == some).all(), (question, answer)
        if question[-2] < question[-1]:  # of an empty block every row sees all
            assert (((i >= first) & (i < last)) == all_).all(), (question, answer)


def test_the_ends_do_not_decrease(rows):
    """So that the blocks of keys that a row meets follow each other without a gap."""
    rng = np.random.default_rng(1)
    for arguments in sequences(rng, 300):
        sk = arguments[-1]
        answers = rows([[*arguments, j, j + 2] for j in range(0, sk, 2)])
        seen = answers[answers[:, 0] < answers[:, 1], :2]
        assert (np.diff(seen, axis=0) >= 0).all(), arguments


def test_the_largest_lengths_do_not_overflow(rows):
    most = MAX_LENGTH
    blocks = [(0, 1), (0, most), (most - 1, most), (most, most)]
    ends = (0, 1, most)
    asked = [
        [flags, left, right, offset, q_length, k_length, ABSENT, q_offset, sq, sk, *block]
        for flags in range(8)
        for sq in ends
        for sk in ends
        for left, right in ((0, 0), (FARTHEST, FARTHEST), (-FARTHEST, FARTHEST))
        for offset in (-FARTHEST, 0, FARTHEST)
        for q_length in (ABSENT, 1)
        for k_length in (ABSENT, most)
        for q_offset in (ABSENT, -(2**31) + 1, 2**31 - 1)
        for block in blocks
    ]
    got, sq = rows(asked), np.array(asked)[:, 8]
    for begin, end in (got[:, :2].T, got[:, 2:].T):
        assert ((begin >= 0) & (begin <= end) & (end <= sq)).all()
