"""What sections of heads are made by: what the busiest block computes, and what the L2 keeps."""

import ctypes
import itertools

import numpy as np
import pytest

import gpu_host

pytestmark = gpu_host.marks

SOURCE = """
#include "common/packed.h"

/* By its own estimate, and by walking: a causal schedule with sections of so many heads. */
void excess(int all, int heads, int m_blocks, int blocks, double *got) {
    fa_what w = {.b = 1, .hq = all, .hk = all, .sq = 64 * m_blocks, .sk = 64 * m_blocks};
    fa_masks m = {.flags = FA_HAS_RIGHT};
    fa_schedule s = fa_schedule_make(&w, &m, 64, blocks);
    s.section = heads;
    s.rounds = (heads * m_blocks + blocks - 1) / blocks;
    s.rest = (all - 1) % heads + 1;
    s.by_section = fa_divisor_make(s.section);
    s.by_rest = fa_divisor_make(s.rest);
    s.by_rounds = fa_divisor_make(s.rounds);
    s.by_tiles = fa_divisor_make(heads * m_blocks);
    int64_t most = 0, whole = 0;
    for (int block = 0; block < blocks; ++block) {
        int64_t work = 0;
        for (int32_t round = 0;;) {
            int32_t tile = fa_schedule_next(&s, blocks, block, &round);
            if (tile >= s.tiles) break;
            work += 2 * (fa_schedule_tile(&s, tile).m_block + 1) + 1;
        }
        most = work > most ? work : most, whole += work;
    }
    got[0] = fa_section_excess(&s, heads, blocks);
    got[1] = (double)most * blocks / whole - 1;
}

/* The heads of the tiles of a packed sequence, in their order. */
void heads_of(int hq, int hk, int d, int dv, int m_blocks, int sk, int flags, int32_t *heads) {
    fa_what w = {.b = 1, .hq = hq, .hk = hk, .d = d, .dv = dv};
    fa_masks m = {.flags = flags};
    fa_varlen v = {.cu_q = &w.b, .total_q = 1};
    fa_packed p = fa_packed_make(&w, &m, &v, 64, 0);
    for (int i = 0; i < hq * m_blocks; ++i) heads[i] = fa_packed_tile(&p, i, m_blocks, sk).head;
}
"""


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    source = tmp_path_factory.mktemp("sections") / "sections.c"
    source.write_text(SOURCE)
    return gpu_host.library(source, source.parent)


def test_the_busiest_block_is_known(sections):
    """Exactly, for as few blocks as are asked."""
    got = (ctypes.c_double * 2)()
    for blocks, m_blocks, heads in itertools.product((2, 7, 11, 16), (2, 3, 8, 13), (1, 2, 5, 9)):
        for all_heads in {heads, 2 * heads, 3 * heads + 1, 20}:
            if all_heads >= heads:
                sections.excess(all_heads, heads, m_blocks, blocks, got)
                assert got[0] == pytest.approx(got[1]), (blocks, m_blocks, heads, all_heads)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("sk", [0, 1000, 5000, 20_000, 10**6])
def test_a_packed_section_stays_in_the_l2(sections, sk, d, dv, group):
    """As many key heads as fit half of it, one at least; a section's tiles are side by side."""
    hk, m_blocks = 24, 3
    hq, room = hk * group, 32 << 20
    heads = np.zeros(hq * m_blocks, np.int32)
    sections.heads_of(
        hq, hk, d, dv, m_blocks, sk, gpu_host.HAS_RIGHT, ctypes.c_void_p(heads.ctypes.data)
    )
    fit = min(max(room // (max(sk, 1) * (d + dv) * 2), 1), hk) * group
    want = [
        h
        for first in range(0, hq, fit)
        for h in list(range(first, min(first + fit, hq))) * m_blocks
    ]
    assert heads.tolist() == want
    sections.heads_of(hq, hk, d, dv, m_blocks, sk, 0, ctypes.c_void_p(heads.ctypes.data))
    assert heads.tolist() == np.repeat(np.arange(hq), m_blocks).tolist()
