"""Each refusal of `attention` by its sentence: the argument, the rule, what came.

And a refusal leaves no trace: `out` keeps its bytes, arrays their reference counts, capsules are
given back exactly once.
"""

import contextlib
import gc
import itertools
import sys

import fastattn
import ml_dtypes
import numpy as np
import pytest
from handmade import Answers, Tensor, ones

F32, I32 = np.float32, np.int32


def a(*shape, dtype=F32):
    return np.ones(shape, dtype)


def call(q=(2, 4, 5, 8), k=(2, 2, 7, 8), v=(2, 2, 7, 8), **keywords):
    """attention on arrays of ones; shapes may be given in place of arrays."""
    q, k, v = (a(*x) if isinstance(x, tuple) else x for x in (q, k, v))
    return fastattn.attention(q, k, v, **keywords)


# what is wrong: (exception, sentence as a regular expression, arguments of call)
WRONG = {
    # rank and shape
    "rank of q": (
        ValueError,
        r"`q` must have 4 dimensions \(b, hq, sq, d\), got 3",
        {"q": (4, 5, 8)},
    ),
    "rank of k": (
        ValueError,
        r"`k` must have 4 dimensions \(b, hk, sk, d\), got 5",
        {"k": (1, 2, 2, 7, 8)},
    ),
    "rank of v, bshd": (
        ValueError,
        r"`v` must have 4 dimensions \(b, sk, hk, dv\), got 2",
        {"v": (7, 8), "layout": "bshd"},
    ),
    "rank 0": (ValueError, r"`q` must have 4 dimensions .* got 0", {"q": ()}),
    "9 dimensions": (ValueError, "`q` must have at most 8 dimensions, got 9", {"q": (1,) * 9}),
    "head size of k": (ValueError, "`k` must have d = 8 like `q`, got 16", {"k": (2, 2, 7, 16)}),
    "batch of k": (ValueError, "`k` must have b = 2 like `q`, got 1", {"k": (1, 2, 7, 8)}),
    "batch of v": (ValueError, "`v` must have b = 2 like `q`, got 3", {"v": (3, 2, 7, 8)}),
    "length of v": (ValueError, "`v` must have sk = 7 like `k`, got 6", {"v": (2, 2, 6, 8)}),
    "heads of v": (ValueError, "`v` must have hk = 2 like `k`, got 4", {"v": (2, 4, 7, 8)}),
    "head ratio": (
        ValueError,
        "`q` must have a number of heads that is a multiple of `k`'s 2, got 3",
        {"q": (2, 3, 5, 8)},
    ),
    "no key heads": (
        ValueError,
        "`k` must have hk from 1 to .*, got 0",
        {"k": (2, 0, 7, 8), "v": (2, 0, 7, 8)},
    ),
    # dtype
    "int q": (
        TypeError,
        "`q` must be float64, float32, float16 or bfloat16, got int32",
        {"q": a(2, 4, 5, 8, dtype=I32)},
    ),
    "complex q": (
        TypeError,
        "`q` must be float64, float32, float16 or bfloat16, got complex64",
        {"q": a(2, 4, 5, 8, dtype=np.complex64)},
    ),
    "bool q": (TypeError, "`q` must be float64, .* got bool", {"q": a(2, 4, 5, 8, dtype=bool)}),
    "fp8 q": (
        TypeError,
        "`q` must hold float64, .* got float8_e4m3fn",
        {"q": a(2, 4, 5, 8, dtype=ml_dtypes.float8_e4m3fn)},
    ),
    "string q": (TypeError, "`q` must hold float64, .* got <U1", {"q": np.full((2, 4, 5, 8), "x")}),
    "longdouble q": (
        TypeError,
        "`q` must hold float64, .* got float128",
        {"q": a(2, 4, 5, 8, dtype=np.longdouble)},
    ),
    "structured q": (
        TypeError,
        "`q` must hold float64, .* got",
        {"q": a(2, 4, 5, 8, dtype="f4,f4")},
    ),
    "big-endian q": (
        TypeError,
        "`q` must hold .* in native byte order, got >f4",
        {"q": a(2, 4, 5, 8, dtype=">f4")},
    ),
    "dtype of k": (
        TypeError,
        "`k` must be float32 like `q`, got float16",
        {"k": a(2, 2, 7, 8, dtype=np.float16)},
    ),
    "dtype of v": (
        TypeError,
        "`v` must be float32 like `q`, got float64",
        {"v": a(2, 2, 7, 8, dtype=np.float64)},
    ),
    "not an array": (TypeError, "`k` must .*got .*NoneType", {"k": None}),
    "a number": (TypeError, "`v` must .*got .*float", {"v": 1.0}),
    # options
    "negative softcap": (
        ValueError,
        "`softcap` must be finite and >= 0, got -1",
        {"softcap": -1.0},
    ),
    "NaN softcap": (ValueError, "`softcap` must be finite and >= 0, got nan", {"softcap": np.nan}),
    "inf softcap": (ValueError, "`softcap` must be finite and >= 0, got inf", {"softcap": np.inf}),
    "softcap text": (TypeError, "`softcap` must be a float, got '1'", {"softcap": "1"}),
    "NaN scale": (ValueError, "`scale` must be finite, got nan", {"scale": np.nan}),
    "scale text": (TypeError, "`scale` must be a float, got 'x'", {"scale": "x"}),
    "window of no key": (
        ValueError,
        r"`window` \(-1, 0\) sees no key; unbounded is None",
        {"window": (-1, 0)},
    ),
    "window of one": (TypeError, r"`window` must be None or \(left, right\), got 3", {"window": 3}),
    "window of three": (
        TypeError,
        r"`window` must be None or \(left, right\)",
        {"window": (1, 2, 3)},
    ),
    "window of floats": (
        TypeError,
        r"`window` must hold two ints or None, got 1.5",
        {"window": (1.5, 0)},
    ),
    "causal text": (
        ValueError,
        "`causal` must be False, True or 'top-left', got 'bottom'",
        {"causal": "bottom"},
    ),
    "layout": (ValueError, "`layout` must be 'bhsd' or 'bshd', got 'sbhd'", {"layout": "sbhd"}),
    "return_lse": (TypeError, "`return_lse` must be True or False, got 1", {"return_lse": 1}),
    "backend": (
        ValueError,
        "`backend` must be None, 'sm90', 'sm80' or 'cpu', got 'tpu'",
        {"backend": "tpu"},
    ),
    "dropout above 1": (ValueError, "`dropout_p` must be from 0 to 1, got 1.5", {"dropout_p": 1.5}),
    "NaN dropout": (ValueError, "`dropout_p` must be from 0 to 1, got nan", {"dropout_p": np.nan}),
    "dropout text": (TypeError, "`dropout_p` must be a float, got 'x'", {"dropout_p": "x"}),
    "no seed": (
        ValueError,
        "`seed` must be an int or a one-element array where dropout_p > 0 and `q` is no torch "
        "tensor, got None",
        {"dropout_p": 0.5},
    ),
    "seed text": (
        TypeError,
        "`seed` must be an int or a one-element array, got '7'",
        {"dropout_p": 0.5, "seed": "7"},
    ),
    "seed too large": (
        ValueError,
        r"`seed` must be from -2\^63 to 2\^63 - 1, got 9223372036854775808",
        {"dropout_p": 0.5, "seed": 2**63},
    ),
    "seed dtype": (
        TypeError,
        r"`seed` must be int64, int32 or uint32, got int16: pass seed.astype\(\"int64\"\)$",
        {"dropout_p": 0.5, "seed": a(1, dtype=np.int16)},
    ),
    "seed shape": (
        ValueError,
        r"`seed` must have shape \(\) or \(1,\), got \(2,\)",
        {"dropout_p": 0.5, "seed": a(2, dtype=np.int64)},
    ),
    "seed elsewhere": (
        ValueError,
        "`seed` must be on cpu like `q`, got cuda:0",
        {"dropout_p": 0.5, "seed": ones(1, dtype=np.int64, device=(2, 0))},
    ),
    # masks and vectors
    "mask dtype": (
        TypeError,
        "`mask` must be bool, float32, float16 or bfloat16, got int32",
        {"mask": a(5, 7, dtype=I32)},
    ),
    "mask uint8": (
        TypeError,
        "`mask` must be bool, float32, float16 or bfloat16, got uint8",
        {"mask": a(5, 7, dtype=np.uint8)},
    ),
    "mask shape": (
        ValueError,
        r"`mask` must broadcast to \(2, 4, 5, 7\), got \(5, 6\)",
        {"mask": a(5, 6)},
    ),
    "mask heads": (
        ValueError,
        r"`mask` must broadcast to \(2, 4, 5, 7\), got \(1, 2, 5, 7\)",
        {"mask": a(1, 2, 5, 7)},
    ),
    "mask rank": (
        ValueError,
        r"`mask` must broadcast to \(2, 4, 5, 7\), got \(1, 1, 1, 5, 7\)",
        {"mask": a(1, 1, 1, 5, 7)},
    ),
    "mask size 0": (
        ValueError,
        r"`mask` must broadcast to \(2, 4, 5, 7\), got \(5, 0\)",
        {"mask": a(5, 0)},
    ),
    "lengths dtype": (
        TypeError,
        "`k_lengths` must be int32, got int64",
        {"k_lengths": a(2, dtype=np.int64)},
    ),
    "lengths shape": (
        ValueError,
        r"`q_lengths` must have shape \(2,\), got \(3,\)",
        {"q_lengths": a(3, dtype=I32)},
    ),
    "start rank": (
        ValueError,
        r"`k_start` must have shape \(2,\), got \(2, 1\)",
        {"k_start": a(2, 1, dtype=I32)},
    ),
    "slopes shape": (
        ValueError,
        r"`alibi_slopes` must have shape \(4,\), got \(2,\)",
        {"alibi_slopes": a(2)},
    ),
    "slopes of sequences": (
        ValueError,
        r"`alibi_slopes` must have shape \(2, 4\), got \(4, 2\)",
        {"alibi_slopes": a(4, 2)},
    ),
    "slopes dtype": (
        TypeError,
        "`alibi_slopes` must be float32, got float64",
        {"alibi_slopes": a(4, dtype=np.float64)},
    ),
    "sink shape": (ValueError, r"`sink` must have shape \(4,\), got \(\)", {"sink": a()}),
    "sink dtype": (
        TypeError,
        "`sink` must be float32, got float16",
        {"sink": a(4, dtype=np.float16)},
    ),
    # strides
    "stride of half an item": (
        ValueError,
        "`q` must have strides that are multiples of its item size of 4 bytes, got",
        {"q": np.zeros((2, 4, 5, 8), "f4,i1")["f0"]},
    ),
    "unaligned": (
        ValueError,
        "`q` must be aligned to its item size of 4 bytes",
        {"q": np.zeros(4 * 320 + 1, np.uint8)[1:].view(F32).reshape(2, 4, 5, 8)},
    ),
    # out
    "out shape": (
        ValueError,
        r"`out` must have shape \(2, 4, 5, 8\), got \(2, 4, 5, 9\)",
        {"out": a(2, 4, 5, 9)},
    ),
    "out layout": (
        ValueError,
        r"`out` must have shape \(2, 4, 5, 8\), got \(2, 5, 4, 8\)",
        {"out": a(2, 5, 4, 8)},
    ),
    "out dtype": (
        TypeError,
        "`out` must be float32 like `q`, got float64",
        {"out": a(2, 4, 5, 8, dtype=np.float64)},
    ),
    "out broadcast": (
        ValueError,
        "`out` must have distinct elements, got overlapping strides",
        {"out": np.lib.stride_tricks.as_strided(a(64), (2, 4, 5, 8), (0, 0, 32, 4))},
    ),
    "out overlaps itself": (
        ValueError,
        "`out` must have distinct elements, got overlapping strides",
        {"out": np.lib.stride_tricks.as_strided(a(640), (2, 4, 5, 8), (640, 128, 32, 32))},
    ),
    "not out": (TypeError, "`out` must ", {"out": "here"}),
    # devices
    "CUDA out": (
        ValueError,
        "`out` must be on cpu like `q`, got cuda:0",
        {"out": ones(2, 4, 5, 8, device=(2, 0))},
    ),
    "mixed devices": (
        ValueError,
        "`k` must be on cpu like `q`, got cuda:1",
        {"k": ones(2, 2, 7, 8, device=(2, 1))},
    ),
    "mask elsewhere": (
        ValueError,
        "`mask` must be on cpu like `q`, got cuda:0",
        {"mask": ones(5, 7, device=(2, 0))},
    ),
    "another kind of device": (
        NotImplementedError,
        "`q` must be on the CPU or a CUDA GPU, got DLPack device type 10",
        {"q": ones(2, 4, 5, 8, device=(10, 0))},
    ),
    # capsules
    "consumed capsule": (
        TypeError,
        "`q` must export an unused DLPack capsule, got a consumed one",
        {"q": ones(2, 4, 5, 8, name=b"used_dltensor_versioned")},
    ),
    "consumed old capsule": (
        TypeError,
        "`q` must export an unused DLPack capsule, got a consumed one",
        {"q": ones(2, 4, 5, 8, versioned=False, name=b"used_dltensor")},
    ),
    "foreign capsule": (
        TypeError,
        "`q` must export an unused DLPack capsule, got a PyCapsule",
        {"q": ones(2, 4, 5, 8, name=b"something")},
    ),
    "no capsule": (
        TypeError,
        "`q` must export an unused DLPack capsule, got a int",
        {"q": Answers(3)},
    ),
    "capsule of version 2": (
        TypeError,
        "`q` must speak DLPack 1, got a capsule of version 2.0",
        {"q": ones(2, 4, 5, 8, version=(2, 0))},
    ),
    "__dlpack__ raises": (
        BufferError,
        "my own reason",
        {"q": Answers(lambda: BufferError("my own reason"))},
    ),
    "no shape": (
        ValueError,
        "`q` must have a shape, got a DLPack tensor without one",
        {"q": ones(2, 4, 5, 8, change=lambda t: setattr(t, "shape", None))},
    ),
    "no data": (
        TypeError,
        "`q` must have memory, got a tensor without data",
        {"q": ones(2, 4, 5, 8, change=lambda t: setattr(t, "data", None))},
    ),
    "negative size": (
        ValueError,
        "`q` must have sizes >= 0, got -5",
        {"q": ones(2, 4, 5, 8, change=lambda t: t.shape.__setitem__(2, -5))},
    ),
    "negative rank": (
        ValueError,
        "`q` must have .*dimensions, got -1",
        {"q": ones(2, 4, 5, 8, change=lambda t: setattr(t, "ndim", -1))},
    ),
    "9 dimensions by DLPack": (
        ValueError,
        "`q` must have at most 8 dimensions, got 9",
        {"q": ones(*(1,) * 9)},
    ),
    "more than 2^63 elements": (
        ValueError,
        r"`q` must have fewer than 2\^63 elements",
        {
            "q": ones(
                2,
                4,
                5,
                8,
                change=lambda t: [t.shape.__setitem__(i, 2**31) for i in range(3)],
            )
        },
    ),
    "2 lanes": (
        TypeError,
        r"`q` must be float64, .* got dtype \(2, 32, 2\)",
        {"q": ones(2, 4, 5, 8, change=lambda t: setattr(t.dtype, "lanes", 2))},
    ),
    "read-only out": (
        ValueError,
        "`out` must be writeable, got a read-only array",
        {"out": ones(2, 4, 5, 8, read_only=True)},
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_sentence(what, frozen):
    exception, sentence, arguments = WRONG[what]
    names = ("q", "k", "v")
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8)}
    arguments = {**shapes, **arguments}
    arguments = {
        name: a(*x) if name in names and isinstance(x, tuple) else x
        for name, x in arguments.items()
    }
    out = np.full((2, 4, 5, 8), 7, F32)
    if what.startswith(("rank", "d of", "dv", "out", "CUDA", "not out", "read-only", "9", "batch")):
        out = arguments.get("out")
    arguments["out"] = out
    made_by_hand = [x for x in arguments.values() if isinstance(x, Tensor)]
    for x in made_by_hand:
        x.forget()
    bytes_before = out.tobytes() if isinstance(out, np.ndarray) else None

    def refused(times):
        for _ in range(times):
            with pytest.raises(exception, match=sentence) as caught:
                fastattn.attention(**arguments)
            assert type(caught.value) is exception
            del caught
        given = [x.exported for x in made_by_hand if x.name is None]
        assert given == [x.deleted for x in made_by_hand if x.name is None]  # back, and once
        assert not any(x.deleted for x in made_by_hand if x.name)  # what is not ours is left alone
        for x in made_by_hand:
            x.forget()
        gc.collect()
        return {name: sys.getrefcount(x) for name, x in arguments.items() if not _immortal(x)}

    before = refused(2)  # the first call may import and cache
    assert refused(5) == before
    if bytes_before is not None:
        assert out.tobytes() == bytes_before


@pytest.mark.parametrize("what", WRONG)
def test_refusals_leave_no_object_behind(what, frozen):
    exception, _, arguments = WRONG[what]
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8)}
    arguments = {**shapes, **arguments}
    for name in shapes:
        if isinstance(arguments[name], tuple):
            arguments[name] = a(*arguments[name])

    def blocks(times):
        for _ in range(times):
            with contextlib.suppress(exception):
                fastattn.attention(**arguments)
            for x in arguments.values():
                if isinstance(x, Tensor):
                    x.forget()
        gc.collect()
        return sys.getallocatedblocks()

    # Caches and pools of Python's still fill in some rounds; what leaks grows by 100 in each.
    counts = [blocks(20), *(blocks(100) for _ in range(4))]
    assert min(after - before for before, after in itertools.pairwise(counts)) < 50


def _immortal(x):
    return x is None or isinstance(x, (bool, int, str))
