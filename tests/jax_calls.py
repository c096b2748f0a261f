"""Calls under JAX's transformations beside the plain call of the same NumPy arrays, which the other
tests judge: on the CPU both are the same code, so the same bits."""

import fastattn
import jax
import numpy as np

FOLLOWED = ("q", "k", "v", "mask", "sink")  # may have a gradient


def rng_arrays(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def qkv(b=2, hq=4, hk=2, sq=9, sk=13, d=8, dv=6, layout="bhsd", seed=0):
    shapes = {"q": (b, hq, sq, d), "k": (b, hk, sk, d), "v": (b, hk, sk, dv)}
    if layout == "bshd":
        shapes = {name: (s[0], s[2], s[1], s[3]) for name, s in shapes.items()}
    return rng_arrays(seed, **shapes)


def is_followed(name, x):
    return name in FOLLOWED and x.dtype.kind != "b"


def plain(function, arrays, options, dout=None, dlse=None):
    """out, lse and the gradients of the arrays that have one, by the NumPy arrays' own call."""
    name = function.__name__
    out, lse = function(**arrays, **options, return_lse=True)
    if dout is None and dlse is None:
        return out, lse, {}
    needs = {f"need_d{n}": n in arrays and is_followed(n, arrays[n]) for n in FOLLOWED}
    gradients = getattr(fastattn, name + "_backward")(
        dout, out=out, lse=lse, dlse=dlse, **needs, **arrays, **options
    )
    named = dict(zip(FOLLOWED, gradients, strict=True))
    return out, lse, {n: x for n, x in named.items() if x is not None}


def traced(function, arrays, options, dout, dlse, wrap=jax.jit):
    """The same, differentiated by JAX."""
    moving = {n: x for n, x in arrays.items() if is_followed(n, x)}
    fixed = {n: x for n, x in arrays.items() if n not in moving}

    def whole(moving, fixed, dout, dlse):
        def call(moving):
            return function(**moving, **fixed, **options, return_lse=True)

        (out, lse), pull = jax.vjp(call, moving)
        return out, lse, pull((dout, dlse))[0]

    return wrap(whole)(moving, fixed, dout, dlse)


def cotangents(out, lse, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in (out, lse))


def assert_same(got, want):
    """Bit for bit, of nested tuples and dicts."""
    got, want = (jax.tree.flatten(x) for x in (got, want))
    assert got[1] == want[1]
    for x, y in zip(got[0], want[0], strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
