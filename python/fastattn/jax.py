"""fastattn's functions as operations of JAX: under jit, vmap, grad, checkpoint and shard_map.

attention, attention_varlen and merge_states are fastattn's own, which hand every call here that JAX
traces, or whose arrays JAX has on a GPU. dot_product_attention has jax.nn's signature and meaning.

One primitive runs them all: an operation of XLA that calls the handlers in csrc/binding/jax_ffi.c.
Arrays are its operands, what is no array its attributes.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

from ._needs import need

need(__name__, "jax", "0.6")

import jax
import jax.numpy as jnp
import numpy
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from . import _C, _attention, _jax_kvcache, _sparse, _sparsek_attention
from ._attention import attention, attention_varlen, merge_states
from ._renaming import renaming

__all__ = ["attention", "attention_varlen", "dot_product_attention", "merge_states"]

_PREFIX = "fastattn_"  # of the names of the handlers

for _name, _capsules in _C.jax_handlers().items():
    for _platform, _capsule in zip(("cpu", "CUDA"), _capsules, strict=True):
        jax.ffi.register_ffi_target(_PREFIX + _name, _capsule, platform=_platform)


# ------------------------------------------------------------------------------------ the operation


@dataclasses.dataclass(frozen=True)
class _Call:
    """All of an operation that is no array. Shapes are those of one run."""

    target: str  # "forward", "merge", "kvcache", "sparse", "sparsek", or one's "..._backward"
    operands: tuple[str, ...]
    results: tuple[tuple[str, tuple[int, ...], Any], ...]  # name, shape, dtype
    options: tuple[tuple[str, Any], ...]  # attributes of C's names
    runs: int = 0  # the size of a first axis that results have, and some operands; 0: none
    stepped: tuple[bool, ...] = ()  # which operands

    def named(self, arrays: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.operands, arrays, strict=False))

    def attributes(self) -> dict[str, Any]:
        runs = {}
        if self.runs:
            stepped = sum(1 << n for n, is_stepped in enumerate(self.stepped) if is_stepped)
            runs = {"runs": self.runs, "stepped": stepped}
        return {**dict(self.options), **runs}


_call_p: Any = Primitive(_PREFIX + "call")
_call_p.multiple_results = True


def _bind(call: _Call, arrays: Sequence[Any]) -> list[Any]:
    return _call_p.bind(*_vary_alike(arrays), call=call)  # type: ignore[no-any-return]


def _varying(array: Any) -> frozenset[Any]:
    """The axes of shard_map's mesh along which an array differs."""
    kind = jax.typeof(array)
    axes = getattr(kind, "manual_axis_type", None)  # from JAX 0.10 on
    return axes.varying if axes is not None else getattr(kind, "vma", frozenset())


def _vary_alike(arrays: Sequence[Any]) -> list[Any]:
    """As JAX's own operations take arrays inside shard_map, so that gradients are summed."""
    varying = [_varying(array) for array in arrays]
    everywhere = frozenset[Any]().union(*varying)

    def cast(array: Any, axes: tuple[Any, ...]) -> Any:
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(array, axes, to="varying")
        return jax.lax.pvary(array, axes)  # type: ignore[attr-defined]

    return [
        cast(array, tuple(everywhere - mine)) if mine != everywhere else array
        for array, mine in zip(arrays, varying, strict=True)
    ]


def _shapes(*operands: Any, call: _Call) -> list[Any]:
    lead = (call.runs,) if call.runs else ()
    return [_like(operands[0], lead + shape, dtype) for _, shape, dtype in call.results]


_call_p.def_abstract_eval(_shapes)


