#!/usr/bin/env bash
# torch 2.13.0 on the CPU (the same in 2.14.1); seen 2026-11
#
# Input: x * x as an operator, made by torch.library.custom_op, with its gradient by register_autograd; then
# torch.func.jvp, forward_ad and torch.func.grad of it. Beside it the same as an autograd.Function with setup_context.
# A good guess: a rule for the backward serves func.grad; jvp, which has no rule, raises as the Function's does.
# Seen: backward() is right; jvp returns 0, and forward_ad no tangent, without a word. func.grad raises and asks for
# a setup_context, which was given. The Function's jvp raises, and its func.grad is right.
# Why it matters: a fused attention is registered this way, and its directional derivatives are silently 0.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" -W ignore - <<'EOF'
import torch
from torch.autograd import forward_ad


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, g):
    return 2 * ctx.saved_tensors[0] * g


@torch.library.custom_op("findings::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(backward, setup_context=setup_context)


class Square(torch.autograd.Function):
    forward = staticmethod(lambda x: x * x)
    setup_context = staticmethod(setup_context)
    backward = staticmethod(backward)


x = torch.tensor([1.0, 2.0, 3.0])
leaf = x.clone().requires_grad_()
square(leaf).sum().backward()


def tangent(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


def seen(f):
    for way in (
        lambda: torch.func.jvp(f, (x,), (x,))[1].tolist(),
        lambda: tangent(f),
        lambda: torch.func.grad(lambda x: f(x).sum())(x).tolist(),
    ):
        try:
            yield way()
        except (NotImplementedError, RuntimeError) as e:
            yield type(e).__name__


operator, function = list(seen(square)), list(seen(Square.apply))
print("backward", leaf.grad.tolist(), "\n(jvp, tangent, func.grad)", operator, "Function", function)
assert leaf.grad.tolist() == [2, 4, 6]
assert operator == [[0, 0, 0], None, "RuntimeError"]
assert function == ["NotImplementedError"] * 2 + [[2, 4, 6]]
EOF
