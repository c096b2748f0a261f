"""flash-attn's and xFormers' names on a GPU: attention's own bits, lengths on the device."""

import fastattn
import fastattn.xformers as xops
import pytest
from fastattn import flash_attn, flash_attn_interface
from fastattn.flash_attn.bert_padding import pad_input, unpad_input

import gpu
from gpu import torch

pytestmark = gpu.marks


def bshd(b, sq, sk, hq=4, hk=2, d=64):
    return [x.transpose(1, 2).contiguous() for x in gpu.inputs(b, hq, hk, sq, sk, d)]


@pytest.mark.parametrize("module", [flash_attn, flash_attn_interface])
def test_flash_attn(module):
    tensors = bshd(2, 130, 200)
    keywords = {"causal": True, "softcap": 20.0}
    found = module.flash_attn_func(
        *tensors, window_size=(50, -1), return_attn_probs=True, **keywords
    )
    want = fastattn.attention(
        *tensors, window=(50, None), layout="bshd", return_lse=True, **keywords
    )
    assert all(torch.equal(x, y) for x, y in zip(found[:2], want, strict=True))


def test_a_padded_batch_through_packed_attention():
    q, k, v = bshd(2, 90, 90, hk=4)
    kept = torch.arange(90, device="cuda") < torch.tensor([[70], [90]], device="cuda")
    rows, indices, ends, longest, _ = unpad_input(torch.stack([q, k, v], 2), kept)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(rows, ends, longest, causal=True)
    want = fastattn.attention_varlen(*rows.unbind(1), ends, ends, 90, 90, causal=True)
    assert torch.equal(out, want)
    assert torch.equal(pad_input(out, indices, 2, 90)[kept], out)


@pytest.mark.parametrize("keys", ["packed", "padded", "gappy"])
def test_xformers_blocks(keys):
    q_lengths, k_lengths = [70, 30], [90, 65]
    ends = {"packed": [0, 90, 155], "padded": [0, 96, 192], "gappy": [3, 100, 180]}[keys]
    kinds = xops.attn_bias
    bias = {
        "packed": lambda: kinds.BlockDiagonalMask.from_seqlens(
            q_lengths, k_lengths
        ).make_causal_from_bottomright(),
        "padded": lambda: kinds.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_lengths, 96, k_lengths
        ),
        "gappy": lambda: kinds.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(
            q_lengths, ends, k_lengths
        ),
    }[keys]()
    assert bias.q_seqinfo.seqstart.is_cuda  # without being told
    q, k, v = bshd(1, 100, ends[-1], hk=4)
    out = xops.memory_efficient_attention(q, k, v, bias)
    for q0, rows, k0, length in zip((0, 70), q_lengths, ends, k_lengths, strict=False):
        part = q[:, q0 : q0 + rows], k[:, k0 : k0 + length], v[:, k0 : k0 + length]
        want = fastattn.attention(*part, causal=True, layout="bshd")
        torch.testing.assert_close(out[:, q0 : q0 + rows], want, atol=1e-2, rtol=1e-2)
