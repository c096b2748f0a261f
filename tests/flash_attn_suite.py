"""flash-attention's own tests/test_flash_attn.py through fastattn.flash_attn, on the CPU.

`python tests/flash_attn_suite.py CHECKOUT --cases 3000`, with the path of a clone of
flash-attention, and einops and pytest, which that file imports. Of each of its functions as many
cases are drawn as of each other, by a seed; what asks for the device "cuda" gets the CPU. A case is
right where the file's own assertions hold, forward and backward; it is refused where fastattn has a
sentence for it.
"""

import argparse
import collections
import importlib.util
import math
import random
import sys
import time
import types
from pathlib import Path

import fastattn.flash_attn.bert_padding
import pytest
import torch
from torch.overrides import TorchFunctionMode

MORE = {
    "_get_block_size_n": None,
    "USE_TRITON_ROCM": False,
}  # what the file imports, and we have not
OFTEN = 50  # loops of so many rounds only repeat


class OnTheCPU(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), keywords=None):
        keywords = dict(keywords or {})
        if keywords.get("device") == "cuda":
            keywords["device"] = "cpu"
        return function(*args, **keywords)


def rotate(x, cos, sin, seqlen_offsets, interleaved):
    """Rows of x (b, s, h, d) turned by the angles of their positions, from the offsets on."""
    half = cos.shape[1]
    at = seqlen_offsets[:, None].long() + torch.arange(x.shape[1])
    cos, sin = (table[at.clamp(max=len(table) - 1)].unsqueeze(2).float() for table in (cos, sin))
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    y, (a, b) = x.clone(), (x[..., part].float() for part in (first, second))
    y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y


def module(name, **contents):
    made = sys.modules[name] = types.ModuleType(name)
    vars(made).update(contents)


def load(checkout, repeats):
    """The test file, with fastattn under the name of flash_attn."""
    ours = fastattn.flash_attn
    sys.modules["flash_attn"] = ours
    sys.modules["flash_attn.bert_padding"] = ours.bert_padding
    module("flash_attn.flash_attn_interface", **vars(ours.flash_attn_interface), **MORE)
    module("flash_attn.layers")
    module("flash_attn.layers.rotary", apply_rotary_emb=rotate)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=2**37)
    path = Path(checkout) / "tests" / "test_flash_attn.py"
    spec = importlib.util.spec_from_file_location("their_tests", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    theirs.range = lambda n: range(n if n < OFTEN else repeats)
    return {name: f for name, f in vars(theirs).items() if name.startswith("test_")}


def axes(function):
    """Its parametrize marks, each as dicts of arguments."""
    for mark in getattr(function, "pytestmark", ()):
        if mark.name == "parametrize":
            names, values = mark.args
            names = [n.strip() for n in names.split(",")]
            yield [dict(zip(names, x if len(names) > 1 else [x], strict=True)) for x in values]


def is_long(arguments, longest):
    return any("seqlen" in name and n > longest for name, n in arguments.items())


def draw(functions, number, longest, seed):
    """So many cases, (name, arguments): of each function the same number, or all that it has."""
    rng = random.Random(seed)
    spread = {name: draw_of(f, longest, rng) for name, f in functions.items()}
    drawn = []
    while spread and len(drawn) < number:
        for name, mine in list(spread.items()):
            if (arguments := next(mine, None)) is None:
                del spread[name]
            elif len(drawn) < number:
                drawn.append((name, arguments))
    return drawn


def draw_of(function, longest, rng):
    """All cases of a function, in a random order."""
    choices = [[x for x in axis if not is_long(x, longest)] for axis in axes(function)]
    seen, total = set(), math.prod(map(len, choices))
    while len(seen) < total:
        number = rng.randrange(total)
        if number in seen:
            continue
        seen.add(number)
        arguments = {}
        for choice in choices:
            number, at = divmod(number, len(choice))
            arguments |= choice[at]
        yield arguments


def causes(error):
    while error is not None:
        yield error
        error = error.__context__


def run(function, arguments):
    """("right", ""), or why not."""
    try:
        with OnTheCPU():
            function(**arguments)
    except pytest.skip.Exception as skipped:
        return "skipped by the file", str(skipped)
    except (Exception, pytest.fail.Exception) as error:
        for cause in causes(error):
            if isinstance(cause, (NotImplementedError, ImportError)):
                return "refused", str(cause).partition(" (")[0]
        return "wrong", f"{type(error).__name__}: {str(error)[:300]}"
    return "right", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout")
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--longest", type=int, default=256, help="queries or keys of a case")
    parser.add_argument("--repeats", type=int, default=3, help="of what the file does 50 times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the functions' names")
    given = parser.parse_args()
    functions = load(given.checkout, given.repeats)
    functions = {name: f for name, f in functions.items() if given.only in name}
    drawn = draw(functions, given.cases, given.longest, given.seed)
    said, of_function, start = collections.Counter(), collections.Counter(), time.time()
    sys.stdout, out = open("/dev/null", "w"), sys.stdout  # noqa: SIM115 - the file prints
    for n, (name, arguments) in enumerate(drawn, 1):
        verdict, why = run(functions[name], arguments)
        said[verdict, why if verdict != "wrong" else ""] += 1
        of_function[name, verdict] += 1
        if verdict == "wrong":
            print(f"WRONG {name}({arguments})\n  {why}", file=out, flush=True)
        if n % 100 == 0:
            print(f"{n} of {len(drawn)}, {time.time() - start:.0f} s", file=out, flush=True)
    for (name, verdict), count in sorted(of_function.items()):
        print(f"{count:6} {verdict:20} {name}", file=out)
    for (verdict, why), count in said.most_common():
        print(f"{count:6} {verdict}{why and ': '}{why}", file=out)
    sys.exit(any(verdict == "wrong" for verdict, _ in said))


if __name__ == "__main__":
    main()
