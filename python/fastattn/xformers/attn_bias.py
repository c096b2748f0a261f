"""xFormers' attn_bias classes that are intervals, lengths or dense, with its names.

Constructors, attributes and methods are those of xformers.ops.fmha.attn_bias. Each class says by
_causal, and by the fields of a window, what limits_of() makes of it in attention's words; xFormers'
own objects have the same fields. Where a row sees no key, xFormers' result is undefined; here it
is 0, so that no number of keys is refused.
"""

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch

__all__ = [
    "AttentionBias",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "PagedBlockDiagonalCausalLocalPaddedKeysMask",
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask",
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
    "PagedBlockDiagonalGappyKeysMask",
    "PagedBlockDiagonalPaddedKeysMask",
]

Causal = bool | Literal["top-left"]
Window = tuple[int | None, int | None] | None
Self = TypeVar("Self", bound="_Movable")
Blocks = TypeVar("Blocks", bound="_Blocks")


def _int32(numbers: Sequence[int], device: Any) -> Any:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor(numbers, dtype=torch.int32, device=device)


class _Movable:
    def to(self: Self, device: Any) -> Self:
        """The same with its tensors on a device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {name: x.to(device) for name, x in parts.items() if hasattr(x, "to")}
        return replace(self, **moved) if moved else self  # type: ignore[type-var]


# --------------------------------------------------------------------------------------- lengths


@dataclass
class _SeqLenInfo(_Movable):
    """How rows are divided into sequences, one after the other."""

    seqstart: Any  # (b + 1,) int32
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Any = None) -> "_SeqLenInfo":
        lengths = list(seqlens)
        starts = [0, *itertools.accumulate(lengths)]
        ends = max(lengths, default=-1), min(lengths, default=-1)
        return cls(_int32(starts, device), *ends, starts)

    def intervals(self) -> Iterable[tuple[int, int]]:
        """Where each sequence starts and ends."""
        return itertools.pairwise(self.seqstart_py)

    def split(self, x: Any, batch_sizes: Sequence[int] | None = None) -> list[Any]:
        """The parts of x (1, total, ...), of as many sequences each as batch_sizes says."""
        total = self.seqstart_py[-1]
        if x.shape[:2] != (1, total):
            raise ValueError(f"`tensor` must be (1, {total}, ...), got {tuple(x.shape)}")
        sizes = batch_sizes or [1] * (len(self.seqstart_py) - 1)
        ends = [self.seqstart_py[n] for n in (0, *itertools.accumulate(sizes))]
        parts = x.split([b - a for a, b in itertools.pairwise(ends)], dim=1)
        return [p.unflatten(1, (n, -1)).flatten(0, 1) for p, n in zip(parts, sizes, strict=True)]


@dataclass
class _Shorter(_SeqLenInfo):
    """Of each sequence only the first rows count."""

    seqlen: Any  # (b,) int32
    seqlen_py: Sequence[int]

    def intervals(self) -> Iterable[tuple[int, int]]:
        return ((a, a + n) for a, n in zip(self.seqstart_py, self.seqlen_py, strict=False))


@dataclass
class _PaddedSeqLenInfo(_Shorter):
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Any = None
    ) -> "_PaddedSeqLenInfo":
        if max(seqlens, default=0) > padding:
            raise ValueError(f"`kv_seqlen` must be at most kv_padding = {padding}, got {seqlens}")
        starts = [padding * n for n in range(len(seqlens) + 1)]
        ends = max(seqlens, default=-1), min(seqlens, default=-1)
        lengths = _int32(seqlens, device), list(seqlens)
        return cls(_int32(starts, device), *ends, starts, *lengths, padding)


@dataclass
class _GappySeqInfo(_Shorter):
    @classmethod
    def from_seqlens_gappy(
        cls, seqstarts: Sequence[int], seqlens: Sequence[int], paged: bool, *, device: Any = None
    ) -> "_GappySeqInfo":
        if paged:
            _refuse_pages()
        if not seqlens or len(seqstarts) != len(seqlens) + 1:
            raise ValueError(
                "`kv_seqstarts` must have one number more than `kv_seqlen`, the rows in all, got "
                f"{len(seqstarts)} and {len(seqlens)}"
            )
        ends = _int32(seqstarts, device), max(seqlens), min(seqlens), list(seqstarts)
        return cls(*ends, _int32(seqlens, device), seqlens)


# -------------------------------------------------------------------------------- whole matrices


class AttentionBias:
    """What may be passed as attn_bias, besides a tensor."""

    _causal: ClassVar[Causal] = False

    def to(self, device: Any) -> "AttentionBias":
        return self

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Any:
        """What is added to the scores, (..., sq, sk): 0, or -inf where a query sees no key."""
        sq, sk = shape[-2:]
        return _matrix(*limits_of(self), sq, sk, dtype, device).expand(*shape)


def _matrix(causal: Causal, window: Window, sq: int, sk: int, dtype: Any, device: Any) -> Any:
    shift = 0 if causal == "top-left" else sk - sq
    left, right = window or (None, None)
    right = 0 if causal else right
    seen = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if right is not None:
        seen = seen.tril(shift + right)
    if left is not None:
        seen = seen.triu(shift - left)
    return torch.zeros(sq, sk, dtype=dtype, device=device).masked_fill(~seen, -torch.inf)


class LowerTriangularMask(AttentionBias):
    """Query i sees keys j <= i."""

    _causal = "top-left"

    def __init__(self, device: Any = None) -> None:
        """The device has no meaning."""

    def add_bias(self, bias: Any) -> "LowerTriangularMaskWithTensorBias":
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """The same, and a tensor that is added to the scores."""

    def __init__(self, bias: Any) -> None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(f"`bias` must be a tensor, got {type(bias).__name__}")
        self._bias = bias

    def to(self, device: Any) -> "LowerTriangularMaskWithTensorBias":
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Any:
        return super().materialize(shape, dtype, device) + self._bias


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Query i sees keys from i' - window_left to i' + window_right, i' = i + sk - sq."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        _check_window(self)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Query i sees keys j <= i + sk - sq."""

    _causal = True

    def make_local_attention(
        self, window_size: int
    ) -> "LowerTriangularFromBottomRightLocalAttentionMask":
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The same, of the last window_size of these keys."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window(self)


