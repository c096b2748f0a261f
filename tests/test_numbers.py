"""Numbers at the ends of what they may be: caps, scales, float64, lengths, empty parts."""

from dataclasses import replace

import cases
import fastattn
import numpy as np
import pytest
import reference
from cases import DTYPES, Case
from declared import served
from test_values import right

BASE = Case(b=2, hq=4, hk=2, sq=37, sk=53, d=24, dv=24)
CAPS = (1e-310, 1e-46, 1e-30, 0.1, 0.3, 1.1, 50.1, 4096.0, 1e6, 1e12, 1e39, 1e300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", CAPS)
def test_softcap_of_any_size(softcap, dtype, place):
    case = replace(BASE, dtype=dtype, softcap=softcap)
    right(replace(case, scale=1.0), *place)
    right(replace(case, causal=True, mask="float32"), *place)
    right(replace(case, alibi=1, dropout=0.1), *place)


def test_a_large_cap_is_none_at_all():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        q, k, v = (rng.standard_normal((1, 2, 30, 16)).astype(dtype) for _ in range(3))
        want = fastattn.attention(q, k, v)
        got = fastattn.attention(q, k, v, softcap=1e300)
        assert np.abs(got - want).max() <= 4 * np.finfo(dtype).eps * np.abs(v).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-310, -1e-46, 1e-31, 0.0, -0.0])
def test_a_small_scale_is_the_mean(scale, dtype, place):
    for extra in ({}, {"causal": True}, {"softcap": 5.0}, {"mask": "bool"}, {"alibi": 1}):
        right(replace(BASE, dtype=dtype, scale=scale, **extra), *place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e15, 1e29, 1e38, 1e39, 1e300, -1e300])
def test_a_large_scale_leaves_the_greatest(scale, dtype, place):
    framework, backend = place
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 9, 16)).astype(cases.dtype_of(dtype)) for _ in range(3))
    given = [framework.array(cases.store(x, "plain", rng)) for x in (q, k, v)]
    slopes = framework.array(cases.store(np.ones(2, np.float32), "plain", rng))
    s = np.sign(scale) * (q.astype(float) @ k.astype(float).swapaxes(2, 3))
    want = np.take_along_axis(v, s.argmax(axis=3)[..., None], axis=2)
    for extra in ({}, {"alibi_slopes": slopes}):
        with served(backend, dtype=dtype):
            out = fastattn.attention(*given, scale=scale, **extra, backend=backend)
        assert np.array_equal(framework.numpy(out), want)


def test_float64_to_its_last_digits(place):
    for seed, softcap in enumerate((0.0, 1.1, 0.3, 0.1, 50.1)):
        case = replace(BASE, dtype="float64", softcap=softcap, sink=seed % 2 == 1, seed=seed)
        right(case, *place)
        right(replace(case, packed=((30, 37), (53, 12)), causal=True, alibi=2), *place)


def test_lse_is_float64_where_the_arrays_are():
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        q, k, v = (rng.standard_normal((1, 2, 9, 16)).astype(cases.dtype_of(dtype)) for _ in "qkv")
        out, lse = fastattn.attention(q, k, v, return_lse=True)
        assert lse.dtype == reference.lse_dtype(q.dtype)
        offsets = np.array([0, 9], np.int32)
        packed = [x[0].swapaxes(0, 1) for x in (q, k, v)]
        got = fastattn.attention_varlen(*packed, offsets, offsets, 9, 9, return_lse=True)
        assert got[1].dtype == lse.dtype and np.array_equal(got[1], lse[0])
        assert fastattn.merge_states([out], [lse])[1].dtype == lse.dtype
    with pytest.raises(TypeError, match=r"`lses\[0\]` must be float64, got float32"):
        fastattn.merge_states([out], [lse.astype("f4")])


def test_a_part_whose_lse_is_inf_is_empty(place):
    framework, backend = place
    rng = np.random.default_rng(0)
    out, other = rng.standard_normal((2, 1, 2, 3, 4)).astype(np.float32)
    lse = rng.standard_normal((1, 2, 3)).astype(np.float32)
    other[...] = np.nan
    parts = [out, other, other], [lse, np.full_like(lse, np.inf), np.full_like(lse, -np.inf)]
    for order in ([0, 1, 2], [1, 2, 0], [2, 1]):
        given = [[framework.array(cases.store(x[i], "plain", rng)) for i in order] for x in parts]
        with served(backend, "merge", dtype="float32"):
            got, got_lse = map(framework.numpy, fastattn.merge_states(*given))
        if 0 in order:
            assert np.array_equal(got, out) and np.allclose(got_lse, lse, atol=1e-6)
        else:
            assert (got == 0).all() and (got_lse == -np.inf).all()


def test_lengths_out_of_range_on_the_cpu():
    x = np.ones((2, 1, 3, 4), np.float32)
    long = np.ones((2, 1, 5, 4), np.float32)
    packed, cu = np.ones((5, 1, 4), np.float32), np.array([0, 3, 5], np.int32)
    for name, numbers, sentence in (
        ("q_lengths", (4, 3), "`q_lengths` must be at most the 3 queries of sequence 0, got 4"),
        ("q_lengths", (3, -1), "`q_lengths` must be at least 0, got -1 for sequence 1"),
        ("k_lengths", (5, 6), "`k_lengths` must be at most the 5 keys of sequence 1, got 6"),
        ("k_lengths", (-5, 2), "`k_lengths` must be at least 0, got -5 for sequence 0"),
        ("k_start", (0, 6), "`k_start` must be at most the 5 keys of sequence 1, got 6"),
        ("k_start", (0, -2), "`k_start` must be at least 0, got -2 for sequence 1"),
    ):
        out = np.full_like(x, 7)
        for call in (
            fastattn.attention,
            lambda *a, **k: fastattn.explain(fastattn.attention, *a, **k),
        ):
            with pytest.raises(ValueError, match=sentence):
                call(x, long, long, **{name: np.array(numbers, np.int32)}, out=out)
        assert (out == 7).all()
    for name, numbers, sentence in (
        ("seqused_k", (5, 5), "`seqused_k` must be at most the 3 rows of sequence 0, got 5"),
        ("seqused_q", (3, 3), "`seqused_q` must be at most the 2 rows of sequence 1, got 3"),
        ("seqused_q", (-1, 2), "`seqused_q` must be at least 0, got -1 for sequence 0"),
    ):
        used = {name: np.array(numbers, np.int32)}
        with pytest.raises(ValueError, match=sentence):
            fastattn.attention_varlen(packed, packed, packed, cu, cu, 3, 3, **used)
