"""Few query rows against many keys: the keys are split, and the splits joined."""

import itertools

import cases
import fastattn
import numpy as np
import pytest
import reference
from conftest import LEVELS, python
from storage import STORAGES

KEYS = (1025, 2100)  # of splits of 1,024
ROWS = (1, 2, 3, 5, 8, 13, 16, 17)  # few, whatever the lanes, and more
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": "top-left", "sink": True},  # sees the first split alone
    "window": {"window": (1100, 2), "q_offset": (0, 1500)},
    "lengths": {"k_lengths": (1024, 0), "sink": True},
    "starts": {"k_start": (1030, 7), "causal": True},
    "bool mask": {"mask": "bool", "mask_shape": (True, True, True, True)},
    "bool mask of keys": {"mask": "bool", "mask_shape": (True, False, False, True)},
    "float mask": {"mask": "float32", "mask_shape": (False, True, True, True)},
    "float mask of keys": {"mask": "bfloat16", "mask_shape": (True, False, False, True)},
    "alibi": {"alibi": 2, "causal": True},
    "softcap": {"softcap": 2.0, "scale": -1.0},
    "dropout": {"dropout": 0.4},
    "odd heads": {"d": 7, "dv": 35},
    "great heads": {"d": 260, "dv": 72},
}


def decode_cases():
    """Each feature; rows, keys, groups, dtypes, layouts, strides in turn."""
    turns = zip(
        itertools.cycle(ROWS),
        itertools.cycle(KEYS),
        itertools.cycle((1, 4, 2, 5)),
        itertools.cycle(("float32", "bfloat16", "float64", "float16")),
        itertools.cycle(("bhsd", "bshd", "bshd")),
        itertools.cycle(STORAGES),
        strict=False,
    )
    for n, feature in enumerate(FEATURES.values()):
        sq, sk, group, dtype, layout, storage = next(turns)
        fields = {"sq": sq, "sk": sk, "dtype": dtype, "layout": layout, "storage": storage}
        fields |= {"d": 32, "dv": 32, **feature}
        yield cases.Case(b=2, hq=2 * group, hk=2, seed=n, out="strided", **fields)
    packed = {"packed": ((1, 0, 3), (1025, 9, 1500)), "tail": (2, 1), "sq": 3, "sk": 1500}
    for n, dtype in enumerate(cases.DTYPES):
        fields = {"dtype": dtype, "sink": True, "alibi": 1, "causal": True, **packed}
        yield cases.Case(b=3, hq=4, hk=2, d=64, dv=64, seed=n, **fields)


@pytest.mark.parametrize("level", LEVELS)
def test_every_feature_at_every_level(level, cpu_levels):
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    said = python(
        "-c",
        "import cases, test_decode; cases.print_wrong(test_decode.decode_cases())",
        FASTATTN_CPU_LEVEL=level,
    )
    assert said == f"{len(list(decode_cases()))} right\n"


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def bits(*arguments, **options):
    return [x.tobytes() for x in fastattn.attention(*arguments, return_lse=True, **options)]


@pytest.fixture
def threads():
    yield fastattn.set_num_threads
    fastattn.set_num_threads(None)


@pytest.mark.parametrize("dtype", [cases.dtype_of(name) for name in cases.DTYPES], ids=str)
@pytest.mark.parametrize("sq", [1, 6, 40])
def test_threads_change_no_bit(threads, dtype, sq):
    """Nor does it that a group's heads share a panel, or that keys are split at all."""
    q = normal(1, 6, sq, 64, dtype=dtype)
    k, v = (normal(1, 2, 2900, 64, dtype=dtype, seed=n) for n in (1, 2))
    options = {"causal": True, "alibi_slopes": normal(6), "k_start": np.array([1500], np.int32)}
    threads(1)
    want = bits(q, *(np.repeat(x, 3, 1) for x in (k, v)), **options)
    for n in (1, 2, 3, 7):
        threads(n)
        assert bits(q, k, v, **options) == want


