"""fastattn.flash_attn: FlashAttention 2's functions, forward and backward, by the reference."""

import inspect

import fastattn
import pytest

torch = pytest.importorskip("torch")
import shims  # noqa: E402
from fastattn import flash_attn  # noqa: E402
from fastattn.flash_attn.flash_attn_interface import flash_attn_func  # noqa: E402

SLOPES = [[0.5, 0.1, 0.3, 0.0], [0.2, 0.7, 0.0, 1.0]]
SINK = [0.5, -1.0, 2.0, 0.0]
CASES = {  # name: their arguments, the reference's
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (3, 1)}, {"window": (3, 1)}),
    "left": ({"window_size": (2, -1)}, {"window": (2, None)}),
    "right": ({"window_size": [-1, 2]}, {"window": (None, 2)}),
    "a window without bounds": ({"window_size": (-3, -1)}, {}),
    "a tensor": ({"window_size": torch.tensor([1, 2])}, {"window": (1, 2)}),
    "causal window": ({"causal": True, "window_size": (2, 5)}, {"causal": True, "window": (2, 5)}),
    "softcap": ({"softcap": 0.8}, {"softcap": 0.8}),
    "softcap off": ({"softcap": -1.0}, {}),
    "scale": ({"softmax_scale": -0.7}, {"scale": -0.7}),
    "slopes": ({"alibi_slopes": torch.tensor(SLOPES[0])}, {"alibi_slopes": SLOPES[0]}),
    "slopes of each": ({"alibi_slopes": torch.tensor(SLOPES)}, {"alibi_slopes": SLOPES}),
    "deterministic": ({"deterministic": True, "causal": True}, {"causal": True}),
}


def of_reference(keywords, n=slice(None)):
    """A case's keywords; of sequence n alone."""
    keywords = dict(keywords)
    if "alibi_slopes" in keywords:
        slopes = shims.array(keywords["alibi_slopes"])
        keywords["alibi_slopes"] = slopes if slopes.ndim == 1 or n == slice(None) else slopes[n]
    if "sink" in keywords:
        keywords["sink"] = shims.array(keywords["sink"])
    return keywords


def gradients(out, tensors):
    dout = torch.randn_like(out)
    return dout, torch.autograd.grad(out, tensors, dout)


@pytest.mark.parametrize("sq, sk", [(5, 7), (7, 4)])
@pytest.mark.parametrize("name", CASES)
def test_func(name, sq, sk):
    theirs, ours = CASES[name]
    q, k, v = shims.leaves((2, sq, 4, 3), (2, sk, 2, 3), (2, sk, 2, 5))
    out, lse, pattern = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **theirs)
    assert pattern is None and lse.shape == (2, 4, sq)
    shims.judge(out, lse, (q, k, v), *gradients(out, (q, k, v)), **of_reference(ours))
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **theirs), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_func_in_other_dtypes(dtype):
    tensors = shims.leaves((2, 33, 4, 40), (2, 50, 2, 40), (2, 50, 2, 40), dtype=dtype)
    out, lse, _ = flash_attn_func(*tensors, causal=True, return_attn_probs=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    shims.judge(out, lse, tensors, *gradients(out, tensors), causal=True)


@pytest.mark.parametrize("name", CASES)
def test_kvpacked(name):
    theirs, ours = CASES[name]
    q, kv = shims.leaves((2, 5, 4, 3), (2, 7, 2, 2, 3))
    out, lse, _ = flash_attn.flash_attn_kvpacked_func(q, kv, return_attn_probs=True, **theirs)
    dout, (dq, dkv) = gradients(out, (q, kv))
    found = (dq, *dkv.unbind(2))
    shims.judge(out, lse, (q, *kv.unbind(2)), dout, found, **of_reference(ours))


@pytest.mark.parametrize("name", CASES)
def test_qkvpacked(name):
    theirs, ours = CASES[name]
    (qkv,) = shims.leaves((2, 6, 3, 4, 3))
    out, lse, _ = flash_attn.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **theirs)
    dout, (dqkv,) = gradients(out, (qkv,))
    shims.judge(out, lse, qkv.unbind(2), dout, dqkv.unbind(2), **of_reference(ours))


