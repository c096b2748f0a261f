"""vmap of attention over any of its arrays is a loop over the calls, and so are its gradients."""

import fastattn
import numpy as np
import pytest

jax = pytest.importorskip("jax")

from jax_calls import assert_same, qkv, rng_arrays  # noqa: E402

N = 3
INT = np.int32


def example(b):
    """Every array that a call may have, each twice as often as there are calls."""
    arrays = qkv(b=b) | rng_arrays(5, mask=(b, 4, 9, 13), sink=(4,), alibi_slopes=(4,))
    arrays |= {"q_lengths": np.full(b, 8, INT), "k_lengths": np.full(b, 12, INT)}
    return arrays | {"q_offset": np.arange(b, dtype=INT)}


def stacked(arrays, mapped):
    def more(name, x):
        if x.dtype == INT:
            return np.stack([np.maximum(x - n, 0) for n in range(N)])
        return np.stack([x * (1 + n) for n in range(N)]).astype(x.dtype)

    return {name: more(name, x) if name in mapped else x for name, x in arrays.items()}


def pick(arrays, mapped, n):
    return {name: x[n] if name in mapped else x for name, x in arrays.items()}


def value_and_gradient(options, moving):
    def loss(moved, arrays):
        out, lse = fastattn.attention(**(arrays | moved), **options, return_lse=True)
        return (out.astype(np.float32) ** 2).sum() + np.float32(0.1) * jax.numpy.where(
            jax.numpy.isinf(lse), 0, lse
        ).sum()

    def both(arrays):
        moved = {name: arrays[name] for name in moving}
        return jax.value_and_grad(loss)(moved, arrays)

    return both


FOLDED = [("q",), ("k", "v"), ("q", "k", "v", "mask"), ("alibi_slopes", "q_lengths"), ("q_offset",)]


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("mapped", [*FOLDED, ("sink",), ("mask", "k_lengths")], ids="-".join)
def test_each_array_mapped_or_not(b, mapped):
    arrays = stacked(example(b), mapped)
    both = value_and_gradient({}, ("q", "k", "mask", "sink"))
    axes = ({name: 0 if name in mapped else None for name in arrays},)
    value, gradient = jax.jit(jax.vmap(both, in_axes=axes))(arrays)
    one = jax.jit(both)
    for n in range(N):
        want_value, want = one(pick(arrays, mapped, n))
        np.testing.assert_allclose(value[n], want_value, rtol=2e-5)
        assert_same({name: x[n] for name, x in gradient.items()}, want)


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("mapped", [("q",), ("q", "k", "mask")], ids="-".join)
def test_the_gradient_of_what_is_mapped_by_what_is_not(b, mapped):
    """grad of vmap: what is the same for all has the sum as its gradient."""
    arrays = stacked(example(b), mapped)
    loss = value_and_gradient({}, ())
    axes = ({name: 0 if name in mapped else None for name in arrays},)
    moving = {name: arrays[name] for name in ("q", "k", "v", "mask", "sink")}

    def total(moved):
        return jax.vmap(lambda x: loss(x)[0], in_axes=axes)(arrays | moved).sum()

    gradient = jax.jit(jax.grad(total))(moving)
    one = jax.jit(value_and_gradient({}, tuple(moving)))
    each = [one(pick(arrays, mapped, n))[1] for n in range(N)]
    for name in moving:
        parts = np.stack([x[name] for x in each])
        want = parts if name in mapped else parts.sum(0)
        np.testing.assert_allclose(gradient[name], want, rtol=1e-4, atol=1e-4)


def test_dropout_drops_in_each_as_alone():
    arrays = qkv(b=1)
    q = np.stack([arrays.pop("q")] * N)
    seeds = np.arange(N, dtype=INT)

    def call(q, seed):
        return fastattn.attention(q, **arrays, dropout_p=0.4, seed=seed)

    want = np.stack([jax.jit(call)(x, seed) for x, seed in zip(q, seeds, strict=True)])
    assert not np.array_equal(want[0], want[1])
    assert_same(jax.jit(jax.vmap(call))(q, seeds), want)
    same = jax.jit(jax.vmap(call, in_axes=(0, None)))(q, seeds[1])
    assert_same(same, np.stack([want[1]] * N))
    nested = jax.vmap(jax.vmap(call, in_axes=(0, None)), in_axes=(None, 0))
    assert_same(jax.jit(nested)(q, seeds), np.stack([np.stack([x] * N) for x in want]))


def test_packed_sequences():
    arrays = rng_arrays(3, q=(N, 7, 4, 8), k=(9, 2, 8), v=(N, 9, 2, 6))
    ends = np.array([[0, 3, 7], [0, 7, 7], [0, 1, 2]], INT)
    call = lambda q, v, ends: fastattn.attention_varlen(  # noqa: E731
        q, arrays["k"], v, ends, np.array([0, 4, 9], INT), 7, 9
    )
    want = np.stack([jax.jit(call)(arrays["q"][n], arrays["v"][n], ends[n]) for n in range(N)])
    assert_same(jax.jit(jax.vmap(call))(arrays["q"], arrays["v"], ends), want)


def test_one_call_where_the_batch_can_take_it():
    """No loop over a program, and no copy of what is not mapped."""
    arrays = qkv(b=1)
    q = np.stack([arrays.pop("q")] * N)
    call = jax.jit(jax.vmap(lambda q: fastattn.attention(q, **arrays, causal=True)))
    program = call.lower(q).as_text()
    assert program.count("@fastattn_forward") == 1 and "runs" not in program
    assert "(tensor<3x4x9x8xf32>, tensor<1x2x13x8xf32>, tensor<1x2x13x6xf32>)" in program


def test_merging():
    outs = [rng_arrays(n, x=(N, 2, 4, 5, 6))["x"] for n in (0, 1)]
    lses = [rng_arrays(n, x=(N, 2, 4, 5))["x"] for n in (2, 3)]
    want = [fastattn.merge_states([o[n] for o in outs], [x[n] for x in lses]) for n in range(N)]
    got = jax.jit(jax.vmap(lambda o, x: fastattn.merge_states(o, x)))(outs, lses)
    assert_same(got, tuple(np.stack(x) for x in zip(*want, strict=True)))
