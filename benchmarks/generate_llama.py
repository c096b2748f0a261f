"""A small Llama generates on a cache in pages, and by torch's attention on a whole one, in turn.

    python benchmarks/generate_llama.py --plot benchmarks/generate_llama.svg

Its weights are random, float32; the prompts differ in length. With fastattn a step of all sequences
is one call a layer: attention_kvcache rotates and writes the new keys, whichever pages they come
to, and attends. With torch each sequence has its part of a whole cache, and F's
scaled_dot_product_attention one call. Said are whether both say the same tokens, steps/s, and what
attention's share of a step predicts.
"""

import argparse
import math
import statistics
import time

import fastattn
import torch
import torch.nn.functional as F  # noqa: N812

WORDS, HEADS, KEY_HEADS, D, PAGE = 4096, 16, 4, 64, 64
WIDTH = HEADS * D


class Llama:
    def __init__(self, layers, room):
        torch.manual_seed(0)

        def matrix(rows, columns):
            return torch.randn(rows, columns) / math.sqrt(columns)

        self.words = torch.randn(WORDS, WIDTH)
        self.layers = [
            {
                "qkv": matrix((HEADS + 2 * KEY_HEADS) * D, WIDTH),
                "out": matrix(WIDTH, WIDTH),
                "up": matrix(4 * WIDTH, WIDTH),
                "down": matrix(WIDTH, 4 * WIDTH),
            }
            for _ in range(layers)
        ]
        self.last = matrix(WORDS, WIDTH)
        angles = torch.arange(room)[:, None] * 1e4 ** (-torch.arange(D // 2) / (D // 2))
        self.cos, self.sin = angles.cos(), angles.sin()

    def following(self, tokens, attend):
        """What follows the last of tokens (b, s); attend(layer, q, k, v) of (b, s, heads, D)."""
        x = self.words[tokens]
        for number, w in enumerate(self.layers):
            qkv = (F.rms_norm(x, (WIDTH,)) @ w["qkv"].T).unflatten(-1, (-1, D))
            x = x + attend(number, *qkv.split([HEADS, KEY_HEADS, KEY_HEADS], 2)).flatten(2) @ (
                w["out"].T
            )
            x = x + F.silu(F.rms_norm(x, (WIDTH,)) @ w["up"].T) @ w["down"].T
        return (F.rms_norm(x[:, -1], (WIDTH,)) @ self.last.T).argmax(-1)


class Generation:
    """What one side says, and what its steps took; `attention` is the part of it."""

    def __init__(self, model, prompts, room):
        self.model, self.said = model, [list(x) for x in prompts]
        self.keys = [0] * len(prompts)
        self.seconds, self.attention = [], []
        self.room, self.spent = room, 0.0

    def step(self, rows):
        """Of the sequences `rows`: all of their tokens that are not in the cache yet."""
        tokens = torch.tensor(
            [x[n:] for x, n in zip(self.said[rows], self.keys[rows], strict=True)]
        )
        began, self.spent = time.perf_counter(), 0.0
        found = self.model.following(tokens, lambda *given: self.timed(rows, *given))
        self.seconds.append(time.perf_counter() - began)
        self.attention.append(self.spent)
        for number, token in zip(range(len(self.said))[rows], found.tolist(), strict=True):
            self.keys[number] += tokens.shape[1]
            self.said[number].append(token)

    def timed(self, rows, *given):
        began = time.perf_counter()
        out = self.attend(rows, *given)
        self.spent += time.perf_counter() - began
        return out


class Pages(Generation):
    def __init__(self, model, prompts, room):
        super().__init__(model, prompts, room)
        count = len(prompts) * room // PAGE
        self.table = torch.randperm(count).int().view(len(prompts), -1)
        self.cache = torch.zeros(len(model.layers), 2, count, PAGE, KEY_HEADS, D)

    def attend(self, rows, layer, q, k, v):
        return fastattn.attention_kvcache(
            *(q, *self.cache[layer], torch.tensor(self.keys[rows]).int()),
            **{"k": k, "v": v, "page_table": self.table[rows]},
            rotary_cos=self.model.cos,
            rotary_sin=self.model.sin,
        )


class Whole(Generation):
    def __init__(self, model, prompts, room):
        super().__init__(model, prompts, room)
        self.cache = torch.zeros(len(model.layers), 2, len(prompts), KEY_HEADS, room, D)

    def attend(self, rows, layer, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.empty_like(q)
        for i, number in enumerate(range(len(self.said))[rows]):
            at = slice(self.keys[number], self.keys[number] + q.shape[2])
            cos, sin = self.model.cos[at], self.model.sin[at]

            def turned(x, cos=cos, sin=sin):
                a, b = x.chunk(2, -1)
                return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

            cache = self.cache[layer, :, number]
            cache[0, :, at], cache[1, :, at] = turned(k[i]), v[i]
            seen = (x[None, :, : at.stop] for x in cache)
            out[i] = F.scaled_dot_product_attention(
                turned(q[i])[None], *seen, is_causal=q.shape[2] > 1, enable_gqa=True
            )
        return out.transpose(1, 2)


def generate(steps, layers, lengths):
    """Both sides: the prompts one by one, then all at once."""
    room = -(-(max(lengths) + steps) // PAGE) * PAGE
    model = Llama(layers, room)
    prompts = [torch.randint(WORDS, (n,)).tolist() for n in lengths]
    sides = [Whole(model, prompts, room), Pages(model, prompts, room)]
    for side in sides:
        for number in range(len(prompts)):
            side.step(slice(number, number + 1))
        side.seconds.clear()
        side.attention.clear()
    for number in range(steps - 1):
        for side in sides[:: 1 if number % 2 else -1]:
            side.step(slice(None))
    return sides


def report(sides, lengths):
    theirs, ours = sides
    pairs = [
        (a, b)
        for x, y, n in zip(theirs.said, ours.said, lengths, strict=True)
        for a, b in zip(x[n:], y[n:], strict=True)
    ]
    same = sum(a == b for a, b in pairs)
    print(
        f"{same} of {len(pairs)} tokens are the same, {len({b for _, b in pairs})} different ones"
    )
    step, attention = {}, {}
    for name, x in zip(("torch", "fastattn"), sides, strict=True):
        step[name], attention[name] = map(statistics.median, (x.seconds, x.attention))
        share = attention[name] / step[name]
        print(f"{name}: {1 / step[name]:.1f} steps/s, attention is {share:.0%} of a step")
    gain = step["torch"] / step["fastattn"]
    rest = step["torch"] - attention["torch"]
    predicted = step["torch"] / (rest + attention["fastattn"])
    print(f"fastattn's steps are {gain:.2f} times as fast; its attention predicts {predicted:.2f}")
    return same == len(pairs)


def plot(sides, path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastattn"  # the same bytes from the same numbers
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(layout="tight")
    for name, x, color in zip(
        ("torch", "fastattn"), sides, ("tab:blue", "tab:orange"), strict=True
    ):
        axes.plot([1e3 * t for t in x.seconds], color=color, label=name)
        axes.plot([1e3 * t for t in x.attention], ":", color=color, label=f"{name}'s attention")
    axes.set(xlabel="token", ylabel="ms", ylim=(0, None))
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=256, help="tokens that each sequence gets")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", default="4000,2500,1200,300", help="their lengths")
    parser.add_argument("--plot", metavar="SVG", help="what each step took")
    given = parser.parse_args()
    lengths = [int(n) for n in given.prompts.split(",")]
    with torch.inference_mode():
        sides = generate(given.steps, given.layers, lengths)
    same = report(sides, lengths)
    if given.plot:
        plot(sides, given.plot)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
