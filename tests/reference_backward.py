"""The gradients of attention in NumPy, from the same lines as reference.py, and how right is right.

With z what dropout multiplies p by, out = (p z) v, and L any function of out and lse:

    dv    = (p z)' dout                               summed over a group's query heads
    dp    = z dout v'
    delta = sum_j p_j dp_j - dlse = dout . out - dlse
    ds    = p (dp - delta)                            0 where hidden, and in empty rows
    dmask = ds                                        summed over what the mask broadcasts
    dq    = scale slope ds k,  dk = (scale slope ds)' q
    dsink = -sum over b and rows of exp(sink - lse) delta

`low` is the careful unfused form: all of it in float32, p z and ds rounded to the inputs' dtype
before they are multiplied, delta from the `out` that was rounded to it, one rounding at the end.
"""

from dataclasses import dataclass

import numpy as np
import reference
from reference import by_group


@dataclass
class Gradients:
    dq: np.ndarray  # like q
    dk: np.ndarray
    dv: np.ndarray
    dmask: np.ndarray | None  # in the mask's shape and dtype
    dsink: np.ndarray | None  # (hq,) float32
    empty: dict  # name -> bool array: what is exactly 0
    sizes: dict  # name -> (largest, mean) of the sums of its terms' absolute values
    lse: np.ndarray  # (b, hq, sq)
    off: float  # by how much the lse that a pass is given may differ from it: half an ulp, or more

    def items(self):
        names = ("dq", "dk", "dv", "dmask", "dsink")
        return [(name, x) for name in names if (x := getattr(self, name)) is not None]


@np.errstate(all="ignore")
def attention_backward(dout, q, k, v, *, dlse=None, low=False, order=0, real=None, **keywords):
    """Gradients of sum(dout * out) + sum(dlse * lse); either may be None."""
    dtype, mask, sink = q.dtype, keywords.get("mask"), keywords.get("sink")
    real = real or reference.real_of(dtype, low)
    product = reference.product_of(dtype, low, order)
    forward = reference.attention(q, k, v, low=low, order=order, real=real, **keywords)
    dout = np.zeros_like(forward.out, real) if dout is None else dout.astype(real)
    dlse = np.zeros(forward.lse.shape, real) if dlse is None else dlse.astype(real)
    q, k, v = q.astype(real), k.astype(real), v.astype(real)
    w = reference.weights(q, k, **keywords, real=real, product=product)

    def rounded(x):
        return x.astype(dtype).astype(real) if low else x

    # What no row sees, and rows that see nothing, reach nothing, whatever they hold.
    rows, keys = ~w.empty, _any_of_group(w.seen.any(axis=2), k.shape[1])
    values = _any_of_group(w.seen.any(axis=2), v.shape[1])
    q, dout = np.where(rows[..., None], q, 0), np.where(rows[..., None], dout, 0)
    k, v = np.where(keys[..., None], k, 0), np.where(values[..., None], v, 0)
    dlse = np.where(w.padding, 0, dlse)

    pz = np.where(w.gain == 0, 0, w.p * w.gain)
    dp = np.where(w.gain == 0, 0, by_group(product, dout, v.swapaxes(2, 3)) * w.gain)
    delta = (dout * forward.out.astype(real)).sum(axis=3, dtype=real) - dlse
    if not low:
        delta = (w.p * dp).sum(axis=3) - dlse
    reached = w.seen & rows[..., None]
    ds = np.where(reached, w.p * (dp - delta[..., None]), 0)
    scaled = rounded(np.where(reached, ds * w.slope * w.scale, 0))
    dq = by_group(product, scaled, k)
    dk = over_group(product, scaled, q, k.shape[1])
    dv = over_group(product, rounded(pz), dout, v.shape[1])

    dmask = dsink = None
    if mask is not None and not reference.is_bool(mask):
        dmask = sum_to(ds, mask.shape)
    if sink is not None:
        term = np.exp(sink.astype(real)[:, None] - w.lse[..., 0]) * delta
        dsink = -np.where(w.padding, 0, term).sum(axis=(0, 2), dtype=real)
    sizes = {}
    if not low:
        term = by_group(np.matmul, abs(dout), abs(v).swapaxes(2, 3)) * w.gain
        of_delta = abs(dout * forward.out).sum(axis=3) + abs(dlse)
        term = term + of_delta[..., None]
        term = np.where(reached, w.p * term, 0)
        steep = np.where(reached, term * abs(w.slope * w.scale), 0)
        if sink is not None:
            weight = np.exp(sink.astype(real)[:, None] - w.lse[..., 0])
            of_sink = np.where(w.padding, 0, weight * of_delta)
        sizes = {
            "dq": by_group(np.matmul, steep, abs(k)),
            "dk": over_group(np.matmul, steep, abs(q), k.shape[1]),
            "dv": over_group(np.matmul, pz, abs(dout), v.shape[1]),
            "dmask": 0 if dmask is None else sum_to(term, mask.shape),
            "dsink": 0 if dsink is None else of_sink.sum(axis=(0, 2)),
        }
        sizes = {name: largest_and_mean(np.asarray(x)) for name, x in sizes.items()}
    if low:
        dq, dk, dv = (x.astype(dtype) for x in (dq, dk, dv))
        dmask = dmask if dmask is None else dmask.astype(mask.dtype)
        dsink = dsink if dsink is None else dsink.astype(np.float32)
    empty = {"dq": w.empty, "dk": ~keys, "dv": ~values}
    if dmask is not None:
        empty["dmask"] = sum_to(reached.astype(np.int64), mask.shape) == 0
    lse = w.lse[..., 0]
    largest = np.max(np.abs(lse), where=np.isfinite(lse), initial=0)
    off = 0.0 if dtype == np.float64 else reference.ulp(largest, np.float32)
    return Gradients(dq, dk, dv, dmask, dsink, empty, sizes, lse, off)


