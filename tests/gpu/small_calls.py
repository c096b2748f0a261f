"""One small call per variant and feature, for `compute-sanitizer` and as a first smoke test.

python tests/gpu/small_calls.py [--smoke] [--gradients] [--part I/N]   # variants I, I + N, ...

Inputs are made on the host and judged there, so that ours are the only kernels that run.
"""

import functools
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each array on its own, so that overruns show

import fastattn
import kvcache_cases
import numpy as np
import reference
import reference_backward
import sparsek_cases
from cases import Torch

import gpu
from gpu import DTYPES, merging, test_sparse, torch

SIZES = (
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (160, 160),
    (192, 192),
    (192, 128),
    (256, 256),
)
SHAPES = (  # (b, h, sq, sk): between them every tile shape is the best for some
    (1, 2, 200, 300),
    (1, 1, 40, 60),
    (4, 8, 300, 70),
    (4, 8, 1000, 70),
    (33, 8, 129, 70),
    (4, 8, 300, 1000),
    (1, 8, 40, 300),
    (16, 8, 129, 300),
    (1, 1, 40, 2000),
    (10, 8, 257, 1240),
)


def arrays(b, hq, hk, sq, sk, d, dv, dtype):
    shapes = (b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv)
    return [gpu.normal(*shape, dtype=dtype, seed=i, device="cpu") for i, shape in enumerate(shapes)]


def variants():
    """{name: (head sizes, dtype, shape)} for every variant that some shape here is run by, and of
    the general variants, which run what changes scores."""
    found = {}
    for (d, dv), dtype, shape, change in itertools.product(
        SIZES, DTYPES.values(), SHAPES, ({}, {"softcap": 1.0}, {"return_lse": True})
    ):
        b, h, sq, sk = shape
        shapes = (b, h, sq, d), (b, h, sk, d), (b, h, sk, dv)
        q, k, v = (torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes)
        name = fastattn.explain(fastattn.attention, q, k, v, **change).kernel
        if name:
            found.setdefault(name, ((d, dv), dtype, shape))
    return found


