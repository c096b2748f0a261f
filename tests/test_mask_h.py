"""mask.h against brute force: each row's interval is exactly the keys the definition shows it."""

import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT

DRIVER = r"""
#include <stdio.h>
#include <string.h>
#include "mask.h"
/* in: flags left right  q_length k_length k_start  sq sk  first count; out: one row each */
int main(void) {
    int32_t in[10];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        fa_masks m;
        memset(&m, 0, sizeof m);
        m.flags = (uint32_t)in[0], m.left = in[1], m.right = in[2];
        m.q_lengths = in[3] == INT32_MIN ? 0 : &in[3];
        m.k_lengths = in[4] == INT32_MIN ? 0 : &in[4];
        m.k_start = in[5] == INT32_MIN ? 0 : &in[5];
        fa_lengths n = fa_sequence_lengths(&m, 0, in[6], in[7]);
        for (int32_t i = in[8]; i < in[8] + in[9]; i++) {
            fa_interval keys = fa_row_interval(n, i);
            int32_t out[3] = {keys.begin, keys.end, i < n.sq ? fa_row_position(n, i) : 0};
            fwrite(out, sizeof out, 1, stdout);
        }
    }
    return 0;
}
"""
PACKED = r"""
#include <stdio.h>
#include <string.h>
#include "mask.h"
/* in: b sq sk total_q total_k stride, cu_q, cu_k, q_lengths, k_lengths; out: one row a sequence */
int main(void) {
    int32_t in[6], numbers[4][64];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        int32_t b = in[0], count = (b + 1) * in[5];
        for (int i = 0; i < 4; i++)
            if (fread(numbers[i], sizeof(int32_t), (size_t)count, stdin) != (size_t)count) return 1;
        fa_masks m;
        memset(&m, 0, sizeof m);
        m.q_lengths = numbers[2], m.k_lengths = numbers[3];
        m.q_lengths_stride = m.k_lengths_stride = in[5];
        fa_varlen v = {numbers[0], numbers[1], in[5], in[5], in[3], in[4]};
        for (int32_t n = 0; n < b; n++) {
            fa_sequence s = fa_find_sequence(&v, &m, n, in[1], in[2]);
            int32_t out[5] = {s.q, s.q_end, s.k, s.lengths.sq, s.lengths.sk};
            fwrite(out, sizeof out, 1, stdout);
        }
    }
    return 0;
}
"""
HAS_LEFT, HAS_RIGHT, TOP_LEFT, ABSENT = 1, 2, 4, -(2**31)
MAX_LENGTH = 2**30 - 1
COMPILERS = ["gcc -std=c11", "g++ -std=c++20"]


def compiled(text, which, folder):
    """A program, compiled so that undefined behaviour (an overflow) ends the process."""
    compiler, standard = which.split()
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    source = folder / ("driver.c" if compiler == "gcc" else "driver.cpp")
    source.write_text(text)
    strict = "-O1 -Wall -Wextra -Werror -fsanitize=undefined -fsanitize-undefined-trap-on-error"
    command = [
        compiler,
        standard,
        *strict.split(),
        f"-I{ROOT}/csrc",
        source,
        "-o",
        folder / "driver",
    ]
    subprocess.run(command, check=True)

    def ask(numbers):
        data = np.array(numbers, np.int32).tobytes()
        done = subprocess.run([folder / "driver"], input=data, stdout=subprocess.PIPE, check=True)
        return np.frombuffer(done.stdout, np.int32)

    return ask


@pytest.fixture(scope="module", params=COMPILERS)
def intervals(request, tmp_path_factory):
    ask = compiled(DRIVER, request.param, tmp_path_factory.mktemp("mask_h"))
    return lambda questions: ask(questions).reshape(-1, 3)


def question(
    flags,
    left,
    right,
    sq,
    sk,
    q_length=ABSENT,
    k_length=ABSENT,
    k_start=ABSENT,
    first=0,
    count=None,
):
    return [
        flags,
        left,
        right,
        q_length,
        k_length,
        k_start,
        sq,
        sk,
        first,
        sq if count is None else count,
    ]


