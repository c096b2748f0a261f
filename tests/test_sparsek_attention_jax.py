"""sparsek_attention in JAX's programs: jit, grad, vmap."""

import fastattn
import numpy as np
import pytest

jax = pytest.importorskip("jax")
jnp = jax.numpy

OPTIONS = {"k_keep": 3.5, "window": 2}


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((1, 4, 20, 8), (1, 2, 30, 8), (1, 2, 30, 6), (1, 2, 30), (4,))
    return [rng.standard_normal(x).astype(np.float32) for x in shapes]


def call(q, k, v, scores, sink):
    return fastattn.sparsek_attention(
        q, k, v, scores, sink=sink, return_lse=True, return_selection=True, **OPTIONS
    )


def loss(*given):
    out, lse, *_ = call(*given)
    return (out**2).sum() + lse.sum()


def test_what_numpy_gives():
    given = arrays()
    for function in (jax.jit(call), call):
        found = function(*map(jnp.asarray, given))
        for x, y in zip(found, call(*given), strict=True):
            assert isinstance(x, jax.Array)
            np.testing.assert_array_equal(x, y)


def test_gradients():
    given = arrays()
    found = jax.jit(jax.grad(loss, argnums=tuple(range(5))))(*given)
    results, (*rest, sink) = call(*given), given
    want = fastattn.sparsek_attention_backward(
        *(2 * results[0], *rest, OPTIONS["k_keep"], *results),
        **{"window": OPTIONS["window"], "sink": sink, "dlse": np.ones_like(results[1])},
        need_dsink=True,
    )
    for x, y in zip(found, want, strict=True):
        np.testing.assert_array_equal(x, y)
    arguments = [jnp.asarray(x) for x in (2 * results[0], *rest, *results)]
    again = fastattn.sparsek_attention_backward(
        *(*arguments[:5], OPTIONS["k_keep"], *arguments[5:]), window=OPTIONS["window"]
    )
    assert again[4] is None and isinstance(again[3], jax.Array)


def test_vmap():
    q, *rest = arrays()
    several = jnp.stack([q, 2 * q, 3 * q])
    mapped = jax.vmap(jax.grad(loss), in_axes=(0, *[None] * 4))(several, *rest)
    for n, x in enumerate(mapped):
        np.testing.assert_array_equal(x, jax.grad(loss)(several[n], *rest))


def test_packed():
    rng, cu = np.random.default_rng(1), np.array([0, 20, 50], np.int32)
    x, scores = (rng.standard_normal(s).astype(np.float32) for s in ((50, 2, 8), (2, 50)))

    def packed(x, scores, cu):
        return fastattn.sparsek_attention_varlen(x, x, x, scores, 4, cu, cu, 30, 30, window=3)

    np.testing.assert_array_equal(jax.jit(packed)(x, scores, cu), packed(x, scores, cu))
    found = jax.grad(lambda s: (packed(x, s, cu) ** 2).sum())(jnp.asarray(scores))
    assert found.shape == scores.shape and np.abs(found).max() > 0


def test_refusals():
    q, k, v, scores, _ = arrays()
    with pytest.raises(ValueError, match="`window` must be at least 0, got -3"):
        jax.jit(lambda q: fastattn.sparsek_attention(q, k, v, scores, 3, window=-3))(q)
    with pytest.raises(TypeError, match="JAX arrays are never written"):
        fastattn.sparsek_attention(
            *map(jnp.asarray, (q, k, v, scores)), 3, window=3, out=jnp.zeros((1, 4, 20, 6))
        )
    with pytest.raises(NotImplementedError, match="second derivatives of sparsek_attention"):
        function = jax.grad(lambda q: fastattn.sparsek_attention(q, k, v, scores, **OPTIONS).sum())
        jax.grad(lambda q: function(q).sum())(q)
