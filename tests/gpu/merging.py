"""Merges that are judged, and what they are made with."""

import fastattn

import gpu
from gpu import torch

DTYPES = gpu.DTYPES | {"fp32": torch.float32}


def states(n, shape, dtype="bf16", seed=0, empty=0.2, device="cuda"):
    """outs (n, b, h, s, dv) and lses (n, b, h, s); of the empty ones the outs are NaN."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    outs, lses = normal(n, *shape).to(DTYPES[dtype]), 10 * normal(n, *shape[:3])
    gone = torch.rand(lses.shape, generator=generator, device=device)
    lses[gone < empty] = -torch.inf
    lses[gone < empty / 2] = torch.inf
    outs[gone < empty] = torch.nan
    return outs, lses


def apart(x):
    """A list of arrays that do not lie equal steps apart."""
    return [part.clone() for part in x]


def merge(outs, lses, **keywords):
    """Into blocks that held NaN before."""
    for like in (outs[0], lses[0]):
        torch.full_like(like, torch.nan, memory_format=torch.contiguous_format)
    return fastattn.merge_states(outs, lses, **keywords)


def complaints(out, lse, outs, lses):
    """The rule of reference.judge for a merge; outs and lses in the layout bhsd."""
    logs = torch.stack(list(lses)).double()
    logs = torch.where(logs == torch.inf, -torch.inf, logs)
    exact_lse = logs.logsumexp(0)
    weights = logs.softmax(0).nan_to_num(0)[..., None]
    exact, low = torch.zeros(2, *out.shape, dtype=torch.float64, device=out.device)
    low = low.float()
    for weight, part in zip(weights, outs, strict=True):
        part = torch.where(weight == 0, 0, part)
        exact += weight * part.double()
        low += weight.float() * part.float()
    if not exact.numel():
        return [] if torch.equal(lse.isinf(), exact_lse.isinf()) else ["lse"]
    rounding = ((exact.to(out.dtype) + 0.3) - 0.3).double() - exact
    slack = 8 * 2**-23 * exact.abs().max() if out.dtype == torch.float32 else 0
    bound = 2 * (low.to(out.dtype).double() - exact).abs().max() + 2 * rounding.abs().max() + slack
    wrong, error = [], (out.double() - exact).abs().max()
    if not error <= bound:
        wrong.append(f"out is off by {error:.2e}, {bound:.2e} is allowed")
    none = exact_lse == -torch.inf
    if not (torch.equal(lse == -torch.inf, none) and (out[none] == 0).all()):
        wrong.append("empty rows")
    off = (lse.double() - exact_lse)[~none].abs()
    if off.numel() and not off.max() <= 1e-5 + 1e-7 * exact_lse[~none].abs().max():
        wrong.append(f"lse is off by {off.max():.2e}")
    return wrong
