"""Gradients on a GPU: values, whatever the strides; what is not declared is refused before."""

import declared
import fastattn
import pytest
import reference_backward
from cases import Torch

import gpu
from gpu import DTYPES, normal, torch
from gpu.calls import STRIDES, restrided

pytestmark = gpu.marks

NAMES = ("dq", "dk", "dv")


def formula(dout, q, k, v, seen, low=False):
    """(out, dq, dk, dv) in float64; `low`: in float32, P and dS rounded before their products."""
    real, dtype, scale = torch.float32 if low else torch.float64, q.dtype, q.shape[-1] ** -0.5
    (b, hk, sk, _), group = k.shape, q.shape[1] // k.shape[1]
    dout, q, k, v = (x.to(real) for x in (dout, q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))

    def rounded(x):
        return x.to(dtype).to(real) if low else x

    scores = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    p = scores.softmax(-1).nan_to_num()
    out = rounded(rounded(p) @ v)
    ds = rounded(scale * p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)))
    dk, dv = (x.mT @ y for x, y in ((ds, q), (rounded(p), dout)))
    return out, ds @ k, *(x.view(b, hk, group, sk, -1).sum(2) for x in (dk, dv))


def visible(sq, sk, causal=False, window=(None, None)):
    i = torch.arange(sq, device="cuda")[:, None] + (0 if causal == "top-left" else sk - sq)
    j, (left, right) = torch.arange(sk, device="cuda"), window
    seen = torch.ones(sq, sk, dtype=torch.bool, device="cuda")
    if causal:
        seen &= j <= i
    if left is not None:
        seen &= j >= i - left
    return seen if right is None else seen & (j <= i + right)


def complaints(found, dout, q, k, v, seen):
    exact, low = (formula(dout, q, k, v, seen, low)[1:] for low in (False, True))
    said = []
    for name, got, ref, careful in zip(NAMES, found, exact, low, strict=True):
        if got is None:
            continue
        error, errors = (got.double() - ref).abs(), (careful.to(q.dtype).double() - ref).abs()
        limit = 2 * errors.max() + 2 * (ref.to(q.dtype).double() - ref).abs().max()
        limit += 4e-6  # sums of float32 whose terms are some units large, and cancel
        if not error.max() <= limit:
            said.append(f"{name}: max {error.max():.2e}, above {limit:.2e}")
        most = 1.5 * errors.mean() + 4e-7  # likewise: where a row sees one key, dq is nothing else
        if error.numel() >= 1024 and not error.mean() <= most:
            said.append(f"{name}: mean {error.mean():.2e}, above {most:.2e}")
    return said


def nan_like(x):
    return torch.full_like(x, torch.nan)


def poison_memory():
    """What the next call gets from torch's allocator holds NaN."""
    rooms = [torch.full((n,), torch.nan, device="cuda") for n in (2**20, 2**22, 2**24)]
    del rooms


def both_passes(q, k, v, dout, given=(None,) * 3, **keywords):
    poison_memory()
    out, lse = fastattn.attention(q, k, v, return_lse=True, **keywords)
    arrays = dict(zip(NAMES, given, strict=True))
    return fastattn.attention_backward(dout, q, k, v, out, lse, **arrays, **keywords)[:3]


