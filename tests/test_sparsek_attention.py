"""sparsek_attention against its definition: random calls, forward and gradients; and by hand."""

import fastattn
import numpy as np
import pytest
import reference_sparsek_attention
import sparsek_attention_cases
from conftest import python
from sparsek_attention_cases import NAMES, random_call, run

INF = np.inf


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_random_calls(dtype):
    for seed in range(8):
        call = random_call(seed, dtype)
        results = run(call, poison=seed % 2 == 1)
        given = {**call.keywords, "dout": call.dout, "dlse": call.dlse}
        said = reference_sparsek_attention.complaints(
            results, *call.arrays.values(), call.k, **given
        )
        assert not said, f"seed {seed}: {call}: {said}"


def test_random_calls_draw_every_argument():
    drawn = [random_call(seed).keywords for seed in range(300)]
    for name in ("keep_all", "key_gate", "q_offset", "k_lengths", "q_lengths", "k_start"):
        assert sum(name in x for x in drawn) >= 30, name
    for name in ("softcap", "sink", "scale"):
        assert sum(name in x for x in drawn) >= 30, name


def test_a_wrong_result_is_reported():
    call = random_call(45, "float32")
    results = run(call)
    given = {**call.keywords, "dout": call.dout, "dlse": call.dlse}
    for name in ("out", "lse", "tau", "dk", "dscores"):
        wrong = {n: x.copy() for n, x in results.items()}
        at = np.unravel_index(
            np.argmax(np.abs(np.where(np.isfinite(x := wrong[name]), x, 0))), x.shape
        )
        wrong[name][at] *= 1.01
        assert reference_sparsek_attention.complaints(
            wrong, *call.arrays.values(), call.k, **given
        ), name


def test_by_hand():
    """Scores 2, 1.5, 0 for key 0 to 2, k 1, no window: gates 0.75 and 0.25 from the second on."""
    scores = np.array([[[2, 1.5, 0, 9]]], np.float32)
    q, v = np.zeros((1, 1, 4, 1), np.float32), np.float32([1, 10, 100, 1000]).reshape(1, 1, 4, 1)
    find = fastattn.sparsek_attention
    out, tau, ends = find(q, q, v, scores, 1, window=0, return_selection=True)
    assert tau.ravel().tolist() == [-INF, 1.25, 1.25, 5]  # a plateau's middle at last
    assert ends.ravel().tolist() == [3, 0, 0, 4]  # of the greatest one is seen
    assert out.ravel().tolist() == [1, 0.75, 0.75, 1000]
    out, ends = find(q, q, v, scores, 1, window=0, keep_all=True, return_selection=True)[::2]
    assert ends.ravel().tolist() == [3, 3, 0, 4]
    assert out.ravel().tolist() == [1, (0.75 + 2.5) / 2, (0.75 + 2.5) / 2, 1000]
    out = find(q, q, v, scores, 1, window=2)  # candidates only from two before on
    np.testing.assert_allclose(out.ravel(), [1, 5.5, 111 / 3, (0.75 + 100 + 1000) / 3], rtol=1e-6)


