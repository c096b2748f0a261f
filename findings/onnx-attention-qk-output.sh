#!/usr/bin/env bash
# onnx 1.23.2 (ReferenceEvaluator), onnxruntime 1.32.0; seen 2026-11
#
# Input: ONNX Attention (opset 24) with a softcap, asked for its fourth output with
# qk_matmul_output_mode = 0: by the operator's text the product Q K^T, where mode 1 is that after the softcap.
# A good guess: modes 0 and 1 differ, in both runtimes.
# Seen: onnxruntime returns the bare product for mode 0. The reference returns the capped scores for both.
# Why it matters: scores checked against the reference look right with a cap applied twice, or not at all.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$venv/bin/python" - <<'EOF'
import numpy as np, onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

rng = np.random.default_rng(0)
x = {n: rng.standard_normal((1, 2, 5, 8), np.float32) for n in "qkv"}
scores = x["q"] @ x["k"].mT / np.sqrt(8)
want = {"bare": scores, "capped": 0.5 * np.tanh(scores / 0.5)}

def name(y):
    return next((n for n, w in want.items() if np.abs(y - w).max() < 1e-5), "else")

seen = {}
for mode in 0, 1:
    node = helper.make_node("Attention", list("qkv"), ["y", "", "", "s"], softcap=0.5,
                            qk_matmul_output_mode=mode)
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in names]
            for names, shape in (("qkv", (1, 2, 5, 8)), ("ys", None))]
    model = helper.make_model(helper.make_graph([node], "g", *ends),
                              opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    seen[mode] = name(ReferenceEvaluator(model).run(None, x)[1]), name(session.run(None, x)[1])
print("mode: (reference, onnxruntime)", seen)
assert seen == {0: ("capped", "bare"), 1: ("capped", "capped")}
EOF