def _check_window(bias: Any) -> None:
    for name, least in (("window_left", 0), ("window_right", 0), ("_window_size", 1)):
        _ints(name.lstrip("_"), [getattr(bias, name, least)], least)


def _ints(name: str, numbers: Any, least: int = 0) -> list[int]:
    try:
        found = [operator.index(n) for n in numbers]
    except TypeError:
        raise TypeError(f"`{name}` must be of ints, got {numbers!r}") from None
    if min(found, default=least) < least:
        raise ValueError(f"`{name}` must be at least {least}, got {min(found)}")
    return found


# ------------------------------------------------------------------------------- block-diagonal


@dataclass
class _Blocks(_Movable, AttentionBias):
    """Queries of a sequence see the keys of the same one."""

    q_seqinfo: Any
    k_seqinfo: Any

    def __post_init__(self) -> None:
        _check_window(self)

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Any:
        totals = self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1]
        if tuple(shape[-2:]) != totals:
            raise ValueError(f"`shape` must end with {totals}, got {tuple(shape)}")
        bias = torch.full(totals, -torch.inf, dtype=dtype, device=device)
        for (q, q_end), (k, k_end) in zip(
            self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True
        ):
            block = _matrix(*limits_of(self), q_end - q, k_end - k, dtype, device)
            bias[q:q_end, k:k_end] = block
        return bias.expand(*shape)


@dataclass
class BlockDiagonalMask(_Blocks):
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls: type[Blocks],
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: Any = None,
    ) -> Blocks:
        """Of the sequences' lengths; kv_seqlen: default q_seqlen."""
        q_seqlen, kv_seqlen = _numbers(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)
        queries = keys = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen != q_seqlen:
            keys = _SeqLenInfo.from_seqlens(kv_seqlen, device=device)
        return cls(queries, keys)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Any]) -> tuple["BlockDiagonalMask", Any]:
        """Of tensors (b_n, s_n, ...), each of b_n sequences, and these packed end to end."""
        bias = cls.from_seqlens(_lengths(tensors), device=tensors[0].device)
        bias._batch_sizes = [len(x) for x in tensors]
        return bias, _packed(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Any],
        tensors_k: Sequence[Any],
        tensors_v: Sequence[Any] | None = None,
    ) -> tuple["BlockDiagonalMask", Any, Any, Any]:
        """The same of queries, keys and values of their own lengths."""
        lengths = _lengths(tensors_q), _lengths(tensors_k)
        bias = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        bias._batch_sizes = [len(x) for x in tensors_q]
        values = None if tensors_v is None else _packed(tensors_v)
        return bias, _packed(tensors_q), _packed(tensors_k), values

    def split_queries(self, tensor: Any) -> Sequence[Any]:
        """What from_tensor_list had packed, of queries or of the output."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)  # type: ignore[no-any-return]

    def split_kv(self, tensor: Any) -> Sequence[Any]:
        return self.k_seqinfo.split(tensor, self._batch_sizes)  # type: ignore[no-any-return]

    def split(self, tensor: Any) -> Sequence[Any]:
        if self.q_seqinfo.seqstart_py != self.k_seqinfo.seqstart_py:
            raise ValueError("`split` needs queries and keys of one division: use split_queries")
        return self.split_queries(tensor)

    def _as(self, kind: type[Blocks], *window: int) -> Blocks:
        return kind(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, *window)  # type: ignore[call-arg]

    def make_causal(self) -> "BlockDiagonalCausalMask":
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> "BlockDiagonalCausalFromBottomRightMask":
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> "BlockDiagonalCausalLocalAttentionMask":
        return self._as(BlockDiagonalCausalLocalAttentionMask, window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> "BlockDiagonalCausalLocalAttentionFromBottomRightMask":
        return self._as(BlockDiagonalCausalLocalAttentionFromBottomRightMask, window_size)


def _numbers(q_seqlen: Any, kv_seqlen: Any) -> tuple[list[int], list[int]]:
    q_seqlen, kv_seqlen = _ints("q_seqlen", q_seqlen), _ints("kv_seqlen", kv_seqlen)
    if len(q_seqlen) != len(kv_seqlen):
        raise ValueError(
            f"`kv_seqlen` must be of {len(q_seqlen)} sequences like `q_seqlen`, got "
            f"{len(kv_seqlen)}"
        )
    return q_seqlen, kv_seqlen


def _lengths(tensors: Sequence[Any]) -> list[int]:
    return [x.shape[1] for x in tensors for _ in range(x.shape[0])]


def _packed(tensors: Sequence[Any]) -> Any:
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], dim=1)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    _causal = "top-left"


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    _causal = True


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 0


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 0


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """Keys lie in places of one size, of which each sequence fills the first so many."""

    @classmethod
    def from_seqlens(
        cls: type[Blocks],
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> Blocks:
        """Of the sequences' lengths; causal_diagonal has no meaning, as in xFormers."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> "BlockDiagonalLocalAttentionPaddedKeysMask":
        kind, window = BlockDiagonalLocalAttentionPaddedKeysMask, (window_left, window_right)
        return kind(self.q_seqinfo, self.k_seqinfo, *window)

    def make_paged(self, *arguments: Any, **keywords: Any) -> NoReturn:
        _refuse_pages()