SHAPES = [  # b, hq, hk, sq, sk
    (2, 4, 2, 300, 500),
    (1, 2, 2, 192, 192),  # sq % 128 == 64
    (2, 3, 3, 1, 700),
    (1, 8, 1, 1, 1),
    (1, 4, 4, 1024, 1024),
    (3, 2, 1, 65, 129),
    (1, 16, 4, 700, 300),
]
ALIKE = [(d, d) for d in (8, 64, 96, 128, 192, 256)]
SIZES = [*ALIKE, (192, 128), (96, 40), (80, 128), (33, 65), (160, 72), (40, 200), (250, 129)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("d", "dv"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, d, dv, shape):
    b, hq, _, sq, sk = shape
    q, k, v = gpu.inputs(*shape, d, dv, DTYPES[dtype])
    dout = normal(b, hq, sq, dv, dtype=DTYPES[dtype], seed=9)
    for keywords in ({}, {"causal": True}, {"causal": "top-left"}, {"window": (70, 30)}):
        found = both_passes(q, k, v, dout, [nan_like(x) for x in (q, k, v)], **keywords)
        assert complaints(found, dout, q, k, v, visible(sq, sk, **keywords)) == [], keywords


def written_beside(x):
    """Whether something was written to the buffer of `x`, of NaN, that is no element of it."""
    whole = x._base.clone()
    whole.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(torch.nan)
    return not whole.isnan().all()


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256, 40, 33, 225])
def test_strides_of_each_array(d, how):
    """Each array alone in other strides gives the bits that a dense one does, but for the order in
    which dq is summed; nothing is written beside a gradient."""
    q, k, v = gpu.inputs(2, 4, 2, 150, 200, d)
    dout, seen = normal(2, 4, 150, d, seed=9), visible(150, 200, causal=True)
    arrays = {"q": q, "k": k, "v": v, "dout": dout}
    for name, x in arrays.items():
        moved = arrays | {name: restrided(x, how)}
        found = both_passes(moved["q"], moved["k"], moved["v"], moved["dout"], causal=True)
        assert complaints(found, dout, q, k, v, seen) == [], name
    given = [restrided(nan_like(x), how) for x in (q, k, v)]
    found = both_passes(q, k, v, dout, given, causal=True)
    assert all(x is y for x, y in zip(found, given, strict=True))
    assert complaints(found, dout, q, k, v, seen) == []
    assert not any(written_beside(x) for x in given)


def test_a_sum_has_a_gradient_of_strides_0():
    q, k, v = (x.requires_grad_() for x in gpu.inputs(2, 4, 2, 150, 200, 64))
    fastattn.attention(q, k, v).sum().backward()
    dout = torch.ones_like(q)
    with torch.no_grad():
        assert complaints((q.grad, k.grad, v.grad), dout, q, k, v, visible(150, 200)) == []


@pytest.mark.parametrize("wanted", [(x,) for x in NAMES] + [("dq", "dv"), ()])
@pytest.mark.parametrize("d", [64, 128, 192, 256])
def test_what_is_asked_alone(d, wanted):
    q, k, v = gpu.inputs(2, 4, 2, 300, 200, d)
    dout = normal(2, 4, 300, d, seed=9)
    needs = {f"need_{name}": name in wanted for name in NAMES}
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    found = fastattn.attention_backward(dout, q, k, v, out, lse, **needs)
    assert [x is not None for x in found[:3]] == [name in wanted for name in NAMES]
    assert complaints(found[:3], dout, q, k, v, visible(300, 200)) == []


def test_the_gradient_of_lse_alone():
    """No dout: dq is dlse times the mean key, dv is 0."""
    q, k, v = (x.requires_grad_() for x in gpu.inputs(2, 4, 2, 150, 200, 64))
    _, lse = fastattn.attention(q, k, v, return_lse=True)
    dlse = normal(*lse.shape, dtype=torch.float32, seed=4)
    found = torch.autograd.grad(lse, (q, k, v), dlse)
    wide = [x.double().repeat_interleave(2, 1) for x in (k, v)]
    exact = torch.logsumexp(q.double() @ wide[0].mT / 8, -1)
    want = torch.autograd.grad(exact, (q, k), dlse.double())
    for x, y in zip(found, want, strict=False):
        torch.testing.assert_close(x.double(), y.double(), rtol=0.02, atol=0.02)
    assert not found[2].any()


