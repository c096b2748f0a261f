"""Array libraries that differ from the standard, each as it was seen to behave.

The hand-made ones run everywhere; the real ones where they are installed.
"""

import ctypes
import sys
import types

import cases
import fastattn
import handmade
import numpy as np
import pytest
import reference
from conftest import needs, python

DTYPES = ("float32", "float16", "float64")


def qkv(dtype="float32", shape=(2, 3, 9, 16)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(3)]


def right(out, q, k, v, lse=None, **keywords):
    assert not reference.check(out, lse, q, k, v, **keywords)


def of_numpy(dtype):
    """What NumPy's arrays of this dtype give, in float32."""
    return fastattn.attention(*(x.astype(cases.dtype_of(dtype)) for x in qkv())).astype(np.float32)


class Foreign(handmade.Tensor):
    """An array of a library; .array is what it holds."""

    dtype = property(lambda self: self.array.dtype)


# ---------------------------------------------------------------------------------------------- MLX


class MLXArray(Foreign):
    """As MLX 0.32: a namespace, no `device`, capsules without a version."""

    def __init__(self, array):
        super().__init__(array, versioned=False)

    def __array_namespace__(self):
        return sys.modules["mlx.core"]


@pytest.fixture
def mlx(monkeypatch):
    """As MLX 0.32: asarray() copies; float64 becomes float32 unless it is asked for."""

    def asarray(x, dtype=None):
        x = np.array(np.from_dlpack(x))
        narrow = np.float32 if x.dtype == np.float64 else x.dtype
        return MLXArray(x.astype(dtype or narrow))

    module = types.ModuleType("mlx.core")
    module.array, module.asarray = MLXArray, asarray
    for name in DTYPES:
        setattr(module, name, np.dtype(name))
    monkeypatch.setitem(sys.modules, "mlx.core", module)
    return module


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx_in_mlx_out(mlx, dtype):
    arrays = qkv(dtype)
    given = [MLXArray(x) for x in arrays]
    out, lse = fastattn.attention(*given, causal=True, return_lse=True)
    assert type(out) is type(lse) is MLXArray and out.dtype == dtype
    right(out.array, *arrays, lse.array, causal=True)
    merged, _ = fastattn.merge_states([out], [lse])
    assert type(merged) is MLXArray and np.array_equal(merged.array, out.array)
    assert all(x.exported == x.deleted == 1 for x in given)


def test_mlx_arrays_are_never_out(mlx):
    arrays = qkv()
    with pytest.raises(TypeError, match="`out` must not be an MLX array: MLX arrays are never"):
        fastattn.attention(*arrays, out=MLXArray(arrays[0].copy()))


@needs("mlx")
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_real_mlx(dtype):
    import mlx.core as mx

    with mx.stream(mx.cpu):
        q, k, v = (mx.array(x, getattr(mx, dtype)) for x in qkv())
        out = fastattn.attention(q, k, v)
        assert isinstance(out, mx.array) and out.dtype == q.dtype and out.shape == q.shape
        assert np.array_equal(np.asarray(out.astype(mx.float32)), of_numpy(dtype))
        with pytest.raises(TypeError, match="MLX arrays are never written"):
            fastattn.attention(q, k, v, out=out)


# ------------------------------------------------------------------------------------------- Paddle


class PaddleTensor(Foreign):
    """As Paddle 3.3: its CPU has no number."""

    def __init__(self, array, versioned=True):
        super().__init__(array, versioned=versioned, device=(handmade.CPU, 0))

    def __dlpack_device__(self):
        return (handmade.CPU, None)


