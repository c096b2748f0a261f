"""attention_backward and attention_varlen_backward as calls: what they take and refuse."""

import re

import fastattn
import numpy as np
import pytest
from conftest import needs

B, HQ, HK, SQ, SK, D, DV = 2, 4, 2, 5, 7, 8, 6


def arrays(dtype="float32", layout="bhsd"):
    rng = np.random.default_rng(0)
    shapes = {"q": (B, HQ, SQ, D), "k": (B, HK, SK, D), "v": (B, HK, SK, DV)}
    made = {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}
    if layout == "bshd":
        made = {n: np.ascontiguousarray(x.swapaxes(1, 2)) for n, x in made.items()}
    return made


def call(dtype="float32", change=(), without=(), forward=(), **given):
    """attention_backward of a call with the keywords `forward`, some arguments changed."""
    forward = dict(forward)
    made = arrays(dtype)
    out, lse = fastattn.attention(**made, **forward, return_lse=True)
    whole = {"dout": np.ones_like(out), **made, "out": out, "lse": lse, **forward} | given
    for name, new in dict(change).items():
        whole[name] = new(whole[name])
    return fastattn.attention_backward(**{n: x for n, x in whole.items() if n not in without})


MASK = np.zeros((1, 1, SQ, SK), np.float32)
SINK = np.zeros(HQ, np.float32)

REFUSED = {
    "no gradient at all": (
        {"given": {"dout": None}},
        ValueError,
        "`dout` must be an array where `dlse` is None, got None",
    ),
    "dout of another shape": (
        {"change": {"dout": lambda x: x[:, :, :4]}},
        ValueError,
        "`dout` must have shape (2, 4, 5, 6), got (2, 4, 4, 6)",
    ),
    "dout of another dtype": (
        {"change": {"dout": lambda x: x.astype(np.float64)}},
        TypeError,
        "`dout` must be float32 like `q`, got float64",
    ),
    "out of another call": (
        {"change": {"out": lambda x: x[:1]}},
        ValueError,
        "`out` must have shape (2, 4, 5, 6), got (1, 4, 5, 6)",
    ),
    "out in the other layout": (
        {"change": {"out": lambda x: x.swapaxes(1, 2)}},
        ValueError,
        "`out` must have shape (2, 4, 5, 6), got (2, 5, 4, 6)",
    ),
    "out of another dtype": (
        {"change": {"out": lambda x: x.astype(np.float16)}},
        TypeError,
        "`out` must be float32 like `q`, got float16",
    ),
    "lse of another shape": (
        {"change": {"lse": lambda x: x[..., None]}},
        ValueError,
        "`lse` must have shape (2, 4, 5), got (2, 4, 5, 1)",
    ),
    "lse of another dtype": (
        {"change": {"lse": lambda x: x.astype(np.float64)}},
        TypeError,
        '`lse` must be float32, got float64: pass lse.astype("float32")',
    ),
    "dlse of another dtype": (
        {"given": {"dlse": np.zeros((B, HQ, SQ), np.float16)}},
        TypeError,
        '`dlse` must be float32, got float16: pass dlse.astype("float32")',
    ),
    "dlse of another shape": (
        {"given": {"dlse": np.zeros((B, SQ, HQ), np.float32)}},
        ValueError,
        "`dlse` must have shape (2, 4, 5), got (2, 5, 4)",
    ),
    "no lse": ({"given": {"lse": None}}, TypeError, "`lse` must be an array"),
    "no out": ({"given": {"out": None}}, TypeError, "`out` must be an array"),
    "dmask without a mask": (
        {"given": {"need_dmask": True}},
        ValueError,
        "`need_dmask` must be False without a mask, got True",
    ),
    "dmask of a bool mask": (
        {"forward": {"mask": MASK == 0}, "given": {"need_dmask": True}},
        ValueError,
        "`need_dmask` must be False for a bool mask, which has no gradient, got True",
    ),
    "dsink without a sink": (
        {"given": {"need_dsink": True}},
        ValueError,
        "`need_dsink` must be False without a sink, got True",
    ),
    "need_dq of a number": (
        {"given": {"need_dq": 1}},
        TypeError,
        "`need_dq` must be True or False, got 1",
    ),
    "dk that is not wanted": (
        {"given": {"need_dk": False, "dk": np.zeros((B, HK, SK, D), np.float32)}},
        ValueError,
        "`dk` must be None with need_dk=False, got an array",
    ),
    "dq of another shape": (
        {"given": {"dq": np.zeros((B, HQ, SQ, DV), np.float32)}},
        ValueError,
        "`dq` must have shape (2, 4, 5, 8), got (2, 4, 5, 6)",
    ),
    "dv of another dtype": (
        {"given": {"dv": np.zeros((B, HK, SK, DV), np.float16)}},
        TypeError,
        "`dv` must be float32 like `q`, got float16",
    ),
    "dq whose elements overlap": (
        {
            "given": {
                "dq": np.lib.stride_tricks.as_strided(
                    np.zeros(8, "f4"), (B, HQ, SQ, D), (0, 0, 0, 4)
                )
            }
        },
        ValueError,
        "`dq` must have distinct elements, got overlapping strides",
    ),
    "dropout without its seed": (
        {"forward": {"dropout_p": 0.5, "seed": 1}, "without": ("seed",)},
        ValueError,
        "`seed` must be an int or a one-element array where dropout_p > 0",
    ),
    "q of another call": (
        {"change": {"q": lambda x: x[:, :, :, :4]}},
        ValueError,
        "`k` must have d = 4 like `q`, got 8",
    ),
    "deterministic of a word": (
        {"given": {"deterministic": "yes"}},
        TypeError,
        "`deterministic` must be True or False, got 'yes'",
    ),
    "a backend of another place": (
        {"given": {"backend": "sm80"}},
        NotImplementedError,
        "no backend takes this call: sm90: backend="
        if "sm80" in fastattn.info()["backends"]
        else "backend sm80 is not built into this module",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_a_sentence(name):
    how, kind, sentence = REFUSED[name]
    how = dict(how)
    given = how.pop("given", {})
    with pytest.raises(kind) as caught:
        call(**how, **given)
    assert str(caught.value).startswith(sentence), caught.value


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_what_is_read_is_not_written(name):
    shape = {"dq": (B, HQ, SQ, D), "dk": (B, HK, SK, D), "dv": (B, HK, SK, DV)}[name]
    room = np.zeros(B * HQ * SK * D + 64, np.float32)
    target = room[: np.prod(shape)].reshape(shape)

    def inside(x):
        other = room[8 : 8 + x.size].reshape(x.shape)
        other[...] = x
        return other

    for read in ("dout", "q", "k", "v", "out", "lse"):
        before = room.copy()
        with pytest.raises(ValueError, match=f"^`{name}` must not overlap `{read}` in memory"):
            call(change={read: inside}, **{name: target})
        before[8:] = room[8:]
        assert np.array_equal(room, before)


def test_gradients_lie_apart():
    room = np.zeros((B, HK, SK, D), np.float32)
    with pytest.raises(ValueError, match=r"^`dv` must not overlap `dk` in memory"):
        call(dk=room, dv=room[..., :DV])
    room.flags.writeable = False
    with pytest.raises(ValueError, match=r"^`dk` must be writeable, got a read-only array"):
        call(dk=room)
    assert not room.any()


def packed(**given):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, D)).astype("f4") for n, h in ((6, HQ), (9, HK), (9, HK)))
    ends = np.array([0, 2, 6], np.int32), np.array([0, 4, 9], np.int32)
    out, lse = fastattn.attention_varlen(q, k, v, *ends, 4, 5, return_lse=True)
    whole = {"dout": np.ones_like(out), "out": out, "lse": lse} | given
    return fastattn.attention_varlen_backward(
        whole.pop("dout"), q, k, v, whole.pop("out"), whole.pop("lse"), *ends, 4, 5, **whole
    )


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"lse": np.zeros((6, HQ), "f4")}, ValueError, "`lse` must have shape (4, 6), got (6, 4)"),
        ({"dout": np.zeros((6, HK, D), "f4")}, ValueError, "`dout` must have shape (6, 4, 8)"),
        (
            {"page_table": 1},
            NotImplementedError,
            "`page_table` must be None: keys in pages have no gradient",
        ),
        ({"need_dsink": True}, ValueError, "`need_dsink` must be False without a sink"),
    ],
)
def test_packed_sequences_are_refused_by_sentences(given, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)):
        packed(**given)


