"""What attention_kvcache refuses: the sentence, and that neither a cache nor out has changed."""

import re

import fastattn
import handmade
import numpy as np
import pytest
from conftest import needs

B, SQ, HQ, HK, D = 2, 1, 4, 2, 8


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def ints(*values, dtype=np.int32):
    return np.array(values, dtype)


def contiguous(**changes):
    given = {"q": ones(B, SQ, HQ, D), "k_cache": ones(B, 6, HK, D), "v_cache": ones(B, 6, HK, D)}
    given |= {"cache_seqlens": ints(3, 5), "k": ones(B, 1, HK, D), "v": ones(B, 1, HK, D)}
    return given | changes


def paged(**changes):
    given = {"k_cache": ones(7, 2, HK, D), "v_cache": ones(7, 2, HK, D)}
    given["page_table"] = ints([0, 4, -1], [3, 1, 6])
    return contiguous(**given | changes)


def entries(**changes):
    given = {"k_cache": ones(5, 6, HK, D), "v_cache": ones(5, 6, HK, D)}
    return contiguous(**given | changes)


def packed(**changes):
    given = {"q": ones(5, HQ, D), "out": ones(5, HQ, D), "cu_seqlens_q": ints(0, 2, 4)}
    return contiguous(**given | changes)


TABLE = ones(6, 4)
VALUES = [
    (contiguous(q=ones(B, HQ, D)), "`q` must have 4 dimensions (b, sq, hq, d), got 3"),
    (
        contiguous(k_cache=ones(6, HK, D)),
        "`k_cache` must have 4 dimensions (b_cache, s_max, hk, d), got 3",
    ),
    (
        paged(layout="bhsd", v_cache=ones(7, 2, D)),
        "`v_cache` must have 4 dimensions (num_pages, hk, page_size, d), got 3",
    ),
    (entries(), "`k_cache` must have b_cache = 2 like `q`, got 5"),
    (entries(v_cache=ones(4, 6, HK, D)), "`v_cache` must have b_cache = 5 like `k_cache`, got 4"),
    (paged(v_cache=ones(7, 3, HK, D)), "`v_cache` must have page_size = 2 like `k_cache`, got 3"),
    (
        paged(k_cache=ones(7, 0, HK, D), v_cache=ones(7, 0, HK, D)),
        "`k_cache` must have page_size from 1 to 1073741823, got 0",
    ),
    (contiguous(k_cache=ones(B, 6, HK, 16)), "`k_cache` must have d = 8 like `q`, got 16"),
    (
        contiguous(k_cache=ones(B, 6, 3, D), v_cache=ones(B, 6, 3, D), k=None, v=None),
        "`q` must have a number of heads that is a multiple of `k_cache`'s 3, got 4",
    ),
    (
        paged(cache_batch_idx=ints(0, 1)),
        "`cache_batch_idx` must be None with `page_table`, got both",
    ),
    (paged(page_table=ints(0, 1)), "`page_table` must have 2 dimensions (b, pages), got 1"),
    (paged(page_table=ints([0, 4])), "`page_table` must have b = 2 like `q`, got 1"),
    (entries(cache_batch_idx=ints(1)), "`cache_batch_idx` must have b = 2 like `q`, got 1"),
    (contiguous(v=None), "`k` and `v` must come together, got `k` alone"),
    (contiguous(k=ones(B, 1, HK, 9)), "`k` must have shape (2, 1, 2, 8), got (2, 1, 2, 9)"),
    (contiguous(v=ones(B, 2, HK, D)), "`v` must have shape (2, 1, 2, 8), got (2, 2, 2, 8)"),
    (
        contiguous(k=ones(B, 7, HK, D), v=ones(B, 7, HK, D)),
        "`k` must have s_new of at most the 6 keys of `k_cache`, got 7",
    ),
    (contiguous(cache_seqlens=ints(3)), "`cache_seqlens` must have shape (2,), got (1,)"),
    (
        contiguous(cache_seqlens=ints(3, 6)),
        "`cache_seqlens` must be from 0 to 5 (room for 6 keys, 1 of them new), got 6 for "
        "sequence 1",
    ),
    (
        contiguous(cache_seqlens=-1),
        "`cache_seqlens` must be from 0 to 5 (room for 6 keys, 1 of them new), got -1",
    ),
    (
        contiguous(cache_seqlens=2**70),
        "`cache_seqlens` must be from 0 to 5 (room for 6 keys, 1 of them new), got "
        "9223372036854775807",
    ),
    (
        contiguous(cache_leftpad=ints(0, 7)),
        "`cache_leftpad` must be at most the 6 keys of sequence 1, got 7",
    ),
    (
        paged(page_table=ints([0, 7, -1], [3, 1, 6])),
        "`page_table` must name pages from 0 to 6, got 7 for key 2 of sequence 0",
    ),
    (
        paged(page_table=ints([0, 4, -1], [-1, 1, 6])),
        "`page_table` must name pages from 0 to 6, got -1 for key 0 of sequence 1",
    ),
    (
        paged(page_table=ints([0, 4, 5], [-1, 1, 9]), window=(0, None)),
        "`page_table` must name pages from 0 to 6, got 9 for key 4 of sequence 1",
    ),
    (
        paged(page_table=ints([0, 6, -1], [3, 1, 6])),
        "`page_table` must give new keys pages of their own, got 6 for two sequences, or twice",
    ),
    (
        entries(cache_batch_idx=ints(4, 5)),
        "`cache_batch_idx` must name entries from 0 to 4, got 5 for key 0 of sequence 1",
    ),
    (
        entries(cache_batch_idx=ints(2, 2)),
        "`cache_batch_idx` must give new keys entries of their own, got 2 for two sequences, or "
        "twice",
    ),
    (
        contiguous(rotary_cos=TABLE),
        "`rotary_cos` and `rotary_sin` must come together, got `rotary_cos` alone",
    ),
    (
        contiguous(rotary_cos=TABLE, rotary_sin=TABLE, k=None, v=None),
        "`rotary_cos` must be None without new `k`, got an array",
    ),
    (
        contiguous(rotary_cos=ones(6, 5), rotary_sin=ones(6, 5)),
        "`rotary_cos` must have rotary_dim / 2 from 0 to 4, got 5",
    ),
    (
        contiguous(rotary_cos=TABLE, rotary_sin=ones(6, 3)),
        "`rotary_sin` must have shape (6, 4), got (6, 3)",
    ),
    (
        contiguous(rotary_cos=ones(5, 4), rotary_sin=ones(5, 4)),
        "`rotary_cos` must have at least 6 rows, one for each position, got 5",
    ),
    (
        contiguous(rotary_cos=ones(5, 4), rotary_sin=ones(5, 4), causal=False)
        | {"cache_seqlens": 4, "k": ones(B, 2, HK, D), "v": ones(B, 2, HK, D)},
        "`rotary_cos` must have at least 6 rows, one for each position, got 5",
    ),
    (
        contiguous(rotary_cos=ones(4), rotary_sin=ones(4)),
        "`rotary_cos` must have 2 dimensions (s_max, rotary_dim / 2), got 1",
    ),
    (packed(q=ones(B, SQ, HQ, D)), "`q` must have 3 dimensions (total_q, hq, d), got 4"),
    (packed(cu_seqlens_q=ints([0, 2])), "`cu_seqlens_q` must have 1 dimensions (b + 1,), got 2"),
    (packed(cu_seqlens_q=ints()), "`cu_seqlens_q` must have b + 1 from 1 to 2147483647, got 0"),
    (packed(cu_seqlens_q=ints(0, 2)), "`k_cache` must have b_cache = 1 like `cu_seqlens_q`, got 2"),
    (packed(cu_seqlens_q=ints(1, 2, 3)), "`cu_seqlens_q` must start at 0, got 1"),
    (packed(cu_seqlens_q=ints(0, 2, 6)), "`cu_seqlens_q` must not run past `q`'s 5 rows, got 6"),
    (packed(cu_seqlens_q=ints(0, 2, 1)), "`cu_seqlens_q` must not decrease, got 1 after 2"),
    (
        packed(max_seqlen_q=1),
        "`cu_seqlens_q` must have sequences of at most `max_seqlen_q` = 1 rows, got 2",
    ),
    (packed(max_seqlen_q=-1), "`max_seqlen_q` must be from 0 to 1073741823, got -1"),
    (
        contiguous(max_seqlen_q=3),
        "`max_seqlen_q` must be None without `cu_seqlens_q`, got a number",
    ),
    (packed(out=ones(B, SQ, HQ, D)), "`out` must have shape (5, 4, 8), got (2, 1, 4, 8)"),
    (packed(k=ones(5, 1, HK, D), v=ones(5, 1, HK, D)), "`k` must have shape (2, 1, 2, 8), got (5,"),
    (
        packed(rotary_cos=ones(6, 4), rotary_sin=ones(6, 4)),
        "`rotary_cos` must have at least 7 rows, one for each position, got 6",
    ),
    (contiguous(num_splits=-2), "`num_splits` must be at least 0, got -2"),
    (contiguous(window=(-3, 2)), "`window` (-3, 2) sees no key; unbounded is None"),
    (contiguous(layout="shd"), "`layout` must be 'bhsd' or 'bshd', got 'shd'"),
    (contiguous(out=ones(B, SQ, HQ, 7)), "`out` must have shape (2, 1, 4, 8), got (2, 1, 4, 7)"),
]
TYPES = [
    (
        packed(cu_seqlens_q=ints(0, 2, 4, dtype=np.int64)),
        '`cu_seqlens_q` must be int32, got int64: pass cu_seqlens_q.astype("int32")',
    ),
    (
        contiguous(k_cache=ones(B, 6, HK, D, dtype=np.float64)),
        "`k_cache` must be float32 like `q`, got float64",
    ),
    (
        contiguous(k=ones(B, 1, HK, D, dtype=np.float16)),
        "`k` must be float32 like `q`, got float16",
    ),
    (
        paged(page_table=ints([0, 4, 2], [3, 1, 6], dtype=np.int64)),
        '`page_table` must be int32, got int64: pass page_table.astype("int32")',
    ),
    (
        contiguous(cache_seqlens=ints(1, 2, dtype=np.int64)),
        '`cache_seqlens` must be int32, got int64: pass cache_seqlens.astype("int32")',
    ),
    (
        contiguous(cache_seqlens=1.5),
        "`cache_seqlens` must be an int or an int32 array (b,), got 1.5",
    ),
    (
        contiguous(rotary_cos=ones(6, 4, dtype=np.float16), rotary_sin=TABLE),
        "`rotary_cos` must be float32 or of `q`'s dtype, got float16",
    ),
    (contiguous(rotary_interleaved=1), "`rotary_interleaved` must be True or False, got 1"),
    (contiguous(return_mass="yes"), "`return_mass` must be True or False, got 'yes'"),
]
LATER = [
    (contiguous(k_scale=ones(1)), "`k_scale` is not built yet"),
    (contiguous(v_scale=ones(1)), "`v_scale` is not built yet"),
    (contiguous(backend="sm90"), "sm90"),
]
ALL = [
    (error, *row)
    for error, rows in ((ValueError, VALUES), (TypeError, TYPES), (NotImplementedError, LATER))
    for row in rows
]


