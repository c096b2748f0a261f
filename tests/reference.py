"""What attention means, in NumPy, and how right is right.

`attention` is the definition: one line per feature, in the order in which they act. It is computed
in float64 (`exact`; in extended precision for float64 inputs) or in the careful unfused form `low`:
scores and softmax in float32, P rounded to the inputs' dtype, P V accumulated in float32, one
rounding at the end. `judge` compares a result with both. Arrays are (b, h, s, d); nothing here is
fast, all of it is plain.
"""

import functools
from dataclasses import dataclass

import numpy as np

ORDERS = 4  # of the sums of a float32 path
UNLUCKY = 0.0015  # right float32 results that break the rule all the same, see `careful`


@dataclass
class Result:
    out: np.ndarray  # (b, hq, sq, dv)
    lse: np.ndarray  # (b, hq, sq)
    biggest: float  # max |scale * q.k| over what is seen
    empty: np.ndarray  # (b, hq, sq) bool: every final s of the row is -inf
    seen: np.ndarray  # (b, hq, sq, sk) bool: inside the row's interval and, with a bool mask, True


def interval(
    b,
    sq,
    sk,
    *,
    causal=False,
    window=None,
    q_offset=None,
    q_lengths=None,
    k_lengths=None,
    k_start=None,
):
    """(b, sq, sk) bool: the keys inside each row's interval; and (b, sq, 1): the row's position i'.

    Lengths outside 0 .. s count as the nearest end, as the kernels clamp them.
    """

    def of_sequence(lengths, default, limit):
        lengths = np.full(b, default) if lengths is None else np.asarray(lengths, np.int64)
        return np.clip(lengths, 0, limit)[:, None, None]

    i, j = np.arange(sq)[None, :, None], np.arange(sk)[None, None, :]
    q_length, k_length = of_sequence(q_lengths, sq, sq), of_sequence(k_lengths, sk, sk)
    left, right = (x if x is None else clamp_shift(x) for x in window or (None, None))

    position = i + (0 if causal == "top-left" else k_length - q_length)
    if q_offset is not None:
        position = i + np.broadcast_to(clamp_shift(q_offset), (b,))[:, None, None]
    inside = (i < q_length) & (j < k_length) & (j >= of_sequence(k_start, 0, sk))
    if causal:
        inside &= j <= position
    if left is not None:
        inside &= j >= position - left
    if right is not None:
        inside &= j <= position + right
    return inside, np.broadcast_to(position, (b, sq, 1))


def clamp_shift(x):
    """Window bounds and offsets beyond every key count as the nearest that are not too large."""
    return np.asarray(np.clip(np.array(x, object), -(2**30), 2**30), np.int64)


def is_bool(mask):
    return mask is not None and mask.dtype == bool


def visible(b, hq, sq, sk, mask=None, **limits):
    """(b, hq, sq, sk) bool: row (b, h, i) sees key j."""
    inside, _ = interval(b, sq, sk, **limits)
    inside = np.broadcast_to(inside[:, None], (b, hq, sq, sk))
    return inside & mask if is_bool(mask) else inside


@dataclass
class Weights:
    """What a softmax is made of, each (b, hq, sq, sk) or (b, hq, sq, 1)."""

    p: np.ndarray  # exp(s - lse), before dropout
    gain: np.ndarray | float  # what dropout multiplies p by: 0 or 1 / (1 - dropout_p)
    slope: np.ndarray | float  # ds / d(scale * q.k): what softcap leaves of it
    lse: np.ndarray
    scale: float
    biggest: float
    empty: np.ndarray
    padding: np.ndarray
    seen: np.ndarray


