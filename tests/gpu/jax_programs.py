"""Programs of JAX on a GPU, each in a process of its own: python jax_programs.py NAME.

A process, for JAX takes most of a GPU's memory where it is not told otherwise, and reads its flags
once. The calls of torch tensors, which the other tests judge, are the same kernels: the same bits.
"""

import ctypes
import sys

import fastattn
import jax
import numpy as np
import torch

jnp = jax.numpy


def inputs(seed=0, b=2, hq=8, hk=2, sq=200, sk=300, d=64, dv=64):
    shapes = (b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv)
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def to_torch(x):
    return torch.from_dlpack(jax.block_until_ready(x)) if isinstance(x, jax.Array) else x


def same(got, want):
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(to_torch(a), b), (a, b)


def by_torch(function, arrays, options):
    """The call of the same numbers as torch tensors."""
    given = {name: to_torch(x) for name, x in arrays.items()}
    out = function(**given, **options)
    torch.cuda.synchronize()
    return out


def features():
    """Each feature under jit, and outside of it."""
    q, k, v = inputs()
    base = {"q": q, "k": k, "v": v}
    lengths = {"q_lengths": [200, 3], "k_lengths": [250, 0], "k_start": [5, 0]}
    cases = [
        ({}, {"causal": True, "window": (50, None)}),
        ({name: jnp.array(x, jnp.int32) for name, x in lengths.items()}, {"causal": True}),
        ({"mask": jax.random.bernoulli(jax.random.key(1), 0.6, (2, 1, 200, 300))}, {}),
        ({"mask": jax.random.normal(jax.random.key(2), (8, 1, 300))}, {"softcap": 20.0}),
        ({"sink": jnp.arange(8.0) - 3, "alibi_slopes": jnp.arange(8.0) / 50}, {"scale": 0.2}),
        ({}, {"dropout_p": 0.2, "seed": -(2**40)}),
    ]
    for more, options in cases:
        arrays, options = base | more, {**options, "return_lse": True}
        want = by_torch(fastattn.attention, arrays, options)
        call = lambda arrays, options=options: fastattn.attention(**arrays, **options)  # noqa: E731
        same(jax.jit(call)(arrays), want)
        same(call(arrays), want)
    want = by_torch(fastattn.attention, base, {"dropout_p": 0.2, "seed": 7})
    call = jax.jit(lambda seed: fastattn.attention(q, k, v, dropout_p=0.2, seed=seed))
    same(call(np.uint32(7)), want)


