"""What a user writes, for type checkers in strict mode; test_typing.py runs it too."""

import fastattn
import numpy as np
from numpy.typing import NDArray
from typing_extensions import Any, assert_type

Floats = NDArray[np.float32]


class Tensor:
    """Stands for the array of any library."""


def of_any_library(q: Tensor, k: Tensor, v: Tensor, wanted: bool) -> Tensor:
    assert_type(fastattn.attention(q, k, v), Tensor)
    assert_type(fastattn.attention(q, k, v, return_lse=True), tuple[Tensor, Any])
    assert_type(fastattn.attention(q, k, v, return_lse=wanted), Tensor | tuple[Tensor, Any])
    out, lse = fastattn.attention_varlen(q, k, v, q, k, 3, 3, causal="top-left", return_lse=True)
    assert_type(out, Tensor)
    assert_type(fastattn.attention_varlen(q, k, v, q, k, 3, 3), Tensor)
    flat = fastattn.attention_varlen(q, k, v, q, k, 3, 3, seqused_k=k, return_lse=wanted)
    assert_type(flat, Tensor | tuple[Tensor, Any])
    assert_type(fastattn.merge_states([out, out], [lse, lse]), tuple[Tensor, Any])
    assert_type(fastattn.sparsek(q, 2.5, lengths=k), tuple[Any, Any])
    assert_type(fastattn.sparsek_lists(q, 2, sq=3, window=1), tuple[Any, Any, Any])
    return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)


def every_option(q: Floats, k: Floats, v: Floats) -> Floats:
    return fastattn.attention(
        q, k, v, causal=True, window=(3, None), q_offset=1, q_lengths=None, k_lengths=None,
        k_start=None, mask=None, softcap=30, alibi_slopes=None, sink=None, scale=0.5, dropout_p=0.0,
        seed=None, layout="bhsd", return_lse=False, out=None, deterministic=True,
        batch_invariant=True, backend="cpu",
    )  # fmt: skip


def wrong(q: Floats) -> None:
    """Each line below has an error: an ignore that is not needed is one too."""
    fastattn.attention(q, q, q, layout="bdhs")  # type: ignore
    fastattn.attention(q, q, q, causal="bottom")  # type: ignore
    fastattn.attention(q, q, q, is_causal=True)  # type: ignore
    fastattn.attention(q, q)  # type: ignore
    fastattn.attention(q, q, q, backend="cuda")  # type: ignore
    fastattn.attention_varlen(q, q, q, q, q, 3, 3, layout="bhsd")  # type: ignore
    fastattn.set_num_threads("2")  # type: ignore


def main() -> None:
    q: Floats = np.ones((1, 2, 4, 8), np.float32)
    assert_type(fastattn.attention(q, q, q), Floats)
    out, lse = fastattn.attention(q, q, q, return_lse=True)
    assert_type(out, Floats)
    total: float = lse.sum()
    fastattn.attention(q, q, q, out=out)
    every_option(q, q, q)
    said = fastattn.explain(fastattn.attention, q, q, q, causal=True)
    assert_type(said, fastattn.Explanation)
    assert_type(said.backend, str | None)
    assert_type(said.reasons, dict[str, str])
    assert_type(fastattn.info(), dict[str, Any])
    fastattn.set_num_threads(None)
    assert_type(fastattn.get_num_threads(), int)
    print(total)


if __name__ == "__main__":
    main()