def refused(error, given, sentence):
    """Nothing is written, out included."""
    given = {"out": np.full((B, SQ, HQ, D), 7, np.float32)} | given
    written = [given[name] for name in ("k_cache", "v_cache", "out")]
    before = [x.tobytes() for x in written]
    with pytest.raises(error) as caught:
        fastattn.attention_kvcache(**given)
    assert sentence in str(caught.value)
    assert before == [x.tobytes() for x in written]


@pytest.mark.parametrize(("error", "given", "sentence"), ALL, ids=[row[2] for row in ALL])
def test_what_is_refused(error, given, sentence):
    refused(error, given, sentence)


def test_what_these_calls_were_changed_from_is_served():
    for given in (contiguous(), paged(), entries(cache_batch_idx=ints(4, 1))):
        assert fastattn.attention_kvcache(**given).shape == (B, SQ, HQ, D)
    assert fastattn.attention_kvcache(**packed()).shape == (5, HQ, D)


def test_pages_that_nothing_comes_to_are_not_looked_at():
    """Before a window, before the first key, past the last, and past what the last row sees."""
    table = ints([0, 99, -1], [3, 1, 99])
    unseen = {"page_table": table, "k": None, "v": None, "window": (None, -3)}
    assert (fastattn.attention_kvcache(**paged() | unseen) == [[[[0]]], [[[1]]]]).all()
    for options in ({"window": (1, None)}, {"cache_leftpad": ints(2, 4)}):
        table = ints([99, 4, -1], [-5, 2**31 - 1, 6])
        assert (fastattn.attention_kvcache(**paged() | {"page_table": table} | options) == 1).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "cache_seqlens", "page_table", "sink", "out"])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_cache_that_overlaps_what_is_read(name, cache):
    given = paged(sink=ones(HQ), out=ones(B, SQ, HQ, D))
    flat = given[cache].reshape(-1)
    inside = flat[: given[name].size].view(given[name].dtype)
    inside[:] = given[name].reshape(-1)
    given[name] = inside.reshape(given[name].shape)
    first, second = ("out", cache) if name == "out" else (cache, name)
    refused(ValueError, given, f"`{first}` must not overlap `{second}` in memory")


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_cache_that_cannot_be_written(cache):
    frozen = ones(B, 6, HK, D)
    frozen.flags.writeable = False
    refused(
        ValueError,
        contiguous(**{cache: frozen}),
        f"`{cache}` must be writeable, got a read-only array",
    )
    twice = np.lib.stride_tricks.as_strided(ones(6, HK, D), (B, 6, HK, D), (0, 64, 32, 4))
    refused(
        ValueError,
        contiguous(**{cache: twice}),
        f"`{cache}` must have distinct elements, got overlapping strides",
    )


