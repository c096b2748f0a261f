#!/usr/bin/env bash
# torch 2.13.0 on the CPU; seen 2026-11
#
# Input: scaled_dot_product_attention is compiled once (aot_eager). Then a kernel of one's own is registered for its
# aten operator, CPU and AutogradCPU, by torch.library, and it is compiled anew, after torch._dynamo.reset().
# A good guess: what is compiled after the registration holds the new kernel, as an eager call does.
# Seen: the eager call runs it, the new graph does not: tracing keeps for each operator what it resolved the first
# time, and registering forgets that for the registered keys alone. Cleared by hand, the graph holds the kernel.
# Why it matters: whoever replaces attention below torch's functions is silently left out of graphs in every
# process that has compiled one before.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" -W ignore - <<'EOF'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
x, seen = torch.randn(2, 4, 9, 16, requires_grad=True), []
operator = torch.ops.aten.scaled_dot_product_attention.default


def ours(*args, **keywords):
    seen.append(1)
    return operator.decompose(*args, **keywords)


def compiled():
    torch._dynamo.reset()
    seen.clear()
    torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x) * 2, backend="aot_eager")(x)
    return len(seen)


def registered():
    library = torch.library.Library("aten", "IMPL")
    for place in ("CPU", "AutogradCPU"):
        library.impl(operator, ours, place)
    return library


compiled()
library = registered()
after = compiled()
seen.clear()
F.scaled_dot_product_attention(x, x, x)
eager = len(seen)
operator._dispatch_cache.clear()
cleared = compiled()
print("eager", eager, "compiled", after, "compiled once the operator's cache is cleared", cleared)
assert eager == 1 and after == 0 and cleared > 0
EOF
