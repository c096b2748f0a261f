#!/usr/bin/env bash
# jax 0.10.2; seen 2026-11
#
# Input: a float64 array made inside jax.enable_x64(True), used after the block with x64 off (the default).
# A good guess: operations keep its dtype, or all of them truncate it.
# Seen: x + x, exp(x) and x @ x are float64; x * 1, softmax(x) and dot_product_attention are float32;
# zeros_like of an array put on a device, or from DLPack, raises ValueError (float32 is not float64).
# Why it matters: a reference in float64 loses its digits halfway through, in the softmax.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 jax==0.10.2
"$venv/bin/python" - <<'EOF'
import warnings
import jax, jax.numpy as jnp, numpy as np

warnings.simplefilter("ignore")  # some of the truncating operations warn
with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2)))
    q = x[None, :, None, :]
    placed = jax.device_put(x, jax.devices()[0])
assert x.dtype == q.dtype == "float64"
seen = {
    "x + x": x + x, "exp": jnp.exp(x), "x @ x": x @ x, "x * 1": x * 1,
    "softmax": jax.nn.softmax(x), "attention": jax.nn.dot_product_attention(q, q, q),
}
seen = {name: str(y.dtype) for name, y in seen.items()}
try:
    seen["zeros_like"] = str(jnp.zeros_like(placed).dtype)
except ValueError as e:
    seen["zeros_like"] = "refused"
    print(e)
print(seen)
assert list(seen.values()) == ["float64"] * 3 + ["float32"] * 3 + ["refused"]
EOF
