"""Gradients by FlashAttention-3 and by jax.nn, in a process of their own.

FlashAttention-3's backward pass is to be had as a library of handlers for XLA alone,
libdew_flash_attn3.so of the package dew-flash-attn-cu13. A process with JAX loads it, on the same
GPU, and is asked for a few times in each round, while this one waits: so it takes its turn like
everybody else. Its clock is the host's, over a burst of calls of at least BURST seconds with one
wait at the end, which counts as a part of the burst: about one in two hundred.

The two speak in lines of JSON, a question and its answer: a cell to begin with, then times of it.
"""

import atexit
import ctypes
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time

import numpy as np

from .cells import WINDOWS, Cell

MODULE = "dew_flash_attn"  # with the library in it; the rest of the package is not needed
BURST = 0.02
PATIENCE = 90.0  # seconds for an answer: JAX starts, XLA compiles
ATTEMPTS = 3  # processes that may be lost


# --------------------------------------------------------------------------- the process that asks


class Child:
    """The process; another one where it was lost."""

    def __init__(self, command=(sys.executable, "-m", "fastattn.bench.fa3")):
        self.command, self.process, self.started = command, None, 0

    def ask(self, **question):
        """The answer; RuntimeError with the reason where there is none."""
        if self.process is None or self.process.poll() is not None:
            if self.started == ATTEMPTS:
                raise RuntimeError(f"its process was lost {ATTEMPTS} times")
            self.started += 1
            environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        answers = self.process.stdout
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([answers], [], [], PATIENCE)
            line = answers.readline() if ready else b""
        except BrokenPipeError:
            line = b""
        if not line:
            self.end()
            raise RuntimeError(f"its process gave no answer in {PATIENCE:.0f} s, or ended")
        answer = json.loads(line)
        if "refused" in answer:
            raise RuntimeError(answer["refused"])
        return answer

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@functools.cache
def child():
    found = Child()
    atexit.register(found.end)
    return found


def apart(arrays, cell, who="fa3"):
    """(clock, the cell that is judged, its inputs, its gradients) of a cell: one key head of one
    sequence, on this process's device."""
    arrays.release()  # for the other process, whose arrays lie in the same memory
    handle, file = tempfile.mkstemp(suffix=".npz")
    os.close(handle)
    try:
        child().ask(who=who, cell=dataclasses.asdict(cell), file=file)
        with np.load(file) as found:
            given = {name: from_bits(arrays, cell, found[name]) for name in found.files}
    finally:
        pathlib.Path(file).unlink()
    q = given["q"]
    one = {"b": 1, "hq": q.shape[1], "hk": 1, "s": q.shape[2], "lengths": ""}
    inputs = [given.get(name) for name in ("q", "k", "v", "mask", "dout")]

    def clock(n, inner):
        return child().ask(n=n, inner=inner)["seconds"]

    return (
        clock,
        dataclasses.replace(cell, **one),
        inputs,
        [given[x] for x in ("dq", "dk", "dv")],
    )


def apart_in_jax(arrays, cell):
    return apart(arrays, cell, "jax.nn")


def from_bits(arrays, cell, bits):
    import torch

    return torch.from_numpy(bits.view(np.int16)).view(arrays.dtypes[cell.dtype]).to(arrays.device)


# ------------------------------------------------------------------------------- the other process


@functools.cache
def library():
    """Registers the library's handlers."""
    import jax

    jax.devices()  # may bring the CUDA runtime that the library is linked with
    folder = next(iter(importlib.util.find_spec(MODULE).submodule_search_locations))
    file = str(pathlib.Path(folder, "libdew_flash_attn3.so"))
    try:
        found = ctypes.CDLL(file)
    except OSError:  # it does not; the packages that JAX and torch need have it
        for place in filter(None, sys.path):
            for runtime in pathlib.Path(place).glob("nvidia/*/lib/libcudart.so.13"):
                ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        found = ctypes.CDLL(file)
    for way in ("mha_fwd", "mha_bwd", "mha_varlen_fwd", "mha_varlen_bwd"):
        name = f"dew_flash3_{way}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(found, name)), platform="CUDA")


def attributes(cell):
    """Of a call of the library."""
    left, right = (WINDOWS[cell.mask] - 1, 0) if cell.mask in WINDOWS else (-1, -1)
    found = {
        "softmax_scale": np.float64(cell.d**-0.5),
        "is_causal": cell.mask == "causal",
        "window_size_left": np.int64(left),
        "window_size_right": np.int64(right),
    }
    if cell.lengths:
        longest = np.int64(cell.packed.max())
        found |= {"max_seqlen": longest, "max_seqlen_k": longest}
    return found


def programs_of_fa3(jax, cell):
    """forward(q, k, v, mask) -> (out, what the other needs); backward(dout, that) -> (dq, dk, dv).
    Arrays are (b, s, h, d), of packed sequences (total, h, d)."""
    if cell.change or cell.mask not in ("full", "causal", *WINDOWS):
        raise NotImplementedError(f"no {cell.change or cell.mask} in the library")
    library()
    way, more, like = "mha", [], jax.ShapeDtypeStruct
    if cell.lengths:
        cu = np.append(0, np.cumsum(cell.packed)).astype(np.int32)
        way, more = "mha_varlen", [jax.numpy.asarray(cu)] * 2
    # rows of a head in two buffers of float32, each sequence's in whole blocks
    sequences = cell.b + bool(cell.lengths)
    rows = cell.hq * (cell.rows + 128 * sequences)
    float32 = jax.numpy.float32

    def forward(q, k, v, mask):
        head = q.shape[-2]
        lse = (head, q.shape[0]) if cell.lengths else (q.shape[0], head, q.shape[1])
        unused = like((1, 1, 1, 1), float32), like((1, 1, 1), float32)
        results = like(q.shape, q.dtype), like(lse, float32), *unused
        call = jax.ffi.ffi_call(f"dew_flash3_{way}_fwd", results)
        out, lse, *_ = call(q, k, v, *more, **attributes(cell))
        return out, (q, k, v, out, lse)

    def backward(dout, saved):
        room = like((rows,), float32)
        results = *(like(x.shape, x.dtype) for x in saved[:3]), room, room
        call = jax.ffi.ffi_call(f"dew_flash3_{way}_bwd", results)
        return call(dout, *saved, *more, **attributes(cell))[:3]

    return jax.jit(forward), backward


