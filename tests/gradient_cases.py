"""The cases of cases.py for attention_backward: one call, from a case to the complaints.

The forward is called first, for out and lse. dout, dlse and which gradients are wanted are drawn
from the case's seed; dq, dk and dv are the caller's arrays in half of the cases, in any storage.
"""

import collections
import inspect
import sys
from dataclasses import dataclass, replace

import cases
import declared
import numpy as np
import reference
import reference_backward
from cases import Inputs, NumPy, Refused, arguments, dtype_of, function, make_inputs, pack
from storage import STORAGES, store


def draw(case):
    """dout (b, hq, sq, dv) and dlse (b, hq, sq), of which one may be None."""
    rng = np.random.default_rng([case.seed, 1])
    dtype = dtype_of(case.dtype)
    dout = rng.standard_normal((case.b, case.hq, case.sq, case.dv)).astype(dtype)
    dlse = None
    if rng.random() < 0.3:
        dlse = rng.standard_normal(dout.shape[:3]).astype(reference.lse_dtype(dtype))
        if rng.random() < 0.4:
            dout = None
    return dout, dlse


def blind_rows(case, mask):
    seen = reference.visible(case.b, case.hq, case.sq, case.sk, mask, **case.limits)
    return ~seen.any(axis=3)


def in_layout(case, x, of_k=False):
    if case.packed:
        return pack(x, case.packed[of_k], case.tail[of_k])
    return x.swapaxes(1, 2) if case.layout == "bshd" else x


def unpack(case, x, of_k):
    """A gradient as the call gives it -> (b, h, s, d), and whether the rows of none are 0."""
    if not case.packed:
        return (x.swapaxes(1, 2) if case.layout == "bshd" else x), True
    rows, length = case.packed[of_k], case.sk if of_k else case.sq
    whole, at = np.zeros((case.b, x.shape[1], length, x.shape[2]), x.dtype), 0
    for n, count in enumerate(rows):
        whole[n, :, :count] = x[at : at + count].swapaxes(0, 1)
        at += count
    return whole, not x[at:].any()


luck = cases.Luck()  # of this process: how many were right in other draws only


def run(case, asked=None, framework=None, backend="cpu"):
    """The complaints about one case. As in cases.run(), bad luck is drawn anew, and counted: the
    rule compares the largest of errors of which few may matter. What is wrong with a case stays
    wrong with other numbers; both draws have to be right."""
    where = framework or NumPy(), backend
    complaints = run_once(case, asked, *where)
    if case.dtype == "float64":
        return complaints
    luck.judged += 1
    if complaints and all(getattr(said, "ratio", np.inf) < 3 for said in complaints):
        luck.redrawn += 1
        again = (replace(case, seed=case.seed + n * 2**32) for n in (1, 2))
        if not any(run_once(other, None, *where) for other in again):
            return []
    return complaints


def how_to_run(case, backend):
    """Keywords that change no gradient beyond its last bits, each in every fifth case."""
    rng = np.random.default_rng([case.seed, 3])
    keywords = {"deterministic": True, "batch_invariant": True, "backend": backend}
    keywords = {name: x for name, x in keywords.items() if rng.random() < 0.2}
    if not declared.serves(backend, "backward", features=("deterministic",)):
        keywords.pop("deterministic", None)
    return keywords


@dataclass
class Called:
    """One call: what it was given and what it gave."""

    inputs: Inputs
    lse: np.ndarray  # (b, hq, sq)
    dout: np.ndarray | None  # (b, hq, sq, dv)
    dlse: np.ndarray | None
    stored: dict  # dq, dk and dv that are the caller's
    wanted: dict  # of each gradient, whether it was asked for
    results: dict


