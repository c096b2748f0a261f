"""attention_sparse against its definition: random calls, forward and gradients."""

import fastattn
import numpy as np
import pytest
import reference_sparse
from sparse_cases import random_call

SEEDS = 10  # for each dtype
NAMES = ("dq", "dk", "dv", "dgate", "dsink")


def poisoned(call):
    """The call with NaN in all that no row sees, and what the definition says is seen."""
    arrays, keywords = dict(call.arrays), dict(call.keywords)
    (b, _, sq, _), (_, hk, sk, _) = arrays["q"].shape, arrays["k"].shape
    names = ("causal", "window", "q_offset", "q_lengths", "k_lengths", "k_start")
    limits = {n: x for n, x in keywords.items() if n in names}
    lists = {n: keywords.get(n) for n in ("counts", "gate", "window_union")}
    lists |= {n: keywords[n] for n in ("q_block", "k_block")}
    c = reference_sparse.columns(b, hk, sq, sk, arrays["key_lists"], **lists, **limits)
    reached = np.zeros((b, hk, sk), bool)
    n, h = np.ogrid[:b, :hk]
    np.logical_or.at(reached, (n[..., None, None], h[..., None, None], c.key), c.seen)
    for name in ("k", "v"):
        arrays[name] = np.where(reached[..., None], arrays[name], np.nan).astype(arrays[name].dtype)
    rows = np.repeat(c.seen.any(axis=3), arrays["q"].shape[1] // hk, axis=1)
    arrays["q"] = np.where(rows[..., None], arrays["q"], np.nan).astype(arrays["q"].dtype)
    if (gate := keywords.get("gate")) is not None:
        used = reference_sparse._to_entries(c.seen.astype(float), c, gate)
        keywords["gate"] = np.where(used > 0, gate, np.nan).astype(gate.dtype)
    return arrays, keywords


def run(call, poison):
    """{name: array} of all results of the call."""
    arrays, keywords = poisoned(call) if poison else (call.arrays, call.keywords)
    q, k, v, lists = arrays.values()
    out = np.full((*q.shape[:3], v.shape[3]), np.nan).astype(q.dtype)
    given, lse, mass = fastattn.attention_sparse(
        q, k, v, lists, **keywords, out=out, return_lse=True, return_mass=True
    )
    assert given is out
    needs = {"need_dgate": "gate" in keywords, "need_dsink": "sink" in keywords}
    found = fastattn.attention_sparse_backward(
        call.dout, q, k, v, out, lse, lists, dlse=call.dlse, **needs, **keywords
    )
    gradients = {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}
    return {"out": out, "lse": lse, "mass": mass, **gradients}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_random_calls(dtype):
    for seed in range(SEEDS):
        call = random_call(seed, dtype)
        q, k, v, lists = call.arrays.values()
        results = run(call, poison=seed % 2 == 1)
        said = reference_sparse.complaints(
            results, q, k, v, lists, dout=call.dout, dlse=call.dlse, **call.keywords
        )
        assert not said, f"seed {seed}: {call}: {said}"
