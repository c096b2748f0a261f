"""sparsek and sparsek_lists: by hand, against the reference on random calls, and what they promise
of streams: bits that depend on a row's candidates alone, memory of the support."""

import declared
import fastattn
import ml_dtypes
import numpy as np
import pytest
import reference_sparsek
import sparsek_cases
from conftest import ROOT, python

NAN, INF = float("nan"), float("inf")

BY_HAND = [  # scores, k, gates, tau
    ([3.0, 2.5, 2.0, 1.0], 2, [1, 0.75, 0.25, 0], 1.75),
    ([0.0, 0.0, 0.0, 0.0], 1, [0.25] * 4, -0.25),
    ([5.0, 1.0, 4.0, 0.0], 2, [1, 0, 1, 0], 2.0),  # a plateau from 1 to 3
    ([2.0, 1.0, 0.0], 1, [1, 0, 0], 1.0),  # of one point
    ([0.5, 0.0], 1.5, [1, 0.5], -0.5),
    ([7.0, -3.0], 2, [1, 1], -INF),
    ([7.0, -3.0], 2.5, [1, 1], -INF),
    ([7.0, -3.0], 0, [0, 0], INF),
    ([7.0, INF], -1, [0, 0], INF),
    ([INF, 0.0, 0.0], 2, [1, 0.5, 0.5], -0.5),
    ([INF, INF, 9.0], 2, [1, 1, 0], INF),
    ([INF, INF, 9.0], 1.5, [1, 1, 0], INF),
    ([-INF, 0.0, 0.0, -INF], 2, [0, 1, 1, 0], -INF),
    ([-INF, 0.0, NAN], 1, [0, NAN, NAN], NAN),
    ([NAN], 0, [NAN], NAN),
    ([], 1, [], -INF),
    ([], 0, [], INF),
]


@pytest.mark.parametrize(("z", "k", "gates", "tau"), BY_HAND)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_by_hand(z, k, gates, tau, dtype):
    z = np.array(z, dtype)
    for found in (fastattn.sparsek(z, k), reference_sparsek.sparsek(z, k)):
        np.testing.assert_array_equal(found[0].astype(float), gates)
        np.testing.assert_array_equal(found[1].astype(float), tau)
    real = "float64" if dtype == "float64" else "float32"
    assert fastattn.sparsek(z, k)[0].dtype == fastattn.sparsek(z, k)[1].dtype == real


def test_lists_by_hand():
    z = np.array([[[1.0, 3.0, 3.0, 0.0, 3.0, 5.0]]], np.float32)
    lists, gates, tau = fastattn.sparsek_lists(z, 1.5, sq=6, window=1)
    assert lists.tolist() == [[[[-1, -1], [0, -1], [0, 1], [1, 2], [1, 2], [1, 2]]]]
    assert gates.tolist() == [[[[0, 0], [1, 0], [0.5, 1], [0.75, 0.75], [0.75, 0.75], [0.5, 0.5]]]]
    assert tau.tolist() == [[[-INF, -INF, 0.5, 2.25, 2.25, 2.5]]]  # key 4 is cut from the last row
    lists, gates, tau = fastattn.sparsek_lists(z, 2, sq=1, k_start=np.array([3], np.int32))
    assert (lists.tolist(), gates.tolist()) == ([[[[4, 5]]]], [[[[1, 1]]]]) and tau == 1


def test_random_calls(place):
    """By hypothesis, which prints the case that fails: 400 of NumPy's, fewer where it is slower."""
    hypothesis = pytest.importorskip("hypothesis")
    framework, backend = place
    if why := declared.reason(backend, "sparsek", d=0):
        pytest.skip(why)
    seeds, options = hypothesis.strategies.integers(0, 2**31), hypothesis.strategies.sampled_from

    @hypothesis.settings(
        hypothesis.settings.get_profile("fastattn"),
        max_examples=400 if framework.flips else 100,
    )
    @hypothesis.given(data=hypothesis.strategies.data(), seed=seeds)
    def one(data, seed):
        case = sparsek_cases.choose_case(lambda of: data.draw(options(list(of))), seed)
        wrong = sparsek_cases.run(case, framework)
        assert not wrong, f"python tests/campaign.py --sparsek --case '{case!r}': {wrong}"

    one()


def test_random_cases_draw_every_argument():
    drawn = [sparsek_cases.random_case(seed) for seed in range(1000)]
    for field in sparsek_cases.fields(drawn[0]):
        if field.name != "seed":
            values = [getattr(case, field.name) for case in drawn]
            assert sum(value != field.default for value in values) >= 100, field.name
    assert {case.kind for case in drawn} == set(sparsek_cases.KINDS)
    assert eval(repr(drawn[3]), {"Case": sparsek_cases.Case}) == drawn[3]


def test_a_wrong_result_is_reported(monkeypatch):
    right, case = fastattn.sparsek_lists, sparsek_cases.Case(m=30, sq=30)
    assert not sparsek_cases.run(case)

    def broken(*args, **keywords):
        lists, gates, tau = right(*args, **keywords)
        gates[0, 0, 20, 1] += 1e-5
        return lists, gates, tau

    monkeypatch.setattr(fastattn, "sparsek_lists", broken)
    assert "gates[0, 0, 20, 1]" in sparsek_cases.run(case)[0]


def streams(m, dtype="float32"):
    z = np.random.default_rng(5).standard_normal(m)
    kinds = (z, 0.1 * z, np.zeros(m), np.sort(z), -np.sort(z), np.round(z), z + 600)
    return np.stack(kinds).astype(dtype)[None]


