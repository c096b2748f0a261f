"""PyTorch's own samples of scaled_dot_product_attention: forward, first and second gradients."""

import fastattn
import pytest
import reference

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # torch's tests import it
from fastattn import _arrays  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

(OPINFO,) = (x for x in op_db if x.name == "nn.functional.scaled_dot_product_attention")
DTYPES = sorted(OPINFO.dtypes, key=str)
attend = fastattn.scaled_dot_product_attention


def samples(dtype):
    """(q, k, v, keywords) of each sample."""
    torch.manual_seed(0)
    given = list(OPINFO.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(given) >= 25
    return [([x.input, *x.args], x.kwargs) for x in given]


def drawn_seed(seed):
    """What a call draws from torch's generator after manual_seed(seed)."""
    torch.manual_seed(seed)
    drawn = int(_arrays.draw_seed(torch.empty(0)))
    torch.manual_seed(seed)
    return drawn


def formula(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, seed=0
):
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), float("-inf"))
    if attn_mask is not None:
        s = s + attn_mask
    p = torch.softmax(s, -1)
    if dropout_p:
        b, h = torch.broadcast_shapes((1, 1), s.shape[:-2])
        keep = reference.kept(b, h, *s.shape[-2:], dropout_p, seed)
        p = p * torch.from_numpy(keep).reshape(s.shape) / (1 - dropout_p)
    return p @ v


def near(got, exact, low, size):
    """Twice the error of the formula in the inputs' dtype, and the rounding of what cancels out.

    Scores reach 200 here: one unit in their last place changes a probability by as many.
    """
    error, allowed = ((x.double() - exact).abs().max() for x in (got, low))
    rounding = size * (1e-11 if got.dtype == torch.float64 else 256 * torch.finfo(got.dtype).eps)
    return got.shape == exact.shape and bool(error <= 2 * allowed + rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradient(dtype):
    for number, (arrays, keywords) in enumerate(samples(dtype)):
        seed = drawn_seed(number)
        out = attend(*arrays, **keywords)
        dout = torch.randn(out.shape, dtype=dtype)
        got = (out, *torch.autograd.grad(out, arrays, dout))

        def by_formula(real, arrays=arrays, keywords=keywords, seed=seed, dout=dout):
            leaves = [x.detach().to(real).requires_grad_() for x in arrays]
            given = {n: x.to(real) if n == "attn_mask" else x for n, x in keywords.items()}
            out = formula(*leaves, **given, seed=seed)
            return out, *torch.autograd.grad(out, leaves, dout.to(real))

        q, k, v, do = (float(x.detach().abs().max()) for x in (*arrays, dout))
        ds = do * v  # what one key gives to the gradient of its score, before P makes it small
        sizes = (v, ds * k, ds * q, do)
        found = (got, by_formula(torch.float64), by_formula(dtype), sizes)
        for ours, exact, low, size in zip(*found, strict=True):
            assert ours.dtype == dtype and near(ours, exact, low, size), (number, keywords)


def test_mean_over_dropouts_is_the_output_without():
    dropped = [x for x in samples(torch.float64) if x[1]["dropout_p"]]
    assert dropped
    for arrays, keywords in dropped[::4]:
        with torch.no_grad():
            draws = torch.stack([attend(*arrays, **keywords) for _ in range(400)])
            want = attend(*arrays, **{**keywords, "dropout_p": 0.0})
        error = (draws.mean(0) - want).abs()
        assert (error <= 5.5 * draws.std(0) / 20 + 1e-12).all()


def test_second_gradient():
    for number, (arrays, keywords) in enumerate(samples(torch.float64)):

        def seeded(*given, number=number, keywords=keywords):
            torch.manual_seed(number)
            return attend(*given, **keywords)

        assert torch.autograd.gradcheck(seeded, arrays, fast_mode=True)
        assert torch.autograd.gradgradcheck(seeded, arrays, fast_mode=True)
