"""xFormers' own attn_bias objects through fastattn.xformers, beside the formula, on the CPU.

`python tests/xformers_suite.py PATH/TO/xformers/ops/fmha/attn_bias.py`: the file of xFormers, or of
MSLK, where later versions have it; it needs nothing but torch. Each of its classes that is served
is made by its own constructors and given to memory_efficient_attention, forward and backward, in
float64; right is softmax(scores + its materialize()), and 0 where that hides every key. fastattn's
class of that name has to give the same matrix and the same result.
"""

import argparse
import importlib.util
import random
import sys

import torch
from fastattn import xformers as ours

CPU = torch.device("cpu")  # of the name alone they make pinned memory, which needs a GPU


def load(path):
    spec = importlib.util.spec_from_file_location("xformers.ops.fmha.attn_bias", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lengths(rng, more_keys):
    """Of queries and of keys."""
    q = [rng.randint(1, 40) for _ in range(rng.randint(1, 5))]
    return q, [n + rng.randint(0, 30) if more_keys else rng.randint(1, 60) for n in q]


def packed(method, *window, more_keys=False):
    def make(module, rng):
        q, k = lengths(rng, more_keys)
        bias = module.BlockDiagonalMask.from_seqlens(q, k, device=CPU)
        return getattr(bias, method)(*window) if method else bias, sum(q), sum(k)

    return make


def padded(name, *window):
    def make(module, rng):
        q, k = lengths(rng, True)
        padding = max(k) + rng.randint(0, 5)
        kind = getattr(module, name)
        named = kind.from_seqlens_local if window else kind.from_seqlens
        return named(q, padding, k, *window), sum(q), padding * len(k)

    return make


def gappy(name, *window):
    def make(module, rng):
        q, k = lengths(rng, True)
        starts, at = [], rng.randint(0, 3)
        for n in k:
            starts.append(at)
            at += n + rng.randint(0, 3)
        kind, last = getattr(module, name), [CPU] if window else []
        named = kind.from_seqlens_local_gappy if window else kind.from_seqlens
        return named(q, [*starts, at], k, *window, *last), sum(q), at

    return make


def whole(name, *arguments, more_keys=False):
    def make(module, rng):
        q, k = (x[0] for x in lengths(rng, more_keys))
        return getattr(module, name)(*arguments), q, k

    return make


def with_tensor(module, rng):
    q, k = (x[0] for x in lengths(rng, False))
    bias = torch.randn(1, 4, q, k, generator=torch.Generator().manual_seed(rng.randint(0, 99)))
    return module.LowerTriangularMask().add_bias(bias), q, k


MAKE = {
    "LowerTriangularMask": whole("LowerTriangularMask"),
    "LowerTriangularMaskWithTensorBias": with_tensor,
    "LowerTriangularFromBottomRightMask": whole("LowerTriangularFromBottomRightMask"),
    "LowerTriangularFromBottomRightLocalAttentionMask": whole(
        "LowerTriangularFromBottomRightLocalAttentionMask", 7
    ),
    "LocalAttentionFromBottomRightMask": whole("LocalAttentionFromBottomRightMask", 5, 3),
    "BlockDiagonalMask": packed(""),
    "BlockDiagonalCausalMask": packed("make_causal"),
    "BlockDiagonalCausalFromBottomRightMask": packed(
        "make_causal_from_bottomright", more_keys=True
    ),
    "BlockDiagonalCausalLocalAttentionMask": packed("make_local_attention", 7, more_keys=True),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": packed(
        "make_local_attention_from_bottomright", 7, more_keys=True
    ),
}
MAKE |= {
    name: padded(name, *window)
    for name, *window in (
        ("BlockDiagonalPaddedKeysMask",),
        ("BlockDiagonalCausalWithOffsetPaddedKeysMask",),
        ("BlockDiagonalLocalAttentionPaddedKeysMask", 5, 3),
        ("BlockDiagonalCausalLocalAttentionPaddedKeysMask", 7),
    )
}
MAKE |= {
    name: gappy(name, *window)
    for name, *window in (
        ("BlockDiagonalGappyKeysMask",),
        ("BlockDiagonalCausalWithOffsetGappyKeysMask",),
        ("BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask", 5, 3),
    )
}


def formula(q, k, v, matrix):
    """In (b, s, h, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + matrix
    empty = (matrix == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return (weights @ v).transpose(1, 2)


def complaints(name, module, seed):
    bias, sq, sk = MAKE[name](module, random.Random(seed))
    mine, *_ = MAKE[name](ours.attn_bias, random.Random(seed))
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(1, s, 4, d, dtype=torch.float64, requires_grad=True)
        for s, d in ((sq, 8), (sk, 8), (sk, 5))
    )
    matrix = bias.materialize((1, 4, sq, sk), dtype=torch.float64)
    if not torch.equal(mine.materialize((1, 4, sq, sk), dtype=torch.float64), matrix):
        yield "materialize() is another"
    want = formula(q, k, v, matrix)
    dout = torch.randn_like(want)
    gradients = torch.autograd.grad(want, (q, k, v), dout)
    for who, given in (("theirs", bias), ("ours", mine)):
        out = ours.memory_efficient_attention(q, k, v, given)
        found = (out, *torch.autograd.grad(out, (q, k, v), dout))
        for what, x, y in zip(("out", "dq", "dk", "dv"), found, (want, *gradients), strict=True):
            if not torch.allclose(x, y, rtol=0, atol=1e-11):
                yield f"{what} of {who} is off by {(x - y).abs().max():.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--cases", type=int, default=50, help="of each class")
    given = parser.parse_args()
    module, wrong = load(given.path), 0
    for name in MAKE:
        if not hasattr(module, name):
            print(f"not in this version: {name}")
            continue
        found = [(n, x) for n in range(given.cases) for x in complaints(name, module, n)]
        print(f"{given.cases} cases, {len(found)} complaints: {name}")
        for n, said in found[:3]:
            print(f"  case {n}: {said}")
        wrong += len(found)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
