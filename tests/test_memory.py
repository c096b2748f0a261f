"""Where arrays lie: strides out of all bounds, `out` beside inputs, deleters, scratch memory."""

import ctypes
import shutil
import subprocess

import fastattn
import handmade
import numpy as np
import pytest
import reference
from conftest import needs, python
from numpy.lib.stride_tricks import as_strided

# ------------------------------------------------------------------------------------------ strides

REACH = r"`{}` must have strides that reach less than 2\^60 bytes, got {} for a dimension of {}"


FAR = (2**63 - 1, -(2**63), 2**62, 2**61 + 1, -(2**61), 2**58, -(2**58))


def strided(shape, strides, start=0, dtype=np.float32):
    """A hand-made tensor with these strides, which NumPy itself would never make."""

    def change(tensor):
        tensor.ndim = len(shape)
        tensor.shape = (ctypes.c_int64 * len(shape))(*shape)
        tensor.strides = (ctypes.c_int64 * len(shape))(*strides)

    return handmade.Tensor(np.ones(64, dtype)[start:], change=change)


@pytest.mark.parametrize("argument", ["q", "mask", "out"])
@pytest.mark.parametrize("stride", FAR)
def test_a_stride_whose_extent_no_address_has(argument, stride):
    x = np.ones((1, 1, 2, 2), np.float32)
    given = {"q": x, "k": x, "v": x, argument: strided((1, 1, 2, 2), (0, 0, stride, 1))}
    with pytest.raises(ValueError, match=REACH.format(argument, stride, 2)):
        fastattn.attention(**given)


def test_strides_whose_sum_no_address_has():
    """Each alone is below the limit; so is the sum of one up and one down."""
    x = np.ones((3, 3, 2, 2), np.float32)
    far = 2**57 - 2**40  # times 2 and 4 bytes: just below 2^60
    for strides in ((far, far, 2, 1), (-far, -far, 2, 1)):
        with pytest.raises(ValueError, match=REACH.format("out", strides[1], 3)):
            fastattn.attention(x, x, x, out=strided(x.shape, strides))
    with pytest.raises(ValueError, match="`q` must have strides that stay above address 0"):
        fastattn.attention(strided(x.shape, (far, -far, 2, 1)), x, x)


def test_strides_of_numpy_and_of_masks_of_one_byte():
    x = np.ones((1, 1, 2, 2), np.float32)
    far = as_strided(x, (1, 1, 2, 2), (0, 0, 2**62, 4))
    with pytest.raises(ValueError, match=REACH.format("k", 2**60, 2)):
        fastattn.attention(x, far, x)
    mask = strided((2, 2), (2**60, 1), dtype=bool)
    with pytest.raises(ValueError, match=REACH.format("mask", 2**60, 2)):
        fastattn.attention(x, x, x, mask=mask)


def test_strides_that_are_never_used():
    """Of dimensions of size 1; and any that stays in memory."""
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    q = strided((1, 1, 2, 2), (2**63 - 1, -(2**63), 0, 1))
    assert not reference.check(fastattn.attention(q, x, x), None, x * 0 + 1, x, x)


def test_an_offset_that_wraps_the_address():
    """Two's complement, as pointers are: the first element is where the sum ends up."""
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    back = handmade.Tensor(x, byte_offset=2**64 - 64, change=_wrap)
    assert np.array_equal(fastattn.attention(back, x, x), fastattn.attention(x, x, x))


def _wrap(tensor):
    tensor.data = (tensor.data + 2**64) % 2**64


# -------------------------------------------------------------------------------- out beside inputs


def addresses(x):
    """The address of each byte of an array."""
    at = np.asarray(x.__array_interface__["data"][0])
    for size, stride in zip(x.shape, x.strides, strict=True):
        at = at[..., None] + np.arange(size) * stride
    return set((at[..., None] + np.arange(x.itemsize)).ravel().tolist())


def is_legal(out, **given):
    try:
        fastattn.attention(out=out, **given)
    except ValueError as error:
        assert "must not overlap" in str(error), error
        return False
    return True


def separate(shape):
    return [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n in range(3)]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("framework", ["numpy", pytest.param("torch", marks=needs("torch"))])
def test_out_beside_q_k_and_v_in_one_buffer(framework, layout):
    b, s, h, d = 2, 9, 3, 8
    want = [x.swapaxes(1, 2) if layout == "bshd" else x for x in separate((b, h, s, d))]
    buffer = np.zeros((b, s, 4, h, d), np.float32)
    parts = [buffer[:, :, n] for n in range(4)]
    if layout == "bhsd":
        parts = [x.swapaxes(1, 2) for x in parts]
    for part, x in zip(parts, want, strict=False):
        part[...] = x
    if framework == "torch":
        import torch

        parts = [x.swapaxes(1, 2) if layout == "bhsd" else x
                 for x in torch.from_numpy(buffer).unbind(2)]  # fmt: skip
    fastattn.attention(*parts[:3], out=parts[3], layout=layout)
    got = np.asarray(parts[3])
    assert np.array_equal(got, fastattn.attention(*want, layout=layout))
    for n in range(3):
        assert np.array_equal(np.asarray(parts[n]), want[n])
        with pytest.raises(ValueError, match=f"`out` must not overlap `{'qkv'[n]}` in memory"):
            fastattn.attention(*parts[:3], out=parts[n], layout=layout)


