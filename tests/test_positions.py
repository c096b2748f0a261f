"""Where rows lie on the key axis: q_offset, and windows whose bounds have any sign."""

from dataclasses import replace

import cases
import fastattn
import numpy as np
import pytest
from cases import DTYPES, Case
from test_values import right

FAR = 2**31 - 1
BASE = Case(b=2, hq=4, hk=2, sq=37, sk=53, d=24, dv=24)
PACKED = {"packed": ((30, 37), (53, 12)), "tail": (3, 9)}
POSITIONS = {
    "causal behind a cache": {"causal": True, "q_offset": 9},
    "causal, one offset each": {"causal": True, "q_offset": (-5, 40)},
    "causal before the keys": {"causal": True, "q_offset": -20},
    "causal past the keys": {"causal": True, "q_offset": 60},
    "window from the top left": {"window": (5, 3), "q_offset": 0},
    "window, one offset each": {"window": (7, None), "q_offset": (30, -3)},
    "strictly before": {"window": (None, -1)},
    "strictly after": {"window": (-1, None)},
    "some way before": {"window": (12, -4), "q_offset": (10, 0)},
    "some way after": {"window": (-4, 12), "k_lengths": (53, 20)},
    "causal, and strictly after": {"causal": True, "window": (-1, 9)},
    "lengths do not move an offset": {
        "causal": True,
        "q_offset": (3, 17),
        "q_lengths": (30, 12),
        "k_lengths": (50, 9),
        "k_start": (2, 4),
    },
    "alibi from an offset": {"alibi": 2, "q_offset": (11, -70)},
    "alibi from an offset, causal": {"alibi": 1, "q_offset": 100, "causal": True},
    "alibi, window before": {"alibi": 1, "window": (20, -2)},
    "with a bool mask": {"mask": "bool", "causal": True, "q_offset": (4, 20)},
    "with a bool mask of all": {
        "mask": "bool",
        "mask_shape": (False, False, True, True),
        "window": (9, -1),
        "q_offset": (30, 50),
    },
    "with a float mask": {"mask": "float32", "causal": True, "q_offset": 5, "window": (9, None)},
    "far to the left": {"causal": True, "q_offset": -FAR},
    "far to the right": {"causal": True, "q_offset": FAR},
    "far windows": {"window": (FAR, FAR), "q_offset": (FAR, -FAR)},
    "far and back": {"window": (2**30 + 5, -(2**30) + 4), "q_offset": 2**30},
    "beyond an int64": {"window": (10**30, -(10**20))},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POSITIONS)
def test_position(name, dtype, place):
    case = replace(BASE, dtype=dtype, **POSITIONS[name])
    right(case, *place)
    if "mask" in name and not isinstance(case.q_offset, tuple):
        case = replace(case, q_offset=(case.q_offset, 7))
    lengths = {"q_lengths": (12, 37), "k_lengths": (50, 12)} if case.k_lengths else {}
    right(replace(case, **PACKED, **lengths, k_start=None), *place)


def test_an_offset_of_sk_minus_sq_is_none_at_all(place):
    """An int, an array of it and None are one call, to the bit."""
    framework, backend = place
    rng = np.random.default_rng(0)
    shapes = (2, 4, 70, 32), (2, 4, 130, 32), (2, 4, 130, 32)
    q, k, v = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    given = [framework.array(cases.store(x, "plain", rng)) for x in (q, k, v)]
    each = framework.array(cases.store(np.full(2, 60, np.int32), "plain", rng))
    for window in (None, (20, 5), (-3, 40)):
        bits = {
            framework.numpy(
                fastattn.attention(
                    *given, causal=True, window=window, q_offset=offset, backend=backend
                )
            ).tobytes()
            for offset in (None, 60, np.int64(60), each)
        }
        assert len(bits) == 1


def test_what_no_row_sees_reaches_nothing(place):
    """NaN in values, beside windows that leave all rows, or the first or last, without keys."""
    framework, backend = place
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 40, 16)).astype(np.float16) for _ in range(3))
    for window, causal, offset in (
        ((-2, None), True, None),  # nobody sees a key
        ((-30, None), False, None),
        ((None, -30), False, None),
        ((3, 3), False, -45),
        ((3, 3), False, 45),
    ):
        i, j = np.arange(40)[:, None] + (offset or 0), np.arange(40)
        left, right = (FAR if x is None else x for x in window)
        seen = (j >= i - left) & (j <= i + right) & (not causal or j <= i)
        poisoned = v.copy()
        poisoned[0, 0, ~seen.any(axis=0)] = np.nan
        arrays = [framework.array(cases.store(x, "plain", rng)) for x in (q, k, poisoned)]
        out, lse = fastattn.attention(
            *arrays,
            window=window,
            causal=causal,
            q_offset=offset,
            return_lse=True,
            backend=backend,
        )
        out, lse = framework.numpy(out)[0, 0], framework.numpy(lse)[0, 0]
        empty = ~seen.any(axis=1)
        assert (
            np.isfinite(out).all()
            and (out[empty] == 0).all()
            and (out[~empty] != 0).any(axis=1).all()
        )
        assert (lse[empty] == -np.inf).all() and np.isfinite(lse[~empty]).all()


def test_sentences():
    x = np.ones((2, 1, 3, 4), np.float32)
    offsets = np.zeros(2, np.int32)
    flat = x[:, 0], x[:, 0], x[:, 0], np.array([0, 2], np.int32), np.array([0, 2], np.int32), 2, 2
    wrong = [
        ({"window": (-1, -1)}, ValueError, r"`window` \(-1, -1\) sees no key; unbounded is None"),
        ({"window": (3, -4)}, ValueError, r"`window` \(3, -4\) sees no key"),
        ({"window": (1.5, 0)}, TypeError, "`window` must hold two ints or None, got 1.5"),
        ({"q_offset": 1.5}, TypeError, r"`q_offset` must be an int or an int32 array \(b,\), got"),
        ({"q_offset": "3"}, TypeError, "`q_offset` must be an int or an int32 array"),
        ({"q_offset": offsets.astype("i8")}, TypeError, "`q_offset` must be int32, got int64"),
        ({"q_offset": offsets[:1]}, ValueError, r"`q_offset` must have shape \(2,\), got \(1,\)"),
        ({"q_offset": 0, "causal": "top-left"}, ValueError, "`q_offset` must be None with causal"),
        ({"q_offset": offsets, "causal": "top-left"}, ValueError, "`q_offset` must be None with"),
    ]
    for keywords, exception, sentence in wrong:
        with pytest.raises(exception, match=sentence):
            fastattn.attention(x, x, x, **keywords)
        with pytest.raises(exception, match=sentence):
            fastattn.explain(fastattn.attention, x, x, x, **keywords)
        if "shape" not in sentence:
            with pytest.raises(exception, match=sentence):
                fastattn.attention_varlen(*flat, **keywords)
    assert fastattn.explain(fastattn.attention, x, x, x, q_offset=3).backend == "cpu"
