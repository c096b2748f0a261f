"""attention_kvcache on a GPU: new keys, rotary positions, packed queries, the mass; and prompts
over keys in pages. test_decode.py has the kernels that read them."""

import itertools
from dataclasses import replace

import cases
import fastattn
import kvcache_cases
import numpy as np
import pytest
import reference
import test_varlen_pages as pages_of

import gpu
from gpu import inputs, normal, torch

pytestmark = gpu.marks


def served(seed):
    """A random case, with head sizes of all variants."""
    case = kvcache_cases.random_case(seed)
    rng = np.random.default_rng(seed)
    d = case.d * int(rng.choice([1, 2, 4])) if case.d > 16 else case.d
    dv = d if case.shared else min(256, case.dv * int(rng.choice([1, 4])))
    return replace(case, d=d, dv=dv, dtype=str(rng.choice(["float16", "bfloat16"])))


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def explained(case):
    inputs = kvcache_cases.Inputs(case)
    arrays = kvcache_cases.Arrays(case, inputs, cases.Torch("cuda"))
    given = arrays.q, arrays.k_cache, arrays.v_cache, arrays.seqlens
    more = arrays.keywords | kvcache_cases.options(case)
    return fastattn.explain(fastattn.attention_kvcache, *given, **more, layout=case.layout).kernel


@pytest.mark.parametrize("first", range(0, 600, 50))
def test_random_caches(first):
    framework = cases.Torch("cuda")
    wrong = {}
    for seed in range(first, first + 50):
        case = served(seed)
        if complaints := kvcache_cases.run(case, framework, backend="sm90"):
            wrong[case] = complaints
    assert not wrong


MANY = kvcache_cases.Case(
    seed=1, sq=70, s_new=70, hq=16, d=64, dv=64, room=320, dtype="bfloat16", rotary=32, mass=True
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "more"),
    [
        ("sm90_fwd_", {}),
        ("sm90_fwd_", {"leftpad": True, "window": (40, 0), "batch_idx": False}),
        ("sm90_fwd_", {"page_size": 16}),
        ("sm90_decode_", {"batch_idx": True, "softcap": 3.0}),
        ("sm90_fwd_", {"packed": True, "sink": True}),
    ],
)
def test_many_rows(kernel, more, dtype):
    case = replace(MANY, dtype=dtype, **more)
    assert explained(case).startswith(kernel)
    assert not kvcache_cases.run(case, cases.Torch("cuda"), backend="sm90")


