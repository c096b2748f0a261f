"""The measurements: `python -m fastattn bench`, the same code that `python benchmarks` calls.

One *cell* is a shape, a dtype and a mask. Every implementation installed here computes it: first it
is checked against float64, then all are timed side by side, interleaved round by round, because
clocks and power move more between two runs than most optimisations gain. What is printed is the
median, with the 10th and 90th percentile, beside the two limits of the machine as measured in the
same run: its matrix product rate and its copy bandwidth, or what was faster. Losing cells are
printed like the others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import operator
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

import fastattn

# ---------------------------------------------------------------------------------------- cells


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
        heads, size = f"{hq}:{hk}" if hk != hq else hq, f"{d}/{dv}" if dv != d else d
        words = (self.dtype, f"b{self.b}", f"h{heads}", f"s{self.s}", f"d{size}", self.mask, *extra)
        return " ".join(words)

    @property
    def flops(self):
        return 2 * (self.d + self.kv[1]) * self.hq * self.scores

    @property
    def bytes(self):
        """Each input read once, the output written once."""
        hk, dv = self.kv
        elements = self.rows * (self.hq * (self.d + dv) + hk * (self.d + dv))
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
GRIDS = ("cpu", "gpu-bf16", "gpu-fp16")  # the suites that are plotted over s
H100_PEAK = 989e12  # dense bf16 and fp16 FLOP/s, datasheet; the H200's is the same


def _suites():
    """Name -> cells. The sizes are those that the project's targets are stated for."""
    product = itertools.product

    def grid(dtype):  # 16,384 tokens, hq * d = 2048: the grid of the FlashAttention papers
        return [
            Cell(f"gpu-{dtype}", "cuda", 16384 // s, 2048 // d, s, d, dtype, m)
            for d, m, s in product((64, 128, 256), MASKS, (512, 1024, 2048, 4096, 8192, 16384))
        ]

    def origin(suite, dtypes, shapes, **keywords):
        return [
            Cell(suite, "cuda", 16, 96, s, d, dtype, m, **keywords)
            for (s, d), dtype, m in product(shapes, dtypes, MASKS)
        ]

    return {
        "cpu": [
            Cell("cpu", "cpu", 1, 8, s, d, dtype, m)
            for dtype, d, m, s in product(SIZE, (64, 128), MASKS, (512, 2048, 4096))
        ],
        "cpu-mask": [Cell("cpu-mask", "cpu", 1, 8, 2048, d, "fp32", "bool") for d in (64, 128)],
        "cpu-threads": [Cell("cpu-threads", "cpu", 1, 1, 4096, d, "fp32") for d in (64, 128)],
        "cpu-host": [Cell("cpu-host", "cpu", 1, 1, 8, 16, "fp32", clock="host")],
        "gpu-bf16": grid("bf16"),
        "gpu-fp16": grid("fp16"),
        # the two shapes of the report that this project began with
        "gpu-origin": origin("gpu-origin", ("bf16", "fp16"), ((4096, 128), (512, 64))),
        "gpu-sustained": origin("gpu-sustained", ("bf16",), ((4096, 128),), clock="sustained"),
        "gpu-gqa": [
            Cell("gpu-gqa", "cuda", 16384 // s, 32, s, 128, mask=m, hk=8)
            for s, m in product((4096, 16384), MASKS)
        ],
        "gpu-heads": [
            Cell("gpu-heads", "cuda", 4, 16, 4096, d, mask=m, dv=dv)
            for d, dv in ((96, 96), (192, 192), (192, 128), (128, 128), *((x, x) for x in ODD))
            for m in MASKS
        ],
        "gpu-short": [
            Cell("gpu-short", "cuda", bh // 8, 8, s, d)
            for d, bh, s in product((64, 128), (8, 64, 512, 4096), (16, 64, 128, 256))
        ],
        "gpu-hostile": [
            Cell("gpu-hostile", "cuda", 4, 16, 4096, 128, dtype, m, inputs=x)
            for dtype, m, x in product(("bf16", "fp16"), MASKS, ("qx16", "qx40", "qx100", "spike"))
        ],
        # the dense masks against whoever takes them, and against ours without one
        "gpu-mask": [Cell("gpu-mask", "cuda", 4, 16, 4096, 128, mask=m) for m in DENSE],
        "gpu-scores": [
            Cell("gpu-scores", "cuda", 4, 16, 4096, 128, dtype, m, change=x)
            for dtype, x, m in product(
                ("bf16", "fp16"), ("softcap", "alibi", "sink", "dropout"), MASKS
            )
        ],
        "gpu-window": [Cell("gpu-window", "cuda", 1, 16, 16384, 128, mask=m) for m in WINDOWS],
        "gpu-flex": [
            Cell("gpu-flex", "cuda", 16384 // s, 16, s, 128, mask=m)
            for m, s in product(MASKS, (1024, 4096, 16384))
        ],
        "gpu-varlen": [
            Cell("gpu-varlen", "cuda", 64, 16, 8192, 128, mask="causal", lengths="exp2048"),
            Cell("gpu-varlen", "cuda", 100_000, 2, 64, 128, lengths="uniform"),
        ],
        "gpu-host": [Cell("gpu-host", "cuda", 1, 8, 128, 64, clock="host")],
    }


# ---------------------------------------------------------------------------- arrays and clocks


class NumpyArrays:
    """Inputs as NumPy arrays, timed with the host's clock."""

    name, device = "numpy", "cpu"

    def __init__(self):
        self.dtypes = {"fp32": np.float32, "fp16": np.float16}
        with contextlib.suppress(ImportError):
            self.dtypes["bf16"] = importlib.import_module("ml_dtypes").bfloat16

    def copies(self, cell):
        return 1

    def normal(self, rng, shape, dtype):
        return rng.standard_normal(shape, np.float32).astype(self.dtypes[dtype])

    def bool(self, array):
        return array

    def nan(self, shape, dtype):
        return np.full(shape, np.nan, self.dtypes[dtype])

    def take(self, array):
        """An output of any framework as an array of this one."""
        return np.asarray(array)

    def float64(self, array):
        return array.astype(np.float64)

    def finite(self, array):
        return bool(np.isfinite(array.astype(np.float32)).all())

    def equal(self, a, b):
        return bool((a == b).all())

    def synchronize(self):
        pass

    def seconds(self, calls, n, inner):
        """Times of n turns of `inner` calls each, per call. Runs untimed for 10 ms first: idle
        threads of the implementation before this one still spin for about half of that."""
        start = time.perf_counter()
        while time.perf_counter() - start < 10e-3:
            calls[0]()
        times = []
        for _ in range(n):
            start = time.perf_counter()
            for _ in range(inner):
                calls[0]()
            times.append((time.perf_counter() - start) / inner)
        return times

    host_seconds = seconds


class TorchArrays(NumpyArrays):
    """Inputs as torch tensors of the CPU: ours and torch's own attention take the same ones."""

    name = "torch"

    def __init__(self):
        import torch

        self.torch = torch
        self.dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def normal(self, rng, shape, dtype):
        array = rng.standard_normal(shape, np.float32)
        return self.torch.from_numpy(array).to(self.device, self.dtypes[dtype])

    def bool(self, array):
        return self.torch.from_numpy(array).to(self.device)

    def nan(self, shape, dtype):
        return self.torch.full(shape, math.nan, dtype=self.dtypes[dtype], device=self.device)

    def take(self, array):
        return array if isinstance(array, self.torch.Tensor) else self.torch.from_dlpack(array)

    def float64(self, array):
        return array.double().cpu().numpy()

    def finite(self, array):
        return bool(self.torch.isfinite(array).all())

    def equal(self, a, b):
        return self.torch.equal(a, b)


class CudaArrays(TorchArrays):
    """Inputs as torch tensors of the GPU, timed with CUDA events."""

    device = "cuda"

    def __init__(self):
        super().__init__()
        properties = self.torch.cuda.get_device_properties(0)
        self.l2 = getattr(properties, "L2_cache_size", 50 << 20)
        self.hertz, self.ahead = 1.9e9, {}

    def copies(self, cell):
        """Inputs that fit the L2 are rotated (up to 256 sets), to be read from memory each time."""
        return min(256, math.ceil(2 * self.l2 / cell.bytes))

    def normal(self, rng, shape, dtype):
        seed = self.torch.Generator("cuda").manual_seed(int(rng.integers(1 << 62)))
        dtype = self.dtypes[dtype]
        return self.torch.randn(shape, generator=seed, device="cuda", dtype=dtype)

    def synchronize(self):
        self.torch.cuda.synchronize()

    def seconds(self, calls, n, inner):
        """As above, by events; the GPU sleeps first, longer than the host needs for the whole
        burst (as the one before it took), so that no launch latency is counted."""
        cuda, turn = self.torch.cuda, itertools.cycle(calls)
        events = [cuda.Event(enable_timing=True) for _ in range(n + 1)]
        cuda._sleep(int(max(2e-3, 1.5 * self.ahead.get(id(calls), 0)) * self.hertz))
        start = time.perf_counter()
        next(turn)()  # brings the clocks back up
        events[0].record()
        for event in events[1:]:
            for _ in range(inner):
                next(turn)()
            event.record()
        self.ahead[id(calls)] = time.perf_counter() - start
        cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 / inner for a, b in itertools.pairwise(events)]

    def host_seconds(self, calls, n, inner):
        """Python to launch: the host's clock while the GPU sleeps, so that it never waits."""
        times = []
        for _ in range(n):
            self.torch.cuda._sleep(int(15e-3 * self.hertz))
            start = time.perf_counter()
            for _ in range(inner):
                calls[0]()
            times.append((time.perf_counter() - start) / inner)
            self.torch.cuda.synchronize()
        return times


def gpu_usable():
    """Whether a GPU backend takes torch's CUDA tensors here."""
    if not importlib.util.find_spec("torch"):
        return False
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return False
    x = torch.empty(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
    return fastattn.explain(fastattn.attention, x, x, x).backend is not None


def arrays_for(device):
    """The arrays to measure with: torch's where it is installed, since that is what peers take."""
    if device == "cuda":
        return CudaArrays()
    return TorchArrays() if importlib.util.find_spec("torch") else NumpyArrays()


# -------------------------------------------------------------------------------------- peers


@dataclasses.dataclass(frozen=True)
class Peer:
    """`build(cell, q, k, v, mask)` gives a function without arguments, or raises: not installed,
    or not for this cell. Arrays are (b, h, s, d); of packed sequences (1, h, total, d)."""

    name: str
    device: str
    build: object
    module: str = "fastattn"  # that it needs
    suites: tuple = ()  # (): all of the device
    of: object = None  # Cell -> the cell that it computes, where that is another one
    context: object = contextlib.nullcontext  # entered around its turns

    def installed(self):
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # the package that the module would be in
            return False


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


def refuse_changes(cell):
    if cell.change:
        raise NotImplementedError(f"no {cell.change} here")


def _ours(backend=None, package=fastattn):
    def build(cell, q, k, v, mask):
        causal = cell.mask == "causal"
        if cell.lengths:
            return _packed_call(package.attention_varlen, cell, q, k, v, backend=backend)
        if cell.clock == "host":  # the drop-in against what it replaces
            sdpa = package.scaled_dot_product_attention
            return lambda: sdpa(q, k, v, is_causal=causal)
        keywords = {"causal": causal, "mask": mask, "backend": backend}
        if cell.mask in WINDOWS:
            keywords["window"] = (WINDOWS[cell.mask] - 1, 0)
        keywords |= {
            name: q.new_tensor(x.tolist(), dtype=arrays_for(cell.device).dtypes["fp32"])
            if isinstance(x, np.ndarray)
            else x
            for name, x in changes(cell).items()
        }
        return lambda out=None: package.attention(q, k, v, out=out, **keywords)

    return build


def _packed_call(function, cell, q, k, v, **keywords):
    """A call of flash-attn's packed interface, (total, h, d), which is ours too."""
    cu = np.append(0, np.cumsum(cell.packed)).astype(np.int32)
    cu = importlib.import_module("torch").from_numpy(cu).to(q.device)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    most = int(cell.packed.max())
    keywords |= dict(zip(names, (cu, cu, most, most), strict=True))
    keywords["causal"] = cell.mask == "causal"

    def run(out=None):
        more = {} if out is None else {"out": out[0].transpose(0, 1)}
        out = function(q, k, v, **keywords, **more)
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)[None]

    return run


def _sdpa(cell, q, k, v, mask):
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    refuse_changes(cell)
    if cell.mask in WINDOWS:
        raise NotImplementedError("no window")
    keywords = {"is_causal": cell.mask == "causal", "attn_mask": mask}
    if cell.kv[0] != cell.hq:
        keywords["enable_gqa"] = True
    return lambda: sdpa(q, k, v, **keywords)


def _only(backend):
    """SDPA held to one of its backends."""

    def context():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, backend))

    return context


def _flash_attn(module):
    """The packages that speak flash-attn's interface: (b, s, h, d), causal=."""

    def build(cell, q, k, v, mask):
        package = importlib.import_module(module)
        if cell.lengths:
            return _packed_call(package.flash_attn_varlen_func, cell, q, k, v)
        call = package.flash_attn_func
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        keywords = changes(cell)
        if mask is not None or keywords.keys() - {"softcap"}:
            raise NotImplementedError(f"no {cell.change or 'mask'}")
        keywords["causal"] = cell.mask == "causal"
        if cell.mask in WINDOWS:
            keywords["window_size"] = (WINDOWS[cell.mask] - 1, 0)

        def run():
            out = call(q, k, v, **keywords)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return build


def _flex(cell, q, k, v, mask):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block = None
    if cell.mask == "causal":
        block = create_block_mask(lambda b, h, i, j: i >= j, None, None, cell.s, cell.s)
    call = torch.compile(flex_attention, dynamic=False)
    return lambda: call(q, k, v, block_mask=block)


def _jax(cell, q, k, v, mask):
    import jax

    def take(x):
        return jax.numpy.asarray(x) if isinstance(x, np.ndarray) else jax.dlpack.from_dlpack(x)

    @jax.jit
    def call(q, k, v, mask):
        causal = cell.mask == "causal"
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
        return out.swapaxes(1, 2)

    q, k, v = (take(x).swapaxes(1, 2) for x in (q, k, v))
    mask = None if mask is None else take(mask)[None, None]
    return lambda: call(q, k, v, mask).block_until_ready()


@contextlib.contextmanager
def _one_thread():
    """Ours held to one thread."""
    fastattn.set_num_threads(1)
    try:
        yield
    finally:
        fastattn.set_num_threads(None)


def _unmasked(cell):
    return dataclasses.replace(cell, mask="full")


def _plain(cell):
    return dataclasses.replace(cell, change="")


def _causal(cell):
    return dataclasses.replace(cell, mask="causal")


def _ordinary(cell):
    return dataclasses.replace(cell, inputs="normal")


def _mha(cell):
    return dataclasses.replace(cell, hk=0)


def _package(name, module):
    """Another build's package under its own name: a folder, or this one with a compiled module."""
    folder = tempfile.mkdtemp(prefix="fastattn-")
    whole = pathlib.Path(module).is_dir()
    source = pathlib.Path(module) if whole else pathlib.Path(__file__).parent
    others = shutil.ignore_patterns("__pycache__", *([] if whole else ["*.so"]))
    shutil.copytree(source, pathlib.Path(folder, name), ignore=others)
    if not whole:
        shutil.copy2(module, pathlib.Path(folder, name, "_C.abi3.so"))
    sys.path.append(folder)
    return importlib.import_module(name)


def _dense(cell):
    """Padded where that is the same order of work; else as much work in sequences of 4,096."""
    if cell.s <= 64:
        return dataclasses.replace(cell, lengths="")
    b = max(1, round(2 * cell.scores / 4096**2))
    return dataclasses.replace(cell, lengths="", b=b, s=4096)


def peers(backend=None, modules=()):
    """Everyone who may be asked, ours first; the variants of ours run beside it like peers.
    `modules`: (name, file) of other builds, to be measured against this one."""
    ours = _ours(backend)
    others = {name: _ours(backend, _package(f"fastattn_{name}", file)) for name, file in modules}
    return [
        *(Peer(name, "cuda", build) for name, build in others.items()),
        Peer("fastattn", "cpu", ours),
        Peer("unmasked", "cpu", ours, suites=("cpu-mask",), of=_unmasked),
        Peer("1 thread", "cpu", ours, suites=("cpu-threads",), context=_one_thread),
        Peer("torch", "cpu", _sdpa, "torch"),
        Peer("jax", "cpu", _jax, "jax"),
        Peer("fastattn", "cuda", ours),
        Peer("ordinary", "cuda", ours, suites=("gpu-hostile",), of=_ordinary),
        Peer("unmasked", "cuda", ours, suites=("gpu-mask",), of=_unmasked),
        Peer("plain", "cuda", ours, suites=("gpu-scores",), of=_plain),
        Peer("causal", "cuda", ours, suites=("gpu-window",), of=_causal),
        Peer("32 kv heads", "cuda", ours, suites=("gpu-gqa",), of=_mha),
        Peer("dense", "cuda", ours, suites=("gpu-varlen",), of=_dense),
        Peer("cudnn", "cuda", _sdpa, "torch", context=_only("CUDNN_ATTENTION")),
        Peer("fa3", "cuda", _flash_attn("fa3_fwd_interface"), "fa3_fwd_interface"),
        Peer("fa4", "cuda", _flash_attn("flash_attn.cute"), "flash_attn.cute"),
        Peer("fa2", "cuda", _sdpa, "torch", context=_only("FLASH_ATTENTION")),
        Peer("efficient", "cuda", _sdpa, "torch", context=_only("EFFICIENT_ATTENTION")),
        Peer("sdpa", "cuda", _sdpa, "torch", ("gpu-host",)),
        Peer("flex", "cuda", _flex, "torch", ("gpu-flex",)),
    ]


VARIANTS = [
    "fastattn",
    "unmasked",
    "1 thread",
    "ordinary",
    "32 kv heads",
    "plain",
    "causal",
    "dense",
]
PACKED = ["fa3", "fa4"]  # the others who take packed sequences

# -------------------------------------------------------------------------- inputs and reference


def make_inputs(arrays, cell, seed=0):
    """q, k, v, mask of a cell; normal numbers, never zeros: those are faster than real ones."""
    rng, (hk, dv), s = np.random.default_rng(seed), cell.kv, cell.s
    if cell.lengths:
        shapes = (cell.rows, cell.hq, cell.d), (cell.rows, hk, cell.d), (cell.rows, hk, dv)
        q, k, v = (arrays.normal(rng, x, cell.dtype).transpose(0, 1)[None] for x in shapes)
        return q, k, v, None
    q = arrays.normal(rng, (cell.b, cell.hq, s, cell.d), cell.dtype)
    k = arrays.normal(rng, (cell.b, hk, s, cell.d), cell.dtype)
    v = arrays.normal(rng, (cell.b, hk, s, dv), cell.dtype)
    if cell.inputs.startswith("qx"):
        q *= int(cell.inputs[2:])
    elif cell.inputs == "spike":
        k[:, :, s * 7 // 8] *= 100
    mask = None
    if cell.mask == "bool":
        mask = arrays.bool(rng.random((s, s)) < 0.5)
    elif cell.mask == "blocks":
        i = np.arange(s) // 128
        mask = arrays.bool((i[:, None] + i) % 2 == 0)
    elif cell.mask in DENSE:
        lead = {"": (), "b": (cell.b, 1), "h": (cell.hq,)}[DENSE[cell.mask]]
        mask = arrays.normal(rng, (*lead, s, s), "bf16")
    return q, k, v, mask


def rounded(x, dtype):
    """x in `dtype`, as float64 (bfloat16 by hand, for NumPy has none)."""
    if dtype != "bf16":
        return x.astype(np.float32 if dtype == "fp32" else np.float16).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def dropped(p, seed, b, h, rows, sk):
    """(rows, sk): 0 where dropout takes an element, 1 / (1 - p) elsewhere (philox.h)."""
    groups = np.arange(-(-sk // 8), dtype=np.uint64)
    i = rows.astype(np.uint64)[:, None]
    x = [np.broadcast_to(np.uint64(n), (len(rows), len(groups))) for n in (groups, i, h, b)]
    for n in range(7):  # Philox4x32-7
        keys = (seed + n * 0x9E3779B9) % 2**32, ((seed >> 32) + n * 0xBB67AE85) % 2**32
        first, third = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        high, low = [y >> np.uint64(32) for y in (third, first)], np.uint64(2**32 - 1)
        even = high[0] ^ x[1] ^ np.uint64(keys[0]), high[1] ^ x[3] ^ np.uint64(keys[1])
        x = [even[0], third & low, even[1], first & low]
    bits = np.stack([half for y in x for half in (y & np.uint64(0xFFFF), y >> np.uint64(16))], -1)
    return (bits.reshape(len(rows), -1)[:, :sk] >= round(p * 65536)) / (1 - p)


def reference(q, k, v, seen, dtype, added=0.0, softcap=0.0, sink=-np.inf, kept=1.0):
    """Rows of one head, q (rows, d), k (sk, d), v (sk, dv), seen (rows, sk): the float64 result and
    what a careful unfused path in `dtype` gives. `added` to the scores, after softcap; of the
    probabilities `kept`."""

    def probabilities(kind):
        s = q.astype(kind) @ k.T.astype(kind) * kind(q.shape[1] ** -0.5)
        if softcap:
            s = kind(softcap) * np.tanh(s / kind(softcap))
        s = np.where(seen, s + np.asarray(added, kind), -np.inf)
        top = np.maximum(np.maximum(s.max(-1, keepdims=True), kind(sink)), np.finfo(kind).min)
        p = np.exp(s - top)
        total = p.sum(-1, keepdims=True) + np.exp(kind(sink) - top)
        return p / np.maximum(total, np.finfo(kind).tiny) * np.asarray(kept, kind)

    p = rounded(probabilities(np.float32), dtype).astype(np.float32)
    return probabilities(np.float64) @ v, rounded(p @ v.astype(np.float32), dtype)


def sampled(arrays, cell, inputs):
    """The reference on up to 64 rows of up to four heads, the first and last of both among them:
    [(b, h, rows, exact, low)]."""
    q, k, v, mask = inputs
    rng = np.random.default_rng(1)
    if cell.lengths:
        return sampled_packed(arrays, cell, q, k, v)
    heads = {(0, 0), (cell.b - 1, cell.hq - 1)}
    heads |= {(int(rng.integers(cell.b)), int(rng.integers(cell.hq))) for _ in range(2)}
    rows = np.unique(np.r_[0, cell.s - 1, rng.integers(0, cell.s, 62)])
    seen = np.ones((len(rows), cell.s), bool)
    if cell.mask == "causal":
        seen = rows[:, None] >= np.arange(cell.s)
    elif cell.mask in WINDOWS:
        distance = rows[:, None] - np.arange(cell.s)
        seen = (distance >= 0) & (distance < WINDOWS[cell.mask])
    elif cell.mask in ("bool", "blocks"):
        seen = arrays.float64(mask)[rows] > 0
    change, samples = changes(cell), []
    for b, h in sorted(heads):
        qi, kj, vj = (arrays.float64(x[b, h * x.shape[1] // cell.hq]) for x in (q, k, v))
        more = {"softcap": change.get("softcap", 0.0)}
        if cell.mask_bytes == 2 and cell.mask in DENSE:
            at = {"": (), "b": (b, 0), "h": (h,)}[DENSE[cell.mask]]
            more["added"] = arrays.float64(mask[at])[rows]
        if "alibi_slopes" in change:
            distance = np.abs(rows[:, None] - np.arange(cell.s))
            more["added"] = -change["alibi_slopes"][h].astype(np.float64) * distance
        if "sink" in change:
            more["sink"] = change["sink"][h]
        if "dropout_p" in change:
            more["kept"] = dropped(change["dropout_p"], change["seed"], b, h, rows, cell.s)
        samples.append((b, h, rows, *reference(qi[rows], kj, vj, seen, cell.dtype, **more)))
    return samples


def sampled_packed(arrays, cell, q, k, v):
    """The same of the longest sequence, the first, the last and one more; b is 0."""
    rng, n, samples = np.random.default_rng(1), cell.packed, []
    for b in sorted({0, cell.b - 1, int(n.argmax()), int(rng.integers(cell.b))}):
        h, mine = int(rng.integers(cell.hq)), slice(int(n[:b].sum()), int(n[: b + 1].sum()))
        rows = np.unique(np.r_[0, n[b] - 1, rng.integers(0, n[b], 62)])
        seen = np.ones((len(rows), n[b]), bool)
        if cell.mask == "causal":
            seen = rows[:, None] >= np.arange(n[b])
        qi, kj, vj = (arrays.float64(x[0, h * x.shape[1] // cell.hq, mine]) for x in (q, k, v))
        rest = reference(qi[rows], kj, vj, seen, cell.dtype)
        samples.append((0, h, mine.start + rows, *rest))
    return samples


def check(arrays, dtype, samples, out):
    """(error, bound) of `out` on the samples. The bound is the project's rule: twice the error of
    the careful unfused path, and the rounding of the output. Every other element has to be finite:
    the buffers held NaN before."""
    worst = np.zeros(3)
    for b, h, rows, exact, low in samples:
        rounding = np.abs(rounded(rounded(exact + 0.3, dtype) - 0.3, dtype) - exact)
        if dtype == "fp32":
            rounding += 4 * np.spacing(np.float32(np.abs(exact).max()))
        errors = (arrays.float64(out[b, h])[rows] - exact, low - exact, rounding)
        worst = np.maximum(worst, [np.abs(x).max() for x in errors])
    if not arrays.finite(out):
        worst[0] = math.inf
    return float(worst[0]), float(2 * worst[1] + 2 * worst[2])


# ----------------------------------------------------------------------------------- measuring


@dataclasses.dataclass
class Options:
    timings: int = 25
    warmup: float = 0.3
    peers: tuple = ()  # names; (): all


def measure(arrays, cell, everyone, options):
    """One cell: the rows of all implementations, ours first, as plain dictionaries."""
    copies = [make_inputs(arrays, cell, seed) for seed in range(arrays.copies(cell))]
    samples = sampled(arrays, cell, copies[0])
    running, rows = [], []
    for peer in everyone:
        if peer.device != cell.device or (peer.suites and cell.suite not in peer.suites):
            continue
        if options.peers and peer.name not in (*VARIANTS, *options.peers):
            continue
        if not peer.installed():
            continue
        if cell.lengths and peer.name not in (*VARIANTS, *PACKED):
            continue
        own = peer.of(cell) if peer.of else cell
        row = {"implementation": peer.name, "label": cell.label, **dataclasses.asdict(cell)}
        row |= {"work": own.flops, "traffic": own.bytes}
        try:
            mine, expected = copies, samples
            if own != cell:
                mine = [make_inputs(arrays, own)]
                expected = sampled(arrays, own, mine[0])
            with peer.context():
                calls = [peer.build(own, *inputs) for inputs in mine]
                # The block that the allocator hands out next holds NaN, as `out` does for ours.
                shape = (*mine[0][0].shape[:-1], own.kv[1])
                poison = arrays.nan(shape, own.dtype)
                if peer.name == "fastattn" and cell.clock == "call":
                    out = calls[0](out=poison)
                else:
                    del poison
                    out = arrays.take(calls[0]())
            row["error"], row["bound"] = check(arrays, own.dtype, expected, out)
        except Exception as error:  # a peer's refusal is a result; ours is one too, and is shown
            words = " ".join(str(error).split()) or type(error).__name__
            row["refused"] = words[:200]
            rows.append(row)
            continue
        rows.append(row)
        running.append((peer, calls, row, out))
    _time(arrays, cell, running, options)
    for peer, calls, row, out in running:
        if peer.name in VARIANTS:  # what was timed is what was checked
            row["repeats"] = arrays.equal(arrays.take(calls[0]()), out)
    return rows


def _time(arrays, cell, running, options):
    clock = arrays.host_seconds if cell.clock == "host" else arrays.seconds
    burst = 5 if arrays.device == "cuda" and cell.clock == "call" else 1
    target = {"host": 1e-3, "sustained": 1.0}.get(cell.clock, 5e-5)
    inner = {}
    for peer, calls, _, _ in running:
        with peer.context():
            estimate = min(clock(calls, 2, 1))
        most = 200 if cell.clock == "host" else 1 << 30  # the launch queue holds about a thousand
        inner[peer.name] = max(1, min(most, math.ceil(target / estimate)))
    start = time.perf_counter()
    times = {peer.name: [] for peer, *_ in running}
    sustained = cell.clock == "sustained"
    rounds = 3 if sustained else math.ceil(max(options.timings, 20) / burst)
    turn = 0
    while turn < rounds:
        warm = sustained or time.perf_counter() - start >= options.warmup
        for i in range(len(running)):
            peer, calls, _, _ = running[(i + turn) % len(running)]
            with peer.context():
                got = clock(calls, burst, inner[peer.name])
            if warm:
                times[peer.name] += got
        turn += warm
    for peer, _, row, _ in running:
        p10, median, p90 = np.percentile(times[peer.name], (10, 50, 90)) * 1e3
        row |= {"ms": median, "p10": p10, "p90": p90, "timings": len(times[peer.name])}


def machine(arrays, sizes=(1024, 2048), copied=1 << 26):
    """The run's own limits, each the best of several tries: matrix product rate per dtype (FLOP/s),
    where a library has one, and copy bandwidth (B/s, bytes read plus bytes written)."""
    rng, cuda = np.random.default_rng(0), arrays.device == "cuda"

    def fastest(call):
        arrays.seconds([call], 1, 1)
        return min(arrays.seconds([call], 8, 1))

    def product(arrays, dtype, n):
        a, b = (arrays.normal(rng, (n, n), dtype) for _ in range(2))
        return 2 * n**3 / fastest(functools.partial(operator.matmul, a, b))

    if cuda:
        limits = {dtype: product(arrays, dtype, 8192) for dtype in ("bf16", "fp16")}
    else:  # the better library, on whichever CPU this is; the kernels widen 16 bits to fp32 ...
        libraries = (NumpyArrays(), arrays) if arrays.name == "torch" else (arrays,)
        fp32 = max(product(x, "fp32", n) for x in libraries for n in sizes)
        limits = {"fp32": fp32, "bf16": fp32, "fp16": fp32}
        if fastattn.info()["cpu"]["level"] == "avx512_bf16":  # ... but for this; NumPy has none
            del limits["bf16"]
            if arrays.name == "torch":
                limits["bf16"] = max(fp32, *(product(arrays, "bf16", n) for n in sizes))
    source = arrays.normal(rng, (16 * copied if cuda else copied,), "bf16" if cuda else "fp32")
    target = source + 0
    copy = functools.partial(operator.setitem, target, slice(None), source)
    limits["copy"] = 2 * source.nbytes / fastest(copy)
    return limits


def limits_of(result):
    """The limits of a result: what machine() measured, or what was reached where that is more. On a
    GPU that its power holds back, attention may be faster than products of random numbers."""
    limits = dict(result["header"]["limits"])
    for row in result["rows"]:
        if "ms" in row and row["clock"] != "host" and row["mask"] != "blocks":  # those may skip
            for name, work in ((row["dtype"], row["work"]), ("copy", row["traffic"])):
                if name in limits:
                    limits[name] = max(limits[name], work / row["ms"] * 1e3)
    return limits


def git(tree):
    """The commit of a source tree, or None."""
    return _shell("git", "-C", str(tree), "describe", "--always", "--dirty")


def _shell(*command):
    """One line of a command's output, or None where it cannot be asked."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return output.stdout.strip().partition("\n")[0]


def environment(arrays, command, commit):
    """Everything that a reader needs to repeat the run: the header of a result file, but for the
    limits."""
    info = fastattn.info()
    packages = ("numpy", "torch", "jax", "triton", "fa3-fwd", "flash-attn-4")
    versions = {"python": platform.python_version(), "fastattn": info["version"]}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    head = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": commit,
        "device": arrays.device,
        "cpu": cpu_name(),
        "cpu_level": info["cpu"]["level"],
        "cpu_threads": info["cpu"]["threads"],
        "versions": versions,
    }
    if arrays.device == "cuda":
        torch = arrays.torch
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        head["gpu"] = torch.cuda.get_device_name()
        head["driver"] = _shell("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        values = _shell("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        head["clocks"] = dict(zip(query.split(","), (values or "").split(", "), strict=False))
        versions["cuda"], versions["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return head


def caption(header):
    """Where something was measured, in one line."""
    machine = header.get("gpu") or f"{header['cpu']}, {header['cpu_threads']} threads"
    clocks = header.get("clocks")
    driver = f", driver {header['driver']}, {clocks['clocks.sm']}" if clocks else ""
    names = ("torch", "cuda", "cudnn", "jax", "fa3-fwd", "flash-attn-4")
    versions = header["versions"]
    found = "".join(f", {name} {versions[name]}" for name in names if versions.get(name))
    return f"{machine}{driver}{found}; {header['date'][:10]}, commit {header['commit']}"


def cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def known_peers(path):
    """peers.csv -> {(b, h, s, d, mask): cuDNN's time / the best known peer's}, forward."""
    import csv

    with open(path) as lines:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        keys = ("batch", "heads", "seq", "head_dim")
        return {
            (*(int(row[key]) for key in keys), row["mask"]): float(row["x_cudnn"])
            for row in rows
            if row["pass"] == "fwd" and row["x_cudnn"]
        }


def derive(rows, known):
    """What follows from the times of one cell: speed, ratios to ours."""
    by_name = {row["implementation"]: row for row in rows}
    ours = by_name["fastattn"].get("ms")
    for row in rows:
        if "ms" not in row:
            continue
        if row["clock"] != "host":
            row["flops"] = row["work"] / row["ms"] * 1e3
        if ours:
            row["ratio"] = row["ms"] / ours
    peers_ms = [r["ms"] for r in rows if "ms" in r and r["implementation"] not in VARIANTS]
    if ours and peers_ms:
        by_name["fastattn"]["best_live"] = min(peers_ms) / ours
    key = tuple(by_name["fastattn"][x] for x in ("b", "hq", "s", "d", "mask"))
    if ours and key in known and "ms" in by_name.get("cudnn", ()):
        by_name["fastattn"]["best_known"] = by_name["cudnn"]["ms"] / known[key] / ours
    return rows


# ------------------------------------------------------------------------------------- reports


def aligned(lines):
    """Columns of text, the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))
        yield "  ".join([line[0].ljust(widths[0]), *cells]).rstrip()


def markdown(lines):
    """The same as a table in Markdown."""
    head, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return [head, "|---" * len(lines[0]) + "|", *rest]


def _number(row, key, text="{:.3g}", times=1):
    return text.format(row[key] * times) if row.get(key) is not None else "-"


def geometric_mean(values):
    values = [x for x in values if x]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def shares(row, limits):
    """(share of the limit of its dtype, time over the higher floor); None where unknown."""
    if "flops" not in row or row["dtype"] not in limits:
        return None, None
    floor = max(row["work"] / limits[row["dtype"]], row["traffic"] / limits["copy"]) * 1e3
    return row["flops"] / limits[row["dtype"]], row["ms"] / floor


def table(rows, device, limits):
    """The text table of one suite: a line per cell, ours, then each peer's time over ours."""
    names = list(dict.fromkeys(row["implementation"] for row in rows if "ms" in row))
    names = [name for name in names if name != "fastattn"]
    unit, scale = UNITS[device]
    head = [rows[0]["suite"], "ms", "p10", "p90", "us/head", unit, "% limit", "x floor", "error"]
    head += [f"x {name}" for name in names] + ["x best", "x known"]
    lines, cells = [head], {}
    for row in rows:
        cells.setdefault(row["label"], {})[row["implementation"]] = row
    for label, cell in cells.items():
        ours = cell["fastattn"]
        times = [_number(ours, key, "{:.4g}") for key in ("ms", "p10", "p90")]
        per_head = _number(ours, "ms", "{:.4g}", 1e3 / ours["hq"])
        share, over = shares(ours, limits)
        line = [label, *times, per_head, _number(ours, "flops", times=scale)]
        line += [f"{share:.0%}".strip("%"), f"{over:.2f}"] if share else ["-", "-"]
        line += [_number(ours, "error", "{:.1e}")]
        for name in names:
            peer = cell.get(name, {})
            bad = "!" if peer.get("error", 0) > peer.get("bound", 0) else ""
            line.append(_number(peer, "ratio", "{:.2f}") + bad)
        lines.append(line + [_number(ours, key, "{:.2f}") for key in ("best_live", "best_known")])
    if len(cells) > 1:
        line = ["geometric mean"] + [""] * 8
        for name in names:
            line.append(_mean(cell.get(name, {}).get("ratio") for cell in cells.values()))
        for key in ("best_live", "best_known"):
            line.append(_mean(cell["fastattn"].get(key) for cell in cells.values()))
        lines.append(line)
    # A column that says nothing anywhere is left out.
    kept = [c for c in zip(*lines, strict=True) if set(c[1:]) - {"-", ""}]
    yield from aligned([list(line) for line in zip(*kept, strict=True)])
    for row in rows:
        name = f"{row['label']}: {row['implementation']}"
        if row.get("error", 0) > row.get("bound", 0):
            yield f"! {name} is off by {row['error']:.2e}, the bound is {row['bound']:.2e}"
        elif row["implementation"] == "fastattn" and "refused" in row:
            yield f"! {name} refused: {row['refused']}"
        elif row["implementation"] == "fastattn" and not row["repeats"]:
            yield f"! {name} gave other bits in its last call"


def _mean(values):
    mean = geometric_mean(values)
    return f"{mean:.3f}" if mean else "-"


def wrong(rows):
    """Our rows that are not right: they make the command fail."""
    ours = (row for row in rows if row["implementation"] in VARIANTS)
    return [r for r in ours if "ms" not in r or r["error"] > r["bound"] or not r["repeats"]]


def _progress(items):
    """A progress bar on stderr: tqdm's, or a plain count where it is not installed."""
    with contextlib.suppress(ImportError):
        bar = importlib.import_module("tqdm").tqdm
        yield from bar(items, unit="cell", leave=False, file=sys.stderr, dynamic_ncols=True)
        return
    for i, item in enumerate(items):
        print(f"\r{i + 1}/{len(items)} ", end="", file=sys.stderr, flush=True)
        yield item
    print("\r", end="", file=sys.stderr)


class Refusal(Exception):  # noqa: N818 - a sentence for the user, not a fault
    """What the command line asks for cannot be measured here."""


def parser_of(program, tree):
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    others = [peer for peer in peers() if peer.name not in VARIANTS]
    parser.epilog = "\n".join(
        [
            f"suites: {', '.join(_suites())}; 'cpu*' and 'gpu*' take all of a kind.",
            f"peers of the CPU: {', '.join(x.name for x in others if x.device == 'cpu')}; "
            f"of a GPU: {', '.join(x.name for x in others if x.device == 'cuda')}",
        ]
    )
    add = parser.add_argument
    add("--suite", action="append", help="name, or a prefix with *; default: by the device")
    add("--filter", action="append", default=[], help="words of a cell's label; repeats")
    add("--peers", help="names, comma-separated; default: all that are installed")
    backends = fastattn.info()["backends"]
    add("--backend", choices=backends, help="hold fastattn to this backend")
    add(
        "--module",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="another build, measured as NAME beside this one: its compiled module, or where the "
        "two do not fit together its package's folder; repeats",
    )
    add("--timings", type=int, default=25, help="of each implementation, at least 20")
    add("--warmup", type=float, default=0.3, help="seconds, each cell")
    known, commit = (tree / "benchmarks" / "peers.csv", git(tree)) if tree else (None, None)
    add("--known", default=known, help="benchmarks/peers.csv, for the column 'x known'")
    add("--commit", default=commit, help="to be recorded; benchmarks/ knows that of its tree")
    add("--json", metavar="FILE", help="write header and rows")
    add("--plot", metavar="DIR", help="write PNGs (needs matplotlib)")
    add("--from", dest="source", metavar="FILE", help="print and plot a result file again")
    return parser


def recorded(program, argv):
    """The command line as results keep it: files by their names, without folders of a machine."""
    return shlex.join([*program.split(), *(re.sub(r"(^|=)/.*/", r"\1", x) for x in argv)])


def main(argv, program="python -m fastattn bench", tree=None):
    """The command line, called from the sources in `tree` (None: installed). Returns the status."""
    args = parser_of(program, tree).parse_args(argv)
    try:
        if args.plot:  # before minutes of measuring
            if not importlib.util.find_spec("matplotlib"):
                raise Refusal("--plot needs matplotlib: pip install matplotlib")
            pathlib.Path(args.plot).mkdir(parents=True, exist_ok=True)
        if args.source:
            result = json.loads(pathlib.Path(args.source).read_text())
        else:
            result = run(args, recorded(program, argv))
    except (Refusal, OSError, json.JSONDecodeError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to print
        return 130
    report(result)
    if args.plot:
        for path in importlib.import_module("fastattn._bench_plot").save(result, args.plot):
            print(f"wrote {path}")
    bad = wrong(result["rows"])
    if bad:
        print(f"{len(bad)} of our rows are wrong or refused", file=sys.stderr)
    return 130 if "interrupted" in result["header"] else 1 if bad else 0


def dump(result):
    """JSON with one row a line, so that a result file can be read and compared."""
    rows = ",\n".join("  " + json.dumps(row, default=float) for row in result["rows"])
    return f'{{"header": {json.dumps(result["header"], indent=1)},\n"rows": [\n{rows}\n]}}\n'


def report(result):
    for key, value in result["header"].items():
        print(f"{key:12} {value}")
    for suite in dict.fromkeys(row["suite"] for row in result["rows"]):
        print()
        rows = [row for row in result["rows"] if row["suite"] == suite]
        print("\n".join(table(rows, result["header"]["device"], limits_of(result))))


def choose(args):
    """The cells that the arguments name, all of one device, which is here; else a Refusal."""
    suites = _suites()
    gpu = gpu_usable()
    wanted = args.suite or ["gpu*" if gpu else "cpu*"]

    def matches(name, pattern):
        return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern

    for pattern in wanted:
        if not any(matches(name, pattern) for name in suites):
            raise Refusal(f"there is no suite {pattern!r}, only {', '.join(suites)}")
    cells = [
        cell
        for name, cells in suites.items()
        if any(matches(name, pattern) for pattern in wanted)
        for cell in cells
    ]
    devices = {cell.device for cell in cells}
    if len(devices) > 1:
        raise Refusal(f"the suites {', '.join(wanted)} are of the CPU and of a GPU: one at a time")
    if devices == {"cuda"} and not gpu:
        raise Refusal(
            f"the suite {wanted[0]} needs torch, and a GPU that fastattn has kernels for: "
            "`python -m fastattn` says what was found"
        )
    words = [set(text.split()) for text in args.filter]
    cells = [c for c in cells if not words or any(w <= set(c.label.split()) for w in words)]
    if not cells:
        raise Refusal(f"no cell of {', '.join(wanted)} has the words of --filter {args.filter}")
    return cells


def choose_peers(args, device):
    """(everyone who may be asked, the names that --peers gives); else a Refusal."""
    modules = [text.partition("=")[::2] for text in args.module]
    for name, file in modules:
        if not (name.isidentifier() and file and pathlib.Path(file).exists()):
            raise Refusal(f"--module must be NAME=PATH of what is there, got {name}={file}")
    VARIANTS.extend(name for name, _ in modules)
    everyone = [peer for peer in peers(args.backend, modules) if peer.device == device]
    named = tuple(args.peers.split(",")) if args.peers else ()
    known = {peer.name: peer for peer in everyone}
    for name in named:
        if name not in known:
            others = ", ".join(peer for peer in known if peer not in VARIANTS)
            raise Refusal(f"there is no peer {name!r} on this device, only {others}")
        if not known[name].installed():
            raise Refusal(f"the peer {name} is not installed: no module {known[name].module}")
    return everyone, named


def run(args, command):
    """Measures the cells that the arguments choose. Ctrl-C ends it with what is finished."""
    cells = choose(args)
    everyone, named = choose_peers(args, cells[0].device)
    known = known_peers(args.known) if args.known else {}
    arrays = arrays_for(cells[0].device)
    for dtype in sorted({cell.dtype for cell in cells} - arrays.dtypes.keys()):
        print(f"without torch and ml_dtypes there is no {dtype}: left out", file=sys.stderr)
    cells = [cell for cell in cells if cell.dtype in arrays.dtypes]
    options = Options(args.timings, args.warmup, named)
    result = {"header": environment(arrays, command, args.commit), "rows": []}

    def save():  # after each cell: what was measured survives whatever comes
        if args.json:
            pathlib.Path(args.json).write_text(dump(result))

    if args.json:
        pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    save()
    result["header"]["limits"] = machine(arrays)
    try:
        for done, cell in enumerate(_progress(cells), 1):
            result["header"].setdefault("interrupted", "before the first cell")
            result["rows"] += derive(measure(arrays, cell, everyone, options), known)
            result["header"]["interrupted"] = f"after {done} of {len(cells)} cells"
            save()
        del result["header"]["interrupted"]
    except KeyboardInterrupt:
        print(f"\ninterrupted {result['header']['interrupted']}", file=sys.stderr)
    save()
    return result
