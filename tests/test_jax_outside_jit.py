"""JAX's calls at the edges: with jit disabled, of no runs, of many parts, of unknown shapes."""

import functools

import fastattn
import numpy as np
import pytest

jax = pytest.importorskip("jax")

from fastattn.jax import dot_product_attention  # noqa: E402
from jax_calls import assert_same, qkv  # noqa: E402

jnp = jax.numpy


def loss(q, k, v):
    return (fastattn.attention(q, k, v, causal=True) ** 2).sum()


@pytest.mark.parametrize("wrap", [jax.grad, lambda f: jax.vmap(jax.grad(f))], ids=["grad", "vmap"])
def test_where_jit_is_disabled(wrap):
    """Operations are compiled all the same, as JAX's own are."""
    arrays = [jnp.asarray(x) for x in qkv().values()]
    if wrap is not jax.grad:
        arrays = [jnp.stack([x, 2 * x]) for x in arrays]
    want = jax.jit(wrap(loss))(*arrays)
    with jax.disable_jit():
        assert_same(jax.jit(wrap(loss))(*arrays), want)
    with jax.debug_nans(True):
        assert_same(jax.jit(wrap(loss))(*arrays), want)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("mapped", ["q", "k", "qkv"])
def test_vmap_over_nothing(mapped, twice):
    arrays = qkv()
    axes = tuple(0 if name in mapped else None for name in "qkv")
    given = [np.zeros((0, *x.shape), x.dtype) if n in mapped else x for n, x in arrays.items()]
    call = jax.vmap(jax.grad(loss, (0, 1, 2)), axes)
    lead = (0,)
    if twice:
        call, lead = jax.vmap(call, axes), (3, 0)
        given = [
            np.zeros((3, *x.shape), x.dtype) if n in mapped else x
            for n, x in zip("qkv", given, strict=True)
        ]
    for run in (call, jax.jit(call)):
        got = run(*given)
        assert [x.shape for x in got] == [(*lead, *x.shape) for x in arrays.values()]


def test_merging_hundreds_of_parts():
    parts = [np.full((1, 2, 3, 4), n, np.float32) for n in range(700)]
    out, lse = jax.jit(fastattn.merge_states)(parts, [np.zeros((1, 2, 3), np.float32)] * 700)
    np.testing.assert_allclose(out, 349.5, rtol=1e-5)
    np.testing.assert_allclose(lse, np.log(700), rtol=1e-5)


def test_shapes_that_are_not_known():
    export = pytest.importorskip("jax.export")  # that of JAX 0.6 needs absl
    symbol = export.symbolic_shape("b")[0]
    shapes = [jax.ShapeDtypeStruct((symbol, *x.shape[1:]), x.dtype) for x in qkv().values()]
    with pytest.raises(NotImplementedError, match=r"^`q` must have a known shape, got \(b, "):
        export.export(jax.jit(fastattn.attention))(*shapes)


WRONG = {
    "query": lambda q: (q[0, 0],),
    "key": lambda q: (q, q[..., :3]),
    "value": lambda q: (q, q, q[:, 1:]),
    "is_causal": lambda q: (q, q, q, None, None, {"is_causal": "yes"}),
    "local_window_size": lambda q: (q, q, q, None, None, {"local_window_size": 2.5}),
    "query_seq_lengths": lambda q: (q, q, q, None, None, {"query_seq_lengths": np.ones(5, "i4")}),
    "key_value_seq_lengths": lambda q: (
        *(q, q, q, None, None),
        {"key_value_seq_lengths": np.ones(2, "f4")},
    ),
    "bias": lambda q: (q, q, q, np.ones((5, 1, 1, 1), "f4")),
    "mask": lambda q: (q, q, q, None, np.ones((9, 9), "f4")),
    "scale": lambda q: (q, q, q, None, None, {"scale": "large"}),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_the_drop_ins_errors_name_its_arguments(name, jit):
    given = list(WRONG[name](jnp.ones((2, 9, 4, 6))))
    options = given.pop() if isinstance(given[-1], dict) else {}
    given += given[:1] * (3 - len(given))
    call = functools.partial(dot_product_attention, **options)
    with pytest.raises((ValueError, TypeError), match=f"^`{name}` ") as caught:
        (jax.jit(call) if jit else call)(*given)
    assert not {"`q`", "`k`", "`v`", "`causal`", "`window`"} & set(str(caught.value).split())
