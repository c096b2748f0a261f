"""Gradients of sparsek and sparsek_lists in torch: finite differences, graphs, transforms."""

import fastattn
import numpy as np
import pytest
import reference_sparsek
from test_tracing import RECORDERS

torch = pytest.importorskip("torch")


def off_kinks(*shape, k, dtype=torch.float64):
    """Random scores whose gates are not near 0 or 1, but for those that are it exactly."""
    torch.manual_seed(3)
    while True:
        z = torch.randn(shape, dtype=dtype)
        tau = fastattn.sparsek(z, k)[1][..., None]
        if (torch.minimum((z - tau).abs(), (z - tau - 1).abs()) > 1e-3).all():
            return z.requires_grad_()


@pytest.mark.parametrize("k", [2, 3.7, 0.2])
def test_gradcheck(k):
    z = off_kinks(2, 3, 12, k=k)
    assert torch.autograd.gradcheck(lambda z: fastattn.sparsek(z, k)[0], z)
    n = torch.tensor([12, 5, 0], dtype=torch.int32)
    z = z.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fastattn.sparsek(z, k, lengths=n)[0], z)


def rows_off_kinks(z, k, **keywords):
    """Which rows of lists are so."""
    with torch.no_grad():
        tau = fastattn.sparsek_lists(z, k, **keywords)[2][..., None]
        way = torch.minimum((z[:, :, None] - tau).abs(), (z[:, :, None] - tau - 1).abs())
    return (way > 1e-3).all(-1)


@pytest.mark.parametrize("k", [2, 3.7])
@pytest.mark.parametrize("of", ["plain", "lengths", "window", "ties"])
def test_gradcheck_of_lists(k, of):
    keywords = {
        "plain": {"sq": 14},
        "lengths": {
            "sq": 10,
            "q_lengths": torch.tensor([10, 6], dtype=torch.int32),
            "k_lengths": torch.tensor([14, 11], dtype=torch.int32),
            "k_start": torch.tensor([0, 3], dtype=torch.int32),
        },
        "window": {"sq": 9, "window": 2, "q_offset": 4},
        "ties": {"sq": 14},  # some are cut from the lists, which has a gradient, too
    }[of]
    torch.manual_seed(4)
    z = torch.randn(2, 2, 14, dtype=torch.float64)
    if of == "ties":
        z = 0.1 * z
    z.requires_grad_()
    fine = rows_off_kinks(z, k, **keywords)[..., None]
    assert fine.sum() > 10

    def gates(z):
        found = fastattn.sparsek_lists(z, k, **keywords)[1]
        return torch.where(fine, found, 0)

    assert torch.autograd.gradcheck(gates, z)


@pytest.mark.parametrize("kind", ["normal", "narrow", "equal", "rising", "falling"])
def test_range_sums_are_the_sums_of_the_rows(kind):
    """In float32, over a stream in which runs are long, and dgates of every stride."""
    rng, m, k = np.random.default_rng(8), 400, 20
    z = rng.standard_normal((1, 2, m)).astype("f4")
    z = {
        "normal": z,
        "narrow": 0.05 * z,
        "equal": np.ones_like(z),
        "rising": np.sort(z),
        "falling": -np.sort(z),
    }[kind]
    scores = torch.tensor(z, requires_grad=True)
    lists, gates, tau = fastattn.sparsek_lists(scores, k, sq=m)
    dense = torch.randn(1, 2, m, k)
    strided = [
        dense,
        dense[..., :1].expand(-1, -1, -1, k),
        dense.transpose(-1, -2).reshape(1, 2, k, m),
    ]
    strided[2] = strided[2].transpose(-1, -2)
    for dgates in strided:
        (dz,) = torch.autograd.grad(gates, scores, dgates, retain_graph=True)
        of = (lists.numpy(), tau.numpy(), dgates.numpy(), k)
        want = reference_sparsek.lists_gradient(z, *of, sq=m)
        assert np.abs(dz.numpy() - want).max() <= 1e-6 * np.abs(want).max() + 1e-12


def test_what_has_a_gradient_and_what_has_none():
    z = torch.randn(2, 3, 9, requires_grad=True)
    gates, tau = fastattn.sparsek(z, 2)
    lists, of_lists, tau_of_lists = fastattn.sparsek_lists(z, 2, sq=4)
    assert gates.requires_grad and of_lists.requires_grad
    assert not tau.requires_grad and not tau_of_lists.requires_grad and not lists.requires_grad
    with torch.no_grad():
        for x, y in zip(fastattn.sparsek(z, 2), (gates, tau), strict=True):
            assert torch.equal(x, y) and not x.requires_grad
    for dtype in (torch.float16, torch.bfloat16):
        low = z.detach().to(dtype).requires_grad_()
        fastattn.sparsek(low, 2)[0].square().sum().backward()
        assert low.grad.dtype == dtype and low.grad.abs().max() > 0


