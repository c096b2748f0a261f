"""q_offset, windows of any sign, and heads of k and v's own, on a GPU: larger shapes, all kinds of
rows; test_positions.py, test_numbers.py and test_shapes.py have the small ones on every backend."""

import fastattn
import numpy as np
import pytest
import reference

import gpu
from gpu import DTYPES, inputs, normal, torch
from gpu.calls import check

pytestmark = gpu.marks

WINDOWS = {
    "causal": {"causal": True},
    "window": {"window": (200, 70)},
    "before": {"window": (400, -90)},
    "after": {"window": (-90, 400)},
    "strictly before": {"window": (None, -1)},
    "strictly after": {"window": (-1, None)},
}
OFFSETS = {"top left": 0, "cache": 333, "before": -150, "past": 900, "far": 2**31 - 1, "each": None}


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def judged(q, k, v, offset, **keywords):
    """The call with the offset as an int, or as an array of the device."""
    given = {"q_offset": int32(*offset) if isinstance(offset, tuple) else offset}
    out, lse = fastattn.attention(q, k, v, return_lse=True, **given, **keywords)
    bare = fastattn.attention(q, k, v, **given, **keywords)
    assert gpu.complaints(out, lse, q, k, v, most=4, q_offset=offset, **keywords) == []
    assert gpu.complaints(bare, None, q, k, v, most=4, q_offset=offset, **keywords) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("window", WINDOWS)
def test_positions(window, offset, d, dtype):
    where = OFFSETS[offset] if offset != "each" else (-40, 500)
    for sq, sk in ((300, 600), (700, 260)):
        arrays = inputs(2, 4, 2, sq, sk, d, dtype=DTYPES[dtype])
        judged(*arrays, where, **WINDOWS[window])


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_without_an_offset(window):
    for sq, sk in ((300, 600), (700, 260), (1, 4000), (64, 64)):
        check(*inputs(2, 4, 2, sq, sk, 128), most=4, **WINDOWS[window])


@pytest.mark.parametrize("offset", [333, (-40, 500)])
@pytest.mark.parametrize("change", ["alibi", "softcap", "bool", "bool of all", "float", "dropout"])
@pytest.mark.parametrize("window", WINDOWS)
def test_with_score_changes(window, change, offset):
    q, k, v = inputs(2, 4, 2, 300, 600, 64)
    shape = (1, 1, 300, 600) if change == "bool of all" else (2, 4, 300, 600)
    changes = {
        "alibi": {"alibi_slopes": 0.5 ** torch.arange(1.0, 5, device="cuda")},
        "softcap": {"softcap": 3.0},
        "float": {"mask": normal(*shape, dtype=torch.bfloat16)},
        "dropout": {"dropout_p": 0.2, "seed": 5},
    }
    keywords = changes.get(change, {"mask": normal(*shape) > -0.5})
    judged(q, k, v, offset, **keywords, **WINDOWS[window])


@pytest.mark.parametrize("loads", ["strided", "raw", "slices"])
@pytest.mark.parametrize("window", WINDOWS)
def test_with_odd_strides(window, loads):
    q, k, v = inputs(2, 4, 4, 300, 600, 72)
    if loads == "strided":
        q, k, v = (x.repeat_interleave(2, dim=3)[..., ::2] for x in (q, k, v))
    elif loads == "raw":
        q, k, v = (torch.nn.functional.pad(x, (0, 1))[..., :-1] for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2)[..., :67] for x in (q, k, v))
    judged(q, k, v, (-40, 500), **WINDOWS[window])


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("offset", [333, (0, -40, 500, 7, 2**31 - 1)])
@pytest.mark.parametrize("window", WINDOWS)
def test_packed(window, offset, d):
    lengths = [(300, 600), (700, 260), (1, 1000), (64, 0), (130, 130)]
    arrays = gpu.packed(lengths, 4, 2, d, tail=(3, 5))
    given = int32(*offset) if isinstance(offset, tuple) else offset
    for extra in ({}, {"softcap": 3.0}):
        out, lse = fastattn.attention_varlen(
            *arrays,
            *gpu.offsets(lengths),
            q_offset=given,
            return_lse=True,
            **extra,
            **WINDOWS[window],
        )
        assert not gpu.packed_complaints(
            out, lse, *arrays, lengths, most=4, q_offset=offset, **extra, **WINDOWS[window]
        )