def gradients():
    """Those of torch tensors; dk and dv have the same bits in every run, dq but for its order."""
    for d, options in ((64, {"causal": True}), (128, {"window": (70, 20)}), (33, {})):
        q, k, v = inputs(d=d, dv=d)

        def loss(q, k, v, options=options):
            out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
            return (out.astype(jnp.float32) ** 2).sum() + jnp.sin(lse).sum()

        tensors = [to_torch(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse = fastattn.attention(*tensors, return_lse=True, **options)
        want = torch.autograd.grad((out.float() ** 2).sum() + lse.sin().sum(), tensors)
        torch.cuda.synchronize()
        grad = jax.grad(loss, argnums=(0, 1, 2))
        for function in (grad, jax.jit(grad)):
            for x, y in zip(map(to_torch, function(q, k, v)), want, strict=True):
                torch.testing.assert_close(x, y, rtol=0.03, atol=0.03)
        jitted = jax.jit(grad)
        first = jitted(q, k, v)
        for _ in range(20):
            again = jitted(q, k, v)
            assert all(np.array_equal(first[n], again[n]) for n in (1, 2))
    summed = jax.jit(jax.grad(lambda v: fastattn.attention(q, k, v).astype(jnp.float32).sum()))(v)
    tensor = to_torch(v).detach().requires_grad_()
    fastattn.attention(to_torch(q), to_torch(k), tensor).float().sum().backward()
    torch.testing.assert_close(to_torch(summed), tensor.grad, rtol=0.03, atol=0.03)


def packed_and_merged():
    q, k, v = (x[0].swapaxes(0, 1) for x in inputs())
    ends = {"cu_seqlens_q": [0, 90, 200], "cu_seqlens_k": [0, 120, 300]}
    arrays = {"q": q, "k": k, "v": v} | {n: jnp.array(x, jnp.int32) for n, x in ends.items()}
    options = {"max_seqlen_q": 110, "max_seqlen_k": 180, "causal": True, "return_lse": True}
    call = jax.jit(lambda arrays: fastattn.attention_varlen(**arrays, **options))
    same(call(arrays), by_torch(fastattn.attention_varlen, arrays, options))

    q, k, v = inputs()
    halves = [fastattn.attention(q, x, y, return_lse=True) for x, y in ((k, v), (v, k))]
    outs, lses = (list(x) for x in zip(*halves, strict=True))
    want = fastattn.merge_states([*map(to_torch, outs)], [*map(to_torch, lses)])
    same(jax.jit(fastattn.merge_states)(outs, lses), want)


def vmapped():
    """Folded into the batch; and as runs, by two keys for the same queries."""
    q, k, v = inputs()
    one = jax.vmap(lambda q, k, v: fastattn.attention(q[None], k[None], v[None])[0])
    same(jax.jit(one)(q, k, v), by_torch(fastattn.attention, {"q": q, "k": k, "v": v}, {}))
    keys = jnp.stack([k, -k, k * 2])
    runs = jax.jit(jax.vmap(lambda k: fastattn.attention(q, k, v)))(keys)
    for n in range(3):
        same(runs[n], by_torch(fastattn.attention, {"q": q, "k": keys[n], "v": v}, {}))


def other_streams():
    """Work before and after the call, on XLA's stream: no value is read before it is there."""

    @jax.jit
    def step(x, k, v):
        for _ in range(6):
            x = fastattn.attention(x @ jnp.eye(64, dtype=x.dtype), k, v)
        return x

    q, k, v = inputs(b=4, sq=2000, sk=2000)
    results = [step(q * n, k, v) for n in range(1, 9)]
    for n, x in enumerate(results, 1):
        want = to_torch(q * n)
        for _ in range(6):
            want = fastattn.attention(want, to_torch(k), to_torch(v))
        same(x, want)


def watch_forward():
    """A list that grows with each call of the forward handler: whether its stream is captured.

    XLA's text does not tell: newer ones make graphs of what follows it. And under JAX's profiler
    they make none. So fastattn.jax registers a function that looks, and hands on.
    """
    captured = []
    handlers = fastattn._C.jax_handlers()
    on_cpu, on_cuda = handlers["forward"]
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    ours = function(address(on_cuda, None))
    driver = ctypes.CDLL("libcuda.so.1")

    def field(struct, n):
        return ctypes.c_uint64.from_address(struct + 8 * n).value

    @function
    def watched(frame):
        extensions, api, context = (field(frame, n) for n in (1, 2, 3))
        if not extensions or field(extensions, 1) & 0xFFFFFFFF != 1:  # not asked for its traits
            get_stream = function(field(api, 10))
            args = (ctypes.c_uint64 * 4)(32, 0, context, 0)
            status = ctypes.c_int()
            assert not get_stream(ctypes.addressof(args))
            assert not driver.cuStreamIsCapturing(ctypes.c_void_p(args[3]), ctypes.byref(status))
            captured.append(status.value == 1)
        return ours(frame)

    KEPT.append(watched)
    handlers["forward"] = on_cpu, jax.ffi.pycapsule(watched)
    fastattn._C.jax_handlers = lambda: handlers
    return captured


KEPT = []  # what XLA calls


def command_buffer():
    """XLA's CUDA graph has the call in it, and its replay reads new inputs."""
    captured = watch_forward()

    @jax.jit
    def step(q, k, v):
        for _ in range(4):
            q = fastattn.attention(q * 2, k, v, causal=True) + q
        return q

    q, k, v = inputs()
    first = [jax.block_until_ready(step(q * n, k, v)) for n in range(1, 6)]
    again = [step(q * n, k, v) for n in range(1, 6)]
    assert captured.count(True) >= 4, captured
    for n, (one, two) in enumerate(zip(first, again, strict=True), 1):
        want = to_torch(q * n)
        for _ in range(4):
            want = fastattn.attention(want * 2, to_torch(k), to_torch(v), causal=True) + want
        torch.testing.assert_close(to_torch(one), want, rtol=0.03, atol=0.03)
        same(two, to_torch(one))


def refusals():
    """A call that no kernel serves is refused while JAX compiles, by each backend's reason."""
    q, k, v = inputs()
    wide = [jnp.zeros((1, 2, 9, 513), jnp.float32)] * 3
    for call, arrays in (
        (jax.grad(lambda *of: fastattn.attention(*of).sum()), wide),
        (fastattn.attention, wide),
    ):
        for wrap in (lambda f: f, jax.jit):
            try:
                wrap(call)(*arrays)
            except NotImplementedError as error:
                assert "no backend takes this call: sm90: it " in str(error)
            else:
                raise AssertionError("nothing was raised")
    explained = fastattn.explain(fastattn.attention, q, k, v)
    assert explained == fastattn.explain(fastattn.attention, *map(to_torch, (q, k, v)))


def second_device():
    first, second = jax.devices()[:2]
    arrays = [jax.device_put(x, second) for x in inputs()]
    out = jax.jit(fastattn.attention)(*arrays)
    assert out.devices() == {second} and torch.cuda.current_device() == 0
    again = jax.jit(fastattn.attention)(*(jax.device_put(x, first) for x in arrays))
    assert np.array_equal(np.asarray(out), np.asarray(again))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
