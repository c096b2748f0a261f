"""Dropout: known answers of its generator, its statistics, and one pattern for every backend."""

from dataclasses import replace

import cases
import fastattn
import numpy as np
import pytest
import reference
from cases import DTYPES, Case
from conftest import needs
from declared import served
from test_mask_h import COMPILERS, compiled

DRIVER = r"""
#include <stdio.h>
#include "philox.h"
/* in: counter, key; out: the words. Or threshold, seed (2), b h i, sk; out: sk times keep. */
int main(void) {
    uint32_t in[7];
    while (fread(in, sizeof in, 1, stdin) == 1) {
        if (in[6] == UINT32_MAX) {
            fa_random x = {{in[0], in[1], in[2], in[3]}};
            fa_philox(&x, 1, in[4], in[5]);
            fwrite(&x, sizeof x, 1, stdout);
            continue;
        }
        int64_t seed = (int64_t)((uint64_t)in[2] << 32 | in[1]);
        fa_dropout d = {0.5, 2, in[0], 0, 0, seed};
        int32_t b = (int32_t)in[3], h = (int32_t)in[4], i = (int32_t)in[5];
        for (int32_t j = 0; j < (int32_t)in[6]; j++) {
            fa_random bits = fa_dropout_bits(fa_dropout_seed(&d), b, h, i, j / 8);
            int32_t keep = fa_dropout_keeps(d.threshold, bits, j);
            fwrite(&keep, sizeof keep, 1, stdout);
        }
    }
    return 0;
}
"""
# philox4x32 with 7 rounds in Random123's kat_vectors: counter, key, words
KNOWN = (
    "00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a",
)
KNOWN = np.array([[int(word, 16) for word in line.split()] for line in KNOWN])
CASE = Case(b=3, hq=4, hk=2, sq=50, sk=75, d=24, dv=24, dropout=0.4, seed=11)


def kept(place, case, **changes):
    """The pattern that a backend applied: all probabilities are equal, V is the identity."""
    framework, backend = place
    rng = np.random.default_rng(0)
    keys = np.zeros((case.b, case.hk, case.sk, case.d), cases.dtype_of(case.dtype))
    values = np.zeros((case.b, case.hk, case.sk, case.sk), keys.dtype)
    values[..., range(case.sk), range(case.sk)] = 1
    given = [np.zeros((case.b, case.hq, case.sq, case.d), keys.dtype), keys, values]
    given = [framework.array(cases.store(x, "plain", rng)) for x in given]
    keywords = {"dropout_p": case.dropout, "seed": case.dropout_seed, "backend": backend, **changes}
    with served(backend, dtype=case.dtype):
        out, lse = fastattn.attention(*given, **keywords, return_lse=True)
    assert np.allclose(framework.numpy(lse), np.log(case.sk), atol=1e-4)  # as without dropout
    return framework.numpy(out).astype(np.float64)


# ---------------------------------------------------------------------------------- the generator


@pytest.mark.parametrize("which", COMPILERS)
def test_philox_gives_the_known_answers(which, tmp_path):
    questions = [[*line[:6], 2**32 - 1] for line in KNOWN.tolist()]
    got = compiled(DRIVER, which, tmp_path)(np.array(questions, np.uint32).view(np.int32))
    assert (got.view(np.uint32).reshape(-1, 4) == KNOWN[:, 6:]).all()
    for line in KNOWN:
        assert (reference.philox(line[:4], [int(x) for x in line[4:6]]) == line[6:]).all()


@pytest.mark.parametrize("which", COMPILERS)
def test_the_header_keeps_what_the_reference_keeps(which, tmp_path):
    ask = compiled(DRIVER, which, tmp_path)
    for dropout_p, seed in ((0.1, 5), (0.5, -1), (0.9, -(2**63)), (1.0, 2**63 - 1), (1e-7, 1)):
        threshold = round(dropout_p * 65536)
        for b, h, i in ((0, 0, 0), (2, 1, 3), (1, 4, 30)):
            words = [threshold, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, b, h, i, 77]
            got = ask(np.array(words, np.uint32).view(np.int32))
            want = reference.kept(b + 1, h + 1, i + 1, 77, dropout_p, seed)[b, h, i]
            assert (got == want).all()


# ------------------------------------------------------------------------------------ the pattern


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.93])
def test_the_pattern_is_the_references(dropout, dtype, place):
    case = replace(CASE, dtype=dtype, dropout=dropout)
    got = kept(place, case)
    want = reference.kept(case.b, case.hq, case.sq, case.sk, dropout, case.dropout_seed)
    assert ((got != 0) == want).all()
    unit = float(reference.finfo(cases.dtype_of(dtype)).eps)
    assert np.allclose(got[want], 1 / (case.sk * (1 - dropout)), rtol=4 * max(unit, 1e-15))