def odd(x):
    """The same values, one element more between the rows: no boxes for the copy engine."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    room[..., :-1] = x
    return room.cuda()[..., :-1]


def apart(x):
    """The same values, one element more between the columns: nothing for the copy engine."""
    room = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
    room[..., 1] = x
    return room.cuda()[..., 1]


def beside(x):
    """The same values, heads side by side and an element apart: they begin anywhere in a row."""
    heads = x.shape[-2 if x.ndim == 3 else 1]
    row = -(-heads * (x.shape[-1] + 1) // 8) * 8
    rows = x if x.ndim == 3 else x.transpose(1, 2)
    room = torch.full((*rows.shape[:-2], row), torch.nan, dtype=x.dtype)
    view = room[..., : heads * (x.shape[-1] + 1)].unflatten(-1, (heads, x.shape[-1] + 1))[..., :-1]
    view.copy_(rows)
    view = placed(view)
    return view if x.ndim == 3 else view.transpose(1, 2)


def placed(x):
    """On the GPU with the strides that it has: a copy would be contiguous."""
    base = x if x._base is None else x._base
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def on_host(x):
    """Copied whole, for a part of it would be gathered by a kernel that is not ours."""
    base = x if x._base is None else x._base
    return base.cpu().as_strided(x.shape, x.stride(), x.storage_offset())


def lengths(b, s):
    return [max(0, s - 70 * i) for i in range(1, b + 1)]


def features(b, hq, sq, sk):
    """(name, changes of the inputs, keywords)."""
    limits = {"q_lengths": lengths(b, sq), "k_lengths": lengths(b, sk), "k_start": [1] * b}
    yield "full", {}, {}
    yield "causal, one key head", {"hk": 1}, {"causal": True}
    yield "narrow heads", {"less": 8}, {"causal": True}  # no load touches their last columns
    yield "window and lengths", {}, {"window": (50, 20), **limits}
    offset = {"q_offset": [sk // 2 - 40 * i for i in range(b)]}
    yield "offsets", {}, {"causal": True, **offset}
    yield "window before", {}, {"window": (90, -7), "q_offset": sk // 2}
    yield "odd strides", {"move": odd}, {"causal": "top-left"}
    yield "columns apart", {"move": apart}, {"causal": "top-left"}
    yield "heads anywhere", {"move": beside}, {"causal": True}
    yield "odd output", {"move_out": odd}, {}
    yield "peaked", {"factor": 100}, {"causal": True}  # tiles that are done again
    yield "sink", {}, {"sink": torch.linspace(-3, 3, hq), **limits}
    yield "packed, full", {"packed": True}, {}
    yield "packed, causal", {"packed": True}, {"causal": True}
    yield "packed, offsets", {"packed": True}, {"window": (-7, 90), **offset}
    yield "packed, odd strides", {"packed": True, "move": odd}, {"causal": "top-left"}
    yield "packed, columns apart", {"packed": True, "move": apart}, {}
    yield "packed, heads anywhere", {"packed": True, "move": beside}, {}
    used = {name: limits[name] for name in ("q_lengths", "k_lengths")}
    yield "packed, sink", {"packed": True}, {"sink": torch.linspace(-3, 3, hq), **used}


def changes(b, hq, sq, sk):
    """As features(), of general variants."""

    def mask(*shape, kind=None):
        x = gpu.normal(*shape, dtype=torch.float32, seed=5, device="cpu")
        if kind:
            return torch.where(x < -1.5, -torch.inf, x).to(kind)
        return (x > 0) & (torch.arange(shape[-1]) // 64 % 3 != 1)

    limits = {"q_lengths": lengths(b, sq), "k_lengths": lengths(b, sk), "k_start": [1] * b}
    slopes, sink = 0.5 ** torch.arange(1.0, hq + 1), torch.linspace(-3, 3, hq)
    yield "softcap", {}, {"softcap": 5.0}
    yield "softcap, narrow heads", {"less": 8}, {"softcap": 5.0}
    yield "softcap, far", {}, {"softcap": 0.5, "causal": True}
    yield "alibi", {"hk": 1}, {"alibi_slopes": slopes, "causal": True}
    offset = {"q_offset": [sk // 2 - 40 * i for i in range(b)], "window": (90, -7)}
    yield "alibi, offsets", {}, {"alibi_slopes": slopes, **offset}
    yield "bool mask, offsets", {}, {"mask": mask(sq, sk), **offset}
    yield "dropout", {}, {"dropout_p": 0.1, "seed": 2**40 + 3}
    yield "bool mask", {}, {"mask": mask(sq, sk), **limits}
    yield "bool mask of each head", {}, {"mask": mask(b, hq, sq, sk), "causal": True}
    yield "bool mask of keys", {}, {"mask": mask(b, 1, 1, sk)}
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        of = str(kind).removeprefix("torch.")
        yield f"{of} mask", {}, {"mask": mask(hq, sq, sk, kind=kind)}
        yield f"odd {of} mask", {}, {"mask": odd_on_host(mask(sq, sk, kind=kind)), **limits}
    everything = {"softcap": 5.0, "alibi_slopes": slopes, "sink": sink, "dropout_p": 0.5, "seed": 1}
    yield "everything", {"move": odd}, {**everything, "mask": mask(b, 1, sq, sk), "causal": True}
    yield "peaked", {"factor": 100}, {"mask": mask(sq, sk, kind=torch.bfloat16)}
    packed, used = {"packed": True}, {n: limits[n] for n in ("q_lengths", "k_lengths")}
    sq, sk = np.max(packed_lengths(b, sq, sk), axis=0).tolist()
    both = {"causal": True, "window": (sk // 2, None)}
    yield "packed, softcap", packed, {"softcap": 5.0}
    yield "packed, alibi and dropout", packed, {"alibi_slopes": slopes, "dropout_p": 0.5, "seed": 1}
    yield "packed, bool mask", packed, {"mask": mask(sq, sk), **both}
    yield "packed, bool mask of each sequence", packed, {"mask": mask(b, hq, sq, sk), **used}
    yield "packed, bool mask of keys", packed | {"hk": 1}, {"mask": mask(b, 1, 1, sk), **both}
    for kind in (torch.bfloat16, torch.float32):
        of = str(kind).removeprefix("torch.")
        yield f"packed, {of} mask", packed, {"mask": mask(b, 1, sq, sk, kind=kind), **both}
        yield f"packed, odd {of} mask", packed, {"mask": odd_on_host(mask(sq, sk, kind=kind))}
    strided = packed | {"move": odd, "hk": 1}
    everything |= {"alibi_slopes": slopes.expand(b, hq).contiguous(), **both, **used}
    yield "packed, everything", strided, {**everything, "mask": mask(b, 1, sq, sk)}
    added = mask(hq, sq, sk, kind=torch.float16)
    yield "packed, everything, added", strided, {**everything, "mask": added}


def odd_on_host(x):
    """The same values, one element more between the rows."""
    return torch.nn.functional.pad(x, (0, 1), value=torch.nan)[..., :-1]


def on_gpu(keywords):
    sent = {
        n: torch.tensor(x, dtype=torch.int32).cuda() if isinstance(x, list) else x
        for n, x in keywords.items()
    }
    return {n: placed(x) if isinstance(x, torch.Tensor) else x for n, x in sent.items()}


def run(name, feature, sizes, dtype, shape, change, keywords):
    (d, dv), (b, h, sq, sk) = (x - change.get("less", 0) for x in sizes), shape
    if change.get("packed"):
        return run_packed(name, feature, sizes, dtype, shape, change, keywords)
    q, k, v = arrays(b, h, change.get("hk", h), sq, sk, d, dv, dtype)
    q = q * change.get("factor", 1)
    move = change.get("move", torch.Tensor.cuda)
    # The output holds something already: initcheck does not see what the copy engine writes.
    out = change.get("move_out", move)(torch.full((b, h, sq, dv), torch.nan, dtype=dtype))
    want_lse = feature != "full"  # some variants give none
    sent = on_gpu(keywords)
    call = functools.partial(
        *(fastattn.attention, *map(move, (q, k, v))), **sent, out=out, return_lse=want_lse
    )
    result = call()
    lse = result[1].cpu() if want_lse else None
    got = on_host(out)
    return report(call, name, feature, gpu.complaints(got, lse, q, k, v, most=8, **keywords))


def packed_lengths(b, sq, sk):
    """Of b sequences whose mean length, by which the variant is chosen, is the shape's."""
    steps = [7 * (-1) ** n if n ^ 1 < b else 0 for n in range(b)]
    lengths = [(sq + n, sk - n) for n in steps]
    lengths[-1] = (lengths[-1][0] - 3, lengths[-1][1] - 3)  # three rows belong to none
    return lengths


