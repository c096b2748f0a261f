"""The frameworks, recognised without importing any of them; a new one goes here.

Called by state_call() in csrc/binding/. Whatever an array's framework is, it is in sys.modules
already; so each is looked up there.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13  # DLPack's device types
_DLPACK = (1, 3)  # the version that csrc/binding/dlpack.h declares


def _is(array: Any, module: str, name: str) -> bool:
    """Whether array is an instance of module.name, where that module is loaded."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(array, kind)


def loaded() -> tuple[tuple[Any, ...] | None, Any]:
    """What csrc/binding/state.c learns of torch and NumPy, each None until it is loaded."""
    torch: Any = sys.modules.get("torch")
    numpy: Any = sys.modules.get("numpy")
    try:
        sample = torch.Tensor()
        parts = (
            torch.Tensor,
            torch.nn.Parameter,
            sample.is_neg,
            _is_grad_enabled,
            vars(torch.autograd.forward_ad),
            torch._C._are_functorch_transforms_active,
            getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
            sample._cdata,
        )
    except AttributeError:  # not imported, or only half by now
        parts = None
    return parts, getattr(numpy, "ndarray", None)


def _is_grad_enabled() -> bool:
    """Whether torch's operators are recorded for autograd: never in inference mode."""
    torch = sys.modules["torch"]
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _is_jax(array: Any) -> bool:
    return _is(array, "jax", "Array")


def never_written(array: Any) -> str | None:
    """The framework of an array whose memory only that framework may write, else None."""
    taker = _taker(array)
    return taker.writes_alone if taker else None


def _jax_device(array: Any, name: str) -> Any:
    """The one device that a JAX array lies on."""
    if array.is_deleted():
        raise ValueError(
            f"`{name}` must have memory, got a deleted JAX array (donated to a jitted function, "
            "or delete() was called)"
        )
    devices = array.devices()
    if len(devices) != 1:
        how = "replicated" if array.is_fully_replicated else "sharded"
        raise ValueError(
            f"`{name}` must lie on one device, got a JAX array {how} over {len(devices)}: "
            f"pass jax.device_put({name}, device)"
        )
    return next(iter(devices))


def export(array: Any, name: str) -> Literal["torch", "jax"] | tuple[Any, int, int]:
    """(capsule, stream, cpu): the array as a DLPack capsule, and where it is.

    stream is its framework's current CUDA stream; cpu tells JAX's CPU devices apart, which DLPack
    calls 0 all. Raises TypeError for what is no array. Else fastattn.torch takes the call, where
    torch.fx traces the array, or fastattn.jax, where JAX does or has it on a GPU, whose streams and
    buffers XLA alone knows. (shape, code, bits): of one that only fastattn.jax has described.
    """
    if _is(array, "torch.fx", "Proxy"):
        return "torch"
    if _is(array, "jax.core", "Tracer"):
        return "jax"
    if _is(array, "fastattn.jax", "Described"):
        return array.shape, array.code, array.bits
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        raise TypeError(
            f"`{name}` must be an array (torch, NumPy, JAX, CuPy, any with __dlpack__), "
            f"got {type(array).__name__}"
        )
    jax_device = _jax_device(array, name) if _is_jax(array) else None
    kind, number = array.__dlpack_device__()
    device_type, device_id = int(kind), int(number or 0)  # Paddle's CPU has no number but None
    on_gpu = device_type in (_CUDA, _CUDA_MANAGED)
    if _is(array, "torch", "Tensor"):
        array = (
            array.detach()
        )  # a leaf under no_grad; csrc/binding/torch_internals.c has refused all other grads
    if on_gpu and jax_device:
        return "jax"
    if jax_device:
        array.block_until_ready()
    # -1: no synchronisation, because the kernel runs on the producer's own stream. A producer
    # whose stream we do not know is asked to order its work before the legacy default stream.
    stream, ordered = 0, None
    if on_gpu and _is(array, "cupy", "ndarray"):
        stream, ordered = sys.modules["cupy"].cuda.get_current_stream(device_id).ptr, -1
    elif on_gpu and _is(array, "torch", "Tensor"):
        stream, ordered = sys.modules["torch"].cuda.current_stream(device_id).cuda_stream, -1
    elif on_gpu:
        ordered = 1
    try:
        try:
            capsule = array.__dlpack__(stream=ordered, max_version=_DLPACK)
        except TypeError:  # a producer from before DLPack 1.0
            capsule = array.__dlpack__(stream=ordered)
    except BufferError as error:
        raise BufferError(f"`{name}` cannot be exported by DLPack: {error}") from error
    return capsule, stream, jax_device.local_hardware_id or 0 if jax_device else 0


