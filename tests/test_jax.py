"""fastattn inside JAX's jit, grad and checkpoint: every feature, bit for bit the plain call's."""

import fastattn
import numpy as np
import pytest
from conftest import needs, python

jax = pytest.importorskip("jax")

from jax.test_util import check_grads  # noqa: E402
from jax_calls import assert_same, cotangents, plain, qkv, rng_arrays, traced  # noqa: E402

INT = np.int32


def case_of(name):
    """(arrays, options) of attention, each with another feature, and some with several."""
    if name == "bshd":
        return qkv(layout="bshd"), {"layout": "bshd", "causal": "top-left", "scale": 0.0}
    arrays, options = qkv(), {}
    more = rng_arrays(7, mask=(2, 1, 9, 13), sink=(4,), alibi_slopes=(2, 4))
    if name == "plain":
        options = {"scale": -0.3, "batch_invariant": True}
    elif name == "window":
        options = {"causal": True, "window": (3, None), "q_offset": -2}
    elif name == "lengths":
        arrays |= {"q_lengths": np.array([9, 4], INT), "k_lengths": np.array([5, 0], INT)}
        arrays |= {"k_start": np.array([2, 0], INT), "q_offset": np.array([-1, 3], INT)}
        options = {"window": (2, 4), "deterministic": True}
    elif name == "bool mask":
        arrays["mask"] = more["mask"] > -0.3
        arrays["mask"][0, 0, 3] = False  # a row that sees nothing
    elif name == "scores":
        arrays |= {"sink": more["sink"], "alibi_slopes": more["alibi_slopes"]}
        options = {"softcap": 2.5}
    elif name == "dropout":
        options = {"dropout_p": 0.3, "seed": -(2**40)}
    return arrays, options


NAMES = ("plain", "bshd", "window", "lengths", "bool mask", "scores", "dropout")


@pytest.mark.parametrize("name", NAMES)
def test_jit_and_grad(name):
    arrays, options = case_of(name)
    out, lse, _ = plain(fastattn.attention, arrays, options)
    given = cotangents(out, lse)
    want = plain(fastattn.attention, arrays, options, *given)
    assert_same(traced(fastattn.attention, arrays, options, *given), want)


