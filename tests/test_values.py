"""Right values: every feature alone and a few together, every backend and framework, every edge."""

from dataclasses import replace

import cases
import numpy as np
import pytest
import reference
from cases import DTYPES, FAMILIES, Case
from conftest import KERNELS, needs
from declared import served
from storage import STORAGES

# A case of some size that every feature changes; features are then fields of it.
BASE = Case(b=2, hq=4, hk=2, sq=37, sk=53, d=24, dv=24)
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": "top-left"},
    "causal, sq > sk": {"causal": True, "sq": 70},
    "top-left, sq > sk": {"causal": "top-left", "sq": 70},
    "window": {"window": (5, 3)},
    "window left": {"window": (4, None)},
    "window right": {"window": (None, 2)},
    "window of one": {"window": (0, 0)},
    "causal window": {"causal": True, "window": (6, 9)},
    "top-left window": {"causal": "top-left", "window": (6, None)},
    "lengths": {"q_lengths": (30, 0), "k_lengths": (53, 12)},
    "causal lengths": {"q_lengths": (37, 5), "k_lengths": (9, 40), "causal": True},
    "left padding": {"k_start": (0, 17), "causal": True},
    "all padding": {"k_start": (53, 2), "k_lengths": (53, 2), "q_lengths": (0, 37)},
    "bool mask": {"mask": "bool", "mask_shape": (True, True, True, True)},
    "bool mask of keys": {"mask": "bool", "mask_shape": (True, False, False, True)},
    "bool mask of rows": {"mask": "bool", "mask_shape": (False, True, True, False)},
    "bool mask, rank 2": {"mask": "bool", "mask_rank": 2},
    "float mask": {"mask": "float32", "mask_shape": (False, True, True, True), "mask_rank": 3},
    "half mask": {"mask": "float16"},
    "bfloat mask": {"mask": "bfloat16", "mask_shape": (True, True, True, True)},
    "softcap": {"softcap": 3.0, "scale": 1.0},
    "alibi": {"alibi": 1},
    "alibi of sequences": {"alibi": 2, "causal": True},
    "sink": {"sink": True},
    "sink and empty rows": {"sink": True, "causal": True, "sq": 70, "q_lengths": (70, 60)},
    "scale": {"scale": -0.4},
    "scale 0": {"scale": 0.0},
    "many query heads": {"hq": 12, "hk": 1},
    "value head size": {"d": 16, "dv": 40},
    "batch first, sequence second": {"layout": "bshd"},
    "dropout": {"dropout": 0.3},
    "dropout, causal, grouped keys": {"dropout": 0.9, "causal": True, "hq": 6},
    "dropout of everything": {"dropout": 1.0, "sink": True},
    "packed": {"packed": ((30, 37), (53, 12)), "tail": (3, 9)},
    "packed, an empty one": {"b": 4, "packed": ((0, 37, 0, 5), (7, 0, 0, 53)), "causal": True},
    "packed, used": {
        "packed": ((30, 37), (53, 12)),
        "q_lengths": (12, 37),
        "k_lengths": (50, 0),
        "causal": True,
    },
    "packed, top-left window": {
        "packed": ((30, 37), (53, 12)),
        "causal": "top-left",
        "window": (6, None),
    },
    "packed, bool mask": {
        "packed": ((30, 37), (53, 12)),
        "mask": "bool",
        "mask_shape": (True, True, True, True),
    },
    "packed, one key each": {"b": 3, "sq": 9, "packed": ((9, 1, 2), (1, 1, 1)), "tail": (1, 0)},
    "packed, everything": {
        "packed": ((30, 37), (53, 40)),
        "tail": (1, 1),
        "causal": True,
        "window": (30, 4),
        "k_lengths": (50, 40),
        "mask": "float32",
        "softcap": 20.0,
        "alibi": 2,
        "sink": True,
        "scale": 0.3,
        "dropout": 0.2,
    },
    "everything": {
        "causal": True,
        "window": (30, 4),
        "k_lengths": (50, 44),
        "k_start": (3, 0),
        "mask": "float32",
        "softcap": 20.0,
        "alibi": 1,
        "sink": True,
        "scale": 0.3,
        "layout": "bshd",
    },
}


