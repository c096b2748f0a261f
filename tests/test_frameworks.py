"""Arrays in, arrays of the same kind out: NumPy, torch, JAX, and whatever else speaks DLPack."""

import gc
import sys

import cases
import fastattn
import handmade
import ml_dtypes
import numpy as np
import pytest
import reference
from cases import DTYPES
from conftest import needs, python


def qkv(dtype="float32", shape=(2, 3, 9, 16)):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(cases.dtype_of(dtype)) for _ in range(3)]


def right(out, q, k, v, lse=None, **keywords):
    assert not reference.check(out, lse, q, k, v, **keywords)


# -------------------------------------------------------------------------------------------- NumPy


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_in_numpy_out(dtype):
    q, k, v = qkv(dtype)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert type(out) is type(lse) is np.ndarray
    assert out.dtype == q.dtype and lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert out.flags.c_contiguous and out.flags.owndata and out.flags.writeable
    right(out, q, k, v, lse)


def test_numpy_bfloat16_is_that_of_ml_dtypes():
    q, k, v = qkv("bfloat16")
    out = fastattn.attention(q, k, v)
    assert out.dtype == np.dtype(ml_dtypes.bfloat16)
    mask = np.zeros((9, 9), ml_dtypes.bfloat16)
    right(fastattn.attention(q, k, v, mask=mask), q, k, v)


def test_numpy_read_only_arrays():
    q, k, v = qkv()
    for x in (q, k, v):
        x.flags.writeable = False
    right(fastattn.attention(q, k, v), q, k, v)
    frozen = np.frombuffer(q.tobytes(), q.dtype).reshape(q.shape)  # memory of a bytes object
    right(fastattn.attention(frozen, k, v), q, k, v)


def test_numpy_views():
    """Negative strides, steps, transposes, Fortran order, a broadcast (read-only, stride 0)."""
    q, k, v = qkv(shape=(4, 6, 18, 16))
    views = [
        lambda x: x[::-1, ::2, ::-3, ::-1],
        lambda x: x[:, :, 3:12],
        np.asfortranarray,
        lambda x: x.transpose(3, 2, 1, 0)[:, ::2],
        lambda x: np.broadcast_to(x[:1, :1], (5, 3, 18, 16)),
        lambda x: x[..., 5:6],
    ]
    for view in views:
        q1, k1, v1 = (view(x) for x in (q, k, v))
        right(fastattn.attention(q1, k1, v1), q1, k1, v1)


def test_numpy_strides_of_size_one_dimensions_do_not_matter():
    base = np.arange(64, dtype=np.float32)
    q = np.lib.stride_tricks.as_strided(base, (1, 1, 1, 8), (12345, 7, -999, 4))
    right(fastattn.attention(q, q, q), q, q, q)


def test_numpy_subclasses_and_structures_are_not_taken_for_plain_arrays():
    q, k, v = qkv()
    subclass = type("subclass", (np.ndarray,), {})
    for strange in (np.ma.masked_array(q), q.view(np.recarray), q.view(subclass)):
        with pytest.raises(
            TypeError, match=r"`q` must be a plain numpy\.ndarray, got its subclass"
        ):
            fastattn.attention(strange, k, v)


def test_numpy_memmap_is_taken(tmp_path):
    q, k, v = qkv()
    q.tofile(tmp_path / "q")
    mapped = np.memmap(tmp_path / "q", np.float32, "r", shape=q.shape)
    right(fastattn.attention(mapped, k, v), q, k, v)


def test_numpy_out():
    q, k, v = qkv()
    whole = np.full((2, 3, 9, 20), np.nan, np.float32)
    out = whole[..., 2:18]
    assert fastattn.attention(q, k, v, out=out) is out
    right(out, q, k, v)
    assert np.isnan(whole[..., [0, 1, 18, 19]]).all()


def test_numpy_lists_are_not_arrays():
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"`q` must .*got.* list"):
        fastattn.attention(q.tolist(), k, v)


# -------------------------------------------------------------------------------------------- torch


@needs("torch")
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_torch_out(dtype):
    import torch

    q, k, v = (cases.Torch().array(cases.store(x, "plain", None)) for x in qkv(dtype))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert type(out) is type(lse) is torch.Tensor
    assert out.dtype == q.dtype and out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    right(cases.Torch().numpy(out), *qkv(dtype), lse.numpy())
    parameter = torch.nn.Parameter(q, requires_grad=False)
    assert torch.equal(fastattn.attention(parameter, k, v), out)
    mine = torch.full_like(out, torch.nan)
    assert fastattn.attention(q, k, v, out=mine) is mine
    assert torch.equal(mine, out)


@needs("torch")
def test_torch_storage_offsets():
    import torch

    base = torch.randn(3, 2, 3, 9, 16)
    q, k, v = base  # views with offsets into one storage
    right(fastattn.attention(q, k, v).numpy(), *base.numpy())
    right(
        fastattn.attention(q[1:, 1:, 2:], k[1:, 1:], v[1:, 1:]).numpy(),
        *(x[1:, 1:, n:] for x, n in zip(base.numpy(), (2, 0, 0), strict=True)),
    )