def call(case, asked=None, framework=None, backend="cpu"):
    """The forward and the backward pass of a case.

    asked: a Counter of the arguments given to each function, beside what each call needs.
    """
    import fastattn

    framework = framework or NumPy()
    rng = np.random.default_rng([case.seed, 2])
    inputs = make_inputs(case, strides_at_least_0=not framework.flips)
    keywords = arguments(case, inputs, framework) | how_to_run(case, backend)
    storages = STORAGES[:-1] if framework.flips else STORAGES[:4]
    reason = declared.reason(backend, "backward", **declared.of_case(case))
    try:
        out, lse = function(case)(**keywords)
    except NotImplementedError as error:
        if reason:
            raise Refused(reason) from None
        raise AssertionError(f"refused, though declared: {error}") from None
    del keywords["return_lse"]

    mask, sink = inputs.logical.get("mask"), inputs.logical.get("sink")
    dout, dlse = draw(case)
    given = {"out": out, "lse": lse, "dout": None, "dlse": None}
    if dout is not None:
        poisoned = np.where(blind_rows(case, mask)[..., None], dout.dtype.type(np.nan), dout)
        stored_dout = store(in_layout(case, poisoned), rng.choice(storages), rng)
        given["dout"] = framework.array(stored_dout)
    if dlse is not None:
        packed = (
            pack(dlse[..., None], case.packed[0], case.tail[0])[..., 0].T if case.packed else dlse
        )
        given["dlse"] = framework.array(store(packed, "plain", rng))
    wanted = {name: bool(rng.random() < 0.85) for name in ("dq", "dk", "dv")}
    wanted["dmask"] = mask is not None and mask.dtype != bool and bool(rng.random() < 0.85)
    wanted["dsink"] = sink is not None and bool(rng.random() < 0.85)
    stored = {}
    for name in ("dq", "dk", "dv"):
        if wanted[name] and rng.random() < 0.5:
            like = inputs.stored[name[1]].view
            how = case.storage if case.storage in storages else "padded"
            stored[name] = store(np.full(like.shape, np.nan).astype(like.dtype), how, rng)
            if 0 in stored[name].strides and like.size > 1:
                del stored[name]  # written arrays have distinct elements
    given |= {name: framework.array(x) for name, x in stored.items()}
    given |= {f"need_{name}": need for name, need in wanted.items()}

    back = fastattn.attention_varlen_backward if case.packed else fastattn.attention_backward
    if asked is not None:
        count(asked, back, given | keywords)
    try:
        results = dict(zip(wanted, back(**given, **keywords), strict=True))
    except NotImplementedError as error:
        if reason:
            raise Refused(reason) from None
        raise AssertionError(f"refused, though declared: {error}") from None
    for name, x in (inputs.stored | stored).items():
        framework.fetch(x, (keywords | given)[name])
    results = {n: x if x is None else framework.numpy(x) for n, x in results.items()}
    out, lse = framework.numpy(out), framework.numpy(lse)
    if case.packed:
        lse = cases.unpack(case, out, lse)[1]
    return Called(inputs, lse, dout, dlse, stored, wanted, results)


def run_once(case, asked=None, framework=None, backend="cpu"):
    called = call(case, asked, framework, backend)
    complaints = [
        f"wrote outside of {n}" for n, x in called.stored.items() if not x.untouched(around=True)
    ]
    stored = called.inputs.stored
    complaints += [f"wrote to {n}" for n, x in stored.items() if not x.untouched()]
    for name, x in called.results.items():
        complaints += [f"{name} is there"] if (x is not None) != called.wanted[name] else []
    got = {name: x for name, x in called.results.items() if x is not None}
    for name in {"dq", "dk", "dv"} & got.keys():
        got[name], clean = unpack(case, got[name], name != "dq")
        complaints += [] if clean else [f"{name}: rows of no sequence are not 0"]
    options = {"softcap": case.softcap, "scale": case.scale, **case.limits}
    options |= {"dropout_p": case.dropout, "seed": case.dropout_seed}
    logical = dict(called.inputs.logical)
    if (mask := logical.get("mask")) is not None:  # as it came, which may have been expanded
        shape = np.broadcast_shapes(mask.shape, stored["mask"].shape)
        logical["mask"] = np.broadcast_to(mask, shape)
        got |= {n: x.reshape(shape) for n, x in got.items() if n == "dmask"}
    given = {"dlse": called.dlse, "lse": called.lse}
    return complaints + reference_backward.check(got, called.dout, **given, **logical, **options)


# ----------------------------------------------------------------------------------- many of them


def count(asked, function, given):
    """Counts the arguments that are not at their defaults, and the calls themselves."""
    name = function.__name__
    asked[name, "calls"] += 1
    for parameter in inspect.signature(function).parameters.values():
        x = given.get(parameter.name, parameter.default)
        plain = x is None or isinstance(x, (bool, int, float, str))
        told = not (plain and x == parameter.default)
        if parameter.name == "dout":
            told = x is None
        asked[name, parameter.name] += bool(told)


def shares(asked):
    """For each function, of how many of its calls each argument is one, in percent."""
    lines = []
    for caller in sorted({name for name, _ in asked}):
        calls = asked[caller, "calls"]
        each = [
            f"{name} {100 * n / calls:.0f}"
            for (mine, name), n in asked.items()
            if mine == caller and name != "calls"
        ]
        lines.append(f"{caller}, {calls} calls, % with: {', '.join(each)}")
    return lines


def main(first, last):
    import fastattn
    from random_cases import random_case

    wrong, asked = 0, collections.Counter()
    for seed in range(first, last):
        case = random_case(seed)
        try:
            complaints = run(case, asked)
        except Exception as error:  # a refusal too: the CPU backend declares all of it
            complaints = [f"{type(error).__name__}: {error}"]
        if complaints:
            wrong += 1
            print(f"WRONG {case!r}\n  {'; '.join(complaints)}", flush=True)
    print(*shares(asked), sep="\n")
    level = fastattn.info()["cpu"]["level"]
    print(f"{luck.redrawn} of {luck.judged} not in float64 were right in other draws only")
    print(f"{last - first} cases, {wrong} wrong, from {first}, at level {level}")
    return wrong > 0 or luck.strained


if __name__ == "__main__":  # python tests/gradient_cases.py FIRST LAST
    sys.exit(main(*map(int, sys.argv[1:])))