def test_the_rate_and_the_mean(place):
    """Within 5 standard deviations: of the share kept, of each row's sum, of neighbours' pairs."""
    for dropout in (0.1, 0.5, 0.8):
        case = Case(b=4, hq=8, hk=8, sq=200, sk=250, dropout=dropout, seed=3)
        weights = kept(place, case) * case.sk  # 0 or 1 / (1 - dropout): 1 in the mean
        n, deviation = weights.size, (dropout / (1 - dropout)) ** 0.5
        assert abs(weights.mean() - 1) < 5 * deviation / n**0.5
        keeps = weights != 0
        assert abs(keeps.mean() - (1 - dropout)) < 5 * (dropout * (1 - dropout) / n) ** 0.5 + 2**-17
        for axis in range(4):
            ahead = np.delete(weights - 1, 0, axis)
            behind = np.delete(weights - 1, -1, axis)
            assert abs((ahead * behind).mean()) < 5 * deviation**2 / ahead.size**0.5, axis
        means = weights.mean(axis=3)  # of rows; independent, so as wide as a mean of sk is
        assert 0.9 < means.std() * case.sk**0.5 / deviation < 1.1


def test_every_part_of_the_seed_and_of_the_place_counts(place):
    first = kept(place, CASE) != 0
    assert (first == (kept(place, CASE) != 0)).all()
    for bit in (0, 31, 32, 63):
        other = kept(place, CASE, seed=CASE.dropout_seed ^ (-(2**63) if bit == 63 else 1 << bit))
        assert 0.4 < ((other != 0) == first).mean() < 0.65  # 0.52 for independent ones
    part = kept(place, replace(CASE, b=2, hq=2, hk=1, sq=21, sk=33), seed=CASE.dropout_seed)
    assert ((part != 0) == first[:2, :2, :21, :33]).all()


def test_the_seed_as_an_int_and_as_an_array(place):
    framework, _ = place
    want = kept(place, CASE)
    for shape in ((), (1,)):
        seed = cases.store(np.full(shape, CASE.dropout_seed), "plain", None)
        assert (kept(place, CASE, seed=framework.array(seed)) == want).all()
    assert (kept(place, CASE, seed=np.int64(CASE.dropout_seed)) == want).all()


def test_dropout_of_everything_and_of_nothing(place):
    """1.0 gives zeros, also of an infinite value; 0 is no dropout, and no seed is looked at."""
    framework, backend = place
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 9, 16)).astype(np.float16) for _ in range(3))
    v[0, 0, 3, 5] = np.inf
    given = [framework.array(cases.store(x, "plain", rng)) for x in (q, k, v)]
    keywords = {"return_lse": True, "backend": backend}
    with served(backend, dtype="float16"):
        plain, lse = (framework.numpy(x) for x in fastattn.attention(*given, **keywords))
        none = fastattn.attention(*given, **keywords, dropout_p=0.0, seed="not looked at")
        out, all_lse = fastattn.attention(*given, **keywords, dropout_p=1.0, seed=0)
    assert framework.numpy(none[0]).tobytes() == plain.tobytes()
    assert (framework.numpy(out) == 0).all() and (framework.numpy(all_lse) == lse).all()


@needs("torch")
def test_all_leading_dimensions_count():
    """The sequences of scaled_dot_product_attention are numbered in the order of its dimensions."""
    import torch

    q, k, v = (torch.randn(2, 3, 2, 4, 20, 8) for _ in range(3))
    v = v.transpose(0, 1).contiguous().transpose(0, 1)  # no single stride walks the three
    torch.manual_seed(5)
    out = fastattn.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(5)
    folded = [x.reshape(12, 4, 20, 8) for x in (q, k, v)]
    assert torch.equal(out.flatten(0, 2), fastattn.attention(*folded, dropout_p=0.5))


# -------------------------------------------------------------------------------- torch's generator


@needs("torch")
def test_without_a_seed_torchs_generator_is_asked():
    import torch

    x = torch.randn(1, 2, 64, 16)
    cu = torch.tensor([0, 64], dtype=torch.int32)
    flat = [x[0].transpose(0, 1)] * 3

    def varlen(**keywords):
        return fastattn.attention_varlen(*flat, cu, cu, 64, 64, **keywords).transpose(0, 1)[None]

    calls = (
        lambda: fastattn.attention(x, x, x, dropout_p=0.5),
        lambda: fastattn.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        lambda: varlen(dropout_p=0.5),
    )
    results = []
    for call in calls:
        torch.manual_seed(7)
        seed = torch.empty((), dtype=torch.int64).random_()
        torch.manual_seed(7)
        first, second = call(), call()
        assert not torch.equal(first, second)
        assert torch.equal(first, fastattn.attention(x, x, x, dropout_p=0.5, seed=seed))
        results.append(first)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs("torch")
def test_the_generator_is_left_alone_where_nothing_is_dropped():
    import torch

    x = torch.randn(1, 2, 6, 16)
    before = torch.get_rng_state()
    fastattn.attention(x, x, x)
    fastattn.attention(x, x, x, dropout_p=0.5, seed=1)
    fastattn.explain(fastattn.attention, x, x, x, dropout_p=0.5)
    for wrong in ({"softcap": -1.0}, {"backend": "sm80"}):
        with pytest.raises((ValueError, NotImplementedError)):
            fastattn.attention(x, x, x, dropout_p=0.5, **wrong)
    assert torch.equal(torch.get_rng_state(), before)