def test_all_keys_are_dense_attention():
    q, k, v = normal(2, 4, 90, 24), normal(2, 2, 90, 24, seed=1), normal(2, 2, 90, 16, seed=2)
    scores = normal(2, 2, 90, seed=3)
    want, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    for given in ({"k_keep": 90, "window": 0}, {"k_keep": 0, "window": 90}):
        got = fastattn.sparsek_attention(q, k, v, scores, **given, return_lse=True)
        for x, y in zip(got, (want, lse), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


def test_equal_scores_keep_the_first_keys():
    """Gates of k / m; the lower key number is the greater. With keep_all all are seen."""
    m, k = 200, 7
    q, v = np.zeros((1, 1, m, 4), np.float32), normal(1, 1, m, 4)
    scores = np.ones((1, 1, m), np.float32)
    out = fastattn.sparsek_attention(q, q, v, scores, k, window=0)
    np.testing.assert_allclose(out[0, 0, -1], k / m * v[0, 0, :k].mean(0), rtol=1e-5)
    out = fastattn.sparsek_attention(q, q, v, scores, k, window=0, keep_all=True)
    np.testing.assert_allclose(out[0, 0, -1], k / m * v[0, 0].mean(0), rtol=1e-4, atol=1e-7)


def test_a_nan_reaches_the_rows_that_have_it_as_a_candidate():
    q, k, v = normal(1, 1, 90, 8), normal(1, 1, 90, 8, seed=1), normal(1, 1, 90, 8, seed=2)
    scores = normal(1, 1, 90, seed=3)
    want = fastattn.sparsek_attention(q, k, v, scores, 5, window=4)
    scores[0, 0, 40] = np.nan
    for keep_all in (False, True):
        out, tau, _ = fastattn.sparsek_attention(
            q, k, v, scores, 5, window=4, keep_all=keep_all, return_selection=True
        )
        assert np.isnan(out[0, 0, 44:]).all() and np.isnan(tau[0, 0, 44:]).all()
        assert np.isfinite(out[0, 0, :44]).all() and np.isfinite(tau[0, 0, 9:44]).all()
        if not keep_all:
            np.testing.assert_array_equal(out[0, 0, :44], want[0, 0, :44])


@pytest.mark.parametrize("seed", range(6))
def test_parts_of_the_queries_are_the_whole(seed):
    """A later part goes on where an earlier ended: by q_offset, with all keys before."""
    call = random_call(seed, "float32")
    q = normal(1, 2, 300, 16, seed=seed)
    k, v = normal(1, 1, 300, 16, seed=9), normal(1, 1, 300, 8, seed=10)
    scores = sparsek_attention_cases.random_scores(np.random.default_rng(seed), (1, 1, 300))
    given = {"k_keep": 11.5, "window": 20, "keep_all": call.keywords.get("keep_all", False)}
    scores = scores.astype(np.float32)
    whole = fastattn.sparsek_attention(q, k, v, scores, **given, return_selection=True)
    for first, n in ((0, 70), (70, 1), (71, 229), (299, 1)):
        part = fastattn.sparsek_attention(
            q[:, :, first : first + n], k, v, scores, **given, q_offset=first, return_selection=True
        )
        np.testing.assert_allclose(part[0], whole[0][:, :, first : first + n], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(part[1], whole[1][:, :, first : first + n])


@pytest.mark.parametrize("seed", range(6))
def test_packed_sequences(seed):
    """Each is the call of its own; rows in no sequence give 0, and have gradients of 0."""
    rng = np.random.default_rng(seed)
    n, tail = rng.integers(0, 150, (2, 3)), rng.integers(0, 9, 2)
    hk, group, d, dv = 2, rng.choice([1, 2]), 16, 8
    q = normal(n[0].sum() + tail[0], hk * group, d, seed=seed)
    k, v = (normal(n[1].sum() + tail[1], hk, w, seed=seed + 9 * w) for w in (d, dv))
    scores, sink = normal(hk, len(k), seed=4), normal(hk * group, seed=7)
    cu = [np.append(0, np.cumsum(x)).astype(np.int32) for x in n]
    ends = (*cu, int(n[0].max()), int(n[1].max()))
    given = {"window": 9, "sink": sink, "key_gate": bool(seed % 2)}
    out, lse, tau, last = fastattn.sparsek_attention_varlen(
        *(q, k, v, scores, 6.5, *ends), **given, return_lse=True, return_selection=True
    )
    dout, dlse = normal(*out.shape, seed=8), normal(*lse.shape, seed=9)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    needs = {"need_dsink": True, **given}
    packed = fastattn.sparsek_attention_backward(
        *(dout, q, k, v, scores, 6.5, out, lse, tau, last),
        **{"dlse": dlse, **needs, **dict(zip(names, ends, strict=True))},
    )
    of_sink = np.zeros_like(sink)
    for b in range(3):
        rows, keys = (slice(cu[i][b], cu[i][b + 1]) for i in (0, 1))
        alone = [x[None, part] for x, part in ((q, rows), (k, keys), (v, keys))]
        alone += [scores[None, :, keys], 6.5]
        got = fastattn.sparsek_attention(
            *alone, **given, layout="bshd", return_lse=True, return_selection=True
        )
        for x, y in zip(got, (out[rows], lse[:, rows], tau[:, rows], last[:, keys]), strict=True):
            np.testing.assert_array_equal(x[0], y)
        found = fastattn.sparsek_attention_backward(
            *(dout[None, rows], *alone, *got),
            **{"dlse": dlse[None, :, rows], **needs, "layout": "bshd"},
        )
        wanted = packed[0][rows], packed[1][keys], packed[2][keys], packed[3][:, keys]
        for x, y in zip(found[:4], wanted, strict=True):
            np.testing.assert_allclose(x[0], y, rtol=1e-4, atol=1e-5)
        of_sink += found[4]
    np.testing.assert_allclose(packed[4], of_sink, rtol=1e-4, atol=1e-5)
    assert (out[cu[0][3] :] == 0).all() and (lse[:, cu[0][3] :] == -INF).all()
    assert (packed[0][cu[0][3] :] == 0).all() and (packed[1][cu[1][3] :] == 0).all()
    assert (packed[3][:, cu[1][3] :] == 0).all() and (last[:, cu[1][3] :] == 0).all()


@pytest.mark.parametrize("seed", range(100, 104))
def test_strides_and_layouts_change_nothing(seed):
    call = random_call(seed, "float32")
    want = run(call)

    def sparse(x):  # every other element of a larger array, the axes swapped in memory
        wide = np.full([2 * n for n in x.shape[::-1]], 77, x.dtype)
        view = wide[(slice(None, None, 2),) * x.ndim].T
        view[...] = x
        return view

    keywords = {n: sparse(x) if isinstance(x, np.ndarray) else x for n, x in call.keywords.items()}
    *qkv, scores = call.arrays.values()
    given = [*(sparse(x.swapaxes(1, 2)) for x in qkv), sparse(scores), call.k]
    out, lse, tau, ends = fastattn.sparsek_attention(
        *given, **keywords, layout="bshd", return_lse=True, return_selection=True
    )
    found = fastattn.sparsek_attention_backward(
        *(sparse(call.dout.swapaxes(1, 2)), *given, out, lse, sparse(tau), sparse(ends)),
        **{"dlse": call.dlse, "layout": "bshd", "need_dsink": "sink" in keywords, **keywords},
    )
    results = {"out": out, "lse": lse, "tau": tau, "ends": ends}
    results |= {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}
    for name, x in results.items():
        swaps = name in ("out", "dq", "dk", "dv")
        np.testing.assert_array_equal(x.swapaxes(1, 2) if swaps else x, want[name], err_msg=name)


def test_threads_change_no_bit():
    q, k, v = (normal(1, h, 1200, 16, seed=h) for h in (4, 2, 2))
    scores, sink = normal(1, 2, 1200, seed=5), normal(4)
    before, found = fastattn.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            fastattn.set_num_threads(threads)
            results = fastattn.sparsek_attention(
                *(q, k, v, scores, 40.5),
                **{"window": 30, "sink": sink, "return_lse": True, "return_selection": True},
            )
            gradients = fastattn.sparsek_attention_backward(
                q, q, k, v, scores, 40.5, *results, window=30, sink=sink, need_dsink=True
            )
            found.append([x.copy() for x in (*results, *gradients)])
    finally:
        fastattn.set_num_threads(None)
    assert fastattn.get_num_threads() == before
    for others in found[1:]:
        for x, y in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 0, 5, 5), (1, 2, 0, 5), (1, 2, 5, 0)])
