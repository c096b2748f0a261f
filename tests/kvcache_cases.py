"""Calls of attention_kvcache: drawn at random, made, judged. What must not be read is NaN, or names
a page that there is not."""

from dataclasses import dataclass, replace

import cases
import fastattn
import numpy as np
import reference
import reference_kvcache as meaning
from storage import STORAGES, store

luck = cases.Luck()  # a campaign asks; no case of these needs any
WRONG_PAGES = (-1, 2**30, -(2**31), 9999)


@dataclass(frozen=True)
class Case:
    seed: int
    b: int = 2
    hq: int = 4
    hk: int = 2
    sq: int = 1
    d: int = 16
    dv: int = 16
    dtype: str = "float32"
    room: int = 40  # keys that a sequence has room for: s_max, or pages * page_size
    page_size: int | None = None
    batch_idx: bool = False
    lengths: str = "array"  # or "int"
    s_new: int | None = 1  # None: no new keys
    leftpad: bool = False
    rotary: int | None = None  # rotary_dim
    rotary_float32: bool = False
    interleaved: bool = False
    causal: bool | str = True
    window: tuple | None = None
    softcap: float = 0.0
    alibi: int = 0
    sink: bool = False
    scale: float | None = None
    layout: str = "bshd"
    storage: str = "plain"
    shared: bool = False  # v_cache is a view of k_cache
    out: bool = False
    mass: bool = False
    invariant: bool = False
    packed: bool = False  # queries, of up to sq rows each


