"""sparsek and sparsek_lists on a GPU: random calls, and streams longer than a block's rows."""

from dataclasses import replace

import fastattn
import numpy as np
import pytest
import sparsek_cases
from cases import Torch

import gpu
from gpu import torch

pytestmark = gpu.marks


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_random_calls(first):
    wrong = {}
    for seed in range(first, first + 100):
        case = sparsek_cases.random_case(seed)
        if said := sparsek_cases.run(case, Torch("cuda")):
            wrong[seed] = case, said
    assert not wrong


@pytest.mark.parametrize(
    "kind", ["normal", "narrow", "ties", "equal", "rising", "falling", "steps"]
)
@pytest.mark.parametrize(("m", "k"), [(3000, 64.0), (9000, 500.5)])
def test_long_streams(kind, m, k):
    """As the CPU has them, gradients too."""
    case = replace(sparsek_cases.Case(), kind=kind, lead=(1, 2), m=m, k=k)
    scores = torch.from_numpy(sparsek_cases.draw(case, np.random.default_rng(0)))
    here, there = scores.clone().requires_grad_(), scores.cuda().requires_grad_()
    want, got = (fastattn.sparsek_lists(x, k, sq=m, window=3) for x in (here, there))
    assert torch.equal(got[0].cpu(), want[0])
    for x, y in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(x.detach().cpu(), y.detach(), rtol=1e-6, atol=1e-6)
    weights = torch.randn(want[1].shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want[1], here, weights)[0]
    found = torch.autograd.grad(got[1], there, weights.cuda())[0]
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)
