"""transformers on fastattn: register() makes attn_implementation="fastattn" one of its names.

transformers asks two functions: mask() says which keys a row may see, attend() computes. Where an
interval says it (causal, a window, padding, packed sequences) no (sq, sk) mask is ever made: an
IntervalMask goes from one to the other instead, through the model.
"""

from collections.abc import Callable
from typing import Any

from ._needs import need

need(__name__, "torch", "2.10")
need(__name__, "transformers", "5.15")

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils import output_capturing
from transformers.utils.import_utils import is_tracing

from . import _attention
from ._renaming import renaming

__all__ = ["register"]


_NAMES = {
    **{"q": "query", "k": "key", "v": "value", "scale": "scaling", "dropout_p": "dropout"},
    **{name: "attention_mask" for name in ("mask", "k_lengths", "k_start")},
    **{"sink": "s_aux", "window": "sliding_window"},
}
attention = renaming(_attention.attention, _NAMES)
attention_varlen = renaming(_attention.attention_varlen, _NAMES)


def register(name: str = "fastattn") -> None:
    """Makes fastattn an attention of transformers.

        fastattn.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn")
        model.set_attn_implementation("fastattn")  # or of a model that is there

    Served are all models that ask transformers' AttentionInterface, in training and generate():
    masks, windows, padding, packed sequences, soft caps, sinks, position biases, values of another
    size than keys. Key heads are not repeated. A graph of torch.compile that trains without an
    attention_mask makes a dense mask, for its tokens might be packed: pass a mask of ones. Models
    that do not ask (Falcon, Bloom, MPT) take attn_implementation="sdpa" inside of
    fastattn.torch.use_fastattn(), as far as they have it. So does continuous batching, which knows
    no registered names and runs in a thread of its own: use_fastattn().install() reaches it.

    Args:
        name: what attn_implementation is called.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


class IntervalMask(BlockMask):
    """Which keys each row may see, in the place of a bool mask of this shape (b, 1, sq, sk).

    A BlockMask, for that is what models of transformers hand on as they got it.
    """

    ndim = 4  # GPT-2 asks

    def __init__(
        self, shape: tuple[Any, ...], keywords: dict[str, Any], ends: tuple[Any, ...] | None = None
    ) -> None:
        self.lengths = shape
        self.keywords = keywords  # of attention
        self.ends = ends  # of packed sequences: cu_seqlens and max_seqlen, as attention_varlen's

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.lengths

    def to(self, device: Any, **_: Any) -> "IntervalMask":
        """For models whose layers are on several devices."""

        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, torch.Tensor) else x

        keywords = {name: move(x) for name, x in self.keywords.items()}
        return IntervalMask(self.lengths, keywords, self.ends and tuple(map(move, self.ends)))

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            "this model does not ask transformers' AttentionInterface for its attention: take "
            'attn_implementation="sdpa" inside of fastattn.torch.use_fastattn()'
        )

    __add__ = __radd__ = _refuse


# ------------------------------------------------------------------------------------------ masks


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **more: Any,
) -> Any:
    """transformers' mask function: an IntervalMask where that says it, else sdpa's bool mask.

    The two permissions to leave a mask out mean that the pattern is causal, or everything, but for
    padding and what `local_size` forbids. Without them the model wants to see a mask, or there is
    more in the pattern.
    """
    shape = (batch_size, 1, q_length, kv_length)
    if allow_is_causal_skip or allow_is_bidirectional_skip:
        causal = allow_is_causal_skip
        plain = causal_mask_function if causal else bidirectional_mask_function
        window = None
        if local_size is None:
            is_known = mask_function is plain
        elif kv_length < local_size:
            is_known = True
        else:
            window = _window(local_size, causal, config)
            is_known = window is not None
        if is_known:
            keywords = {"causal": causal} | _intervals(attention_mask, kv_length, kv_offset)
            if causal or window:
                offset = q_offset - kv_offset
                if isinstance(offset, torch.Tensor):
                    offset = offset.to(torch.int32).expand(batch_size)
                keywords |= {"window": window, "q_offset": offset}
            return IntervalMask(shape, keywords)
    elif attention_mask is None and (sequences := _packed(mask_function, local_size)) is not None:
        window = None if local_size is None else (local_size - 1, 0)
        return IntervalMask(shape, {"causal": True, "window": window}, _ends(sequences))
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **more,
    )


def _window(local_size: int, causal: bool, config: Any) -> tuple[int, int] | None:
    """What a local size means; None where it is not certain to be a window and not a chunk."""
    if local_size != getattr(config, "sliding_window", None):
        return None
    if local_size == getattr(config, "attention_chunk_size", None):
        return None
    return (local_size - 1, 0) if causal else (local_size, local_size)


def _intervals(real: Any, kv_length: int, kv_offset: int) -> dict[str, Any]:
    """Keywords of attention for (b, n) bool, True for tokens that are no padding."""
    if real is None:
        return {}
    missing = kv_offset + kv_length - real.shape[1]
    if missing > 0:  # a static cache, that is not filled yet
        real = torch.nn.functional.pad(real, (0, missing))
    real = real[:, kv_offset : kv_offset + kv_length]
    numbers = torch.arange(1, kv_length + 1, device=real.device, dtype=torch.int32)
    found = {
        "k_start": real.to(torch.int32).argmax(1).to(torch.int32),
        "k_lengths": (real * numbers).amax(1),
    }
    has_holes = is_padded = True
    if not is_tracing(real):  # the values are known
        holes = found["k_lengths"] - found["k_start"] - real.sum(1)
        has_holes, is_padded = torch.stack([holes.any(), ~real.all()]).tolist()
    if has_holes:
        found["mask"] = real[:, None, None, :]
    return found if is_padded else {}


def _captured(function: Callable[..., Any], name: str) -> Any:
    """What a closure holds by that name, or None."""
    code = getattr(function, "__code__", None)
    if code is None or name not in code.co_freevars or function.__closure__ is None:
        return None
    return function.__closure__[code.co_freevars.index(name)].cell_contents


def _packed(function: Callable[..., Any], local_size: int | None) -> Any:
    """(b, s), the number of the sequence that each token is of, where the pattern is causal, or a
    window, in each of the sequences that lie end to end in a row; else None.

    It is known by how transformers composes that pattern. Where this changes, there is a mask.
    """
    if torch.compiler.is_compiling():
        return None

    def parts(function: Any) -> tuple[Any, Any]:
        found: Any = _captured(function, "mask_functions") or ()
        return (found[0], found[1]) if len(found) == 2 else (None, None)

    inner, packing = parts(function)
    inner = _captured(inner, "mask_function") or inner  # by positions in the sequence
    if local_size is not None:
        overlay, inner = parts(inner)
        if _captured(overlay, "sliding_window") != local_size:
            return None
    sequences = _captured(packing, "packed_sequence_mask")
    if inner is not causal_mask_function or sequences is None or is_tracing(sequences):
        return None
    return sequences


def _ends(sequences: Any) -> tuple[Any, ...]:
    """cu_seqlens over all rows and the length of the longest sequence, of queries and of keys."""
    first = torch.ones_like(sequences, dtype=torch.bool)
    first[:, 1:] = sequences.diff(dim=1) != 0
    total = sequences.new_tensor([sequences.numel()])
    ends = torch.cat([first.flatten().nonzero().flatten(), total])
    longest = int(ends.diff().max())
    return ends, ends, longest, longest


# -------------------------------------------------------------------------------------- attention


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **more: Any,
) -> tuple[Any, None]:
    """transformers' attention function: (b, h, s, d) each, gives (b, sq, hq, dv) and None."""
    if more.get("output_attentions") or _is_captured():
        raise ValueError(
            "`output_attentions` must be False with fastattn, which never makes the matrix of "
            'attention weights: attn_implementation="eager" does'
        )
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "softcap": softcap or 0.0}
    if s_aux is not None:
        options["sink"] = s_aux.float()
    ends = None
    if isinstance(attention_mask, IntervalMask):
        _check(attention_mask, query, key)
        options |= attention_mask.keywords
        ends = attention_mask.ends
    elif attention_mask is not None:
        options["mask"] = attention_mask
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # As sdpa's: a static cache has slots behind the queries that are still empty.
        options["causal"] = "top-left" if causal and query.shape[2] > 1 else False
        if cu_seq_lens_q is not None and sliding_window is not None:
            options["window"] = (sliding_window - 1, sliding_window - 1)
    if ends is None and cu_seq_lens_q is not None and not options.keys() & {"mask", "k_lengths"}:
        ends = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if position_bias is not None:
        options["mask"] = _biased(position_bias, options.get("mask"))
    if query.shape[0] != key.shape[0]:  # queries that are learned, the same ones for all
        query = query.expand(key.shape[0], -1, -1, -1)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if ends is not None:
        return _attend_packed(q, k, v, ends, options), None
    return attention(q, k, v, layout="bshd", **options), None


