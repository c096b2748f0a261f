#!/usr/bin/env bash
# torch 2.13.0 on the CPU; seen 2026-11
#
# Input: a custom operator that returns sorted float32 values and where they were, int32, marked as not
# differentiable, with a gradient registered; torch.library.opcheck() on it, the outputs in one order and the other.
# A good guess: the order of two outputs is nothing that a check of correctness minds.
# Seen: values first, all four tests succeed; the integers first, test_aot_dispatch_dynamic fails: "result type Float
# can't be cast to the desired output type Long". The check adds the outputs' sums up into the first one's dtype.
# Why it matters: a right operator is reported as wrong, by a sentence about a cast that it has nowhere.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0
"$venv/bin/python" -W ignore - <<'EOF'
import torch


def operator(name, integers):
    """Sorts rows; the output with number `integers` says where each value was."""

    def in_order(values, places):
        return (places, values) if integers == 0 else (values, places)

    @torch.library.custom_op(f"sorting::{name}", mutates_args=())
    def sort(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, places = x.sort(-1)
        return in_order(values, places.int())

    @sort.register_fake
    def _(x):
        return in_order(torch.empty_like(x), torch.empty_like(x, dtype=torch.int32))

    def keep(ctx, inputs, output):
        ctx.mark_non_differentiable(output[integers])
        ctx.save_for_backward(output[integers])

    def backward(context, *gradients):
        slope = gradients[1 - integers]
        return torch.zeros_like(slope).scatter(-1, context.saved_tensors[0].long(), slope)

    sort.register_autograd(backward, setup_context=keep)
    return sort


x = torch.randn(2, 5, requires_grad=True)
for name, integers in (("values_first", 1), ("places_first", 0)):
    sort = operator(name, integers)
    weights = torch.arange(10.0).reshape(2, 5)
    (slope,) = torch.autograd.grad((sort(x)[1 - integers] * weights).sum(), x)
    (wanted,) = torch.autograd.grad((x.sort(-1).values * weights).sum(), x)
    assert torch.equal(slope, wanted)  # the operator and its gradient are right
    found = torch.library.opcheck(sort, (x,), raise_exception=False)
    said = {test: str(outcome) for test, outcome in found.items()}
    failed = {test: text for test, text in said.items() if text != "SUCCESS"}
    print(name, failed or "all succeed")
    if integers:
        assert not failed and len(said) == 4
    else:
        (text,) = failed.values()
        assert list(failed) == ["test_aot_dispatch_dynamic"]
        assert "Float can't be cast to the desired output type Long" in text
EOF
