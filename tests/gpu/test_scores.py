"""What changes the scores: softcap, ALiBi, masks, dropout, sinks."""

import fastattn
import pytest

import gpu
from gpu import DTYPES, inputs, normal, torch
from gpu.calls import CHANGES, SIZES, STRIDES, check, masks, poisoned, restrided, sent, sinks

pytestmark = gpu.marks


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("change", CHANGES)
def test_score_changes(change, d, dtype, causal):
    q, k, v = inputs(2, 4, 2, 300, 517, d, dtype=DTYPES[dtype])
    check(q, k, v, causal=causal, **sent(CHANGES[change], q, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("change", [*CHANGES, "bool", "bf16", "fp32"])
def test_scores_that_rise_along_the_keys(change, d, dtype):
    """From right to left, as blocks come: the offset is raised in the midst of a tile, twice."""
    q, k, v = inputs(1, 4, 2, 200, 1100, d, dtype=DTYPES[dtype])
    k[:, :, :600] *= 8
    k[:, :, 7] *= 20
    is_mask = change not in CHANGES
    changes = {"mask": masks(change, (200, 1100))} if is_mask else sent(CHANGES[change], q, k)
    check(q, k, v, **changes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("factor", [40, 4000])
@pytest.mark.parametrize("change", ["softcap", "softcap, near", "alibi", "dropout"])
def test_score_changes_of_great_scores(change, factor, d, dtype, causal):
    """Beyond 5,600 an offset is rounded so coarsely that a change may not end in exponents."""
    q, k, v = inputs(1, 4, 2, 200, 900, d, dtype=DTYPES[dtype])
    check(q * factor, k, v, causal=causal, **sent(CHANGES[change], q, k))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("kind", ["bool", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("sk", [512, 1000, 517, 64, 1])  # 517: not for the copy engine
@pytest.mark.parametrize("axes", ["b h q k", "q k", "b k", "h q k", "b q k", "k", "q", ""])
def test_masks(axes, sk, kind, d, causal):
    q, k, v = inputs(2, 4, 2, 300, sk, d)
    shape = [n if a in axes.split() else 1 for a, n in zip("bhqk", (2, 4, 300, sk), strict=True)]
    check(q, k, v, causal=causal, mask=masks(kind, shape))


@pytest.mark.parametrize("kind", ["bool", "bf16", "fp32"])
@pytest.mark.parametrize("how", STRIDES)
def test_strides_of_the_mask(how, kind):
    q, k, v = inputs(2, 4, 2, 200, 304, 128)
    mask = masks(kind, (2, 4, 200, 304))
    if kind == "bool":  # NaN becomes True: what lies between the rows must not count
        like = restrided(mask.half(), how)
        whole = torch.as_strided(like, (like.untyped_storage().size() // 2,), (1,), 0).bool()
        mask = whole.as_strided(like.shape, like.stride(), like.storage_offset())
    else:
        mask = restrided(mask, how)
    check(q, k, v, mask=mask)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["bool", "bf16", "fp32"])
def test_everything_together(kind, change, d):
    q, k, v = inputs(3, 4, 2, 333, 777, d)
    lengths = {"q_lengths": [333, 1, 200], "k_lengths": [777, 600, 0], "k_start": [3, 0, 0]}
    on_gpu = {n: torch.tensor(x, dtype=torch.int32, device="cuda") for n, x in lengths.items()}
    others = sent(CHANGES[change], q, k) | {"mask": masks(kind, (1, 4, 333, 777))}
    others |= {"causal": True, "window": (500, None)}
    out = poisoned(q, v)
    _, lse = fastattn.attention(q, k, v, out=out, return_lse=True, **on_gpu, **others)
    assert gpu.complaints(out, lse, q, k, v, **lengths, **others) == []


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("block", [64, 128, 200])
def test_blocks_that_nobody_sees_are_left_out(block, d):
    """NaN in keys and values of them: what no row sees reaches nothing."""
    q, k, v = inputs(2, 2, 2, 1024, 5000, d)
    i, j = torch.arange(1024, device="cuda"), torch.arange(5000, device="cuda")
    mask = ((i[:, None] // block + j // block) % 2 == 0) & (j % 3 > 0)
    mask[:, 600:1500] = False
    mask[:200] = False
    mask[640:768] = False
    for x in (k, v):
        x[:, :, ~mask.any(0)] = torch.nan
    check(q, k, v, mask=mask)
    check(q, k, v, mask=mask, causal=True)
    check(q, k, v, mask=torch.zeros_like(mask))


@pytest.mark.parametrize("kind", ["bool", "fp32"])
def test_no_key_and_a_sink(kind):
    q, k, v = inputs(2, 4, 4, 130, 0, 64)
    sink = sinks(4)
    out, lse = fastattn.attention(q, k, v, sink=sink, mask=masks(kind, (130, 1)), return_lse=True)
    assert (out == 0).all() and torch.equal(lse, sink[None, :, None].expand(2, 4, 130))


def test_dropout_is_the_same_pattern_as_on_the_cpu():
    """P is uniform and v a unit vector a key: out says which keys stayed."""
    s = 128
    q, k = torch.zeros(1, 2, s, 64), torch.zeros(1, 2, s, 64)
    v = torch.eye(s)[None, None].expand(1, 2, s, s).contiguous()
    one = fastattn.attention(q, k, v, dropout_p=0.25, seed=-7)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in (q, k, v))
    other = fastattn.attention(q, k, v, dropout_p=0.25, seed=-7)
    assert torch.equal(one != 0, other.cpu() != 0)
    assert abs((other != 0).double().mean().item() - 0.75) < 0.02
    seed = torch.tensor(-7, device="cuda")
    assert torch.equal(other, fastattn.attention(q, k, v, dropout_p=0.25, seed=seed))
    assert (fastattn.attention(q, k, v, dropout_p=1.0, seed=1) == 0).all()


def test_a_mask_may_change_between_replays():
    q, k, v = inputs(1, 4, 4, 300, 400, 128)
    mask = masks("bool", (300, 400))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        fastattn.attention(q, k, v, mask=mask)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = fastattn.attention(q, k, v, mask=mask)
    for seed in (5, 6, 7):
        mask.copy_(masks("bool", (300, 400), seed))
        graph.replay()
        assert gpu.complaints(out, None, q, k, v, mask=mask) == []


def test_a_graph_draws_a_new_seed_at_each_replay():
    x = normal(1, 2, 64, 64)
    fastattn.attention(x, x, x, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fastattn.attention(x, x, x, dropout_p=0.5)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(out.clone())
    assert not torch.equal(*results)


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "dropout"])  # it counts sequences
def test_general_rows_are_batch_invariant(change):
    q, k, v = inputs(3, 4, 2, 300, 700, 128)
    changes = sent(CHANGES[change], q, k)
    mask = masks("bool", (3, 4, 300, 700))
    together = fastattn.attention(q, k, v, mask=mask, batch_invariant=True, **changes)
    for b in range(3):
        one = slice(b, b + 1)
        if change == "alibi of each sequence":
            own = {"alibi_slopes": changes["alibi_slopes"][one]}
        else:
            own = changes
        alone = fastattn.attention(
            q[one], k[one], v[one], mask=mask[one], batch_invariant=True, **own
        )
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("change", [*CHANGES, "bool", "bf16"])
def test_explain_names_the_general_row(change):
    q, k, v = inputs(1, 4, 4, 100, 200, 128)
    changes = sent(CHANGES[change], q, k) if change in CHANGES else {}
    if not changes:
        changes = {"mask": masks(change, (100, 200))}
    row = fastattn.explain(fastattn.attention, q, k, v, **changes).kernel
    assert (row == "sm90_fwd_bf16_d128_general") == ("sink" not in change)
