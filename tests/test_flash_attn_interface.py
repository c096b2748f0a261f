"""fastattn.flash_attn_interface: FlashAttention 3's functions, forward and backward."""

import inspect

import pytest

torch = pytest.importorskip("torch")
import shims  # noqa: E402
from fastattn import flash_attn_interface as flash3  # noqa: E402
from test_flash_attn import BLOCKS, CASES, ENDS, gradients, of_reference, written  # noqa: E402

# FlashAttention 3 has no ALiBi; what only tunes it changes nothing.
MINE = {name: case for name, case in CASES.items() if "alibi_slopes" not in case[0]}
MINE["tuned"] = ({"num_splits": 3, "pack_gqa": True, "causal": True}, {"causal": True})


@pytest.mark.parametrize("name", MINE)
def test_func(name):
    theirs, ours = MINE[name]
    tensors = shims.leaves((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 5))
    out, lse = flash3.flash_attn_func(*tensors, return_attn_probs=True, **theirs)
    shims.judge(out, lse, tensors, *gradients(out, tensors), **ours)
    assert torch.equal(flash3.flash_attn_func(*tensors, **theirs), out)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "softcap", "scale"])
def test_qkvpacked(name):
    theirs, ours = MINE[name]
    (qkv,) = shims.leaves((2, 6, 3, 4, 3))
    out, lse = flash3.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **theirs)
    dout, (dqkv,) = gradients(out, (qkv,))
    shims.judge(out, lse, qkv.unbind(2), dout, dqkv.unbind(2), **ours)
    (qkv,) = shims.leaves((2, 6, 8, 3))  # 4 heads of queries, 2 of keys
    out = flash3.flash_attn_qkvpacked_func(qkv, num_heads_q=4, **theirs)
    dout, (dqkv,) = gradients(out, (qkv,))
    tensors, found = (x.split([4, 2, 2], 2) for x in (qkv, dqkv))
    shims.judge(out, None, tensors, dout, found, **ours)


@pytest.mark.parametrize("name", MINE)
def test_varlen(name):
    theirs, ours = MINE[name]
    tensors = shims.leaves((10, 4, 3), (11, 2, 3), (11, 2, 5))
    out, lse = flash3.flash_attn_varlen_func(
        *tensors, *ENDS, 7, 5, return_attn_probs=True, **theirs
    )
    found = gradients(out, tensors)
    shims.judge_blocks(out, lse, tensors, *found, BLOCKS, lambda n: of_reference(ours, n))


def test_rows_in_use():
    tensors = shims.leaves((10, 4, 3), (11, 2, 3), (11, 2, 3))
    used = [torch.tensor(x, dtype=torch.int32) for x in ([2, 5], [4, 4])]
    out, lse = flash3.flash_attn_varlen_func(
        *tensors, *ENDS, 7, 5, *used, causal=True, return_attn_probs=True
    )
    blocks = [((0, 2), (0, 4)), ((3, 8), (5, 9))]
    found = gradients(out, tensors)
    shims.judge_blocks(out, lse, tensors, *found, blocks, lambda n: {"causal": True})


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_combine(out_dtype):
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    parts = [(slice(0, 2),), (slice(2, 5),)]
    found = [
        flash3.flash_attn_func(q, k[:, at], v[:, at], return_attn_probs=True) for (at,) in parts
    ]
    outs = torch.stack([out for out, _ in found])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in found])
    whole, whole_lse = flash3.flash_attn_func(q, k, v, return_attn_probs=True)
    out, lse = flash3.flash_attn_combine(outs, lses, out_dtype=out_dtype)
    torch.testing.assert_close(out, whole.to(out_dtype or torch.float32))
    torch.testing.assert_close(lse, whole_lse.transpose(1, 2))
    into = torch.empty_like(out)
    again, _ = flash3.flash_attn_combine(outs, lses, into, out_dtype)
    assert again is into and torch.equal(into, out)
    lses[0, 0] = torch.inf  # as FlashAttention says of a part without keys
    alone, _ = flash3.flash_attn_combine(outs, lses)
    torch.testing.assert_close(alone[0], outs[1, 0])


def test_sentences_of_combine():
    outs, lses = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5)
    with pytest.raises(ValueError, match=r"`lse_partial` must be \(n, b, s, h\)"):
        flash3.flash_attn_combine(outs, lses)
    out = torch.ones(2, 5, 4, 8)
    with pytest.raises(ValueError, match=r"`out` must be torch.bfloat16 of \(2, 5, 4, 8\)"):
        flash3.flash_attn_combine(outs, lses.transpose(2, 3), out, torch.bfloat16)
    assert (out == 1).all()


REFUSED = ["qv", "q_descale", "k_descale", "v_descale", "attention_chunk", "sm_margin"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused_by_name(name):
    x = torch.randn(2, 5, 4, 8)
    given = {name: 2 if name in ("attention_chunk", "sm_margin") else torch.ones(2, 4)}
    calls = [lambda **y: flash3.flash_attn_func(x, x, x, **y)]
    calls += [lambda **y: flash3.flash_attn_varlen_func(x, x, x, *ENDS, 7, 5, **y)]
    if name != "qv":
        packed = torch.stack([x, x, x], 2)
        calls += [lambda **y: flash3.flash_attn_qkvpacked_func(packed, **y)]
    for call in calls:
        with pytest.raises(NotImplementedError, match=f"`{name}` must be (None|0): no backend"):
            call(**given)


def test_heads_of_packed_arrays():
    for heads in (None, 3, 8):
        with pytest.raises(ValueError, match="`num_heads_q` must leave as many heads of k as of v"):
            flash3.flash_attn_qkvpacked_func(torch.randn(2, 5, 8, 3), num_heads_q=heads)


TUNING = "window_size=(-1,-1) attention_chunk=0 softcap=0.0"
SCALES = "q_descale=None k_descale=None v_descale=None"
REST = f"softmax_scale=None causal=False qv=None {SCALES} {TUNING} num_splits=1 pack_gqa=None "
REST += "deterministic=False sm_margin=0 return_attn_probs=False"
NAMES = {  # of FlashAttention 3, in order, with the defaults of those that have one
    "func": f"q k v {REST}",
    "varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q=None "
    f"seqused_k=None {REST}",
    "qkvpacked_func": f"qkv softmax_scale=None causal=False {SCALES} {TUNING} "
    "deterministic=False num_heads_q=None sm_margin=0 return_attn_probs=False",
    "combine": "out_partial lse_partial out=None out_dtype=None",
    "with_kvcache": "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None "
    "cu_seqlens_q=None cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None "
    f"{SCALES} softmax_scale=None causal=False {TUNING} rotary_interleaved=True "
    "scheduler_metadata=None num_splits=0 pack_gqa=None sm_margin=0 return_softmax_lse=False",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_defaults(name):
    assert written(getattr(flash3, f"flash_attn_{name}")) == NAMES[name]


def test_sinks():
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])
    tensors = shims.leaves((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3))
    out = flash3.flash_attn_func(*tensors, s_aux=sink)
    shims.judge(out, None, tensors, *gradients(out, tensors), sink=sink.numpy())
    for function in (flash3.flash_attn_func, flash3.flash_attn_varlen_func):
        assert "s_aux" in inspect.signature(function).parameters