Q_ENDS, K_ENDS = ([0, 3, 10], [0, 5, 9])  # the second has more queries than keys
ENDS = [torch.tensor(x, dtype=torch.int32) for x in (Q_ENDS, K_ENDS)]
BLOCKS = [((0, 3), (0, 5)), ((3, 10), (5, 9))]


@pytest.mark.parametrize("name", CASES)
def test_varlen(name):
    theirs, ours = CASES[name]
    tensors = shims.leaves((10, 4, 3), (11, 2, 3), (11, 2, 5))
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *tensors, *ENDS, 7, torch.tensor(5), return_attn_probs=True, **theirs
    )
    assert lse.shape == (4, 10)
    found = gradients(out, tensors)
    shims.judge_blocks(out, lse, tensors, *found, BLOCKS, lambda n: of_reference(ours, n))


@pytest.mark.parametrize("name", CASES)
def test_varlen_kvpacked(name):
    theirs, ours = CASES[name]
    q, kv = shims.leaves((10, 4, 3), (11, 2, 2, 3))
    out, lse, _ = flash_attn.flash_attn_varlen_kvpacked_func(
        q, kv, *ENDS, 7, 5, return_attn_probs=True, **theirs
    )
    dout, (dq, dkv) = gradients(out, (q, kv))
    tensors, found = (q, *kv.unbind(1)), (dq, *dkv.unbind(1))
    shims.judge_blocks(out, lse, tensors, dout, found, BLOCKS, lambda n: of_reference(ours, n))


@pytest.mark.parametrize("name", CASES)
def test_varlen_qkvpacked(name):
    theirs, ours = CASES[name]
    (qkv,) = shims.leaves((12, 3, 4, 3))
    out, lse, _ = flash_attn.flash_attn_varlen_qkvpacked_func(
        qkv, ENDS[0], 7, return_attn_probs=True, **theirs
    )
    dout, (dqkv,) = gradients(out, (qkv,))
    blocks = [((0, 3), (0, 3)), ((3, 10), (3, 10))]
    found = qkv.unbind(1), dout, dqkv.unbind(1), blocks
    shims.judge_blocks(out, lse, *found, lambda n: of_reference(ours, n))


def test_rows_that_see_nothing():
    q, k, v = shims.leaves((1, 5, 1, 4), (1, 2, 1, 4), (1, 2, 1, 4))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :3].any() and (lse[..., :3] == -torch.inf).all()
    assert not torch.autograd.grad(out.sum(), q)[0][:, :3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_as_transformers_names_them(dtype):
    sink = torch.tensor(SINK, dtype=dtype, requires_grad=True)
    q, k, v = shims.leaves((2, 10, 4, 3), (2, 11, 2, 3), (2, 11, 2, 3))
    out = flash_attn_func(q, k, v, s_aux=sink)
    shims.judge(out, None, (q, k, v), *gradients_kept(out, (q, k, v)), sink=shims.array(SINK))
    out.sum().backward()
    assert sink.grad.dtype == dtype and sink.grad.any()
    ends = torch.tensor([0, 10], dtype=torch.int32), torch.tensor([0, 11], dtype=torch.int32)
    packed = flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], *ends, 10, 11, s_aux=sink)
    torch.testing.assert_close(packed, out[0])


def gradients_kept(out, tensors):
    dout = torch.randn_like(out)
    return dout, torch.autograd.grad(out, tensors, dout, retain_graph=True)


def test_dropout_is_attentions_own():
    tensors = shims.leaves((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), dtype=torch.float32)
    found = []
    for call, layout in ((fastattn.attention, {"layout": "bshd"}), (flash_attn_func, {})):
        torch.manual_seed(3)
        out = call(*tensors, dropout_p=0.3, causal=True, **layout)
        found.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    ends = torch.tensor([0, 9, 18], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in tensors]
    torch.manual_seed(3)
    out = flash_attn.flash_attn_varlen_func(*packed, ends, ends, 9, 9, 0.3, causal=True)
    torch.testing.assert_close(out, found[0][0].flatten(0, 1))


