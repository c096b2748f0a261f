"""Many new tokens over a cache in pages on a GPU: the forward kernel's paged variants, and decode
kernels beside them for sequences of few rows."""

from dataclasses import replace

import cases
import fastattn
import kvcache_cases
import numpy as np
import pytest

import gpu
from gpu import DTYPES, normal, torch

pytestmark = gpu.marks

SIZES = (1, 7, 8, 16, 64, 192, 256)
MANY = kvcache_cases.Case(
    seed=1, sq=90, s_new=90, hq=8, d=64, dv=64, room=640, page_size=64, dtype="bfloat16", out=True
)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def kernel_of(size, d):
    """What is expected to read pages of so many keys."""
    block = 64 if d > 128 else 128
    whole = size % block == 0 or (block % size == 0 and size % 8 == 0)
    if whole and d % 8 == 0:
        return "_pages"
    return "_pages_strided" if d <= 128 else "sm90_decode_"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("d", [20, 64, 72, 128, 256])
@pytest.mark.parametrize("size", SIZES)
def test_new_tokens_of_one_length(size, d, dtype):
    """Appended, rotated, attended to: kvcache_cases poisons what is not a sequence's own."""
    more = {"room": -(-600 // size) * size, "page_size": size, "seed": size + d}
    case = replace(MANY, d=d, dv=d, rotary=16, dtype=dtype, **more)
    inputs = kvcache_cases.Inputs(case)
    arrays = kvcache_cases.Arrays(case, inputs, cases.Torch("cuda"))
    given = arrays.q, arrays.k_cache, arrays.v_cache, arrays.seqlens
    chosen = fastattn.explain(fastattn.attention_kvcache, *given, **arrays.keywords, causal=True)
    kernel = kernel_of(size, d)
    assert chosen.kernel.endswith(kernel) or chosen.kernel.startswith(kernel), chosen.kernel
    assert not kvcache_cases.run(case, cases.Torch("cuda"), backend="sm90")


@pytest.mark.parametrize(
    "more",
    [
        {"leftpad": True},
        {"window": (70, 3), "causal": False},
        {"window": (30, None), "leftpad": True},
        {"sink": True, "mass": True},
        {"page_size": None, "batch_idx": True, "packed": True},
        {"packed": True, "causal": "top-left"},
        {"packed": True, "mass": True, "page_size": 5},
        {"dv": 40, "scale": -0.3},
        {"storage": "strided"},
        {"invariant": True},
        {"invariant": True, "packed": True},
        {"softcap": 3.0, "alibi": 2},
        {"lengths": "int", "hk": 8},
        {"hk": 1, "b": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [64, 128])
def test_what_else_a_call_asks_for(more, d):
    for seed in range(4):
        case = replace(MANY, seed=seed, **{"d": d, "dv": d, "rotary": None, **more})
        assert not kvcache_cases.run(case, cases.Torch("cuda"), backend="sm90")


def cache(lengths, size, hk, d, dtype, seed=0):
    """k and v of pages in any order, NaN where no key is, and the table, -1 where no page is."""
    columns = -(-max(lengths) // size) + 1
    order = torch.randperm(len(lengths) * columns + 1, device="cuda")[:-1].int()
    table = order.reshape(-1, columns).clone()
    pages = [
        normal(len(lengths) * columns + 1, size, hk, d, dtype=dtype, seed=seed + n) for n in (1, 2)
    ]
    for n, length in enumerate(lengths):
        used = -(-length // size)
        for x in pages:
            x[table[n, used:].long()] = torch.nan
            if length % size:
                x[int(table[n, used - 1]), length % size :] = torch.nan
        table[n, used:] = (-1, 2**30)[n % 2]
    return *pages, table


ROWS, LENGTHS = [700, 1, 4, 300, 1, 0, 5, 66, 1], [900, 2000, 31, 300, 1999, 7, 500, 66, 0]


def chunked(q, k, v, table, rows, lengths, **keywords):
    ends = int32(*np.cumsum([0, *rows]).tolist())
    return fastattn.attention_varlen(
        *(q, k, v, ends, None, max(rows), max(lengths)),
        page_table=table,
        seqused_k=int32(*lengths),
        causal=True,
        return_lse=True,
        **keywords,
    )


def wrong(out, lse, q, k, v, table, rows, lengths, used=None):
    """Complaints about each sequence, and about the rows of none."""
    ends, found = np.cumsum([0, *rows]).tolist(), []
    for n, length in enumerate(lengths):
        count = rows[n] if used is None else min(used[n], rows[n])
        mine, rest = slice(ends[n], ends[n] + count), slice(ends[n] + count, ends[n + 1])
        if out[rest].any() or (lse[:, rest] != -torch.inf).any():
            found.append(f"padding of sequence {n}")
        if not count:
            continue
        if not length:
            found += [f"sequence {n}"] * bool(out[mine].any() or (lse[:, mine] > -torch.inf).any())
            continue
        pages = table[n, : -(-length // k.shape[1])].long()
        own = [x[pages].flatten(0, 1)[None, :length].transpose(1, 2) for x in (k, v)]
        said = out[None, mine].transpose(1, 2), lse[None, :, mine]
        complaints = gpu.complaints(*said, q[None, mine].transpose(1, 2), *own, most=4, causal=True)
        found += [f"sequence {n}: {x}" for x in complaints]
    if out[ends[-1] :].any() or (lse[:, ends[-1] :] != -torch.inf).any():
        found.append("rows of no sequence")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(16, 4), (8, 8), (64, 2), (66, 1)])
@pytest.mark.parametrize(("size", "d"), [(64, 128), (16, 64), (1, 128), (128, 256), (100, 64)])
def test_prompts_beside_single_tokens(size, d, heads, dtype):
    """Where a sequence has few rows a decode kernel has it, else the forward kernel."""
    k, v, table = cache(LENGTHS, size, heads[1], d, DTYPES[dtype])
    q = normal(sum(ROWS) + 3, heads[0], d, dtype=DTYPES[dtype])
    q[sum(ROWS) :] = torch.nan
    given = q, k, v, table, ROWS, LENGTHS
    assert not wrong(*chunked(*given), *given)


@pytest.mark.parametrize("size", [16, 3])
def test_padding_among_rows(size):
    """A sequence of few rows with padding is not the decode kernel's: it writes no padding."""
    used = [650, 1, 2, 0, 0, 0, 5, 66, 1]
    k, v, table = cache(LENGTHS, size, 4, 128, torch.bfloat16)
    q = normal(sum(ROWS), 16, 128)
    given = q, k, v, table, ROWS, LENGTHS
    out, lse = chunked(*given, seqused_q=int32(*used))
    assert not wrong(out, lse, *given, used=used)


def test_the_same_bits_every_time_and_in_other_batches():
    k, v, table = cache(LENGTHS, 64, 4, 128, torch.bfloat16)
    q = normal(sum(ROWS), 16, 128)
    first = chunked(q, k, v, table, ROWS, LENGTHS, batch_invariant=True)
    for _ in range(3):
        again = chunked(q, k, v, table, ROWS, LENGTHS, batch_invariant=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    ends = np.cumsum([0, *ROWS]).tolist()
    for n in (0, 1, 6):
        mine = slice(ends[n], ends[n + 1])
        alone = fastattn.attention_varlen(
            *(q[mine], k, v, int32(0, ROWS[n]), None, 700, 2000),
            page_table=table[n : n + 1],
            seqused_k=int32(LENGTHS[n]),
            causal=True,
            batch_invariant=True,
        )
        assert torch.equal(alone, first[0][mine])


def test_a_graph_is_replayed_with_other_prompts():
    """Which sequences are long, and how long, only the device knows."""
    k, v, table = cache([2000] * 6, 32, 4, 128, torch.bfloat16)
    q, total = normal(900, 16, 128), 900
    ends, lengths = int32(0, 400, 401, 402, 700, 800, 900), int32(*[2000] * 6)

    def call():
        return fastattn.attention_varlen(
            *(q, k, v, ends, None, 500, 2000),
            page_table=table,
            seqused_k=lengths,
            causal=True,
            return_lse=True,
        )

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for rows, keys in (
        ([400, 1, 1, 298, 100, 100], [2000] * 6),
        ([1, 1, 500, 1, 0, 397], [1, 64, 1999, 700, 5, 397]),
        ([1, 1, 1, 1, 1, 1], [2000, 3, 900, 64, 65, 0]),
    ):
        ends.copy_(torch.from_numpy(np.cumsum([0, *rows])))
        lengths.copy_(int32(*keys))
        out.fill_(torch.nan)
        graph.replay()
        assert sum(rows) <= total and not wrong(out, lse, q, k, v, table, rows, keys)


def test_a_table_that_makes_no_sense_reads_no_other_memory():
    k, v, table = cache(LENGTHS, 64, 4, 128, torch.bfloat16)
    q = normal(sum(ROWS), 16, 128)
    for value in (-(2**31), -1, 2**31 - 1):
        chunked(q, k, v, torch.full_like(table, value), ROWS, LENGTHS)
    torch.cuda.synchronize()
    given = q, k, v, table, ROWS, LENGTHS
    assert not wrong(*chunked(*given), *given)
