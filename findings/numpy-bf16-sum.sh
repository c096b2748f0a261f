#!/usr/bin/env bash
# numpy 2.4.6, ml_dtypes 0.6.0; seen 2026-11
#
# Input: a thousand bfloat16 ones, and a thousand float16 ones, summed in several ways.
# A good guess: sum() and matmul accumulate alike, for both are NumPy's.
# Seen: float16 sums to 1000. bfloat16 sums to 256 (there 1 no longer counts), its mean is 0.256; matmul, dot
# and inner of the same array give 1000, and einsum raises TypeError.
# Why it matters: a reference softmax in bfloat16 divides by the wrong sum: up to 4 times too much weight.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 ml_dtypes==0.6.0
"$venv/bin/python" - <<'EOF'
import ml_dtypes, numpy as np

x, half = np.ones(1000, ml_dtypes.bfloat16), np.ones(1000, np.float16)
seen = {"float16 sum": half.sum(), "sum": x.sum(), "mean": x.mean(), "matmul": x @ x,
        "inner": np.inner(x, x), "cumsum": np.cumsum(x)[-1]}
seen = {name: float(y) for name, y in seen.items()}
try:
    seen["einsum"] = float(np.einsum("i,i", x, x))
except TypeError as e:
    seen["einsum"] = str(e)
print(seen)
p = np.exp(np.zeros(1000, ml_dtypes.bfloat16))
weights = p / p.sum()
print("a softmax of 1000 equal scores adds up to", weights.astype(float).sum())
assert list(seen.values())[:6] == [1000, 256, 0.255859375, 1000, 1000, 256]
assert "einsum" in seen["einsum"]
assert 3.9 < weights.astype(float).sum() < 4
EOF
