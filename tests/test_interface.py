"""The public interface: names, signatures, docstrings, stub, info() and explain()."""

import inspect
import re

import fastattn
import numpy as np
import pytest
from conftest import LEVELS, ROOT, needs, python
from fastattn import _C
from gpu_host import EVERY_VARIANT

FUNCTIONS = [
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
OTHERS = ("explain", "get_num_threads", "info", "set_num_threads")  # compute no attention
BUILT = [name for name in FUNCTIONS if name not in OTHERS]
DEFAULTS = (
    "q, k, v, *, causal=False, window=None, q_offset=None, q_lengths=None, k_lengths=None, "
    "k_start=None, mask=None, softcap=0.0, alibi_slopes=None, sink=None, scale=None, "
    "dropout_p=0.0, seed=None, layout='bhsd', return_lse=False, out=None, deterministic=False, "
    "batch_invariant=False, backend=None"
)
VARLEN = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_q=None, "
    "seqused_k=None, q_offset=None, page_table=None, causal=False, window=None, mask=None, "
    "softcap=0.0, alibi_slopes=None, sink=None, scale=None, dropout_p=0.0, seed=None, "
    "return_lse=False, out=None, deterministic=False, batch_invariant=False, backend=None"
)
KVCACHE = (
    "q, k_cache, v_cache, cache_seqlens, *, k=None, v=None, page_table=None, cache_batch_idx=None, "
    "cache_leftpad=None, cu_seqlens_q=None, max_seqlen_q=None, rotary_cos=None, rotary_sin=None, "
    "rotary_interleaved=False, k_scale=None, v_scale=None, causal=True, num_splits=0, "
    "layout='bshd', return_lse=False, return_mass=False, window=None, softcap=0.0, "
    "alibi_slopes=None, sink=None, scale=None, batch_invariant=False, out=None, backend=None"
)
SPARSEK_LISTS = (
    "scores, k, *, sq, window=0, q_offset=None, q_lengths=None, k_lengths=None, k_start=None"
)
SPARSE = (
    "q, k, v, key_lists, *, counts=None, q_block=1, k_block=64, gate=None, key_gate=False, "
    "window_union=None, validate=False, causal=False, window=None, q_offset=None, q_lengths=None, "
    "k_lengths=None, k_start=None, softcap=0.0, sink=None, scale=None, layout='bhsd', "
    "return_lse=False, return_mass=False, out=None, deterministic=False, backend=None"
)
SPARSEK_ATTENTION = (
    "q, k, v, scores, k_keep, *, window, key_gate=False, keep_all=False, q_offset=None, "
    "q_lengths=None, k_lengths=None, k_start=None, softcap=0.0, sink=None, scale=None, "
    "layout='bhsd', return_lse=False, return_selection=False, out=None, deterministic=False, "
    "backend=None"
)
SDPA = (
    "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, "
    "enable_gqa=False"
)


