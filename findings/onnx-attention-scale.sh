#!/usr/bin/env bash
# onnx 1.23.2, onnxruntime 1.32.0, openvino 2026.4.1; seen 2026-11
#
# Input: one ONNX model with one Attention node (opset 23) whose attribute `scale` is 0.0, or -0.3.
# The operator's text calls it a factor on Q K^T and sets no bounds.
# A good guess: 0.0 weighs all keys alike, -0.3 prefers the least similar; in all three alike.
# Seen:           0.0                              -0.3
#   onnx's reference  right                        NaN everywhere (it takes the root of the scale)
#   onnxruntime       refused, no session          refused, no session
#   OpenVINO          1 / sqrt(d), as if not given right
# Why it matters: an exporter cannot pass on a learned or ablated scale; the reference proves nothing here.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
export VIRTUAL_ENV=$venv
"$venv/bin/python" - <<'EOF'
import os, tempfile, warnings
import numpy as np, onnxruntime, openvino
from onnx import TensorProto, helper, save
from onnx.reference import ReferenceEvaluator

warnings.simplefilter("ignore")  # the reference's root of a negative number
onnxruntime.set_default_logger_severity(4)
rng = np.random.default_rng(0)
x = {n: rng.standard_normal((1, 2, 5, 8), np.float32) for n in "qkv"}
path = os.path.join(tempfile.mkdtemp(dir=os.environ["VIRTUAL_ENV"]), "m.onnx")

def attention(scale):
    s = x["q"].astype(float) @ x["k"].mT * scale
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ x["v"]

def runs(scale):
    node = helper.make_node("Attention", list("qkv"), ["y"], scale=scale)
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 2, 5, 8)) for n in names]
            for names in ("qkv", "y")]
    model = helper.make_model(helper.make_graph([node], "g", *ends),
                              opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    save(model, path)
    yield "reference", lambda: ReferenceEvaluator(model).run(None, x)[0]
    yield "onnxruntime", lambda: onnxruntime.InferenceSession(path).run(None, x)[0]
    yield "openvino", lambda: openvino.Core().compile_model(path, "CPU")(list(x.values()))[0]

def verdict(scale, run):
    try:
        y = run()
    except Exception as e:
        return "refused" if "scale must be greater than 0" in str(e) else repr(e)
    for name, want in ("right", attention(scale)), ("default", attention(8**-0.5)):
        if np.abs(y - want).max() < 1e-2:
            return name
    return "nan" if np.isnan(y).all() else "else"

seen = {s: {name: verdict(s, run) for name, run in runs(s)} for s in (0.0, -0.3)}
print(seen)
assert seen == {
    0.0: {"reference": "right", "onnxruntime": "refused", "openvino": "default"},
    -0.3: {"reference": "nan", "onnxruntime": "refused", "openvino": "right"},
}
EOF
