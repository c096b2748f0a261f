"""Who is measured: ours, its variants, and the libraries beside it that are installed here."""

import contextlib
import dataclasses
import importlib
import importlib.util
import pathlib
import shutil
import sys
import tempfile

import numpy as np

import fastattn

from . import fa3
from .cells import WINDOWS, changes

# What follows gpu-backward in the names of the suites that ask for an implementation's gradients
GRADIENTS = (
    "",
    *("-fp16", "-deterministic", "-origin", "-gqa", "-mask", "-scores", "-window", "-varlen"),
    "-host",
)
CUDNN = ("", "-fp16", "-origin", "-gqa", "-mask", "-scores")
FA4 = ("", "-origin", "-gqa", "-scores", "-window", "-varlen")
FA3 = ("", "-origin", "-gqa", "-window", "-varlen")


@dataclasses.dataclass(frozen=True)
class Peer:
    """`build(cell, q, k, v, mask)` gives a function without arguments, or raises: not installed,
    or not for this cell. Arrays are (b, h, s, d); of packed sequences (1, h, total, d). Its
    attribute `leaves`, where it has one, is what else a gradient is wanted of."""

    name: str
    device: str
    build: object
    module: str = "fastattn"  # that it needs
    suites: tuple = ()  # (): all of the device
    of: object = None  # Cell -> the cell that it computes, where that is another one
    context: object = contextlib.nullcontext  # entered around its turns
    packed: bool = False  # whether a peer takes packed sequences
    gradients: tuple = ()  # what follows gpu-backward in the names of the suites that it is in
    apart: object = None  # (arrays, cell) -> a peer in another process: see fa3.apart

    @property
    def own(self):
        return self.module == "fastattn"

    def measures(self, cell):
        """Whether it is in the suite of a cell."""
        if cell.computes:
            return cell.suite.removeprefix("gpu-backward") in self.gradients
        return bool(self.build) and (not self.suites or cell.suite in self.suites)

    def gradients_of(self, cell, q, k, v, mask, dout):
        """A function that gives (dq, dk, dv) and the gradients of what else is wanted, by autograd;
        "both" runs the forward pass too."""
        import torch

        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        forward = self.build(cell, *leaves, mask)
        leaves += getattr(forward, "leaves", [])
        out = forward()
        dout = torch.empty_like(out).copy_(dout)  # with its strides, so that nobody copies it
        if cell.computes == "both":
            del out
            return lambda: torch.autograd.grad(forward(), leaves, dout)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def installed(self):
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # the package that the module would be in
            return False


def _ours(backend=None, package=fastattn):
    def build(cell, q, k, v, mask):
        causal = cell.mask == "causal"
        if cell.lengths:
            more = {"deterministic": True} if cell.deterministic else {}
            return _packed_call(package.attention_varlen, cell, q, k, v, backend=backend, **more)
        if cell.clock == "host":  # the drop-in against what it replaces
            sdpa = package.scaled_dot_product_attention
            return lambda: sdpa(q, k, v, is_causal=causal)
        if cell.computes and mask is not None and mask.is_floating_point():
            mask = mask.detach().requires_grad_()
        keywords = {"causal": causal, "mask": mask, "backend": backend}
        if cell.mask in WINDOWS:
            keywords["window"] = (WINDOWS[cell.mask] - 1, 0)
        keywords |= {
            name: _floats(q, x) if isinstance(x, np.ndarray) else x
            for name, x in changes(cell).items()
        }
        if not cell.computes:
            return lambda out=None: package.attention(q, k, v, out=out, **keywords)
        keywords["deterministic"] = cell.deterministic
        return _wanting(lambda: package.attention(q, k, v, **keywords), mask, keywords.get("sink"))

    return build


def _floats(like, numbers):
    """float32 on the device of a torch tensor."""
    return like.new_tensor(numbers.tolist(), dtype=importlib.import_module("torch").float32)


def _wanting(call, *leaves):
    """The call, with the floats among these that gradients are wanted of."""
    call.leaves = [x.requires_grad_() for x in leaves if x is not None and x.is_floating_point()]
    return call


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

    change = changes(cell)
    if change.keys() - {"dropout_p", "seed"}:
        raise NotImplementedError(f"no {cell.change} here")
    if cell.mask in WINDOWS:
        raise NotImplementedError("no window")
    keywords = {"is_causal": cell.mask == "causal", "attn_mask": mask}
    keywords["dropout_p"] = change.get("dropout_p", 0.0)
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
        keywords, leaves = changes(cell), []
        if cell.change == "sink" and module == "flash_attn.cute":
            keywords = {"learnable_sink": _floats(q, keywords["sink"])}
            leaves = [keywords["learnable_sink"]] if cell.computes else []
        if mask is not None or keywords.keys() - {"softcap", "learnable_sink"}:
            raise NotImplementedError(f"no {cell.change or 'mask'}")
        keywords["causal"] = cell.mask == "causal"
        if cell.mask in WINDOWS:
            keywords["window_size"] = (WINDOWS[cell.mask] - 1, 0)

        def run():
            out = call(q, k, v, **keywords)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return _wanting(run, *leaves)

    return build