def random_case(seed):
    rng = np.random.default_rng(seed)

    def some(share, value, otherwise=None):
        return value if rng.random() < share else otherwise

    hk, group = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 3, 5, 8]))
    d = int(rng.choice([1, 2, 7, 8, 16, 20, 32, 64]))
    s_new = some(0.75, int(rng.integers(0, 5)))
    long = rng.random() < 0.1
    sq = int(rng.integers(65, 80)) if long else int(rng.choice([0, 1, 1, 1, 2, 3, 5, 17]))
    if long or (s_new is not None and rng.random() < 0.5):
        s_new = sq
    page_size = some(0.5, int(rng.choice([1, 2, 3, 8, 16, 64, 100])))
    room = int(rng.choice([90, 150, 300])) if long else int(rng.choice([8, 40, 90, 300]))
    room = some(0.03, int(rng.integers(1100, 4000)), room)  # keys in several splits
    if page_size:
        room = -(-room // page_size) * page_size
    if s_new is not None:
        room = max(room, s_new)
        room = -(-room // page_size) * page_size if page_size else room
    rotary = some(0.4, 2 * int(rng.integers(0, d // 2 + 1))) if s_new is not None else None
    window = some(0.3, tuple(some(0.8, int(n)) for n in rng.integers(0, 40, 2)))
    shared = page_size is None and rng.random() < 0.1
    return Case(
        seed=seed,
        b=int(rng.integers(0, 4)) if rng.random() < 0.3 else 2,
        hq=hk * group,
        hk=hk,
        sq=sq,
        d=d,
        dv=d if shared or rng.random() < 0.6 else int(rng.choice([1, 5, 16, 48])),
        dtype=str(rng.choice(cases.DTYPES)),
        room=room,
        page_size=page_size,
        batch_idx=page_size is None and rng.random() < 0.4,
        lengths=str(rng.choice(["array", "array", "int"])),
        s_new=s_new,
        leftpad=rng.random() < 0.25,
        rotary=rotary,
        rotary_float32=rng.random() < 0.5,
        interleaved=rng.random() < 0.5,
        causal=[True, True, False, "top-left"][rng.integers(4)],
        window=window,
        softcap=some(0.2, 2.0, 0.0),
        alibi=some(0.25, int(rng.integers(1, 3)), 0),
        sink=rng.random() < 0.25,
        scale=some(0.2, -0.3),
        layout=str(rng.choice(["bshd", "bhsd"])),
        storage=str(rng.choice([s for s in STORAGES if s != "expanded"])),
        shared=shared,
        out=rng.random() < 0.3,
        mass=rng.random() < 0.4,
        invariant=rng.random() < 0.2,
        packed=rng.random() < 0.2,
    )


def narrowed(case, backend):
    """The case without what the backend does not declare."""
    line = fastattn.info()["support"][backend]["kvcache"]
    without = {
        "append": {"s_new": None, "rotary": None},
        "mass": {"mass": False},
        "varlen": {"packed": False},
    }
    for name in without.keys() - set(line["features"]):
        case = replace(case, **without[name])
    if case.dtype not in line["dtypes"]:
        case = replace(case, dtype=line["dtypes"][case.seed % len(line["dtypes"])])
    return case


def places(case, rng, before, keys, start):
    """(table, number of pages): each sequence's own pages, the entries that it does not use wrong.

    Without pages a sequence's entry is a page of its own.
    """
    size = case.page_size or case.room
    columns = case.room // size if case.page_size else 1
    count = case.b * columns + (2 if case.page_size or case.batch_idx else 0)
    numbers = np.arange(count)
    if case.page_size or case.batch_idx:
        numbers = rng.permutation(numbers)
    table = numbers[: case.b * columns].reshape(case.b, columns).astype(np.int32)
    used = np.zeros((case.b, columns), bool)
    for n in range(case.b):
        used[n, min(start[n], before[n]) // size : -(-keys[n] // size)] = True
    if case.page_size or case.batch_idx:
        wrong = rng.choice(WRONG_PAGES, table.shape)
        table = np.where(used, table, wrong).astype(np.int32)
    return table, count


class Inputs:
    """Arrays in the order (b, h, s, d), and the lengths."""

    def __init__(self, case):
        rng = self.rng = np.random.default_rng(case.seed + 10**6)
        self.case, dtype = case, cases.dtype_of(case.dtype)
        new = case.s_new or 0
        most = case.room - new
        self.before = rng.integers(0, most + 1, case.b)
        if case.lengths == "int":
            self.before[:] = int(rng.integers(0, most + 1))
        self.keys = self.before + new
        start = rng.integers(0, self.keys + 1) if case.leftpad else np.zeros(case.b, int)
        self.start = start.astype(np.int32)
        rows = rng.integers(0, case.sq + 1, case.b) if case.packed else np.full(case.b, case.sq)
        self.rows = rows.astype(np.int32)
        self.table, count = places(case, rng, self.before, self.keys, self.start)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32).astype(dtype)

        size = case.page_size or case.room
        self.q = normal(case.b, case.hq, case.sq, case.d)
        self.k, self.v = (
            np.full((count, case.hk, size, n), np.nan, dtype) for n in (case.d, case.dv)
        )
        for n in range(case.b):
            at = np.arange(self.start[n], self.before[n])
            pages, rows = meaning.rows_of(self.table, size, n, at)
            for cache in (self.k, self.v):
                cache[pages, :, rows] = normal(len(at), case.hk, cache.shape[3])
        self.new = [normal(case.b, case.hk, new, n) for n in (case.d, case.dv)]
        if case.shared:
            self.v, self.new[1] = self.k, self.new[0]
        self.cos = self.sin = None
        if case.packed:
            self.ends = np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int32)
            self.total = int(self.ends[-1]) + 2  # two rows of no sequence
        if case.rotary is not None:
            rows = int(max([case.room, *(self.before + case.sq)])) + 1
            angles = rng.uniform(-3, 3, (rows, case.rotary // 2))
            table = np.dtype(np.float32) if case.rotary_float32 else dtype
            self.cos, self.sin = (meaning.rounded(f(angles), table) for f in (np.cos, np.sin))
        self.slopes = {
            0: None,
            1: rng.uniform(0, 0.5, case.hq).astype(np.float32),
            2: rng.uniform(0, 0.5, (case.b, case.hq)).astype(np.float32),
        }[case.alibi]
        self.sink = normal(case.hq).astype(np.float32) if case.sink else None

    def pack(self, x, rest):
        """(b, h, sq, d) -> (total, h, d); rows of no sequence are `rest`."""
        out = np.full((self.total, x.shape[1], x.shape[3]), rest, x.dtype)
        for n, rows in enumerate(self.rows):
            out[self.ends[n] : self.ends[n + 1]] = x[n, :, :rows].swapaxes(0, 1)
        return out

    def unpack(self, x, rest):
        """The other way round, of (total, h, ...); rows of no sequence must be `rest`."""
        out = np.full((self.case.b, x.shape[1], self.case.sq, *x.shape[2:]), rest, x.dtype)
        for n, rows in enumerate(self.rows):
            out[n, :, :rows] = x[self.ends[n] : self.ends[n + 1]].swapaxes(0, 1)
        assert (x[self.ends[-1] :] == rest).all()
        return out


class Arrays:
    """The caller's: stored somehow, by the names of the arguments."""

    def __init__(self, case, inputs, framework):
        self.framework, self.stored = framework, {}
        rng = inputs.rng
        storage = case.storage
        if not framework.flips and storage == "flipped":
            storage = "strided"

        def put(name, values, layout=False):
            if values is None:
                return None
            if layout and case.layout == "bshd":
                values = values.swapaxes(1, 2)
            self.stored[name] = store(values, storage, rng)
            return framework.array(self.stored[name])

        self.keywords = {}
        if case.packed:
            self.q = put("q", inputs.pack(inputs.q, np.nan))
            self.keywords["cu_seqlens_q"] = put("cu_seqlens_q", inputs.ends)
            if case.seed % 2:
                self.keywords["max_seqlen_q"] = case.sq
        else:
            self.q = put("q", inputs.q, layout=True)
        self.k_cache = put("k_cache", inputs.k, layout=True)
        self.v_cache = self.k_cache if case.shared else put("v_cache", inputs.v, layout=True)
        self.seqlens = int(inputs.before[0]) if case.b and case.lengths == "int" else None
        if self.seqlens is None:
            self.seqlens = put("cache_seqlens", inputs.before.astype(np.int32))
        if case.s_new is not None:
            self.keywords |= {
                "k": put("k", inputs.new[0], True),
                "v": put("v", inputs.new[1], True),
            }
        if case.page_size:
            self.keywords["page_table"] = put("page_table", inputs.table)
        elif case.batch_idx:
            self.keywords["cache_batch_idx"] = put("cache_batch_idx", inputs.table[:, 0])
        if case.leftpad:
            self.keywords["cache_leftpad"] = put("cache_leftpad", inputs.start)
        if case.rotary is not None:
            self.keywords |= {
                "rotary_cos": put("rotary_cos", inputs.cos),
                "rotary_sin": put("rotary_sin", inputs.sin),
                "rotary_interleaved": case.interleaved,
            }
        self.keywords |= {"alibi_slopes": put("alibi_slopes", inputs.slopes)}
        self.keywords |= {"sink": put("sink", inputs.sink)}
        if case.out:
            empty = np.zeros((case.b, case.hq, case.sq, case.dv), inputs.q.dtype)
            empty = inputs.pack(empty, 0) if case.packed else empty
            self.keywords["out"] = put("out", empty, layout=not case.packed)

    def cache(self, name, case):
        """What it holds now, (pages, h, size, d)."""
        stored = self.stored["k_cache" if case.shared else name]
        self.framework.fetch(stored, getattr(self, name))
        assert stored.untouched(around=True)
        return stored.view.swapaxes(1, 2) if case.layout == "bshd" else stored.view


def options(case):
    names = ("causal", "window", "softcap", "scale")
    return {name: getattr(case, name) for name in names}


def same(a, b):
    return a.tobytes() == b.tobytes()


def run(case, framework=None, attend=None, **more):
    """Makes the call and returns the complaints, none if all is right."""
    framework, attend = framework or cases.NumPy(), attend or fastattn.attention_kvcache
    inputs = Inputs(case)
    arrays = Arrays(case, inputs, framework)
    q, kwargs = inputs.q, options(case)
    results = attend(
        *(arrays.q, arrays.k_cache, arrays.v_cache, arrays.seqlens),
        **(arrays.keywords | kwargs),
        layout=case.layout,
        return_lse=True,
        return_mass=case.mass,
        batch_invariant=case.invariant,
        **more,
    )
    complaints = []
    for name, stored in arrays.stored.items():
        if name not in ("k_cache", "v_cache", "out") and not stored.untouched():
            complaints.append(f"wrote to {name}")
    k_new = inputs.new[0]
    if case.rotary is not None:
        at = inputs.before[:, None, None]
        tables = (inputs.cos, inputs.sin)
        k_new = meaning.rotated(k_new, *tables, at + np.arange(case.s_new), case.interleaved)
        moves = bool(case.causal) or case.window not in (None, (None, None))
        q = meaning.rotated(q, *tables, at + np.arange(case.sq) * moves, case.interleaved)
    want_k, want_v = inputs.k, inputs.v
    if case.s_new:
        want_k = meaning.appended(inputs.k, k_new, inputs.table, inputs.before)
        want_v = (
            want_k
            if case.shared
            else meaning.appended(inputs.v, inputs.new[1], inputs.table, inputs.before)
        )
    for name, want in (("k_cache", want_k), ("v_cache", want_v)):
        if not same(np.ascontiguousarray(arrays.cache(name, case)), want):
            complaints.append(f"{name} is not as it should be")
    k, v = (meaning.gathered(x, inputs.table, case.room) for x in (want_k, want_v))
    kwargs |= {"q_lengths": inputs.rows, "k_lengths": inputs.keys, "k_start": inputs.start}
    kwargs |= {"alibi_slopes": inputs.slopes, "sink": inputs.sink}
    if case.out and results[0] is not arrays.keywords["out"]:
        complaints.append("the result is not the caller's out")
    out, lse = (np.array(framework.numpy(x)) for x in results[:2])
    if case.packed:
        out, lse = inputs.unpack(out, 0), inputs.unpack(lse.T, -np.inf)
    elif case.layout == "bshd":
        out = out.swapaxes(1, 2)
    complaints += reference.check(out, lse, q, k, v, **kwargs)
    if case.mass:
        got, want = framework.numpy(results[2]), meaning.mass(q, k, **kwargs)
        limit = 2e-4 * want + 1e-6 * case.sq * case.hq / case.hk
        if got.shape != want.shape or got.dtype != np.float32 or (np.abs(got - want) > limit).any():
            complaints.append(f"mass is wrong: {got} {want}")
    return complaints