@np.errstate(all="ignore")
def weights(
    q,
    k,
    *,
    mask=None,
    softcap=0.0,
    alibi_slopes=None,
    sink=None,
    scale=None,
    dropout_p=0.0,
    seed=0,
    real=np.float64,
    product=np.matmul,
    **limits,
):
    """Weights of q and k, which are `real`; `limits` are the keywords of `interval`."""
    (b, hq, sq, d), sk = q.shape, k.shape[2]
    _, position = interval(b, sq, sk, **limits)
    seen = visible(b, hq, sq, sk, mask, **limits)

    scale = real((d or 1) ** -0.5 if scale is None else scale)
    s = scale * by_group(product, q, k.swapaxes(2, 3))
    biggest, slope = np.max(np.abs(s), where=seen, initial=0), 1.0
    if softcap:
        wide = np.float64 if real == np.float32 and not 1e-30 < softcap < 1e30 else real
        t = np.tanh(s / wide(softcap))
        s, slope = (wide(softcap) * t).astype(real), (1 - t * t).astype(real)
    if mask is not None and not is_bool(mask):
        s = s + mask.astype(real)
    if alibi_slopes is not None:
        slopes = np.broadcast_to(alibi_slopes.astype(real), (b, hq))[:, :, None, None]
        s = s - slopes * np.abs(position - np.arange(sk)).astype(real)[:, None]
    s = np.where(seen, s, -np.inf)

    first = -np.inf if sink is None else sink.astype(real)[None, :, None, None]
    peak = np.maximum(np.max(s, axis=3, keepdims=True, initial=-np.inf), first)
    shift = np.where(peak == -np.inf, 0, peak)
    p = np.exp(s - shift)
    total = p.sum(axis=3, keepdims=True, dtype=real) + np.exp(real(1) * first - shift)
    lse = np.log(total) + shift
    p = np.divide(p, total, where=total != 0, out=np.zeros_like(p))
    gain = 1.0
    if dropout_p:
        gain = 0 if dropout_p == 1 else 1 / (1 - real(dropout_p))
        gain = np.where(kept(b, hq, sq, sk, dropout_p, seed), real(gain), 0)

    empty = (s == -np.inf).all(axis=3)
    padding = np.broadcast_to((np.arange(sq) >= _q_lengths(b, sq, **limits))[:, None], empty.shape)
    return Weights(p, gain, slope, lse, scale, float(biggest), empty, padding, seen)


def real_of(dtype, low):
    """The type that is computed in."""
    return np.float32 if low else np.longdouble if dtype == np.float64 else np.float64


def product_of(dtype, low, order):
    if low and dtype == np.float32:
        return functools.partial(fused_product, order=order)
    return np.matmul


@np.errstate(all="ignore")
def attention(q, k, v, *, low=False, order=0, real=None, **keywords):
    """softmax(scores) v with every feature: the keywords of `weights`, and of `interval`.

    `order`: 0, or the seed of a random order, in which `low` adds float32 products. `real`: what
    is computed in, where real_of() does not say.
    """
    dtype = q.dtype
    real, product = real or real_of(dtype, low), product_of(dtype, low, order)
    q, k, v = q.astype(real), k.astype(real), v.astype(real)
    w = weights(q, k, **keywords, real=real, product=product)
    p = np.where(w.gain == 0, 0, w.p * w.gain)
    if low:
        p = p.astype(dtype).astype(real)
    reached = w.seen.any(axis=(1, 2))[:, None, :, None]  # what no row sees reaches nothing
    out = by_group(product, p, np.where(reached, v, 0))
    if keywords.get("dropout_p") == 1:
        out = np.zeros_like(out)
    out = np.where(w.empty[..., None], 0, out)
    lse = np.where(w.padding, -np.inf, w.lse[..., 0])
    return Result(out.astype(dtype) if low else out, lse, w.biggest, w.empty, w.seen)