def _flex(cell, q, k, v, mask):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block, score = None, None
    if cell.mask == "causal":
        block = create_block_mask(lambda b, h, i, j: i >= j, None, None, cell.s, cell.s)
    if cell.change:
        if cell.change != "alibi":
            raise NotImplementedError(f"no {cell.change} here")
        slopes = _floats(q, changes(cell)["alibi_slopes"])

        def score(s, b, h, i, j):
            return s - slopes[h] * (i - j).abs()

    if cell.computes:  # a graph is kept, and used again
        importlib.import_module("torch._functorch.config").donated_buffer = False
    call = torch.compile(flex_attention, dynamic=False)
    return lambda: call(q, k, v, score_mod=score, block_mask=block)


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


def _free(cell):
    return dataclasses.replace(cell, deterministic=False)


def _mha(cell):
    return dataclasses.replace(cell, hk=0)


def _package(name, module):
    """Another build's package under its own name: a folder, or this one with a compiled module."""
    folder = tempfile.mkdtemp(prefix="fastattn-")
    whole = pathlib.Path(module).is_dir()
    source = pathlib.Path(module) if whole else pathlib.Path(fastattn.__file__).parent
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
    ours, fa4 = _ours(backend), _flash_attn("flash_attn.cute")
    others = {name: _ours(backend, _package(f"fastattn_{name}", file)) for name, file in modules}
    return [
        *(
            Peer(name, device, others[name], gradients=GRADIENTS)
            for name in others
            for device in ("cpu", "cuda")
        ),
        Peer("fastattn", "cpu", ours),
        Peer("unmasked", "cpu", ours, suites=("cpu-mask",), of=_unmasked),
        Peer("1 thread", "cpu", ours, suites=("cpu-threads",), context=_one_thread),
        Peer("torch", "cpu", _sdpa, "torch"),
        Peer("jax", "cpu", _jax, "jax"),
        Peer("fastattn", "cuda", ours, gradients=GRADIENTS),
        Peer("ordinary", "cuda", ours, suites=("gpu-hostile",), of=_ordinary),
        Peer("unmasked", "cuda", ours, suites=("gpu-mask",), of=_unmasked, gradients=("-mask",)),
        Peer("plain", "cuda", ours, suites=("gpu-scores",), of=_plain, gradients=("-scores",)),
        Peer("causal", "cuda", ours, suites=("gpu-window",), of=_causal, gradients=("-window",)),
        Peer("32 kv heads", "cuda", ours, suites=("gpu-gqa",), of=_mha, gradients=("-gqa",)),
        Peer("dense", "cuda", ours, suites=("gpu-varlen",), of=_dense, gradients=("-varlen",)),
        Peer(
            "free",
            "cuda",
            ours,
            suites=("gpu-backward-deterministic",),
            of=_free,
            gradients=("-deterministic",),
        ),
        Peer("cudnn", "cuda", _sdpa, "torch", context=_only("CUDNN_ATTENTION"), gradients=CUDNN),
        Peer("fa3", "cuda", _flash_attn("fa3_fwd_interface"), "fa3_fwd_interface", packed=True),
        Peer("fa4", "cuda", fa4, "flash_attn.cute", packed=True, gradients=FA4),
        Peer("fa3-lib", "cuda", None, fa3.MODULE, packed=True, gradients=FA3, apart=fa3.apart),
        Peer("jax.nn", "cuda", None, "jax", gradients=("-mask",), apart=fa3.apart_in_jax),
        Peer("fa2", "cuda", _sdpa, "torch", context=_only("FLASH_ATTENTION")),
        Peer("efficient", "cuda", _sdpa, "torch", context=_only("EFFICIENT_ATTENTION")),
        Peer("sdpa", "cuda", _sdpa, "torch", ("gpu-host",), gradients=("-host",)),
        Peer("flex", "cuda", _flex, "torch", ("gpu-flex",), gradients=("-scores",)),
    ]
