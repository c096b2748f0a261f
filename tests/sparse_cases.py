"""Random calls of attention_sparse: every argument, everywhere, by a seed."""

from dataclasses import dataclass

import cases
import fastattn
import numpy as np
import reference_sparse

NAMES = ("dq", "dk", "dv", "dgate", "dsink")


@dataclass
class Call:
    arrays: dict  # q, k, v, key_lists
    keywords: dict
    dout: np.ndarray
    dlse: np.ndarray

    def __str__(self):
        shapes = {name: x.shape for name, x in self.arrays.items()}
        said = {
            n: x.tolist() if isinstance(x, np.ndarray) and x.size < 9 else x
            for n, x in self.keywords.items()
            if not isinstance(x, np.ndarray) or x.size < 9
        }
        return f"{self.arrays['q'].dtype} {shapes} {said}"


def random_lists(rng, shape, blocks):
    """Without repeats, in any order, voids anywhere."""
    lists = np.full(shape, -1, np.int32)
    for at in np.ndindex(shape[:-1]):
        keep = min(blocks, shape[-1]) and rng.integers(0, min(blocks, shape[-1]) + 1)
        places = rng.permutation(shape[-1])[:keep]
        lists[at][places] = rng.permutation(blocks)[:keep]
    voids = rng.choice([-1, -7, blocks, 2**31 - 1, -(2**31)], shape)
    lists = np.where((lists == -1) & (rng.random(shape) < 0.5), voids, lists).astype(np.int32)
    return np.sort(lists, axis=-1) if rng.random() < 0.3 else lists


