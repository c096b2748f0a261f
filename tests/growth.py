"""Calls with a gradient, and whether memory grows by them: `python tests/growth.py 100000`.

Every kind of call in turn, of tiny tensors, with its backward pass. What leaks grows in each of ten
rounds; caches and pools fill in some.
"""

import ctypes
import gc
import itertools
import sys

ROUNDS = 10
LEAST = 8  # bytes for each call that are a leak


class _Heap(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def in_use():
    """(bytes that malloc has given away, blocks of Python's)."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Heap
    gc.collect()
    found = mallinfo2()
    return found.uordblks + found.hblkhd, sys.getallocatedblocks()


def resident():
    """Kilobytes of this process in memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def growth(function, calls):
    """The least that a round of calls adds: (bytes, blocks of Python's) for each call."""
    each = max(1, calls // ROUNDS)
    seen = []
    for _ in range(ROUNDS):
        for _ in range(each):
            function()
        seen.append(in_use())
    rounds = list(itertools.pairwise(seen[1:]))  # the first one imports and caches
    return [min(after[n] - before[n] for before, after in rounds) / each for n in range(2)]


def kinds():
    """Functions that make one call each, forward and backward."""
    import fastattn
    import torch

    def leaf(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    q, k, v = leaf(1, 4, 3, 8), leaf(1, 2, 5, 8), leaf(1, 2, 5, 8)
    mask, sink, ends = leaf(3, 5), leaf(4), torch.tensor([0, 2, 3], dtype=torch.int32)
    flat = [leaf(3, 2, 8, dtype=torch.bfloat16) for _ in range(3)]
    lses = [leaf(1, 4, 3), leaf(1, 4, 3)]
    rest = {"mask": mask, "sink": sink, "dropout_p": 0.5, "causal": True}

    def general():
        out, lse = fastattn.attention(q, k, v, return_lse=True, **rest)
        (out.sum() + lse.sum()).backward()
        for x in (q, k, v, mask, sink):
            x.grad = None

    def drop_in():
        out = fastattn.scaled_dot_product_attention(q, k[:, :1], v[0, :1], is_causal=True)
        torch.autograd.grad(out, (q, k, v), torch.ones(()).expand(out.shape))

    def packed():
        out = fastattn.attention_varlen(*flat, ends, ends, 2, 2)
        torch.autograd.grad(out.sum(), flat)

    def merged():
        out, lse = fastattn.merge_states([q, q], lses)
        torch.autograd.grad(out.sum() + lse.sum(), (q, *lses))

    def gates():
        found = fastattn.sparsek_lists(mask[None], 2, sq=5)[1]
        torch.autograd.grad(found.sum() + fastattn.sparsek(mask, 2)[0].sum(), mask)

    def direct():
        with torch.no_grad():
            out, lse = fastattn.attention(q, k, v, return_lse=True)
            fastattn.attention_backward(out, q, k, v, out, lse, dq=torch.empty_like(q))

    def abandoned():
        fastattn.attention(q, k, v, return_lse=True, **rest)

    def refused():
        try:
            fastattn.attention(q, k, v, out=q)
        except ValueError:
            return
        raise AssertionError("not refused")

    return general, drop_in, packed, merged, gates, direct, abandoned, refused


def main(calls):
    turns = itertools.cycle(kinds())
    bytes_each, blocks_each = growth(lambda: next(turns)(), calls)
    print(
        f"{calls} calls: {bytes_each:.2f} bytes and {blocks_each:.3f} blocks each at least, "
        f"{resident()} kB resident"
    )
    return bytes_each >= LEAST or blocks_each >= 0.05


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
