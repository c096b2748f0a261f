#!/usr/bin/env bash
# torch 2.13.0 on the CPU; seen 2026-11
#
# Input: nn.MultiheadAttention in eval mode, need_weights=False, a key_padding_mask that hides every key of
# one sequence of the batch; once with gradients enabled, once in inference_mode.
# A good guess: the mode of autograd changes no number.
# Seen: with gradients the sequence comes out as the output projection of 0 (its bias); in inference_mode the
# fast path takes over, and it is NaN. The other sequence is the same in both.
# Why it matters: a model that is finite in a test with gradients is not when it is served.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" - <<'EOF'
import torch

torch.manual_seed(0)
layer = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
torch.nn.init.normal_(layer.out_proj.bias)
x = torch.randn(2, 5, 16)
hide = torch.zeros(2, 5, dtype=torch.bool)
hide[1] = True
call = lambda: layer(x, x, x, key_padding_mask=hide, need_weights=False)[0]
enabled = call().detach()
with torch.inference_mode():
    inference = call()
print("with gradients", enabled[1, 0, :3], "in inference_mode", inference[1, 0, :3])
assert torch.equal(enabled[1], layer.out_proj.bias.expand(5, 16))
assert inference[1].isnan().all()
assert (enabled[0] - inference[0]).abs().max() < 1e-6
EOF
