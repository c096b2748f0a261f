"""Random calls of sparsek and sparsek_lists, with their gradients, against reference_sparsek.py."""

from dataclasses import dataclass, fields

import cases
import fastattn
import numpy as np
import reference_sparsek
from cases import DTYPES
from storage import STORAGES, store

luck = cases.Luck()  # as the campaign counts it; here there is none
KINDS = ("normal", "narrow", "wide", "ties", "equal", "rising", "falling", "far", "steps", "huge")
SPECIALS = ("", "inf", "-inf", "nan", "inf and -inf", "all")


@dataclass(frozen=True)
class Case:
    lists: bool = True
    dtype: str = "float32"
    kind: str = "normal"  # of the scores
    special: str = ""  # what else is among them
    lead: tuple = (1, 1)
    m: int = 9
    k: float = 3.0
    sq: int = 9
    window: int = 0
    q_offset: int | tuple | None = None
    q_lengths: tuple | None = None
    k_lengths: tuple | None = None
    k_start: tuple | None = None
    lengths: tuple | None = None  # without lists: the shape of an array of them
    storage: str = "plain"
    seed: int = 0

    def __repr__(self):
        set_ = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in set_)})"

    def limits(self):
        """Arguments of both the reference and the call, arrays as they are in NumPy."""
        given = {"q_offset": self.q_offset} if isinstance(self.q_offset, int) else {}
        for name in ("q_offset", "q_lengths", "k_lengths", "k_start"):
            if isinstance(value := getattr(self, name), tuple):
                given[name] = np.array(value, np.int32)
        return given | ({"window": self.window} if self.window else {})


def choose_case(choose, seed):
    """choose: of a sequence one element."""

    def maybe(percent, options, default=None):
        return choose(options) if choose(range(100)) < percent else default

    lists, m = choose((True, False)), choose((0, 1, 2, 5, 9, 17, 40, 80))
    sq = choose((0, 1, 2, 7, 20, m, m))
    b = choose((1, 2, 3))
    lead = (b, choose((1, 2))) if lists else choose(((), (1,), (4,), (2, 3), (2, 1, 2)))
    k = choose((float(choose(range(-1, m + 3))), choose(range(100)) * (m + 1) / 99, 2.0, 0.5))
    each = lambda options: tuple(choose(options) for _ in range(b))  # noqa: E731
    offsets = (*range(-sq - 2, m + 3), -(2**31), 2**31 - 1)
    return Case(
        lists=lists,
        dtype=choose(DTYPES),
        kind=choose(KINDS),
        special=maybe(60, SPECIALS[1:], ""),
        lead=lead,
        m=m,
        k=k,
        sq=sq if lists else Case.sq,
        window=maybe(40, (1, 2, 5, m, 2**40), 0) if lists else 0,
        q_offset=maybe(50, (choose(offsets), each(offsets))) if lists else None,
        q_lengths=maybe(30, (each(range(sq + 1)),)) if lists else None,
        k_lengths=maybe(30, (each(range(m + 1)),)) if lists else None,
        k_start=maybe(30, (each(range(m + 1)),)) if lists else None,
        lengths=None if lists else maybe(50, ((), *(lead[i:] for i in range(len(lead))))),
        storage=choose(STORAGES),
        seed=seed,
    )


def random_case(seed):
    rng = np.random.default_rng([seed, 0x5CA1])
    return choose_case(lambda options: options[int(rng.integers(len(options)))], seed)


def draw(case, rng):
    shape = (*case.lead, case.m)
    z = rng.standard_normal(shape)
    z = {
        "normal": lambda: z,
        "narrow": lambda: z * 0.1,
        "wide": lambda: z * 30,
        "ties": lambda: np.round(z * 2) / 2,
        "equal": lambda: np.full(shape, 0.3),
        "rising": lambda: np.sort(z, -1),
        "falling": lambda: -np.sort(z, -1),
        "far": lambda: z + rng.choice([600, -300]),
        "steps": lambda: np.round(z),  # plateaus, and gaps of just 1
        "huge": lambda: z * 10.0 ** rng.integers(-6, 5, shape),
    }[case.kind]()
    if case.kind == "huge" and case.dtype != "float16":
        z[rng.random(shape) < 0.2] *= {"float64": 1e300}.get(case.dtype, 1e30)
    share = rng.choice([0.05, 0.3])
    for word, value in (("inf", np.inf), ("-inf", -np.inf), ("nan", np.nan)):
        if word in case.special.split(" and ") or case.special == "all":
            z[rng.random(shape) < share / (4 if word == "nan" else 1)] = value
    return z.astype(cases.dtype_of(case.dtype))


