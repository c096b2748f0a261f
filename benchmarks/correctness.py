"""Inputs that PyTorch's or JAX's own attention gets wrong or refuses, and what fastattn gives.

    python benchmarks/correctness.py                 # on the GPU if there is one, else on the CPU

Each input goes to torch.nn.functional.scaled_dot_product_attention as it stands ("default"), to
the same held to one of its backends, to jax.nn.dot_product_attention where that is asked the same,
and to fastattn. "right" is the rule of the tests: no more than twice the error of a careful unfused
computation, against float64, and the rounding of the output. Empty: not asked, or no answer.
Prints a table in Markdown, with --json FILE also writes it for benchmarks/report.py. Fails if
fastattn is wrong.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import multiprocessing
import os
import pathlib
import sys
import warnings
from dataclasses import dataclass, field

import fastattn
import report
import torch
from fastattn.bench import formula
from fastattn.bench.arrays import arrays_for, gpu_usable
from fastattn.bench.cli import recorded
from fastattn.bench.machine import caption, environment, git
from fastattn.bench.report import dump
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

B, H, S, D = 2, 4, 100, 64
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Input:
    """One call of scaled_dot_product_attention; `keywords` are its own."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    sk: int = S
    keywords: dict = field(default_factory=dict)
    jax: bool = False  # jax.nn.dot_product_attention is asked too


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def all_inputs():
    empty_row = random(S, S, seed=3) > 0
    empty_row[7] = False
    causal = {"is_causal": True}
    return [
        Input("causal, scale -0.3", keywords=causal | {"scale": -0.3}),
        Input("causal, scale 0", keywords=causal | {"scale": 0.0}),
        Input("float16, float32 mask", torch.float16, keywords={"attn_mask": random(S, S, seed=4)}),
        Input("bool mask, a row sees nothing", keywords={"attn_mask": empty_row}, jax=True),
        Input("transposed mask", keywords={"attn_mask": random(S, S, seed=5).bfloat16().mT}),
        Input("causal, 80 keys for 100 queries", sk=80, keywords=causal),
        Input("dropout_p 1", keywords={"dropout_p": 1.0}),
    ]


def expected(q, k, v, real, attn_mask=None, is_causal=False, scale=D**-0.5, dropout_p=0.0):
    """The definition, in `real`; for float32 with P and the output rounded to the inputs' dtype."""
    low = real == torch.float32
    seen, change = torch.ones(1, q.shape[2], k.shape[2], dtype=torch.bool), {"scale": scale}
    if is_causal:
        seen = seen.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        change["added"] = attn_mask
    if dropout_p:
        change |= {"kept": torch.zeros_like(seen), "dropout_p": dropout_p}
    if low:
        change["narrow"] = lambda p: p.to(q.dtype).float()
    heads = (x.flatten(0, 1).to(real) for x in (q, k, v))
    out = formula.attention(torch, *heads, seen, **change).out.unflatten(0, q.shape[:2])
    return out.to(q.dtype).double() if low else out


def judge(out, exact, low):
    """(right, words) of a result."""
    out = out.double().cpu()
    nan = out.isnan().double().mean().item()
    if nan:
        return False, f"NaN in {nan:.0%}".replace("%", " %")
    rounding = ((exact.to(low[1]) + 0.3).to(low[1]) - 0.3).to(low[1]).double() - exact
    bound = 2 * (low[0] - exact).abs().max() + 2 * rounding.abs().max()
    error = (out - exact).abs().max()
    return (True, "right") if error <= bound else (False, f"off by {error:.2g}")


def callers(item, device):
    """The names of everyone who is asked, each with the call of its q, k, v and keywords."""

    def held(backend):
        def call(q, k, v, keywords):
            with sdpa_kernel(backend):
                return torch_sdpa(q, k, v, **keywords)

        return call

    calls = {"default": lambda q, k, v, keywords: torch_sdpa(q, k, v, **keywords)}
    if device == "cuda":
        calls |= {name: held(backend) for name, backend in BACKENDS.items()}
    if item.jax and importlib.util.find_spec("jax"):
        for kind in ("xla", "cudnn") if device == "cuda" else ("xla",):
            calls[f"JAX {kind}"] = functools.partial(ask_jax, kind)
    calls["fastattn"] = lambda q, k, v, keywords: fastattn.scaled_dot_product_attention(
        q, k, v, **keywords
    )
    return calls


def ask_jax(kind, q, k, v, keywords):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the GPU is torch's too
    import jax

    q, k, v = (
        jax.numpy.asarray(x.transpose(1, 2).float().cpu().numpy(), jax.numpy.bfloat16)
        for x in (q, k, v)
    )
    mask = jax.numpy.asarray(keywords["attn_mask"].cpu().numpy())[None, None]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=kind)
    return torch.tensor(jax.numpy.asarray(out, jax.numpy.float32).tolist()).transpose(1, 2)


def row_of(index, name, device):
    """What one implementation makes of one input."""
    item = all_inputs()[index]
    q, k, v = (
        random(B, H, s, D, seed=i).to(item.dtype) for i, s in enumerate((S, item.sk, item.sk))
    )
    exact = expected(q, k, v, torch.float64, **item.keywords)
    low = expected(q, k, v, torch.float32, **item.keywords), item.dtype
    moved = {
        n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in item.keywords.items()
    }
    row = {"suite": "correctness", "input": item.name, "implementation": name}
    call = callers(item, device)[name]
    try:
        with warnings.catch_warnings():  # why each backend refuses
            warnings.simplefilter("ignore")
            right, words = judge(call(*(x.to(device) for x in (q, k, v)), moved), exact, low)
    except Exception as error:  # a refusal is a result
        right, words = False, "refused"
        row["said"] = " ".join(str(error).split())[:200]
    return row | {"right": right, "verdict": words}


def all_rows(device):
    """Every input by every implementation, in a process beside this one; of one that ends it there
    is no row."""
    pool, context = None, multiprocessing.get_context("spawn")
    for index, item in enumerate(all_inputs()):
        for name in callers(item, device):
            pool = pool or concurrent.futures.ProcessPoolExecutor(1, context)
            try:
                yield pool.submit(row_of, index, name, device).result()
            except concurrent.futures.process.BrokenProcessPool:
                pool = None
    if pool:
        pool.shutdown()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if gpu_usable() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--commit", help="to be recorded; default: of this tree")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    commit = options.commit or git(pathlib.Path(__file__).resolve().parent.parent)

    rows = list(all_rows(options.device))
    command = recorded("python benchmarks/correctness.py", sys.argv[1:])
    header = environment(arrays_for(options.device), command, commit)
    print(caption(header), end=":\n\n")
    print("\n".join(report.verdicts(rows)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(dump({"header": header, "rows": rows}))
    wrong = [row for row in rows if row["implementation"] == "fastattn" and not row["right"]]
    return f"fastattn is wrong or refuses: {wrong}" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
