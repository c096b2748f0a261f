"""attention_kvcache of arrays that JAX traces: read, by the reference; written, by a sentence."""

import dataclasses

import fastattn
import kvcache_cases
import numpy as np
import pytest
from kvcache_cases import Case

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

READ = Case(seed=4, s_new=None, lengths="array")
PAGED = {"page_size": 16, "room": 48}
CASES = {
    "whole": {"sq": 3, "window": (9, 0)},
    "an int": {"lengths": "int", "layout": "bhsd", "softcap": 2.0, "scale": -0.4},
    "pages": {**PAGED, "alibi": 1, "sink": True, "hq": 6, "dv": 24, "leftpad": True},
    "pages of bhsd": {**PAGED, "layout": "bhsd", "page_size": 5, "room": 40, "dtype": "bfloat16"},
    "entries": {"batch_idx": True, "causal": "top-left", "dtype": "float16", "sq": 4},
    "packed": {"packed": True, "sq": 3, **PAGED, "alibi": 2, "causal": False},
    "packed of bhsd": {"packed": True, "sq": 5, "layout": "bhsd", "window": (3, None)},
    "no sequences": {"b": 0, **PAGED},
    "no rows": {"sq": 0},
}


def under_jit(*arrays, **keywords):
    """The call with every array traced."""
    given = dict(zip(("q", "k_cache", "v_cache", "cache_seqlens"), arrays, strict=True), **keywords)
    traced = {n: jnp.asarray(x) for n, x in given.items() if isinstance(x, np.ndarray)}
    fixed = {n: x for n, x in given.items() if n not in traced}
    results = jax.jit(lambda x: fastattn.attention_kvcache(**x, **fixed))(traced)
    return tuple(map(np.asarray, results))


@pytest.mark.parametrize("name", CASES)
def test_by_the_reference(name):
    assert not kvcache_cases.run(dataclasses.replace(READ, **CASES[name]), None, under_jit)


def call(**changes):
    q, cache = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 6, 2, 8))
    given = {"q": q, "k_cache": cache, "v_cache": cache, "cache_seqlens": jnp.array([3, 5])}
    given |= changes
    return jax.jit(lambda x: fastattn.attention_kvcache(**given | {"q": x}))(given["q"])


NEW = np.ones((2, 1, 2, 8), np.float32)
TABLE = np.array([[0], [1]], np.int32)
REFUSED = [
    ({"k": NEW, "v": NEW}, TypeError, "`k` must be None in JAX, whose arrays are never written"),
    ({"out": NEW}, TypeError, "`out` must be None: JAX arrays are never written"),
    ({"return_mass": True}, NotImplementedError, "`return_mass` must be False in JAX's programs"),
    ({"k_scale": NEW}, NotImplementedError, "`k_scale` is not built yet"),
    ({"page_table": TABLE[:1]}, ValueError, "`page_table` must have b = 2 like `q`, got 1"),
    (
        {"page_table": TABLE, "cache_batch_idx": TABLE[0]},
        ValueError,
        "`cache_batch_idx` must be None with `page_table`, got both",
    ),
    ({"cache_seqlens": 7}, ValueError, "`cache_seqlens` must be from 0 to 6"),
    ({"cache_seqlens": NEW[0, 0, 0, :2]}, TypeError, "`cache_seqlens` must be int32, got float32"),
    ({"rotary_cos": NEW[0, 0], "rotary_sin": NEW[0, 0]}, ValueError, "`rotary_cos` must be None"),
    ({"v_cache": NEW}, ValueError, "`v_cache` must have s_max = 6 like `k_cache`, got 1"),
    ({"layout": "sd"}, ValueError, "`layout` must be 'bhsd' or 'bshd', got 'sd'"),
    # Where kernels are built in, it is known when the program runs.
    ({"backend": "sm90"}, (NotImplementedError, jax.errors.JaxRuntimeError), "sm90"),
]


@pytest.mark.parametrize(("changes", "error", "said"), REFUSED, ids=[x[2] for x in REFUSED])
def test_what_is_refused(changes, error, said):
    with pytest.raises(error) as caught:
        call(**changes)
    assert said in str(caught.value)


def test_lengths_are_known_when_it_runs():
    with pytest.raises(Exception, match=r"lengths` must be"):
        call(cache_seqlens=jnp.array([3, 7])).block_until_ready()


def test_packed_with_padding_on_the_left():
    q, ends, start = jnp.ones((5, 4, 8)), jnp.array([0, 2, 4]), jnp.array([0, 1])
    with pytest.raises(NotImplementedError, match="`cache_leftpad` must be None with `cu_seq"):
        call(q=q, cu_seqlens_q=ends, cache_leftpad=start)


def test_a_loop_that_writes_its_cache_itself():
    """One program: each step puts a key into the cache and attends to all that came."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 7, h, 8), np.float32) for h in (4, 2, 2))

    @jax.jit
    def decode(q, k, v):
        def step(caches, at):
            new = [jax.lax.dynamic_slice_in_dim(x, at, 1, 1) for x in (k, v)]
            caches = tuple(
                jax.lax.dynamic_update_slice_in_dim(c, x, at, 1)
                for c, x in zip(caches, new, strict=True)
            )
            rows, lengths = jax.lax.dynamic_slice_in_dim(q, at, 1, 1), jnp.array([at + 1])
            return caches, fastattn.attention_kvcache(rows, *caches, lengths)

        empty = jnp.full((1, 9, 2, 8), jnp.nan)
        return jax.lax.scan(step, (empty, empty), jnp.arange(7))[1][:, 0, 0]

    want = fastattn.attention(q, k, v, layout="bshd", causal=True)[0]
    np.testing.assert_allclose(decode(q, k, v), want, atol=1e-6)


def test_explain():
    found = []

    def look(q):
        cache = jnp.ones((2, 6, 2, 8))
        found.append(fastattn.explain(fastattn.attention_kvcache, q, cache, cache, 5))
        return q

    jax.jit(look)(jnp.ones((2, 1, 4, 8)))
    assert found[0].backend == "cpu" and found[0].kernel