@pytest.mark.parametrize("sizes", [(2, 2, 5, 0), (2, 2, 0, 5), (0, 2, 5, 5), (2, 2, 5, 9)])
@pytest.mark.parametrize("layout", ["plain", "strided columns"])
def test_no_score_gives_zeros(sizes, layout):
    """Sizes of 0, and (the last) lengths that hide all keys, which hold NaN."""
    b, h, sq, sk = sizes
    q, k, v = gpu.inputs(b, h, h, sq, sk, 64)
    keywords = {}
    if all(sizes):
        k, v = nan_like(k), nan_like(v)
        keywords = {"k_lengths": torch.zeros(b, dtype=torch.int32, device="cuda")}
    given = [nan_like(x) for x in (q, k, v)]
    if layout != "plain":
        given = [x.new_full((*x.shape[:3], 128), torch.nan)[..., ::2] for x in given]
    found = both_passes(q, k, v, nan_like(q), given, **keywords)
    assert not any(x.isnan().any() or x.any() for x in found)


@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_what_no_row_sees_reaches_nothing(d):
    q, k, v = gpu.inputs(2, 4, 2, 200, 300, d)
    dout, clean = normal(2, 4, 200, d, seed=9), [x.clone() for x in (q, k, v)]
    lengths = {"q_lengths": [150, 0], "k_lengths": [130, 300], "k_start": [3, 0]}
    lengths = {n: torch.tensor(x, dtype=torch.int32, device="cuda") for n, x in lengths.items()}
    first = both_passes(*clean, dout, causal=True, **lengths)
    for x in (k, v):
        x[0, :, 130:], x[0, :, :3], x[1] = (torch.nan,) * 3
    for x in (q, dout):
        x[0, :, 150:], x[1] = torch.nan, torch.nan
    second = both_passes(q, k, v, dout, causal=True, **lengths)
    for x, y in zip(first[1:], second[1:], strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(first[0], second[0], rtol=0.01, atol=1e-3)
    assert not second[0][1].any() and not second[0][0, :, 150:].any()
    assert not second[1][1].any() and not second[2][0, :, 130:].any()


@pytest.mark.parametrize("sk", [0, 1, 300])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_sinks(d, sk):
    """Of rows that see nothing, too, whose dout may hold anything: lse is the sink there."""
    q, k, v = gpu.inputs(2, 4, 2, 200, sk, d)
    dout, dlse = normal(2, 4, 200, d, seed=9), normal(2, 4, 200, dtype=torch.float32, seed=8)
    sink, seen = normal(4, dtype=torch.float32, seed=7), visible(200, sk, window=(-3, 50))
    out, lse = fastattn.attention(q, k, v, sink=sink, window=(-3, 50), return_lse=True)
    dout[:, :, ~seen.any(-1)] = torch.nan
    arguments = (dout, q, k, v, out, lse)
    options = {"sink": sink, "window": (-3, 50), "dlse": dlse, "need_dsink": True}
    found = fastattn.attention_backward(*arguments, **options)
    numpy = Torch("cpu").numpy
    given = [numpy(x.cpu()) for x in (dout, q, k, v)]
    masks = {"sink": numpy(sink.cpu()), "window": (-3, 50), "dlse": numpy(dlse.cpu())}
    got = {"dsink": numpy(found[4].cpu())}
    assert not reference_backward.check(got, *given, lse=numpy(lse.cpu()), **masks)
    again = fastattn.attention_backward(*arguments, **options)
    assert torch.equal(found[4], again[4])


@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_dk_and_dv_have_the_same_bits_every_time(d):
    q, k, v = gpu.inputs(2, 4, 2, 500, 700, d)
    dout = normal(2, 4, 500, d, seed=9)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    first = fastattn.attention_backward(dout, q, k, v, out, lse, causal=True)
    for _ in range(50):
        again = fastattn.attention_backward(dout, q, k, v, out, lse, causal=True)
        assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
    one = slice(1, 2)
    alone = fastattn.attention_backward(
        *(x[one].contiguous() for x in (dout, q, k, v, out, lse)), causal=True
    )
    assert torch.equal(alone[1], first[1][one]) and torch.equal(alone[2], first[2][one])


# ----------------------------------------------------------------------------- what is not declared

FEATURES = {
    "varlen": lambda q: {},
    "bool_mask": lambda q: {"mask": torch.ones(9, 9, dtype=torch.bool, device="cuda").tril()},
    "float_mask": lambda q: {"mask": torch.zeros(9, 9, device="cuda")},
    "softcap": lambda q: {"softcap": 5.0},
    "alibi": lambda q: {"alibi_slopes": torch.ones(2, device="cuda")},
    "sink": lambda q: {"sink": torch.zeros(2, device="cuda")},
    "dropout": lambda q: {"dropout_p": 0.5},
    "deterministic": lambda q: {"deterministic": True},
    "dmask": lambda q: {"mask": torch.zeros(9, 9, device="cuda", requires_grad=True)},
}


def call_of(name, d=64):
    q, k, v = (x.requires_grad_() for x in gpu.inputs(1, 2, 2, 9, 9, d))
    if name != "varlen":
        return fastattn.attention, (q, k, v), FEATURES[name](q)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32, device="cuda")
    return (
        fastattn.attention_varlen,
        (*(x[0].transpose(0, 1) for x in (q, k, v)), ends, ends, 5, 5),
        {},
    )


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_served_or_refused_by_its_name_before_the_forward(name):
    function, arguments, keywords = call_of(name)
    if declared.serves("sm90", "backward", features=(name,)):
        result = function(*arguments, **keywords)
        assert all(x.isfinite().all() for x in torch.autograd.grad(result.sum(), arguments[:3]))
        return
    before = torch.cuda.memory_allocated()
    sentence = r"sm90: it takes no .*where no gradient is wanted call it under torch\.no_grad"
    with pytest.raises(NotImplementedError, match=sentence):
        function(*arguments, **keywords)
    said = fastattn.explain(function, *arguments, **keywords)
    assert said.backend is said.kernel is None
    assert said.reasons["sm90"].startswith("it takes no ")
    assert said.reasons["cpu"] == "the arrays are on a GPU"
    assert torch.cuda.memory_allocated() == before
    with torch.no_grad():
        assert fastattn.explain(function, *arguments, **keywords).backend == "sm90"
        assert not function(*arguments, **keywords).requires_grad


