"""Arrays of each framework as the benchmark needs them, each kind with its clock."""

import contextlib
import importlib
import importlib.util
import itertools
import math
import time

import numpy as np

import fastattn

from .cells import DENSE


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

    def release(self):
        """Gives back the memory that nothing lies in."""

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
        """Inputs that fit the L2 are rotated (up to 256 sets), to be read from memory each time; of
        gradients always two, for a call begins with what the last one has written or read last."""
        return min(256, max(1 + bool(cell.computes), math.ceil(2 * self.l2 / cell.bytes)))

    def normal(self, rng, shape, dtype):
        seed = self.torch.Generator("cuda").manual_seed(int(rng.integers(1 << 62)))
        dtype = self.dtypes[dtype]
        return self.torch.randn(shape, generator=seed, device="cuda", dtype=dtype)

    def synchronize(self):
        self.torch.cuda.synchronize()

    def release(self):
        self.torch.cuda.empty_cache()

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
