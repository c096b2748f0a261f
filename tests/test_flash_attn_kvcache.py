"""flash_attn_with_kvcache, FlashAttention 2's and 3's, by the reference and by their defaults."""

import kvcache_cases
import pytest
from kvcache_cases import Case

torch = pytest.importorskip("torch")
import cases  # noqa: E402
from fastattn import flash_attn, flash_attn_interface  # noqa: E402

MODULES = [flash_attn, flash_attn_interface]
THEIRS = {"scale": "softmax_scale", "window": "window_size", "sink": "s_aux"}
DEFAULTS = {  # by which no argument is given
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "rotary_interleaved": True,
    "softmax_scale": None,
}
PAGED = {"page_size": 16, "room": 48}
CASES = {
    "defaults": {"causal": False, "rotary": 16, "interleaved": True, "s_new": 2},
    "causal": {"sq": 3, "s_new": 3, "leftpad": True, "hq": 6},
    "rotary": {"sq": 3, "s_new": 3, "rotary": 8, "dtype": "bfloat16"},
    "pages": {**PAGED, "window": (5, None), "dv": 24, "sink": True},
    "entries": {"batch_idx": True, "lengths": "int", "softcap": 2.0, "scale": -0.4},
    "read": {"s_new": None, "sq": 4, "window": (9, 1), "causal": False, "dtype": "float16"},
}


def of(module):
    """attention_kvcache by the module's function and its names; defaults are left to it."""

    def attend(*arrays, layout, return_lse, return_mass, batch_invariant, **keywords):
        assert layout == "bshd" and not return_mass and not batch_invariant
        given = {THEIRS.get(n, n): x for n, x in keywords.items() if x is not None}
        if "window_size" in given:
            given["window_size"] = tuple(-1 if n is None else n for n in given["window_size"])
        if module is flash_attn and "page_table" in given:
            given["block_table"] = given.pop("page_table")
        given = {n: x for n, x in given.items() if n not in DEFAULTS or x != DEFAULTS[n]}
        arrays, seqlens = arrays[:3], arrays[3]
        found = module.flash_attn_with_kvcache(
            *arrays, cache_seqlens=seqlens, return_softmax_lse=return_lse, **given
        )
        return found

    return attend


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", CASES)
def test_by_the_reference(name, module):
    assert not kvcache_cases.run(Case(seed=8, **CASES[name]), cases.Torch("cpu"), of(module))


def test_packed_queries_of_the_third():
    case = Case(seed=9, packed=True, sq=4, s_new=None, **PAGED)
    assert not kvcache_cases.run(case, cases.Torch("cpu"), of(flash_attn_interface))


@pytest.mark.parametrize("alibi", [1, 2])
def test_slopes_of_the_second(alibi):
    case = Case(seed=8, alibi=alibi, sq=3, s_new=None)
    assert not kvcache_cases.run(case, cases.Torch("cpu"), of(flash_attn))


