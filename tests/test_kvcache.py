"""attention_kvcache: new queries to a cache, into which new keys and values are written first."""

from dataclasses import replace

import cases
import fastattn
import kvcache_cases
import numpy as np
import pytest
from conftest import LEVELS, needs, python
from kvcache_cases import Case

PAGED = {"page_size": 16, "room": 48}
FEATURES = {
    "plain": {},
    "no new keys": {"s_new": None},
    "nothing new": {"s_new": 0, "page_size": 4},
    "no queries": {"sq": 0, "s_new": 3, "mass": True},
    "no sequence": {"b": 0, "mass": True},
    "an int": {"lengths": "int", "b": 3},
    "entries": {"batch_idx": True, "leftpad": True},
    "one row of a batch": {"b": 1, "batch_idx": True},
    "pages": {**PAGED, "sq": 3, "s_new": 3},
    "pages of 1": {"page_size": 1, "sq": 2, "s_new": 5, "mass": True},
    "pages of 3": {"page_size": 3, "room": 45, "sq": 2, "leftpad": True, "hq": 2},
    "pages of a block": {"page_size": 64, "room": 192, "sq": 17, "s_new": 17, "d": 64, "dv": 32},
    "large pages": {"page_size": 256, "room": 512, "d": 64, "dv": 64},
    "many rows": {"sq": 70, "s_new": 70, "room": 130, "page_size": 10, "rotary": 16},
    "more rows than new keys": {"sq": 20, "s_new": 2, "rotary": 8, "causal": False},
    "splits": {"room": 2100, "page_size": 700, "seed": 4, "d": 8, "dv": 8, "sink": True},
    "rotary": {"rotary": 16, "sq": 3, "s_new": 3},
    "rotary pairs": {"rotary": 8, "interleaved": True, "sq": 3, "s_new": 3, **PAGED},
    "rotary at one place": {"rotary": 16, "sq": 3, "s_new": 3, "causal": False},
    "rotary and a window": {"rotary": 4, "sq": 3, "s_new": 3, "causal": False, "window": (9, 2)},
    "rotary and half a window": {"rotary": 4, "sq": 3, "s_new": 3, "causal": False}
    | {"window": (9, None)},
    "rotary of float32": {"rotary": 16, "rotary_float32": True, "dtype": "bfloat16"},
    "rotary of nothing": {"rotary": 0, "sq": 2, "s_new": 2},
    "window": {**PAGED, "window": (5, None), "sq": 2, "s_new": 2},
    "top-left": {"causal": "top-left", "sq": 9},
    "softcap": {"softcap": 2.0, "scale": -1.0, "mass": True},
    "alibi": {"alibi": 2, **PAGED, "mass": True, "sq": 3},
    "sink": {"sink": True, "leftpad": True, "mass": True, "softcap": 1.5},
    "one head for all": {"hq": 8, "hk": 1, "sq": 4, "mass": True},
    "heads of their own": {"hq": 3, "hk": 3, **PAGED, "mass": True},
    "odd heads": {"d": 7, "dv": 35, "rotary": 6, "storage": "strided", **PAGED},
    "great heads": {"d": 288, "dv": 256, "rotary": 64, "page_size": 8},
    "values of keys": {"shared": True, "rotary": 8, "storage": "padded"},
    "the other layout": {"layout": "bhsd", "storage": "swapped", **PAGED, "out": True},
    "backwards": {"storage": "flipped", "out": True, "batch_idx": True},
    "whatever the others": {"invariant": True, "room": 1100},
    "packed": {"packed": True, "sq": 5, "b": 3, "alibi": 2, "mass": True, "sink": True},
    "packed, pages": {"packed": True, "sq": 20, "s_new": 20, "rotary": 8, **PAGED, "leftpad": True},
    "packed, entries": {"packed": True, "sq": 3, "batch_idx": True, "layout": "bhsd", "out": True},
    "packed, split": {"packed": True, "sq": 2, "room": 2100, "page_size": 700, "lengths": "int"},
    "packed, rotary at one place": {"packed": True, "sq": 4, "rotary": 16, "causal": False}
    | {"mass": True, "s_new": 2},
}


def kvcache_cases_of_all():
    """Each feature, dtypes in turn; then some at random."""
    for n, feature in enumerate(FEATURES.values()):
        yield Case(**{"seed": n, "dtype": cases.DTYPES[n % 4], **feature})
    yield from map(kvcache_cases.random_case, range(60))


