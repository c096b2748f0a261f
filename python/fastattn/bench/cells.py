"""What is measured: cells, and the suites that they come in.

A *cell* is a shape, a dtype and a mask; the sizes are those that the project's targets are stated
for.
"""

import dataclasses
import functools
import math
from itertools import product

import numpy as np

ODD = (65, 80, 100, 160)  # head sizes between those that kernels are made for
WINDOWS = {"window": 1024, "window4k": 4096}  # keys that a row sees: window=(1023, 0)
# Dense masks, and what of b and h they have: half of the elements, half of the blocks of 128 x 128
# are True; normal numbers that are added
DENSE = {"bool": "", "blocks": "", "bf16": "", "bf16-b": "b", "bf16-h": "h"}
LENGTHS = {  # of packed sequences
    "exp2048": lambda rng, cell: np.minimum(cell.s, 1 + rng.exponential(2048, cell.b)).astype(int),
    "uniform": lambda rng, cell: rng.integers(1, cell.s + 1, cell.b),
}
UNITS = {"cuda": ("TFLOP/s", 1e-12), "cpu": ("GFLOP/s", 1e-9)}
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
MASKS = ("full", "causal")
GRIDS = (  # the suites that are plotted over s
    "cpu",
    "gpu-bf16",
    "gpu-fp16",
    "gpu-backward",
    "gpu-backward-fp16",
    "gpu-backward-deterministic",
)
H100_PEAK = 989e12  # dense bf16 and fp16 FLOP/s, datasheet; the H200's is the same


@dataclasses.dataclass(frozen=True)
class Cell:
    suite: str
    device: str  # "cpu" or "cuda"
    b: int
    hq: int
    s: int  # sq = sk
    d: int
    dtype: str = "bf16"
    mask: str = "full"  # or "causal", or a key of WINDOWS or of DENSE
    hk: int = 0  # 0: hq
    dv: int = 0  # 0: d
    inputs: str = "normal"  # or "qx16", "qx40", "qx100", "spike": one huge key late in the row
    clock: str = "call"  # or "host": Python to launch; "sustained": one second without a pause
    change: str = ""  # of the scores: "softcap", "alibi", "sink", "dropout"
    lengths: str = ""  # packed sequences: a name in LENGTHS; s is the longest that there may be
    computes: str = (
        ""  # "": the output; "backward": gradients; "both": the two, one after the other
    )
    deterministic: bool = False  # gradients of the same bits in every run

    @functools.cached_property
    def packed(self):
        """The lengths of the b packed sequences, or None."""
        return LENGTHS[self.lengths](np.random.default_rng(0), self) if self.lengths else None

    @property
    def scores(self):
        """Visible ones, of one head of all sequences."""
        if self.packed is not None:
            n = self.packed.astype(float)
            return float((n * (n + 1) / 2 if self.mask == "causal" else n * n).sum())
        if self.mask in WINDOWS:
            return float(self.b * sum(min(i + 1, WINDOWS[self.mask]) for i in range(self.s)))
        return self.b * self.s**2 / (2 if self.mask in ("causal", "blocks") else 1)

    @property
    def rows(self):
        return self.b * self.s if self.packed is None else int(self.packed.sum())

    @property
    def kv(self):
        """Key heads and value size."""
        return self.hk or self.hq, self.dv or self.d

    @property
    def label(self):
        (hk, dv), hq, d = self.kv, self.hq, self.d
        extra = [x for x in (self.lengths, self.inputs, self.clock, self.change) if x]
        extra = [x for x in extra if x not in ("normal", "call")]
        extra += [x for x in (self.computes,) if x] + ["deterministic"] * self.deterministic
        heads, size = f"{hq}:{hk}" if hk != hq else hq, f"{d}/{dv}" if dv != d else d
        words = (self.dtype, f"b{self.b}", f"h{heads}", f"s{self.s}", f"d{size}", self.mask, *extra)
        return " ".join(words)

    @property
    def flops(self):
        """By convention the backward pass is five products for the forward's two."""
        times = {"": 1, "backward": 2.5, "both": 3.5}[self.computes]
        return times * 2 * (self.d + self.kv[1]) * self.hq * self.scores

    @property
    def bytes(self):
        """Each input read once, the output written once; the backward pass does so with gradients
        too."""
        hk, dv = self.kv
        times = {"": 1, "backward": 2, "both": 3}[self.computes]
        elements = times * self.rows * (self.hq * (self.d + dv) + hk * (self.d + dv))
        return elements * SIZE[self.dtype] + math.prod(self.mask_shape) * self.mask_bytes

    @property
    def mask_shape(self):
        """(b, h, sq, sk) of a dense mask, 1 where it is broadcast; all 0 without one."""
        if self.mask not in DENSE:
            return (0, 0, 0, 0)
        axes = DENSE[self.mask]
        return (self.b if "b" in axes else 1, self.hq if "h" in axes else 1, self.s, self.s)

    @property
    def mask_bytes(self):
        return 1 if self.mask in ("bool", "blocks") else 2


def suites():
    """Name -> cells."""
    found = [*_cpu(), *_gpu_grids(), *_gpu_shapes(), *_gpu_features(), *_gpu_backward()]
    names = dict.fromkeys(cell.suite for cell in found)
    return {name: [cell for cell in found if cell.suite == name] for name in names}


