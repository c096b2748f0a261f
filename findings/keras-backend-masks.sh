#!/usr/bin/env bash
# keras 3.15.1 on jax 0.10.2, torch 2.13.0, its own numpy backend and openvino 2026.4.1; seen 2026-11
#
# Input: keras.ops.dot_product_attention, the same arrays on each backend: a float32 mask of ones and zeros;
# a bool mask under which one row sees nothing; a bias together with a mask.
# A good guess: a front end over several backends gives one answer.
# Seen:            jax         numpy       torch       openvino
#   0/1 float mask a bool mask a bool mask a bool mask added to the scores
#   empty row      mean of v   mean of v   mean of v   NaN
#   bias and mask  both heard  both heard  ValueError  both heard
# Why it matters: a model moved to another backend changes silently; only the last row says so.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install \
    numpy==2.4.6 jax==0.10.2 torch==2.13.0 openvino==2026.4.1 keras==3.15.1
"$venv/bin/python" - <<'EOF'
import os, subprocess, sys

CODE = '''
import keras, numpy as np
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, n, 2, 16), np.float32) for n in (3, 5, 5))
bias = rng.standard_normal((1, 2, 3, 5), np.float32)
see = rng.random((1, 1, 3, 5)) < 0.6
see[..., 0] = True

def attention(see=True, bias=0):
    s = np.where(see, np.einsum("bihd,bjhd->bhij", q, k) / 4 + bias, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdims=True), v)

def verdict(options, **wants):
    try:
        out = keras.ops.convert_to_numpy(keras.ops.dot_product_attention(q, k, v, **options))
    except ValueError:
        return "refused"
    near = [n for n, w in wants.items() if np.abs(out[:, 0] - w[:, 0]).max() < 1e-5]
    return near[0] if near else "nan" if np.isnan(out[:, 0]).all() else "else"

empty = see.copy()
empty[0, 0, 0] = False
mean = np.broadcast_to(v.mean(1, keepdims=True), q.shape)
print(verdict({"mask": see.astype(np.float32)}, bool=attention(see), added=attention(bias=see)),
      verdict({"mask": empty}, mean=mean),
      verdict({"mask": see, "bias": bias}, both=attention(see, bias)))
'''
seen = {}
for backend in "jax", "numpy", "torch", "openvino":
    env = {**os.environ, "KERAS_BACKEND": backend}
    run = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
    seen[backend] = run.stdout.split() or run.stderr
    print(backend, seen[backend])
same = ["bool", "mean", "both"]
assert seen == {"jax": same, "numpy": same, "torch": ["bool", "mean", "refused"],
                "openvino": ["added", "nan", "both"]}
EOF
