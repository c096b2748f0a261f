"""Gradients by their definition, on torch tensors, and how far others may be from them.

One key head of one sequence is judged, with the query heads that share it: the last, of packed
sequences the longest. `low` is what a careful unfused path gives: all in float32, but P and dS
rounded to the inputs' dtype before their products, and each result once. A gradient's largest error
may be twice that path's and twice the rounding, its mean error 1.5 times that path's.
"""

import math
import time

import numpy as np

from . import arrays as forward
from . import formula
from .cells import DENSE, WINDOWS, changes

ROWS = 1024  # that are computed at once
SUMS = 4e-6  # float32 sums of terms that are some units large, and cancel
NAMES = ("dq", "dk", "dv", "dmask")
REPEATS, SECONDS = 1000, 3.0  # of a deterministic call: whichever is reached first


def make_inputs(arrays, cell, seed=0):
    """q, k, v, mask and the gradient of the output."""
    rng, (_, dv) = np.random.default_rng((seed, 1)), cell.kv
    if cell.lengths:
        dout = arrays.normal(rng, (cell.rows, cell.hq, dv), cell.dtype).transpose(0, 1)[None]
    else:
        dout = arrays.normal(rng, (cell.b, cell.hq, cell.s, dv), cell.dtype)
    return *forward.make_inputs(arrays, cell, seed), dout


def of_rows(
    q,
    k,
    v,
    dout,
    seen,
    *,
    softcap=0.0,
    added=0.0,
    sink=None,
    kept=None,
    dropout_p=0.0,
    narrow=lambda x: x,
):
    """(dq, dk, dv, ds): what some rows of n heads give, in the precision of q (n, rows, d), k and v
    (n or 1, sk, d or dv). Each row sees a key. The keywords are those of formula.attention."""
    import torch

    scale, slope = q.shape[-1] ** -0.5, 1.0
    s = scale * (q @ k.mT)
    if softcap:
        bent = torch.tanh(s / softcap)
        s, slope = softcap * bent, 1 - bent * bent
    s = (s + added).masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1, keepdim=True)
    if sink is not None:
        lse = torch.logaddexp(lse, sink)
    p = (s - lse).exp()
    gain = 1.0 if kept is None else kept.to(q.dtype) / (1 - dropout_p)
    given = narrow(p * gain)
    delta = (dout * narrow(given @ v)).sum(-1, keepdim=True)
    ds = p * ((dout @ v.mT) * gain - delta)
    steep = narrow(scale * slope * ds)
    return steep @ k, (steep.mT @ q).sum(0), (given.mT @ dout).sum(0), ds


def judged(cell, x):
    """Of an array (b, h, s, d), packed or not, the part that is judged, in the same layout."""
    heads = x.shape[1] // cell.kv[0]
    if cell.lengths:
        n = int(cell.packed.argmax())
        end = int(cell.packed[: n + 1].sum())
        return x[:, -heads:, end - int(cell.packed[n]) : end]
    return x[-1:, -heads:]


def changed(cell, like, mask, at, heads, first, last):
    """(seen, keywords) of of_rows for the rows from first to last of some heads of sequence `at`;
    `like` is q there, (n, s, d)."""
    import torch

    def there(x):
        return torch.as_tensor(x).to(like.device, like.dtype)

    keys = torch.arange(like.shape[1], device=like.device)
    distance, change = keys[first:last, None] - keys, dict(changes(cell))
    seen = torch.ones_like(distance, dtype=torch.bool)
    if cell.mask == "causal" or cell.mask in WINDOWS:
        seen = (distance >= 0) & (distance < WINDOWS.get(cell.mask, cell.s))
    elif cell.mask in ("bool", "blocks"):
        seen = mask[first:last]
    elif cell.mask in DENSE:
        part = {"": mask, "b": mask[at, 0], "h": mask[heads]}[DENSE[cell.mask]]
        change["added"] = part[..., first:last, :].to(like.dtype)
    if "alibi_slopes" in change:
        slopes = there(change.pop("alibi_slopes")[heads])[:, None, None]
        change["added"] = -slopes * distance.abs()
    if "sink" in change:
        change["sink"] = there(change["sink"][heads])[:, None, None]
    if "dropout_p" in change:
        numbers = np.arange(cell.hq)[heads]
        rows, seed = np.arange(first, min(last, cell.s)), change.pop("seed")
        sequence = np.full(len(numbers), at % cell.b)
        kept = formula.kept(sequence, numbers, rows, cell.s, change["dropout_p"], seed)
        change["kept"] = torch.from_numpy(kept).to(like.device)
    return seen, change


