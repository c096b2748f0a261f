"""Few query rows and many keys on a GPU: the decode kernels, by way of attention and of
attention_kvcache."""

import fastattn
import pytest

import gpu
from gpu import DTYPES, inputs, normal, torch
from gpu.calls import check

pytestmark = gpu.marks

SHAPES = {  # b, hq, hk, sq, sk, d
    "one token": (1, 32, 8, 1, 1024, 128),
    "one token, many parts": (1, 8, 1, 1, 70001, 128),
    "a batch": (16, 32, 8, 1, 4097, 128),
    "no groups": (3, 8, 8, 1, 777, 64),
    "eight tokens": (2, 32, 8, 8, 2000, 128),
    "64 rows": (1, 64, 8, 8, 3000, 256),
    "a wide group": (2, 48, 1, 1, 1000, 64),
    "columns": (2, 6, 2, 2, 500, 72),
}


def kernel(*arrays, **keywords):
    return fastattn.explain(fastattn.attention, *arrays, **keywords).kernel


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, causal, dtype):
    b, hq, hk, sq, sk, d = SHAPES[shape]
    arrays = inputs(b, hq, hk, sq, sk, d, dtype=DTYPES[dtype])
    assert kernel(*arrays, causal=causal).startswith("sm90_decode_")
    check(*arrays, most=4, causal=causal)
    check(*arrays, most=4, causal=causal, batch_invariant=True)


@pytest.mark.parametrize("dv", [64, 128, 8, 250])
def test_head_sizes(dv):
    for d in (64, 100, 256):
        arrays = inputs(2, 8, 2, 1, 900, d, dv=dv)
        assert kernel(*arrays).startswith("sm90_decode_")
        check(*arrays, most=4)


@pytest.mark.parametrize("sk", [200, 5000])
def test_what_else_it_takes(sk):
    q, k, v = inputs(2, 16, 4, 3, sk, 128)
    slopes, sink = normal(16, dtype=torch.float32).abs() / 64, normal(16, dtype=torch.float32)
    for keywords in (
        {"causal": True, "softcap": 5.0},
        {"causal": True, "alibi_slopes": slopes},
        {"causal": True, "sink": sink},
        {"window": (100, 0), "softcap": 2.0, "alibi_slopes": slopes, "sink": sink},
        {"causal": True, "q_offset": 40, "scale": -0.1},
    ):
        assert kernel(q, k, v, **keywords).startswith("sm90_decode_")
        check(q, k, v, most=4, **keywords)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("b", [1, 64])
@pytest.mark.parametrize("d", [2, 64, 256])
def test_one_key_beside_a_sink(d, b, invariant):
    """P of a row's only key is 1, beside a sink or not: nothing but the result is rounded."""
    q, k, v = inputs(b, 8, 2, 1, 5000, d)
    sink = torch.linspace(-3, 3, 8, device="cuda")
    keywords = {"sink": sink, "return_lse": True, "batch_invariant": invariant}
    out, lse = fastattn.attention(q, k, v, k_lengths=int32(*[1] * b), **keywords)
    key, value = (x[:, :, :1].double().repeat_interleave(4, 1) for x in (k, v))
    s = (q.double() * key).sum(-1) * d**-0.5
    exact = value * torch.sigmoid(s - sink.double()[:, None])[..., None]
    ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)
    assert ((out.double() - exact).abs() <= 0.51 * ulp).all()
    assert (lse.double() - torch.logaddexp(s, sink.double()[:, None])).abs().max() < 1e-5


def test_others_stay_with_the_forward_kernel():
    few, many = inputs(2, 8, 2, 1, 500, 64), inputs(2, 8, 2, 100, 500, 64)
    mask = torch.ones(500, dtype=torch.bool, device="cuda")
    assert kernel(*many).startswith("sm90_fwd_")
    assert kernel(*few, mask=mask).startswith("sm90_fwd_")
    assert kernel(*few, dropout_p=0.5).startswith("sm90_fwd_")