# ---------------------------------------------------------------------------------------------- JAX


@needs("jax")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jax_in_jax_out(dtype):
    import jax

    arrays = qkv(dtype)
    q, k, v = (jax.numpy.asarray(x) for x in arrays)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    assert out.dtype == q.dtype and lse.dtype == np.float32
    right(np.asarray(out), *arrays, np.asarray(lse), causal=True)
    later = jax.jit(lambda x: x * 2)(out)  # the array is as good as any
    assert np.array_equal(np.asarray(later), np.asarray(out) * np.asarray(2, out.dtype))


@needs("jax")
def test_jax_arrays_that_are_not_ready_yet():
    import jax

    x = jax.numpy.ones((1, 1, 300, 300))
    for _ in range(3):
        x = jax.jit(lambda x: x @ x / 300)(x)
    out = fastattn.attention(x[..., :16], x[..., :16], x[..., :16])
    assert np.allclose(np.asarray(out), 1)


@needs("jax")
def test_jax_arrays_are_never_out():
    import jax

    q, k, v = (jax.numpy.asarray(x) for x in qkv())
    with pytest.raises((TypeError, ValueError), match="`out`"):
        fastattn.attention(q, k, v, out=q + 0)


@needs("jax")
def test_jax_outputs_outlive_everything_else():
    """The buffer is ours, owned by the array that was given out: freed with it, not before."""
    import jax

    arrays = qkv(shape=(1, 1, 50, 64))
    out = fastattn.attention(*(jax.numpy.asarray(x) for x in arrays))
    kept = np.array(out)
    for _ in range(50):
        fastattn.attention(*(jax.numpy.asarray(x) for x in qkv(shape=(1, 1, 50, 64))))
    gc.collect()
    assert np.array_equal(np.asarray(out), kept)


# ----------------------------------------------------------------------------- hand-made __dlpack__


@pytest.mark.parametrize("versioned", [True, False])
def test_any_object_that_speaks_dlpack(versioned):
    q, k, v = qkv()
    given = [handmade.Tensor(x, versioned=versioned) for x in (q, k, v)]
    out = np.zeros_like(q)
    target = handmade.Tensor(out, versioned=versioned)
    assert fastattn.attention(*given, out=target) is target
    right(out, q, k, v)
    for x in (*given, target):
        assert x.exported == x.deleted == 1


def test_a_dlpack_result_is_an_array_of_some_kind():
    """For an object of a framework that we do not know."""
    q, k, v = qkv()
    given = [handmade.Tensor(x) for x in (q, k, v)]
    out = fastattn.attention(*given)
    right(np.from_dlpack(out), q, k, v)


def test_dlpack_offsets_and_missing_strides():
    q, k, v = qkv()
    given = [
        handmade.Tensor(q, byte_offset=64),
        handmade.Tensor(k, strides=False),
        handmade.Tensor(v),
    ]
    out = np.zeros_like(q)
    fastattn.attention(*given, out=handmade.Tensor(out))
    right(out, q, k, v)


def test_mixed_frameworks_on_one_device():
    q, k, v = qkv()
    out = fastattn.attention(q, handmade.Tensor(k), v)
    assert type(out) is np.ndarray
    right(out, q, k, v)


# ------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax", "dlpack"])
def test_reference_counts_stay(kind):
    arrays = qkv()
    if kind == "torch":
        torch = pytest.importorskip("torch")
        arrays = [torch.from_numpy(x) for x in arrays]
    elif kind == "jax":
        jax = pytest.importorskip("jax")
        arrays = [jax.numpy.asarray(x) for x in arrays]
    elif kind == "dlpack":
        arrays = [handmade.Tensor(x) for x in arrays]

    def counts(calls):
        for _ in range(calls):
            fastattn.attention(*arrays, return_lse=True)
        for x in arrays:
            if kind == "dlpack":
                x.forget()
        gc.collect()
        return [sys.getrefcount(x) for x in arrays]

    before, blocks = counts(100), sys.getallocatedblocks()
    assert counts(1000) == before
    assert sys.getallocatedblocks() - blocks < 500, "objects are left behind"


def test_nothing_is_imported_for_a_caller():
    """torch or JAX arrays bring their framework; NumPy's come without any other."""
    said = python(
        "-c",
        "import sys, numpy as np, fastattn\n"
        "x = np.ones((1, 1, 4, 8), np.float32)\n"
        "fastattn.attention(x, x, x)\n"
        "print(sorted({'torch', 'jax', 'cupy', 'ml_dtypes'} & set(sys.modules)))",
    )
    assert said.strip() == "[]"


def test_promise_1_imports_without_numpy_or_torch():
    said = python(
        "-c",
        "import sys\n"
        "for name in ('numpy', 'torch', 'jax', 'cupy', 'ml_dtypes'): sys.modules[name] = None\n"
        "import fastattn\n"
        "print(fastattn.__version__, sorted(fastattn.info()['backends']))\n",
    )
    assert "cpu" in said
