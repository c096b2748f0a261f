"""Where everything of a forward request lies in its workspace."""

import ctypes
import itertools

import pytest

import gpu_host

pytestmark = gpu_host.marks

SOURCE = """
#include "sm90/fwd_workspace.h"

/* {tiles, mask, bytes, packs} of the layout; then the bytes of the list and of the mask alone. */
void lay_out(int b, int hq, int sq, int sk, int rows, int keys, int total, int mask_dtype,
             int block_m, int64_t *got) {
    fa_params p = {.what = {.dtype = FA_BF16, .b = b, .hq = hq, .hk = hq, .sq = sq, .sk = sk}};
    p.what.q.shape[2] = rows, p.what.k.shape[2] = keys;
    if (total) p.varlen = (fa_varlen){.cu_q = &b, .total_q = total, .total_k = total};
    p.scores.mask_dtype = mask_dtype;
    if (mask_dtype) p.scores.mask.data = &p;
    p.scores.mask.stride[2] = sk, p.scores.mask.stride[3] = 1;
    fa_forward_workspace n = fa_lay_out_forward(&p, block_m);
    int64_t list = fa_packed_bytes(&p.varlen, b, block_m);
    int64_t mask = fa_mask_bits_make(&p.what, &p.masks, &p.varlen, &p.scores.mask).bytes;
    int64_t fields[] = {n.tiles, n.mask, n.bytes, n.packs, list, mask};
    for (int i = 0; i < 6; ++i) got[i] = fields[i];
}
"""
NONE, F32, BF16, BOOL = 0, 2, 4, 5


@pytest.fixture(scope="module")
def lay_out(tmp_path_factory):
    source = tmp_path_factory.mktemp("workspace") / "workspace.c"
    source.write_text(SOURCE)
    made = gpu_host.library(source, source.parent)

    def ask(*numbers):
        got = (ctypes.c_int64 * 6)()
        made.lay_out(*numbers, got)
        return list(got)

    return ask


def test_the_list_and_behind_it_the_mask(lay_out):
    for total, mask, block_m in itertools.product((0, 1000), (NONE, F32, BF16, BOOL), (64, 192)):
        rows = total or 300
        *got, list_bytes, mask_bytes = lay_out(3, 4, 300, 500, rows, rows, total, mask, block_m)
        packs = mask == BOOL
        assert (list_bytes > 0) == (total > 0) and mask_bytes > 0
        assert got == [0, list_bytes, list_bytes + packs * mask_bytes, packs], (total, mask)


@pytest.mark.parametrize("empty", range(6))
@pytest.mark.parametrize("total", [0, 1000])
def test_nothing_for_a_request_without_a_score(lay_out, total, empty):
    sizes = [3, 4, 300, 500, 300, 500]
    sizes[empty] = 0
    assert lay_out(*sizes, total, BOOL, 64)[:4] == [0, 0, 0, 0]
    sizes[empty] = 1
    assert lay_out(*sizes, total, BOOL, 64)[2] > 0
