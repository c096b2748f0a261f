"""A small Llama on a cache in pages says what it says by SDPA on all that came before."""

import math

import fastattn
import pytest

torch = pytest.importorskip("torch")

VOCABULARY, WIDTH, HEADS, KEY_HEADS, D, LAYERS = 97, 64, 4, 2, 16, 2
PAGE, STEPS, PROMPTS = 16, 256, (23, 5)
ROOM = -(-(max(PROMPTS) + STEPS) // PAGE) * PAGE


def weights():
    torch.manual_seed(0)

    def matrix(rows, columns):
        return torch.randn(rows, columns) / math.sqrt(columns)

    layers = [
        {
            "qkv": matrix((HEADS + 2 * KEY_HEADS) * D, WIDTH),
            "out": matrix(WIDTH, HEADS * D),
            "up": matrix(4 * WIDTH, WIDTH),
            "down": matrix(WIDTH, 4 * WIDTH),
        }
        for _ in range(LAYERS)
    ]
    return torch.randn(VOCABULARY, WIDTH), layers, matrix(VOCABULARY, WIDTH)


def rotary():
    angles = torch.arange(ROOM)[:, None] * 1e4 ** (-torch.arange(D // 2) / (D // 2))
    return angles.cos(), angles.sin()


def forward(table, layers, head, tokens, attend):
    """What follows each of the tokens (b, s); attend(layer, q, k, v) rotates (b, s, heads, d)."""
    x = table[tokens]
    for n, w in enumerate(layers):
        qkv = (torch.nn.functional.rms_norm(x, (WIDTH,)) @ w["qkv"].T).unflatten(-1, (-1, D))
        q, k, v = qkv.split([HEADS, KEY_HEADS, KEY_HEADS], 2)
        x = x + attend(n, q, k, v).flatten(2) @ w["out"].T
        hidden = torch.nn.functional.rms_norm(x, (WIDTH,)) @ w["up"].T
        x = x + torch.nn.functional.silu(hidden) @ w["down"].T
    return (torch.nn.functional.rms_norm(x, (WIDTH,)) @ head.T).argmax(-1)


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = (y[: x.shape[1], None] for y in (cos, sin))
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def by_sdpa(tokens):
    """What follows each of them, all at once."""
    tables = rotary()

    def attend(_, q, k, v):
        given = (x.transpose(1, 2) for x in (rotated(q, *tables), rotated(k, *tables), v))
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(*given, is_causal=True, enable_gqa=True).transpose(1, 2)

    return forward(*weights(), torch.tensor([tokens]), attend)[0].tolist()


def on_pages(prompts):
    """The prompts one by one, then a token of all at once."""
    model = weights()
    cos, sin = rotary()
    columns = ROOM // PAGE
    pages = torch.randperm(len(prompts) * columns).int().view(-1, columns)
    caches = torch.full((LAYERS, 2, pages.numel(), PAGE, KEY_HEADS, D), torch.nan)
    said, n = [list(x) for x in prompts], torch.zeros(len(prompts), dtype=torch.int32)

    def step(rows, tokens):
        def attend(layer, q, k, v):
            new = {"k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin}
            cache = caches[layer]
            return fastattn.attention_kvcache(q, *cache, n[rows], page_table=pages[rows], **new)

        found = forward(*model, torch.tensor(tokens), attend)[:, -1]
        n[rows] += len(tokens[0])
        for sequence, token in zip(said[rows], found.tolist(), strict=True):
            sequence.append(token)

    for i, prompt in enumerate(prompts):
        step(slice(i, i + 1), [prompt])
    for _ in range(STEPS - 1):
        step(slice(None), [[x[-1]] for x in said])
    return said


def test_256_tokens_are_those_of_sdpa():
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (n,), generator=rng).tolist() for n in PROMPTS]
    with torch.no_grad():
        for said, prompt in zip(on_pages(prompts), prompts, strict=True):
            assert by_sdpa(said[:-1])[len(prompt) - 1 :] == said[len(prompt) :]
            assert len(said) == len(prompt) + STEPS and len(set(said[-64:])) > 8
