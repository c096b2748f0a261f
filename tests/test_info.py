"""explain() without its function, and info()'s oldest glibc."""

import re
from pathlib import Path

import fastattn
import handmade
import numpy as np
import pytest
from conftest import needs, python

RULE = (
    "`function` must be attention, attention_varlen, attention_kvcache, attention_sparse, "
    "attention_sparse_varlen, sparsek_attention, sparsek_attention_varlen, "
    "scaled_dot_product_attention or one's backward, got "
)


@pytest.mark.parametrize("q", [np.ones((1, 2, 5, 8)), handmade.ones(1, 2, 5, 8), None, "q"])
def test_explain_without_its_function(q):
    wanted = f"{RULE}{type(q).__name__}: explain(fastattn.attention, q, k, v)"
    with pytest.raises(TypeError, match=re.escape(wanted)):
        fastattn.explain(q, q, q, causal=True)


@needs("torch")
def test_explain_without_its_function_for_torch():
    import torch

    x = torch.ones(1, 2, 5, 8)
    with pytest.raises(TypeError, match=re.escape(f"{RULE}Tensor: explain(fastattn.attention, q")):
        fastattn.explain(x, x, x)


def test_explain_of_another_function():
    with pytest.raises(TypeError, match=f"{RULE}merge_states$"):
        fastattn.explain(fastattn.merge_states, [], [])


def test_glibc_needed_is_the_newest_that_the_module_names():
    """The names of versions that this module needs stand in it as they are."""
    text = Path(fastattn._C.__file__).read_bytes()
    found = {tuple(map(int, pair)) for pair in re.findall(rb"GLIBC_(\d+)\.(\d+)", text)}
    assert fastattn.info()["glibc_needed"] == "{}.{}".format(*max(found))


def test_info_opens_no_file_of_ours():
    program = """
import sys, fastattn
opened = []
sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
fastattn.info()
print([name for name in opened if "_C." in name])
"""
    assert python("-c", program).strip() == "[]"