def test_sizes_that_are_not_declared():
    _, most = fastattn.info()["support"]["sm80"]["backward"]["d"]
    q, k, v = (x.requires_grad_() for x in gpu.inputs(1, 2, 2, 9, 9, most))
    fastattn.attention(q, k, v).sum().backward()
    q, k, v = (x.requires_grad_() for x in gpu.inputs(1, 2, 2, 9, 9, most + 1))
    with pytest.raises(NotImplementedError, match=f"it takes d and dv from 0 to {most}, not d = "):
        fastattn.attention(q, k, v)


def test_explain_names_the_backwards_kernel():
    q, k, v = gpu.inputs(1, 2, 2, 9, 9, 64)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    for dout, end in ((out, "128"), (out.new_ones(()).expand(out.shape), "_strided")):
        said = fastattn.explain(fastattn.attention_backward, dout, q, k, v, out, lse)
        assert said.backend == "sm90" and said.kernel.startswith("sm90_bwd_bf16_d64_")
        assert said.kernel.endswith(end)


def test_merging_has_a_gradient_in_torchs_operators():
    outs = [torch.randn(2, 4, 5, 16, device="cuda", requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 4, 5, device="cuda", requires_grad=True) for _ in range(3)]
    weights = torch.softmax(torch.stack(lses), 0)
    want = (weights[..., None] * torch.stack(outs)).sum(0), torch.logsumexp(torch.stack(lses), 0)
    got = fastattn.merge_states(outs, lses)
    torch.testing.assert_close(got, want)
    ours, theirs = (
        torch.autograd.grad(out.sin().sum() + lse.cos().sum(), [*outs, *lses])
        for out, lse in (got, want)
    )
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32])
def test_a_seed_of_32_bits_is_refused(dtype):
    q, k, v = gpu.inputs(1, 2, 2, 9, 9, 64)
    seed = torch.tensor(7, dtype=dtype, device="cuda")
    with pytest.raises(NotImplementedError, match=r"`seed` must be int64 on a GPU, .*seed\.long"):
        fastattn.attention(q, k, v, dropout_p=0.5, seed=seed)
