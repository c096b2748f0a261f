"""SparseK attention as a module of torch, and the cache it decodes with, for fastattn.torch."""

import math
from typing import Any

import torch

from ._sparse import attention_sparse
from ._sparsek import sparsek
from ._sparsek_attention import sparsek_attention


class SparseKCache:
    """The keys and values that SparseK attention will see again, of a batch of sequences in step.

    Of each sequence and key head at most window + ceil(k_keep) keys: what leaves the window stays
    while it is among the greatest, and its place is taken when it is not. Its score stays as long
    as it can move tau. Nothing here has a gradient.

    Args:
        batch: how many sequences there are.
        kv_heads: key heads.
        head_dim: size of a key's and a value's head.
        k_keep: as in sparsek_attention.
        window: as in sparsek_attention.
        dtype: of keys and values.
        device: of all.
        pages: None, or (k_pages, v_pages, page_table): memory for the keys that others have, too.
            k_pages and v_pages are (num_pages, page_size, kv_heads, head_dim), page_table is
            (batch, columns), of pages for `places` keys in all, that no two sequences share.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        k_keep: float,
        window: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
        pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.k_keep, self.window = float(k_keep), int(window)
        self.kept = max(0, math.ceil(self.k_keep))
        self.places = max(1, self.kept + self.window)
        if self.window < 0 or not math.isfinite(self.k_keep):
            raise ValueError(
                "`window` must be at least 0 and `k_keep` finite, got "
                f"{self.window} and {self.k_keep}"
            )
        shape = (batch, kv_heads, self.places)
        if pages is None:
            self.k, self.v = torch.zeros(
                (2, batch * self.places, kv_heads, head_dim), dtype=dtype, device=device
            )
            rows = torch.arange(batch * self.places, device=device).view(batch, self.places)
        else:
            *pools, table = pages
            size = pools[0].shape[1]
            if table.shape[0] != batch or table.shape[1] * size < self.places:
                raise ValueError(
                    f"`page_table` must have {batch} rows of pages for {self.places} keys, got "
                    f"{tuple(table.shape)} pages of {size}"
                )
            self.k, self.v = (pool.flatten(0, 1) for pool in pools)
            if self.k.data_ptr() != pools[0].data_ptr() or self.v.data_ptr() != pools[1].data_ptr():
                raise ValueError("`pages` must be contiguous: they are written in place")
            at = torch.arange(self.places, device=self.k.device)
            rows = table[:, at // size].long() * size + at % size
            device = self.k.device
        self.rows = rows.int()  # of each place its row in k and v
        self.numbers = torch.full(shape, -1, dtype=torch.int32, device=device)  # -1: free
        real = torch.float64 if self.k.dtype == torch.float64 else torch.float32
        self.scores = torch.full(shape, -math.inf, dtype=real, device=device)
        self.past = torch.empty((*shape[:2], 0), dtype=real, device=device)  # of candidates
        self.pruned = 0
        self.length = 0

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: torch.Tensor,
        **options: Any,
    ) -> torch.Tensor:
        """Appends keys (b, hk, s, d), values and scores (b, hk, s), and attends for their queries.

        The options are key_gate, softcap, sink and scale of sparsek_attention, which this is, over
        all keys so far. Of the first tokens any number at once; then each is a step.
        """
        with torch.no_grad():
            if self.length == 0 and q.shape[2] > 1:
                return self._fill(q, k, v, scores, options)
            parts = [q.new_empty((*q.shape[:2], 0, v.shape[3]))]
            for i in range(q.shape[2]):
                one = slice(i, i + 1)
                now = q[:, :, one], k[:, :, one], v[:, :, one], scores[:, :, i]
                parts.append(self._step(*now, options))
            return torch.cat(parts, dim=2)

    def _fill(self, q: Any, k: Any, v: Any, scores: Any, options: dict[str, Any]) -> torch.Tensor:
        n, given = q.shape[2], {"window": self.window, **options}
        found = sparsek_attention(q, k, v, scores, self.k_keep, **given, return_selection=True)
        out: torch.Tensor = found[0]
        tau, ends = found[1:]
        number = torch.arange(n, dtype=torch.int32, device=q.device)
        alive = (ends == n) | (number > n - 1 - self.window)
        order = torch.argsort(~alive, dim=-1, stable=True)[..., : self.places]  # the living first
        count = order.shape[-1]
        self.numbers[..., :count] = torch.where(alive.gather(-1, order), order.int(), -1)
        self.scores[..., :count] = scores.gather(-1, order).to(self.scores.dtype)
        b, hk = torch.nonzero(torch.ones_like(tau[..., 0]), as_tuple=True)
        for to, of in ((self.k, k), (self.v, v)):
            picked = of.gather(2, order[..., None].expand(*order.shape, of.shape[3]))
            to[self.rows[b, :count].long(), hk[:, None]] = picked.flatten(0, 1)
        self.past = scores[..., : max(0, n - self.window)].to(self.scores.dtype)
        self.length = n
        self._prune(tau[..., -1])
        return out

    def _step(self, q: Any, k: Any, v: Any, score: Any, options: dict[str, Any]) -> Any:
        i = self.length
        score = score.to(self.scores.dtype)
        if self.window:
            leaves = self.numbers == i - self.window  # in each sequence and head at most one
            joins = torch.where(leaves, self.scores, -math.inf).amax(-1)
            joins = torch.where(leaves.any(-1), joins, -math.inf)
        else:
            joins = score
        self.past = torch.cat([self.past, joins[..., None]], dim=-1)
        tau = sparsek(self.past, self.k_keep)[1]
        if self.window:
            self._evict(i)
            self._put(i, k, v, score)
        elif self.kept:
            self._put_if_greater(i, k, v, score)
        self.length = i + 1
        if self.past.shape[-1] > 2 * self.pruned + 256:
            self._prune(tau)
        return self._see(q, i, tau, options)

    def _least(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many candidates row i has here; place and score of the least, the last of equals."""
        chosen = (self.numbers >= 0) & (self.numbers <= i - self.window)
        ranks = torch.where(torch.isnan(self.scores), math.inf, self.scores)
        ranks = torch.where(chosen, ranks, math.nan)
        least = torch.nan_to_num(ranks, nan=math.inf, posinf=math.inf).amin(-1, keepdim=True)
        latest = torch.where(chosen & (ranks == least), self.numbers, -1).argmax(-1, keepdim=True)
        return chosen.sum(-1, keepdim=True), latest, least

    def _evict(self, i: int) -> None:
        """The least of one candidate too many; and candidates of -inf, which are none."""
        void = (self.numbers >= 0) & (self.numbers <= i - self.window)
        void &= self.scores == -math.inf
        self.numbers.masked_fill_(void, -1)
        count, latest, _ = self._least(i)
        old = self.numbers.gather(-1, latest)
        self.numbers.scatter_(-1, latest, torch.where(count > self.kept, -1, old))

    def _put(
        self, i: int, k: Any, v: Any, score: Any, place: Any = None, allowed: Any = None
    ) -> None:
        if place is None:
            place = (self.numbers < 0).int().argmax(-1, keepdim=True)
        allowed = torch.ones_like(place, dtype=torch.bool) if allowed is None else allowed
        b, hk = (x.flatten() for x in torch.nonzero(allowed[..., 0], as_tuple=True))
        at = place[b, hk, 0]
        self.numbers[b, hk, at], self.scores[b, hk, at] = i, score[b, hk]
        rows = self.rows[b, at].long()
        self.k[rows, hk], self.v[rows, hk] = k[b, hk, 0], v[b, hk, 0]

    def _put_if_greater(self, i: int, k: Any, v: Any, score: Any) -> None:
        """Without a window a key is a candidate at once, and may not be kept at all."""
        count, latest, least = self._least(i)
        free = (self.numbers < 0).int().argmax(-1, keepdim=True)
        rank = torch.where(torch.isnan(score), math.inf, score)[..., None]
        full = count >= self.kept
        allowed = (rank > -math.inf) & (~full | (rank > least))
        self._put(i, k, v, score, torch.where(full, latest, free), allowed)

    def _see(self, q: Any, i: int, tau: Any, options: dict[str, Any]) -> Any:
        gates = (self.scores - tau[..., None]).clamp(0, 1)
        certain = torch.where(tau.isnan(), math.nan, 1.0)[..., None].to(gates.dtype)
        gates = torch.where(self.scores == math.inf, certain, gates)
        gates = torch.where(self.numbers > i - self.window, 1, gates)
        rows = self.rows[:, None].expand_as(self.numbers)
        lists = torch.where(self.numbers >= 0, rows, -1)[:, :, None]
        b = q.shape[0]
        found = attention_sparse(
            q.transpose(1, 2),
            self.k.expand(b, *self.k.shape),
            self.v.expand(b, *self.v.shape),
            lists,
            **{"gate": gates[:, :, None], "k_block": 1, "layout": "bshd", **options},
        )
        return found.transpose(1, 2)

    def _prune(self, tau: torch.Tensor) -> None:
        """Leaves of the past what may still move tau: what is above it, and the next one."""
        support = (~(self.past <= tau[..., None])).sum(-1).amax() if self.past.numel() else 0
        n = min(self.past.shape[-1], int(support) + 1)
        self.past = self.past.topk(n, dim=-1).values
        self.pruned = n


