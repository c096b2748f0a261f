"""What attention_sparse means, and its gradients, in NumPy; dense, and how right is right.

Every row gets a column for each key of each entry of its list, and one for each key of the window
that is united with it: `Columns` says which key a column is, whether the row sees it, its gate, and
of which entry it is. All else is attention's formula over these columns, computed in float64
(extended precision for float64 inputs), or in the careful form `low` as in reference.py.
"""

from dataclasses import dataclass

import numpy as np
import reference
import reference_backward


@dataclass
class Columns:
    """Each (b, hk, sq, E), E = L * k_block + sk."""

    key: np.ndarray  # 0 where nothing is seen
    seen: np.ndarray
    gate: np.ndarray
    entry: np.ndarray  # its place in the flat list of all entries; -1: the window's


def columns(b, hk, sq, sk, key_lists, *, counts, q_block, k_block, gate, window_union, **limits):
    lists = np.broadcast_to(key_lists, (b, hk, *key_lists.shape[2:]))
    blocks, length = lists.shape[2:]
    inside, _ = reference.interval(b, sq, sk, **limits)  # (b, sq, sk)
    window = np.zeros_like(inside)
    if window_union is not None:
        window, _ = reference.interval(b, sq, sk, **{**limits, "window": window_union})
    ends = limits.get("k_lengths")
    ends = np.full(b, sk) if ends is None else np.asarray(ends, np.int64)
    if counts is None:
        counts = np.full((1, 1, 1), length)
    counts = np.broadcast_to(np.clip(counts, 0, length), (b, hk, blocks))
    counted = (np.arange(length) < counts[..., None]) & (lists >= 0)
    counted &= lists.astype(np.int64) * k_block < ends[:, None, None, None]

    block = np.arange(sq) // q_block
    keys = lists.astype(np.int64)[..., None] * k_block + np.arange(k_block)
    keys = keys.reshape(b, hk, blocks, -1)[:, :, block]  # (b, hk, sq, L * k_block)
    seen = np.repeat(counted, k_block, axis=3)[:, :, block] & (keys < sk)
    keys = np.where(seen, keys, 0)
    n, i = np.ogrid[:b, :sq]
    n, i = n[:, None, :, None], i[:, None, :, None]
    seen &= inside[n, i, keys] & ~window[n, i, keys]
    entry = np.arange(lists.size).reshape(lists.shape)
    entry = np.repeat(entry, k_block, axis=3)[:, :, block]
    g = np.ones(lists.shape) if gate is None else np.broadcast_to(gate, lists.shape)
    g = np.repeat(g, k_block, axis=3)[:, :, block]

    shape = (b, hk, sq, sk)
    return Columns(
        *(
            np.concatenate([x, np.broadcast_to(y, shape)], axis=3)
            for x, y in (
                (np.where(seen, keys, 0), np.arange(sk)),
                (seen, window[:, None]),
                (np.where(seen, g, 1), 1.0),
                (entry, -1),
            )
        )
    )


@dataclass
class Found:
    out: np.ndarray
    lse: np.ndarray
    biggest: float
    empty: np.ndarray
    gradients: dict  # name -> array
    sizes: dict  # name -> the largest sum of its terms' absolute values


