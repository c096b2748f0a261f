#!/usr/bin/env bash
# torch 2.13.0 on the CPU; seen 2026-11
#
# Input: torch.nn.attention.bias.causal_upper_left(3, 5) and causal_lower_right(3, 5), tensors that
# scaled_dot_product_attention takes as attn_mask for 3 queries and 5 keys.
# A good guess: their shape is (3, 5), as of the mask that they stand for.
# Seen: (1, 3, 5) and (2, 3, 5): the number of the variant is taken for a size. len() and numel() follow it, and
# where attention is given the bias for a batch and heads of other sizes, it computes as with (3, 5).
# Why it matters: whoever looks at a mask's shape before passing it on sees a batch of 2 that nobody made.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" -W ignore - <<'EOF'
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as sdpa

shapes = {}
for make, diagonal in ((causal_upper_left, 0), (causal_lower_right, 2)):
    bias = make(3, 5)
    shapes[make.__name__] = tuple(bias.shape), len(bias), bias.numel()
    print(make.__name__, *shapes[make.__name__])
    q, k, v = torch.randn(4, 3, 3, 8), torch.randn(4, 3, 5, 8), torch.randn(4, 3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(diagonal)
    torch.testing.assert_close(sdpa(q, k, v, bias), sdpa(q, k, v, mask))
assert shapes["causal_upper_left"] == ((1, 3, 5), 1, 15)
assert shapes["causal_lower_right"] == ((2, 3, 5), 2, 30)
EOF
