"""The formula of reference.py on a GPU, so that large shapes can be judged by the same rule."""

import numpy as np
import pytest
import reference
from cases import Torch

torch = pytest.importorskip("torch")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
numpy = Torch("cuda").numpy

served = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
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


def kept(b, h, sq, sk, p, seed):
    """What dropout leaves of those pairs, (pairs, sq, sk): as reference.kept."""
    groups = -(-sk // 8)
    pair, i, group = np.ogrid[: len(b), :sq, :groups]
    counter = np.stack(np.broadcast_arrays(group, i, h[pair], b[pair]), axis=-1)
    words = reference.philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    bits = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(len(b), sq, 8 * groups)
    return bits[..., :sk] >= round(p * 65536)


def formula(
    q,
    k,
    v,
    heads,
    scale=None,
    low=False,
    mask=None,
    softcap=0.0,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    seed=0,
    first_b=0,
    **limits,
):
    """reference.Result of those (sequence, query head) pairs, as a batch of one head each.

    `limits` are the keywords of reference.interval; lengths per sequence stay on the host.
    `first_b`: from which dropout counts the sequences.
    """
    if mask is not None:
        mask = mask.to(q.device).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    real = torch.float32 if low else torch.float64
    sq, sk, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    each = ("q_lengths", "k_lengths", "k_start", "q_offset")
    lengths = {name for name in each if np.ndim(limits.get(name))}
    signs = reference.widen(np.ones((1, 1, sk, v.shape[3])), len(heads) * sq)[0, 0]
    signs = torch.from_numpy(signs).to(q.device, real)
    outs, lses, empties, biggest = [], [], [], 0.0
    step = max(1, 2**27 // max(sq * sk, 1))
    for first in range(0, len(heads), step):
        b, h = torch.tensor(heads[first : first + step], device=q.device).T
        mine = {n: np.asarray(x)[b.cpu().numpy()] if n in lengths else x for n, x in limits.items()}
        inside, position = reference.interval(len(b) if lengths else 1, sq, sk, **mine)
        seen = torch.from_numpy(np.ascontiguousarray(inside)).to(q.device)
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask[b, h]
        s = scale * (q[b, h].to(real) @ k[b, h // group].to(real).mT)
        biggest = max(
            biggest, torch.where(seen, s, 0).abs().nan_to_num().max().item() if s.numel() else 0.0
        )
        if softcap:
            wide = s if 1e-30 < softcap < 1e30 else s.double()  # that a float holds
            s = (softcap * torch.tanh(wide / softcap)).to(real)
        if mask is not None and mask.dtype != torch.bool:
            s = s + mask[b, h].to(real)
        if alibi_slopes is not None:
            slopes = alibi_slopes.to(q.device, real).expand(q.shape[:2])[b, h]
            distance = np.abs(position - np.arange(sk))
            s = s - slopes[:, None, None] * torch.from_numpy(distance).to(q.device, real)
        s = s.masked_fill(~seen, -torch.inf)
        empty = (s == -torch.inf).all(2)
        peak = s.amax(2, keepdim=True) if s.shape[2] else s.new_full((*s.shape[:2], 1), -torch.inf)
        first = peak.new_full((len(b), 1, 1), -torch.inf)
        if sink is not None:
            first = sink.to(q.device, real)[h][:, None, None]
            peak = torch.maximum(peak, first)
        shift = torch.where(peak == -torch.inf, 0, peak)
        p = torch.exp(s - shift)
        total = p.sum(2, keepdim=True) + torch.exp(first - shift)
        lse = (torch.log(total) + shift)[..., 0]
        if "q_lengths" in lengths:
            padding = np.arange(sq) >= np.asarray(mine["q_lengths"])[:, None]
            lse = lse.masked_fill(torch.from_numpy(padding).to(q.device), -torch.inf)
        p = torch.where(total == 0, 0, p / total)
        if dropout_p:
            stays = kept(first_b + b.cpu().numpy(), h.cpu().numpy(), sq, sk, dropout_p, seed)
            p = torch.where(torch.from_numpy(stays).to(q.device), p / (1 - dropout_p), 0)
        if low:
            p = p.to(q.dtype).to(real)
        reached = torch.where(seen.any(1)[..., None], v[b, h // group].to(real), 0)
        out = (p @ (reached.tile(signs.shape[1] // v.shape[3]) * signs)).masked_fill(
            empty[..., None], 0
        )
        outs.append(numpy(out.to(q.dtype)) if low else numpy(out))
        lses.append(numpy(lse))
        empties.append(numpy(empty))
    out, lse, empty = (np.concatenate(x)[:, None] for x in (outs, lses, empties))
    return reference.Result(out, lse, biggest, empty, None)


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
    return reference.judge(numpy(out[b, h])[:, None], lse, exact, low)


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