def test_empty_shapes(shape):
    b, h, sq, sk = shape
    q, k, scores = normal(b, h, sq, 8), normal(b, h, sk, 8), normal(b, h, sk)
    results = fastattn.sparsek_attention(
        q, k, k, scores, 2, window=1, return_lse=True, return_selection=True
    )
    assert [x.shape for x in results] == [q.shape, (b, h, sq), (b, h, sq), (b, h, sk)]
    assert (results[0] == 0).all()
    found = fastattn.sparsek_attention_backward(q, q, k, k, scores, 2, *results, window=1)
    for x, y in zip(found[:4], (q, k, k, scores), strict=True):
        assert x.shape == y.shape and (x == 0).all()


def test_memory_is_of_the_keys_and_the_rows():
    """20,000 queries of 500 keys each: lists of them would be 80 MB, their gates as many."""
    program = """
import resource, fastattn, numpy as np
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 1, 20_000, 8), np.float32) for _ in range(3))
scores = rng.standard_normal((1, 1, 20_000), np.float32)
def one(n):
    part = [x[:, :, :n] for x in (q, k, v, scores)]
    found = fastattn.sparsek_attention(
        *part, 500, window=9, return_lse=True, return_selection=True)
    fastattn.sparsek_attention_backward(part[0], *part, 500, *found, window=9)
one(1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
one(20_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(python("-c", program)) < 24_000  # kB