def paged(x, size, table):
    """x (b, s, h, d) in the pages that a table (b, pages) names; the others are NaN."""
    b, s, h, d = x.shape
    pages = x.new_full((table.numel() + 3, size, h, d), torch.nan)
    pages[table.flatten().long()] = x.reshape(b * s // size, size, h, d)
    return pages


@pytest.mark.parametrize("size", [256, 128, 64, 48, 16, 8, 3, 1])
@pytest.mark.parametrize("sq", [1, 6])
def test_pages(size, sq):
    b, hq, hk, sk, d = 3, 16, 4, 768 * 4, 128
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(b, hq, hk, sq, sk, d))
    lengths = int32(sk, 1025, 7)
    table = torch.randperm(b * sk // size, device="cuda").int().reshape(b, -1)
    whole = fastattn.attention_kvcache(q, k, v, lengths, causal=True, return_lse=True)
    arrays = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = whole[0].transpose(1, 2), whole[1]
    keywords = {"causal": True, "k_lengths": lengths.tolist()}
    assert not gpu.complaints(out, lse, *arrays, most=6, **keywords)
    pages = [paged(x, size, table) for x in (k, v)]
    for n, length in enumerate(lengths.tolist()):
        table[n, -(-length // size) :] = 2**31 - 1
    got = fastattn.attention_kvcache(
        q, *pages, lengths, page_table=table, causal=True, return_lse=True
    )
    for x, y in zip(got, whole, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("keywords", [{}, {"causal": True}, {"window": (1500, 0)}], ids=str)
@pytest.mark.parametrize("b", [2, 70])
def test_ragged_sequences(b, keywords):
    """The device deals parts of the keys by the lengths; few sequences are long."""
    sk = 9000
    q, k, v = inputs(b, 16, 2, 1, sk, 128)
    lengths = [0, sk, 1, 64, 65, *(int(128 * 70 ** (n % 13 / 13)) for n in range(b))][:b]
    for n, length in enumerate(lengths):
        k[n, :, length:] = v[n, :, length:] = torch.nan
    out, lse = fastattn.attention(q, k, v, k_lengths=int32(*lengths), return_lse=True, **keywords)
    k, v = k.nan_to_num(), v.nan_to_num()
    assert not gpu.complaints(out, lse, q, k, v, most=12, k_lengths=lengths, **keywords)
    for n in {0, 1, b // 2, b - 1}:
        only, keys = slice(n, n + 1), slice(None, lengths[n])
        if not lengths[n]:
            assert not out[n].any() and (lse[n] == -torch.inf).all()
            continue
        alone = fastattn.attention(q[only], k[only, :, keys], v[only, :, keys], **keywords)
        assert (out[only] - alone).abs().max() <= 2**-6 * alone.abs().max()


def test_a_graph_is_replayed_with_other_lengths():
    b, sk = 4, 5000
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(b, 16, 4, 1, sk, 128))
    lengths = int32(sk, sk, sk, sk)
    fastattn.attention_kvcache(q, k, v, lengths)  # memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention_kvcache(q, k, v, lengths)
    for numbers in ([1, 2, 3, 4], [sk, 0, 128, 4999], [sk + 9, -1, 64, 65]):
        lengths.copy_(int32(*numbers))
        graph.replay()
        assert torch.equal(out, fastattn.attention_kvcache(q, k, v, int32(*numbers)))


def test_bits_of_a_sequence_do_not_depend_on_the_others():
    b, sk = 9, 6000
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(b, 16, 4, 1, sk, 128))
    lengths = torch.randint(0, sk, (b,), device="cuda", dtype=torch.int32)
    keywords = {"return_lse": True, "batch_invariant": True}
    together = fastattn.attention_kvcache(q, k, v, lengths, **keywords)
    for n in range(b):
        only = slice(n, n + 1)
        alone = fastattn.attention_kvcache(q[only], k[only], v[only], lengths[only], **keywords)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x[only], y)