def wrong():
    """What is wrong, a line a case; the last line says how many were right."""
    right = 0
    for case in kvcache_cases_of_all():
        complaints = kvcache_cases.run(case)
        right += not complaints
        if complaints:
            print(case, complaints)
    print(right, "right")


@pytest.mark.parametrize("level", LEVELS)
def test_every_feature_at_every_level(level, cpu_levels):
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    said = python("-c", "import test_kvcache; test_kvcache.wrong()", FASTATTN_CPU_LEVEL=level)
    assert said == f"{len(list(kvcache_cases_of_all()))} right\n"


def test_random_cases_draw_every_argument():
    drawn = [kvcache_cases.random_case(seed) for seed in range(1000)]
    plain = Case(seed=0, s_new=None, causal=False)
    for field in (
        "page_size",
        "batch_idx",
        "s_new",
        "leftpad",
        "rotary",
        "window",
        "softcap",
        "alibi",
        "sink",
        "scale",
        "out",
        "mass",
        "invariant",
        "causal",
        "interleaved",
        "packed",
    ):
        given = [case for case in drawn if getattr(case, field) != getattr(plain, field)]
        assert len(given) >= 100, field


@needs("torch")
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_torch(dtype):
    case = Case(seed=5, **PAGED, dtype=dtype, sq=2, s_new=2, rotary=8, mass=True, out=True)
    assert not kvcache_cases.run(case, cases.Torch("cpu"))


@needs("torch")
def test_autograd_learns_of_what_is_written():
    import torch

    q, cache = torch.randn(1, 1, 2, 8), torch.zeros(2, 1, 5, 2, 8)
    fastattn.attention_kvcache(q, *cache, 3)
    assert cache._version == 0
    fastattn.attention_kvcache(q, *cache, 3, k=q, v=q)
    assert cache._version == 2


