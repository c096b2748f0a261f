"""attention_varlen: what the cases of test_values.py do not say of packed sequences."""

import time

import cases
import fastattn
import numpy as np
import pytest
from cases import DTYPES
from conftest import needs
from declared import served


def packed(lengths, dtype="float32", hq=4, hk=2, d=16, tail=0, seed=0):
    """q, k, v, cu_seqlens and max_seqlen of sequences with (query, key) lengths."""
    rng = np.random.default_rng(seed)
    cu = np.concatenate([np.zeros((1, 2), np.int32), np.cumsum(lengths, axis=0, dtype=np.int32)])
    shapes = [(cu[-1, min(i, 1)] + tail, hk if i else hq, d) for i in range(3)]
    q, k, v = (rng.standard_normal(shape).astype(cases.dtype_of(dtype)) for shape in shapes)
    return q, k, v, *cu.T, *(int(n) for n in np.max(lengths, axis=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"causal": "top-left"}])
def test_each_sequence_is_a_call_of_its_own(dtype, batch_invariant, keywords, place):
    framework, backend = place
    keywords = {**keywords, "batch_invariant": batch_invariant, "return_lse": True}
    lengths = [(300, 300), (1, 200), (0, 7), (5, 0), (64, 64), (17, 129)]
    q, k, v, cu_q, cu_k, *longest = packed(lengths, dtype, tail=2)

    def given(*arrays):
        return [framework.array(cases.store(x, "plain", None)) for x in arrays]

    with served(backend, dtype=dtype):
        result = fastattn.attention_varlen(
            *given(q, k, v, cu_q, cu_k), *longest, **keywords, backend=backend
        )
    out, lse = (framework.numpy(x) for x in result)
    for n in range(len(lengths)):
        rows, keys = slice(*cu_q[n : n + 2]), slice(*cu_k[n : n + 2])
        own = given(q[None, rows], k[None, keys], v[None, keys])
        want = fastattn.attention(*own, **keywords, layout="bshd", backend=backend)
        want_out, want_lse = (framework.numpy(x)[0] for x in want)
        if backend == "cpu":
            assert out[rows].tobytes() == want_out.tobytes()
            assert lse[:, rows].tobytes() == want_lse.tobytes()
        else:
            assert np.allclose(out[rows].astype(float), want_out.astype(float), atol=2e-2)
            assert np.allclose(lse[:, rows], want_lse, atol=1e-3)
        if batch_invariant:  # on a GPU a packed call's kernel may differ from that of a plain one
            offsets = [np.array([0, own[i].shape[1]], np.int32) for i in range(2)]
            alone = fastattn.attention_varlen(
                *given(q[rows], k[keys], v[keys], *offsets),
                *(int(n[1]) for n in offsets),
                **keywords,
                backend=backend,
            )
            assert out[rows].tobytes() == framework.numpy(alone[0]).tobytes()
            assert lse[:, rows].tobytes() == framework.numpy(alone[1]).tobytes()
    assert (out[cu_q[-1] :] == 0).all() and (lse[:, cu_q[-1] :] == -np.inf).all()


def test_max_seqlen_may_be_larger_than_any_sequence():
    q, k, v, cu_q, cu_k, *longest = packed([(30, 40), (0, 3), (5, 70)])
    want = fastattn.attention_varlen(q, k, v, cu_q, cu_k, *longest, causal=True)
    for most in (71, 10**6, 2**30 - 1):
        got = fastattn.attention_varlen(q, k, v, cu_q, cu_k, most, most, causal=True)
        assert np.array_equal(got, want)


def test_a_mask_goes_by_positions_in_the_sequence():
    lengths = [(3, 5), (4, 4)]
    q, k, v, cu_q, cu_k, *longest = packed(lengths)
    mask = np.random.default_rng(0).random((2, 4, 4, 5)) < 0.5
    out = fastattn.attention_varlen(q, k, v, cu_q, cu_k, *longest, mask=mask)
    for n, (sq, sk) in enumerate(lengths):
        own = [x[None, a[n] : a[n + 1]] for x, a in ((q, cu_q), (k, cu_k), (v, cu_k))]
        want = fastattn.attention(*own, layout="bshd", mask=mask[n, :, :sq, :sk])
        assert np.array_equal(out[cu_q[n] : cu_q[n + 1]], want[0])


def test_cu_seqlens_that_are_strided_and_shared():
    """Both offsets may be one array, of any stride; 0 where every sequence is empty."""
    q, k, v, cu, _, *longest = packed([(30, 30), (7, 7)])
    want = fastattn.attention_varlen(q, k, v, cu, cu, *longest)
    wide = np.full((3, 4), -7, np.int32)
    wide[:, 2] = cu
    backwards = wide[::-1, 2].copy()[::-1]
    for other in (wide[:, 2], backwards):
        assert np.array_equal(fastattn.attention_varlen(q, k, v, other, cu, *longest), want)
    none = np.broadcast_to(np.zeros(1, np.int32), (70001,))
    out, lse = fastattn.attention_varlen(q, k, v, none, none, *longest, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()


def test_100000_short_sequences():
    """Right, and no slower than the rows they have: padded to the longest, it is 70 x as much."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, (100_000, 2))
    lengths[50_000] = 300
    q, k, v, cu_q, cu_k, *longest = packed(lengths, hq=1, hk=1, d=4)
    began = time.perf_counter()
    out = fastattn.attention_varlen(q, k, v, cu_q, cu_k, *longest)
    packed_time = time.perf_counter() - began
    for n in (0, 1, 49_999, 50_000, 50_001, 99_999):
        own = [x[None, a[n] : a[n + 1]] for x, a in ((q, cu_q), (k, cu_k), (v, cu_k))]
        assert np.array_equal(
            out[cu_q[n] : cu_q[n + 1]], fastattn.attention(*own, layout="bshd")[0]
        )
    x = rng.standard_normal((100_000, 1, 4, 4), np.float32)
    began = time.perf_counter()
    fastattn.attention(x, x, x)
    assert packed_time < 5 * (time.perf_counter() - began)


@needs("torch")
def test_the_kind_and_device_of_q_come_out():
    import torch

    q, k, v, cu_q, cu_k, *longest = (
        torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
        for x in packed([(3, 5), (4, 4)])
    )
    out, lse = fastattn.attention_varlen(q, k, v, cu_q, cu_k, *longest, return_lse=True)
    assert type(out) is type(lse) is torch.Tensor
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 7), torch.float32)
    again = fastattn.attention_varlen(q.requires_grad_(), k, v, cu_q, cu_k, *longest)
    assert again.requires_grad and torch.equal(again.detach(), out)


@needs("jax")
def test_jax_arrays():
    import jax.numpy as jnp

    q, k, v, cu_q, cu_k, *longest = packed([(3, 5), (4, 4)])
    want = fastattn.attention_varlen(q, k, v, cu_q, cu_k, *longest)
    given = [jnp.asarray(x) for x in (q, k, v, cu_q, cu_k)]
    got, lse = fastattn.attention_varlen(*given, *longest, return_lse=True)
    assert type(got) is type(given[0]) and lse.shape == (4, 7)
    assert np.array_equal(np.asarray(got), want)
