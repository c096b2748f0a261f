"""A small GPT trained on Python's own manual, with torch's attention and with fastattn's, in turn.

    python benchmarks/train_gpt.py --plot benchmarks/train_gpt.svg

Both models start from the same weights and see the same bytes; only use_fastattn() differs. Said
are the losses, how far they are apart, tokens/s, and what attention's share of a step predicts.
"""

import argparse
import pydoc_data.topics
import statistics
import time

import torch
import torch.nn.functional as F  # noqa: N812
from fastattn.torch import use_fastattn
from torch import nn

HEADS, HEAD_SIZE = 8, 64
WIDTH = HEADS * HEAD_SIZE
NAMES = ("torch", "fastattn")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        qkv = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, HEAD_SIZE))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class GPT(nn.Module):
    def __init__(self, layers, length):
        super().__init__()
        self.letters, self.places = nn.Embedding(256, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks, self.last = (
            nn.Sequential(*(Block() for _ in range(layers))),
            nn.LayerNorm(WIDTH),
        )
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(
                    weight, std=0.02 / (2 * layers) ** ("out" in name or "narrow" in name)
                )

    def forward(self, letters, following):
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        logits = self.last(self.blocks(x)) @ self.letters.weight.T
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


class Training:
    """One of the two models, and what its steps took."""

    def __init__(self, name, layers, length, rate):
        torch.manual_seed(0)
        self.name, self.model = name, GPT(layers, length)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate)
        self.losses, self.seconds, self.attention = [], [], []

    def run(self, work):
        start = time.perf_counter()
        if self.name == "fastattn":
            with use_fastattn("raise"):
                result = work()
        else:
            result = work()
        return result, time.perf_counter() - start

    def step(self, letters):
        def work():
            loss = self.model(letters[:, :-1], letters[:, 1:])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return loss.item()

        loss, seconds = self.run(work)
        self.losses.append(loss)
        self.seconds.append(seconds)

    def attend(self, qkv, dout, layers):
        """One layer's attention alone, forward and backward: counted for all layers."""

        def work():
            out = F.scaled_dot_product_attention(*qkv, is_causal=True)
            return torch.autograd.grad(out, qkv, dout)

        self.attention.append(layers * self.run(work)[1])


def batches(steps, length):
    text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    letters = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    for start in torch.randint(len(letters) - length - 1, (steps,), generator=generator).tolist():
        yield letters[None, start : start + length + 1]


def train(steps, layers, length, rate, every):
    trainings = [Training(name, layers, length, rate) for name in NAMES]
    *qkv, dout = torch.randn(4, 1, HEADS, length, HEAD_SIZE)
    qkv = [x.requires_grad_() for x in qkv]
    for number, letters in enumerate(batches(steps, length)):
        for training in trainings[:: 1 if number % 2 else -1]:  # each is first in turn
            training.step(letters)
            if number < 30:
                training.attend(qkv, dout, layers)
        if (number + 1) % every == 0:
            losses = ", ".join(f"{x.name} {x.losses[-1]:.5f}" for x in trainings)
            print(f"step {number + 1}: {losses}", flush=True)
    return trainings


def report(trainings, length):
    theirs, ours = trainings
    apart = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    print(f"losses at most {apart:.1e} apart")
    step, attention = {}, {}
    for x in trainings:
        step[x.name], attention[x.name] = map(statistics.median, (x.seconds, x.attention))
        share = attention[x.name] / step[x.name]
        speed = length / step[x.name]
        print(f"{x.name}: {speed:.0f} tokens/s, attention is {share:.0%} of a step")
    gain = step["torch"] / step["fastattn"]
    rest = step["torch"] - attention["torch"]
    predicted = step["torch"] / (rest + attention["fastattn"])
    print(f"fastattn's steps are {gain:.2f} times as fast; its attention predicts {predicted:.2f}")


def plot(trainings, path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fastattn"  # the same bytes from the same numbers
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, height_ratios=(3, 1), layout="tight")
    for x, style in zip(trainings, ("-", "--"), strict=True):
        above.plot(x.losses, style, label=x.name)
    above.set_ylabel("loss")
    above.legend()
    apart = [abs(a - b) for a, b in zip(*(x.losses for x in trainings), strict=True)]
    below.semilogy(apart, color="gray")
    below.set(xlabel="step", ylabel="apart")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--plot", metavar="SVG", help="losses and how far they are apart")
    given = parser.parse_args()
    every = max(given.steps // 20, 1)
    trainings = train(given.steps, given.layers, given.length, given.rate, every)
    report(trainings, given.length)
    if given.plot:
        plot(trainings, given.plot)


if __name__ == "__main__":
    main()