def test_an_offset_may_change_between_replays():
    """Behind a kernel that writes it: the first tile must wait for the stream, too."""
    q, k, v = inputs(2, 4, 2, 256, 512, 128)
    source, offset = int32(0, 0), int32(0, 0)

    def step():
        offset.copy_(source)
        return fastattn.attention(q, k, v, causal=True, q_offset=offset)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for numbers in ((0, 256), (-100, 511), (256, 0)):
        source.copy_(int32(*numbers))
        graph.replay()
        assert gpu.complaints(out, None, q, k, v, causal=True, q_offset=numbers) == []


def test_values_that_no_row_sees_may_be_nan():
    for window, causal, offset in (
        ((-2, None), True, None),  # nobody sees a key
        ((-300, None), False, None),
        ((None, -300), False, None),
        ((9, 9), False, (-400, 390)),
    ):
        q, k, v = inputs(2, 2, 2, 400, 400, 64)
        b = 2 if isinstance(offset, tuple) else 1
        inside, _ = reference.interval(b, 400, 400, causal=causal, window=window, q_offset=offset)
        hidden = torch.from_numpy(~inside.any(axis=1)).cuda()[:, None, :, None]
        judged(q, k, v.masked_fill(hidden, torch.nan), offset, causal=causal, window=window)


@pytest.mark.parametrize(("hq", "hk", "hv"), [(8, 4, 2), (8, 2, 4), (6, 3, 2), (6, 1, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 100, 128])
def test_heads_of_k_and_of_v(d, dtype, hq, hk, hv):
    q, k, _ = inputs(2, hq, hk, 200, 300, d, dtype=DTYPES[dtype])
    v = normal(2, hv, 300, d, dtype=DTYPES[dtype], seed=9)
    mask = normal(2, hq, 200, 300, seed=4) > -0.5
    repeated = k.repeat_interleave(hq // hk, 1), v.repeat_interleave(hq // hv, 1)
    for options, same in (
        ({}, {}),
        ({"attn_mask": mask}, {"mask": mask}),
        ({"attn_mask": mask[:1, :1]}, {"mask": mask[:1, :1]}),
        ({"is_causal": True}, {"causal": "top-left"}),
    ):
        out = fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        assert gpu.complaints(out, None, q, *repeated, **same) == []
    with pytest.raises(NotImplementedError, match="it takes no dropout with different"):
        fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)


def test_head_sizes_that_no_kernel_has():
    for d, dv in ((257, 64), (64, 512), (0, 64), (64, 0)):
        q, k, v = inputs(1, 2, 2, 9, 9, d, dv or 1)
        v = v[..., :dv]
        why = fastattn.explain(fastattn.attention, q, k, v).reasons["sm90"]
        assert why == f"it takes d and dv from 1 to 256, not d = {d} and dv = {dv}"
    assert fastattn.attention(*(x[:, :0] for x in inputs(1, 2, 2, 9, 9, 64))).shape == (1, 0, 9, 64)


@pytest.mark.parametrize("softcap", [1e-46, 1e-30, 1e3, 4096.0, 3e4, 1e6, 1e10, 1e13, 1e300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_of_any_size(softcap, dtype):
    for factor in (1, 30):
        q, k, v = inputs(2, 4, 2, 200, 300, 64, dtype=DTYPES[dtype])
        check(q * factor, k, v, most=4, softcap=softcap, scale=0.5)
        check(q * factor, k, v, most=4, softcap=softcap, causal=True, mask=normal(200, 300))


@pytest.mark.parametrize("scale", [1e9, 1e29, 1e38, 1e300, -1e300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_scale_leaves_the_greatest(scale, dtype):
    q, k, v = inputs(1, 2, 2, 100, 200, 64, dtype=DTYPES[dtype])
    s = np.sign(scale) * (q.double() @ k.double().mT)
    top = s.topk(2, dim=3).values
    clear = top[..., 0] - top[..., 1] > 1e-3
    want = v.take_along_dim(s.argmax(dim=3)[..., None], dim=2)
    for extra in ({}, {"mask": torch.zeros(100, 200, device="cuda")}):
        out = fastattn.attention(q, k, v, scale=scale, **extra)
        assert torch.isfinite(out).all() and torch.equal(out[clear], want[clear])