def _like(aval: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    whole = PartitionSpec(*[None] * len(shape))  # type: ignore[no-untyped-call]
    sharding = NamedSharding(aval.sharding.mesh, whole)
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


@functools.partial(jax.jit, static_argnames="call")
def _compiled(*arrays: Any, call: _Call) -> Any:
    return _call_p.bind(*arrays, call=call)


def _run(*arrays: Any, call: _Call) -> Any:
    with jax.disable_jit(False):  # where it is disabled, an operation is still compiled
        return _compiled(*arrays, call=call)


_call_p.def_impl(_run)


def _lower(ctx: Any, *operands: Any, call: _Call, on_cuda: bool) -> Any:
    """One custom call; a kernel's workspace is a result that nobody sees."""
    avals = list(ctx.avals_out)
    names = [name for name, _, _ in call.results]
    attributes = call.attributes()
    if on_cuda:
        described = [
            tuple((name, aval.shape, *_dlpack_dtype(aval.dtype)) for name, aval in pairs)
            for pairs in (
                zip(call.operands, ctx.avals_in, strict=True),
                zip(names, avals, strict=True),
            )
        ]
        if size := _C.jax_workspace(call.target, described[0], attributes, described[1]):
            avals.append(jax.core.ShapedArray((size,), numpy.dtype("uint8")))
            names.append("workspace")
    kinds = {int: numpy.int64, float: numpy.float64, str: str}
    rule = jax.ffi.ffi_lowering(_PREFIX + call.target)
    results = rule(
        ctx.replace(avals_out=avals),
        *operands,
        operands=" ".join(call.operands),
        results=" ".join(names),
        **{name: kinds[type(value)](value) for name, value in attributes.items()},
    )
    return results[: len(ctx.avals_out)]


for _platform, _on_cuda in (("cpu", False), ("cuda", True)):
    mlir.register_lowering(_call_p, functools.partial(_lower, on_cuda=_on_cuda), platform=_platform)


# ------------------------------------------------------------------------------------- derivatives

_FOLLOWED = ("q", "k", "v", "mask", "gate", "sink")  # may have a gradient

_tangent_p: Any = Primitive(
    _PREFIX + "tangent"
)  # of (out, lse), linear in what follows the residuals
_tangent_p.multiple_results = True


def _refuse_tangents(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "forward-mode derivatives (jvp, jacfwd, hessian) of attention are not served in JAX: "
        "reverse mode is (grad, vjp, jacrev)"
    )


_tangent_p.def_impl(_refuse_tangents)
_tangent_p.def_abstract_eval(lambda *operands, call, names: _shapes(*operands, call=call))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(_tangent_p, _refuse_tangents, platform=_platform)
batching.primitive_batchers[_tangent_p] = _refuse_tangents


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: _Call) -> Any:
    """What is linear in the tangents, of which only the transpose is computed."""
    moved = {
        name: tangent
        for name, tangent in zip(call.operands, tangents, strict=True)
        if not isinstance(tangent, ad.Zero)
    }
    of = call.target.removesuffix("_backward") if "sparsek" in call.target else "attention"
    if of != "attention" or call.target.endswith(
        "backward"
    ):  # the first ones are custom_vjp's there
        raise NotImplementedError(
            f"second derivatives of {of} are not served in JAX: its gradient has none"
        )
    for name in moved:
        if name not in _FOLLOWED:
            raise NotImplementedError(
                f"`{name}` has a tangent, and its gradient is not served: pass "
                f"jax.lax.stop_gradient({name})"
            )
    wanted = [name for name, _, _ in call.results]
    (out, *rest), (_, shape, dtype) = call.results, call.results[0]
    if "lse" not in wanted:  # the gradients are computed from it, too
        rows = shape[:-1] if _is_bhsd(call) else _swapped(shape[:-1])
        real = numpy.dtype("float64" if dtype == numpy.float64 else "float32")
        call = dataclasses.replace(call, results=(out, ("lse", rows, real), *rest))
    results = _bind(call, primals)
    both = dataclasses.replace(call, results=call.results[:2])
    names = tuple(moved)
    linear = _tangent_p.bind(*primals, *results[:2], *moved.values(), call=both, names=names)
    found = dict(zip((name for name, _, _ in call.results), results, strict=True))
    pushed = dict(zip(("out", "lse"), linear, strict=True))
    return (
        [found[name] for name in wanted],
        [
            pushed[name] if name in pushed else jnp.zeros_like(found[name])  # mass
            for name in wanted
        ],
    )


