"""Cases: one call of `fastattn.attention`, described by a few plain fields, from inputs to verdict.

A `Case` is a dataclass whose repr is the line that reproduces it:
`python tests/campaign.py --case "Case(...)"`. Everything random in it comes from its seed. Every
array is stored inside a larger buffer with strides of the case's choice; what no row sees, the
bytes between the strides, the bytes around, and the outputs before the call hold NaN. `run` makes
the call on a backend through a framework and judges the result.
"""

from dataclasses import dataclass, fields, replace

import declared
import ml_dtypes
import numpy as np
import reference
from storage import Stored, store

DTYPES = ("float32", "bfloat16", "float16", "float64")
FAMILIES = ("normal", "spike", "shift", "single", "equal")


class Refused(Exception):  # noqa: N818 - not an error
    """The backend does not declare this legal request, and refuses it."""


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


@dataclass(frozen=True)
class Case:
    b: int = 1
    hq: int = 1
    hk: int = 1
    sq: int = 1
    sk: int = 1
    d: int = 16
    dv: int = 16
    dtype: str = "float32"
    layout: str = "bhsd"
    causal: bool | str = False
    window: tuple | None = None
    q_offset: int | tuple | None = None
    q_lengths: tuple | None = None
    k_lengths: tuple | None = None
    k_start: tuple | None = None
    mask: str | None = None  # its dtype
    mask_shape: tuple = (
        False,
        False,
        True,
        True,
    )  # which of b, hq, sq, sk it really has; the rest broadcasts
    mask_rank: int = 4  # leading broadcast dimensions may be left out
    softcap: float = 0.0
    alibi: int = 0  # rank of the slopes: 1 (hq,), 2 (b, hq), 0 none
    sink: bool = False
    scale: float | None = None
    dropout: float = 0.0
    packed: tuple | None = None  # rows of q and of k of each of the b sequences; sq and sk are then
    tail: tuple = (0, 0)  # the longest there may be. Rows of q and of k that belong to none
    storage: str = "plain"
    family: str = "normal"
    out: str | None = None  # storage of the caller's `out`
    seed: int = 0

    def __repr__(self):
        mine = (
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Case({', '.join(f'{name}={value!r}' for name, value in mine)})"

    @property
    def limits(self):
        names = ("causal", "window", "q_offset", "q_lengths", "k_lengths", "k_start")
        limits = {name: getattr(self, name) for name in names}
        limits = {name: x for name, x in limits.items() if x is not None and x is not False}
        if self.packed:  # a sequence is a padded one that ends with its rows, or before
            for name, rows in zip(("q_lengths", "k_lengths"), self.packed, strict=True):
                limits[name] = np.minimum(limits.get(name, rows), rows)
        return limits

    @property
    def dropout_seed(self):
        """Any int64: all bits of the key count."""
        return self.seed * 0x9E3779B97F4A7C15 % 2**64 - 2**63

    @property
    def used_scale(self):
        return (self.d or 1) ** -0.5 if self.scale is None else self.scale


# ------------------------------------------------------------------------------------------- inputs


@dataclass
class Inputs:
    """The arrays of a case: logical ones for the reference, stored ones for the call."""

    logical: dict  # name -> array: the arguments of reference.attention
    stored: dict  # name -> Stored, in the layout of the case
    out: Stored | None


def make_inputs(case, strides_at_least_0=False):
    rng = np.random.default_rng(case.seed)
    dtype = dtype_of(case.dtype)
    storage = "padded" if case.storage == "flipped" and strides_at_least_0 else case.storage
    q, k, v = _values(case, rng)
    arrays = {}
    if case.mask:
        arrays["mask"] = _mask(case, rng)
    if case.alibi:
        shape = (case.b, case.hq)[2 - case.alibi :]
        arrays["alibi_slopes"] = (0.5 ** rng.uniform(0, 8, shape)).astype(np.float32)
    if case.sink:
        arrays["sink"] = rng.normal(0, 3, case.hq).astype(np.float32)
    q, k, v = (x.astype(dtype) for x in (q, k, v))

    expanded = {}
    if case.storage == "expanded":  # equal along some axes, so that stride 0 says the same
        for name in "qkv":
            axes = (1,) if case.packed else range(3)
            expanded[name] = [axis for axis in axes if rng.random() < 0.4]
        q, k, v = (_constant(x, expanded[name]) for name, x in zip("qkv", (q, k, v), strict=True))
    _poison(case, q, k, v, arrays.get("mask"), expanded)

    def in_layout(x, axes=(), of_k=False):
        if case.packed:
            return pack(x, case.packed[of_k], case.tail[of_k]), axes
        if case.layout == "bhsd":
            return x, axes
        return x.swapaxes(1, 2), [{1: 2, 2: 1}.get(axis, axis) for axis in axes]

    stored = {}
    for name, x in zip("qkv", (q, k, v), strict=True):
        x, axes = in_layout(x, expanded.get(name, ()), name != "q")
        stored[name] = store(x, storage, rng, axes)
    if case.packed:
        for name, rows in zip("qk", case.packed, strict=True):
            offsets = np.append(0, np.cumsum(rows)).astype(np.int32)
            stored[f"cu_seqlens_{name}"] = store(offsets, storage, rng)
    if case.dropout and case.seed % 2:  # else a plain int
        stored["seed"] = store(
            np.full((1,) * (case.seed % 3 == 0), case.dropout_seed), "plain", rng
        )
    if "mask" in arrays:
        mask, full = arrays["mask"], (case.b, case.hq, case.sq, case.sk)
        if storage == "expanded":
            broadcast = [axis for axis in range(4) if mask.shape[axis] != full[axis]]
            stored["mask"] = store(np.broadcast_to(mask, full), storage, rng, broadcast)
        else:
            lead = next((axis for axis in range(4) if mask.shape[axis] != 1), 3)
            stored["mask"] = store(
                mask.reshape(mask.shape[min(lead, 4 - case.mask_rank) :]), storage, rng
            )
    for name in ("alibi_slopes", "sink"):
        if name in arrays:
            stored[name] = store(arrays[name], storage, rng)
    for name in ("q_lengths", "k_lengths", "k_start", "q_offset"):
        if isinstance(getattr(case, name), tuple):
            packed = case.packed and name != "q_offset"
            called = f"seqused_{name[0]}" if packed else name
            stored[called] = store(np.array(getattr(case, name), np.int32), storage, rng)

    out = None
    if case.out:
        shape, _ = in_layout(np.empty((case.b, case.hq, case.sq, case.dv), dtype))
        how = "padded" if case.out == "flipped" and strides_at_least_0 else case.out
        out = store(np.full(shape.shape, np.nan).astype(dtype), how, rng)
    return Inputs({"q": q, "k": k, "v": v, **arrays}, stored, out)


def pack(x, rows, tail):
    """(b, h, s, d) -> (total, h, d): the first rows of each sequence, and `tail` rows of NaN."""
    none = np.full((x.shape[1], tail, x.shape[3]), np.nan, x.dtype)
    parts = [x[n, :, :length] for n, length in enumerate(rows)]
    return np.concatenate([*parts, none], axis=1).swapaxes(0, 1)


def unpack(case, out, lse):
    """A result (total, h, dv), (h, total) -> (b, h, s, dv), (b, h, s), and the complaints."""
    padded = np.zeros((case.b, case.hq, case.sq, case.dv), out.dtype)
    padded_lse, at = np.full(padded.shape[:3], -np.inf, lse.dtype), 0
    total = sum(case.packed[0]) + case.tail[0]
    if (out.shape, lse.shape) != ((total, *padded.shape[1:4:2]), (case.hq, total)):
        return padded, padded_lse, [f"out has shape {out.shape}, lse {lse.shape}"]
    for n, rows in enumerate(case.packed[0]):
        padded[n, :, :rows] = out[at : at + rows].swapaxes(0, 1)
        padded_lse[n, :, :rows] = lse[:, at : at + rows]
        at += rows
    clean = (out[at:] == 0).all() and (lse[:, at:] == -np.inf).all()
    return padded, padded_lse, [] if clean else ["rows of no sequence are not 0 and -inf"]


def _values(case, rng):
    """q, k, v in float64, by family."""
    q = rng.standard_normal((case.b, case.hq, case.sq, case.d))
    k = rng.standard_normal((case.b, case.hk, case.sk, case.d))
    v = rng.standard_normal((case.b, case.hk, case.sk, case.dv))
    scale = case.used_scale
    if case.family == "spike" and case.sk:  # one key in a thousand, and at least one, times 100
        k[:, :, np.append(np.flatnonzero(rng.random(case.sk) < 1e-3), rng.integers(case.sk))] *= 100
    elif case.family == "shift" and scale:  # every score of a row moved by +120 or -120
        q[..., 0] = 8 * rng.choice([-1, 1], q.shape[:3])
        k[..., 0] = np.clip(120 / (8 * scale), -3e4, 3e4)
    elif case.family == "single" and scale:
        # scores of -5e5, for a window of (0, 0), which shows one key at most
        size = min((5e5 / abs(scale)) ** 0.5, 3e4)
        q[..., 0], k[..., 0] = size, -size * np.sign(scale)
    elif case.family == "equal":  # equal logits all along the row
        k[:] = k[:, :, :1]
    return q, k, v


def _mask(case, rng):
    shape = [
        n if has else 1
        for n, has in zip((case.b, case.hq, case.sq, case.sk), case.mask_shape, strict=True)
    ]
    hidden = rng.random(shape) < rng.choice([0.1, 0.5, 0.95])
    hidden |= (rng.random(shape[:3]) < 0.1)[..., None]  # whole rows
    hidden |= (
        (rng.random((*shape[:2], 1, shape[3])) < 0.1) if shape[3] > 1 else False
    )  # whole columns
    if case.mask == "bool":
        return ~hidden
    values = rng.normal(0, 2, shape)
    return np.where(hidden & (rng.random() < 0.5), -np.inf, values).astype(dtype_of(case.mask))


def _constant(x, axes):
    for axis in axes:
        x = np.broadcast_to(x.take([0], axis) if x.shape[axis] else x, x.shape)
    return x.copy()


def _poison(case, q, k, v, mask, expanded):
    """Writes NaN or inf where no row looks: rows of q, k and v, and a float mask's elements."""
    seen = reference.visible(case.b, case.hq, case.sq, case.sk, mask, **case.limits)
    group = seen.reshape(case.b, case.hk, case.hq // case.hk, case.sq, case.sk)
    blind = {
        "q": ~seen.any(axis=3),
        "k": ~group.any(axis=(2, 3)),
        "v": np.broadcast_to(~seen.any(axis=(1, 2))[:, None], (case.b, case.hk, case.sk)),
    }
    poison = np.inf if case.seed % 4 == 1 else np.nan
    for name, x in zip("qkv", (q, k, v), strict=True):
        axes = tuple(axis for axis in expanded.get(name, ()) if x.shape[axis])
        x[np.broadcast_to(blind[name].all(axis=axes, keepdims=True), x.shape[:3])] = poison
    if mask is not None and mask.dtype != bool:
        once = tuple(axis for axis in range(4) if mask.shape[axis] == 1)
        mask[~seen.any(axis=once, keepdims=True)] = np.nan


# -------------------------------------------------------------------------------------------- calls


class NumPy:
    """How a framework holds a stored array, and how a result comes back. Others: torch, below."""

    name, device, flips = "numpy", "cpu", True

    def array(self, stored):
        return stored.view

    def numpy(self, array):
        return np.asarray(array)

    def fetch(self, stored, array):
        """Brings the buffer behind `array` back into `stored` after a call."""


class Torch:
    flips = False

    def __init__(self, device="cpu"):
        self.name, self.device = f"torch-{device}", device

    def array(self, stored):
        import torch

        base = stored.base
        if base.dtype.name == "bfloat16":
            whole = torch.from_numpy(base.view(np.int16)).view(torch.bfloat16)
        else:
            whole = torch.from_numpy(base)
        return whole.to(self.device).as_strided(stored.shape, stored.strides, stored.offset)

    def numpy(self, tensor):
        import torch

        tensor = tensor.cpu()
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def fetch(self, stored, tensor):
        if self.device != "cpu":
            whole = tensor.as_strided((stored.base.size,), (1,), 0)
            stored.base[...] = self.numpy(whole)


def arguments(case, inputs, framework):
    """The keywords of function(case), arrays included."""
    keywords = {name: framework.array(stored) for name, stored in inputs.stored.items()}
    keywords |= {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    keywords.setdefault("q_offset", case.q_offset)
    if case.dropout:
        keywords = {"seed": case.dropout_seed, **keywords, "dropout_p": case.dropout}
    if case.packed:
        keywords |= {"max_seqlen_q": case.sq, "max_seqlen_k": case.sk}
    else:
        keywords |= {"layout": case.layout}
    return keywords | {"scale": case.scale, "return_lse": True}


def function(case):
    import fastattn

    return fastattn.attention_varlen if case.packed else fastattn.attention


@dataclass
class Luck:
    """How many float32 results were judged, and how many were right in another draw only."""

    judged: int = 0
    redrawn: int = 0

    @property
    def strained(self):
        """Whether so many are no luck: reference.UNLUCKY of them are, give or take 4 deviations."""
        mean = reference.UNLUCKY * self.judged
        return self.redrawn > mean + 4 * mean**0.5 + 1

    def __str__(self):
        return f"{self.redrawn} of {self.judged} float32 cases were right in another draw only"


luck = Luck()  # of this process


def run(case, framework=None, backend=None, attention=None):
    """Makes the call and returns the complaints, none if all is right.

    Raises Refused where the backend neither declares nor takes it. A float32 output that is above
    its limit by less than 3 times may be bad luck (see reference.careful), so another draw of its
    values decides; `luck` counts those, and the session or the campaign fails by it.
    """
    complaints = run_once(case, framework, backend, attention)
    if case.dtype == "float32":
        luck.judged += 1
        if complaints and all(getattr(said, "may_be_luck", False) for said in complaints):
            luck.redrawn += 1
            again = replace(case, seed=case.seed + 2**32)
            return run_once(again, framework, backend, attention) and complaints
    return complaints


def run_once(case, framework=None, backend=None, attention=None):
    attention = attention or function(case)
    framework = framework or NumPy()
    inputs = make_inputs(case, strides_at_least_0=not framework.flips)
    keywords = arguments(case, inputs, framework)
    if inputs.out:
        keywords["out"] = framework.array(inputs.out)
    asked = declared.of_case(case)
    takers = [backend] if backend else {"cpu": ["cpu"], "cuda": ["sm90", "sm80"]}[framework.device]
    reasons = [declared.reason(taker, **asked) for taker in takers]
    reason = all(reasons) and "; ".join(reasons)
    try:
        out, lse = attention(**keywords, backend=backend)
    except NotImplementedError as error:
        if reason:
            raise Refused(reason) from None
        return [f"refused, though declared: {error}"]

    complaints = [f"served, though {reason}"] if reason else []
    if inputs.out:
        if out is not keywords["out"]:
            complaints.append("the result is not the caller's out")
        framework.fetch(inputs.out, keywords["out"])
        if not inputs.out.untouched(around=True):
            complaints.append("wrote outside of out")
    for name, stored in inputs.stored.items():
        framework.fetch(stored, keywords[name])
        if not stored.untouched():
            complaints.append(f"wrote to {name}")
    out, lse = framework.numpy(out), framework.numpy(lse)
    if case.packed:
        out, lse, strange = unpack(case, out, lse)
        complaints += strange
    elif case.layout == "bshd" and out.ndim == 4:
        out = out.swapaxes(1, 2)
    return complaints + verdict(case, inputs.logical, out, lse)


def verdict(case, logical, out, lse):
    if out.dtype != dtype_of(case.dtype):
        return [f"out is {out.dtype}"]
    options = {"softcap": case.softcap, "scale": case.scale, **case.limits}
    options |= {"dropout_p": case.dropout, "seed": case.dropout_seed}
    return reference.check(out, lse, **logical, **options)


def print_wrong(drawn):
    """What is wrong of NumPy's arrays, a line a case; the last line says how many were right."""
    right = 0
    for case in drawn:
        complaints = run(case, NumPy())
        right += not complaints
        if complaints:
            print(case, complaints)
    print(right, "right")
