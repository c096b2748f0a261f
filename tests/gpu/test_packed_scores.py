"""Packed sequences with what changes the scores."""

import itertools

import fastattn
import numpy as np
import pytest
import reference

import gpu
from gpu import DTYPES, torch
from gpu.calls import CHANGES, MIXED, SIZES, USED, check_packed, masks, sent_packed, sinks, slopes

pytestmark = gpu.marks


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("change", CHANGES)
def test_packed_score_changes(change, d, dtype, causal):
    q, k, v = gpu.packed(MIXED, 4, 2, d, dtype=DTYPES[dtype], tail=(3, 70))
    changes = sent_packed(CHANGES[change], MIXED, 4)
    check_packed(q, k, v, MIXED, causal=causal, **changes)
    check_packed(q, k, v, MIXED, causal=causal, **changes, **USED)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("kind", ["bool", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("longest", [(1000, 1000), (1003, 1017), (4096, 4096)])
@pytest.mark.parametrize("axes", ["b h q k", "q k", "b k", "h q k", "b q k", "k", "q", ""])
def test_packed_masks(axes, longest, kind, d, causal):
    """1017: no vectors; 4096: more than all rows together."""
    q, k, v = gpu.packed(MIXED, 4, 2, d, tail=(3, 70))
    sizes = zip("bhqk", (len(MIXED), 4, *longest), strict=True)
    shape = [n if a in axes.split() else 1 for a, n in sizes]
    check_packed(q, k, v, MIXED, longest=longest, causal=causal, mask=masks(kind, shape), most=2)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["bool", "bf16", "fp32"])
def test_packed_everything_together(kind, change, d):
    q, k, v = gpu.packed(MIXED, 4, 2, d, tail=(3, 70))
    limits = {"causal": True, "window": (500, None), **USED}
    for shape in ((1, 4, 1000, 1000), (len(MIXED), 1, 1000, 1000)):
        others = {"sink": sinks(4), "softcap": 20.0, "alibi_slopes": slopes(len(MIXED), 4)}
        others |= sent_packed(CHANGES[change], MIXED, 4) | {"mask": masks(kind, shape)}
        check_packed(q, k, v, MIXED, **limits, **others)


@pytest.mark.parametrize("odd", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("kind", ["bool", "bf16"])
@pytest.mark.parametrize("d", SIZES)
def test_packed_score_changes_with_odd_strides(d, kind, odd):
    arrays = dict(zip("qkv", gpu.packed(MIXED, 4, 2, d, tail=(5, 5)), strict=True))
    for name in odd:
        arrays[name] = torch.nn.functional.pad(arrays[name], (0, 1), value=torch.nan)[..., :-1]
    mask = torch.nn.functional.pad(masks(kind, (9, 4, 1000, 1000)), (0, 1), value=1)[..., :-1]
    others = {"mask": mask, "softcap": 20.0, "alibi_slopes": slopes(4), "dropout_p": 0.1, "seed": 3}
    check_packed(**arrays, lengths=MIXED, causal=True, **others)


@pytest.mark.parametrize("limits", [{}, {"causal": True}, {"window": (100, 30)}, USED])
@pytest.mark.parametrize("kind", ["bool", "bf16", "fp32"])
@pytest.mark.parametrize("d", SIZES)
def test_packed_what_no_row_sees_reaches_nothing(d, kind, limits):
    """Hidden by the mask, by the interval, or only by both together: NaN there, and in the mask."""
    q, k, v = gpu.packed(MIXED, 4, 2, d, tail=(9, 300))
    i, j = np.arange(1000)[:, None], np.arange(1000)
    hides = (
        (j % 7 == i // 40 % 7) | (j // 64 % 3 == 1) | (i >= 64) & (j < 40) | (i < 100) & (j > 90)
    )
    mask, wrong = torch.from_numpy(~hides).cuda(), torch.ones(1000, 1000, dtype=torch.bool)
    ends = np.cumsum(MIXED, axis=0)
    for n, (sq, sk) in enumerate(MIXED):
        own = {name: x[n : n + 1] if name in USED else x for name, x in limits.items()}
        seen = reference.interval(1, sq, sk, **own)[0][0]
        wrong[:sq, :sk] &= ~torch.from_numpy(np.ascontiguousarray(seen))
        seen = seen & ~hides[:sq, :sk] if kind == "bool" else seen
        rows, keys = slice(ends[n, 0] - sq, ends[n, 0]), slice(ends[n, 1] - sk, ends[n, 1])
        for x, part, hidden in (
            (q, rows, ~seen.any(1)),
            (k, keys, ~seen.any(0)),
            (v, keys, ~seen.any(0)),
        ):
            x[part][torch.from_numpy(hidden).cuda()] = torch.nan
    if kind != "bool":
        mask = torch.where(mask, 0.5, -1.5).masked_fill(wrong.cuda(), torch.nan)
        mask = mask.to({"bf16": torch.bfloat16, "fp32": torch.float32}[kind])
    check_packed(q, k, v, MIXED, mask=mask, **limits)


def test_packed_masks_of_100000_sequences():
    """One mask for all, however long one of them is; a mask of keys and slopes for each."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 30, (100_000, 2))
    some = [0, 1, 33_333, 50_001, 99_999]
    q, k, v = gpu.packed(lengths, 2, 1, 64, tail=(7, 7))
    each = {"mask": masks("bool", (100_000, 1, 1, 29)), "alibi_slopes": slopes(100_000, 2)}
    check_packed(q, k, v, lengths, some, causal=True, **each, dropout_p=0.1, seed=5)
    lengths[50_000] = 5000, 6000
    q, k, v = gpu.packed(lengths, 2, 1, 64, tail=(7, 7))
    for mask in (masks("bool", (2, 5000, 6000)), masks("bool", (1, 6000))):
        check_packed(q, k, v, lengths, [*some, 50_000], most=2, causal=True, mask=mask)


@pytest.mark.parametrize("lengths", [[(5, 0), (0, 0), (300, 0)], [(0, 0)], [(5, 0)], []])
def test_packed_without_keys_and_a_sink(lengths):
    """No key anywhere: another kernel writes the rows."""
    q, k, v = gpu.packed(lengths or [(0, 0)], 4, 2, 64, tail=(4, 0))
    for changes in ({}, {"softcap": 5.0}, {"mask": masks("bool", (1, 1))}):
        if lengths:
            check_packed(q, k, v, lengths, sink=sinks(4), longest=(400, 1), **changes)
        used = {"q_lengths": [3] * len(lengths), "k_lengths": [9] * len(lengths)}
        check_packed(q, k, v, lengths, sink=sinks(4), longest=(400, 1), **changes, **used)


def test_packed_bad_offsets_with_score_changes_stay_inside():
    total, guard, big = 1000, 4096, 2**31 - 1
    changes = {"softcap": 5.0, "dropout_p": 0.1, "seed": 1, "sink": sinks(2), "causal": True}
    for cu, kind in itertools.product(
        ([0, 500, 300, 1000], [0, 1000, 0, 1000, 0, 1000] * 500, [7, -5, 2000, big], [big] * 100),
        ("bool", "bf16"),
    ):
        b = len(cu) - 1
        cu = torch.tensor(cu, dtype=torch.int32, device="cuda")
        q, k, v = (gpu.normal(total, 2, 128, seed=i) for i in range(3))
        room = torch.full((total + 2 * guard, 2, 128), 7.0, dtype=q.dtype, device="cuda")
        for longest in (total, 100):
            own = {"mask": masks(kind, (longest, longest)), "alibi_slopes": slopes(b, 2), **changes}
            fastattn.attention_varlen(
                q, k, v, cu, cu, longest, longest, out=room[guard:-guard], **own
            )
            torch.cuda.synchronize()
            assert (room[:guard] == 7).all() and (room[-guard:] == 7).all()


@pytest.mark.parametrize("change", ["softcap", "softcap, far", "alibi", "high sink"])
@pytest.mark.parametrize("kind", ["bool", "bf16"])
def test_packed_general_rows_are_batch_invariant(kind, change):
    """Whoever else is in the call, and however large their scores."""
    q, k, v = gpu.packed(MIXED, 4, 2, 128)
    changes = sent_packed(CHANGES[change], MIXED, 4) | {"mask": masks(kind, (1000, 1000))}
    options = changes | {"causal": True, "batch_invariant": True, "return_lse": True}
    ends = np.cumsum(MIXED, axis=0)
    for n, (sq, sk) in enumerate(MIXED):
        rows, keys = slice(ends[n, 0] - sq, ends[n, 0]), slice(ends[n, 1] - sk, ends[n, 1])
        others = [x * 30 for x in (q, k, v)]
        for x, mine, part in zip(others, (q, k, v), (rows, keys, keys), strict=True):
            x[part] = mine[part]
        cu_q, cu_k, *_ = gpu.offsets(MIXED)
        together = fastattn.attention_varlen(*others, cu_q, cu_k, 1000, 1000, **options)
        cu_q, cu_k, *_ = gpu.offsets([(sq, sk)])
        alone = fastattn.attention_varlen(
            q[rows], k[keys], v[keys], cu_q, cu_k, 1000, 1000, **options
        )
        assert torch.equal(alone[0], together[0][rows])
        assert torch.equal(alone[1], together[1][:, rows])


def test_packed_masks_in_a_graph():
    """A replay goes by what the mask and cu_seqlens hold then."""
    lengths, other = [(300, 300), (100, 100), (1, 5)], [(30, 0), (200, 280), (171, 125)]
    q, k, v = gpu.packed(lengths, 2, 2, 128)
    cu_q, cu_k, *_ = gpu.offsets(lengths)
    mask, out = masks("bool", (3, 1, 300, 300)), torch.full_like(q, torch.nan)
    limits = {"mask": mask, "causal": True}

    def call():
        fastattn.attention_varlen(q, k, v, cu_q, cu_k, 300, 300, out=out, **limits)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed, now in enumerate((lengths, other, lengths)):
        for cu, new in zip((cu_q, cu_k), gpu.offsets(now)[:2], strict=True):
            cu.copy_(new)
        mask.copy_(masks("bool", mask.shape, seed))
        out.fill_(torch.nan)
        graph.replay()
        assert gpu.packed_complaints(out, None, q, k, v, now, **limits) == []


@pytest.mark.parametrize("change", [*CHANGES, "bool", "bf16"])
def test_packed_explain_names_the_general_row(change):
    q, k, v = gpu.packed(MIXED, 4, 4, 128)
    changes = sent_packed(CHANGES.get(change, {}), MIXED, 4)
    if not changes:
        changes = {"mask": masks(change, (1000, 1000))}
    cu = gpu.offsets(MIXED)
    row = fastattn.explain(fastattn.attention_varlen, q, k, v, *cu, **changes).kernel
    assert (row == "sm90_fwd_bf16_d128_general") == ("sink" not in change)