def empty(
    like: Any, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, on_gpu: bool
) -> Any:
    """An uninitialised array of like's framework and device; None for a buffer of our own.

    On the CPU a framework that has no such dtype, or does not say where its arrays are, gets a
    NumPy array. Strides other than contiguous ones are asked for of torch alone.
    """
    if not on_gpu and _taker(like):
        return None  # hand_over() makes their array of the finished buffer
    if _is(like, "torch", "Tensor"):
        torch = sys.modules["torch"]
        dtype = getattr(torch, dtype)
        return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)
    if _is(like, "cupy", "ndarray"):
        with sys.modules["cupy"].cuda.Device(like.device.id):
            return sys.modules["cupy"].empty(shape, _numpy_dtype(dtype))
    if hasattr(like, "__array_namespace__"):
        xp = like.__array_namespace__()
        if hasattr(xp, dtype) and hasattr(like, "device"):
            return xp.empty(shape, dtype=getattr(xp, dtype), device=like.device)
    if on_gpu:
        raise TypeError(
            f"cannot allocate an output like {type(like).__name__}: pass `out` "
            "or a torch or CuPy array"
        )
    import numpy

    return numpy.empty(shape, _numpy_dtype(dtype))


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return name
    import ml_dtypes  # NumPy has no bfloat16 of its own

    return ml_dtypes.bfloat16


class _Buffer:
    """Our own CPU buffer as a DLPack producer."""

    def __init__(self, capsule: Any, cpu: int = 0) -> None:
        self._capsule, self._cpu = capsule, cpu

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, self._cpu)


def _to_jax(like: Any, capsule: Any, dtype: str) -> Any:
    import jax.dlpack

    (device,) = like.devices()
    buffer = _Buffer(capsule, device.local_hardware_id or 0)
    if dtype != "float64":
        return jax.dlpack.from_dlpack(buffer)
    # Outside of its x64 context JAX makes float32 of float64, where like + like stays float64.
    here: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # before JAX 0.8
    with here.enable_x64(True):
        return jax.dlpack.from_dlpack(buffer)


def _to_mlx(like: Any, capsule: Any, dtype: str) -> Any:
    mlx = sys.modules["mlx.core"]
    # Without a dtype MLX makes float32 of float64.
    return mlx.asarray(_Buffer(capsule), dtype=getattr(mlx, dtype))


def _to_paddle(like: Any, capsule: Any, dtype: str) -> Any:
    return sys.modules["paddle"].utils.dlpack.from_dlpack(capsule)


class _Taker(NamedTuple):
    """A framework that takes a finished buffer of ours on the CPU, for it gives none to fill."""

    module: str
    kind: str  # of its arrays, in that module
    take: Callable[[Any, Any, str], Any]
    writes_alone: str | None  # its name, where nobody else may write its arrays


_TAKERS = (
    _Taker("jax", "Array", _to_jax, "JAX"),
    _Taker("mlx.core", "array", _to_mlx, "MLX"),
    _Taker("paddle", "Tensor", _to_paddle, None),
)


def _taker(array: Any) -> _Taker | None:
    return next((taker for taker in _TAKERS if _is(array, taker.module, taker.kind)), None)


def hand_over(like: Any, capsule: Any, dtype: str) -> Any:
    """The finished buffer as an array of like's framework, where empty() gave None."""
    taker = _taker(like)
    assert taker is not None
    return taker.take(like, capsule, dtype)


def truth(value: Any) -> bool | None:
    """A bool of NumPy's as Python's, None for any other object."""
    return bool(value) if _is(value, "numpy", "bool_") else None


def is_plain_ndarray(array: Any) -> bool:
    """Whether a subclass of numpy.ndarray means the same as one (a masked array does not)."""
    return _is(array, "numpy", "memmap")