def test_deterministic_is_attentions_own(monkeypatch):
    heard = []

    def listen(*arguments, **keywords):
        heard.append(keywords["deterministic"])
        return arguments[0]

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(f"fastattn._flash.{name}", listen)
    q = torch.randn(2, 5, 4, 8)
    for wanted in (False, True):
        flash_attn_func(q, q, q, deterministic=wanted)
        flash_attn.flash_attn_varlen_func(q, q, q, *ENDS, 7, 5, deterministic=wanted)
    assert heard == [False, False, True, True]


REFUSED = {
    "pattern": (
        flash_attn_func,
        {"dropout_p": 0.1, "return_attn_probs": True},
        "return_attn_probs",
    ),
    "slopes": (flash_attn_func, {"alibi_slopes": torch.zeros(4).requires_grad_()}, "alibi_slopes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_a_sentence(name):
    function, keywords, said = REFUSED[name]
    with pytest.raises(NotImplementedError, match=said):
        function(*(torch.randn(2, 5, h, 8) for h in (4, 2, 2)), **keywords)


def test_sentences_about_packed_arrays():
    q = torch.randn(2, 5, 4, 8)
    with pytest.raises(ValueError, match=r"`kv` must be \(b, s, 2, h, d\), got \(2, 5, 3, 4, 8\)"):
        flash_attn.flash_attn_kvpacked_func(q, torch.randn(2, 5, 3, 4, 8))
    with pytest.raises(ValueError, match=r"`qkv` must be \(total, 3, h, d\), got \(2, 5, 4, 8\)"):
        flash_attn.flash_attn_varlen_qkvpacked_func(q, ENDS[0], 7)
    with pytest.raises(ValueError, match="`k` must have d = 8 like `q`, got 3"):
        flash_attn_func(q, q[..., :3], q)


NAMES = {  # of flash-attn 2.8, in order, with the defaults of those that have one
    "func": "q k v dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False",
    "with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None block_table=None "
    "softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 rotary_interleaved=True "
    "alibi_slopes=None num_splits=0 return_softmax_lse=False",
}
REST, LENGTHS = NAMES["func"].partition(" v ")[2], "cu_seqlens_q cu_seqlens_k"
LENGTHS += " max_seqlen_q max_seqlen_k"
NAMES |= {
    "kvpacked_func": f"q kv {REST}",
    "qkvpacked_func": f"qkv {REST}",
    "varlen_func": f"q k v {LENGTHS} {REST} block_table=None",
    "varlen_kvpacked_func": f"q kv {LENGTHS} {REST}",
    "varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {REST}",
}


def written(function):
    """Its parameters, but those that only a name reaches."""
    parameters = inspect.signature(function).parameters.values()
    mine = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    defaults = ["" if p.default is p.empty else f"={p.default!r}".replace(" ", "") for p in mine]
    return " ".join(p.name + x for p, x in zip(mine, defaults, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_defaults(name):
    function = getattr(flash_attn, f"flash_attn_{name}")
    assert written(function) == NAMES[name]
    assert function.__name__ in flash_attn.__all__ and len(NAMES) == len(flash_attn.__all__)


def test_what_wraps_a_module_finds_the_keywords():
    """transformers asks the varlen function what both take."""
    wanted = {"dropout_p", "window_size", "softcap", "deterministic", "s_aux"}
    for function in (flash_attn_func, flash_attn.flash_attn_varlen_func):
        assert wanted <= inspect.signature(function).parameters.keys()
    varlen = inspect.signature(flash_attn.flash_attn_varlen_func).parameters
    assert {"block_table", "max_seqlen_q", "max_seqlen_k"} <= varlen.keys()


def test_in_a_graph():
    torch._dynamo.reset()
    q, k, v = shims.leaves((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8), dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v):
        return flash_attn_func(q, k, v, causal=True, window_size=(2, 0)) * 2

    for x, y in zip(
        (call(q, k, v), *torch.autograd.grad(call(q, k, v).sum(), (q, k, v))),
        gradients_of_plain(q, k, v),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def gradients_of_plain(q, k, v):
    out = flash_attn_func(q, k, v, causal=True, window_size=(2, 0)) * 2
    return out, *torch.autograd.grad(out.sum(), (q, k, v))
