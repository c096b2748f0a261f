"""sparsek and sparsek_lists in JAX: jit, grad, vmap; the numbers are NumPy's and torch's."""

import fastattn
import numpy as np
import pytest

jax = pytest.importorskip("jax")
jnp = jax.numpy

N = np.array([11, 4, 8], np.int32)
B = np.array([1, 5], np.int32)
CALLS = {
    "sparsek": lambda z: fastattn.sparsek(z, 2.5),
    "lengths": lambda z: fastattn.sparsek(z, 0.0 + 2, lengths=N),
    "zero": lambda z: fastattn.sparsek(z, 0),
    "lists": lambda z: fastattn.sparsek_lists(z, 3, sq=11),
    "offset": lambda z: fastattn.sparsek_lists(z, 2.5, sq=4, q_offset=3, window=2),
    "arrays": lambda z: fastattn.sparsek_lists(
        z, 2.5, sq=11, q_offset=B, q_lengths=B, k_lengths=B + 3, k_start=B - 1
    ),
}


def scores(*lead, dtype="float32"):
    return np.random.default_rng(2).standard_normal((*lead, 2, 3, 11)).astype(dtype)


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        assert isinstance(x, jax.Array)
        np.testing.assert_array_equal(np.asarray(x), y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_jit_gives_numpys_bits(name, dtype):
    z = scores(dtype=dtype)
    want = CALLS[name](z)
    assert_same(CALLS[name](jnp.asarray(z)), want)
    assert_same(jax.jit(CALLS[name])(z), want)


def loss(name, xp):
    """Of the gates, whose place depends on whether there are lists."""
    return lambda z: xp.sin(CALLS[name](z)[-2]).sum()


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    torch = pytest.importorskip("torch")  # its scores are beside lengths of NumPy
    z = scores()
    leaf = torch.tensor(z, requires_grad=True)
    (want,) = torch.autograd.grad(loss(name, torch)(leaf), leaf)
    for grad in (jax.grad(loss(name, jnp)), jax.jit(jax.grad(loss(name, jnp)))):
        np.testing.assert_allclose(grad(jnp.asarray(z)), want, atol=1e-6)
    many = jnp.asarray(scores(4))
    each = jnp.stack([jax.grad(loss(name, jnp))(x) for x in many])
    np.testing.assert_array_equal(jax.vmap(jax.grad(loss(name, jnp)))(many), each)


def test_lengths_that_are_mapped():
    z, starts = jnp.asarray(scores(3)), jnp.arange(6, dtype=jnp.int32).reshape(3, 2)

    def call(z, start):
        return fastattn.sparsek_lists(z, 3, sq=5, k_start=start)

    want = [np.stack(x) for x in zip(*map(call, z, starts), strict=True)]
    assert_same(jax.jit(jax.vmap(call))(z, starts), want)
    one = [np.stack(x) for x in zip(*(call(z[0], s) for s in starts), strict=True)]
    assert_same(jax.vmap(call, (None, 0))(z[0], starts), one)


def test_what_is_wrong_is_said_while_tracing():
    z = jnp.asarray(scores())
    wrong = [
        (lambda z: fastattn.sparsek_lists(z, 2, sq=-3), ValueError, "`sq` must be from 0"),
        (lambda z: fastattn.sparsek_lists(z[0], 2, sq=3), ValueError, "`scores` must have 3"),
        (lambda z: fastattn.sparsek(z.astype(int), 2), TypeError, "`scores` must be float64"),
        (lambda z: fastattn.sparsek(z, z[0, 0, 0]), TypeError, "`k` must be a float"),
        (lambda z: fastattn.sparsek(z, 2, lengths=N[:2]), ValueError, "`lengths` must broadcast"),
    ]
    for call, exception, sentence in wrong:
        with pytest.raises(exception, match=sentence):
            jax.jit(call)(z)
    with pytest.raises(ValueError, match="`lengths` must be from 0 to m = 11, got 12"):
        fastattn.sparsek(z, 2, lengths=jnp.asarray(N + 1))
    with pytest.raises(NotImplementedError, match="second derivatives of sparsek"):
        jax.grad(lambda z: jax.grad(loss("sparsek", jnp))(z).sum())(z)
