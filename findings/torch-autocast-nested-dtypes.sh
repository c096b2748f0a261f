#!/usr/bin/env bash
# torch 2.13.0 on the CPU (the same in 2.14.1); seen 2026-11
#
# Input: float32 q, k, v, once as parameters and once as plain tensors, to F.scaled_dot_product_attention in an
# autocast region of bfloat16, in one of float16 inside it, and after that one; likewise where the inner call is
# the first; and with cache_enabled=False.
# A good guess: a region's call computes in the region's dtype, whoever was called before.
# Seen: of parameters the inner call gives bfloat16 where an outer one came before it, and the outer call float16
# where the inner one came first: the casts of both regions share a cache that does not ask for the dtype. Plain
# tensors, and all without the cache, have the region's own dtype.
# Why it matters: a model's learned queries are attended to in a dtype that depends on what ran before.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" -W ignore - <<'EOF'
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


def dtypes(make, order, cached=True):
    q, k, v = (make(torch.ones(1, 2, 8, 16)) for _ in range(3))
    found = []
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        for region in order:
            if region == "outer":
                found.append(sdpa(q, k, v).dtype)
            else:
                with torch.autocast("cpu", torch.float16, cache_enabled=cached):
                    found.append(sdpa(q, k, v).dtype)
    return [str(x).removeprefix("torch.") for x in found]


def tensor(x):
    return x


first, second = ("outer", "inner", "outer"), ("inner", "outer")
right = ["bfloat16", "float16", "bfloat16"]
seen = {
    "parameters": dtypes(torch.nn.Parameter, first),
    "parameters, inner first": dtypes(torch.nn.Parameter, second),
    "parameters, no cache": dtypes(torch.nn.Parameter, first, False),
    "tensors": dtypes(tensor, first),
    "tensors, inner first": dtypes(tensor, second),
}
for name, found in seen.items():
    print(f"{name}: {' '.join(found)}")
assert seen["parameters"] == ["bfloat16"] * 3
assert seen["parameters, inner first"] == ["float16"] * 2
assert seen["parameters, no cache"] == seen["tensors"] == right
assert seen["tensors, inner first"] == right[1:]
EOF