def largest_and_mean(x):
    finite = x[np.isfinite(x)]
    return (float(finite.max()), float(finite.mean())) if finite.size else (0.0, 0.0)


def distance(x, y):
    """The largest between finite numbers."""
    finite = np.isfinite(x) & np.isfinite(y)
    return float(np.max(np.abs(x[finite] - y[finite]), initial=0))


def _any_of_group(seen, heads):
    b, hq, sk = seen.shape
    return seen.reshape(b, heads, hq // (heads or 1), sk).any(axis=2)


def over_group(product, a, b, heads):
    """a' b of each query head, summed over the heads that share a key head."""
    (n, hq, rows, columns), width = a.shape, b.shape[3]
    if not hq:
        return np.zeros((n, heads, columns, width), a.dtype)
    a = a.reshape(n, heads, hq // heads * rows, columns)
    return product(a.swapaxes(2, 3), b.reshape(n, heads, hq // heads * rows, width))


def sum_to(x, shape):
    """x summed over what `shape` broadcasts to it, as a float's gradient is."""
    lead = x.ndim - len(shape)
    x = x.sum(axis=tuple(range(lead)))
    once = tuple(n for n, size in enumerate(shape) if size == 1 and x.shape[n] != 1)
    return x.sum(axis=once, keepdims=True)


# ------------------------------------------------------------------------------------ how right

COPIES = 6


def check(gradients, dout, q, k, v, *, lse=None, **keywords):
    """Complaints about {name: array or None} of attention_backward(dout, q, k, v, ...).

    lse: what the pass was given for it, as reference.judge_lse() has found it right.

    What is right by less than the rule asks is looked at no further: float64 results within a
    quarter of the limit around a float64 result, the others with as few careful paths as it takes.
    """
    if q.dtype == np.float64:
        near = attention_backward(dout, q, k, v, real=np.float64, **keywords)
        if not compare(gradients, near, None, share=0.25):
            return []
    exact = attention_backward(dout, q, k, v, **keywords)
    if lse is not None:
        exact.off = max(exact.off, distance(lse, exact.lse))
    if q.dtype == np.float64:
        return compare(gradients, exact, None)
    pairs, source = [], careful(exact, gradients, dout, q, k, v, **keywords)
    complaints = compare(gradients, exact, pairs)
    while complaints and (pair := next(source, None)):
        pairs.append(pair)
        complaints = compare(gradients, exact, pairs)
    return complaints


def check_shared(name, got, calls):
    """Complaints about the one gradient of several calls, each with its part of it: (place, lse,
    (dout, q, k, v), keywords). Sequences that are packed share sinks, and may share a mask."""
    places = [place for place, *_ in calls]
    exacts = [attention_backward(*arrays, **keywords) for *_, arrays, keywords in calls]

    def total(parts):
        whole = np.zeros(got.shape)
        for place, part in zip(places, parts, strict=True):
            whole[place] += getattr(part, name)
        return whole

    off = max(max(x.off, distance(call[1], x.lse)) for x, call in zip(exacts, calls, strict=True))
    size = np.sum([x.sizes[name] for x in exacts], axis=0)
    each = (careful(x, {}, *call[2], **call[3]) for x, call in zip(exacts, calls, strict=True))
    lows, ref, complaints = [], total(exacts), [name]
    for pairs in zip(*each, strict=True):
        lows.append([total(part) for part in zip(*pairs, strict=True)])
        complaints = _named(name, judge(got, ref, lows, None, size, off))
        if not complaints:
            break
    return complaints


def compare(gradients, exact, pairs, share=1):
    """Complaints by these (low, exact) Gradients, of which another can only raise the limits."""
    complaints = []
    for name, ref in exact.items():
        if (got := gradients.get(name)) is not None:
            lows = pairs if pairs is None else [[getattr(x, name) for x in both] for both in pairs]
            empty = exact.empty.get(name)
            said = judge(got, ref, lows, empty, exact.sizes[name], exact.off, share)
            complaints += _named(name, said)
    return complaints


def careful(exact, gradients, dout, q, k, v, **keywords):
    """(low, exact) Gradients: the careful form of these inputs, and of some like them.

    The rule compares maxima, and the maximum of a handful of errors is luck; a few rows that see
    few keys may make it however many there are. So it is judged by the errors of more: of the same
    q and k, with the signs of v's columns and of dout's rows drawn anew. In float32, where the
    order of a sum decides, each adds in an order of its own.
    """
    rng = np.random.default_rng(0)

    def signed(x, shape):
        return x * (2 * rng.integers(0, 2, shape) - 1).astype(x.dtype)

    for n in range(COPIES):
        if n == 0:
            given, ref = (dout, q, k, v), exact
        else:
            rows = dout if dout is None else signed(dout, (*dout.shape[:3], 1))
            given = rows, q, k, signed(v, (*v.shape[1:2], 1, *v.shape[3:]))
            ref = attention_backward(*given, **keywords)
        yield attention_backward(*given, low=True, order=n, **keywords), ref


@np.errstate(all="ignore")
def judge(got, ref, lows, empty, size, off, share=1):
    """The rule of reference.judge_out for a gradient; `lows`: (low, its exact), None in float64,
    where the error is to be within that share of the limit.

    The ulps that it grants to float32 are of `size`, the largest sum of absolute terms, for all
    dtypes: gradients cancel (a row that sees one key has ds = 0), and sums are in float32. And the
    pass is given its lse, so P may be off by a factor: by as much as that lse is `off`, which is
    the same all along a row.
    """
    size, mean_size = size
    if got.shape != ref.shape:
        return [f"shape {got.shape}, not {ref.shape}"]
    own, got = got.dtype, got.astype(ref.dtype)
    if empty is not None and (got[empty] != 0).any():
        return [f"{np.count_nonzero(got[empty] != 0)} elements are not exactly 0"]
    finite = np.isfinite(ref)
    strange = ~finite & np.isfinite(got) | finite & ~np.isfinite(got)
    strange &= ~(np.abs(ref) > 0.99 * float(reference.finfo(own).max))
    if strange.any():
        return [f"{np.count_nonzero(strange)} elements are inf or NaN where they should not be"]
    finite &= np.isfinite(got)
    if not finite.any():
        return []
    error, largest = np.abs(got - ref)[finite], np.abs(ref[finite]).max()
    if lows is None:
        rounding = 0 if own == np.float64 else reference.ulp(largest, own)
        limit = share * (1e-11 * largest + 1e-14 * size) + size * off + rounding
        return reference._above("max", error.max(), limit)

    def most(x):
        return np.max(np.abs(x), where=np.isfinite(x), initial=0)

    errors = [np.asarray(x, np.float64) - y for x, y in lows]
    sums = 4 * reference.ulp(size, np.float32)
    kind = own.type(0.3)
    rounding = most((ref.astype(own) + kind - kind).astype(np.float64) - ref)
    limit = 2 * max(map(most, errors), default=0) + 2 * rounding + sums + size * off
    complaints = reference._above("max", error.max(), limit)
    if error.size >= 1024:
        mean = max((np.abs(x[np.isfinite(x)]).mean() for x in errors), default=0)
        limit = 1.5 * mean + 0.02 * reference.ulp(largest, own) + sums / 8
        limit += max(size / 8, mean_size) * off
        complaints += reference._above("mean", error.mean(), limit)
    return complaints


def _named(name, complaints):
    for n, said in enumerate(complaints):
        complaints[n] = reference.Above(f"{name}: {said}")
        complaints[n].ratio = getattr(said, "ratio", np.inf)
    return complaints
