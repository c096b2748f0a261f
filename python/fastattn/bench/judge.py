"""How far an output is from float64, and how far it may be: twice the error of a careful unfused
path in its dtype, and the rounding of the output."""

import math

import numpy as np

from . import formula
from .cells import DENSE, WINDOWS, changes
from .formula import rounded


def reference(q, k, v, seen, dtype, **change):
    """Rows of one head, q (rows, d), k (sk, d), v (sk, dv), seen (rows, sk): the float64 result and
    what the careful unfused path gives, scores and sums in float32, probabilities in `dtype`."""

    def heads(kind, narrow=None):
        inputs = (x[None].astype(kind) for x in (q, k, v))
        return formula.attention(np, *inputs, seen[None], narrow=narrow, **change).out[0]

    low = heads(np.float32, lambda p: rounded(p, dtype).astype(np.float32))
    return heads(np.float64), rounded(low, dtype)


def sampled(arrays, cell, inputs):
    """The reference on up to 64 rows of up to four heads, the first and last of both among them:
    [(b, h, rows, exact, low)]."""
    if cell.lengths:
        return sampled_packed(arrays, cell, *inputs[:3])
    q, k, v, mask = inputs
    rng = np.random.default_rng(1)
    heads = {(0, 0), (cell.b - 1, cell.hq - 1)}
    heads |= {(int(rng.integers(cell.b)), int(rng.integers(cell.hq))) for _ in range(2)}
    rows = np.unique(np.r_[0, cell.s - 1, rng.integers(0, cell.s, 62)])
    seen, samples = visible(arrays, cell, mask, rows), []
    for b, h in sorted(heads):
        qi, kj, vj = (arrays.float64(x[b, h * x.shape[1] // cell.hq]) for x in (q, k, v))
        change = changed(arrays, cell, mask, b, h, rows)
        samples.append((b, h, rows, *reference(qi[rows], kj, vj, seen, cell.dtype, **change)))
    return samples


def visible(arrays, cell, mask, rows):
    """(rows, s) bool: the keys that these rows see."""
    distance = rows[:, None] - np.arange(cell.s)
    if cell.mask == "causal":
        return distance >= 0
    if cell.mask in WINDOWS:
        return (distance >= 0) & (distance < WINDOWS[cell.mask])
    if cell.mask in ("bool", "blocks"):
        return arrays.float64(mask)[rows] > 0
    return np.ones(distance.shape, bool)


def changed(arrays, cell, mask, b, h, rows):
    """The formula's keywords for what changes the scores of these rows."""
    change = changes(cell)
    more = {"softcap": change.get("softcap", 0.0), "sink": change.get("sink", {h: None})[h]}
    if cell.mask_bytes == 2 and cell.mask in DENSE:
        at = {"": (), "b": (b, 0), "h": (h,)}[DENSE[cell.mask]]
        more["added"] = arrays.float64(mask[at])[rows]
    if "alibi_slopes" in change:
        distance = np.abs(rows[:, None] - np.arange(cell.s))
        more["added"] = -change["alibi_slopes"][h].astype(np.float64) * distance
    if "dropout_p" in change:
        more["dropout_p"] = p = change["dropout_p"]
        more["kept"] = formula.kept([b], [h], rows, cell.s, p, change["seed"])
    return more


def sampled_packed(arrays, cell, q, k, v):
    """As `sampled`, of the longest sequence, the first, the last and one more; b is 0."""
    rng, n, samples = np.random.default_rng(1), cell.packed, []
    for b in sorted({0, cell.b - 1, int(n.argmax()), int(rng.integers(cell.b))}):
        h, mine = int(rng.integers(cell.hq)), slice(int(n[:b].sum()), int(n[: b + 1].sum()))
        rows = np.unique(np.r_[0, n[b] - 1, rng.integers(0, n[b], 62)])
        seen = np.ones((len(rows), n[b]), bool)
        if cell.mask == "causal":
            seen = rows[:, None] >= np.arange(n[b])
        qi, kj, vj = (arrays.float64(x[0, h * x.shape[1] // cell.hq, mine]) for x in (q, k, v))
        rest = reference(qi[rows], kj, vj, seen, cell.dtype)
        samples.append((0, h, mine.start + rows, *rest))
    return samples


def check(arrays, dtype, samples, out):
    """(error, bound) of `out` on the samples. Every other element has to be finite: the buffers
    held NaN before."""
    worst = np.zeros(3)
    for b, h, rows, exact, low in samples:
        rounding = np.abs(rounded(rounded(exact + 0.3, dtype) - 0.3, dtype) - exact)
        if dtype == "fp32":
            rounding += 4 * np.spacing(np.float32(np.abs(exact).max()))
        errors = (arrays.float64(out[b, h])[rows] - exact, low - exact, rounding)
        worst = np.maximum(worst, [np.abs(x).max() for x in errors])
    if not arrays.finite(out):
        worst[0] = math.inf
    return float(worst[0]), float(2 * worst[1] + 2 * worst[2])
