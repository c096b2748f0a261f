"""attention_sparse: packed sequences, storage, threads, and what it is beside dense attention."""

import fastattn
import numpy as np
import pytest
import reference_sparse
import sparse_cases
from conftest import needs
from sparse_cases import NAMES, random_call, run

FULL = {"q_block": 64, "k_block": 64}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def every_block(b, hk, sq, sk, q_block=64, k_block=64):
    blocks = np.arange(-(-sk // k_block), dtype=np.int32)
    return np.broadcast_to(blocks, (b, hk, -(-sq // q_block), len(blocks)))


@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"window": (70, 3)}, {"softcap": 2.0}])
def test_all_blocks_are_dense_attention(keywords):
    q, k, v = normal(2, 4, 150, 24), normal(2, 2, 190, 24, seed=1), normal(2, 2, 190, 16, seed=2)
    lists = every_block(2, 2, 150, 190)
    want, lse = fastattn.attention(q, k, v, return_lse=True, **keywords)
    got = fastattn.attention_sparse(q, k, v, lists, **FULL, return_lse=True, **keywords)
    for x, y in zip(got, (want, lse), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
    dout = normal(*want.shape, seed=3)
    wanted = fastattn.attention_backward(dout, q, k, v, want, lse, **keywords)
    found = fastattn.attention_sparse_backward(dout, q, k, v, *got, lists, **FULL, **keywords)
    for x, y in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def test_parts_of_many_rows_add_up():
    """One group of heads: its rows are cut in parts, each with sums of its own."""
    q, k, v = normal(1, 4, 700, 16), normal(1, 1, 300, 16, seed=1), normal(1, 1, 300, 16, seed=2)
    lists, sink = every_block(1, 1, 700, 300), normal(4, seed=3)
    out, lse = fastattn.attention(q, k, v, sink=sink, return_lse=True)
    given = {"sink": sink, "need_dsink": True}
    wanted = fastattn.attention_backward(q, q, k, v, out, lse, **given)
    found = fastattn.attention_sparse_backward(q, q, k, v, out, lse, lists, **FULL, **given)
    for x, y in zip(found, wanted, strict=True):
        if y is not None:
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


def test_the_union_of_a_window_alone_is_a_window():
    q, k, v = normal(1, 2, 150, 24), normal(1, 2, 150, 24, seed=1), normal(1, 2, 150, 24, seed=2)
    none = np.zeros((1, 1, 150, 0), np.int32)
    want = fastattn.attention(q, k, v, causal=True, window=(30, 0))
    got = fastattn.attention_sparse(q, k, v, none, causal=True, window_union=(30, 0))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [(9, 3), (9, 40), (70, 3), (70, 40), (-20, 60)])
@pytest.mark.parametrize("union", [(9, 3), (9, 40), (70, 3), (70, 40), (20, -10), (None, 3)])
def test_keys_beside_the_union_alone_are_read(window, union):
    """Windows that reach further on neither, either or both sides; keys no row sees are NaN."""
    arrays = {"q": normal(1, 1, 100, 8), "k": normal(1, 1, 150, 8), "v": normal(1, 1, 150, 8)}
    arrays["key_lists"] = np.array([[[[0, 3, 5], [7, -1, 2]]]], np.int32)
    keywords = {"q_block": 64, "k_block": 16, "window": window, "window_union": union}
    keywords["k_lengths"] = np.array([140], np.int32)
    dout, dlse = normal(1, 1, 100, 8, seed=3), normal(1, 1, 100, seed=4)
    results = run(sparse_cases.Call(arrays, keywords, dout, dlse), poison=True)
    given = {"dout": dout, "dlse": dlse, **keywords}
    assert not reference_sparse.complaints(results, *arrays.values(), **given)


def test_a_block_that_is_named_twice_counts_twice():
    """Cut by the diagonal, too; and each entry has a gate of its own."""
    q, k, v = normal(1, 2, 130, 8), normal(1, 2, 130, 8, seed=1), normal(1, 2, 130, 8, seed=2)
    lists = np.array([[0, 0, 1, -1, 1, 1], [1, 0, 1, 2, 2, 0], [2, 2, 1, 0, 0, 2]], np.int32)
    lists = np.broadcast_to(lists, (1, 2, 3, 6))
    gate = np.random.default_rng(4).uniform(0, 1, lists.shape).astype(np.float32)
    for keywords in ({}, {"causal": True}, {"causal": True, "window_union": (20, 0)}):
        keywords |= {**FULL, "gate": gate, "key_gate": True}
        dout, dlse = normal(1, 2, 130, 8, seed=5), normal(1, 2, 130, seed=6)
        out, lse, mass = fastattn.attention_sparse(
            q, k, v, lists, **keywords, return_lse=True, return_mass=True
        )
        found = fastattn.attention_sparse_backward(
            dout, q, k, v, out, lse, lists, dlse=dlse, need_dgate=True, **keywords
        )
        results = dict(zip(NAMES, found, strict=True), out=out, lse=lse, mass=mass)
        del results["dsink"]
        assert not reference_sparse.complaints(
            results, q, k, v, lists, dout=dout, dlse=dlse, **keywords
        )


def test_parts_merge():
    """A gate is not in the lse: lists of disjoint keys merge as parts of the keys do."""
    q, k, v = normal(1, 2, 90, 8), normal(1, 2, 256, 8, seed=1), normal(1, 2, 256, 8, seed=2)
    lists = np.random.default_rng(3).permutation(4).astype(np.int32)
    lists = np.broadcast_to(lists, (1, 2, 2, 4))
    gate = np.random.default_rng(4).uniform(0, 1, lists.shape).astype(np.float32)
    whole = fastattn.attention_sparse(q, k, v, lists, gate=gate, **FULL, return_lse=True)
    parts = [
        fastattn.attention_sparse(
            q, k, v, lists[..., x], gate=gate[..., x], **FULL, return_lse=True
        )
        for x in (slice(0, 1), slice(1, 4))
    ]
    for x, y in zip(fastattn.merge_states(*zip(*parts, strict=True)), whole, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("seed", range(12))
def test_packed_sequences(seed):
    sparse_cases.check_packed(seed, "float32")


@pytest.mark.parametrize("seed", range(100, 106))
def test_strides_and_layouts_change_nothing(seed):
    call = random_call(seed, "float32")
    want = run(call, poison=False)
    arrays, keywords = call.arrays, dict(call.keywords)

    def sparse(x):  # every other element of a larger array, the axes swapped in memory
        wide = np.full([2 * n for n in x.shape[::-1]], 77, x.dtype)
        view = wide[(slice(None, None, 2),) * x.ndim].T
        view[...] = x
        return view[..., ::-1][..., ::-1]

    for name in ("counts", "gate", "k_lengths", "q_lengths", "k_start", "sink"):
        if name in keywords:
            keywords[name] = sparse(keywords[name])
    swapped = [sparse(arrays[n].swapaxes(1, 2)) for n in "qkv"]
    out, lse, mass = fastattn.attention_sparse(
        *(*swapped, sparse(arrays["key_lists"])),
        **keywords,
        layout="bshd",
        return_lse=True,
        return_mass=True,
    )
    results = {"out": out.swapaxes(1, 2), "lse": lse, "mass": mass}
    needs = {"need_dgate": "gate" in keywords, "need_dsink": "sink" in keywords}
    found = fastattn.attention_sparse_backward(
        *(sparse(call.dout.swapaxes(1, 2)), *swapped, out, lse, sparse(arrays["key_lists"])),
        dlse=call.dlse,
        layout="bshd",
        **needs,
        **keywords,
    )
    for name, x in zip(NAMES, found, strict=True):
        if x is not None:
            results[name] = x.swapaxes(1, 2) if name in ("dq", "dk", "dv") else x
    assert results.keys() == want.keys()
    for name, x in results.items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)


def test_threads_change_no_bit():
    """Few groups, so that their rows are cut in parts; entries that groups share, too."""
    q, k, v = (normal(1, h, 1200, 16, seed=h) for h in (4, 2, 2))
    rng = np.random.default_rng(0)
    before, found = fastattn.get_num_threads(), []
    for q_block, lead in ((1, 2), (64, 1)):
        lists = rng.integers(-1, 75, (1, lead, -(-1200 // q_block), 6)).astype(np.int32)
        gate = rng.uniform(0, 1, lists.shape).astype(np.float32)
        keywords = {"q_block": q_block, "k_block": 16, "gate": gate, "sink": normal(4)}
        for threads in (1, 2, 5):
            fastattn.set_num_threads(threads)
            out, lse, mass = fastattn.attention_sparse(
                q, k, v, lists, **keywords, return_lse=True, return_mass=True
            )
            gradients = fastattn.attention_sparse_backward(
                *(q, q, k, v, out, lse, lists), need_dgate=True, need_dsink=True, **keywords
            )
            found.append([x.copy() for x in (out, lse, mass, *gradients)])
        for others in found[1:]:
            for x, y in zip(found[0], others, strict=True):
                assert np.array_equal(x, y)
        found.clear()
    fastattn.set_num_threads(before)


def test_nothing_at_all():
    lists = np.zeros((1, 1, 0, 3), np.int32)
    empty = np.zeros((1, 2, 0, 8), np.float32)
    out, lse = fastattn.attention_sparse(empty, empty, empty, lists, return_lse=True)
    assert out.shape == (1, 2, 0, 8) and lse.shape == (1, 2, 0)
    q, lists = normal(1, 2, 5, 8), np.zeros((1, 1, 5, 3), np.int32)
    sink = np.array([1, -2], np.float32)
    out, lse, mass = fastattn.attention_sparse(
        q, empty, empty, lists, sink=sink, return_lse=True, return_mass=True
    )
    assert (out == 0).all() and (mass == 0).all()
    assert (lse == sink[:, None]).all()


@needs("torch")
def test_explain():
    q, lists = normal(1, 2, 5, 8), np.zeros((1, 1, 5, 3), np.int32)
    said = fastattn.explain(fastattn.attention_sparse, q, q, q, lists)
    assert said.backend == "cpu" and said.kernel.startswith("cpu_")
    out, lse = fastattn.attention_sparse(q, q, q, lists, return_lse=True)
    said = fastattn.explain(fastattn.attention_sparse_backward, q, q, q, q, out, lse, lists)
    assert said.backend == "cpu" and "bwd" in said.kernel