class SparseKAttention(torch.nn.Module):
    """Causal self-attention to a window and to the keys that a learned map of each token chooses.

    Projections to queries, keys and values, the scores of each key head, a linear map of the token
    plus a slope times its position, then sparsek_attention, and a projection of its output. The
    gates' gradient reaches the scores, so that the map learns which keys to keep.

    Args:
        dim: size of a token.
        heads: query heads.
        k_keep: as in sparsek_attention.
        window: as in sparsek_attention.
        kv_heads: key heads; None: as many as there are query heads.
        head_dim: size of a head; None: dim // heads.
        bias: whether the projections have one.
        key_gate: as in sparsek_attention.

    Source: Lou et al., "Sparser is Faster and Less is More: Efficient Sparse Attention for
    Long-Range Transformers", 2024, section 3.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        k_keep: float,
        window: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        key_gate: bool = False,
    ) -> None:
        super().__init__()
        kv_heads, head_dim = kv_heads or heads, head_dim or dim // heads
        if heads % kv_heads:
            raise ValueError(f"`heads` must be a multiple of `kv_heads` = {kv_heads}, got {heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.k_keep, self.window, self.key_gate = k_keep, window, key_gate
        self.qkv = torch.nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.score = torch.nn.Linear(dim, kv_heads, bias=False)
        self.slope = torch.nn.Parameter(torch.zeros(kv_heads))  # for each window of tokens
        self.out = torch.nn.Linear(heads * head_dim, dim, bias=bias)

    def cache(self, batch: int, **options: Any) -> SparseKCache:
        """An empty cache for this module; the options are dtype, device and pages."""
        given = {"dtype": self.qkv.weight.dtype, "device": self.qkv.weight.device, **options}
        return SparseKCache(
            batch, self.kv_heads, self.head_dim, k_keep=self.k_keep, window=self.window, **given
        )

    def forward(self, x: torch.Tensor, cache: SparseKCache | None = None) -> torch.Tensor:
        """(b, s, dim) of (b, s, dim); with a cache of the s tokens that follow those in it."""
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(sizes, dim=1)
        scores = self.score(x).transpose(1, 2)
        first = 0 if cache is None else cache.length
        at = torch.arange(first, first + x.shape[1], device=x.device) / max(1, self.window)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores + self.slope[:, None] * at.to(scores.dtype)
        attended: torch.Tensor
        if cache is not None:
            attended = cache.attend(q, k, v, scores, key_gate=self.key_gate)
        else:
            attended = sparsek_attention(
                q, k, v, scores, self.k_keep, window=self.window, key_gate=self.key_gate
            )
        found: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return found