def test_out_in_other_columns_rows_and_heads():
    q, k, v = separate((2, 4, 6, 8))
    for pick in (
        lambda x, n: x[..., n::2],
        lambda x, n: x[..., 8 * n : 8 * n + 8],
        lambda x, n: x[..., n::2, :],
        lambda x, n: x[:, n::2],
        lambda x, n: x[..., ::-1][..., n::2],
        lambda x, n: x[:, :, n::2][:, :, ::-1],
    ):
        buffer = np.zeros((2, 8, 12, 16), np.float32)
        inside, out = pick(buffer, 0), pick(buffer, 1)
        small = tuple(slice(0, n) for n in (2, 4, 6, 8))
        inside, out = inside[small], out[small]
        inside[...] = q
        fastattn.attention(inside, k, v, out=out)
        assert np.array_equal(out, fastattn.attention(q, k, v))
        assert np.array_equal(inside, q)
        assert not is_legal(inside, q=inside, k=k, v=v)


def test_out_between_the_bytes_of_other_dtypes():
    """Lengths and a mask in the gaps that a padded out leaves; and one byte too far."""
    q, k, v = separate((2, 1, 4, 4))
    rows = np.zeros((2, 1, 4, 8), np.float32)  # 16 bytes of out, 16 of others
    out, gaps = rows[..., :4], rows.view(np.uint8).reshape(2, 1, 4, 32)
    gaps[..., 16:20] = 1
    mask = gaps[..., 16:20].view(bool)
    lengths = rows.view(np.int32)[:, 0, 0, 7]
    lengths[:] = 3
    assert is_legal(out, q=q, k=k, v=v, mask=mask, k_lengths=lengths)
    assert np.array_equal(out, fastattn.attention(q, k, v, k_lengths=lengths.copy()))
    assert not is_legal(out, q=q, k=k, v=v, mask=gaps[..., 15:19].view(bool))
    out.fill(0)
    assert not is_legal(out, q=q, k=k, v=v, k_lengths=rows.view(np.int32)[:, 0, 0, 3])


def test_out_of_no_element_inside_an_input():
    x = np.ones((1, 2, 4, 8), np.float32)
    assert is_legal(x[:, :, 2:2], q=x[:, :, 1:1], k=x, v=x)


def view_somewhere(rng, buffer, shape, strides):
    """A view with these strides (elements) that starts anywhere in buffer; None if none fits."""
    reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    first, end = -sum(x for x in reach if x < 0), buffer.size - sum(x for x in reach if x > 0)
    if first >= end:
        return None
    return as_strided(buffer[int(rng.integers(first, end)) :], shape, [4 * x for x in strides])


def distinct_strides(rng, shape):
    """Strides, random but such that each dimension steps over all later ones."""
    strides, reach = [], 0
    for n in reversed(shape):
        strides.insert(0, reach + int(rng.integers(1, 9)))
        reach += strides[0] * (n - 1)
    return [
        stride * int(sign) for stride, sign in zip(strides, rng.choice([1, -1], 4), strict=True)
    ]


def test_overlap_is_what_brute_force_says():
    """Random views of one small buffer: refused where, and only where, a byte is shared."""
    rng = np.random.default_rng(0)
    buffer, counts = np.ones(600, np.float32), {"apart": 0, "interleaved": 0, "shared": 0}
    for _ in range(4000):
        shape = tuple(int(n) for n in rng.integers(1, 4, 4))
        strides = distinct_strides(rng, shape)
        others = strides if rng.random() < 0.5 else [int(n) for n in rng.integers(-13, 14, 4)]
        out, q = (view_somewhere(rng, buffer, shape, each) for each in (strides, others))
        if out is None or q is None:
            continue
        x = np.ones(shape, np.float32)
        mine, theirs = addresses(out), addresses(q)
        shares = bool(mine & theirs)
        assert is_legal(out, q=q, k=x, v=x) == (not shares), (shape, strides, others)
        between = max(mine) > min(theirs) and max(theirs) > min(mine)
        counts["shared" if shares else "interleaved" if between else "apart"] += 1
    assert min(counts.values()) > 100, counts


def test_strides_too_odd_to_decide_are_refused():
    """No element is shared, for all of one are on odd addresses; but that takes sums to tell."""
    n, base = 40, 4 * 10**4
    steps = [2 * (base + i) for i in (1, 3, 7, 13)]
    buffer = np.zeros(sum(steps) * n, np.float32)
    odd = as_strided(buffer[1:], (n, n, n, n), [4 * s for s in steps])[:, :, :, :1]
    even = as_strided(buffer, (n, n, n, 1), [4 * (s + 2) for s in steps])
    assert not is_legal(even, q=odd, k=odd[:, :, :1], v=odd[:, :, :1])


# ----------------------------------------------------------------------------------------- deleters


