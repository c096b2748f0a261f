"""torch.nn's modules that attend, by PyTorch's own samples of each: output and every gradient."""

import itertools
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # torch's tests import it
from fastattn.torch import use_fastattn  # noqa: E402
from torch.testing._internal.common_modules import module_db  # noqa: E402

ATTENDING = ("Transformer", "MultiheadAttention")
MODULES = {info.name: info for info in module_db if any(x in info.name for x in ATTENDING)}


def result(module, given, graded):
    """The output and, where asked for, the gradient of each parameter and input."""
    args = [x.detach().requires_grad_(graded) for x in given.args]
    with torch.set_grad_enabled(graded):
        out = module(*args, **given.kwargs)
    out = out[0] if isinstance(out, tuple) else out
    if not graded:
        return [out]
    leaves = [*module.parameters(), *args]
    return [out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)]


def samples(name, training):
    """(module, its arguments) of every fifth sample; the same weights each time."""
    info = MODULES[name]
    torch.manual_seed(0)
    made = info.module_inputs_func(
        info, "cpu", torch.float64, requires_grad=True, training=training
    )
    for sample in itertools.islice(made, 0, None, 5):  # products of twos and threes
        built, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*built.args, **built.kwargs).double().train(training)
        if name == "nn.MultiheadAttention":
            given.kwargs["need_weights"] = False
        if name == "nn.Transformer":  # what the encoder has at padding, its fast path says is 0
            given.kwargs["memory_key_padding_mask"] = given.kwargs["src_key_padding_mask"]
        yield module, given


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("graded", [True, False], ids=["training", "inference"])
def test_samples_of_torch(name, graded, calls):
    warnings.simplefilter("ignore")  # torch's, of nested tensors
    torch.backends.mha.set_fastpath_enabled(False)  # it has faults of its own
    try:
        want = [result(*sample, graded) for sample in samples(name, graded)]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert len(want) >= 7 and not calls
    with use_fastattn("raise"):
        for number, sample in enumerate(samples(name, graded)):
            calls.clear()
            torch.testing.assert_close(result(*sample, graded), want[number])
            assert calls
