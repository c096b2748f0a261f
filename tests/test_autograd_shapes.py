"""Gradients of the drop-in in every shape: ranks, broadcasting, empty axes."""

import fastattn
import pytest

torch = pytest.importorskip("torch")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402 - torch may be missing

sdpa = fastattn.scaled_dot_product_attention

SHAPES = {  # of q, k, v, and of a mask or None
    "rank 2": ((5, 4), (6, 4), (6, 3), None),
    "rank 2 and a mask": ((5, 4), (6, 4), (6, 3), (5, 6)),
    "rank 2, no rows": ((0, 4), (6, 4), (6, 4), None),
    "rank 3": ((2, 5, 4), (2, 6, 4), (2, 6, 3), (6,)),
    "rank 3, no heads": ((0, 5, 4), (0, 6, 4), (0, 6, 4), None),
    "rank 5, no batch": ((2, 0, 2, 5, 4), (2, 0, 2, 6, 4), (2, 0, 2, 6, 4), (2, 0, 1, 5, 6)),
    "no heads": ((2, 0, 5, 4), (2, 0, 6, 4), (2, 0, 6, 4), None),
    "no heads but of keys": ((2, 0, 5, 4), (2, 1, 6, 4), (2, 0, 6, 4), None),
    "all empty": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), None),
    "keys of rank 2": ((2, 3, 5, 4), (6, 4), (6, 4), (3, 1, 6)),
    "queries of rank 2": ((5, 4), (2, 3, 6, 4), (3, 6, 4), (2, 1, 5, 1)),
}


def in_func(*arguments):
    """The same in torch.func, whose transforms see another path."""
    return torch.func.vjp(sdpa, *arguments)[0]


@pytest.mark.parametrize("call", [sdpa, in_func])
@pytest.mark.parametrize("name", SHAPES)
def test_against_torchs_formula(name, call):
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES[name] if s]
    with sdpa_kernel(SDPBackend.MATH):
        want = torch.nn.functional.scaled_dot_product_attention(*tensors)
    out = call(*tensors)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(out, want, **close)
    torch.testing.assert_close(out, sdpa(*(x.detach() for x in tensors)), **close)
    dout = torch.randn_like(want)
    found, right = (
        torch.autograd.grad(x, tensors, dout, allow_unused=True, materialize_grads=True)
        for x in (out, want)
    )
    torch.testing.assert_close(found, right, **close)
