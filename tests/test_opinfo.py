"""PyTorch's own samples of scaled_dot_product_attention: forward, first and second gradients."""

import cases
import fastattn
import numpy as np
import pytest
import reference
import reference_backward

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")  # torch's tests import it
from fastattn import _frameworks  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

(OPINFO,) = (x for x in op_db if x.name == "nn.functional.scaled_dot_product_attention")
DTYPES = sorted(OPINFO.dtypes, key=str)
NUMPY = cases.Torch("cpu").numpy
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
    drawn = int(_frameworks.draw_seed(torch.empty(0)))
    torch.manual_seed(seed)
    return drawn


def in_numpy(arrays, keywords, seed):
    """q, k, v as (b, h, s, d), and the keywords of reference.attention; and their leading shape."""
    own = 3 if keywords.get("enable_gqa") else 2  # axes, with their heads or not
    lead = torch.broadcast_shapes(*(x.shape[:-own] for x in arrays))
    wide = [x.detach().expand(*lead, *x.shape[-own:]) for x in arrays]
    wide = [x[(None,) * (4 - x.dim())] for x in wide]
    rest = {"causal": keywords["is_causal"] and "top-left", "scale": keywords.get("scale")}
    if keywords["dropout_p"]:
        rest |= {"dropout_p": keywords["dropout_p"], "seed": seed}
    if "attn_mask" in keywords:
        rest["mask"] = NUMPY(keywords["attn_mask"].detach())
    return map(NUMPY, wide), rest


def complaints(got, dout, q, k, v, **keywords):
    """Of {name: gradient}, each in the shape that came, by the rule of reference_backward."""
    exact = reference_backward.attention_backward(dout, q, k, v, **keywords)
    pairs = list(reference_backward.careful(exact, got, dout, q, k, v, **keywords))
    if q.dtype == np.float64:
        pairs = None
    said = []
    for name, x in got.items():
        ref = getattr(exact, name)
        copies = ref.size // x.size  # that its array was broadcast to

        def summed(y, shape=x.shape):
            return reference_backward.sum_to(y, shape)

        lows = pairs and [
            (summed(getattr(low, name).astype(float)).astype(x.dtype), summed(getattr(its, name)))
            for low, its in pairs
        ]
        size = [copies * n for n in exact.sizes[name]]
        said += reference_backward.judge(x, summed(ref), lows, None, size, exact.off)
    return said


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradient(dtype):
    for number, (arrays, keywords) in enumerate(samples(dtype)):
        seed = drawn_seed(number)
        out = attend(*arrays, **keywords)
        dout = torch.randn(out.shape, dtype=dtype)
        leaves = dict(zip(("dq", "dk", "dv"), arrays, strict=True))
        if "attn_mask" in keywords and keywords["attn_mask"].requires_grad:
            leaves["dmask"] = keywords["attn_mask"]
        found = torch.autograd.grad(out, leaves.values(), dout)
        for x, leaf in zip(found, leaves.values(), strict=True):
            assert x.dtype == dtype and x.shape == leaf.shape

        (q, k, v), rest = in_numpy(arrays, keywords, seed)
        shape = (*q.shape[:3], v.shape[3])
        ours, dout = (NUMPY(x.detach()).reshape(shape) for x in (out, dout))
        got = dict(zip(leaves, map(NUMPY, found), strict=True))
        said = reference.check(ours, None, q, k, v, **rest)
        said += complaints(got, dout, q, k, v, **rest)
        assert not said, (number, keywords, said)


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