@np.errstate(all="ignore")
def attention_sparse(
    q,
    k,
    v,
    key_lists,
    *,
    dout=None,
    dlse=None,
    counts=None,
    q_block=1,
    k_block=64,
    gate=None,
    key_gate=False,
    window_union=None,
    softcap=0.0,
    sink=None,
    scale=None,
    low=False,
    **limits,
):
    """out, lse, and mass; of sum(dout * out) + sum(dlse * lse) the gradients, too."""
    dtype, (b, hq, sq, d), (_, hk, sk, _) = q.dtype, q.shape, k.shape
    real, group = reference.real_of(dtype, low), hq // hk
    lists = {"counts": counts, "q_block": q_block, "k_block": k_block, "gate": gate}
    c = columns(b, hk, sq, sk, key_lists, window_union=window_union, **lists, **limits)
    seen, g = c.seen, c.gate.astype(real)

    def rounded(x):
        return x.astype(dtype).astype(real) if low else x

    def heads(x):  # (b, hk, group, rows, columns) of (b, hq, rows, columns)
        return x.astype(real).reshape(b, hk, group, *x.shape[2:])

    n, h = np.ogrid[:b, :hk]
    place = n[..., None, None], h[..., None, None], c.key
    alive = seen.any(axis=3)[:, :, None, :, None]
    rows = np.where(alive, heads(q), 0)
    keys = np.where(seen[..., None], k.astype(real)[place], 0)  # (b, hk, sq, E, d)
    values = np.where(seen[..., None], v.astype(real)[place], 0)
    weight = g if key_gate else np.ones_like(g)
    scale = real((d or 1) ** -0.5 if scale is None else scale)
    product = scale * np.einsum("bhgid,bhijd->bhgij", rows, keys)
    raw, slope = product * weight[:, :, None], 1.0
    s = raw
    if softcap:
        t = np.tanh(raw / real(softcap))
        s, slope = real(softcap) * t, 1 - t * t
    hidden = ~np.broadcast_to(seen[:, :, None], s.shape)
    s = np.where(hidden, -np.inf, s)
    first = -np.inf if sink is None else sink.astype(real).reshape(1, hk, group, 1, 1)
    peak = np.maximum(s.max(axis=4, keepdims=True, initial=-np.inf), first)
    shift = np.where(np.isneginf(peak), 0, peak)
    p = np.exp(s - shift)
    total = p.sum(axis=4, keepdims=True) + np.exp(real(1) * first - shift)
    lse = (np.log(total) + shift)[..., 0]
    p = np.divide(p, total, where=total != 0, out=np.zeros_like(p))
    out = np.einsum("bhgij,bhijd->bhgid", rounded(p * g[:, :, None]), values)
    q_lengths = limits.get("q_lengths")
    ends = np.full(b, sq) if q_lengths is None else np.asarray(q_lengths)
    padding = np.broadcast_to(np.arange(sq) >= ends[:, None, None, None], lse.shape)
    lse = np.where(padding, -np.inf, lse)

    found = {"mass": _to_entries(p.sum(axis=2), c, key_lists)}
    sizes = {}
    if dout is not None or dlse is not None:
        dout = np.zeros_like(out) if dout is None else np.where(alive, heads(dout), 0)
        dlse = np.zeros(lse.shape, real) if dlse is None else dlse.astype(real).reshape(lse.shape)
        dlse = np.where(padding, 0, dlse)
        rests = rounded(out)
        delta = np.einsum("bhgid,bhgid->bhgi", dout, rests) - dlse
        dp = np.einsum("bhgid,bhijd->bhgij", dout, values)
        ds = np.where(hidden, 0, p * (dp * g[:, :, None] - delta[..., None])) * slope
        scaled = rounded(ds * weight[:, :, None] * scale)
        gated = rounded(p * g[:, :, None])
        of_gate = p * dp + (ds * product if key_gate else 0)
        of_size = np.abs(p) * (np.abs(dp * g[:, :, None]) + np.abs(delta[..., None]))
        of_size = np.where(hidden, 0, of_size)
        steep = of_size * np.abs(weight[:, :, None] * scale)
        flat = _scatter(sk, c.key)
        found |= {
            "dq": np.einsum("bhgij,bhijd->bhgid", scaled, keys).reshape(q.shape),
            "dk": flat(np.einsum("bhgij,bhgid->bhijd", scaled, rows)),
            "dv": flat(np.einsum("bhgij,bhgid->bhijd", gated, dout)),
        }
        sizes = {
            "dq": np.einsum("bhgij,bhijd->bhgid", steep, np.abs(keys)),
            "dk": flat(np.einsum("bhgij,bhgid->bhijd", steep, np.abs(rows))),
            "dv": flat(np.einsum("bhgij,bhgid->bhijd", p * np.abs(g[:, :, None]), np.abs(dout))),
        }
        if gate is not None:
            found["dgate"] = _to_entries(of_gate.sum(axis=2), c, gate, key_lists)
            size = p * np.einsum("bhgid,bhijd->bhgij", np.abs(dout), np.abs(values))
            size = size + (of_size * np.abs(product) if key_gate else 0)
            sizes["dgate"] = _to_entries(size.sum(axis=2), c, gate, key_lists)
        if sink is not None:
            reach = np.where(padding, 0, np.exp(first[..., 0] - lse))
            found["dsink"] = -(reach * delta).sum(axis=(0, 3)).reshape(hq)
            size = np.einsum("bhgid,bhgid->bhgi", np.abs(dout), np.abs(rests)) + np.abs(dlse)
            sizes["dsink"] = (reach * size).sum(axis=(0, 3))
        sizes = {name: float(np.max(x, initial=0)) for name, x in sizes.items()}
    empty = np.isneginf(s).all(axis=4)
    biggest = float(np.max(np.abs(raw), initial=0))
    out, lse, empty = (x.reshape(b, hq, *x.shape[3:]) for x in (out, lse, empty))
    if low:
        out = out.astype(dtype)
    return Found(out, lse, biggest, empty, found, sizes)


