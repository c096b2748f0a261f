#!/usr/bin/env bash
# flash-attn 2.8.3 with torch 2.13.0 and einops 0.8.1; seen 2026-11
#
# Input: bert_padding.index_first_axis, which picks rows of an array, with a row that is picked twice.
# A good guess: x[indices], with its gradient: 2 for a row that is picked twice.
# Seen: the rows are right; the gradient of such a row is that of one of its copies, 1.
# Why it matters: it is imported on its own to gather tokens, and where tokens repeat a part of the gradient is
# gone without a word. unpad_input's own indices never repeat.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install \
    numpy==2.4.6 torch==2.13.0 einops==0.8.1 packaging==25.0 setuptools==80.9.0 wheel==0.45.1
# Its Python file alone: the package has CUDA code, which is not built here.
FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE "$venv/bin/pip" -q --disable-pip-version-check download --no-deps \
    --no-build-isolation --no-binary :all: -d "$venv" flash-attn==2.8.3
tar xf "$venv"/flash_attn-*.tar.gz -C "$venv" --strip-components=2 --wildcards '*/bert_padding.py'
cd "$venv" && bin/python - <<'EOF'
import torch
from bert_padding import index_first_axis

x, indices = torch.zeros(3, 2, requires_grad=True), torch.tensor([0, 0, 1])
found = torch.autograd.grad(index_first_axis(x, indices).sum(), x)[0][:, 0].tolist()
want = torch.autograd.grad(x[indices].sum(), x)[0][:, 0].tolist()
print("gradient of each row:", found, "of x[indices]:", want)
assert (found, want) == ([1.0, 1.0, 0.0], [2.0, 1.0, 0.0])
EOF
