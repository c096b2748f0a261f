"""`python -m fastattn.bench.generate`: tokens of a Llama of transformers on a GPU, with fastattn's
attention and with torch's.

One static cache, filled with the same prompts, serves all ways in turn:

    fastattn     register(), attn_implementation="fastattn"
    sdpa         transformers' own
    direct       F.scaled_dot_product_attention(enable_gqa=True) over the keys that there are

Each says its tokens greedily; those of fastattn and of sdpa are compared, up to the first that
differs in a sequence, for behind it the two read other texts. Then a step is captured in a CUDA
graph at the first and the last of these tokens, and the graphs are replayed in turn. A step without
attention is timed, too: what is left is attention's share, and what it predicts.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys

from .arrays import arrays_for, gpu_usable
from .machine import environment
from .report import aligned

ROUNDS = 30


@dataclasses.dataclass(frozen=True)
class Config:
    b: int = 1
    start: int = 8192
    tokens: int = 256
    layers: int = 8
    width: int = 2048
    heads: int = 16
    kv_heads: int = 8
    inner: int = 5632
    words: int = 32_000

    @property
    def label(self):
        heads = f"h{self.heads}:{self.kv_heads}"
        return f"{self.layers} layers of {self.width} {heads} b{self.b} {self.start}+{self.tokens}"


class Ways:
    """The model under names of its attention; `seen` is how many keys `direct` attends to."""

    def __init__(self, torch, config, device):
        import transformers

        import fastattn.transformers

        self.torch, self.config, self.seen = torch, config, 0
        fastattn.transformers.register()
        names = transformers.AttentionInterface, transformers.AttentionMaskInterface
        for name, attend in (("direct", self.direct), ("none", self.nothing)):
            names[0].register(name, attend)
            names[1].register(name, lambda *given, **more: None)
        room = config.start + config.tokens
        shape = transformers.LlamaConfig(
            hidden_size=config.width,
            intermediate_size=config.inner,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.words,
            max_position_embeddings=room,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with torch.device(device):
            self.model = transformers.LlamaForCausalLM(shape).to(torch.bfloat16).eval()
        self.cache = transformers.StaticCache(config=shape, max_cache_len=room)

    def direct(self, module, q, k, v, mask, scaling=None, **more):
        k, v = (x[:, :, : self.seen] for x in (k, v))
        sdpa = self.torch.nn.functional.scaled_dot_product_attention
        out = sdpa(q, k, v, is_causal=q.shape[2] > 1, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    def nothing(self, module, q, k, v, mask, **more):
        return q.transpose(1, 2), None

    def at(self, length):
        """The cache has so many keys from now on."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(length)
        self.seen = length

    def step(self, words, positions):
        """What follows the last of `words` (b, n), which lie at `positions` (1, n)."""
        out = self.model(
            words, position_ids=positions, past_key_values=self.cache, logits_to_keep=1
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def fill(self, words):
        """The prompts', a few sequences' worth of scores at a time; the words that follow."""
        self.model.set_attn_implementation("fastattn")
        numbers = self.torch.arange(words.shape[1], device=words.device)[None]
        self.at(0)
        piece, following = max(1, words.shape[1] // max(1, self.config.b)), None
        for first in range(0, words.shape[1], piece):
            mine = slice(first, first + piece)
            following = self.step(words[:, mine], numbers[:, mine])
        return following

    def say(self, way, word):
        """So many tokens from `word` on, one by one: (b, tokens)."""
        self.model.set_attn_implementation(way)
        said, start = [], self.config.start
        self.at(start)
        position = self.torch.full((1, 1), start, device=word.device)
        for n in range(self.config.tokens):
            said.append(word)
            self.seen = start + n + 1
            word = self.step(word, position)
            position += 1
        return self.torch.cat(said, 1)

    def captured(self, way, word, length):
        """A graph of the step that makes `length` keys into one more; a replay begins there."""
        torch = self.torch
        self.model.set_attn_implementation(way)
        position = torch.full((1, 1), length, device=word.device)
        self.at(length)
        self.seen = length + 1
        counts = [layer.cumulative_length for layer in self.cache.layers]

        def step():
            for count in counts:
                count.fill_(length)
            return self.step(word, position)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = step()
        return graph, kept


def agreement(a, b):
    """(tokens before the first that differs, summed over sequences; all)."""
    same = (a == b).long().cumprod(1)
    return int(same.sum()), same.numel()


def times_of(arrays, graphs):
    """{way: ms of a step}, replayed in turn."""
    taken = {way: [] for way in graphs}
    for turn in range(ROUNDS):
        for way in list(graphs)[:: 1 if turn % 2 else -1]:
            taken[way] += arrays.seconds([graphs[way][0].replay], 1, 2)
    return {way: statistics.median(x) * 1e3 for way, x in taken.items()}


def measure(arrays, config):
    torch = arrays.torch
    with torch.inference_mode():
        ways = Ways(torch, config, arrays.device)
        shape = config.b, config.start
        words = torch.randint(config.words, shape, device=arrays.device)
        word = ways.fill(words)
        said = {way: ways.say(way, word) for way in ("fastattn", "sdpa", "direct")}
        found = []
        for length in (config.start, config.start + config.tokens - 1):
            names = ("fastattn", "sdpa", "direct", "none")
            found.append(times_of(arrays, {x: ways.captured(x, word, length) for x in names}))
    ms = {way: statistics.mean(x[way] for x in found) for way in found[0]}
    rest = ms["none"]
    attention = {way: ms[way] - rest for way in ("fastattn", "direct")}
    return {
        "suite": "generate",
        "label": config.label,
        "ms": ms,
        "same": {way: agreement(said["fastattn"], said[way]) for way in ("sdpa", "direct")},
        "x sdpa": ms["sdpa"] / ms["fastattn"],
        "x direct": ms["direct"] / ms["fastattn"],
        "share": attention["fastattn"] / ms["fastattn"],
        "attention": attention["direct"] / attention["fastattn"],
    }


def lines(rows):
    names = "fastattn", "sdpa", "direct", "none"
    yield ["ms a step", *names, "x sdpa", "x direct", "attention", "x its direct", "same as sdpa"]
    for row in rows:
        times = [f"{row['ms'][name]:.3f}" for name in names]
        ratios = [f"{row[name]:.3f}" for name in ("x sdpa", "x direct")]
        same, whole = row["same"]["sdpa"]
        share = [f"{row['share']:.0%}", f"{row['attention']:.2f}", f"{same} of {whole}"]
        yield [row["label"], *times, *ratios, *share]


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.generate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batches", default="1,16", help="sequences; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write header and rows")
    parser.add_argument("--commit", help="to be recorded")
    args = parser.parse_args(argv)
    if not gpu_usable():
        sys.exit("needs torch, and a GPU that fastattn has kernels for")
    arrays, rows = arrays_for("cuda"), []
    for b in map(int, args.batches.split(",")):
        rows.append(measure(arrays, Config(b=b)))
        print("\n".join(aligned(list(lines(rows[-1:])))), flush=True)
        arrays.release()
    if args.json:
        header = environment(arrays, "python -m fastattn.bench.generate", args.commit)
        pathlib.Path(args.json).write_text(json.dumps({"header": header, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