def test_every_argument_at_once_finds_room():
    """19 arrays in one call."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, D)).astype("f4") for n, h in ((6, HQ), (9, HK), (9, HK)))
    ends = np.array([0, 2, 6], np.int32), np.array([0, 4, 9], np.int32)
    many = {
        "seqused_q": np.array([2, 3], np.int32),
        "seqused_k": np.array([4, 4], np.int32),
        "q_offset": np.array([1, 2], np.int32),
        "mask": np.zeros((2, 1, 4, 5), np.float32),
        "alibi_slopes": SINK,
        "sink": SINK,
        "dropout_p": 0.5,
        "seed": np.int64([3]),
    }
    out, lse = fastattn.attention_varlen(q, k, v, *ends, 4, 5, return_lse=True, **many)
    outputs = {"dq": np.empty_like(q), "dk": np.empty_like(k), "dv": np.empty_like(v)}
    every = {**many, **outputs, "dlse": lse, "need_dmask": True, "need_dsink": True}
    said = fastattn.explain(
        fastattn.attention_varlen_backward, out, q, k, v, out, lse, *ends, 4, 5, **every
    )
    assert said.backend in ("cpu", None)


@needs("torch")
def test_dropout_of_torch_needs_its_seed():
    import torch

    made = {n: torch.from_numpy(x) for n, x in arrays().items()}
    out, lse = fastattn.attention(**made, return_lse=True)
    with pytest.raises(ValueError, match=r"^`seed` must be the forward's where dropout_p > 0, got"):
        fastattn.attention_backward(out, **made, out=out, lse=lse, dropout_p=0.5)


@needs("jax")
def test_a_jax_array_is_not_written():
    import jax

    made = {n: jax.numpy.asarray(x) for n, x in arrays().items()}
    out, lse = fastattn.attention(**made, return_lse=True)
    with pytest.raises(TypeError, match=r"^`dq` must not be a JAX array: JAX arrays are never"):
        fastattn.attention_backward(out, **made, out=out, lse=lse, dq=made["q"])
