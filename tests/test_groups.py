"""Query heads that share a key head: short ones are computed together, each as if it were alone."""

import itertools

import cases
import fastattn
import numpy as np
import pytest
import reference
from conftest import LEVELS, needs, python
from storage import STORAGES

GROUPS = (2, 4, 7, 8)
LENGTHS = (1, 2, 3, 5, 8, 12, 16, 17)
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "causal, rows without a key": {"causal": True, "sk": 3, "sink": True},
    "window": {"window": (3, 2)},
    "lengths": {"sq": 9, "q_lengths": (1, 0, 9), "k_lengths": (21, 4, 0), "k_start": (3, 4, 0)},
    "offset": {"q_offset": (0, 7, -2), "causal": True},
    "bool mask": {"mask": "bool", "mask_shape": (True, True, True, True)},
    "bool mask of heads": {"mask": "bool", "mask_shape": (False, True, False, True)},
    "bool mask of rows": {"mask": "bool"},
    "float mask": {"mask": "float32", "mask_shape": (True, True, True, True)},
    "float mask of heads": {"mask": "float16", "mask_shape": (False, True, False, False)},
    "alibi": {"alibi": 1, "causal": True},
    "alibi of sequences": {"alibi": 2},
    "sink": {"sink": True},
    "softcap": {"softcap": 2.0, "scale": -1.0},
    "dropout": {"dropout": 0.4},
    "one key": {"sk": 1},
    "no key": {"sk": 0, "sink": True},
    "many keys": {"sk": 300, "causal": True},
    "great heads": {"d": 520, "dv": 300},
    "odd heads": {"d": 7, "dv": 3},
    "everything": {
        "mask": "float32",
        "mask_shape": (True, True, True, True),
        "alibi": 2,
        "sink": True,
        "softcap": 5.0,
        "dropout": 0.2,
        "causal": True,
        "window": (9, None),
        "k_lengths": (21, 5, 17),
    },
}
PACKED = {"packed": ((1, 0, 17), (21, 5, 9)), "tail": (2, 1), "sq": 17, "causal": True}


def grouped_cases():
    """Each feature with each group; lengths, dtypes, layouts, strides in turn."""
    turns = zip(
        itertools.cycle(LENGTHS),
        itertools.cycle(("float32", "bfloat16", "float64", "float32", "float16")),
        itertools.cycle(("bhsd", "bshd", "bhsd")),
        itertools.cycle(STORAGES),
        strict=False,
    )
    every = itertools.product(FEATURES.values(), GROUPS, range(2))
    for n, (feature, group, _) in enumerate(every):
        sq, dtype, layout, storage = next(turns)
        fields = {
            "b": 3,
            "hk": 2,
            "sq": sq,
            "sk": 21,
            "dtype": dtype,
            "storage": storage,
            **feature,
        }
        yield cases.Case(hq=2 * group, layout=layout, seed=n, out="strided", **fields)
    for n, (group, dtype) in enumerate(itertools.product(GROUPS, cases.DTYPES)):
        fields = {"sink": True, "alibi": 1, "dropout": 0.2 * (n % 2), **PACKED}
        yield cases.Case(b=3, hq=3 * group, hk=3, sk=21, dtype=dtype, seed=n, **fields)


@pytest.mark.parametrize("level", LEVELS)
def test_every_feature_at_every_level(level, cpu_levels):
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    said = python(
        "-c",
        "import cases, test_groups; cases.print_wrong(test_groups.grouped_cases())",
        FASTATTN_CPU_LEVEL=level,
    )
    assert said == f"{len(list(grouped_cases()))} right\n"


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@needs("torch")
@pytest.mark.parametrize("hq, hk, hv", [(12, 2, 3), (12, 3, 2), (8, 8, 1), (8, 2, 4), (30, 5, 3)])
@pytest.mark.parametrize("sq", [1, 5, 33])
def test_values_have_other_heads_than_keys(hq, hk, hv, sq):
    """Rows that share a block share both."""
    import torch

    q, k, v = normal(2, hq, sq, 16), normal(2, hk, 40, 16, seed=1), normal(2, hv, 40, 24, seed=2)
    tensors = (torch.from_numpy(x) for x in (q, k, v))
    out = fastattn.scaled_dot_product_attention(*tensors, enable_gqa=True).numpy()
    repeated = (np.repeat(x, hq // x.shape[1], 1) for x in (k, v))
    assert not reference.check(out, None, q, *repeated)


@pytest.fixture
def threads():
    yield fastattn.set_num_threads
    fastattn.set_num_threads(None)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_sharing_changes_no_bit(threads, group, dtype):
    """Whatever the number of rows and of threads: as with keys and values of its own."""
    for sq, sk in [(1, 3000), (2, 1), (3, 70), (8, 900), (17, 300), (60, 200), (130, 130)]:
        q = normal(2, 2 * group, sq, 32, dtype=dtype)
        k, v = normal(2, 2, sk, 32, dtype=dtype, seed=1), normal(2, 2, sk, 40, dtype=dtype, seed=2)
        own = [np.repeat(x, group, 1) for x in (k, v)]
        options = {"causal": True, "return_lse": True, "softcap": 9.0 * (sq % 2)}
        options |= {"alibi_slopes": normal(2 * group), "dropout_p": 0.1 * (sq == 8), "seed": 3}
        threads(1)
        want = [x.tobytes() for x in fastattn.attention(q, *own, **options)]
        for n in (1, 2, 3, 7):
            threads(n)
            assert [x.tobytes() for x in fastattn.attention(q, k, v, **options)] == want


def test_packed_sequences_change_no_bit():
    """One row each and a longer one: as each alone."""
    rows, keys = np.array([1, 1, 6, 0, 1]), np.array([70, 3, 300, 9, 1])
    cu_q, cu_k = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (rows, keys))
    q, k, v = normal(9, 14, 16), normal(383, 2, 16, seed=1), normal(383, 2, 16, seed=2)
    sink = normal(14, seed=3)
    out = fastattn.attention_varlen(q, k, v, cu_q, cu_k, 6, 300, causal=True, sink=sink)
    for n in np.flatnonzero(rows):
        own = np.s_[cu_q[n] : cu_q[n + 1]], np.s_[cu_k[n] : cu_k[n + 1]]
        alone = fastattn.attention(
            *(x[None] for x in (q[own[0]], k[own[1]], v[own[1]])),
            causal=True,
            sink=sink,
            layout="bshd",
        )
        assert (alone[0] == out[own[0]]).all()
