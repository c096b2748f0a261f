"""Exact attention for NumPy, PyTorch, JAX and CuPy arrays, on the CPU and on Hopper GPUs.

Importing it imports no framework; arrays go in and come out as whatever the caller uses.
"""

from . import _C, _compile
from ._attention import (
    Explanation,
    attention,
    attention_backward,
    attention_kvcache,
    attention_varlen,
    attention_varlen_backward,
    explain,
    get_num_threads,
    info,
    merge_states,
    scaled_dot_product_attention,
    set_num_threads,
)
from ._sparse import attention_sparse, attention_sparse_backward, attention_sparse_varlen
from ._sparsek import sparsek, sparsek_lists
from ._sparsek_attention import (
    sparsek_attention,
    sparsek_attention_backward,
    sparsek_attention_varlen,
)

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "attention",
    "attention_backward",
    "attention_kvcache",
    "attention_sparse",
    "attention_sparse_backward",
    "attention_sparse_varlen",
    "attention_varlen",
    "attention_varlen_backward",
    "explain",
    "get_num_threads",
    "info",
    "merge_states",
    "scaled_dot_product_attention",
    "set_num_threads",
    "sparsek",
    "sparsek_attention",
    "sparsek_attention_backward",
    "sparsek_attention_varlen",
    "sparsek_lists",
]

_compile.watch(
    (
        *(attention, attention_kvcache, attention_varlen, scaled_dot_product_attention),
        *(attention_backward, attention_varlen_backward, merge_states),
        *(sparsek, sparsek_lists),
        *(attention_sparse, attention_sparse_backward, attention_sparse_varlen),
        *(sparsek_attention, sparsek_attention_backward, sparsek_attention_varlen),
        _C.gradients,  # of compiled autograd
    )
)
