"""A Llama in plain torch, for fastattn.bench.llama. It attends by torch's own
scaled_dot_product_attention."""

import torch
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.d = c.width // c.heads
        kv = 2 * c.kv_heads * self.d
        self.before, self.between = nn.RMSNorm(c.width), nn.RMSNorm(c.width)
        self.qkv = nn.Linear(c.width, c.width + kv, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.gate = nn.Linear(c.width, 2 * c.inner, bias=False)
        self.down = nn.Linear(c.inner, c.width, bias=False)
        self.sizes = [c.heads, c.kv_heads, c.kv_heads]

    def forward(self, x, cos, sin):
        qkv = self.qkv(self.before(x)).unflatten(-1, (-1, self.d)).transpose(1, 2)
        q, k, v = qkv.split(self.sizes, 1)
        q, k = (turned(y, cos, sin) for y in (q, k))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        gate, up = self.gate(self.between(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def turned(x, cos, sin):
    """Rotary positions."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.words = nn.Embedding(c.words, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.last = nn.RMSNorm(c.width)
        self.half = c.width // c.heads // 2

    def forward(self, words):
        """The mean loss of the next word."""
        x = self.words(words)
        rates = 10_000 ** (-torch.arange(self.half, device=x.device) / self.half)
        angles = torch.arange(words.shape[1], device=x.device)[:, None] * rates
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        scores = functional.linear(self.last(x), self.words.weight)[:, :-1]
        return functional.cross_entropy(scores.flatten(0, 1).float(), words[:, 1:].flatten())
