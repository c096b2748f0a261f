#!/usr/bin/env bash
# torch 2.13.0 on the CPU; seen 2026-11
#
# Input: nn.TransformerEncoder in eval mode, one layer, with a float mask of random numbers: a bias, added to the scores.
# Once with gradients enabled, once under no_grad.
# A good guess: a float mask is added in both.
# Seen: with gradients it is. Under no_grad the fast path takes over and makes the mask bool: every entry that is
# not 0 hides its key, here all of them, and the whole output is NaN. A warning speaks of performance.
# Why it matters: an encoder with a position bias trains, and gives NaN when it is served.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" -W ignore - <<'EOF'
import torch

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
encoder = torch.nn.TransformerEncoder(layer, 1).eval()
x, bias = torch.randn(2, 5, 32), torch.randn(5, 5)
slow = encoder(x, mask=bias)
with torch.no_grad():
    fast = encoder(x, mask=bias)
    hidden = encoder(x, mask=torch.ones(5, 5).triu(1).bool())
    added = encoder(x, mask=torch.ones(5, 5).triu(1))  # as the bool mask: 1 hides
print("NaN with gradients", slow.isnan().sum().item(), "without", fast.isnan().sum().item(), "of", fast.numel())
print("a bias of 0 and 1 and a bool mask differ by", (hidden - added).abs().max().item())
assert slow.isfinite().all() and fast.isnan().all() and (hidden - added).abs().max() < 1e-6
EOF
