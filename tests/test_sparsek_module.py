"""fastattn.torch.SparseKAttention, and decoding with its cache, contiguous and in pages."""

import itertools

import fastattn
import pytest

torch = pytest.importorskip("torch")
from fastattn.torch import SparseKAttention, SparseKCache  # noqa: E402

KINDS = ("normal", "ties", "equal", "rising", "falling", "inf")


def scores_of(kind, *shape, dtype=torch.float64):
    z = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    if kind == "inf":
        z[..., ::5], z[..., 1::7] = torch.inf, -torch.inf
    return {
        "normal": z,
        "ties": z.round(),
        "equal": torch.ones_like(z),
        "rising": 3 * z.sort().values,
        "falling": -(-3 * z).sort().values,
        "inf": z,
    }[kind]


def paged(batch, places, heads, d, page_size=4):
    """Pages of which every second one is another's."""
    columns = -(-places // page_size)
    pool = torch.full((2, 2 * batch * columns + 1, page_size, heads, d), torch.nan).double()
    order = torch.randperm(batch * columns, generator=torch.Generator().manual_seed(0))
    return *pool, (2 * order + 1).reshape(batch, columns).int()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("k_keep", "window", "prompt"), [(5, 4, 0), (3.5, 0, 0), (6, 3, 40), (0, 4, 9), (70, 2, 3)]
)
def test_steps_are_the_whole(kind, k_keep, window, prompt):
    b, hq, hk, d, n = 2, 4, 2, 8, 60
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(b, h, n, d, generator=random).double() for h in (hq, hk, hk))
    scores = scores_of(kind, b, hk, n)
    options = {"key_gate": True, "softcap": 5.0, "sink": torch.randn(hq, generator=random)}
    want = fastattn.sparsek_attention(q, k, v, scores, k_keep, window=window, **options)
    shape = {"k_keep": k_keep, "window": window, "dtype": torch.float64}
    places = SparseKCache(b, hk, d, **shape).places
    for pages in (None, paged(b, places, hk, d)):
        cache = SparseKCache(b, hk, d, **shape, pages=pages)
        parts, at = [], [0, prompt, *range(prompt + 1, n), n]
        for first, end in itertools.pairwise(at):
            part = [x[:, :, first:end] for x in (q, k, v, scores)]
            parts.append(cache.attend(*part, **options))
        torch.testing.assert_close(torch.cat(parts, 2), want, rtol=1e-10, atol=1e-12)
        assert cache.length == n and (cache.numbers >= 0).sum(-1).max() <= places
        if pages:
            assert pages[0][::2].isnan().all() and pages[1][::2].isnan().all()


def test_the_past_is_pruned():
    cache = SparseKCache(1, 1, 4, k_keep=4, window=2)
    x = torch.randn(4, 1, 1, 1500, 4, generator=torch.Generator().manual_seed(0))
    cache.attend(*x[:3], x[3, ..., 0])
    assert cache.past.shape[-1] < 40
    longest = 0
    for i in range(1500):
        cache.attend(*x[:3, :, :, i : i + 1], x[3, :, :, i : i + 1, 0])
        longest = max(longest, cache.past.shape[-1])
    assert longest < 400 and cache.length == 3000


def test_the_module_decodes_what_it_trains():
    torch.manual_seed(0)
    module = SparseKAttention(32, 4, k_keep=5, window=6, kv_heads=2).double()
    torch.nn.init.normal_(module.slope)
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    want = module(x)
    cache = module.cache(2)
    with torch.no_grad():
        parts = [module(x[:, :20], cache), *(module(x[:, i : i + 1], cache) for i in range(20, 50))]
    torch.testing.assert_close(torch.cat(parts, 1), want)
    want.square().sum().backward()
    for name, weight in module.named_parameters():
        assert weight.grad.abs().max() > 0, name


def test_sentences():
    with pytest.raises(ValueError, match="`heads` must be a multiple of `kv_heads` = 3, got 4"):
        SparseKAttention(32, 4, k_keep=5, window=6, kv_heads=3)
    with pytest.raises(ValueError, match="`window` must be at least 0 and `k_keep` finite"):
        SparseKCache(1, 1, 4, k_keep=4, window=-2)
    pools = torch.zeros(2, 3, 2, 1, 4)
    with pytest.raises(ValueError, match="must have 1 rows of pages for 6 keys"):
        SparseKCache(1, 1, 4, k_keep=4, window=2, pages=(*pools, torch.zeros(1, 2).int()))
    with pytest.raises(ValueError, match="`pages` must be contiguous"):
        pages = (*pools.transpose(1, 2), torch.zeros(1, 3).int())
        SparseKCache(1, 1, 4, k_keep=4, window=2, pages=pages)
