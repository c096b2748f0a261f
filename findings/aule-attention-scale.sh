#!/usr/bin/env bash
# aule-attention 0.5.0 with torch 2.13.0 on the CPU; seen 2026-11
#
# Input: its drop-in for torch's scaled_dot_product_attention, installed with backend="cpu", called with scale=1.
# A good guess: the scale is used, or refused.
# Seen: the CPU path takes 1 / sqrt(d) whatever is passed. bfloat16 raises TypeError, a tensor that requires
# grad RuntimeError.
# Why it matters: models that scale by something else (T5: 1.0) get other numbers, and no error.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0 aule-attention==0.5.0
"$venv/bin/python" - <<'EOF'
import aule, torch
import torch.nn.functional as F

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
right, default = F.scaled_dot_product_attention(q, k, v, scale=1.0), F.scaled_dot_product_attention(q, k, v)
aule.install(backend="cpu")
out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
print("off by", (out - right).abs().max().item(), "from the default by", (out - default).abs().max().item())
assert (out - right).abs().max() > 0.1 and (out - default).abs().max() < 1e-5
for name, args, kind in ("bfloat16", (q.bfloat16(), k.bfloat16(), v.bfloat16()), TypeError), (
    "requires grad", (q.clone().requires_grad_(), k, v), RuntimeError):
    try:
        F.scaled_dot_product_attention(*args)
    except kind as e:
        print(name, repr(e))
    else:
        raise SystemExit(f"takes {name} now")
EOF