def step_of(b, sk, hq=16, hk=4, d=128):
    """Caches, and what a step takes: q, k and v of one token, and the tables of angles."""
    caches = [x.transpose(1, 2).contiguous() for x in inputs(b, hk, hk, sk, sk, d)[1:]]
    q, k, v = (normal(b, 1, h, d, seed=n) for n, h in enumerate((hq, hk, hk)))
    angles = normal(sk, d // 2, dtype=torch.float32, seed=9)
    return caches, {"q": q, "k": k, "v": v, "rotary_cos": angles.cos(), "rotary_sin": angles.sin()}


def test_a_graph_writes_each_token_where_the_last_one_ended():
    b, sk = 3, 2000
    caches, step = step_of(b, sk)
    own = [x.clone() for x in caches]
    lengths = int32(5, 1000, 1980)
    q = step.pop("q")
    fastattn.attention_kvcache(q, *(x.clone() for x in caches), lengths, **step)  # memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention_kvcache(q, *caches, lengths, **step)
    for n in range(12):
        for x in (q, step["k"], step["v"]):
            x.copy_(normal(*x.shape, seed=50 + n))
        graph.replay()
        assert torch.equal(out, fastattn.attention_kvcache(q, *own, lengths, **step))
        assert all(torch.equal(x, y) for x, y in zip(caches, own, strict=True))
        lengths += 1


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_the_operator_writes_new_keys(mode):
    caches, step = step_of(2, 500)
    own = [x.clone() for x in caches]
    lengths = int32(3, 400)

    def call(q, k_cache, v_cache, lengths, **more):
        return fastattn.attention_kvcache(q, k_cache, v_cache, lengths, **more)

    options = {"backend": "aot_eager"} if mode == "eager" else {"mode": "reduce-overhead"}
    compiled = torch.compile(call, fullgraph=True, **options)
    q = step.pop("q")
    for _ in range(3):
        out = compiled(q, *caches, lengths, **step).clone()
        assert torch.equal(out, call(q, *own, lengths, **step))
        assert all(torch.equal(x, y) for x, y in zip(caches, own, strict=True))
        lengths += 1


def test_the_mass_of_all_keys_is_the_number_of_rows():
    q, k, v = (x.transpose(1, 2).contiguous() for x in inputs(2, 32, 8, 3, 5000, 128))
    lengths = int32(5000, 1234)
    out, mass = fastattn.attention_kvcache(q, k, v, lengths, return_mass=True)
    assert mass.shape == (2, 8, 5000) and not mass[1, :, 1234:].any()
    torch.testing.assert_close(mass.sum(2), torch.full_like(mass[..., 0], 12), atol=1e-3, rtol=0)
    assert torch.equal(out, fastattn.attention_kvcache(q, k, v, lengths))


def test_a_hidden_sequence_of_packed_queries_keeps_its_bits():
    """With batch_invariant a sequence's bits are those that it has alone."""
    lengths, rows = [900, 33, 3000, 64], [5, 1, 40, 0]
    b, hq, d = 4, 16, 128
    k, v = (x.transpose(1, 2).contiguous() for x in inputs(b, 4, 4, 3000, 3000, d)[1:])
    ends = np.cumsum([0, *rows])
    q = normal(int(ends[-1]), hq, d)
    keywords = {"batch_invariant": True, "return_lse": True}
    together = fastattn.attention_kvcache(
        q, k, v, int32(*lengths), cu_seqlens_q=int32(*ends.tolist()), **keywords
    )
    for n in range(b):
        mine = slice(int(ends[n]), int(ends[n + 1]))
        alone = fastattn.attention_kvcache(
            *(q[mine], k[n : n + 1], v[n : n + 1], int32(lengths[n])),
            cu_seqlens_q=int32(0, rows[n]),
            **keywords,
        )
        assert torch.equal(together[0][mine], alone[0])
        assert torch.equal(together[1][:, mine], alone[1])


SERVED = [x for x in pages_of.FEATURES if x not in ("a bool mask", "a float mask", "dropout")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1, 3, 16, 64, 128])
@pytest.mark.parametrize("name", SERVED)
def test_prompts_over_pages(name, size, dtype):
    keywords = pages_of.FEATURES[name]
    q, packed, pages, table = pages_of.arrays(size, dtype)
    framework = cases.Torch("cuda")
    out, lse = pages_of.paged(q, pages, table, framework=framework, **keywords)
    q_ends, k_ends = pages_of.ends(pages_of.Q_LENGTHS), pages_of.ends(pages_of.K_LENGTHS)
    of_one = ("q_offset", "seqused_q", "alibi_slopes")
    for n, (a, b) in enumerate(itertools.pairwise(q_ends)):
        keys = slice(k_ends[n], k_ends[n + 1])
        own = (x[None].swapaxes(1, 2) for x in (q[a:b], packed[0][keys], packed[1][keys]))
        said = out[None, a:b].swapaxes(1, 2), lse[None, :, a:b]
        mine = {x: y[n : n + 1] if x in of_one else y for x, y in keywords.items()}
        if "seqused_q" in mine:
            mine["q_lengths"] = mine.pop("seqused_q")
        mine.pop("batch_invariant", None)
        assert not reference.check(*said, *own, **mine)
    assert not out[-2:].any() and (lse[:, -2:] == -np.inf).all()


def test_what_pages_do_not_take_is_refused():
    q = torch.ones(5, 4, 64, dtype=torch.bfloat16, device="cuda")
    cache = torch.zeros(2, 7, 16, 2, 64, dtype=q.dtype, device="cuda")
    table, out = torch.zeros(2, 1, dtype=torch.int32, device="cuda"), torch.zeros_like(q)
    given = q, *cache, int32(0, 2, 5), None, 3, 9
    rest = {"page_table": table, "seqused_k": int32(9, 3), "out": out}
    mask = torch.ones(3, 9, dtype=torch.bool, device="cuda")
    for more in ({"mask": mask}, {"mask": mask.float()}, {"dropout_p": 0.5, "seed": 1}):
        with pytest.raises(NotImplementedError, match="keys in pages"):
            fastattn.attention_varlen(*given, **rest, **more)
    assert not out.any()