def random_call(seed, dtype=None, sizes=(3, 8, 16, 40)):
    """sizes: of heads."""
    rng = np.random.default_rng(seed)
    dtype = cases.dtype_of(dtype or rng.choice(["float64", "float32", "float16", "bfloat16"]))
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    b, hk, group = rng.integers(1, 3), rng.integers(1, 3), rng.choice([1, 2, 3])
    q_block, k_block = rng.choice([1, 64, 128]), rng.choice([1, 16, 32, 64, 128])
    sq = int(rng.integers(1, 40) if q_block == 1 else rng.integers(1, 200))
    sk, d, dv = int(rng.integers(1, 300)), *map(int, rng.choice(sizes, 2))
    hq = hk * group

    def maybe(share=0.3):
        return rng.random() < share

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    blocks, rows = -(-sk // k_block), -(-sq // q_block)
    lead = (1 if maybe() else b, 1 if maybe() else hk)
    length = int(rng.integers(0, min(blocks, 24) + 3))
    lists = random_lists(rng, (*lead, rows, length), blocks)
    keywords = {"q_block": int(q_block), "k_block": int(k_block)}
    if maybe():
        counts = rng.integers(-2, length + 3, (1 if maybe() else b, 1 if maybe() else hk, rows))
        keywords["counts"] = counts.astype(np.int32)
    if maybe(0.5):
        shape = (1 if maybe() else b, 1 if maybe() else hk, rows, length)
        keywords["gate"] = rng.uniform(-0.5, 1.5, shape).astype(wide)
        keywords["key_gate"] = bool(maybe(0.4))
    if maybe(0.5):
        left, right = (None if maybe(0.15) else int(rng.integers(0, 40)) for _ in range(2))
        keywords["window_union"] = (left, right)
    if maybe(0.5):
        keywords["causal"] = True
    elif maybe(0.2):
        keywords["causal"] = "top-left"
    if maybe():
        keywords["window"] = (None if maybe() else int(rng.integers(-3, 80)), 3 + sk)
    if maybe() and keywords.get("causal") != "top-left":
        keywords["q_offset"] = int(rng.integers(-20, sk))
    if maybe(0.2):
        keywords["k_lengths"] = rng.integers(0, sk + 1, b).astype(np.int32)
    if maybe(0.2):
        keywords["q_lengths"] = rng.integers(0, sq + 1, b).astype(np.int32)
    if maybe(0.2):
        keywords["k_start"] = rng.integers(0, sk + 1, b).astype(np.int32)
    if maybe(0.2):
        keywords["softcap"] = float(rng.choice([0.7, 5.0, 30.0]))
    if maybe():
        keywords["sink"] = rng.standard_normal(hq).astype(np.float32)
    if maybe(0.2):
        keywords["scale"] = float(rng.choice([-0.3, 0.0, 1.0]))
    arrays = {"q": normal(b, hq, sq, d), "k": normal(b, hk, sk, d), "v": normal(b, hk, sk, dv)}
    arrays["key_lists"] = lists
    dout, dlse = normal(b, hq, sq, dv), rng.standard_normal((b, hq, sq)).astype(wide)
    return Call(arrays, keywords, dout, dlse)


def poisoned(call):
    """The call with NaN in all that no row sees, and what the definition says is seen."""
    arrays, keywords = dict(call.arrays), dict(call.keywords)
    (b, _, sq, _), (_, hk, sk, _) = arrays["q"].shape, arrays["k"].shape
    names = ("causal", "window", "q_offset", "q_lengths", "k_lengths", "k_start")
    limits = {n: x for n, x in keywords.items() if n in names}
    lists = {n: keywords.get(n) for n in ("counts", "gate", "window_union")}
    lists |= {n: keywords[n] for n in ("q_block", "k_block")}
    c = reference_sparse.columns(b, hk, sq, sk, arrays["key_lists"], **lists, **limits)
    reached = np.zeros((b, hk, sk), bool)
    n, h = np.ogrid[:b, :hk]
    np.logical_or.at(reached, (n[..., None, None], h[..., None, None], c.key), c.seen)
    for name in ("k", "v"):
        arrays[name] = np.where(reached[..., None], arrays[name], np.nan).astype(arrays[name].dtype)
    rows = np.repeat(c.seen.any(axis=3), arrays["q"].shape[1] // hk, axis=1)
    arrays["q"] = np.where(rows[..., None], arrays["q"], np.nan).astype(arrays["q"].dtype)
    if (gate := keywords.get("gate")) is not None:
        used = reference_sparse._to_entries(c.seen.astype(float), c, gate)
        keywords["gate"] = np.where(used > 0, gate, np.nan).astype(gate.dtype)
    return arrays, keywords


def run(
    call,
    poison,
    backend=None,
    there=lambda x: x,
    back=lambda x: x,
    gradients=True,
    deterministic=False,
):
    """{name: array} of all results of the call. there, back: arrays to another framework and from
    it."""
    arrays, keywords = poisoned(call) if poison else (call.arrays, call.keywords)
    shape = (*arrays["q"].shape[:3], arrays["v"].shape[3])
    out = there(np.full(shape, np.nan).astype(arrays["q"].dtype))
    q, k, v, lists = (there(x) for x in arrays.values())
    keywords = {n: there(x) if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    keywords |= {"backend": backend, "deterministic": deterministic}
    given, lse, mass = fastattn.attention_sparse(
        q, k, v, lists, **keywords, out=out, return_lse=True, return_mass=True
    )
    assert given is out
    results = {"out": out, "lse": lse, "mass": mass}
    if gradients:
        needs = {"need_dgate": "gate" in keywords, "need_dsink": "sink" in keywords}
        found = fastattn.attention_sparse_backward(
            *(there(call.dout), q, k, v, out, lse, lists),
            dlse=there(call.dlse),
            **needs,
            **keywords,
        )
        results |= {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}
    return {name: back(x) for name, x in results.items()}


def check_packed(seed, dtype, backend=None, there=lambda x: x, back=lambda x: x):
    """Packed sequences: each is the call of its own; rows in no sequence give 0, and have gradients
    of 0."""
    rng, dtype = np.random.default_rng(seed), cases.dtype_of(dtype)
    exact = 1e-5 if dtype.itemsize > 2 else 4 * float(cases.reference.finfo(dtype).eps)

    def normal(*shape, of=dtype):
        return rng.standard_normal(shape).astype(of)

    q_block, k_block = (int(rng.choice(x)) for x in ([1, 64, 128], [1, 16, 64]))
    n, tail = rng.integers(0, 150, (2, 3)), rng.integers(0, 9, 2)
    hk, group, d, dv = 2, int(rng.choice([1, 2])), 16, 8
    q = normal(n[0].sum() + tail[0], hk * group, d)
    k, v = (normal(n[1].sum() + tail[1], hk, w) for w in (d, dv))
    cu = [np.append(0, np.cumsum(x)).astype(np.int32) for x in n]
    blocks = -(-n[0] // q_block)
    lists = rng.integers(-1, max(1, 150 // k_block), (hk, blocks.sum() + 2, 5)).astype(np.int32)
    gate = rng.uniform(0, 1, lists.shape).astype(np.float32)
    sink, dlse = normal(hk * group, of=np.float32), normal(hk * group, len(q), of=np.float32)
    dout = normal(len(q), hk * group, dv)
    keywords = {"q_block": q_block, "k_block": k_block, "causal": True, "window_union": (9, 0)}
    keywords |= {"sink": there(sink), "backend": backend}
    asked = {"return_lse": True, "return_mass": True}
    needs = {"need_dgate": True, "need_dsink": True}
    ends = (*map(there, cu), int(n[0].max()), int(n[1].max()))
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    given, options = [there(x) for x in (q, k, v, lists)], {"gate": there(gate), **keywords}
    made = fastattn.attention_sparse_varlen(*given, *ends, **options, **asked)
    found = fastattn.attention_sparse_backward(
        *(there(dout), *given[:3], *made[:2], given[3]),
        dlse=there(dlse),
        **dict(zip(names, ends, strict=True)),
        **needs,
        **options,
    )
    out, lse, mass, *found = (back(x) for x in (*made, *found))
    of_sink = np.zeros_like(sink)
    first = np.append(0, np.cumsum(blocks))
    for b in range(3):
        rows, keys = (slice(cu[i][b], cu[i][b + 1]) for i in (0, 1))
        mine = slice(first[b], first[b + 1])
        alone = [there(x[None, part]) for x, part in ((q, rows), (k, keys), (v, keys))]
        options = {**keywords, "gate": there(gate[None, :, mine]), "layout": "bshd"}
        own = there(lists[None, :, mine])
        got = fastattn.attention_sparse(*alone, own, **options, **asked)
        for x, y in zip(map(back, got), (out[rows], lse[:, rows], mass[:, mine]), strict=True):
            np.testing.assert_array_equal(x[0], y)
        gradients = fastattn.attention_sparse_backward(
            *(there(dout[None, rows]), *alone, *got[:2], own),
            dlse=there(dlse[None, :, rows]),
            **needs,
            **options,
        )
        *gradients, dsink = map(back, gradients)
        wanted = found[0][rows], found[1][keys], found[2][keys], found[3][:, mine]
        for x, y in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(
                x[0].astype(float), y.astype(float), rtol=10 * exact, atol=exact
            )
        of_sink += dsink
    np.testing.assert_allclose(found[4], of_sink, rtol=1e-4, atol=1e-5)
    assert (out[cu[0][3] :] == 0).all() and (lse[:, cu[0][3] :] == -np.inf).all()
    assert (found[0][cu[0][3] :] == 0).all() and (found[1][cu[1][3] :] == 0).all()
    assert (mass[:, blocks.sum() :] == 0).all() and (found[3][:, blocks.sum() :] == 0).all()
