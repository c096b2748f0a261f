"""What sparsek_attention says of bad input: the argument, the rule and what came."""

import fastattn
import numpy as np
import pytest

F32 = np.float32
Q, K = np.ones((2, 4, 9, 8), F32), np.ones((2, 2, 20, 8), F32)
SCORES = np.ones((2, 2, 20), F32)
GIVEN = {"q": Q, "k": K, "v": K, "scores": SCORES, "k_keep": 3, "window": 2}
WINDOW = "`window` must be an int of at least 0, how many keys up to the query's own are seen"

WRONG = [
    ({"scores": None}, TypeError, "`scores` must be an array"),
    ({"scores": SCORES[0]}, ValueError, "`scores` must have 3 dimensions (b, hk, sk), got 2"),
    (
        {"scores": np.ones((2, 4, 20), F32)},
        ValueError,
        "`scores` must have shape (2, 2, 20), got (2, 4, 20)",
    ),
    (
        {"scores": SCORES.astype(np.float64)},
        TypeError,
        "`scores` must be float32 like `q`, got float64",
    ),
    ({"scores": SCORES.astype(np.int32)}, TypeError, "`scores` must be"),
    ({"k_keep": np.inf}, ValueError, "`k_keep` must be finite, got inf"),
    ({"k_keep": "3"}, TypeError, "`k_keep` must be a float, got '3'"),
    ({"window": -1}, ValueError, "`window` must be at least 0, got -1"),
    ({"window": (3, 0)}, TypeError, f"{WINDOW}, got (3, 0)"),
    ({"window": None}, TypeError, f"{WINDOW}, got None"),
    ({"key_gate": 1}, TypeError, "`key_gate` must be True or False, got 1"),
    ({"keep_all": None}, TypeError, "`keep_all` must be True or False, got None"),
    ({"v": np.ones((2, 4, 20, 8), F32)}, ValueError, "`v` must have hk = 2 like `k`, got 4"),
    ({"sink": np.ones(2, F32)}, ValueError, "`sink` must have shape (4,), got (2,)"),
    ({"out": np.ones((2, 4, 9, 9), F32)}, ValueError, "`out` must have shape (2, 4, 9, 8)"),
    ({"out": Q}, ValueError, "`out` must not overlap `q` in memory"),
    ({"k_lengths": np.int32([21, 3])}, ValueError, "`k_lengths` must be at most the 20 keys"),
    (
        {"backend": "sm80"},
        NotImplementedError,
        "no backend takes this call: sm90: backend="
        if "sm80" in fastattn.info()["backends"]
        else "backend sm80 is not built into this module",
    ),
    ({"causal": True}, TypeError, "sparsek_attention() got an unexpected keyword argument"),
]


@pytest.mark.parametrize(("change", "exception", "sentence"), WRONG)
def test_sentences(change, exception, sentence):
    with pytest.raises(exception) as raised:
        fastattn.sparsek_attention(**{**GIVEN, **change})
    assert str(raised.value).startswith(sentence)


def test_dtypes_of_scores():
    half = {n: x.astype(np.float16) if n in "qkv" else x for n, x in GIVEN.items()}
    for scores in (SCORES, SCORES.astype(np.float16)):
        fastattn.sparsek_attention(**{**half, "scores": scores})
    with pytest.raises(
        TypeError, match="`scores` must be float32 or of the dtype of `q`, got float64"
    ):
        fastattn.sparsek_attention(**{**half, "scores": SCORES.astype(np.float64)})
    wide = {n: x.astype(np.float64) if n in "qkv" else x for n, x in GIVEN.items()}
    with pytest.raises(TypeError, match="`scores` must be float64 like `q`, got float32"):
        fastattn.sparsek_attention(**wide)


def test_window_is_required():
    del (given := dict(GIVEN))["window"]
    with pytest.raises(TypeError, match="missing required argument 'window'"):
        fastattn.sparsek_attention(**given)


def test_packed_sentences():
    x, cu = np.ones((90, 2, 8), F32), np.array([0, 70, 90], np.int32)
    given = {"q": x, "k": x, "v": x, "scores": np.ones((2, 90), F32), "k_keep": 3, "window": 2}
    given |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 70, "max_seqlen_k": 70}
    assert fastattn.sparsek_attention_varlen(**given).shape == (90, 2, 8)
    for change, sentence in (
        ({"scores": SCORES}, r"`scores` must have 2 dimensions \(hk, total_k\), got 3"),
        ({"scores": SCORES[0]}, r"`scores` must have shape \(2, 90\), got \(2, 20\)"),
        ({"max_seqlen_q": 60}, "must have sequences of at most `max_seqlen_q` = 60 rows, got 70"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fastattn.sparsek_attention_varlen(**{**given, **change})


def test_backward_sentences():
    out, lse, tau, ends = fastattn.sparsek_attention(
        **GIVEN, return_lse=True, return_selection=True
    )
    given = {**GIVEN, "dout": out, "out": out, "lse": lse, "tau": tau, "ends": ends}
    assert fastattn.sparsek_attention_backward(**given)[3].shape == SCORES.shape
    for change, exception, sentence in (
        ({"need_dsink": True}, ValueError, "`need_dsink` must be False without a sink, got True"),
        ({"dout": None}, ValueError, "`dout` must be an array where `dlse` is None, got None"),
        ({"tau": tau[:1]}, ValueError, r"`tau` must have shape \(2, 2, 9\), got \(1, 2, 9\)"),
        ({"ends": ends.astype(F32)}, TypeError, "`ends` must be int32, got float32"),
    ):
        with pytest.raises(exception, match=sentence):
            fastattn.sparsek_attention_backward(**{**given, **change})


def test_foreign_ends_reach_no_other_memory():
    """Numbers out of range are clamped: some result, no crash."""
    out, lse, tau, ends = fastattn.sparsek_attention(
        **GIVEN, return_lse=True, return_selection=True
    )
    for n in (-(2**31), 0, 2**31 - 1):
        fastattn.sparsek_attention_backward(
            out, Q, K, K, SCORES, 3, out, lse, tau, np.full_like(ends, n), window=2
        )


def test_nothing_is_written_by_a_call_that_raises():
    out = np.full_like(Q, 7)
    with pytest.raises(ValueError, match="at least 0"):
        fastattn.sparsek_attention(**{**GIVEN, "window": -1}, out=out)
    assert (out == 7).all()
