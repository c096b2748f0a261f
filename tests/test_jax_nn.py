"""dot_product_attention beside jax.nn's, over the grid of jax.nn's tests: forward and gradients.

Rows that see no key are left out of the comparison and are 0 here: jax.nn gives the mean of all
values.
"""

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from fastattn.jax import attention, dot_product_attention  # noqa: E402
from jax_calls import assert_same, rng_arrays  # noqa: E402

jnp = jax.numpy
B, T, S, N, H = 2, 12, 10, 4, 8
LENGTHS = {
    "query_seq_lengths": np.array([12, 7], np.int32),
    "key_value_seq_lengths": np.array([10, 4], np.int32),
}
GRID = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.2},
    "window": {"local_window_size": (3, 2)},
    "one window": {"local_window_size": 2},
    "causal window": {"is_causal": True, "local_window_size": (4, 3)},
    "lengths": LENGTHS,
    "causal lengths": {"is_causal": True, **LENGTHS},
    "bias": {"bias": (B, N, T, S)},
    "bias of all": {"bias": (1, 1, T, S)},
    "bias of heads": {"bias": (1, N, 1, S), "is_causal": True},
    "bias of 3": {"bias": (N, T, S)},
    "mask": {"mask": (B, 1, T, S)},
    "mask and lengths": {"mask": (1, N, T, 1), "local_window_size": (20, 0), **LENGTHS},
    "mask and bias": {"mask": (B, 1, 1, S), "bias": (1, N, T, S)},
}


def case(name, groups=1):
    """(arrays that are followed, mask, options)"""
    shapes = {"query": (B, T, N, H), "key": (B, S, N // groups, H), "value": (B, S, N // groups, H)}
    options = dict(GRID[name])
    if "bias" in options:
        shapes["bias"] = options.pop("bias")
    arrays = rng_arrays(11, **shapes)
    mask = None
    if "mask" in options:
        mask = np.random.default_rng(5).random(options.pop("mask")) < 0.7
    return arrays, mask, options


def seen(mask, options):
    """(B, N, T): whether the row sees a key."""
    i, j = np.arange(T)[:, None], np.arange(S)
    visible = np.ones((B, N, T, S), bool) if mask is None else np.broadcast_to(mask, (B, N, T, S))
    if options.get("is_causal"):
        visible = visible & (j <= i)
    window = options.get("local_window_size")
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        visible = visible & (j >= i - left) & (j <= i + right)
    rows, keys = (options.get(name) for name in LENGTHS)
    if rows is not None:
        visible = visible & (i < rows[:, None, None, None]) & (j < keys[:, None, None, None])
    return visible.any(3).swapaxes(1, 2)[..., None]  # (B, T, N, 1)


def both(function, arrays, mask, options, dout):
    def loss(arrays):
        out = function(**arrays, mask=mask, **options)
        return (out.astype(jnp.float32) * dout).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"out": out, **gradients}


GROUPED = [("plain", 4), ("causal lengths", 2), ("bias", 4), ("mask", 2)]


@pytest.mark.parametrize(("name", "groups"), [*((name, 1) for name in GRID), *GROUPED])
def test_the_grid(name, groups):
    arrays, mask, options = case(name, groups)
    rows = seen(mask, options)
    dout = rng_arrays(12, dout=(B, T, N, H))["dout"] * rows
    got = both(dot_product_attention, arrays, mask, options, dout)
    if mask is None and "local_window_size" in options:
        mask = np.ones((1, 1, 1, 1), bool)  # JAX 0.6 forgets a window that comes alone
    want = both(jax.nn.dot_product_attention, arrays, mask, options, dout)
    assert not np.asarray(got["out"])[~np.broadcast_to(rows, got["out"].shape)].any()
    want["out"] = want["out"] * rows
    for key, x in want.items():
        np.testing.assert_allclose(got[key], x, rtol=1e-4, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    arrays, mask, options = case("mask and bias", 2)
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    dout = rng_arrays(12, dout=(B, T, N, H))["dout"] * seen(mask, options)
    got = both(dot_product_attention, arrays, mask, options, dout)
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    want = both(jax.nn.dot_product_attention, wide, mask, options, dout)
    eps = float(jnp.finfo(dtype).eps)
    for key, x in want.items():
        assert got[key].dtype == dtype
        x, y = (np.asarray(z, np.float32) for z in (got[key], x))
        assert np.abs(x - y).max() <= 3 * eps * max(1, np.abs(y).max()), key


def test_float64_is_exact_where_jax_nn_is_not():
    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    arrays, _, _ = case("bias")
    arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    q, k, v, bias = arrays.values()
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H) + bias
    weights = np.exp(scores - scores.max(3, keepdims=True))
    want = np.einsum("bnts,bsnh->btnh", weights / weights.sum(3, keepdims=True), v)
    with enable_x64(True):
        got = jax.jit(dot_product_attention)(q, k, v, bias)
    assert got.dtype == np.float64 and np.abs(got - want).max() < 1e-14 * np.abs(v).max() * 10


def test_residual_single_sequences_and_vmap():
    arrays, _, _ = case("plain", 2)
    out, residual = jax.jit(lambda x: dot_product_attention(**x, return_residual=True))(arrays)
    q, k, v = (x.swapaxes(1, 2) for x in arrays.values())
    want = attention(q, k, v, return_lse=True)
    assert_same((out, residual), tuple(x.swapaxes(1, 2) for x in want))
    single = jax.vmap(lambda x: dot_product_attention(**x, return_residual=True))
    assert_same(jax.jit(single)(arrays), (out, residual))

    def of_residual(x):
        return dot_product_attention(**x, return_residual=True)[1].sum()

    assert not any(np.asarray(x).any() for x in jax.jit(jax.grad(of_residual))(arrays).values())


def test_what_nobody_asked_for_is_not_computed():
    """A kernel that must give lse too may be another, slower one."""
    arrays, _, _ = case("plain", 2)
    for wanted, results in ((False, "out"), (True, "out lse")):
        call = functools.partial(dot_product_attention, return_residual=wanted)
        assert f'results = "{results}"' in jax.jit(call).lower(*arrays.values()).as_text()


def test_its_arguments_are_jax_nns():
    import inspect

    with pytest.raises(ValueError, match=r"^`implementation` must be None, 'xla' or 'cudnn', got"):
        dot_product_attention(*case("plain")[0].values(), implementation="flash")
    ours = inspect.signature(dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert [n for n in ours if n in theirs] == list(theirs)
    assert {n: (p.default, p.kind) for n, p in theirs.items()} == {
        n: (ours[n].default, ours[n].kind) for n in theirs
    }


def test_flax():
    """As the attention_fn= of flax's layers."""
    linen = pytest.importorskip("flax.linen")
    x = rng_arrays(3, x=(2, 6, 16))["x"]
    mask = linen.make_causal_mask(np.ones((2, 6)))

    def of_flax(query, key, value, bias=None, mask=None, **_):
        mask = None if mask is None else mask.astype(bool)
        return dot_product_attention(query, key, value, bias, mask)

    results = []
    for attention_fn in (linen.dot_product_attention, of_flax):
        layer = linen.MultiHeadDotProductAttention(
            num_heads=4, attention_fn=attention_fn, deterministic=True
        )
        parameters = layer.init(jax.random.key(0), x, x)

        def loss(parameters, layer=layer):
            return (layer.apply(parameters, x, x, mask=mask) ** 2).sum()

        results.append(jax.jit(jax.value_and_grad(loss))(parameters))
    got, want = (jax.tree.leaves(x) for x in results)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