@pytest.fixture
def paddle(monkeypatch):
    """As Paddle 3.3: a capsule becomes a tensor; no deleter is called if manager_ctx is NULL."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

    def from_dlpack(capsule):
        assert handmade.Managed.from_address(pointer(capsule, b"dltensor")).context
        return PaddleTensor(np.from_dlpack(handmade.Answers(capsule)))

    module = types.ModuleType("paddle")
    module.Tensor = PaddleTensor
    module.utils = types.SimpleNamespace(dlpack=types.SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.setitem(sys.modules, "paddle", module)


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_paddle_in_paddle_out(paddle, dtype, versioned):
    arrays = qkv(dtype)
    given = [PaddleTensor(x, versioned) for x in arrays]
    out, lse = fastattn.attention(*given, return_lse=True)
    assert type(out) is type(lse) is PaddleTensor and out.dtype == dtype
    right(out.array, *arrays, lse.array)
    mine = PaddleTensor(np.zeros_like(arrays[0]))
    assert fastattn.attention(*given, out=mine) is mine
    assert np.array_equal(mine.array, out.array)


def test_an_unknown_library_whose_cpu_has_no_number():
    arrays = qkv()
    out = fastattn.attention(*(PaddleTensor(x) for x in arrays))
    assert type(out) is np.ndarray
    right(out, *arrays)


@needs("paddle")
@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_real_paddle(dtype):
    import paddle

    q, k, v = (paddle.to_tensor(x).astype(dtype) for x in qkv())
    out = fastattn.attention(q, k, v)
    assert isinstance(out, paddle.Tensor) and out.dtype == q.dtype and out.shape == q.shape
    assert np.array_equal(out.astype("float32").numpy(), of_numpy(dtype))
    mine = paddle.zeros_like(out)
    assert fastattn.attention(q, k, v, out=mine) is mine
    assert bool((mine == out).all())
    q.stop_gradient = False
    with pytest.raises(BufferError, match=r"`q` cannot be exported by DLPack: .*gradient"):
        fastattn.attention(q, k, v)


# ---------------------------------------------------------------------------------------------- JAX


@needs("jax")
@pytest.mark.parametrize("inside", [False, True])
def test_jax_float64_stays_outside_its_context(inside):
    import jax

    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    arrays = qkv("float64")
    with enable_x64(True):
        q, k, v = (jax.numpy.asarray(x) for x in arrays)
    with enable_x64(inside):
        out, lse = fastattn.attention(q, k, v, return_lse=True)
        assert jax.numpy.ones(1).dtype == (np.float64 if inside else np.float32)  # left as it was
    assert out.dtype == np.float64
    right(np.asarray(out), *arrays, np.asarray(lse))


TWO_DEVICES = """
import jax, numpy as np, fastattn, re
first, second = jax.devices()
x = np.random.default_rng(0).standard_normal((2, 3, 9, 16)).astype(np.float32)
want = np.asarray(fastattn.attention(x, x, x))
for device in (first, second):
    y = jax.device_put(x, device)
    out, lse = fastattn.attention(y, y, y, return_lse=True)
    assert out.devices() == lse.devices() == y.devices() == {device}, out.devices()
    assert np.array_equal(np.asarray(out), want)
    assert (out + y).devices() == {device}  # as good as any on that device
    merged, _ = fastattn.merge_states([out, out], [lse, lse])
    assert merged.devices() == {device}

def refused(message, *arguments, **keywords):
    try: fastattn.attention(*arguments, **keywords)
    except ValueError as error: assert re.search(message, str(error)), error
    else: raise AssertionError(message)

y, z = jax.device_put(x, first), jax.device_put(x, second)
refused("^`k` must be on cpu like `q`, got cpu:1$", y, z, y)
refused("^`v` must be on cpu:1 like `q`, got cpu$", z, z, y)
refused("^`mask` must be on cpu:1 like `q`, got cpu$", z, z, z, mask=y[0, 0, :, :9] > 0)
refused("^`k` must be on cpu:1 like `q`, got cpu$", z, x, x)

mesh = jax.sharding.Mesh(np.array([first, second]), ("a",))
def spread(*names):
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
    return jax.device_put(x, where)
