"""What sparsek and sparsek_lists refuse, and by which sentence."""

import fastattn
import numpy as np
import pytest
from conftest import needs
from handmade import ones

Z = np.ones((2, 3, 9), np.float32)
INT = np.zeros(2, np.int32)

WRONG = [
    (lambda: fastattn.sparsek([1.0], 2), TypeError, "`scores` must be an array"),
    (lambda: fastattn.sparsek(Z.astype(int), 2), TypeError, "`scores` must be float64, float32"),
    (lambda: fastattn.sparsek(Z[0, 0, 0], 2), TypeError, "`scores` must be an array"),
    (
        lambda: fastattn.sparsek(np.array(1.0), 2),
        ValueError,
        r"`scores` must have at least 1 dimension \(..., m\), got 0",
    ),
    (lambda: fastattn.sparsek(Z, "2"), TypeError, "`k` must be a float, got '2'"),
    (lambda: fastattn.sparsek(Z, None), TypeError, "`k` must be a float, got None"),
    (lambda: fastattn.sparsek(Z, [2]), TypeError, r"`k` must be a float, got \[2\]"),
    (lambda: fastattn.sparsek(Z, float("nan")), ValueError, "`k` must be finite, got nan"),
    (lambda: fastattn.sparsek(Z, -float("inf")), ValueError, "`k` must be finite, got -inf"),
    (lambda: fastattn.sparsek(Z, 10**400), ValueError, "`k` must fit a float"),
    (lambda: fastattn.sparsek(Z), TypeError, "missing 1 required positional argument: 'k'"),
    (lambda: fastattn.sparsek(Z, 2, lengths=3), TypeError, "`lengths` must be an array"),
    (
        lambda: fastattn.sparsek(Z, 2, lengths=np.zeros(3)),
        TypeError,
        "`lengths` must be int32, got float64",
    ),
    (
        lambda: fastattn.sparsek(Z, 2, lengths=np.zeros(3, np.int64)),
        TypeError,
        r"`lengths` must be int32, got int64: pass lengths.astype\(\"int32\"\)",
    ),
    (
        lambda: fastattn.sparsek(Z, 2, lengths=INT),
        ValueError,
        r"`lengths` must broadcast to \(2, 3\), got \(2,\)",
    ),
    (
        lambda: fastattn.sparsek(Z[0, 0], 2, lengths=INT),
        ValueError,
        r"`lengths` must broadcast to \(\), got \(2,\)",
    ),
    (
        lambda: fastattn.sparsek(Z, 2, lengths=np.full(3, 10, np.int32)),
        ValueError,
        "`lengths` must be from 0 to m = 9, got 10",
    ),
    (
        lambda: fastattn.sparsek(Z, 2, lengths=np.full((2, 1), -1, np.int32)),
        ValueError,
        "`lengths` must be from 0 to m = 9, got -1",
    ),
    (
        lambda: fastattn.sparsek_lists(Z[0], 2, sq=3),
        ValueError,
        r"`scores` must have 3 dimensions \(b, hk, sk\), got 2",
    ),
    (lambda: fastattn.sparsek_lists(Z, 2), TypeError, "required keyword-only argument: 'sq'"),
    (lambda: fastattn.sparsek_lists(Z, 2, sq=None), TypeError, "`sq` must be an int, got None"),
    (lambda: fastattn.sparsek_lists(Z, 2, sq=3.0), TypeError, "`sq` must be an int, got 3.0"),
    (lambda: fastattn.sparsek_lists(Z, 2, sq=-1), ValueError, "`sq` must be from 0 to .*, got -1"),
    (lambda: fastattn.sparsek_lists(Z, 2, sq=2**70), ValueError, "`sq` must be from 0 to"),
    (
        lambda: fastattn.sparsek_lists(Z, 2, sq=3, window=-1),
        ValueError,
        "`window` must be at least 0, got -1",
    ),
    (
        lambda: fastattn.sparsek_lists(Z, 2, sq=3, window=(4, 0)),
        TypeError,
        r"`window` must be an int of at least 0, got \(4, 0\)",
    ),
    (lambda: fastattn.sparsek_lists(Z, 2, sq=3, window=None), TypeError, "`window` must be an int"),
    (lambda: fastattn.sparsek_lists(Z, float("nan"), sq=3), ValueError, "`k` must be finite"),
    (
        lambda: fastattn.sparsek_lists(Z, 1e10, sq=3),
        ValueError,
        r"`k` must be at most .*, got 1e\+10",
    ),
    (lambda: fastattn.sparsek_lists(Z, 2**29, sq=2**29), ValueError, "`k` = .* more entries than"),
    (
        lambda: fastattn.sparsek_lists(Z, 2, sq=3, q_offset=1.5),
        TypeError,
        r"`q_offset` must be an int or an int32 array \(b,\), got 1.5",
    ),
    (
        lambda: fastattn.sparsek_lists(Z, 2, sq=3, q_offset=np.zeros(3, np.int32)),
        ValueError,
        r"`q_offset` must have shape \(2,\), got \(3,\)",
    ),
    (
        lambda: fastattn.sparsek_lists(Z, 2, sq=3, q_lengths=INT + 4),
        ValueError,
        "`q_lengths` must be at most the 3 queries of sequence 0, got 4",
    ),
    (
        lambda: fastattn.sparsek_lists(Z, 2, sq=3, k_lengths=INT - 1),
        ValueError,
        "`k_lengths` must be at least 0, got -1 for sequence 0",
    ),
    (
        lambda: fastattn.sparsek_lists(Z, 2, sq=3, k_start=INT.astype(float)),
        TypeError,
        "`k_start` must be int32, got float64",
    ),
]


