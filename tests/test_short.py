"""Short rows on the CPU: one key, none, and calls whose heads are drawn many at once."""

import fastattn
import numpy as np
import pytest

RNG = np.random.default_rng(3)


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("d, dv", [(0, 6), (1, 1), (7, 3), (64, 64), (40, 260)])
def test_one_key(dtype, d, dv):
    """The output is the value, bit for bit; lse is the score."""
    q, k, v = normal(3, 4, 5, d, dtype=dtype), normal(3, 2, 1, d, dtype=dtype), normal(3, 2, 1, dv)
    v = v.astype(dtype)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    k, v = np.repeat(k, 2, 1), np.repeat(v, 2, 1)
    assert out.tobytes() == np.broadcast_to(v, out.shape).astype(dtype).tobytes()
    score = (q.astype(float) * k.astype(float)).sum(-1) * max(d, 1) ** -0.5
    assert np.abs(lse - score).max() <= 1e-5


def test_one_key_in_strides():
    """Every axis in another order, rows and columns apart."""
    q, k, v = (np.moveaxis(normal(9, s, 4, 2), (0, 1, 2, 3), (3, 2, 1, 0)) for s in (5, 1, 1))
    out = np.empty((2, 4, 5, 18), np.float32)[..., ::2]
    assert (fastattn.attention(q, k, v, out=out) == v).all()


@pytest.mark.parametrize("wrong, value, lse", [(np.nan,) * 3, (np.inf, np.nan, np.nan)])
def test_one_key_that_is_no_number(wrong, value, lse):
    q, k = np.ones((1, 1, 2, 8), np.float32), np.ones((1, 1, 1, 8), np.float32)
    v = normal(1, 1, 1, 8)
    q[0, 0, 1, 3] = wrong
    out, got = fastattn.attention(q, k, v, return_lse=True)
    assert (out[0, 0, 0] == v[0, 0, 0]).all()
    np.testing.assert_equal(out[0, 0, 1], np.full(8, value, np.float32))
    np.testing.assert_equal(got[0, 0, 1], np.float32(lse))


def test_one_key_whose_score_is_minus_infinity():
    q, k = np.ones((1, 1, 1, 8), np.float32), np.ones((1, 1, 1, 8), np.float32)
    v = normal(1, 1, 1, 8)
    k[..., 2] = -np.inf
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert not out.any() and lse == -np.inf


SOME_ROWS_SEE_IT = [
    (1, {"causal": True, "q_offset": -50}),
    (1, {"window": (40, None), "q_offset": 0}),
    (9, {"causal": True, "k_start": np.array([8], np.int32)}),
]


@pytest.mark.parametrize("sk, options", SOME_ROWS_SEE_IT)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_a_key_that_some_rows_see_has_the_same_bits_however_rows_are_shared_out(sk, options, dtype):
    """The number of threads, and of sequences, decides which rows are computed together."""
    q, k, v = (normal(1, 8, s, 200, dtype=dtype) for s in (600, sk, sk))
    before, seen = fastattn.get_num_threads(), set()
    for threads, b in ((1, 1), (8, 1), (64, 1), (1, 3), (8, 3)):
        fastattn.set_num_threads(threads)
        mine = {n: np.tile(x, b) if isinstance(x, np.ndarray) else x for n, x in options.items()}
        arrays = (np.tile(x, (b, 1, 1, 1)) for x in (q, k, v))
        results = fastattn.attention(*arrays, **mine, return_lse=True, batch_invariant=True)
        seen |= {tuple(x[i].tobytes() for x in results) for i in range(b)}
    fastattn.set_num_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize("sink", [None, np.arange(6, dtype=np.float32) - 3])
@pytest.mark.parametrize("shape", [(3, 6, 1), (1, 6, 300), (0, 6, 4)])
def test_no_key(shape, sink):
    q = normal(*shape, 16)
    none = q[:, :, :0]
    dirty = np.full((*shape, 32), np.nan, np.float32)[..., ::2]
    out, lse = fastattn.attention(q, none, none, sink=sink, return_lse=True, out=dirty)
    assert not out.any()
    want = -np.inf if sink is None else sink[None, :, None]
    assert (lse == np.broadcast_to(want, shape)).all()


@pytest.mark.parametrize("b, h", [(1, 1), (1, 129), (37, 7)])
@pytest.mark.parametrize("sq, sk", [(1, 1), (3, 2), (24, 5), (25, 65), (121, 129)])
def test_every_head_and_row_is_drawn_once(b, h, sq, sk):
    """Whatever is drawn at once, at any number of heads and rows."""
    q, k, v = normal(b, h, sq, 8), normal(b, h, sk, 8), normal(b, h, sk, 8)
    out = np.full_like(q, np.nan)
    fastattn.attention(q, k, v, out=out, causal=True)
    s = q.astype(float) @ k.astype(float).swapaxes(-1, -2) / 8**0.5
    hidden = np.arange(sk) > np.arange(sq)[:, None] + sk - sq
    p = np.where(hidden, 0, np.exp(s))
    total = p.sum(-1, keepdims=True)
    want = np.where(total > 0, p / np.where(total > 0, total, 1), 0) @ v
    assert np.abs(out - want).max() <= 1e-5


def test_a_number_of_keys_that_fills_no_register_tile():
    """The last keys' scores are computed twice; each counts once."""
    for sk in range(1, 140):
        q, k, v = normal(1, 1, 30, 8), normal(1, 1, sk, 8), normal(1, 1, sk, 8)
        s = q.astype(float) @ k.astype(float).swapaxes(-1, -2) / 8**0.5
        p = np.exp(s)
        assert np.abs(fastattn.attention(q, k, v) - p @ v / p.sum(-1, keepdims=True)).max() <= 1e-5