def _is_bhsd(call: _Call) -> bool:
    return "bshd" not in dict(call.options)


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(b, h, s) of (b, s, h), or (h, total) of (total, h)."""
    return (*shape[:-2], shape[-1], shape[-2])


def _transpose(cotangents: Sequence[Any], *arrays: Any, call: _Call, names: Any) -> list[Any]:
    given = dict(zip(("dout", "dlse"), cotangents, strict=True))
    given = {name: ct for name, ct in given.items() if not isinstance(ct, ad.Zero)}
    residuals = arrays[: len(arrays) - len(names)]
    none = [None] * len(residuals)
    if not given:
        return none + [None] * len(names)
    of, stepped = call.named(residuals), call.named(call.stepped)
    packed = "max_seqlen_q" in dict(call.options)
    b = call.results[0][1][0]
    results = {name: of[name].shape[bool(stepped.get(name)) :] for name in names}
    for name, shape in results.items():
        if name in ("q", "k", "v") and not packed and shape[0] != b:
            results[name] = (b, *shape[1:])  # stretched from a batch of 1
    backward = dataclasses.replace(
        call,
        target="sparse_backward" if call.target == "sparse" else "backward",
        operands=(*call.operands, "out", "lse", *given),
        results=tuple(("d" + name, shape, of[name].dtype) for name, shape in results.items()),
        stepped=call.stepped and (*call.stepped, True, True, *[True] * len(given)),
    )
    found = _bind(backward, [*residuals, *given.values()])
    return none + [
        # What was the same for all, in the batch or in the runs, has the sum as its gradient.
        x if x.shape == of[name].shape else x.sum(0).reshape(of[name].shape)
        for name, x in zip(names, found, strict=True)
    ]


ad.primitive_jvps[_call_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose


# -------------------------------------------------------------------------------------------- vmap


def _batch(arrays: Sequence[Any], dims: Sequence[Any], *, call: _Call) -> Any:
    """Into the batch where one call can take them all; else as runs, which copy nothing either."""
    (n,) = {x.shape[d] for x, d in zip(arrays, dims, strict=True) if d is not None}
    if n == 0:
        lead = (0, call.runs) if call.runs else (0,)
        nothing = [jnp.zeros(lead + shape, dtype) for _, shape, dtype in call.results]
        return nothing, [0] * len(nothing)
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(arrays, dims, strict=True)]
    mapped = [d is not None for d in dims]
    folded = None if call.runs or "sparsek" in call.target else _fold(call, n, moved, mapped)
    if folded is not None:
        b, operands = folded
        results = tuple((name, (n * b, *shape[1:]), dtype) for name, shape, dtype in call.results)
        found = _bind(dataclasses.replace(call, results=results), operands)
        shapes = [(n, *shape) for _, shape, _ in call.results]
        unfolded = [x.reshape(shape) for x, shape in zip(found, shapes, strict=True)]
    else:
        unfolded = _bind_runs(call, n, moved, mapped)
    return unfolded, [0] * len(unfolded)


def _bind_runs(call: _Call, n: int, arrays: Sequence[Any], mapped: Sequence[bool]) -> list[Any]:
    before = call.stepped or (False,) * len(arrays)
    operands, stepped = [], []
    for x, is_mapped, is_stepped in zip(arrays, mapped, before, strict=True):
        if call.runs and is_mapped != is_stepped:
            x = jnp.expand_dims(x, 1 if is_mapped else 0)
            x = jnp.broadcast_to(x, (n, call.runs, *x.shape[2:]))
        if call.runs and (is_mapped or is_stepped):
            x = x.reshape(n * call.runs, *x.shape[2:])
        operands.append(x)
        stepped.append(is_mapped or is_stepped)
    runs = n * max(1, call.runs)
    found = _bind(dataclasses.replace(call, runs=runs, stepped=tuple(stepped)), operands)
    return [x.reshape(n, call.runs, *x.shape[1:]) for x in found] if call.runs else found


def _fold(call: _Call, n: int, arrays: Sequence[Any], mapped: Sequence[bool]) -> Any:
    """(b, operands) with n * b sequences; None where one call cannot mean that."""
    options = dict(call.options)
    if call.target == "merge":
        return call.results[0][1][0], [
            _repeat(n, x, m) for x, m in zip(arrays, mapped, strict=True)
        ]
    if call.target.startswith("sparse"):
        return None  # the sequences of a call may share their lists
    if "max_seqlen_q" in options or "dropout_p" in options:
        return None  # packed sequences; random bits, which count sequences
    of, is_mapped = call.named(arrays), call.named(mapped)
    gradients = {name for name, _, _ in call.results}
    b = of["q"].shape[is_mapped["q"]]
    if is_mapped.get("sink") or "dsink" in gradients:
        return None
    for name in ("q", "k", "v"):
        if not is_mapped[name] and b != 1:
            return None  # C stretches a batch of 1 without a copy
    if "mask" in of:
        of_b = of["mask"].shape[is_mapped["mask"]]
        if is_mapped["mask"] if of_b != b else not is_mapped["mask"] and b != 1:
            return None
        if "dmask" in gradients and not (is_mapped["mask"] and of_b == b):
            return None
    operands = []
    kept = {"sink", "mask"} | ({"q", "k", "v"} if any(is_mapped[x] for x in "qkv") else {"k", "v"})
    for name, x in of.items():
        if name == "alibi_slopes" and x.ndim - is_mapped[name] == 1:  # (hq,)
            x = jnp.broadcast_to(x[:, None], (n, b, x.shape[1])) if is_mapped[name] else x
            operands.append(x.reshape(n * b, -1) if is_mapped[name] else x)
        elif name in kept and not is_mapped[name]:
            operands.append(x)
        else:
            operands.append(_repeat(n, x, is_mapped[name]))
    return b, operands


def _repeat(n: int, x: Any, is_mapped: bool) -> Any:
    """(n * b, ...) of (n, b, ...), or of (b, ...) that is the same for all."""
    if not is_mapped:
        x = jnp.broadcast_to(x, (n, *x.shape))
    return x.reshape(n * x.shape[1], *x.shape[2:])


batching.primitive_batchers[_call_p] = _batch


# --------------------------------------------------------------------------------------- the calls


class Described:
    """An array as the checks in C see it: without memory."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape = array, tuple(array.shape)
        self.code, self.bits = _dlpack_dtype(array.dtype)

    __dlpack__ = None  # it is an array to those who ask


