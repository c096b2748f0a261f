"""Attention by its formula, in torch's own operators: what derivatives of any order are taken of.

For second derivatives, forward mode and what else the kernels do not give. Some rows at a time, so
that no more than a block of scores is in memory. The same meaning as csrc/, slower.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.func import vjp

_BLOCK = 1 << 21  # scores in memory at once
_SHIFT = 1 << 30  # FA_MAX_SHIFT of csrc/forward.h


# Dynamo knows the first by itself, not the second, and guards both.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def are_deterministic() -> bool:
    """What torch.use_deterministic_algorithms() asks of gradients: nothing, where it only warns."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warns


class Problem(NamedTuple):
    """What has no gradient: the arguments of attention or attention_varlen of these names."""

    arguments: dict[str, Any]

    def get(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.arguments

    @property
    def rows_first(self) -> bool:
        return self.packed or self.get("layout") == "bshd"


class _Sequence(NamedTuple):
    """One sequence of the call: number n, its rows in q and k, its true lengths."""

    n: int
    q: slice
    k: slice
    sq: int
    sk: int
    start: int
    offset: int | None


def _list(x: Any, b: int, default: int) -> list[int]:
    return [default] * b if x is None else [int(y) for y in x]


def _sequences(problem: Problem, q: Any, k: Any) -> list[_Sequence]:
    axis = 0 if problem.packed else 1 if problem.rows_first else 2
    rows, keys = q.shape[axis], k.shape[axis]
    if problem.packed:
        q_ends, k_ends = (_list(problem.get(f"cu_seqlens_{x}"), 0, 0) for x in "qk")
        names = "seqused_q", "seqused_k"
        slices = [
            (slice(*q_ends[n : n + 2]), slice(*k_ends[n : n + 2])) for n in range(len(q_ends) - 1)
        ]
    else:
        names = "q_lengths", "k_lengths"
        slices = [(slice(0, rows), slice(0, keys))] * q.shape[0]
    b = len(slices)
    used = [_list(problem.get(name), b, -1) for name in names]
    start, offset = _list(problem.get("k_start"), b, 0), problem.get("q_offset")
    if problem.get("causal") == "top-left":
        offset = 0
    if isinstance(offset, torch.Tensor) and offset.dim():
        offsets: list[int | None] = [int(x) for x in offset]
    else:
        offsets = [None if offset is None else int(offset)] * b
    return [
        _Sequence(
            n,
            *slices[n],
            slices[n][0].stop - slices[n][0].start if used[0][n] < 0 else used[0][n],
            slices[n][1].stop - slices[n][1].start if used[1][n] < 0 else used[1][n],
            start[n],
            offsets[n],
        )
        for n in range(b)
    ]


# ------------------------------------------------------------------- a call in sequences, and back


def _cut(problem: Problem, x: Any, s: _Sequence, rows: slice) -> Any:
    """(h, rows, d) of one sequence."""
    if x is None:
        return None
    if problem.packed:
        return x[rows].transpose(0, 1)
    return x[s.n].transpose(0, 1) if problem.rows_first else x[s.n]


def _cut_lse(problem: Problem, x: Any, s: _Sequence) -> Any:
    return x[:, s.q] if problem.packed else x[s.n]


def _cut_mask(mask: Any, s: _Sequence) -> Any:
    """(1 or hq, 1 or sq, 1 or sk) of one sequence."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[s.n if mask.shape[0] > 1 else 0]
    rows, keys = s.q.stop - s.q.start, s.k.stop - s.k.start
    mask = mask[:, :rows] if mask.shape[1] > 1 else mask
    return mask[:, :, :keys] if mask.shape[2] > 1 else mask


def _join(problem: Problem, parts: Sequence[Any], like: Any) -> Any:
    """The array whose sequences these (h, rows, d) are; rows in none are zeros."""
    if not problem.packed:
        x = torch.stack(list(parts)) if parts else torch.zeros_like(like)
        return x.transpose(1, 2) if problem.rows_first and parts else x
    x = torch.cat([*parts, like.new_zeros(like.shape[1], 0, like.shape[2])], 1).transpose(0, 1)
    rest = like.shape[0] - x.shape[0]
    return torch.cat([x, x.new_zeros(rest, *x.shape[1:])]) if rest else x


def _join_lse(problem: Problem, parts: Sequence[Any], like: Any, fill: float) -> Any:
    if not problem.packed:
        return torch.stack(list(parts)) if parts else torch.zeros_like(like)
    x = torch.cat([*parts, like.new_zeros(like.shape[0], 0)], 1)
    rest = like.shape[1] - x.shape[1]
    return torch.cat([x, x.new_full((x.shape[0], rest), fill)], 1) if rest else x


def _join_mask(parts: Sequence[Any], like: Any) -> Any:
    """The sum, or the stack, of gradients of _cut_mask()'s parts."""
    shape = (1,) * (4 - like.dim()) + tuple(like.shape)
    padded = [
        torch.nn.functional.pad(x, (0, shape[3] - x.shape[2], 0, shape[2] - x.shape[1]))
        for x in parts
    ]
    if not padded:
        return torch.zeros_like(like)
    whole = torch.stack(padded) if shape[0] > 1 else sum(padded[1:], padded[0])[None]
    return whole.reshape(like.shape)


def _blocks(s: _Sequence, heads: int) -> Iterator[slice]:
    rows, keys = s.q.stop - s.q.start, s.k.stop - s.k.start
    step = max(1, _BLOCK // max(1, heads * keys))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


# -------------------------------------------------------------------------------------- the formula


def _seen(problem: Problem, s: _Sequence, rows: Any, keys: Any) -> Any:
    """(rows, keys) bool: the interval of each row, as fa_row_interval() of csrc/mask.h."""

    def clamp(x: int) -> int:
        return max(-_SHIFT, min(_SHIFT, x))

    left, right = problem.get("window") or (None, None)
    if problem.get("causal"):
        right = 0 if right is None else min(right, 0)
    at = rows + (s.sk - s.sq if s.offset is None else clamp(s.offset))
    seen = (keys >= s.start) & (keys < s.sk) & (rows < s.sq)
    if left is not None:
        seen = seen & (keys >= at - clamp(left))
    if right is not None:
        seen = seen & (keys <= at + clamp(right))
    return seen


def _kept(seed: int, n: int, heads: int, rows: Any, keys: int, p: float) -> Any:
    """(heads, rows, keys) bool: Philox4x32-7 as in csrc/philox.h, in int64."""
    low = (1 << 32) - 1

    def product(x: Any, by: int) -> tuple[Any, Any]:
        """The high and the low half of x * by, of which int64 holds no more than a part."""
        small, large = (x & 0xFFFF) * by, (x >> 16) * by
        middle = (small >> 16) + large
        return middle >> 16 & low, (middle << 16 | small & 0xFFFF) & low

    def number(begin: int, *shape: int) -> Any:
        return torch.arange(begin, device=rows.device).view(*shape)

    groups = -(-keys // 8)
    counter = (number(groups, 1, 1, -1), rows.view(1, -1, 1), number(heads, -1, 1, 1))
    of_n = rows.new_full((1, 1, 1), n)
    x = [y.contiguous() for y in torch.broadcast_tensors(*counter, of_n)]  # type: ignore[no-untyped-call]
    for turn in range(7):
        keyed = (seed + turn * 0x9E3779B9) & low, ((seed >> 32) + turn * 0xBB67AE85) & low
        (first, first_low), (third, third_low) = (
            product(x[0], 0xD2511F53),
            product(x[2], 0xCD9E8D57),
        )
        x = [third ^ x[1] ^ keyed[0], third_low, first ^ x[3] ^ keyed[1], first_low]
    bits = torch.stack([half for y in x for half in (y & 0xFFFF, y >> 16)], -1)
    return bits.flatten(2)[..., :keys] >= round(p * 65536)


def _formula(
    problem: Problem, s: _Sequence, rows: slice, q: Any, k: Any, v: Any, *rest: Any
) -> Any:
    """out and lse of some rows of one sequence: q (hq, rows, d), k and v of all its keys."""
    mask, sink = rest
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    hq, keys = q.shape[0], k.shape[1]
    at = torch.arange(rows.start, rows.stop, device=q.device)
    columns = torch.arange(keys, device=q.device)
    seen = _seen(problem, s, at[:, None], columns).expand(hq, -1, -1)
    added = None
    if mask is not None:
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            added = mask.to(real)
    reached = seen.any(1)[..., None]  # what no row sees reaches nothing, whatever it holds
    k, v = (x.to(real).repeat_interleave(hq // max(1, x.shape[0]), 0) for x in (k, v))
    k, v = torch.where(reached, k, 0.0), torch.where(reached, v, 0.0)
    empty_row = ~seen.any(2, keepdim=True)
    scale = problem.get("scale")
    scale = (q.shape[2] ** -0.5 if q.shape[2] else 1.0) if scale is None else float(scale)
    scores = scale * (torch.where(empty_row, 0.0, q.to(real)) @ k.transpose(1, 2))
    if softcap := float(problem.get("softcap") or 0.0):
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
    if (slopes := problem.get("alibi_slopes")) is not None:
        place = at + (s.sk - s.sq if s.offset is None else max(-_SHIFT, min(_SHIFT, s.offset)))
        slope = (slopes[s.n] if slopes.dim() == 2 else slopes).to(real)
        scores = scores - slope[:, None, None] * (place[:, None] - columns).abs()
    scores = torch.where(seen, scores, -torch.inf)

    floor = torch.full((hq, 1, 1), -torch.inf, dtype=real, device=q.device)
    first = floor if sink is None else sink.to(real)[:, None, None]
    inside = (at < s.sq)[:, None]  # rows past the length have no sink either
    first = torch.where(inside, first, -torch.inf)
    highest = scores.amax(2, keepdim=True) if keys else floor
    peak = torch.maximum(first, highest).detach()
    shift = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(scores - shift)
    total = weights.sum(2, keepdim=True) + torch.exp(first - shift)
    none = total == 0
    total = torch.where(none, 1.0, total)
    lse = torch.where(none, -torch.inf, torch.log(total) + shift)[..., 0]
    weights = weights / total
    if p := float(problem.get("dropout_p") or 0.0):
        kept = _kept(int(problem.get("seed")), s.n, hq, at, keys, p)
        if p == 1:  # not 0 / 0 on the way back
            kept, p = torch.zeros_like(kept), 0.0
        weights = torch.where(kept, weights / (1 - p), 0.0)
    return (weights @ v).to(q.dtype), lse


# ------------------------------------------------------------------------------------ derivatives


def _vjp(function: Any, *inputs: Any) -> tuple[Any, Any]:
    result, pull = vjp(function, *inputs)[:2]
    return result, pull


def _parts(problem: Problem, arrays: Sequence[Any], s: _Sequence) -> list[Any]:
    """q, k, v, mask and sink of one sequence."""
    q, k, v, mask, sink = arrays
    of_keys = (_cut(problem, x, s, s.k) for x in (k, v))
    return [_cut(problem, q, s, s.q), *of_keys, _cut_mask(mask, s), sink]


def _mask_rows(mask: Any, rows: slice) -> Any:
    return mask[:, rows] if mask is not None and mask.shape[1] > 1 else mask


def in_blocks(problem: Problem, *arrays: Any) -> tuple[Any, Any]:
    """out and lse of q, k, v, mask and sink: attention itself, which torch can differentiate."""
    q, k, v = arrays[:3]
    outs, lses = [], []
    heads = q.shape[2 if problem.rows_first and not problem.packed else 1]
    for s in _sequences(problem, q, k):
        mine, *keys, mask, sink = _parts(problem, arrays, s)
        found = [
            _formula(problem, s, r, mine[:, r], *keys, _mask_rows(mask, r), sink)
            for r in _blocks(s, heads)
        ]
        real = torch.float64 if q.dtype == torch.float64 else torch.float32
        found = found or [
            (mine.new_zeros(heads, 0, keys[1].shape[2]), mine.new_zeros(heads, 0, dtype=real))
        ]
        outs.append(torch.cat([x for x, _ in found], 1))
        lses.append(torch.cat([x for _, x in found], 1))
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    like = q.new_zeros(*q.shape[:-1], v.shape[-1])
    rows = q.shape[0] if problem.packed else q.shape[1 if problem.rows_first else 2]
    lse_shape = (heads, rows) if problem.packed else (q.shape[0], heads, rows)
    like_lse = q.new_zeros(lse_shape, dtype=real)
    return _join(problem, outs, like), _join_lse(problem, lses, like_lse, -torch.inf)


def gradients_of_gradients(
    problem: Problem, arrays: Sequence[Any], dout: Any, dlse: Any, given: Sequence[Any]
) -> list[Any]:
    """Of (dq, dk, dv, dmask, dsink), with their own gradients `given` (None: zeros), those with
    respect to q, k, v, mask, sink, dout and dlse; None for what is None or no float."""
    q, k = arrays[:2]
    inputs = [*arrays, dout, dlse]
    live = [n for n, x in enumerate(inputs) if x is not None and x.is_floating_point()]
    wanted = [n for n in live if n < 5 and given[n] is not None]
    heads = q.shape[2 if problem.rows_first and not problem.packed else 1]
    by_sequence: list[list[Any]] = [[] for _ in inputs]
    for s in _sequences(problem, q, k):
        parts = [*_parts(problem, arrays, s), *_parts_of_out(problem, dout, dlse, s)]
        ours = _parts(problem, given, s)
        pieces: list[list[Any]] = [[] for _ in inputs]
        for rows in _blocks(s, heads):
            mine, cotangents = (_rows_of(x, rows) for x in (parts, ours))

            def first(*moved: Any, mine: Any = mine, s: Any = s, rows: Any = rows) -> Any:
                now = list(mine)
                for n, x in zip(live, moved, strict=True):
                    now[n] = x
                followed = [n for n in live if n < 5]

                def forward(*moved: Any) -> Any:
                    here = now[:5]
                    for n, x in zip(followed, moved, strict=True):
                        here[n] = x
                    return _formula(problem, s, rows, *here)

                (out, lse), back = _vjp(forward, *(now[n] for n in followed))
                zeros = torch.zeros_like(out), torch.zeros_like(lse)
                # A lse of -inf is no number to follow: its row sees nothing.
                flow = zeros[1] if now[6] is None else torch.where(lse == -torch.inf, 0.0, now[6])
                found = dict(
                    zip(followed, back((zeros[0] if now[5] is None else now[5], flow)), strict=True)
                )
                return tuple(found[n] for n in wanted)

            _, pull = _vjp(first, *(mine[n] for n in live))
            for n, x in zip(live, pull(tuple(cotangents[n] for n in wanted)), strict=True):
                pieces[n].append(x)
        for n in live:
            by_sequence[n].append(_gather(n, pieces[n], parts[n]))
    return [_whole(problem, n, by_sequence[n], inputs[n]) if n in live else None for n in range(7)]


def _parts_of_out(problem: Problem, dout: Any, dlse: Any, s: _Sequence) -> list[Any]:
    return [
        None if dout is None else _cut(problem, dout, s, s.q),
        None if dlse is None else _cut_lse(problem, dlse, s),
    ]


def _rows_of(parts: Sequence[Any], rows: slice) -> list[Any]:
    """Some rows of q, mask, dout and dlse; k, v and sink whole."""
    here = list(parts)
    for n in (0, 5, 6):
        if n < len(here) and here[n] is not None:
            here[n] = here[n][:, rows]
    here[3] = _mask_rows(here[3], rows)
    return here


def _gather(n: int, pieces: Sequence[Any], like: Any) -> Any:
    if not pieces:
        return torch.zeros_like(like)
    if n in (0, 5, 6) or (n == 3 and like.shape[1] > 1):
        return torch.cat(list(pieces), 1)
    return sum(pieces[1:], pieces[0])


def _whole(problem: Problem, n: int, parts: Sequence[Any], like: Any) -> Any:
    if n == 3:
        return _join_mask(parts, like)
    if n == 4:
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(like)
    if n == 6:
        return _join_lse(problem, parts, like, 0.0)
    return _join(problem, parts, like)
