"""ONNX's own tests of its operator Attention (opsets 23 to 25), computed by fastattn.attention.

Every Y of theirs is. What has no expression here are two other outputs: qk_matmul_output, scores or
weights of (b, h, sq, sk), which are never made; and present_key and present_value, which are the
concatenations that the caller hands over. softmax_precision is not heard: it is float32 at least.
"""

import importlib

import fastattn
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", minversion="1.23")
nodes = importlib.import_module("onnx.backend.test.case.node")
importlib.import_module("onnx.backend.test.case.node.attention")  # makes the cases

CASES = {  # without the operator's expansion into others
    case.name.removeprefix("test_attention_"): case
    for case in nodes._NodeTestCases
    if any(node.op_type == "Attention" for node in case.model.graph.node)
}


def attention(q, k, v, mask=None, past_key=None, past_value=None, nonpad=None, **attributes):
    """The operator's Y, in one call."""
    options = {"softcap": attributes.get("softcap", 0.0), "scale": attributes.get("scale")}
    heads, kv_heads = (attributes.get(f"{of}_num_heads") for of in ("q", "kv"))
    if flat := q.ndim == 3:
        q, k, v = (
            x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)
            for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
        )
    past = 0
    if past_key is not None:
        past = past_key.shape[2]
        k, v = np.concatenate([past_key, k], 2), np.concatenate([past_value, v], 2)
    if nonpad is not None:
        options["k_lengths"] = nonpad.astype(np.int32)
        past = options["k_lengths"] - q.shape[2]
    if mask is not None:
        if short := k.shape[2] - mask.shape[-1]:  # keys beyond the mask are hidden
            k, v = k[:, :, :-short], v[:, :, :-short]
            if nonpad is not None:
                options["k_lengths"] = np.minimum(options["k_lengths"], mask.shape[-1])
        options["mask"] = mask
    sides = (attributes.get(f"{side}_window_size", -1) for side in ("left", "right"))
    options["window"] = tuple(None if side < 0 else side for side in sides)
    options["causal"] = bool(attributes.get("is_causal"))
    out = fastattn.attention(q, k, v, q_offset=past, **options)
    return out.swapaxes(1, 2).reshape(*out.shape[:1], out.shape[2], -1) if flat else out


@pytest.mark.parametrize("name", CASES)
def test_node(name):
    case = CASES[name]
    (node,) = case.model.graph.node
    ((given, expected),) = case.data_sets
    names = ("q", "k", "v", "mask", "past_key", "past_value", "nonpad")
    given = iter(given)
    inputs = {n: next(given) for n, named in zip(names, node.input, strict=False) if named}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    got, want = (x.astype(np.float64) for x in (attention(**inputs, **attributes), expected[0]))
    # Theirs rounds the scores to the inputs' dtype; 1e-3 is their tolerance.
    tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}[str(expected[0].dtype)]
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_all_kinds_are_met():
    """Theirs are found, of each opset, and with every argument that is translated."""
    models = [case.model for case in CASES.values()]
    assert len(models) >= 90
    assert {model.opset_import[0].version for model in models} >= {23, 24, 25}
    nodes = [model.graph.node[0] for model in models]
    attributes = {attribute.name for node in nodes for attribute in node.attribute}
    assert attributes == {
        *("is_causal", "kv_num_heads", "q_num_heads", "scale", "softcap"),
        *("left_window_size", "right_window_size", "qk_matmul_output_mode", "softmax_precision"),
    }
