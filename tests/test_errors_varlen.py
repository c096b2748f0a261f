"""Each refusal of `attention_varlen` by its sentence, and that it leaves no trace."""

import sys

import fastattn
import numpy as np
import pytest
from handmade import ones
from test_errors import F32, I32, a


def offsets(*numbers, dtype=I32):
    return np.array(numbers, dtype)


VARLEN = {
    "q": a(9, 4, 8),
    "k": a(12, 2, 8),
    "v": a(12, 2, 8),
    "cu_seqlens_q": offsets(0, 4, 9),
    "cu_seqlens_k": offsets(0, 7, 11),
    "max_seqlen_q": 5,
    "max_seqlen_k": 7,
}
VARLEN_WRONG = {
    "rank of q": (
        ValueError,
        r"`q` must have 3 dimensions \(total_q, hq, d\), got 4",
        {"q": a(1, 9, 4, 8)},
    ),
    "rank of v": (
        ValueError,
        r"`v` must have 3 dimensions \(total_k, hk, dv\), got 2",
        {"v": a(12, 8)},
    ),
    "total of v": (ValueError, "`v` must have total_k = 12 like `k`, got 11", {"v": a(11, 2, 8)}),
    "head size": (ValueError, "`k` must have d = 8 like `q`, got 9", {"k": a(12, 2, 9)}),
    "head ratio": (
        ValueError,
        "`q` must have a number of heads that is a multiple of `k`'s 2, got 3",
        {"q": a(9, 3, 8)},
    ),
    "no offsets": (
        TypeError,
        "`cu_seqlens_q` must be an array .* got NoneType",
        {"cu_seqlens_q": None},
    ),
    "offsets' dtype": (
        TypeError,
        "`cu_seqlens_k` must be int32, got int64",
        {"cu_seqlens_k": offsets(0, 7, 11, dtype=np.int64)},
    ),
    "offsets' rank": (
        ValueError,
        r"`cu_seqlens_q` must have 1 dimensions \(b \+ 1,\), got 2",
        {"cu_seqlens_q": offsets([0, 4, 9])},
    ),
    "empty offsets": (
        ValueError,
        r"`cu_seqlens_q` must have b \+ 1 from 1 to .*, got 0",
        {"cu_seqlens_q": offsets()},
    ),
    "offsets of another batch": (
        ValueError,
        r"`cu_seqlens_k` must have b \+ 1 = 3 like `cu_seqlens_q`, got 2",
        {"cu_seqlens_k": offsets(0, 7)},
    ),
    "offsets elsewhere": (
        ValueError,
        "`cu_seqlens_q` must be on cpu like `q`, got cuda:0",
        {"cu_seqlens_q": ones(3, dtype=I32, device=(2, 0))},
    ),
    "a late start": (
        ValueError,
        "`cu_seqlens_q` must start at 0, got 1",
        {"cu_seqlens_q": offsets(1, 4, 9)},
    ),
    "an early start": (
        ValueError,
        "`cu_seqlens_k` must start at 0, got -1",
        {"cu_seqlens_k": offsets(-1, 4, 9)},
    ),
    "offsets that decrease": (
        ValueError,
        "`cu_seqlens_q` must not decrease, got 3 after 4",
        {"cu_seqlens_q": offsets(0, 4, 3)},
    ),
    "offsets past the end": (
        ValueError,
        "`cu_seqlens_k` must not run past `k`'s 12 rows, got 13",
        {"cu_seqlens_k": offsets(0, 7, 13)},
    ),
    "long queries": (
        ValueError,
        "`cu_seqlens_q` must have sequences of at most `max_seqlen_q` = 4 rows, got 5",
        {"max_seqlen_q": 4},
    ),
    "long keys": (
        ValueError,
        "`cu_seqlens_k` must have sequences of at most `max_seqlen_k` = 6 rows, got 7",
        {"max_seqlen_k": 6},
    ),
    "negative maximum": (
        ValueError,
        "`max_seqlen_q` must be from 0 to 1073741823, got -1",
        {"max_seqlen_q": -1},
    ),
    "huge maximum": (
        ValueError,
        "`max_seqlen_k` must be from 0 to 1073741823, got 9223372036854775807",
        {"max_seqlen_k": 2**70},
    ),
    "maximum text": (
        TypeError,
        "`max_seqlen_q` must be an int, got '5'",
        {"max_seqlen_q": "5"},
    ),
    "fractional maximum": (
        TypeError,
        "`max_seqlen_k` must be an int, got 7.0",
        {"max_seqlen_k": 7.0},
    ),
    "used shape": (
        ValueError,
        r"`seqused_q` must have shape \(2,\), got \(3,\)",
        {"seqused_q": a(3, dtype=I32)},
    ),
    "used dtype": (
        TypeError,
        "`seqused_k` must be int32, got float32",
        {"seqused_k": a(2)},
    ),
    "mask shape": (
        ValueError,
        r"`mask` must broadcast to \(2, 4, 5, 7\), got \(9, 12\)",
        {"mask": a(9, 12)},
    ),
    "slopes of sequences": (
        ValueError,
        r"`alibi_slopes` must have shape \(2, 4\), got \(3, 4\)",
        {"alibi_slopes": a(3, 4)},
    ),
    "out shape": (
        ValueError,
        r"`out` must have shape \(9, 4, 8\), got \(4, 9, 8\)",
        {"out": a(4, 9, 8)},
    ),
    "out over the offsets": (
        ValueError,
        "`out` must not overlap `cu_seqlens_q` in memory",
        {
            "out": (shared := np.zeros((9, 4, 8), F32)),
            "cu_seqlens_q": shared.view(I32)[0, 0, :3],
        },
    ),
    "dropout": (ValueError, "`seed` must be an int or a one-element array", {"dropout_p": 0.1}),
    "softcap": (ValueError, "`softcap` must be finite", {"softcap": -1.0}),
}


@pytest.mark.parametrize("what", VARLEN_WRONG)
def test_varlen_sentence(what):
    exception, sentence, arguments = VARLEN_WRONG[what]
    out = np.full((9, 4, 8), 7, F32)
    arguments = {**VARLEN, "out": out, **arguments}
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    before = {name: sys.getrefcount(x) for name, x in arrays.items()}
    for _ in range(3):
        with pytest.raises(exception, match=sentence) as caught:
            fastattn.attention_varlen(**arguments)
        assert type(caught.value) is exception
        del caught
    assert (out == 7).all()
    assert {name: sys.getrefcount(x) for name, x in arrays.items()} == before


def test_varlen_that_is_right():
    """What VARLEN_WRONG starts from, and the ends of what it forbids."""
    for changes in (
        {},
        {"max_seqlen_q": np.int64(5), "max_seqlen_k": 2**30 - 1},
        {"cu_seqlens_k": offsets(0, 5, 12)},
        {"seqused_k": offsets(7, 0)},
        {"mask": a(2, 1, 5, 7, dtype=bool)},
        {"dropout_p": 0.5, "seed": -(2**63)},
        {"dropout_p": 0.5, "seed": 2**63 - 1},
    ):
        out = fastattn.attention_varlen(**{**VARLEN, **changes})
        assert out.shape == (9, 4, 8) and np.isfinite(out).all()
