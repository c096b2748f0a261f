#!/usr/bin/env bash
# flash-attention-softmax-n 0.3.2 with torch 2.13.0; seen 2026-11
#
# Input: slow_attention_n, the package's plain reference for softmax with n added to the denominator (what a
# sink of log n does), with a bool attn_mask.
# A good guess: the mask hides keys and stays as it was.
# Seen: no key is hidden, and afterwards the caller's mask is True everywhere: -inf was filled into a bool.
# Why it matters: it reads as a reference for sinks; with a mask it is one for no mask, for later calls too.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install \
    numpy==2.4.6 torch==2.13.0 einops==0.8.1 flash-attention-softmax-n==0.3.2
"$venv/bin/python" - <<'EOF'
import torch
from flash_attention_softmax_n.core.functional import slow_attention_n
from torch.nn.functional import scaled_dot_product_attention as sdpa

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
mask = torch.ones(4, 4, dtype=torch.bool).tril()
masked, unmasked = sdpa(q, k, v, attn_mask=mask), sdpa(q, k, v)
out = slow_attention_n(q, k, v, attn_mask=mask, train=False)
print("off by", (out - masked).abs().max().item(), "mask afterwards", mask.tolist())
assert (out - unmasked).abs().max() < 1e-5 < (out - masked).abs().max()
assert mask.all()
EOF
