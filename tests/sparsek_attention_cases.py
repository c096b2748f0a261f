"""Random calls of sparsek_attention and its backward: every argument, by a seed."""

from dataclasses import dataclass

import cases
import fastattn
import numpy as np
import reference
import reference_sparsek_attention

NAMES = ("dq", "dk", "dv", "dscores", "dsink")


@dataclass
class Call:
    arrays: dict  # q, k, v, scores
    k: float
    keywords: dict
    dout: np.ndarray
    dlse: np.ndarray

    def __str__(self):
        shapes = {name: x.shape for name, x in self.arrays.items()}
        said = {n: x.tolist() if isinstance(x, np.ndarray) else x for n, x in self.keywords.items()}
        return f"{self.arrays['q'].dtype} {shapes} {self.arrays['scores'].dtype} k {self.k} {said}"


def random_scores(rng, shape):
    z = rng.standard_normal(shape)
    kind = rng.choice(["normal", "narrow", "ties", "equal", "rising", "falling", "steps"])
    return {
        "normal": z,
        "narrow": 0.1 * z,
        "ties": np.round(z),
        "equal": np.ones(shape),
        "rising": np.sort(3 * z),
        "falling": -np.sort(-3 * z),
        "steps": 2.0 * np.arange(shape[-1]) % 7 + 0.01 * z,
    }[kind]


def random_call(seed, dtype=None):
    rng = np.random.default_rng(seed)
    dtype = cases.dtype_of(dtype or rng.choice(["float64", "float32", "float16", "bfloat16"]))
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    b, hk, group = rng.integers(1, 3), rng.integers(1, 3), rng.choice([1, 2, 3])
    sk, d, dv = int(rng.choice([1, 5, 40, 70, 140])), *map(int, rng.choice([3, 8, 16, 40], 2))
    sq = int(rng.choice([1, 3, 20, sk, sk]))
    hq = hk * group

    def maybe(share=0.3):
        return rng.random() < share

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    k = float(rng.choice([0, 1, 3, 17, rng.uniform(-1, 20), sk + 2]))
    keywords = {"window": int(rng.choice([0, 1, 5, 30, 2**40]))}
    if maybe():
        keywords["keep_all"] = True
    if maybe():
        keywords["key_gate"] = True
    if maybe():
        keywords["q_offset"] = int(rng.integers(-20, sk + 5))
    if maybe(0.1):
        keywords["q_offset"] = rng.integers(-20, sk + 5, b).astype(np.int32)
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
    scores = random_scores(rng, (b, hk, sk)).astype(dtype if maybe() else wide)
    if maybe(0.2):
        scores = np.where(rng.random(scores.shape) < 0.1, -np.inf, scores).astype(scores.dtype)
    if maybe(0.15):
        scores = np.where(rng.random(scores.shape) < 0.05, np.inf, scores).astype(scores.dtype)
    arrays["scores"] = scores
    dout, dlse = normal(b, hq, sq, dv), rng.standard_normal((b, hq, sq)).astype(wide)
    return Call(arrays, k, keywords, dout, dlse)


def poisoned(call, tau):
    """The arrays with NaN in all that no row sees; tau: of the call."""
    q, k, v, scores = call.arrays.values()
    (b, hq, sq, _), (_, hk, sk, _) = q.shape, k.shape
    places = {n: x for n, x in call.keywords.items() if n in reference_sparsek_attention.LIMITS}
    window, keep_all = call.keywords["window"], call.keywords.get("keep_all", False)
    lists, _ = reference_sparsek_attention.lists(
        scores, tau, call.k, keep_all=keep_all, window=window, **places
    )
    seen = np.zeros((b, hk, sq, sk), bool)
    inside, _ = reference.interval(b, sq, sk, causal=True, **places)
    if window:
        seen |= reference.interval(b, sq, sk, window=(window - 1, 0), **places)[0][:, None]
    at = np.nonzero(lists >= 0)
    seen[(*at[:3], lists[at])] = True
    assert not (seen & ~inside[:, None]).any()
    keys, rows = seen.any(axis=2)[..., None], seen.any(axis=3)[..., None]
    k, v = (np.where(keys, x, np.nan).astype(x.dtype) for x in (k, v))
    q = np.where(np.repeat(rows, hq // hk, axis=1), q, np.nan).astype(q.dtype)
    return q, k, v, scores


def run(call, poison=False):
    """{name: array} of all results of the call."""
    q, k, v, scores = call.arrays.values()
    if poison:
        *_, tau, _ = fastattn.sparsek_attention(
            q, k, v, scores, call.k, **call.keywords, return_selection=True
        )
        q, k, v, scores = poisoned(call, tau)
    out = np.full((*q.shape[:3], v.shape[3]), np.nan).astype(q.dtype)
    given, lse, tau, ends = fastattn.sparsek_attention(
        q, k, v, scores, call.k, **call.keywords, out=out, return_lse=True, return_selection=True
    )
    assert given is out
    found = fastattn.sparsek_attention_backward(
        *(call.dout, q, k, v, scores, call.k, out, lse, tau, ends),
        **{"dlse": call.dlse, "need_dsink": "sink" in call.keywords, **call.keywords},
    )
    gradients = {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}
    return {"out": out, "lse": lse, "tau": tau, "ends": ends, **gradients}