def _is_recorded(torch: Any) -> bool:
    """Whether this thread's operators are recorded into a graph, or replaced."""
    if torch._C._get_tracing_state() is not None:
        return True
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if any(getattr(mode, "_mode_key", None) is not None for mode in modes):
        return True  # torch's own: fake, proxy, functional
    modes = torch.overrides._get_current_function_mode_stack()  # before dispatch
    return any(type(mode).__module__ == "torch.fx.experimental.proxy_tensor" for mode in modes)


def is_fake(tensor: Any) -> bool:
    """Whether a tensor stands for one in a graph of torch's."""
    return _is(tensor, "torch._subclasses.fake_tensor", "FakeTensor") or _is(
        tensor, "torch._subclasses.functional_tensor", "FunctionalTensor"
    )


def refusal(tensor: Any) -> Literal[True] | str | None:
    """What is said of a torch tensor that is not simply numbers in memory, after its name.

    True: it is one of torch's transforms, or operators are recorded, and fastattn.torch takes the
    call. None: nothing speaks against it.
    """
    torch = sys.modules["torch"]
    functorch = torch._C._functorch
    if (
        _is_recorded(torch)
        or functorch.is_functionaltensor(tensor)
        or functorch.is_batchedtensor(tensor)
        or functorch.is_legacy_batchedtensor(tensor)
        or functorch.is_gradtrackingtensor(tensor)
        or is_fake(tensor)
    ):
        return True
    kind = type(tensor).__qualname__
    if _is(tensor, "torch.distributed.tensor", "DTensor"):
        return "must be a plain torch.Tensor, got a DTensor: pass its to_local()"
    if tensor.is_nested:
        return (
            "must not be nested: pass its values() and offsets() to attention_varlen, or its "
            "to_padded_tensor(0) with q_lengths and k_lengths"
        )
    if tensor.is_quantized:
        return f"must not be quantized, got {tensor.dtype}: pass its dequantize()"
    if tensor.layout != torch.strided:
        return f"must be a strided tensor, got {tensor.layout}: pass its to_dense()"
    if tensor.is_meta:
        return "must have memory, got a meta tensor, which has only a shape"
    if (bias := causal_bias(tensor)) is not None:
        instead = '"top-left"' if bias[0] else "True"
        return f"must be a plain torch.Tensor, got a CausalBias: pass causal={instead}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return (
            f"must be a plain torch.Tensor or Parameter, got its subclass {kind}: pass its "
            "as_subclass(torch.Tensor) if that means the same"
        )
    return None


def autocast(tensor: Any) -> Any:
    """A torch tensor as torch's own operators take it here; itself where autocast does nothing."""
    torch = sys.modules["torch"]
    device = tensor.device.type
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def causal_bias(mask: Any) -> tuple[bool, int, int] | None:
    """(whether top-left, queries, keys) of torch's CausalBias; None for all else."""
    bias = sys.modules.get("torch.nn.attention.bias")
    if bias is None or not isinstance(mask, bias.CausalBias):
        return None
    top_left = mask.variant == bias.CausalVariant.UPPER_LEFT
    return top_left, mask.seq_len_q, mask.seq_len_kv


def is_number(tensor: Any) -> bool:
    """Whether torch's own functions would take a tensor of its for a float."""
    return tensor.dim() == 0 and not tensor.requires_grad


def is_frozen(tensor: Any) -> bool:
    """Whether torch forbids to write a tensor of its here: one made in inference mode, outside."""
    return tensor.is_inference() and not sys.modules["torch"].is_inference_mode_enabled()


def has_tangent(tensor: Any) -> bool:
    """Whether a torch tensor carries a forward-mode gradient."""
    return sys.modules["torch"].autograd.forward_ad.unpack_dual(tensor).tangent is not None


def draw_seed(tensor: Any) -> Any:
    """A random int64 from torch's generator of tensor's device; drawn anew by a graph's replay."""
    torch = sys.modules["torch"]
    return torch.randint(0, (1 << 63) - 1, (), device=tensor.device)


def mark_written(tensor: Any) -> None:
    """Bumps a torch tensor's version, so that autograd notices that a saved tensor was written."""
    sys.modules["torch"].autograd.graph.increment_version(tensor)
