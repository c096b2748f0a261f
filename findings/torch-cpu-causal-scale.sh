#!/usr/bin/env bash
# torch 2.13.0 on the CPU; seen 2026-11
#
# Input: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0), or a negative scale.
# A good guess: the backends agree; an explicit triangular mask means the same as is_causal.
# Seen: the default (fused) path gives NaN in every row that hides a key, all but the last one. The math path
# and the same call with the triangle as a mask are right.
# Why it matters: hiding a score by -inf before it is scaled makes it NaN (0) or the greatest (below 0).
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" - <<'EOF'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
triangle = torch.ones(8, 8, dtype=torch.bool).tril()
for scale in 0.0, -0.3:
    s = (q.double() @ k.double().mT * scale).masked_fill(~triangle, -torch.inf)
    right = s.softmax(-1) @ v.double()
    fused = sdpa(q, k, v, is_causal=True, scale=scale)
    masked = sdpa(q, k, v, attn_mask=triangle, scale=scale)
    with sdpa_kernel(SDPBackend.MATH):
        math = sdpa(q, k, v, is_causal=True, scale=scale)
    rows = fused.isnan().all(-1)[0, 0].tolist()
    print(scale, "rows of NaN", rows, "math", (math - right).abs().max().item())
    assert rows == [True] * 7 + [False]
    assert (math - right).abs().max() < 1e-6 and (masked - right).abs().max() < 1e-6
EOF