def _padded(
    q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], device: Any
) -> tuple[_SeqLenInfo, _PaddedSeqLenInfo]:
    q_seqlen, kv_seqlen = _numbers(q_seqlen, kv_seqlen)
    (kv_padding,) = _ints("kv_padding", [kv_padding])
    queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
    return queries, _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    _causal = True
    causal_diagonal: Any = None  # no meaning, as in xFormers


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> "BlockDiagonalLocalAttentionPaddedKeysMask":
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    _causal = True
    _window_size: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
    ) -> "BlockDiagonalCausalLocalAttentionPaddedKeysMask":
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_size)


@dataclass
class BlockDiagonalGappyKeysMask(_Blocks):
    """Each sequence's keys start where it is said; between them are others, which nobody sees."""

    @classmethod
    def from_seqlens(
        cls: type[Blocks],
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Any = None,
    ) -> Blocks:
        """kv_seqstarts has one number more than there are sequences: the keys in all."""
        return cls(*_gappy(q_seqlen, kv_seqstarts, kv_seqlen, device))

    def make_paged(self, *arguments: Any, **keywords: Any) -> NoReturn:
        _refuse_pages()


def _gappy(
    q_seqlen: Sequence[int], kv_seqstarts: Sequence[int], kv_seqlen: Sequence[int], device: Any
) -> tuple[_SeqLenInfo, _GappySeqInfo]:
    q_seqlen, kv_seqlen = _numbers(q_seqlen, kv_seqlen)
    kv_seqstarts = _ints("kv_seqstarts", kv_seqstarts)
    queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
    keys = _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, False, device=device)
    return queries, keys


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    _causal = True


@dataclass
class BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask(BlockDiagonalGappyKeysMask):
    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local_gappy(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        device: Any = None,
    ) -> "BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask":
        return cls(*_gappy(q_seqlen, kv_seqstarts, kv_seqlen, device), window_left, window_right)


# ---------------------------------------------------------------------------------------- pages


def _refuse_pages() -> NoReturn:
    raise NotImplementedError("`attn_bias` of keys in pages is not served yet")


class _Paged(AttentionBias):
    """Not built yet: what makes one raises NotImplementedError."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        _refuse_pages()

    @classmethod
    def from_seqlens(cls, *arguments: Any, **keywords: Any) -> NoReturn:
        _refuse_pages()

    from_seqlens_local = from_seqlens


class PagedBlockDiagonalPaddedKeysMask(_Paged):
    pass


class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    pass


class PagedBlockDiagonalCausalLocalPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    pass


class PagedBlockDiagonalGappyKeysMask(_Paged):
    pass


class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    pass


# ------------------------------------------------------------------------------ what is computed

KINDS: dict[str, Any] = {name: globals()[name] for name in __all__}


def kind_of(bias: Any) -> Any:
    """The class here of an object of this module or of xFormers', by its class's name."""
    kind = type(bias)
    name = (
        kind.__name__ if kind.__module__.split(".")[0] in ("fastattn", "xformers", "mslk") else ""
    )
    if name.startswith("Paged"):
        _refuse_pages()
    if name == "AttentionBias" or name not in KINDS:
        raise TypeError(
            "`attn_bias` must be None, a tensor or one of xFormers' biases, got "
            f"{kind.__module__}.{kind.__name__}"
        )
    return KINDS[name]


def limits_of(bias: Any) -> tuple[Causal, Window]:
    """attention's `causal` and `window` of each block, or of the whole."""
    causal = kind_of(bias)._causal
    if (size := getattr(bias, "_window_size", None)) is not None:
        return causal, (size - 1, None)
    if (left := getattr(bias, "window_left", None)) is not None:
        return causal, (left, bias.window_right)
    return causal, None
