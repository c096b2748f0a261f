"""Gradients against the reference: everything that the forward takes; the CPU's at every level."""

from dataclasses import replace

import fastattn
import gradient_cases
import numpy as np
import pytest
import reference_backward
from cases import Case, Refused, dtype_of
from conftest import KERNELS, LEVELS, needs, python
from random_cases import random_case

FEATURES = {
    "plain": Case(b=2, hq=2, hk=2, sq=150, sk=300, d=64, dv=64),
    "group": Case(hq=8, hk=2, sq=40, sk=140, d=32, dv=48),
    "causal": Case(hq=2, hk=2, sq=300, sk=300, d=64, dv=64, causal=True),
    "top left": Case(sq=200, sk=130, d=16, dv=16, causal="top-left"),
    "window": Case(sq=300, sk=300, d=16, dv=16, window=(40, -10)),
    "offset": Case(b=2, sq=90, sk=200, d=16, dv=16, causal=True, q_offset=(100, -20)),
    "lengths": Case(b=2, sq=70, sk=200, d=16, dv=16, q_lengths=(0, 60), k_lengths=(150, 200)),
    "start": Case(b=2, sq=70, sk=300, d=16, dv=16, k_start=(150, 2), causal=True),
    "bool mask": Case(b=2, hq=2, hk=2, sq=70, sk=200, mask="bool"),
    "float mask": Case(b=2, hq=2, hk=2, sq=140, sk=200, mask="float32"),
    "mask of keys": Case(
        b=2, hq=2, hk=2, sq=140, sk=200, mask="float32", mask_shape=(False, False, False, True)
    ),
    "mask of rows": Case(
        b=2, hq=2, sq=140, sk=200, mask="float32", mask_shape=(True, False, True, False)
    ),
    "softcap": Case(sq=60, sk=150, softcap=1.1),
    "alibi": Case(hq=4, sq=60, sk=150, alibi=1),
    "sink": Case(hq=4, hk=2, sq=60, sk=150, sink=True, mask="bool"),
    "dropout": Case(b=2, hq=2, hk=2, sq=60, sk=150, dropout=0.3),
    "packed": Case(
        b=3, hq=4, hk=2, sq=150, sk=200, causal=True, packed=((150, 0, 9), (200, 4, 150))
    ),
    "great heads": Case(sq=60, sk=150, d=300, dv=577),
    "no keys": Case(sq=5, sk=0),
    "no heads": Case(hq=0, sq=5, sk=4),
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("place", KERNELS, indirect=True)
def test_each_feature(name, dtype, place):
    for seed in range(3):
        case = replace(FEATURES[name], dtype=dtype, seed=seed)
        try:
            assert not gradient_cases.run(case, None, *place), case
        except Refused as undeclared:
            pytest.skip(str(undeclared))


@pytest.mark.parametrize("level", LEVELS)
def test_random_cases_at_every_level(level, cpu_levels):
    if level not in cpu_levels:
        pytest.skip(f"this CPU has no {level}")
    first = 75 * LEVELS.index(level)  # not the same ones at each level
    said = python(gradient_cases.__file__, first, first + 75, FASTATTN_CPU_LEVEL=level)
    assert "75 cases, 0 wrong" in said


def test_150_random_cases():
    for seed in range(1000, 1150):
        assert not gradient_cases.run(random_case(seed)), random_case(seed)


BITS = """
import hashlib, sys, fastattn, numpy as np
rng = np.random.default_rng(0)
for hq, hk, sq, sk in ((1, 1, 700, 900), (4, 2, 300, 300), (6, 6, 130, 513)):
    for causal, dtype in ((True, "float32"), (False, "float16")):
        q, dout = (rng.standard_normal((2, hq, sq, 40)).astype(dtype) for _ in range(2))
        k, v = (rng.standard_normal((2, hk, sk, 40)).astype(dtype) for _ in range(2))
        out, lse = fastattn.attention(q, k, v, causal=causal, return_lse=True)
        for n in range(3):
            found = fastattn.attention_backward(dout, q, k, v, out, lse, causal=causal)
            print(hashlib.sha256(b"".join(x.tobytes() for x in found[:3])).hexdigest())
"""


def test_the_same_bits_with_any_number_of_threads():
    seen = {python("-c", BITS, FASTATTN_NUM_THREADS=str(n)) for n in (1, 2, 3, 7)}
    assert len(seen) == 1
    assert len(set(seen.pop().split())) == 6  # three runs each


def test_batch_and_head_do_not_change_a_bit():
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((3, 4, 200, 32)).astype(np.float32) for _ in range(4))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    whole = fastattn.attention_backward(dout, q, k, v, out, lse)
    part = [x[1:2, 2:3] for x in (dout, q, k, v, out, lse)]
    for x, y in zip(fastattn.attention_backward(*part)[:3], whole[:3], strict=True):
        assert (x[0, 0] == y[1, 2]).all()


@pytest.mark.parametrize("which", ["dq", "dk", "dv"])
def test_what_is_asked_alone_has_the_bits_that_it_has_in_company(which):
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, 2, 150, 24)).astype(np.float32) for _ in range(4))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    whole = fastattn.attention_backward(dout, q, k, v, out, lse)
    needs = {f"need_{name}": name == which for name in ("dq", "dk", "dv")}
    alone = fastattn.attention_backward(dout, q, k, v, out, lse, **needs)
    at = ("dq", "dk", "dv").index(which)
    assert (alone[at] == whole[at]).all()
    assert [x is None for x in alone] == [n != at for n in range(5)]


def test_a_dout_of_strides_0():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 130, 24)).astype(np.float32) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    one = np.broadcast_to(np.ones((), np.float32), out.shape)
    found = fastattn.attention_backward(one, q, k, v, out, lse)
    same = fastattn.attention_backward(one.copy(), q, k, v, out, lse)
    assert all((x == y).all() for x, y in zip(found[:3], same[:3], strict=True))
    got = dict(zip(("dq", "dk", "dv"), found, strict=False))
    assert not reference_backward.check(got, one, q, k, v)


@needs("torch")
@pytest.mark.parametrize("heads", [(4, 2, 1), (6, 2, 3)])
def test_other_heads_of_k_than_of_v(heads):
    """Which scaled_dot_product_attention alone takes."""
    import torch

    hq = heads[0]
    tensors = [torch.randn(2, h, 150, 16, requires_grad=True, dtype=torch.float64) for h in heads]
    out = fastattn.scaled_dot_product_attention(*tensors, enable_gqa=True)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, dout)
    wide = [t.repeat_interleave(hq // h, 1) for t, h in zip(tensors, heads, strict=True)]
    plain = torch.nn.functional.scaled_dot_product_attention(*wide)
    wanted = torch.autograd.grad(plain, tensors, dout)
    for x, y in zip(found, wanted, strict=True):
        assert (x - y).abs().max() <= 1e-12 * y.abs().max()


@pytest.mark.parametrize("mask", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_dmask_has_the_dtype_and_shape_of_the_mask(dtype, mask):
    case = Case(b=2, hq=2, hk=2, sq=9, sk=20, mask=mask, dtype=dtype)
    for shape in ((True,) * 4, (False, True, False, True)):
        assert not gradient_cases.run(replace(case, mask_shape=shape))
    q = np.ones((1, 1, 3, 4), dtype)
    bias = np.zeros((3, 3), dtype_of(mask))
    out, lse = fastattn.attention(q, q, q, mask=bias, return_lse=True)
    found = fastattn.attention_backward(out, q, q, q, out, lse, mask=bias, need_dmask=True)
    assert (found[3].dtype, found[3].shape) == (bias.dtype, bias.shape)