def _dlpack_dtype(dtype: Any) -> tuple[int, int]:
    """DLPack's code and bits; 3 is opaque."""
    named = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e5m2": 12}
    kinds = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
    code = named.get(dtype.name, kinds.get(getattr(dtype, "kind", ""), 3))
    return code, 8 * dtype.itemsize


_ARRAYS = (
    *(*_FOLLOWED, "q_lengths", "k_lengths", "k_start", "q_offset", "alibi_slopes", "seed"),
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "out", "dout", "lse", "dlse"),
    *("key_lists", "counts", "scores", "tau", "ends"),
    *("dq", "dk", "dv"),
)
_NAMES = {
    function.__name__: tuple(inspect.signature(function).parameters)
    for function in (
        *(_attention.attention, _attention.attention_varlen),
        *(_attention.attention_backward, _attention.attention_varlen_backward),
        *(_attention.scaled_dot_product_attention, _attention.attention_kvcache),
        *(_sparse.attention_sparse, _sparse.attention_sparse_varlen),
        _sparse.attention_sparse_backward,
        *(_sparsek_attention.sparsek_attention, _sparsek_attention.sparsek_attention_varlen),
        _sparsek_attention.sparsek_attention_backward,
    )
}


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, numpy.ndarray))


def _describe(name: str, value: Any) -> Any:
    if name not in _ARRAYS or not _is_array(value):
        return value
    array = jnp.asarray(value)
    if not all(isinstance(n, int) for n in array.shape):
        raise NotImplementedError(
            f"`{name}` must have a known shape, got {array.shape}: symbolic ones are not served"
        )
    return _describe_seed(array) if name == "seed" else Described(array)


def _describe_seed(seed: Any) -> Described:
    """As the int64 that C knows, in two numbers of 32 bits where JAX has no int64."""
    described = Described(seed)
    if seed.dtype.name in ("int32", "uint32") and seed.size == 1 and seed.ndim < 2:
        low = seed.reshape(())
        high = low >> 31 if seed.dtype.name == "int32" else jnp.zeros_like(low)
        words = jnp.stack([low, high])
        described.array = jax.lax.bitcast_convert_type(words, numpy.uint32)
        described.code, described.bits = 0, 64
    elif seed.dtype.name == "int64" and seed.ndim < 2:
        described.array = jax.lax.bitcast_convert_type(seed.reshape(-1)[0], numpy.uint32)
    return described


