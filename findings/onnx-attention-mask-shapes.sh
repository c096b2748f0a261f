#!/usr/bin/env bash
# onnx 1.23.2 (ReferenceEvaluator), onnxruntime 1.32.0, openvino 2026.4.1; seen 2026-11
#
# Input: ONNX Attention (opset 23) with an additive mask that the operator's text allows: one that broadcasts
# over the queries, (1, 2, 1, sk), and one shorter than the keys, (sq, sk - 2), which counts as -inf beyond.
# A good guess: a runtime that has the operator takes both.
# Seen: onnx's reference computes both. onnxruntime refuses both when the session runs, not when it loads;
# OpenVINO takes the first, and reads no model with the second (in opset 24 it does).
# Why it matters: a padding mask (b, 1, 1, sk), the shape every model has at hand, is what does not run.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
export VIRTUAL_ENV=$venv
"$venv/bin/python" - <<'EOF'
import os, tempfile
import numpy as np, onnxruntime, openvino
from onnx import TensorProto, helper, save
from onnx.reference import ReferenceEvaluator

onnxruntime.set_default_logger_severity(4)
rng = np.random.default_rng(0)
x = {n: rng.standard_normal((1, 2, 5, 8), np.float32) for n in "qkv"}
path = os.path.join(tempfile.mkdtemp(dir=os.environ["VIRTUAL_ENV"]), "m.onnx")

def attention(mask):
    mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, 5 - mask.shape[-1])], constant_values=-np.inf)
    p = np.exp(x["q"] @ x["k"].mT / np.sqrt(8) + mask)
    return p / p.sum(-1, keepdims=True) @ x["v"]

def runs(mask):
    node = helper.make_node("Attention", ["q", "k", "v", "m"], ["y"])
    arrays = {**x, "m": mask}
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in arrays.items()]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 2, 5, 8))
    model = helper.make_model(helper.make_graph([node], "g", ends, [out]),
                              opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    save(model, path)
    session = onnxruntime.InferenceSession(path)  # loads with either
    yield lambda: ReferenceEvaluator(model).run(None, arrays)[0]
    yield lambda: session.run(None, arrays)[0]
    yield lambda: openvino.Core().compile_model(path, "CPU")(list(arrays.values()))[0]

def verdict(mask, run):
    try:
        return "right" if np.abs(run() - attention(mask)).max() < 1e-2 else "wrong"
    except Exception as e:
        print("   ", str(e)[-200:].replace("\n", " "))
        return "refused"

seen = {shape: [verdict(mask, run) for mask in [rng.standard_normal(shape, np.float32)] for run in runs(mask)]
        for shape in [(1, 2, 1, 5), (5, 3)]}
print("(reference, onnxruntime, openvino)", seen)
assert seen == {(1, 2, 1, 5): ["right", "refused", "right"], (5, 3): ["right", "refused", "refused"]}
EOF
