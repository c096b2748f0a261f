"""Calls into poisoned memory that are judged, and what they are made with."""

import fastattn

import gpu
from gpu import normal, torch

SIZES = (64, 128, 256)
CAUSAL = (False, True, "top-left")


def poisoned(q, v):
    return torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype, device=q.device)


def check(q, k, v, most=16, **keywords):
    """Calls (bhsd) into poisoned memory, and judges. Without lse another variant may run."""
    out, bare = poisoned(q, v), poisoned(q, v)
    got, lse = fastattn.attention(q, k, v, out=out, return_lse=True, **keywords)
    assert got is out
    fastattn.attention(q, k, v, out=bare, **keywords)
    keywords.pop("batch_invariant", None)
    assert gpu.complaints(out, lse, q, k, v, most=most, **keywords) == []
    if not torch.equal(bare, out):
        assert gpu.complaints(bare, None, q, k, v, most=most, **keywords) == []
    return out, lse


def restrided(x, how):
    """The same values in poisoned memory of other strides."""
    b, h, s, d = x.shape
    if how == "padded rows":  # strides in units of 16 bytes
        room = x.new_full((b, h, s + 3, d + 8), torch.nan)[:, :, :s, :d]
    elif how == "odd rows":  # strides of an odd number of elements
        room = x.new_full((b, h, s + 3, d + 1), torch.nan)[:, :, :s, :d]
    elif how in ("rows of 4 bytes", "rows of 8 bytes"):  # base and strides are multiples of
        room = x.new_full((b, h, s + 3, d + d % 2 + int(how[8]) // 2), torch.nan)[:, :, :s, :d]
    elif how == "odd heads":
        room = (
            x.new_full((b, s, h * d + 1), torch.nan)[..., : h * d]
            .unflatten(2, (h, d))
            .transpose(1, 2)
        )
    elif how == "odd base":
        room = x.new_full((b, h, s, d + 8), torch.nan)[..., 1 : d + 1]
    elif how == "packed":  # one buffer of (b, s, 3, h, d)
        room = x.new_full((b, s, 3, h, d), torch.nan)[:, :, 1].transpose(1, 2)
    elif how == "every second":
        room = x.new_full((b, 2 * h, 2 * s, d), torch.nan)[:, ::2, ::2]
    elif how == "strided columns":
        room = x.new_full((b, h, s, 2 * d), torch.nan)[..., ::2]
    room.copy_(x)
    return room


STRIDES = (
    "padded rows",
    "odd rows",
    "rows of 4 bytes",
    "rows of 8 bytes",
    "odd heads",
    "odd base",
    "packed",
    "every second",
    "strided columns",
)


def slopes(*shape):
    return 0.5 ** (8 * torch.rand(shape, generator=torch.Generator().manual_seed(3))).cuda()


def sinks(h):
    return 3 * normal(h, dtype=torch.float32, seed=11)


def masks(kind, shape, seed=5):
    """A mask of random, of equal, and of whole rows and blocks of keys."""
    x = normal(*shape, dtype=torch.float32, seed=seed)
    if kind != "bool":
        x = torch.where(x < -1.5, -torch.inf, x) if seed % 2 else x
        return x.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind])
    x = x > 0
    if shape[-2] > 1:
        x[..., shape[-2] // 3, :] = False
    x[..., shape[-1] // 4 : shape[-1] // 2] &= shape[-2] > 1
    return x


CHANGES = {
    "softcap": {"softcap": 5.0},
    "softcap, near": {"softcap": 50.0},
    "softcap, far": {"softcap": 0.5},
    "alibi": {"alibi_slopes": lambda b, h, *_: slopes(h)},
    "alibi of each sequence": {"alibi_slopes": lambda b, h, *_: slopes(b, h)},
    "sink": {"sink": lambda b, h, *_: sinks(h)},
    "high sink": {"sink": lambda b, h, *_: sinks(h) + 300},
    "dropout": {"dropout_p": 0.1, "seed": 2**40 + 3},
}


def sent(changes, q, k):
    sizes = (*q.shape[:3], k.shape[2])
    return {name: x(*sizes) if callable(x) else x for name, x in changes.items()}


MIXED = [(300, 300), (1, 200), (0, 7), (5, 0), (64, 64), (17, 129), (0, 0), (1000, 1000), (129, 40)]


def check_packed(q, k, v, lengths, sequences=None, most=4, longest=None, **keywords):
    """Calls into poisoned memory, with and without lse, and judges."""
    *cu, most_q, most_k = gpu.offsets(lengths)
    limits = longest or (most_q, most_k)
    on_gpu = {
        name.replace("q_lengths", "seqused_q").replace("k_lengths", "seqused_k"): torch.tensor(
            x, dtype=torch.int32, device="cuda"
        )
        if name in ("q_lengths", "k_lengths")
        else x
        for name, x in keywords.items()
    }
    out, bare = (torch.full((*q.shape[:2], v.shape[2]), torch.nan).to(q) for _ in range(2))
    got, lse = fastattn.attention_varlen(q, k, v, *cu, *limits, out=out, return_lse=True, **on_gpu)
    assert got is out and lse.shape == (q.shape[1], q.shape[0])
    fastattn.attention_varlen(q, k, v, *cu, *limits, out=bare, **on_gpu)
    keywords.pop("batch_invariant", None)
    judged = (q, k, v, lengths, sequences, most)
    assert gpu.packed_complaints(out, lse, *judged, **keywords) == []
    if not torch.equal(bare, out):
        assert gpu.packed_complaints(bare, None, *judged, **keywords) == []
    return out, lse


def sent_packed(changes, lengths, h):
    *_, most_q, most_k = gpu.offsets(lengths)
    sizes = len(lengths), h, most_q, most_k
    return {name: x(*sizes) if callable(x) else x for name, x in changes.items()}


USED = {  # of MIXED
    "q_lengths": [299, 1, 0, 0, 10, 17, 0, 700, 65],
    "k_lengths": [1, 129, 0, 0, 64, 128, 5, 1000, 39],
}