@pytest.mark.parametrize("n", range(len(WRONG)))
def test_sentences(n):
    call, exception, sentence = WRONG[n]
    with pytest.raises(exception, match=sentence) as caught:
        call()
    assert caught.type is exception


def test_a_gpu_is_refused_by_a_sentence():
    on_gpu = ones(2, 3, 9, dtype=np.float32, device=(2, 99))
    for call in (
        lambda: fastattn.sparsek(on_gpu, 2),
        lambda: fastattn.sparsek_lists(on_gpu, 2, sq=3),
    ):
        with pytest.raises(NotImplementedError, match=r"no backend takes this call: .*cpu: the ar"):
            call()
    lengths = ones(3, dtype=np.int32, device=(2, 99))
    with pytest.raises(ValueError, match="`lengths` must be on cpu like `scores`, got cuda:99"):
        fastattn.sparsek(Z, 2, lengths=lengths)


@needs("torch")
def test_tensors_that_require_grad():
    import torch

    z = torch.ones(2, 3, 9, requires_grad=True)
    with pytest.raises(ValueError, match="`sq` must be from 0"):
        fastattn.sparsek_lists(z, 2, sq=-1)
    with pytest.raises(TypeError, match="`k` must be a float, got a torch tensor that requires"):
        fastattn.sparsek(z, torch.tensor(2.0, requires_grad=True))
    assert fastattn.sparsek(z, torch.tensor(2.0))[0].requires_grad
    with pytest.raises(
        TypeError, match=r"`lengths` must be int32, got int64: pass lengths.int\(\)"
    ):
        fastattn.sparsek(z, 2, lengths=torch.ones(3, dtype=torch.int64))


def test_numbers_that_are_taken():
    for k in (2, np.float32(2), np.int64(2), True + 1, 2.0):
        assert fastattn.sparsek(Z, k)[0].sum() == pytest.approx(2 * 6)
    lists, _, _ = fastattn.sparsek_lists(Z, 2, sq=np.int64(3), window=np.int32(1), q_offset=10**30)
    assert (lists == [0, 1]).all()