def test_a_row_depends_on_its_candidates_alone():
    """In the bits of tau and gates: a call of few rows, of one row, or of the prefix by sparsek,
    any number of threads."""
    z, k = streams(300), 17.5
    lists, gates, tau = fastattn.sparsek_lists(z, k, sq=300)
    for first, n in ((0, 40), (113, 50), (299, 1)):
        part = fastattn.sparsek_lists(z, k, sq=n, q_offset=first)
        for x, whole in zip(part, (lists, gates, tau), strict=True):
            assert np.array_equal(x, whole[:, :, first : first + n])
    for n in (1, 17, 18, 150, 300):
        of_prefix, threshold = fastattn.sparsek(z[..., :n], k)
        assert np.array_equal(threshold, tau[..., n - 1])
        kept = lists[:, :, n - 1]
        there = np.take_along_axis(of_prefix, np.maximum(kept, 0), -1) * (kept >= 0)
        assert np.array_equal(there, gates[:, :, n - 1])
    before = fastattn.get_num_threads()
    try:
        for threads in (1, 2, 5):
            fastattn.set_num_threads(threads)
            again = fastattn.sparsek_lists(z[:, :1], k, sq=300)
            for x, whole in zip(again, (lists, gates, tau), strict=True):
                assert np.array_equal(x, whole[:, :1])
    finally:
        fastattn.set_num_threads(None)
    assert fastattn.get_num_threads() == before


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_long_stream(dtype):
    """Sums that run on over 20,000 keys lose nothing: rows of it against the reference."""
    m, k = 20_000, 64
    climb = 0.05 * np.arange(1 - m, 1)  # from -1000, of which nothing is left at the end
    even = np.linspace(0, 1, m)[np.random.default_rng(1).permutation(m)]
    z = np.concatenate([streams(m, dtype), np.stack([climb, even]).astype(dtype)[None]], 1)
    rows = np.array([k, 100, 5_000, 12_345, m - 1])
    lists, gates, tau = fastattn.sparsek_lists(z, k, sq=m)
    assert (np.diff(tau[..., k:]) >= 0).all()
    eps = np.finfo(dtype).eps
    for h in range(z.shape[1]):
        wide = z[0, h].astype(reference_sparsek.real_of(z))
        for i in rows:
            p, want = reference_sparsek.sparsek_of(wide[: i + 1], k)
            bound = (4 if dtype == "float64" else 1) * eps * (abs(want) + 1)
            assert abs(tau[0, h, i] - want) <= bound
            kept = reference_sparsek.greatest(wide[: i + 1], k)
            assert np.array_equal(lists[0, h, i], kept)
            assert np.abs(gates[0, h, i] - p[kept]).max() <= bound


def test_tau_never_falls_by_a_rounding():
    """Each score is the next number above tau, which moves it by less than it can be moved."""
    z = np.random.default_rng(4).standard_normal(40)
    for _ in range(200):
        z = np.append(z, np.nextafter(fastattn.sparsek(z, 7.3)[1], INF))
    tau = fastattn.sparsek_lists(z[None, None], 7.3, sq=len(z))[2][0, 0, 7:]
    assert (np.diff(tau) >= 0).all()


def test_sums_that_shrink():
    """10,000 scores share almost all of k; then others take it, and few of the first are left."""
    z = np.random.default_rng(0).random(19_995)
    z[10_000:] += 5
    gates, tau = fastattn.sparsek(z, 10_000)
    p, want = reference_sparsek.sparsek_of(z.astype(np.longdouble), 10_000)
    assert 0 < np.count_nonzero((p > 0) & (p < 1)) < 1000
    assert abs(tau - want) < 1e-15 and np.abs(gates - p).max() < 1e-15


def test_memory_is_of_the_support():
    """One row over 8 million scores of 16 bits, of which some 100 are in the support."""
    program = """
import resource, fastattn, numpy as np
part = np.random.default_rng(0).standard_normal(2**13, np.float32).astype("f2")
z = np.empty((1, 1, 2**23), "f2")
for i in range(2**10):
    z[0, 0, i * 2**13 : (i + 1) * 2**13] = part + np.float16(i / 16)
fastattn.sparsek_lists(z[..., :4096], 16, sq=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastattn.sparsek_lists(z, 16, sq=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(python("-c", program)) < 4096  # kB; a number for each score would be 16 MB


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("lead", [(), (0,), (3, 0, 2), (1,) * 7])
def test_shapes(lead, m):
    for dtype in ("f8", "f2", ml_dtypes.bfloat16):
        gates, tau = fastattn.sparsek(np.ones((*lead, m), dtype), 1.5)
        assert (gates.shape, tau.shape) == ((*lead, m), lead)
        assert (np.abs(gates - min(1, 1.5 / max(m, 1))) < 1e-6).all()


@pytest.mark.parametrize(("b", "hk", "sk", "sq", "k"), [(0, 2, 5, 3, 2), (2, 0, 5, 3, 2.5)])
def test_shapes_of_lists(b, hk, sk, sq, k):
    lists, gates, tau = fastattn.sparsek_lists(np.ones((b, hk, sk), "f4"), k, sq=sq)
    assert lists.shape == gates.shape == (b, hk, sq, np.ceil(k)) and tau.shape == (b, hk, sq)
    for k_of_none in (0, -3.5):
        lists, gates, _ = fastattn.sparsek_lists(np.ones((1, 1, 4), "f4"), k_of_none, sq=2)
        assert lists.shape == gates.shape == (1, 1, 2, 0)
    lists, _, tau = fastattn.sparsek_lists(np.ones((1, 1, 0), "f4"), 2, sq=2)
    assert lists.tolist() == [[[[-1, -1], [-1, -1]]]] and (tau == -INF).all()


def test_the_campaign_takes_it():
    command = (ROOT / "tests" / "campaign.py", "--sparsek", "--cases", 100, "--jobs", 1)
    assert "100 cases, 0 wrong, 0 refused" in python(*command)