def inputs_of(case, rng):
    """Scores, NaN where no row looks, and the lengths of a call without lists."""
    z, lengths = draw(case, rng), None
    if case.lists:
        hidden = ~reference_sparsek.candidates(z, case.sq, **case.limits()).any(1)
        z[np.broadcast_to(hidden[:, None], z.shape)] = np.nan
    elif case.lengths is not None:
        lengths = rng.integers(0, case.m + 1, case.lengths).astype(np.int32)
        z[np.arange(case.m) >= np.broadcast_to(lengths, case.lead)[..., None]] = np.nan
    return z, lengths


def off(name, got, want, bound):
    """What is wrong with one result, in a list of sentences; specials are to be the same."""
    if got.shape != want.shape:
        return [f"{name} has shape {got.shape}, not {want.shape}"]
    got, want = (x.astype(np.longdouble) for x in (got, want))
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        right = np.where(finite, np.abs(got - want) <= bound, (got == want) | (got != got))
        right &= np.isnan(got) == np.isnan(want)
    if right.all():
        return []
    at = tuple(int(i[0]) for i in np.nonzero(~right))
    return [f"{name}{list(at)} is {got[at]}, not {want[at]}; {(~right).sum()} such"]


def forward(case, scores, lengths):
    if case.lists:
        return fastattn.sparsek_lists(scores, case.k, sq=case.sq, **lengths)
    return (None, *fastattn.sparsek(scores, case.k, **lengths))


def backward(case, framework, scores, gates, tau, lists, dgates, given):
    if isinstance(framework, cases.Torch):
        import torch

        return torch.autograd.grad(gates, scores, dgates)[0]
    if not case.lists:
        return fastattn._C.sparsek_backward(tau, dgates, scores, case.k, given.get("lengths"))
    names = ("q_offset", "q_lengths", "k_lengths", "k_start")
    rest = (case.sq, case.window, *(given.get(name) for name in names))
    return fastattn._C.sparsek_lists_backward(tau, dgates, lists, scores, case.k, *rest)


def run(case, framework=None, backend=None):
    """What is wrong with a call, in sentences."""
    framework, rng = framework or cases.NumPy(), np.random.default_rng(case.seed)
    z, lengths = inputs_of(case, rng)
    storage = case.storage if framework.flips or case.storage != "flipped" else "padded"
    stored = store(z, storage, rng)
    limits = case.limits() if case.lists else {} if lengths is None else {"lengths": lengths}
    given = {
        name: framework.array(store(x, storage, rng)) if isinstance(x, np.ndarray) else x
        for name, x in limits.items()
    }
    scores = framework.array(stored)
    if isinstance(framework, cases.Torch):
        scores.requires_grad_()
    found = forward(case, scores, given)
    plain = [x.detach() if hasattr(x, "detach") else x for x in found]
    lists, gates, tau = (None if x is None else framework.numpy(x) for x in plain)
    if case.lists:
        want = reference_sparsek.sparsek_lists(z, case.k, sq=case.sq, **limits)
    else:
        want = (None, *reference_sparsek.sparsek(z, case.k, **limits))
    real = np.float64 if case.dtype == "float64" else np.float32
    wrong = [] if gates.dtype == tau.dtype == real else [f"dtypes are {gates.dtype}, {tau.dtype}"]
    if case.lists:
        wrong += off("key_lists", lists, want[0], 0)
        ends = case.q_lengths or (case.sq,) * len(tau)
        rows = [x[:, :n].astype(float) for x, n in zip(tau, ends, strict=True)]
        falls = any((x[:, 1:] < x[:, :-1]).any() for x in rows)
        wrong += ["tau falls"] if falls else []
    size = np.where(np.isfinite(want[2]), np.abs(want[2]), 0)
    bound = (4 if real == np.float64 else 1) * np.finfo(real).eps * (size + 1)
    wrong += off("tau", tau, want[2], bound) + off("gates", gates, want[1], bound[..., None])
    if wrong:
        return wrong

    dgates = rng.standard_normal(gates.shape).astype(real)
    dgates[rng.random(dgates.shape) < 0.1] = 0
    of_gates = framework.array(store(dgates, storage, rng))
    arrays = (found[1], found[2], found[0])
    dz = framework.numpy(backward(case, framework, scores, *arrays, of_gates, given))
    if case.lists:
        exact = reference_sparsek.lists_gradient(
            z, lists, tau, dgates, case.k, sq=case.sq, **limits
        )
    else:
        exact = reference_sparsek.sparsek_gradient(z, tau, dgates, case.k, **limits)
    eps = np.longdouble(cases.reference.finfo(z.dtype).eps)
    wrong += [] if dz.dtype == z.dtype else [f"dscores is {dz.dtype}"]
    wrong += off("dscores", dz, exact, eps * np.abs(exact) + 1e-14 * (1 + case.sq) + eps / 64)
    return wrong + ([] if stored.untouched() else ["the scores were written"])
