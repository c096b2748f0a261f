"""attention_sparse in JAX's programs: jit, grad, vmap."""

import fastattn
import numpy as np
import pytest

jax = pytest.importorskip("jax")
jnp = jax.numpy

OPTIONS = {"k_block": 16, "causal": True, "window_union": (3, 0)}


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((1, 4, 20, 8), (1, 2, 40, 8), (1, 2, 40, 6))
    given = [rng.standard_normal(x).astype(np.float32) for x in shapes]
    given.append(rng.uniform(0, 1, (1, 2, 20, 3)).astype(np.float32))
    given.append(rng.standard_normal(4).astype(np.float32))
    return given, rng.integers(-1, 3, (1, 2, 20, 3)).astype(np.int32)


def call(lists, *given):
    q, k, v, gate, sink = given
    return fastattn.attention_sparse(
        q, k, v, lists, gate=gate, sink=sink, return_lse=True, return_mass=True, **OPTIONS
    )


def test_jit_gives_what_numpy_does():
    given, lists = arrays()
    for x, y in zip(jax.jit(call)(lists, *given), call(lists, *given), strict=True):
        assert isinstance(x, jax.Array)
        np.testing.assert_array_equal(x, y)


def test_outside_of_jit():
    given, lists = arrays()
    found = call(jnp.asarray(lists), *map(jnp.asarray, given))
    for x, y in zip(found, call(lists, *given), strict=True):
        assert isinstance(x, jax.Array)
        np.testing.assert_array_equal(x, y)


def loss(lists, *given):
    out, lse, mass = call(lists, *given)
    return (out**2).sum() + lse.sum() + mass.sum()


def test_gradients():
    given, lists = arrays()
    found = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4, 5)))(lists, *given)
    q, k, v, gate, sink = given
    out, lse, _ = call(lists, *given)
    want = fastattn.attention_sparse_backward(
        *(2 * out, q, k, v, out, lse, lists),
        dlse=np.ones_like(lse),
        gate=gate,
        sink=sink,
        need_dgate=True,
        need_dsink=True,
        **OPTIONS,
    )
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    alone = jax.grad(lambda q: fastattn.attention_sparse(q, k, v, lists, **OPTIONS).sum())(q)
    assert alone.shape == q.shape and np.abs(alone).max() > 0


def test_vmap():
    given, lists = arrays()
    q, *rest = given
    several = jnp.stack([q, 2 * q, 3 * q])
    mapped = jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0, *[None] * 4))
    for n, x in enumerate(mapped(lists, several, *rest)):
        want = jax.grad(loss, argnums=1)(lists, several[n], *rest)
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)


def test_packed():
    rng, cu = np.random.default_rng(1), np.array([0, 20, 50], np.int32)
    x = rng.standard_normal((50, 2, 8)).astype(np.float32)
    lists = rng.integers(-1, 3, (2, 2, 2)).astype(np.int32)

    def packed(x, lists, cu):
        given = {"q_block": 64, "k_block": 16, "causal": True}
        return fastattn.attention_sparse_varlen(x, x, x, lists, cu, cu, 30, 30, **given)

    np.testing.assert_array_equal(jax.jit(packed)(x, lists, cu), packed(x, lists, cu))


def test_refusals():
    given, lists = arrays()
    q, k, v = given[:3]
    with pytest.raises(NotImplementedError, match="`validate` must be False"):
        jax.jit(lambda q: fastattn.attention_sparse(q, k, v, lists, validate=True))(q)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        function = jax.grad(lambda q: fastattn.attention_sparse(q, k, v, lists, **OPTIONS).sum())
        jax.grad(lambda q: function(q).sum())(q)
    with pytest.raises(ValueError, match="`q_block` must be 1, 64 or 128, got 3"):
        jax.jit(lambda q: fastattn.attention_sparse(q, k, v, lists, q_block=3))(q)