# GPT-2, for one, does not hand output_attentions on: then this variable knows of it.
_collector = getattr(output_capturing, "_active_collector", None)


def _is_captured() -> bool:
    """Whether somebody collects attention weights from the layers."""
    if _collector is None or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in _collector.get() or ())


def _check(mask: IntervalMask, query: Any, key: Any) -> None:
    """A bool mask would fail where a model has cut or extended its keys meanwhile."""
    sees_all = mask.keywords == {"causal": False}
    if not sees_all and mask.shape[2:] != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"`attention_mask` must be made for {query.shape[2]} queries and {key.shape[2]} keys, "
            f"got one for {mask.shape[2]} and {mask.shape[3]}"
        )


def _biased(bias: Any, mask: Any) -> Any:
    """Both in one float mask."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return bias + mask


def _attend_packed(q: Any, k: Any, v: Any, ends: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """(b, s, h, d) of sequences that lie end to end in the rows of the batch."""
    if "mask" in options:
        raise NotImplementedError(
            "`position_bias` must be None for packed sequences, got a tensor: pad them"
        )
    options.pop("q_offset", None)
    starts = (x.to(torch.int32) for x in ends[:2])
    longest = (int(x) for x in ends[2:])
    out = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), *starts, *longest, **options)
    return out.unflatten(0, q.shape[:2])
