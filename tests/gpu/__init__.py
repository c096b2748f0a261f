"""The benchmark's formula on a GPU, so that large shapes are judged by the same rule as small."""

import os

import fastattn
import numpy as np
import pytest
import reference
from cases import Torch
from fastattn.bench import formula as bench_formula

torch = pytest.importorskip("torch")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
numpy = Torch("cuda").numpy

served = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
if os.environ.get("FASTATTN_TEST_GPU"):
    assert served and "sm90" in fastattn.info()["backends"], "no GPU that the sm90 backend serves"
marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(not served, reason="needs a GPU of compute capability 9.0"),
]


def normal(*shape, dtype=torch.bfloat16, seed=0, device="cuda"):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)


def inputs(b, hq, hk, sq, sk, d, dv=None, dtype=torch.bfloat16, seed=0):
    """q, k, v in the layout bhsd."""
    shapes = (b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv or d)
    return [normal(*shape, dtype=dtype, seed=3 * seed + i) for i, shape in enumerate(shapes)]


def formula(q, k, v, heads, scale=None, low=False, softcap=0.0, **keywords):
    """reference.Result of those (sequence, query head) pairs, as a batch of one head each.

    `keywords` are those of `visible_and_changed` and of reference.interval; lengths per sequence
    stay on the host.
    """
    real = torch.float32 if low else torch.float64
    sq, sk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    signs = reference.widen(np.ones((1, 1, sk, v.shape[3])), len(heads) * sq)[0, 0]
    signs = torch.from_numpy(signs).to(q.device, real)
    found = []
    step = max(1, 2**27 // max(sq * sk, 1))
    for first in range(0, len(heads), step):
        b, h = torch.tensor(heads[first : first + step], device=q.device).T
        seen, padding, change = visible_and_changed(q, sk, b, h, real, **keywords)
        wide = v[b, h // group].to(real).tile(signs.shape[1] // v.shape[3]) * signs
        mine = bench_formula.attention(
            torch,
            *(q[b, h].to(real), k[b, h // group].to(real), wide, seen),
            scale=scale,
            softcap=softcap,
            narrow=(lambda p: p.to(q.dtype).to(real)) if low else None,
            **change,
        )
        out = mine.out.to(q.dtype) if low else mine.out
        lse = mine.lse if padding is None else mine.lse.masked_fill(padding, -torch.inf)
        found.append((numpy(out), numpy(lse), numpy(mine.empty), mine.biggest))
    *arrays, biggest = zip(*found, strict=True)
    out, lse, empty = (np.concatenate(x)[:, None] for x in arrays)
    return reference.Result(out, lse, max(biggest), empty, None)


def visible_and_changed(
    q,
    sk,
    b,
    h,
    real,
    mask=None,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    seed=0,
    first_b=0,
    **limits,
):
    """Of the heads (b[i], h[i]): what their rows see, which rows are padding (or None), and the
    formula's keywords for what changes their scores. `first_b`: from which dropout counts the
    sequences."""

    def there(x):
        return torch.from_numpy(np.ascontiguousarray(x)).to(q.device)

    sq, host = q.shape[2], b.cpu().numpy()
    each = ("q_lengths", "k_lengths", "k_start", "q_offset")
    lengths = {name for name in each if np.ndim(limits.get(name))}
    mine = {n: np.asarray(x)[host] if n in lengths else x for n, x in limits.items()}
    inside, position = reference.interval(len(b) if lengths else 1, sq, sk, **mine)
    seen, change = there(inside), {}
    if mask is not None:
        mask = mask.to(q.device).expand(*q.shape[:3], sk)[b, h]
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            change["added"] = mask
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.device, real).expand(q.shape[:2])[b, h][:, None, None]
        distance = there(np.abs(position - np.arange(sk))).to(real)
        change["added"] = change.get("added", 0.0) - slopes * distance
    if sink is not None:
        change["sink"] = sink.to(q.device, real)[h][:, None, None]
    if dropout_p:
        stays = bench_formula.kept(
            first_b + host, h.cpu().numpy(), np.arange(sq), sk, dropout_p, seed
        )
        change |= {"kept": there(stays), "dropout_p": dropout_p}
    padding = None
    if "q_lengths" in lengths:
        padding = there(np.arange(sq) >= mine["q_lengths"][:, None])
    return seen, padding, change


def complaints(out, lse, q, k, v, most=16, **keywords):
    """What is wrong with a result in the layout bhsd, judged on `most` heads, evenly spread."""
    pairs = [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]
    heads = [
        pairs[i]
        for i in sorted({*np.linspace(0, len(pairs) - 1, min(most, len(pairs))).astype(int)})
    ]
    exact, low = (formula(q, k, v, heads, low=low, **keywords) for low in (False, True))
    b, h = torch.tensor(heads, device=q.device).T
    lse = None if lse is None else numpy(lse[b, h])[:, None]
    return reference.judge(numpy(out[b, h])[:, None], lse, exact, low, numpy(v))


# --------------------------------------------------------------------------------- packed sequences


def packed(lengths, hq, hk, d, dv=None, dtype=torch.bfloat16, tail=(0, 0), seed=0, device="cuda"):
    """q, k, v of sequences with (query, key) rows each, and `tail` rows of NaN behind them."""
    totals = np.sum(lengths, axis=0, dtype=np.int64).tolist()
    arrays = []
    for i, (h, size) in enumerate(((hq, d), (hk, d), (hk, dv or d))):
        rows, rest = totals[i > 0], tail[i > 0]
        x = normal(rows + rest, h, size, dtype=dtype, seed=3 * seed + i, device=device)
        x[rows:] = torch.nan
        arrays.append(x)
    return arrays


def offsets(lengths, device="cuda"):
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    ends = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(lengths, axis=0)])
    cu = torch.from_numpy(np.ascontiguousarray(ends.T, np.int32))
    return cu[0].to(device), cu[1].to(device), *lengths.max(axis=0, initial=0).tolist()


def of_sequence(n, sq, sk, keywords):
    """What a packed call says of sequence n alone."""
    mine = keywords | {"first_b": n}
    for name in mine.keys() & {"q_lengths", "k_lengths", "q_offset"}:
        mine[name] = mine[name][n : n + 1] if np.ndim(mine[name]) else mine[name]
    if mine.get("alibi_slopes") is not None and mine["alibi_slopes"].ndim == 2:
        mine["alibi_slopes"] = mine["alibi_slopes"][n : n + 1]
    if mine.get("mask") is not None:
        mask = mine["mask"][(None,) * (4 - mine["mask"].ndim)]
        wanted = slice(n, n + 1), slice(None), slice(sq), slice(sk)
        whole = (
            slice(None) if size == 1 else x for size, x in zip(mask.shape, wanted, strict=True)
        )
        mine["mask"] = mask[tuple(whole)]
    return mine


def packed_complaints(out, lse, q, k, v, lengths, sequences=None, most=16, **keywords):
    """`complaints` of each sequence (or of some), and of the rows that belong to none."""
    ends, wrong = np.cumsum(np.asarray(lengths, np.int64).reshape(-1, 2), axis=0), []
    for n in range(len(lengths)) if sequences is None else sequences:
        sq, sk = (int(x) for x in lengths[n])
        end_q, end_k = (int(x) for x in ends[n])
        rows, keys = slice(end_q - sq, end_q), slice(end_k - sk, end_k)
        own_out, own_lse = out[rows], None if lse is None else lse[:, rows]
        mine = of_sequence(n, sq, sk, keywords)
        if sq and not sk:
            want = torch.full((q.shape[1], sq), -torch.inf, device=out.device)
            if mine.get("sink") is not None:
                used = int(mine["q_lengths"][0]) if "q_lengths" in mine else sq
                want[:, : max(used, 0)] = mine["sink"].to(want)[:, None]
            right = (own_out == 0).all() and (lse is None or torch.equal(own_lse, want))
            wrong += (
                [] if right else [f"sequence {n}: without keys, and not 0 and -inf or the sink"]
            )
        elif sq:
            own = [x.transpose(0, 1)[None] for x in (own_out, q[rows], k[keys], v[keys])]
            said = complaints(
                own[0], None if lse is None else own_lse[None], *own[1:], most=most, **mine
            )
            wrong += [f"sequence {n} of {sq}, {sk}: {x}" for x in said]
    none = slice(int(ends[-1, 0]) if len(ends) else 0, None)
    if (out[none] != 0).any() or (lse is not None and (lse[:, none] != -torch.inf).any()):
        wrong.append("rows of no sequence are not 0 and -inf")
    return wrong