say = "^`{}` must lie on one device, got a JAX array {} over 2: pass jax.device_put.{}, device.$"
refused(say.format("v", "sharded", "v"), y, y, spread("a"))
refused(say.format("q", "replicated", "q"), spread(), y, y)
refused(say.format("sink", "replicated", "sink"), y, y, y, sink=spread()[0, :, 0, 0])
print("fine")
"""


@needs("jax")
def test_jax_second_cpu_device():
    flags = "--xla_force_host_platform_device_count=2"
    assert python("-c", TWO_DEVICES, XLA_FLAGS=flags).strip() == "fine"


@needs("jax")
@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "out"])
def test_jax_arrays_that_are_deleted(name):
    import jax

    given = dict(zip("qkv", map(jax.numpy.asarray, qkv()), strict=True))
    given[name] = jax.numpy.zeros((9, 9))
    given[name].delete()
    with pytest.raises(ValueError, match=f"`{name}` must have memory, got a deleted JAX array"):
        fastattn.attention(**given)


# --------------------------------------------------------------------------------- other namespaces


class Other(Foreign):
    """An array of a library with a namespace of its own, whose empty() does what it is told."""

    device = "cpu"

    def __init__(self, array, make=np.empty, **keywords):
        super().__init__(array, **keywords)
        self.make = make

    def __array_namespace__(self):
        def empty(shape, dtype, device):
            made = self.make(shape, dtype)
            return made if isinstance(made, handmade.Tensor) else Other(made)

        return types.SimpleNamespace(empty=empty, float32="float32", uint8="uint8")


WRONG_EMPTY = {
    "shape": lambda shape, dtype: np.empty(shape[::-1], dtype),
    "smaller": lambda shape, dtype: np.empty((*shape[:-1], shape[-1] - 1), dtype),
    "rank": lambda shape, dtype: np.empty(shape[1:], dtype),
    "wider dtype": lambda shape, dtype: np.empty(shape, "float64"),
    "narrower dtype": lambda shape, dtype: np.empty(shape, "float16"),
    "order": lambda shape, dtype: np.empty(shape, dtype, order="F"),
    "overlap": lambda shape, dtype: np.broadcast_to(np.empty(shape[1:], dtype), shape),
    "device": lambda shape, dtype: handmade.ones(*shape, device=(handmade.CUDA, 0)),
    "read-only": lambda shape, dtype: handmade.Tensor(np.empty(shape, dtype), read_only=True),
}


@pytest.mark.parametrize("what", WRONG_EMPTY)
def test_an_empty_that_is_not_what_was_asked_for(what):
    arrays = qkv()
    q = Other(arrays[0], WRONG_EMPTY[what])
    with pytest.raises(TypeError, match=r"`q` must come from a framework whose empty\(\) gives"):
        fastattn.attention(q, *arrays[1:])
    assert q.exported == q.deleted == 1
    out = np.zeros_like(arrays[0])
    right(fastattn.attention(q, *arrays[1:], out=out), *arrays)


def test_an_empty_that_is_right():
    arrays = qkv()
    out = fastattn.attention(Other(arrays[0]), *arrays[1:])
    assert type(out) is Other
    right(out.array, *arrays)


def test_an_empty_that_raises():
    def fails(shape, dtype):
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        fastattn.attention(Other(qkv()[0], fails), *qkv()[1:])


class Placeless:
    """An array of a library with a namespace, which does not say where it is."""

    def __init__(self, tensor):
        self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__
        self.__array_namespace__ = tensor.__array_namespace__


@pytest.mark.parametrize("kind, dtype", [(Placeless, "float32"), (lambda x: x, "float16")])
def test_a_namespace_that_cannot_make_the_output(kind, dtype):
    """No such dtype there, or no word of where its arrays are: NumPy's, as for any library."""
    arrays = qkv(dtype)
    out = fastattn.attention(kind(Other(arrays[0])), *arrays[1:])
    assert type(out) is np.ndarray and out.dtype == arrays[0].dtype
    right(out, *arrays)


def test_a_producer_that_cannot_export_is_named():
    x = qkv()[0]

    def raises():
        return BufferError("my own reason")

    with pytest.raises(BufferError, match="`k` cannot be exported by DLPack: my own reason"):
        fastattn.attention(x, handmade.Answers(raises), x)
