"""What attention_sparse says of bad input: the argument, the rule and what came."""

import fastattn
import numpy as np
import pytest

F32 = np.float32
Q, K = np.ones((2, 4, 130, 8), F32), np.ones((2, 2, 200, 8), F32)
LISTS = np.zeros((2, 2, 3, 5), np.int32)
GIVEN = {"q": Q, "k": K, "v": K, "key_lists": LISTS, "q_block": 64, "k_block": 64}
REPEATED = LISTS.copy()
REPEATED[...] = [0, 1, 2, -1, 1]
OUTSIDE = np.full_like(LISTS, -1)
OUTSIDE[1, 1, 2, 3] = 4


def lists(*shape, dtype=np.int32):
    return np.zeros(shape, dtype)


WRONG = [
    ({"q_block": 32}, ValueError, "`q_block` must be 1, 64 or 128, got 32"),
    ({"k_block": 0}, ValueError, "`k_block` must be 1, 16, 32, 64 or 128, got 0"),
    ({"k_block": 2.5}, TypeError, "`k_block` must be an int, got 2.5"),
    ({"key_lists": None}, TypeError, "`key_lists` must be an array"),
    (
        {"key_lists": LISTS.astype(np.int64)},
        TypeError,
        '`key_lists` must be int32, got int64: pass key_lists.astype("int32")',
    ),
    ({"key_lists": LISTS.astype(F32)}, TypeError, "`key_lists` must be int32, got float32"),
    (
        {"key_lists": LISTS[0]},
        ValueError,
        "`key_lists` must have 4 dimensions (b or 1, hk or 1, q blocks, L), got 3",
    ),
    ({"key_lists": lists(3, 2, 3, 5)}, ValueError, "`key_lists` must have b = 2 or 1, got 3"),
    ({"key_lists": lists(2, 4, 3, 5)}, ValueError, "`key_lists` must have hk = 2 or 1, got 4"),
    (
        {"key_lists": lists(2, 2, 4, 5)},
        ValueError,
        "`key_lists` must have 3 blocks of q_block = 64 queries, got 4",
    ),
    ({"counts": lists(2, 2, 3, dtype=np.int64)}, TypeError, "`counts` must be int32, got int64"),
    (
        {"counts": lists(2, 2, 3, 1)},
        ValueError,
        "`counts` must have 3 dimensions (b or 1, hk or 1, q blocks), got 4",
    ),
    ({"counts": lists(2, 2, 2)}, ValueError, "`counts` must have 3 blocks of q_block = 64"),
    ({"gate": LISTS}, TypeError, "`gate` must be float32, got int32"),
    ({"gate": LISTS.astype(np.float64)}, TypeError, "`gate` must be float32, got float64"),
    ({"gate": lists(2, 2, 3, 4, dtype=F32)}, ValueError, "`gate` must have L = 5 like `key_lists`"),
    ({"key_gate": 1}, TypeError, "`key_gate` must be True or False, got 1"),
    ({"window_union": 3}, TypeError, "`window_union` must be None or (left, right), got 3"),
    ({"window_union": (1.5, 0)}, TypeError, "`window_union` must hold two ints or None"),
    (
        {"window_union": (-1, -1)},
        ValueError,
        "`window_union` (-1, -1) sees no key; unbounded is None",
    ),
    (
        {"key_lists": REPEATED, "validate": True},
        ValueError,
        "`key_lists` must not name a block of keys twice, got 1 again for block 0 of queries",
    ),
    (
        {"key_lists": OUTSIDE, "validate": True},
        ValueError,
        "`key_lists` must hold -1, or blocks of keys from 0 to 3, got 4 for block 2 of queries",
    ),
    (
        {"key_lists": OUTSIDE * 0 - 1, "counts": lists(1, 1, 3) + 6, "validate": True},
        ValueError,
        "`counts` must be from 0 to L = 5, got 6 for block 0 of queries",
    ),
    ({"window": (-1, -1)}, ValueError, "`window` (-1, -1) sees no key; unbounded is None"),
    ({"sink": np.ones(2, F32)}, ValueError, "`sink` must have shape (4,), got (2,)"),
    ({"out": np.ones((2, 4, 130, 9), F32)}, ValueError, "`out` must have shape (2, 4, 130, 8)"),
    ({"out": Q}, ValueError, "`out` must not overlap `q` in memory"),
]


@pytest.mark.parametrize(("change", "exception", "sentence"), WRONG)
def test_sentences(change, exception, sentence):
    with pytest.raises(exception) as raised:
        fastattn.attention_sparse(**{**GIVEN, **change})
    assert str(raised.value).startswith(sentence)


def test_what_is_valid_is_validated():
    fine = np.full_like(LISTS, -1)
    fine[..., 1:4] = [3, 0, 2]
    want = fastattn.attention_sparse(**{**GIVEN, "key_lists": fine})
    got = fastattn.attention_sparse(**{**GIVEN, "key_lists": fine, "validate": True})
    np.testing.assert_array_equal(got, want)


def test_a_block_past_a_sequences_own_length_is_outside():
    given = {**GIVEN, "key_lists": np.full_like(LISTS, 3), "counts": lists(1, 1, 3) + 1}
    fastattn.attention_sparse(**given, validate=True)
    shorter = np.array([200, 192], np.int32)
    with pytest.raises(ValueError, match="from 0 to 2, got 3 for block 0 of queries"):
        fastattn.attention_sparse(**given, validate=True, k_lengths=shorter)


def packed(**change):
    x, cu = np.ones((90, 2, 8), F32), np.array([0, 70, 90], np.int32)
    given = {"q": x, "k": x, "v": x, "key_lists": lists(2, 3, 4), "q_block": 64}
    given |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 70, "max_seqlen_k": 70}
    return fastattn.attention_sparse_varlen(**{**given, **change})


def test_packed_sentences():
    assert packed().shape == (90, 2, 8)
    for change, sentence in (
        ({"key_lists": lists(2, 2, 4)}, "must have at least 3 blocks of q_block = 64 queries"),
        ({"key_lists": lists(1, 2, 3, 4)}, r"must have 3 dimensions \(hk or 1, q blocks, L\)"),
        ({"max_seqlen_q": 60}, "must have sequences of at most `max_seqlen_q` = 60 rows, got 70"),
    ):
        with pytest.raises(ValueError, match=sentence):
            packed(**change)


def test_backward_sentences():
    out, lse = fastattn.attention_sparse(**GIVEN, return_lse=True)
    given = {**GIVEN, "dout": out, "out": out, "lse": lse}
    for change, sentence in (
        ({"need_dgate": True}, "`need_dgate` must be False without a gate, got True"),
        ({"need_dsink": True}, "`need_dsink` must be False without a sink, got True"),
        ({"dout": None}, "`dout` must be an array where `dlse` is None, got None"),
        ({"lse": lse[:1]}, r"`lse` must have shape \(2, 4, 130\), got \(1, 4, 130\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fastattn.attention_sparse_backward(**{**given, **change})


def test_nothing_is_written_by_a_call_that_raises():
    out = np.full_like(Q, 7)
    with pytest.raises(ValueError, match="twice"):
        fastattn.attention_sparse(**{**GIVEN, "key_lists": REPEATED, "validate": True}, out=out)
    assert (out == 7).all()