def call(name: str, values: Sequence[Any]) -> Any:
    """A public function, given every argument in the order of its signature."""
    if name == "scaled_dot_product_attention":
        return _sdpa(values)
    if name == "attention_kvcache":
        return _jax_kvcache.attend(values)
    if name.startswith("sparsek_attention"):
        return _jax_sparsek_attention.call(name, values)
    given = dict(zip(_NAMES[name], values, strict=True))
    is_backward = name.endswith("backward")
    is_sparse = name.startswith("attention_sparse")
    for written in ("dq", "dk", "dv") if is_backward else ("out",):
        if given.get(written) is not None:
            raise TypeError(f"`{written}` must be None: JAX arrays are never written")
    if given.get("page_table") is not None:
        raise NotImplementedError("`page_table` must be None in JAX's programs")
    described = tuple(_describe(key, value) for key, value in given.items())
    operands, options, results = _C.jax_plan(name, described)
    arrays = {key: array.array for key, array in operands}
    mask: Any = arrays.get("mask")
    if mask is not None:
        arrays["mask"] = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    target = "backward" if is_backward else "forward"
    if is_sparse:
        target = "sparse_backward" if is_backward else "sparse"
    one = _Call(
        target,
        tuple(arrays),
        tuple(
            (key, arrays["mask"].shape if key == "dmask" else shape, jnp.dtype(dtype))
            for key, shape, dtype in results
        ),
        tuple(sorted(options.items())),
    )
    found = _bind(one, list(arrays.values()))
    if not is_backward:
        return found[0] if len(found) == 1 else tuple(found)
    gradients = {key: x for (key, _, _), x in zip(results, found, strict=True)}
    if "dmask" in gradients:
        gradients["dmask"] = gradients["dmask"].reshape(mask.shape)
    fourth = "dgate" if is_sparse else "dmask"
    return tuple(gradients.get(key) for key in ("dq", "dk", "dv", fourth, "dsink"))


def merge_parts(outs: Sequence[Any], lses: Sequence[Any], layout: str) -> tuple[Any, Any]:
    """merge_states."""
    outs, lses = ([jnp.asarray(x) for x in parts] for parts in (outs, lses))
    _C.merge_states(tuple(map(Described, outs)), tuple(map(Described, lses)), layout)
    return _merge(layout, tuple(outs), tuple(lses))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _merge(layout: str, outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    results = (("out", outs[0].shape, outs[0].dtype), ("lse", lses[0].shape, lses[0].dtype))
    names = ("outs",) * len(outs) + ("lses",) * len(lses)
    options = (("bshd", 1),) if layout == "bshd" else ()
    out, lse = _bind(_Call("merge", names, results, options), [*outs, *lses])
    return out, lse


def _merge_formula(layout: str, outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    """What derivatives are taken of."""
    of_parts = jnp.stack(lses)
    real = of_parts.dtype
    empty = jnp.isinf(of_parts)
    peak = jnp.where(empty, -jnp.inf, of_parts).max(0)
    none = jnp.isinf(peak)
    shift = jax.lax.stop_gradient(jnp.where(none, 0, peak))
    weights = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, of_parts - shift)))
    total = jnp.where(none, 1, weights.sum(0))
    shares = weights / total
    shares = shares if layout == "bhsd" else shares.swapaxes(2, 3)
    out: Any = sum(
        jnp.where(share[..., None] == 0, 0, share[..., None] * part.astype(real))
        for share, part in zip(shares, outs, strict=True)
    )
    return out.astype(outs[0].dtype), jnp.where(none, -jnp.inf, jnp.log(total) + shift)


@_merge.defjvp
def _merge_jvp(layout: str, primals: Any, tangents: Any) -> Any:
    formula = functools.partial(_merge_formula, layout)
    return _merge(layout, *primals), jax.jvp(formula, primals, tangents)[1]


def explain(function: Any, values: Sequence[Any]) -> tuple[Any, Any, dict[str, str]]:
    """What _C.explain() says of a call, on the platform that JAX uses by default."""
    given = dict(zip(_NAMES[function], values, strict=True))
    if jax.default_backend() == "gpu":
        given = {key: _describe(key, value) for key, value in given.items()}
    else:  # lengths are read on the CPU: zeros serve
        given = {
            key: numpy.zeros(value.shape, value.dtype) if _is_array(value) else value
            for key, value in given.items()
        }
    return _C.explain(function, **given)


# ------------------------------------------------------------------------------------ the drop-ins


