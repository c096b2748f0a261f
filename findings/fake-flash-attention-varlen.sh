#!/usr/bin/env bash
# fake-flash-attention 2.6.3.post2 with torch 2.13.0 on the CPU; seen 2026-11
#
# Input: the package stands in for flash_attn where there is no GPU. flash_attn_varlen_func(q, k, v,
# cu_seqlens_q=..., cu_seqlens_k=..., max_seqlen_q=..., max_seqlen_k=...), as flash_attn documents it; and
# flash_attn_func(causal=True) with 3 queries against 5 keys, which flash_attn (2.1 on) aligns bottom right.
# A good guess: the same numbers, slower.
# Seen: the varlen call ignores the lengths and gives something else, without an error; the
# causal call is aligned top left. (Installed it says that it is flash_attn 2.7.4.post2.)
# Why it matters: it is the flash_attn that a test on a CPU machine may be comparing with.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" -q --disable-pip-version-check install numpy==2.4.6 torch==2.13.0 fake-flash-attention==2.6.3.post2
"$venv/bin/python" - <<'EOF'
import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func

torch.manual_seed(0)

def attention(q, k, v, offset=None):  # (s, h, d), in float64
    s = torch.einsum("ihd,jhd->hij", q.double(), k.double()) / q.shape[-1] ** 0.5
    if offset is not None:
        s = s.masked_fill(torch.arange(len(k)) > torch.arange(len(q))[:, None] + offset, -torch.inf)
    return torch.einsum("hij,jhd->ihd", s.softmax(-1), v.double())

def far(a, b):
    return (a - b).abs().max().item()

q, k, v = (torch.randn(8, 2, 16) for _ in range(3))
cu = torch.tensor([0, 3, 8], dtype=torch.int32)
out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5)
right = torch.cat([attention(x[0], x[1], x[2]) for x in zip(*(t.split([3, 5]) for t in (q, k, v)))])
print("varlen: off by", far(out, right))
assert far(out, right) > 0.5
q, k, v = q[:3], k[:5], v[:5]
out = flash_attn_func(q[None], k[None], v[None], causal=True)[0]
print("causal: off by", far(out, attention(q, k, v, 2)), "top left by", far(out, attention(q, k, v, 0)))
assert far(out, attention(q, k, v, 2)) > 0.5 and far(out, attention(q, k, v, 0)) < 1e-5
EOF
