#!/usr/bin/env bash
# paddlepaddle 3.3.1 with numpy 2.4.6 and jax 0.10.2; seen 2026-11
#
# Input: a CPU tensor handed to from_dlpack. The protocol has __dlpack_device__() return two integers.
# A good guess: (1, 0), and every consumer takes it.
# Seen: (kDLCPU, None). numpy takes the tensor, for it reads the first of the two; jax raises TypeError.
# Why it matters: a consumer that reads the device id must take None for 0 where the device is the CPU.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 jax==0.10.2 paddlepaddle==3.3.1
"$venv/bin/python" - <<'EOF'
import jax.numpy as jnp, numpy as np, paddle

x = paddle.arange(6, dtype="float32")
kind, index = x.__dlpack_device__()
print("device", (kind, index), "numpy", np.from_dlpack(x))
assert kind == 1 and index is None
assert np.array_equal(np.from_dlpack(x), np.arange(6, dtype=np.float32))
try:
    jnp.from_dlpack(x)
except TypeError as e:
    print("jax:", str(e).split("\n")[0])
else:
    raise SystemExit("jax takes it now")
EOF
