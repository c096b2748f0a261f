"""attention_varlen with a page_table: prompts and single tokens over one cache in pages."""

import re

import cases
import fastattn
import numpy as np
import pytest
import reference
from conftest import needs

Q_LENGTHS, K_LENGTHS = (20, 1, 0, 1, 70, 3), (50, 47, 9, 0, 70, 2)
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (30, 2), "batch_invariant": True},
    "offsets": {"q_offset": np.array([3, 40, 0, 1, -2, 5], np.int32), "causal": True},
    "a bool mask": {"mask": np.random.default_rng(1).random((6, 1, 70, 70)) < 0.7},
    "a float mask": {"mask": np.random.default_rng(1).normal(size=(4, 70, 70)).astype("f4")},
    "scores": {"softcap": 2.0, "sink": np.arange(4, dtype=np.float32), "scale": -0.3},
    "slopes": {"alibi_slopes": np.random.default_rng(1).random((6, 4)).astype("f4")},
    "dropout": {"dropout_p": 0.4, "seed": 11},
    "used": {"seqused_q": np.array([4, 1, 0, 0, 64, 3], np.int32), "causal": True},
}


def ends(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def arrays(size, dtype="float32", d=16, dv=24, k_lengths=K_LENGTHS, seed=0):
    """q, packed k and v; the pages, the table. What no key is in is NaN, or names no page."""
    rng, dtype = np.random.default_rng(seed), cases.dtype_of(dtype)
    columns = -(-max(k_lengths) // size) + 1
    order = rng.permutation(len(k_lengths) * columns).reshape(-1, columns)
    q = rng.standard_normal((sum(Q_LENGTHS) + 2, 4, d)).astype(dtype)
    packed, pages = [], []
    for n in (d, dv):
        packed.append(rng.standard_normal((sum(k_lengths), 2, n)).astype(dtype))
        pages.append(np.full((order.size, size, 2, n), np.nan, dtype))
        for sequence, (start, keys) in enumerate(zip(ends(k_lengths), k_lengths, strict=False)):
            for j in range(keys):
                pages[-1][order[sequence, j // size], j % size] = packed[-1][start + j]
    used = np.arange(columns) * size < np.array(k_lengths)[:, None]
    table = np.where(used, order, rng.choice([-1, 2**30, 9999], order.shape)).astype(np.int32)
    return q, packed, pages, table


def attend(q, k, v, cu_k, *, framework=None, k_lengths=K_LENGTHS, **keywords):
    framework = framework or cases.NumPy()

    def given(x):
        return framework.array(cases.store(x, "plain", None)) if isinstance(x, np.ndarray) else x

    q, k, v, cu_q, cu_k = map(given, (q, k, v, ends(Q_LENGTHS), cu_k))
    keywords = {name: given(x) for name, x in keywords.items()}
    most = max(Q_LENGTHS), max(k_lengths)
    found = fastattn.attention_varlen(q, k, v, cu_q, cu_k, *most, return_lse=True, **keywords)
    return [framework.numpy(x) for x in found]


def paged(q, pages, table, k_lengths=K_LENGTHS, **keywords):
    n = np.array(k_lengths, np.int32)
    more = {"page_table": table, "seqused_k": n, "k_lengths": k_lengths}
    return attend(q, *pages, None, **more, **keywords)


@pytest.mark.parametrize("size", [1, 3, 16, 64, 128])
@pytest.mark.parametrize("name", FEATURES)
def test_pages_change_no_bit(name, size):
    dtype = cases.DTYPES[(list(FEATURES).index(name) + size) % 4]
    q, packed, pages, table = arrays(size, dtype)
    want = attend(q, *packed, ends(K_LENGTHS), **FEATURES[name])
    got = paged(q, pages, table, **FEATURES[name])
    assert all(x.tobytes() == y.tobytes() for x, y in zip(got, want, strict=True))


def test_split_keys_change_no_bit():
    """Few rows of many keys, whose splits threads share."""
    lengths = (5000, 3, 0, 2100, 80, 1024)
    q, packed, pages, table = arrays(48, k_lengths=lengths)
    want = attend(q, *packed, ends(lengths), k_lengths=lengths, causal=True)
    got = paged(q, pages, table, lengths, causal=True)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("size", [2, 64])
def test_by_the_reference(size, dtype):
    q, packed, pages, table = arrays(size, dtype)
    out, lse = paged(q, pages, table, causal=True, window=(33, None))
    k_ends = ends(K_LENGTHS)
    for n, (a, b) in enumerate(zip(ends(Q_LENGTHS)[:-1], ends(Q_LENGTHS)[1:], strict=True)):
        keys = slice(k_ends[n], k_ends[n + 1])
        own = (x[None].swapaxes(1, 2) for x in (q[a:b], packed[0][keys], packed[1][keys]))
        said = out[None, a:b].swapaxes(1, 2), lse[None, :, a:b]
        assert not reference.check(*said, *own, causal=True, window=(33, None))
    assert not out[-2:].any() and (lse[:, -2:] == -np.inf).all()


@needs("torch")
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_torch_and_its_graphs(dtype):
    import torch

    q, packed, pages, table = arrays(16, dtype)
    want = attend(q, *packed, ends(K_LENGTHS), causal=True)
    got = paged(q, pages, table, causal=True, framework=cases.Torch("cpu"))
    assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))
    framework = cases.Torch("cpu")
    tensors = [
        framework.array(cases.store(x, "plain", None))
        for x in (q, *pages, ends(Q_LENGTHS), table, np.array(K_LENGTHS, np.int32))
    ]

    def call(q, k, v, cu, table, n):
        rest = {"page_table": table, "seqused_k": n, "causal": True}
        return fastattn.attention_varlen(q, k, v, cu, None, 70, 70, **rest)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert np.array_equal(framework.numpy(compiled(*tensors)), want[0])
    tensors[0].requires_grad_()
    for function in (call, compiled):
        with pytest.raises(Exception, match="must be None where a gradient is asked for"):
            function(*tensors)
        with torch.no_grad():
            assert np.array_equal(framework.numpy(function(*tensors)), want[0])


@needs("jax")
def test_jax_reads_pages_but_in_no_program():
    import jax
    import jax.numpy as jnp

    q, packed, pages, table = arrays(16)
    want = attend(q, *packed, ends(K_LENGTHS))[0]
    given = [jnp.asarray(x) for x in (q, *pages, ends(Q_LENGTHS))]
    rest = {"page_table": jnp.asarray(table), "seqused_k": jnp.asarray(K_LENGTHS, jnp.int32)}

    def call(q, k, v, cu):
        return fastattn.attention_varlen(q, k, v, cu, None, 70, 70, **rest)

    assert np.array_equal(call(*given), want)
    with pytest.raises(NotImplementedError, match="`page_table` must be None in JAX's programs"):
        jax.jit(call)(*given)


def ones(*shape):
    return np.ones(shape, np.float32)


def ints(*values, dtype=np.int32):
    return np.array(values, dtype)


RIGHT = {
    "q": ones(5, 4, 8),
    "k": ones(7, 2, 2, 8),
    "v": ones(7, 2, 2, 8),
    "cu_seqlens_q": ints(0, 2, 5),
    "cu_seqlens_k": None,
    "max_seqlen_q": 3,
    "max_seqlen_k": 6,
    "page_table": ints([0, 4, -1], [3, 1, 6]),
    "seqused_k": ints(4, 6),
}
WRONG = [
    (ValueError, {"seqused_k": None}, "`seqused_k` must be given with `page_table`, got None"),
    (
        ValueError,
        {"cu_seqlens_k": ints(0, 1, 2)},
        "`cu_seqlens_k` must be None with `page_table`, where `seqused_k` says how many",
    ),
    (
        ValueError,
        {"k": ones(7, 2, 8)},
        "`k` must have 4 dimensions (num_pages, page_size, hk, d), got 3",
    ),
    (ValueError, {"v": ones(7, 3, 2, 8)}, "`v` must have page_size = 2 like `k`, got 3"),
    (ValueError, {"k": ones(7, 2, 2, 9)}, "`k` must have d = 8 like `q`, got 9"),
    (
        ValueError,
        {"k": ones(7, 0, 2, 8), "v": ones(7, 0, 2, 8)},
        "`k` must have page_size from 1 to 1073741823, got 0",
    ),
    (ValueError, {"q": ones(2, 5, 4, 8)}, "`q` must have 3 dimensions (total_q, hq, d), got 4"),
    (
        ValueError,
        {"page_table": ints(0, 1)},
        "`page_table` must have 2 dimensions (b, pages), got 1",
    ),
    (
        ValueError,
        {"page_table": ints([0, 1, 2])},
        "`page_table` must have b = 2 like `cu_seqlens_q`, got 1",
    ),
    (
        TypeError,
        {"page_table": ints([0, 4, 1], [3, 1, 6], dtype=np.int64)},
        '`page_table` must be int32, got int64: pass page_table.astype("int32")',
    ),
    (
        ValueError,
        {"max_seqlen_k": 7},
        "`max_seqlen_k` must be from 0 to the 6 keys that `page_table` has room for, got 7",
    ),
    (
        ValueError,
        {"max_seqlen_k": -1},
        "`max_seqlen_k` must be from 0 to the 6 keys that `page_table` has room for, got -1",
    ),
    (ValueError, {"seqused_k": ints(4, 7)}, "`seqused_k` must be at most the 6 keys of sequence 1"),
    (ValueError, {"seqused_k": ints(-1, 6)}, "`seqused_k` must be at least 0, got -1"),
    (
        ValueError,
        {"page_table": ints([0, 7, -1], [3, 1, 6])},
        "`page_table` must name pages from 0 to 6, got 7 for key 2 of sequence 0",
    ),
    (ValueError, {"seqused_k": ints(5, 6)}, "from 0 to 6, got -1 for key 4 of sequence 0"),
    (ValueError, {"cu_seqlens_q": ints([0, 2, 5])}, "`cu_seqlens_q` must have 1 dimensions"),
    (
        ValueError,
        {"cu_seqlens_q": ints(0, 2, 6)},
        "`cu_seqlens_q` must not run past `q`'s 5 rows, got 6",
    ),
    (NotImplementedError, {"backend": "sm90"}, "sm90"),
]


@pytest.mark.parametrize(("error", "given", "sentence"), WRONG, ids=[row[2] for row in WRONG])
def test_what_is_refused(error, given, sentence):
    out = np.full((5, 4, 8), 7, np.float32)
    with pytest.raises(error, match=re.escape(sentence)):
        fastattn.attention_varlen(**RIGHT | {"out": out} | given)
    assert (out == 7).all()


def test_what_these_calls_were_changed_from_is_served():
    assert (fastattn.attention_varlen(**RIGHT) == 1).all()
    unseen = {"page_table": ints([99, 4, -1], [-5, 2**31 - 1, 6]), "window": (1, None)}
    unseen |= {"cu_seqlens_q": ints(0, 1, 2), "causal": True}
    assert (fastattn.attention_varlen(**RIGHT | unseen)[:2] == 1).all()
    nothing = {"seqused_k": ints(0, 0), "k": ones(0, 2, 2, 8), "v": ones(0, 2, 2, 8)}
    assert not fastattn.attention_varlen(**RIGHT | nothing | {"max_seqlen_k": 0}).any()


def test_out_overlaps_no_page_and_no_table():
    k = ones(7, 2, 2, 8)
    given = RIGHT | {"k": k, "out": k.reshape(-1)[:160].reshape(5, 4, 8)}
    with pytest.raises(ValueError, match="`out` must not overlap `k` in memory"):
        fastattn.attention_varlen(**given)
    table = np.zeros(160, np.int32)
    given = RIGHT | {"page_table": table[:6].reshape(2, 3)}
    with pytest.raises(ValueError, match="`out` must not overlap `page_table` in memory"):
        fastattn.attention_varlen(**given, out=table.view(np.float32).reshape(5, 4, 8))