def run_packed(name, feature, sizes, dtype, shape, change, keywords):
    (d, dv), (b, h, sq, sk) = sizes, shape
    lengths = packed_lengths(b, sq, sk)
    q, k, v = gpu.packed(lengths, h, change.get("hk", h), d, dv, dtype, (3, 3), device="cpu")
    move = change.get("move", torch.Tensor.cuda)
    out = move(torch.full((*q.shape[:2], dv), torch.nan, dtype=dtype))
    want_lse = "full" not in feature
    sent = on_gpu(keywords)
    used = {n: sent.pop(n) for n in ("q_lengths", "k_lengths") if n in sent}
    sent |= {f"seqused_{n[0]}": x for n, x in used.items()}
    call = functools.partial(
        *(fastattn.attention_varlen, *map(move, (q, k, v)), *gpu.offsets(lengths)),
        **sent,
        out=out,
        return_lse=want_lse,
    )
    result = call()
    lse = result[1].cpu() if want_lse else None
    got = on_host(out)
    some = range(0, b, max(1, b // 4))
    wrong = gpu.packed_complaints(got, lse, q, k, v, lengths, some, 8, **keywords)
    return report(call, name, feature, wrong)


def run_merge(n, dtype, dv, is_stacked):
    """Parts in one array or apart, of 16 bytes at once or element by element."""
    outs, lses = merging.states(n, (2, 3, 7, dv), dtype, device="cpu")
    both = outs, lses
    sent = [x.cuda() if is_stacked else [part.cuda() for part in x] for x in both]
    out, lse = (x.cpu() for x in fastattn.merge_states(*map(list, sent)))
    wrong = merging.complaints(out, lse, outs, lses)
    print(f"{'WRONG' if wrong else 'ok   '}    merge {n} {dtype} dv {dv} {'; '.join(wrong)}")
    return not wrong


def backward_features(b, hq, sq, sk):
    """(name, changes of the inputs, keywords), as features()."""
    limits = {"q_lengths": lengths(b, sq), "k_lengths": lengths(b, sk), "k_start": [1] * b}
    yield "full", {}, {}
    yield "causal, one key head", {"hk": 1}, {"causal": True}
    yield "narrow heads", {"less": 8}, {"causal": "top-left"}
    yield "window and lengths", {}, {"window": (50, 20), **limits}
    yield "odd strides", {"move": odd}, {"causal": True}
    yield "columns apart", {"move": apart}, {}
    yield "lse alone", {"dlse": True}, {"causal": True}
    yield "sink", {}, {"sink": torch.linspace(-3, 3, hq), **limits}
    yield "dk alone", {"only": "dk"}, {}
    yield "more tiles than blocks", {"heads": 50, "hk": 50}, {"causal": True}
    yield "many keys", {"shape": (90, 2100), "heads": 2}, {"causal": True}
    same = {"deterministic": True}
    yield "deterministic", {"hk": 1, **same}, {"causal": True, **limits}
    yield "deterministic, odd strides", {"move": odd, **same}, {"window": (50, 20)}
    some = gpu.normal(hq, sq, sk, dtype=torch.float32, seed=5, device="cpu")
    seen = (some > 0) & (torch.arange(sk) // 64 % 3 != 1)
    slopes = 0.5 ** torch.arange(1.0, hq + 1)
    yield "softcap and alibi", {}, {"softcap": 5.0, "alibi_slopes": slopes, "causal": True}
    yield "bool mask", {}, {"mask": seen, **limits}
    yield "dmask of all batches", {}, {"mask": some.to(torch.bfloat16), "window": (90, 30)}
    yield "dmask of all heads", {"move": odd}, {"mask": some[:1].to(torch.float16)}
    yield "dropout", {}, {"dropout_p": 0.3, "seed": 2**40 + 3}
    yield "deterministic, bool mask", same, {"mask": seen, "softcap": 5.0}


def run_backward(sizes, dtype, feature, change, keywords):
    """Of one variant or the other: judged on the host, with the forward's results from there."""
    b, hq, (sq, sk) = 2, change.get("heads", 4), change.get("shape", (200, 300))
    hk, (d, dv) = change.get("hk", 2), (x - change.get("less", 0) for x in sizes)
    q, k, v = (numpy(x) for x in arrays(b, hq, hk, sq, sk, d, dv, dtype))
    lse_only = "dlse" in change
    dout = None if lse_only else numpy(gpu.normal(b, hq, sq, dv, dtype=dtype, seed=7, device="cpu"))
    dlse = np.ones((b, hq, sq), np.float32) if lse_only else None
    given = {n: numpy(x) if isinstance(x, torch.Tensor) else x for n, x in keywords.items()}
    exact = reference.attention(q, k, v, **given)
    move = change.get("move", torch.Tensor.cuda)

    def moved(x):
        return None if x is None else move(tensor_of(x))

    out, lse = exact.out.astype(q.dtype), exact.lse.astype(np.float32)
    needs = {f"need_{x}": change.get("only", x) == x for x in ("dq", "dk", "dv")}
    needs |= {"need_dsink": "sink" in keywords, "need_dmask": feature.startswith("dmask")}
    call = functools.partial(
        fastattn.attention_backward,
        *(*map(moved, (dout, q, k, v, out)), tensor_of(lse).cuda()),
        dlse=None if dlse is None else tensor_of(dlse).cuda(),
        deterministic=change.get("deterministic", False),
        **on_gpu(keywords),
        **needs,
    )
    found = zip(("dq", "dk", "dv", "dmask", "dsink"), call(), strict=True)
    got = {name: numpy(x.cpu()) for name, x in found if x is not None}
    wrong = reference_backward.check(got, dout, q, k, v, dlse=dlse, lse=lse, **given)
    return report(call, "", f"gradients, {feature}", wrong)


def run_packed_backward(sizes, dtype):
    """Sequences side by side, one of no rows and one of no keys, each judged by itself."""
    d, dv = sizes
    lengths, heads = [(120, 130), (0, 50), (80, 0), (70, 120)], (4, 2)
    rows, keys = (sum(x) for x in zip(*lengths, strict=True))
    sent = arrays(1, *heads, rows, keys, d, dv, dtype)
    q, k, v = (numpy(x) for x in sent)
    dout = gpu.normal(1, heads[0], rows, dv, dtype=dtype, seed=7, device="cpu")
    ends = np.cumsum([(0, 0), *lengths], axis=0)
    parts = [(slice(*ends[i : i + 2, 0]), slice(*ends[i : i + 2, 1])) for i in range(len(lengths))]
    out, lse = np.zeros(dout.shape, q.dtype), np.full((1, heads[0], rows), -np.inf, np.float32)
    of = [(q[:, :, i], k[:, :, j], v[:, :, j]) for i, j in parts]
    for (i, _), one in zip(parts, of, strict=True):
        exact = reference.attention(*one, causal=True)
        out[:, :, i], lse[:, :, i] = exact.out.astype(q.dtype), exact.lse
    packed = [x[0].transpose(0, 1).cuda() for x in (dout, *sent, tensor_of(out))]
    call = functools.partial(
        fastattn.attention_varlen_backward,
        *(*packed, tensor_of(lse)[0].cuda(), *gpu.offsets(lengths)),
        causal=True,
    )
    found = [numpy(x.cpu().transpose(0, 1)[None]) for x in call()[:3]]
    wrong = []
    for (i, j), one in zip(parts, of, strict=True):
        got = {
            n: x[:, :, of] for n, x, of in zip(("dq", "dk", "dv"), found, (i, j, j), strict=True)
        }
        given = {"lse": lse[:, :, i], "causal": True}
        wrong += reference_backward.check(got, numpy(dout[:, :, i]), *one, **given)
    return report(call, "", "gradients, packed", wrong)


numpy = Torch("cpu").numpy


def tensor_of(x):
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def report(call, name, feature, wrong):
    """A feature may have another variant than the one that its shape was found for."""
    ran = fastattn.explain(call.func, *call.args, **call.keywords).kernel
    feature += "" if ran == name or not name else f" (shape of {name})"
    print(f"{'WRONG' if wrong else 'ok   '}    {ran} {feature} {'; '.join(wrong)}", flush=True)
    return not wrong


def run_forward(part, parts, smoke):
    right = []
    for name, (sizes, dtype, shape) in itertools.islice(variants().items(), part, None, parts):
        for feature, change, keywords in (changes if "general" in name else features)(*shape):
            if not smoke or feature in (
                "full",
                "peaked",
                "packed, causal",
                "softcap",
                "bool mask",
                "packed, everything",
            ):
                right.append(run(name, feature, sizes, dtype, shape, change, keywords))
    merges = itertools.product((2, 4, 8, 20, 60), merging.DTYPES, (64, 50), (False, True))
    return right + [run_merge(*merge) for merge in itertools.islice(merges, part, None, parts)]


def run_cache(case):
    wrong = kvcache_cases.run(case, Torch("cuda"), backend="sm90")
    print(f"{'WRONG' if wrong else 'ok   '}    {case} {'; '.join(wrong)}", flush=True)
    return not wrong


def caches(smoke):
    """New keys, pages, packed queries, the mass; head sizes of all decode variants. And many rows,
    which paged variants of the forward kernel have."""
    for seed in range(6 if smoke else 60):
        case = kvcache_cases.random_case(seed)
        d = (1, 64, 72, 128, 200, 256)[seed % 6]
        more = {"rotary": None if case.rotary is None else d // 2 * 2}
        yield replace(case, d=d, dv=d, dtype=("float16", "bfloat16")[seed // 6 % 2], **more)
    many = kvcache_cases.Case(seed=1, sq=80, s_new=80, hq=8, room=320, dtype="bfloat16")
    for d, size, packed in itertools.product((64, 128, 256), (1, 16, 64), (False, True)):
        if not smoke or (d, size) in ((128, 1), (64, 64)):
            yield replace(many, d=d, dv=d, page_size=size, packed=packed, seed=d + size)


def run_lists(seed):
    dtype = ("float16", "bfloat16")[seed % 2]
    wrong = test_sparse.said(seed, dtype, ((40, 64), (72, 128), (200, 256))[seed // 2 % 3])
    print(f"{'WRONG' if wrong else 'ok   '}    lists {seed} {dtype} {'; '.join(wrong)}", flush=True)
    return not wrong


def run_sparsek(seed):
    wrong = sparsek_cases.run(case := sparsek_cases.random_case(seed), Torch("cuda"))
    print(f"{'WRONG' if wrong else 'ok   '}    {case} {'; '.join(wrong)}", flush=True)
    return not wrong


def main():
    smoke = "--smoke" in sys.argv
    part, parts = 0, 1
    if "--part" in sys.argv:
        part, parts = map(int, sys.argv[sys.argv.index("--part") + 1].split("/"))
        torch.set_num_threads(max(1, os.cpu_count() // parts))
    print(f"{torch.cuda.get_device_name()}; {fastattn.info()}")
    right = []
    if "--gradients" not in sys.argv:
        right += run_forward(part, parts, smoke)
    backward = [
        functools.partial(run_backward, sizes, dtype, *feature)
        for sizes, dtype in itertools.product(SIZES, DTYPES.values())
        for feature in backward_features(2, 4, 200, 300)
        if not smoke or sizes in ((64, 64), (128, 128))
    ]
    backward += [
        functools.partial(run_packed_backward, *of)
        for of in itertools.product(SIZES, DTYPES.values())
    ]
    right += [one() for one in itertools.islice(backward, part, None, parts)]
    right += [run_lists(seed) for seed in range(part, 6 if smoke else 36, parts)]
    right += [run_sparsek(seed) for seed in range(part, 10 if smoke else 60, parts)]
    if "--gradients" not in sys.argv:
        right += [run_cache(case) for case in itertools.islice(caches(smoke), part, None, parts)]
    print(f"{sum(right)} of {len(right)} right")
    sys.exit(not right or not all(right))


if __name__ == "__main__":
    main()