def caches(paged):
    q, k, v = (torch.randn(2, 3, h, 8) for h in (4, 2, 2))
    cache = torch.randn(2, 4, 5, 2, 8) if paged else torch.randn(2, 2, 10, 2, 8)
    table = torch.tensor([[2, 0], [1, 3]]).int() if paged else None
    return q, *cache, k, v, table


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("paged", [False, True])
def test_without_lengths_the_cache_is_full(paged, module):
    q, k_cache, v_cache, k, v, table = caches(paged)
    attend = module.flash_attn_with_kvcache
    pages = {"block_table" if module is flash_attn else "page_table": table}
    want = attend(q, k_cache, v_cache, cache_seqlens=10, **pages)
    assert torch.equal(attend(q, k_cache, v_cache, **pages), want)
    before = k_cache.clone()
    with pytest.raises(ValueError, match="`cache_seqlens` must say where new `k` and `v` come"):
        attend(q, k_cache, v_cache, k, v, **pages)
    assert torch.equal(k_cache, before)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_sentences_have_their_names(module):
    q, k_cache, v_cache, k, v, table = caches(True)
    attend = module.flash_attn_with_kvcache
    name = "block_table" if module is flash_attn else "page_table"
    before = k_cache.clone()
    with pytest.raises(ValueError, match=f"`{name}` must name pages from 0 to 3, got 9"):
        attend(q, k_cache, v_cache, k, v, cache_seqlens=2, **{name: table * 0 + 9})
    with pytest.raises(ValueError, match=f"`{name}` must have 2 dimensions"):
        attend(q, k_cache, v_cache, **{name: table[0]})
    with pytest.raises(TypeError, match="`window_size` must hold two ints"):
        attend(q, k_cache, v_cache, window_size=3, **{name: table})
    with pytest.raises(NotImplementedError, match="`k_cache` requires grad"):
        attend(q, k_cache.clone().requires_grad_(), v_cache, **{name: table})
    with pytest.raises(TypeError, match="`k_cache` must be a tensor"):
        attend(q, None, v_cache)
    assert torch.equal(k_cache, before)


def test_what_the_third_refuses_by_name():
    q, k_cache, v_cache, *_ = caches(False)
    x = torch.ones(2)
    for name in ("qv", "q_descale", "k_descale", "v_descale", "cu_seqlens_k_new", "rotary_seqlens"):
        with pytest.raises(NotImplementedError, match=f"`{name}` must be None: no backend"):
            flash_attn_interface.flash_attn_with_kvcache(q, k_cache, v_cache, **{name: x})
    for name in ("attention_chunk", "sm_margin"):
        with pytest.raises(NotImplementedError, match=f"`{name}` must be 0: no backend"):
            flash_attn_interface.flash_attn_with_kvcache(q, k_cache, v_cache, **{name: 2})


def test_what_tunes_the_third_changes_nothing():
    q, k_cache, v_cache, *_ = caches(False)
    plan = flash_attn_interface.get_scheduler_metadata(2, 3, 10, 4, 2, 8, cache_seqlens=None)
    tuned = {"scheduler_metadata": plan, "num_splits": 3, "pack_gqa": True}
    attend = flash_attn_interface.flash_attn_with_kvcache
    assert torch.equal(attend(q, k_cache, v_cache, **tuned), attend(q, k_cache, v_cache))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_in_a_graph(module):
    torch._dynamo.reset()
    q, k_cache, v_cache, k, v, _ = caches(False)
    copies = k_cache.clone(), v_cache.clone()

    def step(q, k_cache, v_cache, k, v):
        n = {"cache_seqlens": 4, "causal": True}
        return module.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **n)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k_cache, v_cache, k, v), step(q, *copies, k, v))
    assert torch.equal(k_cache, copies[0]) and torch.equal(v_cache, copies[1])


def test_blocks_of_packed_sequences():
    """flash_attn_varlen_func's block_table, against the keys themselves."""
    q, k, v = (torch.randn(n, h, 8) for n, h in ((7, 4), (12, 2), (12, 2)))
    ends = [torch.tensor(x).int() for x in ([0, 3, 7], [0, 9, 12])]
    cache = torch.full((2, 4, 5, 2, 8), torch.nan)
    for pages, x in zip(cache, (k, v), strict=True):
        pages[2], pages[0, :4], pages[3, :3] = x[:5], x[5:9], x[9:]
    table = torch.tensor([[2, 0], [3, -1]]).int()
    rest = {"causal": True, "window_size": (6, -1)}
    want = flash_attn.flash_attn_varlen_func(q, k, v, *ends, 4, 9, **rest)
    got = flash_attn.flash_attn_varlen_func(q, *cache, *ends, 4, 9, block_table=table, **rest)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="`block_table` must name pages from 0 to 3, got -1"):
        flash_attn.flash_attn_varlen_func(q, *cache, *ends, 4, 9, block_table=table.flip(1))