def _cpu():
    for dtype, d, mask, s in product(SIZE, (64, 128), MASKS, (512, 2048, 4096)):
        yield Cell("cpu", "cpu", 1, 8, s, d, dtype, mask)
    yield from (Cell("cpu-mask", "cpu", 1, 8, 2048, d, "fp32", "bool") for d in (64, 128))
    yield from (Cell("cpu-threads", "cpu", 1, 1, 4096, d, "fp32") for d in (64, 128))
    yield Cell("cpu-host", "cpu", 1, 1, 8, 16, "fp32", clock="host")


def changes(cell):
    """The keywords of attention that change a cell's scores; arrays as NumPy's."""
    heads = np.arange(cell.hq, dtype=np.float32)
    return {
        "": {},
        "softcap": {"softcap": 50.0},
        "alibi": {"alibi_slopes": 2 ** (-8 * (heads + 1) / cell.hq)},
        "sink": {"sink": heads % 7 - 3},
        "dropout": {"dropout_p": 0.1, "seed": 2**40 + 3},
    }[cell.change]


def _grid(suite, dtype, **keywords):
    """16,384 tokens, hq * d = 2048: the grid of the FlashAttention papers."""
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    for d, mask, s in product((64, 128, 256), MASKS, lengths):
        yield Cell(suite, "cuda", 16384 // s, 2048 // d, s, d, dtype, mask, **keywords)


def _gpu_grids():
    yield from (cell for dtype in ("bf16", "fp16") for cell in _grid(f"gpu-{dtype}", dtype))


def _gpu_shapes():
    # the two shapes of the report that this project began with
    for (s, d), dtype, mask in product(((4096, 128), (512, 64)), ("bf16", "fp16"), MASKS):
        yield Cell("gpu-origin", "cuda", 16, 96, s, d, dtype, mask)
    for mask in MASKS:
        yield Cell("gpu-sustained", "cuda", 16, 96, 4096, 128, "bf16", mask, clock="sustained")
    for s, mask in product((4096, 16384), MASKS):
        yield Cell("gpu-gqa", "cuda", 16384 // s, 32, s, 128, mask=mask, hk=8)
    sizes = ((96, 96), (192, 192), (192, 128), (128, 128), *((x, x) for x in ODD))
    for (d, dv), mask in product(sizes, MASKS):
        yield Cell("gpu-heads", "cuda", 4, 16, 4096, d, mask=mask, dv=dv)
    for d, bh, s in product((64, 128), (8, 64, 512, 4096), (16, 64, 128, 256)):
        yield Cell("gpu-short", "cuda", bh // 8, 8, s, d)


def _gpu_features():
    kinds = ("qx16", "qx40", "qx100", "spike")
    for dtype, mask, kind in product(("bf16", "fp16"), MASKS, kinds):
        yield Cell("gpu-hostile", "cuda", 4, 16, 4096, 128, dtype, mask, inputs=kind)
    # the dense masks against whoever takes them, and against ours without one
    yield from (Cell("gpu-mask", "cuda", 4, 16, 4096, 128, mask=mask) for mask in DENSE)
    changes = ("softcap", "alibi", "sink", "dropout")
    for dtype, change, mask in product(("bf16", "fp16"), changes, MASKS):
        yield Cell("gpu-scores", "cuda", 4, 16, 4096, 128, dtype, mask, change=change)
    yield from (Cell("gpu-window", "cuda", 1, 16, 16384, 128, mask=mask) for mask in WINDOWS)
    for mask, s in product(MASKS, (1024, 4096, 16384)):
        yield Cell("gpu-flex", "cuda", 16384 // s, 16, s, 128, mask=mask)
    yield Cell("gpu-varlen", "cuda", 64, 16, 8192, 128, mask="causal", lengths="exp2048")
    yield Cell("gpu-varlen", "cuda", 100_000, 2, 64, 128, lengths="uniform")
    yield Cell("gpu-host", "cuda", 1, 8, 128, 64, clock="host")


def _gpu_backward():
    backward = functools.partial(Cell, device="cuda", computes="backward")
    suite = "gpu-backward"
    yield from _grid(suite, "bf16", computes="backward")
    yield from _grid(f"{suite}-fp16", "fp16", computes="backward")
    yield from _grid(f"{suite}-deterministic", "bf16", computes="backward", deterministic=True)
    for (s, d), mask in product(((512, 64), (4096, 128)), MASKS):
        yield Cell(f"{suite}-origin", "cuda", 16, 96, s, d, mask=mask, computes="both")
    for s, mask in product((4096, 16384), MASKS):
        yield backward(f"{suite}-gqa", b=16384 // s, hq=32, s=s, d=128, mask=mask, hk=8)
    # as the forward's, beside whoever has a gradient of them and ours without what is special
    shape = {"b": 4, "hq": 16, "s": 4096, "d": 128}
    yield from (backward(f"{suite}-mask", **shape, mask=mask) for mask in ("blocks", "bf16-b"))
    for change, mask in product(("softcap", "alibi", "sink", "dropout"), MASKS):
        yield backward(f"{suite}-scores", **shape, mask=mask, change=change)
    for mask in WINDOWS:
        yield backward(f"{suite}-window", b=1, hq=16, s=16384, d=128, mask=mask)
    longest = {"b": 64, "hq": 16, "s": 8192, "d": 128, "lengths": "exp2048"}
    yield backward(f"{suite}-varlen", **longest, mask="causal")
    yield backward(f"{suite}-host", b=1, hq=8, s=128, d=64, clock="host")