class Deleting(handmade.Tensor):
    """Its deleter runs Python, which looks at the exception that is set while it runs."""

    def _deleted(self, managed):
        super()._deleted(managed)
        [int(x) for x in "123"]
        try:
            {}["not there"]
        except KeyError:
            self.ran = True


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("wrong", ["k", "v", "mask", "sink", "out"])
def test_an_exception_is_kept_while_deleters_run(wrong, versioned):
    x = np.ones((1, 1, 2, 4), np.float32)
    given = {name: Deleting(x, versioned=versioned) for name in "qkv"}
    given[wrong] = object()
    with pytest.raises(TypeError, match=f"`{wrong}` must be an array"):
        fastattn.attention(**given)
    given.pop(wrong)
    assert all(n.exported == n.deleted for n in given.values())
    assert given["q"].ran and given["q"].deleted == 1


def test_a_ctrl_c_is_kept_while_deleters_run():
    class Interrupted(handmade.Tensor):
        def __dlpack__(self, **keywords):
            raise KeyboardInterrupt

    x = np.ones((1, 1, 2, 4), np.float32)
    given = [Deleting(x), Deleting(x)]
    with pytest.raises(KeyboardInterrupt):
        fastattn.attention(*given, Interrupted(x))
    assert all(n.ran and n.deleted == 1 for n in given)
    with pytest.raises(KeyboardInterrupt):
        fastattn.merge_states([Deleting(x), Interrupted(x)], [x[..., 0], x[..., 0]])
    with pytest.raises(KeyboardInterrupt):
        fastattn.explain(fastattn.attention, *given, Interrupted(x))


LEAVES = r"""
#include <Python.h>
PyObject *exception;
void leave(void *managed) { PyErr_SetString(exception, "left behind"); }
"""


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """A library with a deleter that leaves `exception` set, as C code with a fault does."""
    return compiled(tmp_path_factory.mktemp("leaves"), LEAVES)


def compiled(folder, source, *flags):
    import sysconfig

    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    (folder / "x.c").write_text(source)
    include = f"-I{sysconfig.get_path('include')}"
    command = ["cc", "-shared", "-fPIC", include, *flags, "x.c", "-o", "x.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "x.so"


class Leaving(handmade.Tensor):
    def __init__(self, x, library, exception):
        super().__init__(x)
        self.library = ctypes.PyDLL(str(library))
        ctypes.py_object.in_dll(self.library, "exception").value = exception

    def __dlpack__(self, **keywords):
        capsule = super().__dlpack__(**keywords)
        managed = self.capsules[-1][0]
        managed.deleter = ctypes.cast(self.library.leave, handmade.Deleter)
        return capsule


def test_an_exception_that_a_deleter_leaves_comes_through(leaves):
    x = np.ones((1, 1, 2, 4), np.float32)
    with pytest.raises(RuntimeError, match="left behind"):
        fastattn.attention(x, Leaving(x, leaves, RuntimeError), x)
    with pytest.raises(RuntimeError, match="left behind"):
        fastattn.explain(fastattn.attention, x, Leaving(x, leaves, RuntimeError), x)
    with pytest.raises(TypeError, match="`v` must be an array"):  # the call's own is the first
        fastattn.attention(x, Leaving(x, leaves, RuntimeError), object())
    with pytest.raises(KeyboardInterrupt):  # but for a Ctrl-C
        fastattn.attention(x, Leaving(x, leaves, KeyboardInterrupt), object())
    with pytest.raises(KeyboardInterrupt):
        fastattn.attention(x, Leaving(x, leaves, KeyboardInterrupt), x[..., :2])
    assert fastattn.attention(x, x, x).all()


# ------------------------------------------------------------------------------------------ scratch

STARVED = """
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>
extern void *__libc_malloc(size_t);
int starve_main, starve_others;
void *malloc(size_t size) {
    int is_main = syscall(SYS_gettid) == getpid();
    return size > 16384 && (is_main ? starve_main : starve_others) ? NULL : __libc_malloc(size);
}
"""

CALLS = """
import ctypes, sys
import numpy as np, fastattn
library = ctypes.CDLL(sys.argv[1])
x = np.random.default_rng(0).standard_normal((1, 8, 600, 256)).astype(np.float32)
want, out = fastattn.attention(x, x, x), np.zeros_like(x)
starve = [ctypes.c_int.in_dll(library, name) for name in ("starve_main", "starve_others")]
starve[1].value = 1  # the others have no memory: this thread does the work
for _ in range(20):
    out.fill(0)
    fastattn.attention(x, x, x, out=out)
    assert np.array_equal(out, want)
starve[0].value = 1
try: fastattn.attention(x, x, x, out=out)
except MemoryError as error: print(error)
starve[0].value = starve[1].value = 0
assert np.array_equal(fastattn.attention(x, x, x), want)
"""


def test_threads_without_scratch_memory_leave_the_work_to_the_others(tmp_path):
    library = compiled(tmp_path, STARVED)
    said = python("-c", CALLS, library, LD_PRELOAD=str(library), FASTATTN_NUM_THREADS="4")
    assert said.strip() == "no memory for the CPU backend's scratch"