def brute_force(flags, left, right, q_length, k_length, k_start, sq, sk):
    """(sq, sk) bool, and i' of each row."""

    def clamp(length, default, limit):
        return default if length == ABSENT else min(max(length, 0), limit)

    q_length, k_length = clamp(q_length, sq, sq), clamp(k_length, sk, sk)
    i, j = np.arange(sq)[:, None], np.arange(sk)
    position = i if flags & TOP_LEFT else i + k_length - q_length
    seen = (i < q_length) & (j < k_length) & (j >= clamp(k_start, 0, sk))
    if flags & HAS_LEFT:
        seen &= j >= position - left
    if flags & HAS_RIGHT:
        seen &= j <= position + right
    return seen, position[:, 0], q_length


def test_every_row_of_20000_random_sequences(intervals):
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(20000):
        sq, sk = rng.integers(0, 14, 2).tolist()
        length = [ABSENT if rng.random() < 0.5 else int(rng.integers(-2, 17)) for _ in range(3)]
        left, right = rng.integers(0, 8, 2).tolist()
        questions.append(question(int(rng.integers(8)), left, right, sq, sk, *length))
    got, row = intervals(questions), 0
    for *asked, sq, sk, _, _ in questions:
        seen, position, rows = brute_force(*asked, sq, sk)
        begin, end, place = got[row : row + sq].T
        row += sq
        j = np.arange(sk)
        assert ((j >= begin[:, None]) & (j < end[:, None]) == seen).all(), (asked, sq, sk)
        assert ((begin >= 0) & (begin <= end) & (end <= sk)).all()
        assert (place[:rows] == position[:rows]).all()
        assert (np.diff(begin[:rows]) >= 0).all() and (np.diff(end[:rows]) >= 0).all(), asked
    assert row == len(got)


def test_the_largest_lengths_do_not_overflow(intervals):
    most = MAX_LENGTH
    for flags in range(8):
        for sq, sk in ((most, most), (most, 1), (1, most), (most, 0)):
            for left, right in ((0, 0), (most, most)):
                for q_length in (ABSENT, 0, 1, most):
                    rows = [(0, min(2, sq)), (max(sq - 2, 0), min(2, sq))]
                    asked = [
                        question(flags, left, right, sq, sk, q_length, first=f, count=n)
                        for f, n in rows
                    ]
                    for begin, end, _ in intervals(asked):
                        assert 0 <= begin <= end <= sk


@pytest.mark.parametrize("which", COMPILERS)
def test_packed_sequences_whatever_the_offsets_say(which, tmp_path):
    """Right offsets give the sequences they say; wrong ones never a row outside of the arrays."""
    rng = np.random.default_rng(0)
    extremes = [-(2**31), -1, 2**31 - 1]
    asked, numbers = [], []
    for n in range(4000):
        b, stride = int(rng.integers(1, 6)), int(rng.integers(1, 4))
        total, longest = rng.integers(0, 12, 2), rng.integers(0, 9, 2)
        cu = np.sort(rng.integers(0, total[:, None] + 1, (2, b + 1)), axis=1)
        cu[:, 0] = 0
        if n % 2:  # anything, by a device that nobody checks
            cu = rng.integers(-3, 16, (2, b + 1))
            cu[rng.random(cu.shape) < 0.2] = rng.choice(extremes)
        used = rng.integers(-2, 12, (2, b + 1))
        strided = np.full((4, b + 1, stride), 2**31 - 1)
        strided[:, :, 0] = [*cu, *used]
        numbers += [b, *longest, *total, stride, *strided.ravel()]
        asked.append((total, longest, cu, used, n % 2))

    got = iter(compiled(PACKED, which, tmp_path)(numbers).reshape(-1, 5).tolist())
    for total, longest, cu, used, wrong in asked:
        for i in range(cu.shape[1] - 1):
            q, q_end, k, *lengths = next(got)
            assert 0 <= q <= q_end <= total[0] and 0 <= k <= total[1]
            assert 0 <= lengths[0] <= min(q_end - q, longest[0])
            assert 0 <= lengths[1] <= min(total[1] - k, longest[1])
            if not wrong:
                rows = np.minimum(cu[:, i + 1] - cu[:, i], longest)
                assert (q, q_end, k) == (cu[0, i], cu[0, i + 1], cu[1, i])
                assert lengths == np.clip(used[:, i], 0, rows).tolist()
    assert next(got, None) is None
