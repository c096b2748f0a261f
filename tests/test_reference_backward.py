"""The reference's gradients against finite differences of its forward, and torch's autograd."""

import numpy as np
import pytest
import reference
import reference_backward
from conftest import needs

FEATURES = {
    "plain": {},
    "group": {"heads": (4, 2, 2)},
    "two head counts": {"heads": (4, 2, 1)},
    "causal": {"causal": True},
    "top left": {"causal": "top-left", "window": (2, None)},
    "window": {"window": (1, 2), "q_offset": (1, -2)},
    "lengths": {"q_lengths": (3, 5), "k_lengths": (6, 2), "k_start": (1, 0)},
    "bool mask": {"mask": (bool, (2, 2, 5, 6))},
    "float mask": {"mask": (float, (2, 2, 5, 6))},
    "mask of keys": {"mask": (float, (2, 1, 1, 6))},
    "mask of rows": {"mask": (float, (1, 2, 5, 1)), "causal": True},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": True},
    "sink": {"sink": True, "causal": True},
    "dropout": {"dropout_p": 0.4, "seed": 5},
    "scale": {"scale": -0.6},
    "all": {"mask": (float, (2, 1, 5, 6)), "softcap": 2.0, "sink": True, "dropout_p": 0.3}
    | {"causal": True, "alibi": True, "heads": (4, 2, 2)},
}


def draw(heads=(2, 2, 2), mask=None, alibi=False, sink=False, **rest):
    rng = np.random.default_rng(0)
    b, sq, sk, d, dv = 2, 5, 6, 3, 4
    hq, hk, hv = heads
    arrays = {
        "q": rng.standard_normal((b, hq, sq, d)),
        "k": rng.standard_normal((b, hk, sk, d)),
        "v": rng.standard_normal((b, hv, sk, dv)),
    }
    if mask:
        dtype, shape = mask
        arrays["mask"] = rng.random(shape) < 0.6 if dtype is bool else rng.standard_normal(shape)
    if alibi:
        rest["alibi_slopes"] = rng.random(hq)
    if sink:
        arrays["sink"] = rng.standard_normal(hq)
    dout, dlse = rng.standard_normal((b, hq, sq, dv)), rng.standard_normal((b, hq, sq))
    return arrays, rest, dout, dlse


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("which", ["out", "lse", "both"])
def test_finite_differences(name, which):
    arrays, rest, dout, dlse = draw(**FEATURES[name])
    dout, dlse = (None if which == "lse" else dout), (None if which == "out" else dlse)
    got = reference_backward.attention_backward(dout, dlse=dlse, **arrays, **rest)

    def loss(changed):
        result = reference.attention(**changed, **rest)
        lse = np.where(np.isfinite(result.lse), result.lse, 0)
        total = 0 if dout is None else (dout * result.out).sum()
        return total + (0 if dlse is None else (dlse * lse).sum())

    checked = 0
    for key, values in arrays.items():
        gradient = getattr(got, f"d{key}")
        if values.dtype == bool:
            assert gradient is None
            continue
        step, rng = 1e-6, np.random.default_rng(1)
        for at in rng.choice(values.size, min(values.size, 24), replace=False):
            ends = []
            for sign in (1, -1):
                moved = values.copy()
                moved.flat[at] += sign * step
                ends.append(loss(arrays | {key: moved}))
            slope = float(ends[0] - ends[1]) / (2 * step)
            assert abs(slope - float(gradient.flat[at])) <= 1e-7 * max(1, abs(slope)), (key, at)
            checked += slope != 0
    assert checked > 20 or which == "lse"


@needs("torch")
@pytest.mark.parametrize("name", ["plain", "group", "bool mask", "mask of keys"])
def test_torch_agrees(name):
    import torch

    arrays, _, dout, _ = draw(**FEATURES[name])
    if arrays.get("mask") is not None and arrays["mask"].dtype == bool:
        arrays["mask"][..., 0] = True  # torch has no gradient for a row that sees nothing
    tensors = {n: torch.tensor(x, requires_grad=x.dtype != bool) for n, x in arrays.items()}
    out = torch.nn.functional.scaled_dot_product_attention(
        tensors["q"], tensors["k"], tensors["v"], tensors.get("mask"), enable_gqa=True
    )
    out.backward(torch.tensor(dout))
    got = reference_backward.attention_backward(dout, **arrays)
    for key, tensor in tensors.items():
        if tensor.requires_grad:
            wanted = tensor.grad.numpy()
            assert np.abs(getattr(got, f"d{key}") - wanted).max() <= 1e-13 * np.abs(wanted).max()


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_careful_form_is_near(name, dtype):
    arrays, rest, dout, dlse = draw(**FEATURES[name])
    arrays = {n: x if x.dtype == bool else x.astype(dtype) for n, x in arrays.items()}
    if "sink" in arrays:
        arrays["sink"] = arrays["sink"].astype(np.float32)
    if "alibi_slopes" in rest:
        rest["alibi_slopes"] = rest["alibi_slopes"].astype(np.float32)
    dout = dout.astype(dtype)
    exact = reference_backward.attention_backward(dout, dlse=dlse, **arrays, **rest)
    low = reference_backward.attention_backward(dout, dlse=dlse, **arrays, **rest, low=True)
    for (key, ref), (_, got) in zip(exact.items(), low.items(), strict=True):
        assert got.dtype == (np.float32 if key == "dsink" else dtype)
        error = np.abs(got.astype(np.float64) - ref).max()
        assert 0 < error <= (1e-5 if dtype == "float32" else 2e-2) * np.abs(ref).max(), key
        assert (got[exact.empty[key]] == 0).all() if key in exact.empty else True
    found = {key: x.astype(x.dtype) for key, x in low.items()}
    assert not reference_backward.check(found, dout, dlse=dlse, **arrays, **rest)
    found["dq"] = found["dq"] * found["dq"].dtype.type(1.05)
    assert reference_backward.check(found, dout, dlse=dlse, **arrays, **rest)
