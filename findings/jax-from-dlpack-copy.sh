#!/usr/bin/env bash
# jax 0.10.2 with numpy 2.4.6; seen 2026-11
#
# Input: jax.numpy.from_dlpack(x, copy=False), where the array API says: share the memory or raise.
# A good guess: it shares or raises, whatever the dtype.
# Seen: a float32 array that starts on 64 bytes is shared; one that starts 4 bytes later raises ValueError, as
# promised; a float64 array (x64 off, the default) comes back as a float32 copy, without error or warning.
# Why it matters: the caller who asked for no copy works on other numbers, with half the digits.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 jax==0.10.2
"$venv/bin/python" - <<'EOF'
import warnings
import jax.numpy as jnp, numpy as np

warnings.simplefilter("error")

def aligned(dtype, offset=0):
    raw = np.zeros(4096, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + 64 * np.dtype(dtype).itemsize].view(dtype)

def call(x):
    try:
        y = jnp.from_dlpack(x, copy=False)
    except ValueError as e:
        return "refused: " + str(e).split(".")[0]
    return str(y.dtype), y.unsafe_buffer_pointer() == x.ctypes.data

seen = [call(aligned(np.float32)), call(aligned(np.float32, 4)), call(aligned(np.float64))]
print(*seen, sep="\n")
assert seen[0] == ("float32", True)
assert seen[1].startswith("refused")
assert seen[2] == ("float32", False)
EOF
