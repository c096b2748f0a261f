"""A small GPT trained on Python's own manual, with dense causal attention and with SparseK's.

    python benchmarks/train_sparsek.py --plot benchmarks/train_sparsek.svg

Both models have the same shape but for the scores of the keys, and see the same bytes in turn.
Said are the losses, the seconds and what autograd keeps of a step, and the keys a decoder keeps.
"""

import argparse
import statistics
import time

import fastattn
import torch
import torch.nn.functional as F  # noqa: N812
from fastattn.torch import SparseKAttention
from torch import nn
from train_gpt import batches

HEADS, HEAD_SIZE, LAYERS = 4, 64, 4
WIDTH = HEADS * HEAD_SIZE
NAMES = ("dense", "SparseK")


class Dense(SparseKAttention):
    """The same projections, and all keys."""

    def forward(self, x):
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(sizes, 1)
        return self.out(fastattn.attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, name, k_keep, window):
        super().__init__()
        kind = Dense if name == "dense" else SparseKAttention
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = kind(WIDTH, HEADS, k_keep=k_keep, window=window)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attend(self.first(x))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class GPT(nn.Module):
    def __init__(self, name, length, k_keep, window):
        super().__init__()
        self.letters, self.places = nn.Embedding(256, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.Sequential(*(Block(name, k_keep, window) for _ in range(LAYERS)))
        self.last = nn.LayerNorm(WIDTH)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, letters, following):
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        logits = self.last(self.blocks(x)) @ self.letters.weight.T
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


class Training:
    def __init__(self, name, length, k_keep, window, rate):
        torch.manual_seed(0)
        self.name, self.model = name, GPT(name, length, k_keep, window)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)
        self.losses, self.seconds, self.kept = [], [], 0

    def step(self, letters):
        memory = {}

        def keep(x):
            memory[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = self.model(letters[:, :-1], letters[:, 1:])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.kept = sum(memory.values())


def report(trainings, length, k_keep, window):
    for x in trainings:
        last = statistics.mean(x.losses[-10:])
        print(
            f"{x.name}: loss {last:.3f} over the last 10 steps, {statistics.median(x.seconds):.2f} "
            f"s a step, {x.kept / 1e6:.0f} MB kept for the backward pass"
        )
    keys = k_keep + window
    print(f"a decoder keeps {keys} keys of {length} a head, {length / keys:.0f} times fewer")


def plot(trainings, path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastattn"  # the same bytes from the same numbers
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, sharey=True, layout="tight", figsize=(8, 3.5))
    for x, style in zip(trainings, ("-", "--"), strict=True):
        left.plot(x.losses, style, label=f"{x.name}, {x.kept / 1e6:.0f} MB a step")
        clock = statistics.median(x.seconds)
        right.plot([clock * i for i in range(len(x.losses))], x.losses, style)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="seconds")
    left.legend()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--keep", type=int, default=64, help="keys that SparseK keeps")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--plot", metavar="SVG", help="losses by step and by time")
    given = parser.parse_args()
    trainings = [
        Training(name, given.length, given.keep, given.window, given.rate) for name in NAMES
    ]
    for number, letters in enumerate(batches(given.steps, given.length)):
        for training in trainings[:: 1 if number % 2 else -1]:  # each is first in turn
            training.step(letters)
        if (number + 1) % max(given.steps // 20, 1) == 0:
            losses = ", ".join(f"{x.name} {x.losses[-1]:.5f}" for x in trainings)
            print(f"step {number + 1}: {losses}", flush=True)
    report(trainings, given.length, given.keep, given.window)
    if given.plot:
        plot(trainings, given.plot)


if __name__ == "__main__":
    main()