def _sdpa(values: Sequence[Any]) -> Any:
    """scaled_dot_product_attention: its shapes, checked in C, as those of attention."""
    name = "scaled_dot_product_attention"
    _, _, ((_, shape, _),) = _C.jax_plan(
        name, tuple(Described(jnp.asarray(x)) if _is_array(x) else x for x in values)
    )
    given = dict(zip(_NAMES[name], values, strict=True))
    q, k, v = (_with_heads(jnp.asarray(given[x])) for x in ("query", "key", "value"))
    *lead, heads = shape[:-2] or (1,)
    if k.shape[-3] != v.shape[-3]:
        k, v = (jnp.repeat(x, heads // x.shape[-3], axis=-3) for x in (k, v))

    def flat(x: Any, h: int) -> Any:
        x = jnp.broadcast_to(x, (*lead, h, *x.shape[-2:]))
        return x.reshape(math.prod(lead), *x.shape[-3:])

    mask = given["attn_mask"]
    if mask is not None:
        mask = _with_heads(jnp.asarray(mask))
        if math.prod(mask.shape[:-3]) != 1:
            mask = flat(mask, mask.shape[-3])
        mask = mask.reshape(-1, *mask.shape[-3:])
    out = attention(
        *(flat(q, heads), flat(k, k.shape[-3]), flat(v, v.shape[-3])),
        causal="top-left" if given["is_causal"] else False,
        mask=mask,
        scale=given["scale"],
    )
    return out.reshape(shape)


def _with_heads(x: Any) -> Any:
    """At least (h, s, d)."""
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


_attention_of_nn = renaming(
    attention,
    {
        **{"q": "query", "k": "key", "v": "value", "causal": "is_causal"},
        **{"q_lengths": "query_seq_lengths", "k_lengths": "key_value_seq_lengths"},
        **{"window": "local_window_size", "mask": "bias"},
    },
)


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
) -> Any:
    """jax.nn.dot_product_attention, for `from fastattn.jax import dot_product_attention`.

    In two things it is not jax.nn's: a row that sees no key is 0 (its residual -inf), where jax.nn
    gives the mean of all values; and float64 is computed in float64 throughout, where jax.nn's
    softmax is float32.

    Args:
        query: (b, sq, hq, d), or without b, as are key, value and the result.
        key: (b, sk, hk, d); hq is a multiple of hk.
        value: (b, sk, hk, dv).
        bias: added to the scaled scores: float, broadcastable to (b, hq, sq, sk).
        mask: bool, True = attend, broadcastable likewise. With a bias the two become one array,
            which is as large as both together.
        scale: default d ** -0.5.
        is_causal: query i sees keys j <= i, whatever the lengths.
        query_seq_lengths: (b,) int32.
        key_value_seq_lengths: (b,) int32.
        local_window_size: (left, right) or an int for both: keys from i - left to i + right.
        implementation: None, "xla" or "cudnn", of jax.nn; without effect here.
        return_residual: also return the logarithm of the sum of exponentials, (b, sq, hq), of
            key's dtype, which has no gradient.

    Returns:
        (b, sq, hq, dv), or (that, residual).

    Raises:
        ValueError, TypeError, NotImplementedError: as fastattn.attention.
    """
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"`implementation` must be None, 'xla' or 'cudnn', got {implementation!r}")
    q, k, v = (jnp.asarray(x) for x in (query, key, value))
    single = q.ndim == 3
    q, k, v = (x[None] if x.ndim == 3 else x for x in (q, k, v))
    if isinstance(local_window_size, int):
        local_window_size = (local_window_size, local_window_size)
    where = None if mask is None else jnp.asarray(mask)
    if where is not None and where.dtype != bool:
        raise TypeError(
            f"`mask` must be bool, got {where.dtype}: what is added to the scores is `bias`"
        )
    if bias is not None:
        added = jnp.asarray(bias)
        wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        if added.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16, wide):
            added = added.astype(wide)
        where = added if where is None else jnp.where(where, added, -jnp.inf)
    q_lengths, k_lengths = (
        None if x is None else jnp.asarray(x) for x in (query_seq_lengths, key_value_seq_lengths)
    )
    results = _attention_of_nn(
        *(q, k, v),
        causal=is_causal,
        window=local_window_size,
        q_offset=0,
        q_lengths=q_lengths,
        k_lengths=k_lengths,
        mask=where,
        scale=scale,
        layout="bshd",
        return_lse=return_residual,
    )
    if not return_residual:
        return results[0] if single else results
    out, lse = results
    residual = jax.lax.stop_gradient(lse.swapaxes(1, 2).astype(k.dtype))
    return (out[0], residual[0]) if single else (out, residual)


from . import _jax_sparsek_attention
from ._jax_sparsek import take_sparsek, take_sparsek_lists  # noqa: F401 - needs all the above
