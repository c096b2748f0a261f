"""What backends declare to take, fastattn.info()["support"], asked about one call.

A refusal of what is declared is a fault, whoever refuses; `test_support.py` holds the C code to it.
"""

import contextlib
from dataclasses import replace

import fastattn
import pytest


def refusal(backend, operation="forward", *, dtype="bfloat16", d=64, dv=None, features=()):
    """What of it is not declared, in a word or two; None: all of it is."""
    line = fastattn.info()["support"].get(backend, {}).get(operation)
    if line is None:
        return operation
    if dtype not in line["dtypes"]:
        return dtype
    least, most = line["d"]
    if not all(least <= size <= most for size in (d, d if dv is None else dv)):
        return "head size"
    features = set(features) | ({"dv"} if dv not in (None, d) else set())
    if more := features - set(line["features"]):
        return ", ".join(sorted(more))
    return next((" with ".join(x) for x in line["apart"] if set(x) <= features), None)


def serves(backend, operation="forward", **asked):
    return refusal(backend, operation, **asked) is None


def reason(backend, operation="forward", **asked):
    """Why a test is skipped there, or None. The CPU backend has no excuse."""
    missing = refusal(backend, operation, **asked)
    assert not missing or backend != "cpu", f"cpu does not declare {operation}: {missing}"
    return missing and f"{backend} does not declare {operation}: {missing}"


@contextlib.contextmanager
def served(backend, operation="forward", **asked):
    """Around the calls of a test: what is declared is served; what is not is refused, and the test
    skipped."""
    why = reason(backend, operation, **asked)
    if not why:
        yield
        return
    with pytest.raises(NotImplementedError):
        yield
    pytest.skip(why)


def of_case(case):
    """The arguments of refusal() that a case of cases.py asks for."""
    left, right = case.window or (None, None)
    if case.causal:
        right = 0 if right is None else min(right, 0)
    has = {
        "causal": right == 0,
        "window": left is not None or right not in (None, 0),
        "q_offset": case.q_offset is not None or case.causal == "top-left",
        "lengths": any(x is not None for x in (case.q_lengths, case.k_lengths, case.k_start)),
        "varlen": case.packed is not None,
        "bool_mask": case.mask == "bool",
        "float_mask": case.mask not in (None, "bool"),
        "softcap": case.softcap != 0,
        "alibi": case.alibi,
        "sink": case.sink,
        "dropout": case.dropout > 0,
        "gqa": case.hq != case.hk,
        "lse": True,
    }
    features = [name for name, is_asked in has.items() if is_asked]
    return {"dtype": case.dtype, "d": case.d, "dv": case.dv, "features": features}


def narrowed(case, backend, operation):
    """The case without what the backend does not declare, and in a dtype and sizes that it does."""
    line = fastattn.info()["support"][backend][operation]
    without = {
        "varlen": {"packed": None, "tail": (0, 0)},
        "softcap": {"softcap": 0.0},
        "alibi": {"alibi": 0},
        "sink": {"sink": False},
        "dropout": {"dropout": 0.0},
    }
    for name in without.keys() - set(line["features"]):
        case = replace(case, **without[name])
    kind = "bool_mask" if case.mask == "bool" else "float_mask"
    needs = {kind, "dmask"} if kind == "float_mask" and operation == "backward" else {kind}
    if case.mask and needs - set(line["features"]):
        case = replace(case, mask=None)
    if case.dtype not in line["dtypes"]:
        case = replace(case, dtype=line["dtypes"][case.seed % len(line["dtypes"])])
    least, most = line["d"]
    d, dv = (least + (size - least) % (most - least + 1) for size in (case.d, case.dv))
    if not (least <= case.d <= most and least <= case.dv <= most):
        case = replace(case, d=d, dv=d if case.d == case.dv else dv)
    return case
