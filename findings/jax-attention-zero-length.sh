#!/usr/bin/env bash
# jax 0.10.2, flax 0.12.8; seen 2026-11
#
# Input: jax.nn.dot_product_attention with key_value_seq_lengths = 0 for one sequence of the batch, and with
# query_seq_lengths; flax's linen and nnx functions with a mask under which a row sees nothing.
# A good guess: a row without keys is 0 (as rows past query_seq_lengths are) or NaN.
# Seen: it is the mean of all of v, the padding too, in all three. Rows past query_seq_lengths are 0.
# Why it matters: what lies in the padding, which the length says nobody reads, becomes output.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 jax==0.10.2 flax==0.12.8
"$venv/bin/python" - <<'EOF'
import flax.linen, flax.nnx, jax, numpy as np

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, n, 2, 16), np.float32) for n in (4, 6, 6))
lengths = np.array([6, 0], np.int32)
out = np.asarray(jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths))
past = np.asarray(jax.nn.dot_product_attention(q, k, v, query_seq_lengths=np.array([4, 0], np.int32)))
mask = np.arange(6) < lengths[:, None, None, None]
linen = np.asarray(flax.linen.dot_product_attention(q, k, v, mask=mask))
nnx = np.asarray(flax.nnx.dot_product_attention(q, k, v, mask=mask))
mean = v[1].mean(0)
print("mean of v", mean[0, :3])
for name, y in ("jax", out), ("linen", linen), ("nnx", nnx):
    print(name, y[1, 0, 0, :3])
    assert np.abs(y[1] - mean).max() < 1e-6
print("past the queries", past[1, 0, 0, :3])
assert not past[1].any()
EOF