def names_and_defaults(function):
    """The signature without annotations."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))[1:-1]


def arrays(*shape, dtype=np.float32):
    return [np.ones(shape, dtype) for _ in range(3)]


def test_public_names():
    assert sorted(name for name in fastattn.__all__ if name[0].islower()) == FUNCTIONS
    for name in fastattn.__all__:
        assert getattr(fastattn, name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastattn.__version__)


def test_signatures():
    assert names_and_defaults(fastattn.attention) == DEFAULTS
    assert names_and_defaults(fastattn.attention_varlen) == VARLEN
    assert names_and_defaults(fastattn.scaled_dot_product_attention) == SDPA
    assert names_and_defaults(fastattn.merge_states) == "outs, lses, *, layout='bhsd'"
    assert names_and_defaults(fastattn.attention_kvcache) == KVCACHE
    assert names_and_defaults(fastattn.sparsek) == "scores, k, *, lengths=None"
    assert names_and_defaults(fastattn.sparsek_lists) == SPARSEK_LISTS
    assert names_and_defaults(fastattn.attention_sparse) == SPARSE
    sparse = set(inspect.signature(fastattn.attention_sparse).parameters)
    packed = set(inspect.signature(fastattn.attention_sparse_varlen).parameters)
    assert sparse - packed == {"layout", "q_lengths", "k_lengths", "k_start"}
    assert names_and_defaults(fastattn.sparsek_attention) == SPARSEK_ATTENTION
    kept = set(inspect.signature(fastattn.sparsek_attention).parameters)
    of_packed = set(inspect.signature(fastattn.sparsek_attention_varlen).parameters)
    assert kept - of_packed == {"layout", "q_lengths", "k_lengths", "k_start"}
    gradients = set(inspect.signature(fastattn.sparsek_attention_backward).parameters)
    assert kept | of_packed <= gradients | {"return_lse", "return_selection"}
    results = {"return_lse", "return_mass", "validate"}
    both = set(inspect.signature(fastattn.attention_sparse_backward).parameters)
    assert sparse | packed <= both | results
    attention = inspect.signature(fastattn.attention).parameters
    keywords = {name for name, p in attention.items() if p.kind is p.KEYWORD_ONLY}
    backward = set(inspect.signature(fastattn.attention_backward).parameters)
    assert keywords - {"out", "return_lse", "backend"} <= backward
    varlen = inspect.signature(fastattn.attention_varlen).parameters
    elsewhere = {"layout", "q_lengths", "k_lengths", "k_start"}  # seqused is what lengths are
    assert keywords - elsewhere <= set(varlen)
    backward = set(inspect.signature(fastattn.attention_varlen_backward).parameters)
    assert set(varlen) - {"page_table", "out", "return_lse", "backend"} <= backward


@needs("torch")
def test_the_drop_in_has_torchs_signature():
    import torch

    theirs = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
    ours = inspect.signature(fastattn.scaled_dot_product_attention).parameters.values()
    assert [a.name for a in theirs] == [p.name for p in ours]
    assert [a.kwarg_only for a in theirs] == [p.kind is p.KEYWORD_ONLY for p in ours]
    defaults = [
        a.default_value if a.has_default_value() else inspect.Parameter.empty for a in theirs
    ]
    assert defaults == [p.default for p in ours]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_describe_every_argument(name):
    function = getattr(fastattn, name)
    text = inspect.getdoc(function)
    assert text and len(text.splitlines()[0]) <= 100
    if name in BUILT:
        for argument in inspect.signature(function).parameters:
            assert re.search(rf"\b{argument}:", text), f"{name}: {argument} is not described"
        for section in ("Args:", "Returns:", "Raises:", "Source:"):
            assert section in text
        for exception in ("ValueError", "TypeError", "NotImplementedError"):
            assert exception in text


@needs("mypy")
def test_stub_agrees_with_the_module():
    said = python("-m", "mypy.stubtest", "fastattn._C", "--ignore-disjoint-bases", timeout=600)
    assert "Success" in said


def test_info():
    found = fastattn.info()
    names = {"version", "backends", "cpu", "glibc_needed", "cuda", "no_kernels", "support"}
    assert set(found) == names and set(found["backends"]) <= set(found["support"])
    assert found["version"] == fastattn.__version__
    assert found["backends"][-1] == "cpu"
    assert found["cpu"]["level"] in LEVELS
    assert found["cpu"]["threads"] >= 1
    if cuda := found["cuda"]:
        assert {"toolkit", "driver", "driver_needed", "devices", "kernels", "error"} <= set(cuda)
        assert {*cuda["kernels"]} == {variant.name for variant in EVERY_VARIANT}
        assert found["no_kernels"] is None
    else:
        assert found["backends"] == ["cpu"]
        assert "it was built" in found["no_kernels"]
        with pytest.raises(NotImplementedError, match=f"sm90 .*: {found['no_kernels']}"):
            fastattn.attention(*arrays(1, 2, 5, 64), backend="sm90")


def test_promise_5_explain():
    q, k, v = arrays(1, 2, 5, 64)
    said = fastattn.explain(fastattn.attention, q, k, v, causal=True)
    assert said.backend == "cpu"
    assert said.kernel.startswith("cpu_") and fastattn.info()["cpu"]["level"] in said.kernel
    assert "cpu" not in said.reasons
    for name in fastattn.info()["backends"][:-1]:
        assert said.reasons[name]
    assert str(said).splitlines()[0] == f"cpu: {said.kernel}"
    assert fastattn.explain(fastattn.scaled_dot_product_attention, q, k, v).backend == "cpu"
    cu = np.array([0, 2], np.int32)
    flat = fastattn.explain(fastattn.attention_varlen, q[0], k[0], v[0], cu, cu, 2, 2)
    assert (flat.backend, flat.kernel) == ("cpu", said.kernel)


def test_explain_computes_and_writes_nothing():
    q, k, v = arrays(1, 2, 5, 64)
    out = np.full_like(q, 7)
    fastattn.explain(fastattn.attention, q, k, v, out=out)
    assert (out == 7).all()


def test_explain_raises_what_the_call_raises():
    q, k, v = arrays(1, 2, 5, 64)
    with pytest.raises(ValueError, match="`softcap`"):
        fastattn.explain(fastattn.attention, q, k, v, softcap=-1.0)
    cu = np.array([1, 2], np.int32)
    with pytest.raises(ValueError, match="`cu_seqlens_q` must start at 0"):
        fastattn.explain(fastattn.attention_varlen, q[0], k[0], v[0], cu, cu, 2, 2)
    with pytest.raises(TypeError, match="`function` must be"):
        fastattn.explain(len, q)
    with pytest.raises(TypeError):
        fastattn.explain(fastattn.attention, q, k)


def test_explain_says_why_all_refuse():
    from handmade import ones

    on_gpu = [ones(1, 2, 5, 64, dtype=np.float16, device=(2, 99)) for _ in range(3)]
    said = fastattn.explain(fastattn.attention, *on_gpu)
    assert said.backend is None and said.kernel is None
    assert set(said.reasons) == set(fastattn.info()["backends"])
    assert "no backend" in str(said)


def test_options_that_change_nothing_here_are_taken():
    q, k, v = arrays(1, 2, 5, 8)
    plain = fastattn.attention(q, k, v)
    for keywords in ({"deterministic": True}, {"batch_invariant": True}, {"backend": "cpu"}):
        assert np.array_equal(fastattn.attention(q, k, v, **keywords), plain)
    assert np.array_equal(fastattn.attention(q, k, v, dropout_p=0.0, seed=3), plain)
    big = 10**30  # any bound that is past the ends is no bound
    assert np.array_equal(fastattn.attention(q, k, v, window=(big, big)), plain)
    assert np.array_equal(fastattn.attention(q, k, v, window=[np.int64(9), None]), plain)


def test_the_module_has_what_the_stub_has():
    stub = (ROOT / "python" / "fastattn" / "_C.pyi").read_text()
    declared = set(re.findall(r"^(?:def|class) (\w+)", stub, re.M))
    assert declared == {name for name in dir(_C) if not name.startswith("__")}