def arrays_of(*shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [cases.dtype_of(name) for name in cases.DTYPES], ids=str)
@pytest.mark.parametrize("size", [1, 3, 64, 100, 128])
@pytest.mark.parametrize("sq", [1, 20, 70])
def test_pages_change_no_bit(dtype, size, sq):
    """Nor does it that there is a cache: attention on the gathered keys gives the same."""
    keys = 1500 // size * size
    q, k, v = arrays_of((2, sq, 4, 32), (2, keys, 2, 32), (2, keys, 2, 32), dtype=dtype)
    n = np.array([keys, keys - 131], np.int32)
    options = {"causal": True, "window": (1200, None), "layout": "bshd", "return_lse": True}
    want = fastattn.attention(q, k, v, k_lengths=n, **options)
    order = np.random.default_rng(1).permutation(2 * keys // size)
    pages = [np.empty((len(order), size, *x.shape[2:]), x.dtype) for x in (k, v)]
    for page, x in zip(pages, (k, v), strict=True):
        page[order] = x.reshape(page.shape)
    table = order.reshape(2, -1).astype(np.int32)
    got = fastattn.attention_kvcache(q, *pages, n, page_table=table, **options)
    plain = fastattn.attention_kvcache(q, k, v, n, **options)
    for x, y, z in zip(want, got, plain, strict=True):
        assert x.tobytes() == y.tobytes() == z.tobytes()


def test_a_token_of_each_sequence_packed_is_the_same_call():
    q, k, v = arrays_of((3, 1, 4, 16), (3, 40, 2, 16), (3, 40, 2, 16))
    n, ends = np.array([40, 7, 0], np.int32), np.arange(4, dtype=np.int32)
    want = fastattn.attention_kvcache(q, k, v, n, return_lse=True, return_mass=True)
    got = fastattn.attention_kvcache(
        *(q[:, 0], k, v, n), cu_seqlens_q=ends, return_lse=True, return_mass=True
    )
    assert np.array_equal(got[0], want[0][:, 0]) and np.array_equal(got[2], want[2])
    assert np.array_equal(got[1], want[1][:, :, 0].T)


@pytest.fixture
def threads():
    yield fastattn.set_num_threads
    fastattn.set_num_threads(None)


def test_threads_and_splits_change_no_bit(threads):
    case = Case(seed=1, room=2600, page_size=100, lengths="int", rotary=8, mass=True)
    inputs = kvcache_cases.Inputs(case)

    def bits(**options):
        arrays = kvcache_cases.Arrays(case, inputs, cases.NumPy())
        results = fastattn.attention_kvcache(
            *(arrays.q, arrays.k_cache, arrays.v_cache, arrays.seqlens),
            **arrays.keywords,
            **options,
            return_lse=True,
            return_mass=True,
        )
        return [x.tobytes() for x in results]

    threads(1)
    want = bits()
    threads(3)
    assert bits() == want == bits(num_splits=7) == bits(batch_invariant=True)


def test_token_by_token():
    """A prompt, then a token at a time, is attention on all of them at once."""
    q, k, v = arrays_of((2, 12, 4, 16), (2, 12, 2, 16), (2, 12, 2, 16), seed=3)
    want = fastattn.attention(q, k, v, causal=True, layout="bshd")
    k_cache, v_cache = (np.full((9, 4, 2, 16), np.nan, np.float32) for _ in "kv")
    table = np.array([[1, 5, 8, -1], [0, 3, 7, 99]], np.int32)
    n, got = np.zeros(2, np.int32), []
    for begin, end in ((0, 5), (5, 5), *((i, i + 1) for i in range(5, 12))):
        new = slice(begin, end)
        got.append(
            fastattn.attention_kvcache(
                *(q[:, new], k_cache, v_cache, n), k=k[:, new], v=v[:, new], page_table=table
            )
        )
        n += end - begin
    assert np.abs(np.concatenate(got, 1) - want).max() < 1e-6
    assert np.array_equal(k_cache[table[:, :3]].reshape(k.shape), k)


def test_results_are_what_was_asked_for():
    q, cache = np.ones((1, 2, 4, 8), np.float32), np.ones((1, 6, 2, 8), np.float32)
    call = (q, cache, cache.copy(), 5)
    out, lse, mass = fastattn.attention_kvcache(*call, return_lse=True, return_mass=True)
    assert (out.shape, lse.shape, mass.shape) == ((1, 2, 4, 8), (1, 4, 2), (1, 2, 6))
    assert np.allclose(mass[0, 0], [0.9, 0.9, 0.9, 0.9, 0.4, 0])  # two heads of 4 and 5 keys
    alone = fastattn.attention_kvcache(*call)
    second = fastattn.attention_kvcache(*call, return_mass=True)
    assert np.array_equal(alone, out) and np.array_equal(second[1], mass) and len(second) == 2


def test_mass_of_rows_without_weights():
    """Every score is -inf, or there is no key: no NaN."""
    q, v = np.ones((2, 1, 1, 4), np.float32), np.ones((2, 3, 1, 4), np.float32)
    n = np.array([3, 0], np.int32)
    call = (q, np.full_like(v, -np.inf), v, n)
    out, lse, mass = fastattn.attention_kvcache(*call, return_lse=True, return_mass=True)
    assert (out == 0).all() and (mass == 0).all() and (lse == -np.inf).all()


def test_no_pages_at_all():
    q, none = np.ones((2, 1, 2, 8), np.float32), np.ones((0, 4, 2, 8), np.float32)
    table = np.full((2, 3), 7, np.int32)
    out, mass = fastattn.attention_kvcache(q, none, none, 0, page_table=table, return_mass=True)
    assert (out == 0).all() and mass.shape == (2, 2, 0)
    with pytest.raises(ValueError, match="`cache_seqlens` must be from 0 to 0"):
        fastattn.attention_kvcache(q, none, none, 1, page_table=table)


def test_explain():
    q, cache = np.ones((1, 1, 4, 8), np.float32), np.zeros((1, 6, 2, 8), np.float32)
    new = np.ones((1, 1, 2, 8), np.float32)
    said = fastattn.explain(fastattn.attention_kvcache, q, cache, cache.copy(), 5, k=new, v=new)
    assert said.backend == "cpu" and said.kernel.startswith("cpu_")
    assert (cache == 0).all()


def test_a_cache_that_is_only_read_may_be_read_only_and_repeat_itself():
    q, k, v = arrays_of((2, 1, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8))
    want = fastattn.attention_kvcache(q, *(x.repeat(2, 0) for x in (k, v)), 5)
    repeated = [np.broadcast_to(x, (2, 5, 2, 8)) for x in (k, v)]
    assert np.array_equal(fastattn.attention_kvcache(q, *repeated, 5), want)


def test_more_features_of_one_case():
    """Together, what the table has one by one."""
    case = Case(seed=9, **PAGED, sq=3, s_new=3, rotary=8, window=(7, 0), alibi=1, sink=True)
    for dtype in cases.DTYPES:
        assert not kvcache_cases.run(replace(case, dtype=dtype, mass=True, softcap=3.0))