@pytest.mark.parametrize("shape", [(1,), (9, 1), (4, 1, 13), (2, 1, 9, 1), (1, 1, 1, 13)])
def test_the_gradient_of_a_bias_of_any_broadcast(shape):
    arrays = qkv() | rng_arrays(7, mask=shape)
    out, lse, _ = plain(fastattn.attention, arrays, {})
    given = cotangents(out, lse)
    want = plain(fastattn.attention, arrays, {}, *given)
    assert want[2]["mask"].shape == shape
    assert_same(traced(fastattn.attention, arrays, {}, *given), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(dtype):
    import ml_dtypes

    cast = getattr(ml_dtypes, dtype, None) or dtype
    arrays = {name: x.astype(cast) for name, x in qkv().items()}
    out, lse, _ = plain(fastattn.attention, arrays, {})
    given = cotangents(out, lse)
    want = plain(fastattn.attention, arrays, {}, *given)
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable_x64(dtype == "float64"):
        assert_same(traced(fastattn.attention, arrays, {}, *given), want)


def packed(tail=0):
    arrays = rng_arrays(3, q=(11 + tail, 4, 8), k=(17, 2, 8), v=(17, 2, 6), sink=(4,))
    arrays["cu_seqlens_q"] = np.array([0, 4, 4, 11], INT)
    arrays["cu_seqlens_k"] = np.array([0, 5, 6, 17], INT)
    return arrays, {"max_seqlen_q": 7, "max_seqlen_k": 11}


@pytest.mark.parametrize("more", ["", "seqused", "bias"])
def test_packed_sequences(more):
    arrays, options = packed(tail=2)
    if more == "seqused":
        arrays |= {"seqused_q": np.array([3, 0, 7], INT), "seqused_k": np.array([5, 1, 2], INT)}
        options["causal"] = True
    if more == "bias":
        arrays |= rng_arrays(4, mask=(3, 1, 7, 11))
    out, lse, _ = plain(fastattn.attention_varlen, arrays, options)
    given = cotangents(out, lse)
    want = plain(fastattn.attention_varlen, arrays, options, *given)
    assert_same(traced(fastattn.attention_varlen, arrays, options, *given), want)


@pytest.mark.parametrize("seed", [np.int32(-5), np.uint32(2**32 - 5), np.array([3], INT)])
def test_a_traced_seed(seed):
    """Of 32 bits, for most programs of JAX have no int64."""
    arrays, options = qkv(), {"dropout_p": 0.4}
    want = fastattn.attention(**arrays, **options, seed=int(seed.item()))
    got = jax.jit(lambda seed: fastattn.attention(**arrays, **options, seed=seed))(seed)
    assert_same(got, want)


def test_checkpoint_and_scan():
    arrays, _ = case_of("plain")

    def loss(q, wrap):
        step = wrap(lambda q, _: (fastattn.attention(q, q, q, causal=True), None))
        return (jax.lax.scan(step, q, length=3)[0] ** 2).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    want = grad(arrays["q"], lambda f: f)
    assert np.isfinite(want).all()
    assert_same(grad(arrays["q"], jax.checkpoint), want)


def test_only_what_is_asked_for_is_computed():
    arrays = qkv() | rng_arrays(7, mask=(2, 4, 9, 13), sink=(4,))

    def loss(moving):
        return fastattn.attention(**(arrays | moving)).sum()

    program = jax.jit(jax.grad(loss)).lower({"k": arrays["k"]}).as_text()
    assert 'results = "dk"' in program and 'results = "out lse"' in program
    assert 'results = "out"' in jax.jit(loss).lower({"k": arrays["k"]}).as_text()


def test_backward_and_merging_are_traced_too():
    arrays = qkv()
    out, lse, _ = plain(fastattn.attention, arrays, {})
    dout, _ = cotangents(out, lse)
    call = {"dout": dout, "out": out, "lse": lse, **arrays, "need_dv": False}
    assert_same(
        jax.jit(lambda dout: fastattn.attention_backward(**(call | {"dout": dout})))(dout),
        fastattn.attention_backward(**call),
    )
    parts = [(out, lse), (dout, lse / 2), (2 * out, np.full_like(lse, -np.inf))]
    outs, lses = (list(x) for x in zip(*parts, strict=True))
    want = fastattn.merge_states(outs, lses)
    assert_same(jax.jit(fastattn.merge_states)(outs, lses), want)
    check_grads(jax.jit(fastattn.merge_states), (outs[:2], lses[:2]), 1, eps=1e-2, atol=0.02)


def test_what_has_no_derivative_says_so():
    arrays, options = case_of("scores")
    slopes = arrays.pop("alibi_slopes")
    q = arrays.pop("q")

    def out(q, slopes):
        return fastattn.attention(q, **arrays, **options, alibi_slopes=slopes).sum()

    forward_mode = r"^forward-mode derivatives \(jvp, jacfwd, hessian\)"
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(NotImplementedError, match=forward_mode):
            wrap(lambda: jax.jvp(lambda q: out(q, slopes), (q,), (q,)))()
        with pytest.raises(NotImplementedError, match=r"^second derivatives of attention"):
            wrap(jax.grad(lambda q: jax.grad(out)(q, slopes).sum()))(q)
        with pytest.raises(NotImplementedError, match=r"^`alibi_slopes` has a tangent, and its"):
            wrap(jax.grad(out, 1))(q, slopes)


def test_sentences():
    """What tracing can see is said while JAX traces, by the sentences of every other call."""
    arrays = qkv()
    q, k, v = arrays.values()
    call = jax.jit(lambda q, **more: fastattn.attention(q, k, v, **more))
    with pytest.raises(ValueError, match=r"^`k` must have d = 7 like `q`, got 8"):
        call(q[..., :7])
    with pytest.raises(TypeError, match=r"^`k` must be float16 like `q`, got float32"):
        call(q.astype(np.float16))
    with pytest.raises(TypeError, match=r"^`k_lengths` must be int32, got float32"):
        call(q, k_lengths=np.ones(2, np.float32))
    with pytest.raises(TypeError, match=r"^`out` must be None: JAX arrays are never written"):
        jax.jit(lambda q: fastattn.attention(q, k, v, out=q))(q)
    with pytest.raises(Exception, match=r"`k_lengths` must be at most the 13 keys of sequence 1"):
        jax.block_until_ready(call(q, k_lengths=np.array([13, 14], INT)))  # seen by XLA alone
    with pytest.raises(ValueError, match=r"^`seed` must be an int or a one-element array where"):
        jax.jit(lambda q: fastattn.attention(q, k, v, dropout_p=0.5))(q)


SHAPES = [  # of query, key and value
    [(5, 8), (7, 8), (7, 6)],
    [(3, 5, 8), (3, 7, 8), (3, 7, 6)],
    [(2, 1, 4, 5, 8), (3, 1, 7, 8), (2, 3, 4, 7, 6)],
]


@pytest.mark.parametrize("shapes", SHAPES, ids=["2d", "3d", "broadcast"])
def test_the_drop_in(shapes):
    q, k, v = rng_arrays(2, **dict(zip("qkv", shapes, strict=True))).values()
    mask = rng_arrays(3, mask=(5, 7))["mask"]
    sdpa = fastattn.scaled_dot_product_attention
    for more in ({"is_causal": True, "scale": 0.7}, {"attn_mask": mask > 0}, {"attn_mask": mask}):
        assert_same(jax.jit(lambda q, more=more: sdpa(q, k, v, **more))(q), sdpa(q, k, v, **more))
    q = np.zeros((2, 6, 5, 8), np.float32)
    k, v = (np.ones((2, heads, 7, 8), np.float32) for heads in (2, 3))
    assert_same(
        jax.jit(lambda q: sdpa(q, k, v, enable_gqa=True))(q), sdpa(q, k, v, enable_gqa=True)
    )
    with pytest.raises(ValueError, match=r"^`key` must have d = 8 like `query`, got 3"):
        jax.jit(lambda q: sdpa(q, k[..., :3], v))(q)


def test_explain():
    arrays = qkv()
    found = []

    def look(q):
        arrays["q"] = q
        found.append(fastattn.explain(fastattn.attention, **arrays, causal=True))
        return q

    jax.jit(look)(arrays["q"])
    assert found[0] == fastattn.explain(fastattn.attention, *qkv().values(), causal=True)


@needs("torch")
def test_arrays_of_two_frameworks():
    import torch

    q, k, v = qkv().values()
    with pytest.raises(TypeError, match=r"another framework|must be on"):
        jax.jit(lambda q: fastattn.attention(q, torch.from_numpy(k).requires_grad_(), v))(q)


def test_without_jax_and_with_an_old_one(tmp_path):
    stub = tmp_path / "jax.py"
    stub.write_text("raise ModuleNotFoundError('no JAX', name='jax')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport fastattn\n"
        "try: import fastattn.jax\nexcept ImportError as error: print(error)"
    )
    say = "fastattn.jax needs JAX 0.6 or newer{}: pip install {}'jax>=0.6'"
    assert python("-c", code).strip() == say.format("", "")
    stub.write_text("__version__ = '0.5.3'\n__version_info__ = (0, 5, 3)\n")
    assert python("-c", code).strip() == say.format(", found 0.5.3", "-U ")