def _scatter(sk, key):
    def to_keys(x):  # (b, hk, sq, E, d) -> (b, hk, sk, d)
        b, hk = x.shape[:2]
        sums = np.zeros((b, hk, sk, x.shape[4]), x.dtype)
        n, h = np.ogrid[:b, :hk]
        np.add.at(sums, (n[..., None, None], h[..., None, None], key), x)
        return sums

    return to_keys


def _to_entries(x, c, like, lists=None):
    """Sums of (b, hk, sq, E) for each entry, in the shape of `like`."""
    b, hk = x.shape[:2]
    shape = (b, hk, *like.shape[2:])
    sums = np.zeros(int(np.prod(shape)), x.dtype)
    listed = c.entry >= 0
    np.add.at(sums, c.entry[listed], np.where(c.seen, x, 0)[listed])
    return reference_backward.sum_to(sums.reshape(shape), like.shape)


@np.errstate(all="ignore")
def complaints(results, q, k, v, key_lists, **keywords):
    """Of {name: array}: out, lse, mass, dq, dk, dv, dgate, dsink, as far as given."""
    exact = attention_sparse(q, k, v, key_lists, **keywords)
    careful = q.dtype != np.float64
    low = attention_sparse(q, k, v, key_lists, **keywords, low=True) if careful else None
    gates = keywords.get("gate")
    strong = 1 if gates is None else np.max(np.abs(gates), where=np.isfinite(gates), initial=1)
    found = []
    if "out" in results:
        wide = np.where(np.isfinite(v.astype(float)), v.astype(float), 0) * strong
        found += reference.judge(results["out"], results.get("lse"), exact, low, wide)
    finite = np.isfinite(exact.lse)
    largest = np.max(np.abs(exact.lse), where=finite, initial=0)
    unit = reference.ulp(largest, np.float32 if careful else np.float64)
    for name, ref in exact.gradients.items():
        if name not in results:
            continue
        got = results[name]
        own = np.dtype(np.float64 if got.dtype == np.float64 else np.float32)
        if got.shape != ref.shape:
            found.append(f"{name} has shape {got.shape}, not {ref.shape}")
            continue
        size = exact.sizes.get(name, float(np.max(ref, initial=0)))
        rough = 0 if low is None else 2 * np.max(np.abs(low.gradients[name] - ref), initial=0)
        limit = rough + 2 * reference.ulp(np.max(np.abs(ref), initial=0), got.dtype)
        limit += size * (unit + 8 * float(np.finfo(own if careful else np.float64).eps)) + 1e-30
        of_rounded = name == "dsink" or (name == "dgate" and keywords.get("key_gate"))
        if of_rounded and careful:  # few sums, of delta, which outputs give that were rounded
            limit += size * float(reference.finfo(q.dtype).eps) / 2
        if name == "mass":
            limit += 4e-6 * size * (1 + exact.biggest)  # exp() of scores in float32
        error = np.max(np.abs(got.astype(ref.dtype) - ref), initial=0)
        if not error <= limit:
            found.append(f"{name} error {error:.3g} is above {limit:.3g}")
        if name in ("dgate", "mass") and (got[ref == 0] != 0).any():
            found.append(f"{name} of void entries is not 0")
    return found