def test_a_row_with_a_nan_or_a_plateau_has_a_gradient_of_0():
    z = torch.tensor([[0.1, float("nan"), 0.2], [5.0, 3.0, 1.0], [0.3, 0.2, 0.1]])
    z = z.requires_grad_()
    fastattn.sparsek(z, 1)[0][:, 0].sum().backward()
    assert (z.grad[:2] == 0).all() and (z.grad[2] != 0).all()
    fastattn.sparsek_lists(z[None, 2:], 3, sq=3)[1].sum().backward()  # all are kept
    assert (z.grad[:2] == 0).all()


def loss(z, n):
    gates, _ = fastattn.sparsek(z, 2.5, lengths=n)
    lists, of_lists, _ = fastattn.sparsek_lists(z, 3, sq=5, q_offset=4, window=1)
    return gates.square().sum() + (of_lists**3).sum() + lists.sum()


def inputs(*lead):
    torch.manual_seed(6)
    return torch.randn(*lead, 2, 3, 11), torch.tensor([11, 4, 8], dtype=torch.int32)


class Module(torch.nn.Module):
    def forward(self, z, n):
        return loss(z, n)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorder", RECORDERS)
def test_a_graph_holds_the_operators(recorder):
    z, n = inputs()
    graph = RECORDERS[recorder](Module(), [z, n])
    for other in (z, z.flip(0)):
        assert torch.equal(graph(other, n), loss(other, n))
    shown = str(getattr(graph, "graph", ""))
    assert "sparsek_lists" in shown or "functionalize" in recorder


def test_one_compiled_graph_and_its_gradients():
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    z, n = inputs()
    for b in (4, 7):  # no size equals another
        ours = torch.cat([z] * 4)[:b].requires_grad_()
        (want,) = torch.autograd.grad(loss(ours, n), ours)
        assert torch.equal(torch.autograd.grad(compiled(ours, n), ours)[0], want)
    assert counter.frame_count == 1


def test_opcheck():
    z, n = inputs()
    z.requires_grad_()
    ours = torch.ops.fastattn
    torch.library.opcheck(ours.sparsek.default, (z, 2.5, n))
    b = torch.tensor([1, 0], dtype=torch.int32)
    torch.library.opcheck(ours.sparsek_lists.default, (z, 2.5, 4, 1, b, None, None, None, None))
    torch.library.opcheck(ours.sparsek_lists.default, (z, 2.5, 4, 1, None, None, None, b, 3))


def test_function_transforms():
    batch, n = inputs(4)
    apart = [fastattn.sparsek(x, 2.5, lengths=n) for x in batch]
    together = torch.vmap(lambda x: fastattn.sparsek(x, 2.5, lengths=n))(batch)
    starts = torch.arange(8, dtype=torch.int32).reshape(4, 2)

    def lists(x, start):
        return fastattn.sparsek_lists(x, 3, sq=5, k_start=start)

    apart += [lists(x, s) for x, s in zip(batch, starts, strict=True)]
    mapped = torch.vmap(lists)(batch, starts)
    for of, found in ((apart[:4], together), (apart[4:], mapped)):
        for x, y in zip(zip(*of, strict=True), found, strict=True):
            assert torch.equal(torch.stack(x), y)
    want = torch.stack([torch.func.grad(loss)(x, n) for x in batch])
    assert torch.equal(torch.vmap(torch.func.grad(loss), (0, None))(batch, n), want)
    leaf = batch[0].clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(loss(leaf, n), leaf)[0], want[0])
    of_lengths = torch.vmap(lambda n: fastattn.sparsek(batch[0, 0, 0], 2.5, lengths=n)[0])(n)
    assert torch.equal(
        of_lengths, fastattn.sparsek(batch[0, 0, :1].expand(3, -1), 2.5, lengths=n)[0]
    )


def test_what_is_not_served_raises():
    z, n = inputs()
    with pytest.raises(NotImplementedError, match=r"^second derivatives of sparsek"):
        torch.func.grad(lambda z: torch.func.grad(loss)(z, n).square().sum())(z)
    leaf = z.clone().requires_grad_()
    (dz,) = torch.autograd.grad(loss(leaf, n), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^second derivatives of sparsek"):
        dz.sum().backward()
    with pytest.raises(NotImplementedError, match=r"^forward-mode derivatives of sparsek"):
        torch.func.jvp(lambda z: fastattn.sparsek(z, 2)[0], (z,), (z,))
