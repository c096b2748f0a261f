"""Attention by its definition, of NumPy's and of torch's arrays: one formula for the benchmark and
for the tests of large shapes on a GPU. tests/reference.py says the same of whole batches."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Heads:
    out: object  # (n, rows, dv)
    lse: object  # (n, rows)
    empty: object  # (n, rows) bool: no final score above -inf
    biggest: float  # max |scale q k| of what is seen


@np.errstate(all="ignore")
def attention(
    xp,
    q,
    k,
    v,
    seen,
    *,
    scale=None,
    softcap=0.0,
    added=0.0,
    sink=None,
    kept=None,
    dropout_p=0.0,
    narrow=None,
):
    """Some rows of n heads, in the precision of q (n, rows, d), k (n, sk, d) and v (n, sk, dv);
    `xp` is their module, numpy or torch. `seen` (n or 1, rows, sk), bool; `added` to the scaled
    scores, after softcap; `sink` a number or (n, 1, 1); `kept`, bool as `seen`: what dropout
    leaves. `narrow` is how a careful unfused path stores the probabilities."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    s = scale * (q @ k.swapaxes(1, 2))
    size = xp.nan_to_num(xp.abs(xp.where(seen, s, 0.0)))
    biggest = float(size.max()) if math.prod(size.shape) else 0.0
    if softcap:
        wide = s if 1e-30 < softcap < 1e30 else xp.asarray(s, dtype=xp.float64)  # a float holds it
        s = xp.asarray(softcap * xp.tanh(wide / softcap), dtype=s.dtype)
    s = xp.where(seen, s + xp.asarray(added, dtype=s.dtype), -math.inf)

    # The sink is one score more, of no value.
    first = xp.zeros_like(q[..., :1]) + (-math.inf if sink is None else sink)
    peak = xp.maximum(first, xp.amax(s, axis=2, keepdims=True)) if s.shape[2] else first
    shift = xp.where(peak == -math.inf, 0.0, peak)
    p = xp.exp(s - shift)
    total = p.sum(axis=2, keepdims=True) + xp.exp(first - shift)
    lse = (xp.log(total) + shift)[..., 0]
    p = xp.where(total == 0, 0.0, p / total)
    if kept is not None:
        p = xp.where(kept, p / (1 - dropout_p), 0.0)
    if narrow is not None:
        p = narrow(p)

    empty = (s == -math.inf).all(2)
    reached = xp.where(seen.any(1)[..., None], v, 0.0)  # what no row sees reaches nothing
    out = xp.where(empty[..., None], 0.0, p @ reached)
    return Heads(out, lse, empty, biggest)


def kept(b, h, rows, sk, p, seed):
    """(n, rows, sk) bool: what dropout leaves of the heads (b[i], h[i]); Philox4x32-7, as in
    philox.h."""
    groups = np.arange(-(-sk // 8))
    b, h = (np.asarray(x)[:, None, None] for x in (b, h))
    counter = (x.astype(np.uint64) for x in (groups, np.asarray(rows)[:, None], h, b))
    x = np.broadcast_arrays(*counter)
    low = np.uint64(2**32 - 1)
    for n in range(7):
        keys = (seed + n * 0x9E3779B9) % 2**32, ((seed >> 32) + n * 0xBB67AE85) % 2**32
        first, third = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        even = (y >> np.uint64(32) for y in (third, first))
        even = [a ^ b ^ np.uint64(key) for a, b, key in zip(even, x[1::2], keys, strict=True)]
        x = [even[0], third & low, even[1], first & low]
    bits = np.stack([half for y in x for half in (y & np.uint64(0xFFFF), y >> np.uint64(16))], -1)
    return bits.reshape(*bits.shape[:2], -1)[..., :sk] >= round(p * 65536)


def rounded(x, dtype):
    """x in `dtype`, as float64 (bfloat16 by hand, for NumPy has none)."""
    if dtype != "bf16":
        return x.astype(np.float32 if dtype == "fp32" else np.float16).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)