@pytest.mark.parametrize("dtype", [cases.dtype_of(name) for name in cases.DTYPES], ids=str)
def test_other_sequences_change_no_bit(threads, dtype):
    """Of a batch, of packed sequences: each is split by its own length, as if it were alone."""
    threads(3)
    lengths = np.array([70_000, 2048, 1, 1025], np.int32)  # of the first more than 64 splits
    q = normal(4, 4, 1, 16, dtype=dtype)
    k, v = (normal(1, 70_000, 1, 16, dtype=dtype, seed=n) for n in (1, 2))
    long = [np.broadcast_to(x.swapaxes(1, 2), (4, 1, 70_000, 16)) for x in (k, v)]
    alone = [
        bits(q[n : n + 1], *(x[n : n + 1, :, :length] for x in long), batch_invariant=True)
        for n, length in enumerate(lengths)
    ]
    out, lse = fastattn.attention(
        q, *long, k_lengths=lengths, return_lse=True, batch_invariant=True
    )
    assert [[x[n].tobytes() for x in (out, lse)] for n in range(4)] == alone
    cu_q, cu_k = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (np.ones(4), lengths))
    packed = [np.concatenate([x[0, :n] for n in lengths]) for x in (k, v)]
    out = fastattn.attention_varlen(
        q[:, :, 0], *packed, cu_q, cu_k, 1, 70_000, batch_invariant=True
    )
    assert [out[n].tobytes() for n in range(4)] == [x[0] for x in alone]


@pytest.mark.parametrize("sq", [1, 20])
def test_the_most_splits(sq):
    """Of more than 65,536 keys, a split has more than 1,024; the last one may be short."""
    q = normal(1, 2, sq, 8)
    k, v = normal(1, 1, 65_537 + 2048, 8, seed=1), normal(1, 1, 65_537 + 2048, 8, seed=2)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    assert not reference.check(out, lse, q, k, v, causal=True)


@pytest.mark.parametrize("hidden", ["start", "end", "mask"])
@pytest.mark.parametrize("d", [64, 24])
def test_what_no_row_sees_reaches_nothing(threads, hidden, d):
    """Infinite keys and values, from the middle of a block of the middle split on."""
    threads(2)
    dtype = cases.dtype_of("bfloat16" if d == 24 else "float32")
    q, k, v = (normal(2, 4 if n else 8, 3000 if n else 1, d, dtype=dtype, seed=n) for n in range(3))
    sees = np.zeros((2, 1, 1, 3000), bool)
    sees[
        ..., {"start": slice(1501, None), "end": slice(1501), "mask": slice(7, None, 3)}[hidden]
    ] = 1
    for x in (k, v):
        x[np.broadcast_to(~sees.swapaxes(2, 3), x.shape)] = np.nan
    options = {"mask": sees}
    if hidden != "mask":
        name = {"start": "k_start", "end": "k_lengths"}[hidden]
        options = {name: np.full(2, 1501, np.int32)}
    out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
    seen = [x[:, :, sees[0, 0, 0]] for x in (k, v)]
    assert not reference.check(out, lse, q, *seen)


def test_rows_of_none_and_without_a_key(threads):
    """Packed sequences whose keys are split: what belongs to no row of theirs is 0, too."""
    threads(2)
    q, k, v = normal(9, 4, 64), normal(5000, 2, 64, seed=1), normal(5000, 2, 64, seed=2)
    cu_q, cu_k = np.array([0, 1, 4, 6], np.int32), np.array([0, 2500, 2500, 4900], np.int32)
    out = np.full(q.shape, np.nan, np.float32)
    got, lse = fastattn.attention_varlen(q, k, v, cu_q, cu_k, 3, 2500, out=out, return_lse=True)
    assert got is out and not out[1:4].any() and not out[6:].any()
    assert (lse[:, 1:4] == -np.inf).all() and (lse[:, 6:] == -np.inf).all()
    for rows, keys in ((np.s_[:1], np.s_[:2500]), (np.s_[4:6], np.s_[2500:4900])):
        one = [x.swapaxes(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        assert not reference.check(out[rows].swapaxes(0, 1)[None], lse[None, :, rows], *one)
