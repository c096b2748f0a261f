"""flash-attn's bert_padding: a padded batch to its tokens alone and back, with gradients."""

from typing import Any

import torch


def index_first_axis(input: Any, indices: Any) -> Any:
    """The rows `indices` of `input`."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Any, indices: Any, first_axis_dim: int) -> Any:
    """An array of first_axis_dim rows: `values` at `indices`, 0 elsewhere."""
    empty = values.new_zeros(first_axis_dim, *values.shape[1:])
    return empty.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Any, attention_mask: Any, unused_mask: Any = None
) -> tuple[Any, Any, Any, int, Any]:
    """The rows of a padded batch that its mask keeps, packed end to end.

    Args:
        hidden_states: (b, s, ...).
        attention_mask: (b, s) bool or int, 1 where there is a token.
        unused_mask: (b, s), 1 where a row is kept that does not count in the last result.

    Returns:
        (total, ...) rows; (total,) their places in the flattened batch; (b + 1,) int32 cu_seqlens;
        the longest sequence; (b,) int32 the tokens of each, those of unused_mask left out.
    """
    _check_shape("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _check_shape("unused_mask", unused_mask, hidden_states)
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    used = attention_mask.sum(-1, dtype=torch.int32)
    rows, indices, ends, longest = _pack(hidden_states, kept, kept.sum(-1, dtype=torch.int32))
    return rows, indices, ends, longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Any, attention_mask_in_length: Any
) -> tuple[Any, Any, Any, int]:
    """unpad_input where a row of the batch holds several sequences, one after the other.

    Args:
        hidden_states: (b, s, ...).
        attention_mask_in_length: (b, s) int: each row starts with its sequences' lengths, then 0.

    Returns:
        As unpad_input, without the last.
    """
    lengths = attention_mask_in_length
    _check_shape("attention_mask_in_length", lengths, hidden_states)
    places = torch.arange(lengths.shape[-1], device=lengths.device)
    kept = places < lengths.sum(-1, keepdim=True)
    return _pack(hidden_states, kept, lengths[lengths != 0])


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """What unpad_input made of a batch, back in a padded one: (batch, seqlen, ...), 0 elsewhere."""
    if indices.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"`indices` must be ({len(hidden_states)},) like `hidden_states`, got "
            f"{tuple(indices.shape)}"
        )
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))


def _check_shape(name: str, mask: Any, hidden_states: Any) -> None:
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`{name}` must be {tuple(hidden_states.shape[:2])} like `hidden_states`, got "
            f"{tuple(mask.shape)}"
        )


def _pack(hidden_states: Any, kept: Any, lengths: Any) -> tuple[Any, Any, Any, int]:
    indices = kept.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, ends, longest
