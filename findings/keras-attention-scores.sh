#!/usr/bin/env bash
# keras 3.15.1 on jax 0.10.2; seen 2026-11 (the same on its torch 2.13.0 and numpy backends)
#
# Input: MultiHeadAttention with an attention_mask in which one query may see no key, called once as it is and
# once with return_attention_scores=True.
# A good guess: asking for the scores adds an output and changes none.
# Seen: the row is the mean of all values without the scores, 0 (and weights of 0) with them; all other rows
# are the same. The layer leaves the fused path when scores are asked for, and the two differ here.
# Why it matters: a model looked into is not the model that was run.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 jax==0.10.2 keras==3.15.1
"$venv/bin/python" - <<'EOF'
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np

x = np.random.default_rng(0).standard_normal((1, 4, 8), np.float32)
layer = keras.layers.MultiHeadAttention(1, 8, use_bias=False)
layer(x, x)
layer.set_weights([np.eye(8, dtype=np.float32).reshape(w.shape) for w in layer.get_weights()])
mask = np.ones((1, 4, 4), bool)
mask[0, 2] = False
plain = np.asarray(layer(x, x, attention_mask=mask))[0]
scored, scores = (np.asarray(a)[0] for a in layer(x, x, attention_mask=mask, return_attention_scores=True))
print("without scores", plain[2, :3], "with", scored[2, :3], "mean", x[0].mean(0)[:3])
print("largest difference by row", np.abs(plain - scored).max(-1))
assert np.abs(plain[2] - x[0].mean(0)).max() < 1e-6
assert not scored[2].any() and not scores[0, 2].any()
assert np.abs(plain - scored)[[0, 1, 3]].max() < 1e-6
EOF