@needs("torch")
def test_gradients_and_transforms_of_torch():
    import torch

    given = {n: torch.from_numpy(x) for n, x in contiguous().items()}
    for name in ("q", "k_cache", "v_cache", "k"):
        tracked = given | {name: given[name].clone().requires_grad_()}
        with pytest.raises(NotImplementedError, match=f"`{name}` requires grad"):
            fastattn.attention_kvcache(**tracked)
        with torch.no_grad():
            fastattn.attention_kvcache(**tracked)
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(NotImplementedError, match="takes plain tensors, none inside of"):
            transform(lambda q: fastattn.attention_kvcache(**given | {"q": q}))(given["q"][None])


@needs("jax")
def test_jax_arrays_are_read_but_not_written():
    import jax.numpy as jnp

    given = {n: jnp.asarray(x) for n, x in contiguous().items()}
    with pytest.raises(TypeError, match=r"`k_cache` must not be a JAX array"):
        fastattn.attention_kvcache(**given)
    given |= {"k": None, "v": None}
    assert (np.asarray(fastattn.attention_kvcache(**given)) == 1).all()


def test_arrays_on_a_gpu():
    """Every backend's reason is there, and no kernel has been asked."""
    given = {
        n: handmade.ones(*x.shape, dtype=x.dtype, device=(2, 0)) for n, x in contiguous().items()
    }
    with pytest.raises(NotImplementedError, match=re.escape("cpu: the arrays are on a GPU")):
        fastattn.attention_kvcache(**given)
