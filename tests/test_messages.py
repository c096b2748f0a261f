"""Messages that say what to do, each done here; what options may be, and what they may raise."""

import re

import cases
import fastattn
import numpy as np
import pytest
from conftest import needs

B, HQ, HK, SQ, SK, D = 2, 4, 2, 5, 7, 8


def shaped(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def numpy_arrays(x, dtype):
    return x.astype(cases.dtype_of(dtype) if dtype in cases.DTYPES else dtype)


def torch_arrays(x, dtype):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))


def jax_arrays(x, dtype):
    import jax

    x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with x64(True):  # or int64 becomes int32
        return jax.numpy.asarray(x).astype(dtype)


@pytest.fixture(
    params=[
        numpy_arrays,
        pytest.param(torch_arrays, marks=needs("torch")),
        pytest.param(jax_arrays, marks=needs("jax")),
    ]
)
def make(request):
    return request.param


def call(make, function=fastattn.attention, **given):
    q, k, v = (
        make(shaped(*shape), "float32")
        for shape in ((B, HQ, SQ, D), (B, HK, SK, D), (B, HK, SK, D))
    )
    return np.asarray(function(q, k, v, **given))


def mended(make, message, name, value, function=fastattn.attention, **given):
    """Does what the sentence says: the result."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call(make, function, **{name: value}, **given)
    said, _, mend = str(caught.value).partition(": pass ")
    assert re.fullmatch(message, said), said
    assert mend, f"no mend: {said}"
    return mend, call(make, function, **{name: eval(mend, {name: value})}, **given)


LENGTHS = {"q_lengths": [3, 5], "k_lengths": [4, 7], "k_start": [1, 0], "q_offset": [2, -1]}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dtype", ["int64", "int16", "uint8"])
def test_lengths_of_other_integers(make, name, dtype):
    value = np.abs(np.array(LENGTHS[name]))
    mend, out = mended(make, f"`{name}` must be int32, got {dtype}", name, make(value, dtype))
    assert mend == (f"{name}.int()" if make is torch_arrays else f'{name}.astype("int32")')
    assert np.array_equal(out, call(make, **{name: make(value, "int32")}))


@pytest.mark.parametrize("name", ["sink", "alibi_slopes"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_sinks_and_slopes_of_other_floats(make, name, dtype):
    value = np.array([0.5, 0.25, 2, 1])
    mend, out = mended(make, f"`{name}` must be float32, got {dtype}", name, make(value, dtype))
    assert mend == (f"{name}.float()" if make is torch_arrays else f'{name}.astype("float32")')
    assert np.array_equal(out, call(make, **{name: make(value, "float32")}))


def test_slopes_of_each_sequence(make):
    value = np.ones((B, HQ))
    _, out = mended(make, "`alibi_slopes` must be float32, got float16", "alibi_slopes",
                    make(value, "float16"))  # fmt: skip
    assert np.array_equal(out, call(make, alibi_slopes=make(value, "float32")))


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(B, SK), (B, SQ, SK), (SQ, SK), (B, 1, 1, SK)])
def test_masks_of_integers_and_of_a_forgotten_dimension(make, shape, dtype):
    value = np.random.default_rng(1).integers(0, 2, shape)
    rule = f"`mask` must be bool, float32, float16 or bfloat16, got {dtype}"
    mend, out = mended(make, rule, "mask", make(value, dtype))
    index = {2: "[:, None, None, :]", 3: "[:, None]"}.get(len(shape), "") if shape[0] == B else ""
    cast = "mask.bool()" if make is torch_arrays else 'mask.astype("bool")'
    assert mend == cast + index
    full = value.reshape({(B, SK): (B, 1, 1, SK), (B, SQ, SK): (B, 1, SQ, SK)}.get(shape, shape))
    assert np.array_equal(out, call(make, mask=make(full, "bool")))


@pytest.mark.parametrize("dtype", ["bool", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape, index", [((B, SK), "[:, None, None, :]"), ((B, SQ, SK), "[:, None]")]
)
def test_masks_of_a_forgotten_dimension(make, shape, index, dtype):
    value = np.random.default_rng(1).integers(0, 2, shape)
    rule = rf"`mask` must broadcast to \(2, 4, 5, 7\), got {re.escape(str(shape))}"
    mend, out = mended(make, rule, "mask", make(value, dtype))
    assert mend == f"mask{index}"
    full = value[:, None, None] if len(shape) == 2 else value[:, None]
    assert np.array_equal(out, call(make, mask=make(full, dtype)))


def test_masks_of_float64():
    for make in (numpy_arrays, torch_arrays):
        mask = make(shaped(SQ, SK), "float64")
        rule = "`mask` must be bool, float32, float16 or bfloat16, got float64"
        mend, out = mended(make, rule, "mask", mask)
        assert mend == ("mask.float()" if make is torch_arrays else 'mask.astype("float32")')
        assert np.array_equal(out, call(make, mask=make(shaped(SQ, SK), "float32")))


def test_masks_of_the_drop_in(make):
    mask = make(np.ones((B, SK)), "uint8")
    rule = "`attn_mask` must be bool, float32 or of `query`'s dtype, got uint8"
    sdpa = fastattn.scaled_dot_product_attention
    mend, out = mended(make, rule, "attn_mask", mask, sdpa, enable_gqa=True)
    assert mend.endswith("[:, None, None, :]")
    assert np.array_equal(out, call(make, sdpa, enable_gqa=True))
    rule = rule.replace("uint8", "float16")
    mend, _ = mended(
        make, rule, "attn_mask", make(shaped(SQ, SK), "float16"), sdpa, enable_gqa=True
    )
    assert "float" in mend and "[" not in mend


def test_masks_of_packed_sequences():
    q, k, cu = shaped(9, HQ, D), shaped(9, HK, D), np.array([0, 4, 9], np.int64)
    with pytest.raises(TypeError, match=r'got int64: pass cu_seqlens_q\.astype\("int32"\)$'):
        fastattn.attention_varlen(q, k, k, cu, cu, 5, 5)
    cu = cu.astype(np.int32)
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False
    full = fastattn.attention_varlen(q, k, k, cu, cu, 5, 5, mask=mask[:, None, None, :])
    with pytest.raises(ValueError, match=r"got \(2, 5\): pass mask\[:, None, None, :\]$"):
        fastattn.attention_varlen(q, k, k, cu, cu, 4 + 1, 5, mask=mask)
    assert full.shape == (9, HQ, D)


@pytest.mark.parametrize("value", [np.ones(2, "f4"), np.ones(2, "?"), np.ones(2, "c8")])
def test_what_no_cast_mends(value):
    with pytest.raises(TypeError, match=r"`k_lengths` must be int32, got \w+$"):
        call(numpy_arrays, k_lengths=value)
    with pytest.raises(ValueError, match=r"`mask` must broadcast to .*, got \(3, 7\)$"):
        call(numpy_arrays, mask=np.ones((3, SK), bool))
    with pytest.raises(TypeError, match=r"`mask` must be .*, got complex64$"):
        call(numpy_arrays, mask=np.ones((SQ, SK), np.complex64))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k_lengths", np.array([3, 4], ">i4")),
        ("k_lengths", np.array([3, 4], object)),
        ("mask", np.ones((SQ, SK), ">f4")),
        ("mask", np.ones((SQ, SK), "M8[s]")),
        ("sink", np.zeros(HQ, np.longdouble)),
    ],
)
def test_what_no_argument_takes(name, value):
    """The sentence is true of every argument: lengths are no floats."""
    rule = "float64, float32, float16 or bfloat16, integers or bools, in native byte order"
    with pytest.raises(TypeError) as error:
        call(numpy_arrays, **{name: value})
    assert str(error.value) == f"`{name}` must hold {rule}, got {value.dtype}"


# ------------------------------------------------------------------------------------------- layout


def test_a_forgotten_layout():
    q, k = shaped(2, 5, 8, 16), shaped(2, 7, 4, 16)  # (b, s, h, d)
    with pytest.raises(ValueError, match=r'of `k`.s 7, got 5: layout="bshd" would fit$'):
        fastattn.attention(q, k, k)
    out = fastattn.attention(q, k, k, layout="bshd")
    q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    assert np.array_equal(out.swapaxes(1, 2), fastattn.attention(q, k, k))
    with pytest.raises(ValueError, match=r'of `k`.s 7, got 5: layout="bhsd" would fit$'):
        fastattn.attention(q, k, k, layout="bshd")
    with pytest.raises(ValueError, match=r'got 5: attention\(layout="bshd"\) would fit$'):
        fastattn.scaled_dot_product_attention(
            q.swapaxes(1, 2), k.swapaxes(1, 2), k.swapaxes(1, 2), enable_gqa=True
        )
    with pytest.raises(ValueError, match=r'gqa, got 3: attention\(layout="bshd"\) would fit$'):
        fastattn.scaled_dot_product_attention(shaped(2, 6, 4, 16), *[shaped(2, 3, 4, 16)] * 2)


def test_heads_that_no_layout_fits():
    with pytest.raises(ValueError, match=r"multiple of `k`'s 2, got 3$"):
        fastattn.attention(shaped(2, 3, 5, 8), *[shaped(2, 2, 7, 8)] * 2)
    cu = np.array([0, 2], np.int32)
    with pytest.raises(ValueError, match=r"multiple of `k`'s 3, got 4$"):
        fastattn.attention_varlen(shaped(2, 4, 8), *[shaped(2, 3, 8)] * 2, cu, cu, 2, 2)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("value", [np.True_, np.False_, np.bool_(3)])
def test_bools_of_numpy(value):
    q, k = shaped(B, HQ, SQ, D), shaped(B, HQ, SK, D)
    for function, option in (
        (fastattn.attention, "causal"),
        (fastattn.attention, "deterministic"),
        (fastattn.attention, "batch_invariant"),
        (fastattn.scaled_dot_product_attention, "is_causal"),
        (fastattn.scaled_dot_product_attention, "enable_gqa"),
    ):
        want = function(q, k, k, **{option: bool(value)})
        assert np.array_equal(function(q, k, k, **{option: value}), want)
    assert isinstance(fastattn.attention(q, k, k, return_lse=value), tuple) == bool(value)


@pytest.mark.parametrize("value", [1, 0, "True", 1.0, np.int64(1), np.ones(1, bool), None, [True]])
def test_what_is_no_bool(value):
    x = shaped(1, 1, 2, 4)
    for option in ("return_lse", "deterministic", "batch_invariant"):
        with pytest.raises(TypeError, match=f"`{option}` must be True or False, got"):
            fastattn.attention(x, x, x, **{option: value})
    with pytest.raises(ValueError, match="`causal` must be False, True or 'top-left', got"):
        fastattn.attention(x, x, x, causal=value)


class Raises:
    def __init__(self, exception):
        self.exception = exception

    def _fail(self):
        raise self.exception

    __float__ = __index__ = __repr__ = _fail


OPTIONS = ["scale", "softcap", "dropout_p", "window", "q_offset", "seed", "max_seqlen_q"]


def call_with(option, value):
    x = shaped(1, 1, 2, 4)
    if option == "max_seqlen_q":
        cu = np.array([0, 1], np.int32)
        return fastattn.attention_varlen(x[0], x[0], x[0], cu, cu, value, 1)
    given = {"dropout_p": 0.5} if option == "seed" else {}
    value = (value, None) if option == "window" else value
    return fastattn.attention(x, x, x, **{**given, option: value})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "exception",
    [RuntimeError("mine"), ValueError("mine"), OverflowError("mine"), KeyboardInterrupt()],
)
def test_what_an_option_raises_comes_through(option, exception):
    with pytest.raises(type(exception)) as caught:
        call_with(option, Raises(exception))
    assert caught.value is exception


@pytest.mark.parametrize("option", OPTIONS)
def test_a_type_error_becomes_our_sentence(option):
    class Wrong(Raises):
        def __repr__(self):
            return "Wrong()"

    with pytest.raises(TypeError, match=rf"`{option}` must .*, got Wrong\(\)"):
        call_with(option, Wrong(TypeError("theirs")))
    with pytest.raises(TypeError, match=rf"`{option}` must .*, got an object"):
        call_with(option, Raises(TypeError("theirs")))  # its repr() raises too


@pytest.mark.parametrize("option", OPTIONS)
def test_a_ctrl_c_while_the_sentence_is_made(option):
    class Slow(Raises):
        def __repr__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_with(option, Slow(TypeError("theirs")))


@pytest.mark.parametrize("option", ["seed", "q_offset"])
def test_a_ctrl_c_while_an_int_is_told_from_an_array(option):
    class Slow:
        @property
        def __dlpack__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_with(option, Slow())


@pytest.mark.parametrize("option", ["scale", "softcap", "dropout_p"])
@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_an_int_that_no_float_holds(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must fit a float, got -?1000"):
        call_with(option, value)