def by_group(product, a, b):
    """The product of each of a's heads with the head of b that its group shares."""
    (n, heads, rows, inner), (_, few, _, columns) = a.shape, b.shape
    if not heads:
        return np.zeros((n, 0, rows, columns), a.dtype)
    a = a.reshape(n, few, heads // few, rows, inner)
    return product(a, b[:, :, None]).reshape(n, heads, rows, columns)


def kept(b, hq, sq, sk, dropout_p, seed):
    """(b, hq, sq, sk) bool: the elements of P that dropout leaves. 16 bits for each key."""
    groups = -(-sk // 8)
    axes = np.ogrid[:b, :hq, :sq, :groups]
    counter = np.stack(np.broadcast_arrays(*axes[::-1]), axis=-1)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    bits = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(b, hq, sq, 8 * groups)
    return bits[..., :sk] >= round(dropout_p * 65536)


def philox(counter, key):
    """Philox4x32-7 (Salmon et al., 2011, section 3) of counters (..., 4)."""
    x, mask = [counter[..., n].astype(np.uint64) for n in range(4)], 0xFFFFFFFF
    for n in range(7):
        k0, k1 = (key[0] + n * 0x9E3779B9) & mask, (key[1] + n * 0xBB67AE85) & mask
        a, c = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(c >> 32) ^ x[1] ^ k0, c & mask, (a >> 32) ^ x[3] ^ k1, a & mask]
    return np.stack(x, axis=-1)


def fused_product(a, b, order):
    """a @ b in float32, one fused multiply-add after another, in one of many orders.

    For float32 inputs the rounding of these sums is all there is, and NumPy's own product may sum
    in blocks, by the BLAS and the shape: more exactly than a kernel can be asked to.
    """
    sums = np.zeros(a.shape[:-1] + b.shape[-1:], np.float32)
    a, b, exact = a.astype(np.float64), b.astype(np.float64), np.empty(sums.shape)
    steps = np.arange(a.shape[-1])
    for i in np.random.default_rng(order).permutation(steps) if order else steps:
        np.multiply(a[..., i : i + 1], b[..., i : i + 1, :], out=exact)
        np.add(exact, sums, out=exact)
        sums[...] = exact
    return sums


def check(out, lse, q, k, v, **keywords):
    """Complaints about the result of `attention(q, k, v, **keywords)`; lse may be None."""
    wide = widen(v, q.shape[0] * q.shape[1] * q.shape[2])
    exact = attention(q, k, wide, **keywords)
    if q.dtype == np.float64:
        return judge(out, lse, exact, None, v)
    paths: list[Result] = []
    for path in careful(q, k, wide, **keywords):  # another can only raise the limits
        paths.append(path)
        complaints = judge(out, lse, exact, paths, v)
        if not complaints:
            break
    return complaints


def careful(q, k, v, **keywords):
    """Yields what careful unfused paths give; for float32 some that add in other orders.

    There the rounding of the sums is all there is, and a few scores may make most of the error of
    all outputs, so that one path's error is luck: of two paths that differ in nothing but the order
    of their sums, one breaks the rule against the other in 1.5 % of random cases. A result has to
    be as good as the worst of these paths, which leaves 0.15 % (UNLUCKY);
    `cases.run` draws those anew.
    """
    for n in range(ORDERS if q.dtype == np.float32 else 1):
        yield attention(q, k, v, **keywords, low=True, order=n)


def _q_lengths(b, sq, q_lengths=None, **_):
    return np.full((b, 1), sq) if q_lengths is None else np.asarray(q_lengths)[:, None]


def merge_states(outs, lses):
    """lse = logaddexp over the parts, out = sum_i exp(lse_i - lse) out_i; all empty: 0 and -inf.

    A part is empty where its lse is -inf, or +inf.
    """
    outs, lses = np.stack(outs).astype(np.float64), np.stack(lses).astype(np.float64)
    lses = np.where(lses == np.inf, -np.inf, lses)  # as others say of a part without keys
    lse = np.logaddexp.reduce(lses, axis=0)
    weight = np.exp(lses - np.where(lse == -np.inf, 0, lse))[..., None]
    return np.where(weight == 0, 0, weight * outs).sum(axis=0), lse


def widen(v, rows):
    """v with more columns, for outputs of few elements.

    The rule compares maxima, and the maximum of a handful of errors is luck: `low` may hit a
    representable number where a better kernel misses it. So few elements are judged by the errors
    of 512 and more: the same P, with columns of v whose signs are drawn anew.
    """
    dv, rng = v.shape[3], np.random.default_rng(0)
    copies = -(-512 // (rows * dv)) if 0 < rows * dv < 512 else 1
    signs = 2 * rng.integers(0, 2, (v.shape[2], dv * copies), np.int8) - 1
    signs[:, :dv] = 1
    return np.tile(v, copies) * signs.astype(v.dtype)


def ulp(x, dtype):
    """The distance between neighbours of `dtype` at x."""
    info = finfo(dtype)
    return float(info.eps) * 2.0 ** np.floor(np.log2(max(float(x), float(info.tiny))))


def finfo(dtype):
    if np.dtype(dtype).name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.finfo(dtype)
    return np.finfo(dtype)


def judge(out, lse, exact, low, v=None):
    """Complaints about a result, none if it is right; `low` is one Result or several.

    `lse` may be None, and `low` for float64, which needs `v` instead. exact.out and low.out may
    have more columns than `out`, see `widen`.
    """
    return [
        *judge_out(out, exact, low, v),
        *([] if lse is None else judge_lse(lse, exact, low, out.dtype)),
    ]


@np.errstate(all="ignore")
def judge_out(out, exact, low, v=None):
    dtype, dv = out.dtype, out.shape[-1]
    ref = exact.out[..., :dv]
    got = out.astype(ref.dtype)
    if out.shape != ref.shape:
        return [f"out has shape {out.shape}, not {ref.shape}"]
    if (got[exact.empty] != 0).any():
        return [f"{np.count_nonzero(got[exact.empty] != 0)} elements of empty rows are not 0"]
    finite = np.isfinite(ref)
    strange = ~finite & ~((got == ref) | (np.isnan(got) & np.isnan(ref))) | finite & ~np.isfinite(
        got
    )
    if strange.any():
        return [
            f"{np.count_nonzero(strange)} elements are inf or NaN where they should not be, or not"
        ]
    if not finite.any():
        return []

    error = np.abs(got - ref)[finite]
    if dtype == np.float64:
        largest = np.max(np.abs(v), where=np.isfinite(v), initial=0)
        return _above("max", error.max(), 1e-12 * largest)

    def largest(x):
        return np.max(np.abs(x), where=np.isfinite(exact.out), initial=0)

    lows = low if isinstance(low, list) else [low]
    low_errors = [x.out.astype(np.float64) - exact.out for x in lows]
    rounding = (exact.out.astype(dtype) + dtype.type(0.3) - dtype.type(0.3)).astype(
        np.float64
    ) - exact.out
    unit = ulp(largest(exact.out), dtype)
    most = 2 * max(map(largest, low_errors)) + 2 * largest(rounding)
    most += 8 * unit if dtype == np.float32 else 0
    complaints = _above("max", error.max(), most)
    if error.size >= 1024:
        mean_low = max(np.abs(x[..., :dv][finite]).mean() for x in low_errors)
        complaints += _above("mean", error.mean(), 1.5 * mean_low + 0.02 * unit)
    return complaints


@np.errstate(all="ignore")
def judge_lse(lse, exact, low, dtype):
    """The rule counts scores before softcap, and what ALiBi or a mask adds may be far larger:
    -138 on scores of 0.5 leaves float32 no more than 1.5e-5. So twice the error of `low` serves
    too, as for the output."""
    if np.asarray(lse).dtype != lse_dtype(dtype):
        return [f"lse is {lse.dtype}, not {lse_dtype(dtype)}"]
    ref, got = exact.lse.astype(np.float64), np.asarray(lse, np.float64)
    if got.shape != ref.shape:
        return [f"lse has shape {got.shape}, not {ref.shape}"]
    if (got[exact.empty] != ref[exact.empty]).any():
        return ["lse of empty rows is not -inf, or the sink's value"]
    if not (
        (got == ref) | (np.isnan(got) == np.isnan(ref)) & (np.isinf(got) == np.isinf(ref))
    ).all():
        return ["lse is finite where it should not be, or not"]
    error = np.max(np.abs(got - ref), where=np.isfinite(ref), initial=0)
    if dtype == np.float64:
        return _above("lse", error, 1e-13 * (1 + exact.biggest))
    floor = 1e-4 if finfo(dtype).bits == 16 else 1e-5
    own = [np.abs(x.lse - ref) for x in (low if isinstance(low, list) else [low])]
    own = max(np.max(x, where=np.isfinite(ref) & np.isfinite(x), initial=0) for x in own)
    return _above("lse", error, max(floor + 4e-6 * exact.biggest, 2 * own))


def lse_dtype(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


class Above(str):
    """A complaint about an error that is `ratio` times its limit."""

    ratio = 0.0

    @property
    def may_be_luck(self):
        return self.ratio < 3 and not self.startswith("lse")


def _above(what, error, limit):
    if error <= limit:
        return []
    said = Above(f"{what} error {error:.3g} is above {limit:.3g} ({error / limit:.2f}x)")
    said.ratio = error / limit
    return [said]
