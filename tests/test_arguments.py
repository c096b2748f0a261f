"""Arguments go by their names: in any order, all at once, and never more than there are."""

import inspect

import fastattn
import numpy as np
import pytest
import reference
from conftest import needs, python
from fastattn import _C

F32 = np.float32
B, H, S, D = 2, 2, 5, 8


def numbers(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(F32)


def every_array(packed):
    """An array for each argument that takes one."""
    x = numbers(B * S, H, D) if packed else numbers(B, H, S, D)
    lengths = {"q_lengths": [5, 4], "k_lengths": [4, 5], "k_start": [0, 1]}
    if packed:
        lengths = {"seqused_q": [5, 4], "seqused_k": [4, 5]}
    arrays = {"q": x, "k": x + 1, "v": x - 1, "q_offset": [1, 2], **lengths}
    if packed:
        arrays |= {"cu_seqlens_q": [0, S, 2 * S], "cu_seqlens_k": [0, S, 2 * S]}
    arrays = {name: np.asarray(x, F32 if name in "qkv" else np.int32) for name, x in arrays.items()}
    arrays |= {"mask": numbers(B, H, S, S), "alibi_slopes": numbers(B, H), "sink": numbers(H)}
    return arrays | {"seed": np.asarray(7, np.int64), "out": np.empty_like(x)}


@pytest.mark.parametrize("framework", ["numpy", pytest.param("torch", marks=needs("torch"))])
@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_every_array_at_once(name, framework):
    """Each is borrowed; the last ones too reach the backend, and a call in another order agrees."""
    function = getattr(fastattn, name)
    arrays = every_array(packed=name == "attention_varlen")
    if framework == "torch":
        import torch

        arrays = {key: torch.from_numpy(x) for key, x in arrays.items()}
    options = {"dropout_p": 0.5, "causal": True, "return_lse": True}
    if name == "attention_varlen":
        options |= {"max_seqlen_q": S, "max_seqlen_k": S}
    taken = set(inspect.signature(function).parameters)
    none = {"window", "softcap", "scale", "layout", "deterministic", "batch_invariant", "backend"}
    assert taken - none - {"page_table"} == set(arrays) | set(options)

    out, lse = function(**arrays, **options)
    assert out is arrays["out"]
    first = np.asarray(out).copy(), np.asarray(lse).copy()
    again, lse = function(**dict(reversed(list({**arrays, **options}.items()))))
    assert np.array_equal(first[0], again) and np.array_equal(first[1], lse)
    for key in ("mask", "alibi_slopes", "sink", "q_offset", "seed"):
        other = {k: x for k, x in arrays.items() if k != key}
        if key == "seed":
            other["seed"] = 8
        changed = np.asarray(function(**other, **options)[0])
        assert not np.array_equal(changed, first[0]), f"{key} changes nothing"


def test_positional_keyword_and_default_agree():
    q, k, v = numbers(3, B, H, S, D)
    want = fastattn.attention(q, k, v)
    assert not reference.check(want, None, q, k, v)
    for got in (
        fastattn.attention(q, k, v=v),
        fastattn.attention(v=v, k=k, q=q),
        fastattn.attention(q, v=v, **{"".join(["k"]): k}),
        fastattn.attention(q, k, v, **{"".join(["cau", "sal"]): False}),
    ):
        assert np.array_equal(want, got)


COMPLAINTS = {
    "attention() missing required argument 'k'": ([1], {"v": 1}),
    "attention() missing required argument 'v'": ([1, 2], {}),
    "attention() missing required argument 'q'": ([], {"causal": True}),
    "attention() got multiple values for argument 'q'": ([1], {"q": 1}),
    "attention() got an unexpected keyword argument 'casual'": ([1, 2, 3], {"casual": True}),
    "attention() got an unexpected keyword argument 'attn_mask'": ([1, 2, 3], {"attn_mask": 1}),
    "attention() takes 3 positional arguments but 4 were given": ([1, 2, 3, True], {}),
}


@pytest.mark.parametrize("sentence", COMPLAINTS)
def test_complaints_are_pythons_and_explain_has_the_same(sentence):
    args, keywords = COMPLAINTS[sentence]
    for call in (fastattn.attention, lambda *a, **k: fastattn.explain(fastattn.attention, *a, **k)):
        with pytest.raises(TypeError) as caught:
            call(*args, **keywords)
        assert str(caught.value) == sentence


OTHER = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
path, *names = sys.argv[1:]
loader = ExtensionFileLoader("fastattn._C", path)
_C = module_from_spec(spec_from_file_location("fastattn._C", path, loader=loader))
loader.exec_module(_C)
names = tuple(map(sys.intern, names))
for wrong in (names[:-1], names[1:], (*names, "more"), (names[1], names[0], *names[2:]), ()):
    try:
        _C.function(b"scaled_dot_product_attention\\0", wrong, (), len(wrong))
    except TypeError as error:
        assert "_C has no function scaled_dot_product_attention(" in str(error), error
    else:
        raise AssertionError(wrong)
    try:
        _C.explain("scaled_dot_product_attention")
    except TypeError as error:
        assert "_C has no function" in str(error), error
    else:
        raise AssertionError("explained before it was made")
made = _C.function(b"scaled_dot_product_attention\\0", names, (None,), len(names))
try:
    made(*names[:-2])
except TypeError as error:
    assert "missing required argument 'scale'" in str(error), error
else:
    raise AssertionError("called without an argument")
"""


def test_a_signature_other_than_cs_is_refused():
    """Python and C of two versions: the import fails, and no call reads what was not given."""
    names = inspect.signature(fastattn.scaled_dot_product_attention).parameters
    python("-c", OTHER, _C.__file__, *names)