def narrowing(torch, dtype, low):
    """(the precision to compute in, how P and dS are stored)"""
    if low:
        return torch.float32, lambda x: x.to(dtype).float()
    return torch.float64, lambda x: x


def of_one_head(cell, inputs, low=False):
    """{name: gradient} of what is judged: dq (n, s, d), dk and dv (s, d)."""
    import torch

    q, k, v, mask, dout = inputs
    real, narrow = narrowing(torch, q.dtype, low)
    q, k, v, dout = (judged(cell, x)[0].to(real) for x in (q, k, v, dout))
    heads, found = slice(cell.hq - len(q), cell.hq), ([], 0, 0)
    for first in range(0, q.shape[1], ROWS):
        rows = slice(first, first + ROWS)
        seen, change = changed(cell, q, mask, -1, heads, first, first + ROWS)
        mine = q[:, rows], k, v, dout[:, rows]
        dq, dk, dv, _ = of_rows(*mine, seen, narrow=narrow, **change)
        found = ([*found[0], dq], found[1] + dk, found[2] + dv)
    return dict(zip(NAMES, (torch.cat(found[0], 1), *found[1:]), strict=False))


def of_mask(cell, inputs, low=False):
    """dmask, (1, rows, s): of up to 64 last rows, where the mask is not that of all sequences and
    heads at once of the first head that has one."""
    import torch

    q, k, v, mask, dout = inputs
    real, narrow = narrowing(torch, q.dtype, low)
    group, total, axes = cell.hq // cell.kv[0], 0, DENSE[cell.mask]
    heads = slice(0, 1) if "h" in axes else slice(0, cell.hq)
    first = max(0, cell.s - 64)
    for at in [-1] if "b" in axes else range(cell.b):
        keys, values = (x[at].to(real).repeat_interleave(group, 0)[heads] for x in (k, v))
        mine, gradient = q[at, heads].to(real), dout[at, heads].to(real)
        seen, change = changed(cell, mine, mask, at, heads, first, cell.s)
        given = mine[:, first:], keys, values, gradient[:, first:]
        total = total + of_rows(*given, seen, narrow=narrow, **change)[3].sum(0, keepdim=True)
    return total


def sampled(arrays, cell, inputs):
    """{name: (the float64 gradient, the careful path's)} of what is judged."""
    dtype, samples = inputs[0].dtype, {}
    exact, low = (of_one_head(cell, inputs, low) for low in (False, True))
    if inputs[3] is not None and cell.mask_bytes == 2:
        exact["dmask"], low["dmask"] = (of_mask(cell, inputs, low) for low in (False, True))
    for name, ref in exact.items():
        samples[name] = ref, low[name].to(dtype).double()
    return samples


def part_of(cell, name, x):
    """Of a whole gradient what `sampled` has."""
    if name == "dmask":
        lead = {"": (), "b": (-1, 0), "h": (0,)}[DENSE[cell.mask]]
        return x[lead][None, max(0, cell.s - 64) :]
    mine = judged(cell, x)[0]
    return mine if name == "dq" else mine[0]


def check(cell, samples, found):
    """What a row says of the gradients (dq, dk, dv) or (dq, dk, dv, dmask): of each the largest and
    the mean error; of all, the error that is nearest to its bound, or the furthest above."""
    errors, worst = {}, (-1.0, 0.0, 1.0)
    for name, x in zip(NAMES, found, strict=False):
        if name not in samples:
            continue
        exact, low = samples[name]
        error, careful = (part_of(cell, name, x).double() - exact).abs(), (low - exact).abs()
        most, mean = float(error.max()), float(error.mean())
        rounding = float((exact.to(x.dtype).double() - exact).abs().max())
        pairs = [
            (most, 2 * float(careful.max()) + 2 * rounding + SUMS),
            (mean, 1.5 * float(careful.mean()) + SUMS / 8),
        ]
        if not bool(x.isfinite().all()):  # the buffers held NaN before
            pairs = [(math.inf, 0.0)]
        errors[name] = [most, mean]
        ratios = [(error / bound if bound else error, error, bound) for error, bound in pairs]
        worst = max(worst, *ratios)
    return {"error": worst[1], "bound": worst[2], "errors": errors}


def repeats(arrays, cell, call, found):
    """(whether later calls give the same bits, how many were made). Of a call that is not to be
    deterministic dq may differ: the order of its sums moves."""
    checked = slice(None) if cell.deterministic else slice(1, 3)
    start, n = time.perf_counter(), 0
    while not n or (cell.deterministic and n < REPEATS and time.perf_counter() - start < SECONDS):
        n += 1
        pairs = zip(call()[checked], found[checked], strict=True)
        if not all(arrays.equal(x, y) for x, y in pairs):
            return False, n
    return True, n