def programs_of_jax(jax, cell):
    """The same of jax.nn's attention by cuDNN, with the gradient of a mask that is added."""
    if cell.change or cell.lengths or not (cell.mask_bytes == 2 or cell.mask in ("full", "causal")):
        raise NotImplementedError(f"no {cell.change or cell.mask} here")

    def forward(q, k, v, mask):
        def call(q, k, v, mask):
            causal = cell.mask == "causal"
            function = jax.nn.dot_product_attention
            return function(q, k, v, mask, is_causal=causal, implementation="cudnn")

        return jax.vjp(jax.jit(call), q, k, v, mask)

    def backward(dout, pull):
        return pull(dout)

    return forward, backward


PROGRAMS = {"fa3": programs_of_fa3, "jax.nn": programs_of_jax}


@functools.cache
def generator():
    import jax

    def numbers(seed, n, dtype):
        return jax.random.normal(jax.random.key(seed), (n,), dtype)

    return jax.jit(numbers, static_argnums=(1, 2))


class Measured:
    """A cell in this process."""

    def __init__(self, jax, cell, who):
        self.jax, self.cell = jax, cell
        forward, backward = PROGRAMS[who](jax, cell)
        self.sets = [self.inputs(seed) for seed in range(2)]  # larger than the L2, each of them
        if cell.computes == "both":
            call = jax.jit(lambda *x: backward(x[4], forward(*x[:4])[1]))
            given = self.sets
        else:
            call = jax.jit(backward)
            given = [(x[4], forward(*x[:4])[1]) for x in self.sets]
        self.calls = calls = [functools.partial(call, *x) for x in given]
        self.gradients = jax.block_until_ready(calls[0]())
        start = time.perf_counter()
        jax.block_until_ready([call() for call in calls])
        self.each = (time.perf_counter() - start) / len(calls)

    def inputs(self, seed):
        """q, k, v, mask, dout."""
        cell, keys = self.cell, itertools.count(5 * seed)
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[cell.dtype]
        (hk, dv), lead = cell.kv, (cell.rows,) if cell.lengths else (cell.b, cell.s)

        def made(*shape):  # compiled once for all shapes of one size
            return generator()(next(keys), math.prod(shape), dtype).reshape(shape)

        q, k, v = made(*lead, cell.hq, cell.d), made(*lead, hk, cell.d), made(*lead, hk, dv)
        dout = made(*lead, cell.hq, dv)
        added = any(cell.mask_shape) and cell.mask_bytes == 2
        return q, k, v, made(*cell.mask_shape) if added else None, dout

    def judged(self):
        """{name: bits} of the last key head of the last, of packed sequences of the longest one,
        (1, h, s, d), and of its mask, (1, 1, s, s)."""
        q, k, v, mask, dout = self.sets[0]
        rows = slice(None)
        if self.cell.lengths:
            ends = np.cumsum(self.cell.packed)
            n = int(self.cell.packed.argmax())
            rows = slice(int(ends[n] - self.cell.packed[n]), int(ends[n]))
        named = dict(zip(("dq", "dk", "dv"), self.gradients, strict=False))
        named |= {"q": q, "k": k, "v": v, "dout": dout}
        found = {}
        for name, x in named.items():
            heads = x.shape[-2] // self.cell.kv[0]
            mine = x if self.cell.lengths else x[-1]
            found[name] = np.asarray(mine[rows, -heads:]).swapaxes(0, 1)[None]
        if mask is not None:
            found["mask"] = np.asarray(mask[-1:, -1:])
        return {name: np.ascontiguousarray(x).view(np.uint16) for name, x in found.items()}

    def seconds(self, n, inner):
        """Times of n bursts, per call."""
        times, turn = [], itertools.cycle(self.calls)
        wait = self.jax.block_until_ready
        for _ in range(n):
            count = max(inner, math.ceil(BURST / self.each))
            wait(next(turn)())  # brings the clocks back up
            start = time.perf_counter()
            for _ in range(count):
                result = next(turn)()
            wait(result)
            times.append((time.perf_counter() - start) / count)
        return times


def answer_to(question, state):
    """The answer to one question; `state` has the cell that is measured."""
    if "cell" in question:
        import jax

        state.clear()  # its arrays, before others are made
        cell = Cell(**question["cell"])
        state["measured"] = Measured(jax, cell, question["who"])
        np.savez(question["file"], **state["measured"].judged())
        return {}
    return {"seconds": state["measured"].seconds(question["n"], question["inner"])}


def main():
    """Answers until the other end is closed. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state = {}
    for line in sys.stdin:
        try:
            answer = answer_to(json.loads(line), state)
        except Exception as error:  # a refusal is a result
            answer = {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
