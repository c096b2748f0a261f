"""The cases of cases.py for attention_backward: one call, from a case to the complaints.

The forward is called first, for out and lse. dout, dlse and which gradients are wanted are drawn
from the case's seed; dq, dk and dv are the caller's arrays in half of the cases, in any storage.
"""

from dataclasses import replace

import numpy as np
import reference
import reference_backward
from cases import NumPy, Refused, arguments, dtype_of, function, make_inputs, pack
from storage import STORAGES, store


def draw(case):
    """dout (b, hq, sq, dv) and dlse (b, hq, sq), of which one may be None."""
    rng = np.random.default_rng([case.seed, 1])
    dtype = dtype_of(case.dtype)
    dout = rng.standard_normal((case.b, case.hq, case.sq, case.dv)).astype(dtype)
    dlse = None
    if rng.random() < 0.3:
        dlse = rng.standard_normal(dout.shape[:3]).astype(reference.lse_dtype(dtype))
        if rng.random() < 0.2:
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


def run(case):
    """The complaints about one case; as in cases.run(), bad luck in float32 is drawn anew."""
    complaints = run_once(case)
    ratios = [getattr(said, "ratio", np.inf) for said in complaints]
    if case.dtype == "float32" and complaints and max(ratios) < 3:
        again = (replace(case, seed=case.seed + n * 2**32) for n in (1, 2))
        if not any(run_once(other) for other in again):
            return []
    return complaints


def run_once(case):
    import fastattn

    rng = np.random.default_rng([case.seed, 2])
    framework = NumPy()
    inputs = make_inputs(case)
    keywords = arguments(case, inputs, framework)
    try:
        out, lse = function(case)(**keywords)
    except NotImplementedError as error:
        raise Refused(str(error)) from None
    del keywords["return_lse"]

    mask, sink = inputs.logical.get("mask"), inputs.logical.get("sink")
    dout, dlse = draw(case)
    given = {"out": out, "lse": lse, "dout": None, "dlse": None}
    if dout is not None:
        poisoned = np.where(blind_rows(case, mask)[..., None], dout.dtype.type(np.nan), dout)
        given["dout"] = store(in_layout(case, poisoned), rng.choice(STORAGES[:-1]), rng).view
    if dlse is not None:
        packed = (
            pack(dlse[..., None], case.packed[0], case.tail[0])[..., 0].T if case.packed else dlse
        )
        given["dlse"] = np.ascontiguousarray(packed)
    wanted = {name: bool(rng.random() < 0.85) for name in ("dq", "dk", "dv")}
    wanted["dmask"] = mask is not None and mask.dtype != bool and bool(rng.random() < 0.85)
    wanted["dsink"] = sink is not None and bool(rng.random() < 0.85)
    stored = {}
    for name in ("dq", "dk", "dv"):
        if wanted[name] and rng.random() < 0.5:
            like = inputs.stored[name[1]].view
            stored[name] = store(np.full(like.shape, np.nan).astype(like.dtype), case.storage, rng)
            if 0 in stored[name].strides and like.size > 1:
                del stored[name]  # written arrays have distinct elements
    given |= {name: x.view for name, x in stored.items()}
    given |= {f"need_{name}": need for name, need in wanted.items()}

    back = fastattn.attention_varlen_backward if case.packed else fastattn.attention_backward
    results = dict(zip(wanted, back(**given, **keywords), strict=True))
    complaints = [
        f"wrote outside of {n}" for n, x in stored.items() if not x.untouched(around=True)
    ]
    complaints += [f"wrote to {n}" for n, x in inputs.stored.items() if not x.untouched()]
    complaints += [f"{n} is there" for n, x in results.items() if (x is not None) != wanted[n]]
    got = {name: x for name, x in results.items() if x is not None}
    for name in {"dq", "dk", "dv"} & got.keys():
        got[name], clean = unpack(case, got[name], name != "dq")
        complaints += [] if clean else [f"{name}: rows of no sequence are not 0"]
    options = {"softcap": case.softcap, "scale": case.scale, **case.limits}
    options |= {"dropout_p": case.dropout, "seed": case.dropout_seed}
    logical = dict(inputs.logical)
    if mask is not None:  # the mask as it came, which may have been expanded
        shape = inputs.stored["mask"].shape
        logical["mask"] = np.broadcast_to(mask, np.broadcast_shapes(mask.shape, shape))
        got |= {n: x.reshape(logical["mask"].shape) for n, x in got.items() if n == "dmask"}
    return complaints + reference_backward.check(got, dout, dlse=dlse, **logical, **options)


if __name__ == "__main__":  # python tests/gradient_cases.py FIRST LAST
    import sys

    from random_cases import random_case

    wrong = 0
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        if complaints := run(random_case(seed)):
            wrong += 1
            print(f"WRONG {random_case(seed)!r}\n  {'; '.join(complaints)}", flush=True)
    print(f"{int(sys.argv[2]) - int(sys.argv[1])} cases, {wrong} wrong")
    sys.exit(wrong > 0)