def right(case, framework, backend, attention=None):
    try:
        complaints = cases.run(case, framework, backend, attention)
    except cases.Refused as undeclared:
        pytest.skip(str(undeclared))
    assert not complaints, f"{case!r}: {complaints}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, dtype, place):
    right(replace(BASE, dtype=dtype, **FEATURES[name]), *place)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(storage, layout, dtype, place):
    case = replace(BASE, dtype=dtype, layout=layout, storage=storage, mask="float32", sink=True)
    if storage != "expanded":
        case = replace(case, out=storage)
    for seed in range(8):
        right(replace(case, seed=seed, q_lengths=(20, 37), alibi=1), *place)
        packed = replace(case, packed=((37, 11), (20, 53)), tail=(2, 1), layout="bhsd")
        right(replace(packed, seed=seed, q_lengths=(20, 11), dropout=0.2), *place)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_family(family, dtype, place):
    case = Case(hq=2, hk=2, sq=67, sk=700, d=64, dv=64, dtype=dtype, family=family)
    if family == "single":
        case = replace(case, window=(0, 0))
    if family == "equal":
        case = replace(case, sq=16, sk=5000)
    right(case, *place)
    right(replace(case, causal=True, layout="bshd", seed=1), *place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", KERNELS, indirect=True)
def test_promise_7_every_length(dtype, place):
    lengths = [*range(1, 258), 511, 512, 513, 999, 1000, 1001, 1023, 1024, 1025]
    for n, s in enumerate(lengths):
        masks = ({}, {"causal": True}, {"mask": "bool"}, {"causal": "top-left"}, {"window": (9, 4)})
        shift = {"family": "shift"} if n % 4 == 1 else {}
        case = Case(sq=min(s, 300), sk=s, d=32, dv=32, dtype=dtype, **masks[n % 5], **shift, seed=n)
        right(case, *place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", KERNELS, indirect=True)
def test_promise_11_every_head_size(dtype, place):
    for d in range(1, 257):
        dv = d if d % 2 else 257 - d
        right(Case(hq=2, hk=2, sq=9, sk=19, d=d, dv=dv, dtype=dtype, seed=d), *place)


EMPTY = {
    "b": {"b": 0},
    "sq": {"sq": 0},
    "sk": {"sk": 0},
    "sq and sk": {"sq": 0, "sk": 0},
    "no sequences": {"b": 0, "packed": ((), ()), "tail": (3, 2)},
    "empty sequences": {"packed": ((0, 0), (0, 0)), "sq": 0, "sk": 0},
    "empty sequences before others' rows": {"packed": ((0, 0), (5, 0)), "tail": (3, 2)},
}


@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "feature", ["plain", "causal", "bool mask", "softcap", "sink", "alibi", "dropout"]
)
def test_promise_6_empty_dimensions(feature, dtype, empty, place):
    right(replace(BASE, dtype=dtype, **FEATURES[feature], **empty), *place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_promise_6_rows_that_see_nothing_are_exactly_zero(dtype, place):
    """A row that a mask empties (False, or -inf), and one past its length, among others."""
    framework, backend = place
    import fastattn

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 4, 8)).astype(cases.dtype_of(dtype)) for _ in range(3))
    arrays = {"q": q, "k": k, "v": v}
    arrays["q_lengths"] = np.array([3], np.int32)
    for mask in (np.ones((4, 4), bool), np.zeros((4, 4), np.float32)):
        mask[1] = False if mask.dtype == bool else -np.inf
        stored = {n: cases.store(x, "plain", rng) for n, x in {**arrays, "mask": mask}.items()}
        sink = cases.store(np.array([0.25], np.float32), "plain", rng)
        given = {name: framework.array(x) for name, x in stored.items()}
        for extra, empty_lse in (({}, -np.inf), ({"sink": framework.array(sink)}, 0.25)):
            with served(backend, dtype=dtype):
                out, lse = fastattn.attention(**given, **extra, return_lse=True, backend=backend)
            out, lse = framework.numpy(out)[0, 0].astype(float), framework.numpy(lse)[0, 0]
            assert (out[[1, 3]] == 0).all() and (out[[0, 2]] != 0).all()
            assert lse[1] == empty_lse and lse[3] == -np.inf and np.isfinite(lse[[0, 2]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_that_are_seen_come_through(dtype, place):
    """A NaN in q reaches its row, in a key every row that sees it, in a value its column."""
    for name, index in (("q", (0, 0, 2, 1)), ("k", (0, 0, 5, 0)), ("v", (0, 0, 3, 4))):
        for value in (np.nan, np.inf):
            if (name, value) == ("q", np.inf) or (name, value) == ("k", np.inf):
                continue  # inf * k has either sign: NaN or a value, as the keys fall
            out, lse = _with(place, dtype, name, index, value, causal=True)
            hit = np.zeros((6, 8), bool)
            if name == "q":
                hit[2] = True
            elif name == "k":
                hit[5:] = True
            else:
                hit[3:, 4] = True
            bad = np.isnan(out) if np.isnan(value) else np.isposinf(out)
            assert bad[hit].all(), (name, value, out)
            if (
                name != "v"
            ):  # a value may spread to rows that do not see it, a key and a query may not
                assert np.isfinite(out[~hit]).all()
                assert (np.isnan(lse) == hit.any(axis=1)).all()


def _with(place, dtype, name, index, value, **keywords):
    import fastattn

    framework, backend = place
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal((1, 1, 6, 8)).astype(cases.dtype_of(dtype)) for n in "qkv"}
    arrays[name][index] = value
    given = {n: framework.array(cases.store(x, "plain", rng)) for n, x in arrays.items()}
    with served(backend, dtype=dtype):
        out, lse = fastattn.attention(**given, **keywords, return_lse=True, backend=backend)
    return framework.numpy(out)[0, 0].astype(np.float64), framework.numpy(lse)[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_promise_12_same_bits_every_time(dtype, place):
    import fastattn

    framework, backend = place
    case = replace(BASE, sq=130, sk=300, d=64, dv=64, dtype=dtype, causal=True)
    inputs = cases.make_inputs(case, strides_at_least_0=True)
    keywords = cases.arguments(case, inputs, framework)
    with served(backend, dtype=dtype):
        results = [fastattn.attention(**keywords, backend=backend) for _ in range(5)]
    bits = {tuple(framework.numpy(x).tobytes() for x in pair) for pair in results}
    assert len(bits) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_bits_do_not_depend_on_the_batch(dtype, place):
    import fastattn

    framework, backend = place
    rng = np.random.default_rng(0)
    shape = (5, 2, 65, 64)
    q, k, v = (rng.standard_normal(shape).astype(cases.dtype_of(dtype)) for _ in range(3))

    def bits(first, count):
        part = [cases.store(x[first : first + count], "plain", rng) for x in (q, k, v)]
        given = [framework.array(x) for x in part]
        out = fastattn.attention(*given, causal=True, batch_invariant=True, backend=backend)
        return [x.tobytes() for x in framework.numpy(out)]

    with served(backend, dtype=dtype):
        together = bits(0, 5)
    assert together == [bits(n, 1)[0] for n in range(5)]


def test_promise_10_causal_alignment(place):
    """True: the last query sees the last key. "top-left": query i sees keys up to i."""
    import fastattn

    framework, backend = place
    rng = np.random.default_rng(0)
    for sq, sk in ((2, 4), (4, 2), (3, 3)):
        zeros = framework.array(cases.store(np.zeros((1, 1, sq, 8), np.float16), "plain", rng))
        keys = framework.array(cases.store(np.zeros((1, 1, sk, 8), np.float16), "plain", rng))
        marks = np.zeros((1, 1, sk, 8), np.float16)
        marks[0, 0, range(sk), range(sk)] = 1  # out[i] then shows which keys row i saw
        marks = framework.array(cases.store(marks, "plain", rng))
        for causal, shift in ((True, sk - sq), ("top-left", 0)):
            with served(backend, dtype="float16"):
                out = fastattn.attention(zeros, keys, marks, causal=causal, backend=backend)
            seen = framework.numpy(out)[0, 0, :, :sk] > 0
            assert (seen == (np.arange(sk) <= np.arange(sq)[:, None] + shift)).all()


def test_promise_9_many_heads_and_sequences(place):
    for b, h in ((70000, 1), (1, 70000)):
        case = Case(b=b, hq=h, hk=h, sq=2, sk=3, d=4, dv=4, dtype="float16")
        right(case, *place)
        lengths = np.random.default_rng(0).integers(0, 3, (2, b)).tolist()
        right(replace(case, packed=tuple(map(tuple, lengths)), causal=True), *place)


@pytest.mark.parametrize(("dtype", "causal"), [("float16", False), ("bfloat16", True)])
@pytest.mark.parametrize("place", KERNELS, indirect=True)
def test_a_million_keys(dtype, causal, place):
    """Of 128 rows 8 are judged, for the reference holds all their scores; the last of a causal call
    see what they would see alone."""
    framework, backend = place
    import fastattn

    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((1, 1, n, 64), np.float32).astype(cases.dtype_of(dtype))
        for n in (128, 1_000_000, 1_000_000)
    )
    arrays = [framework.array(cases.store(x, "plain", rng)) for x in (q, k, v)]
    with served(backend, dtype=dtype):
        out, lse = fastattn.attention(*arrays, causal=causal, return_lse=True, backend=backend)
    rows = slice(-8, None) if causal else slice(None, None, 16)
    out, lse, q = (x[:, :, rows] for x in (framework.numpy(out), framework.numpy(lse), q))
    assert not reference.check(out, lse, q, k, v, causal=causal)


def test_promise_8_elements_more_than_2_to_the_31_apart():
    """Strides beyond an int32, in an untouched (so unbacked) buffer of 6 GiB."""
    import fastattn

    far = 2**31 + 12345
    base = np.zeros(far + 4096, np.float16)
    rng = np.random.default_rng(0)
    q = np.lib.stride_tricks.as_strided(base, (2, 1, 3, 8), (2 * far, 96, 16, 2))
    values = rng.standard_normal(q.shape).astype(np.float16)
    q[...] = values
    k, v = (np.lib.stride_tricks.as_strided(base[n:], q.shape, q.strides) for n in (100, 200))
    k[...], v[...] = values[::-1], values * 2
    out = fastattn.attention(q, k, v)
    near = [np.ascontiguousarray(x) for x in (q, k, v)]
    assert not reference.check(out, None, *near)


@needs("torch")
def test_both_layouts_are_one_computation(place):
    framework, backend = place
    import fastattn

    case = replace(BASE, dtype="bfloat16", causal=True)
    inputs = cases.make_inputs(case, strides_at_least_0=True)
    keywords = cases.arguments(case, inputs, framework)
    with served(backend, dtype="bfloat16"):
        out, lse = fastattn.attention(**keywords, backend=backend)
        for name in "qkv":
            keywords[name] = keywords[name].swapaxes(1, 2)
        other, other_lse = fastattn.attention(**{**keywords, "layout": "bshd"}, backend=backend)
    assert (
        framework.numpy(out).tobytes()
        == np.ascontiguousarray(framework.numpy(other).swapaxes(1, 2)).tobytes()
    )
    assert framework.numpy(lse).tobytes() == framework.numpy(other_lse).tobytes()
