"""fastattn.transformers: what a model may see arrives as intervals where these say it.

Judged by sdpa's dense mask of the same arguments; and by the largest tensor that a model makes.
"""

import math

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.15")

import fastattn.transformers as ours  # noqa: E402
from small_models import compare, inputs_of, make, one_thread, run, spy, with_cache  # noqa: E402, F401
from transformers import masking_utils as theirs  # noqa: E402

ours.register()
S, CHUNK, WINDOW = 12, 5, 4


def padding_of(*runs):
    """(b, S) of ones from begin to end, and zeros."""
    real = torch.zeros(len(runs), S, dtype=torch.long)
    for row, (begin, end) in enumerate(runs):
        real[row, begin:end] = 1
    return real


HOLES = padding_of((2, 12), (0, 9))
HOLES[0, 5:7] = 0
PADDINGS = {
    "none": None,
    "ones": padding_of((0, S), (0, S)),
    "left": padding_of((0, S), (5, S)),
    "right": padding_of((0, 7), (0, S)),
    "both": padding_of((3, 8), (0, 1)),
    "nothing": padding_of((0, 0), (0, S)),
    "holes": HOLES,
}
BLOCKS = torch.tensor([[-1] * 3 + [0] * 4 + [-1] + [1] * 3 + [-1]] * 2)
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5], [*range(7), *range(5)]])


def every_other(batch, head, q, k):
    return (k % 2 == 0) | (q == k)


PATTERNS = {  # (function of transformers, more arguments, whether intervals say it)
    "causal": ("create_causal_mask", {}, True),
    "window": ("create_sliding_window_causal_mask", {}, True),
    "all": ("create_bidirectional_mask", {}, True),
    "window-all": ("create_bidirectional_sliding_window_mask", {}, True),
    "chunks": ("create_chunked_causal_mask", {}, False),
    "blocks": ("create_causal_mask", {"block_sequence_ids": BLOCKS}, False),
    "window-blocks": ("create_sliding_window_causal_mask", {"block_sequence_ids": BLOCKS}, False),
    "or": ("create_causal_mask", {"or_mask_function": every_other}, False),
    "and": ("create_causal_mask", {"and_mask_function": every_other}, False),
    "all-and": ("create_bidirectional_mask", {"and_mask_function": every_other}, False),
    "asked": ("create_causal_mask", {"allow_is_causal_skip": False}, False),
}


class Module(torch.nn.Module):
    """Whose own word is not asked where there is a mask."""

    is_causal = True


def config_of(implementation, window=WINDOW, chunk=CHUNK):
    config = transformers.LlamaConfig(attn_implementation=implementation)
    config.sliding_window, config.attention_chunk_size = window, chunk
    return config


def masks(name, padding, cache=None, length=S, **more):
    """Ours, and eager's, of one pattern."""
    function, arguments, _ = PATTERNS[name]
    made = []
    for implementation in ("fastattn", "eager"):
        given = {**arguments, **more}
        if "bidirectional" not in function:
            given.setdefault("position_ids", None)
        config = config_of(implementation)
        embeds = torch.empty(2, length, 8)
        create = getattr(theirs, function)
        if "bidirectional" in function:
            made.append(create(config, embeds, padding, **given))
        else:
            made.append(create(config, embeds, padding, cache, **given))
    return made


def qkv(rows=S, keys=S, seed=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 6))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def expected(q, k, v, dense):
    """(b, s, h, dv), and which rows see anything."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if dense is None else dense == 0
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), seen.any(-1).expand(2, 4, -1).transpose(1, 2)


def check(mask, dense, rows=S, keys=S):
    q, k, v = qkv(rows, keys)
    got, weights = ours.attend(Module(), q, k, v, mask)
    want, counts = expected(q, k, v, dense)
    assert weights is None and got.is_contiguous()
    torch.testing.assert_close(got[counts], want[counts])
    assert not got[~counts].any()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name, padding, monkeypatch):
    mask, dense = masks(name, PADDINGS[padding])
    calls = spy(monkeypatch)
    check(mask, dense)
    assert isinstance(mask, ours.IntervalMask) == PATTERNS[name][2]
    if PATTERNS[name][2]:
        needed = (2, 1, 1, S) if padding == "holes" else None
        assert getattr(calls[0].get("mask"), "shape", None) == needed
        assert ("k_lengths" in calls[0]) == (padding not in ("none", "ones"))


@pytest.mark.parametrize("name", ["causal", "window", "chunks"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("past", [0, 2, 7])
@pytest.mark.parametrize("rows", [1, 3])
def test_patterns_behind_a_cache(name, cache, past, rows):
    """Static caches have empty slots, windows shorter caches than there were tokens."""
    config = config_of("eager", chunk=CHUNK if name == "chunks" else None)
    config.sliding_window = None if name != "window" else WINDOW
    config.num_hidden_layers, config.layer_types = 1, None
    for real in (None, padding_of((0, S), (1, S))[:, : past + rows]):
        made = transformers.DynamicCache(config=config)
        if cache == "static":
            made = transformers.StaticCache(config=config, max_cache_len=11)
        q, k, v = qkv(rows, past + rows)
        if past:
            made.update(k[:, :, :past], v[:, :, :past], 0)
        mask, dense = masks(name, real, made, rows)
        if isinstance(mask, ours.IntervalMask):
            mask = mask.to("cpu")  # that is what accelerate calls
        k, v = made.update(k[:, :, past:], v[:, :, past:], 0)
        got = ours.attend(Module(), q, k, v, mask)[0]
        want, counts = expected(q, k, v, dense)
        torch.testing.assert_close(got[counts], want[counts])


@pytest.mark.parametrize("chunk", [WINDOW, S, S + 1])
def test_a_window_and_a_chunk_of_one_size_are_told_apart(chunk):
    for name in ("create_sliding_window_causal_mask", "create_chunked_causal_mask"):
        made = [
            getattr(theirs, name)(config_of(i, chunk, chunk), torch.empty(2, S, 8), None, None)
            for i in ("fastattn", "eager")
        ]
        check(*made)


def test_masks_of_the_users_own():
    dense = torch.rand(2, 1, S, S, generator=torch.Generator().manual_seed(3)) < 0.4
    check(dense, torch.where(dense, 0.0, -1.0))
    check(dense.expand(-1, 4, -1, -1), torch.where(dense, 0.0, -1.0))
    added = torch.where(dense, 0.0, torch.finfo(torch.float32).min)
    added[:, :, :, 0] = 0  # of finite numbers the softmax of a row that sees nothing has an output
    check(added, added)


def test_no_mask_means_what_sdpa_makes_of_it():
    """Causality is the module's word then, and counts from the first key: later ones are empty."""
    triangle = torch.ones(S, S + 3, dtype=torch.bool).tril()
    check(None, torch.where(triangle, 0.0, -1.0), keys=S + 3)
    check(None, None, rows=1)
    q, k, v = qkv()
    full = expected(q, k, v, None)[0]
    module = Module()
    torch.testing.assert_close(ours.attend(module, q, k, v, None, is_causal=False)[0], full)
    module.is_causal = False
    torch.testing.assert_close(ours.attend(module, q, k, v, None)[0], full)
    # Queries that are learned are the same ones for all.
    got = ours.attend(module, q[:1], k, v, None)[0]
    torch.testing.assert_close(got, expected(q[:1].expand(2, -1, -1, -1), k, v, None)[0])


@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize("pattern", ["causal", "blocks"])
def test_position_bias(pattern, padding):
    mask, dense = masks(pattern, PADDINGS[padding])
    q, k, v = qkv()
    bias = torch.randn(1, 4, S, S, generator=torch.Generator().manual_seed(4), dtype=torch.float32)
    bias.requires_grad_()
    got = ours.attend(Module(), q, k, v, mask, position_bias=bias)[0]
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ keys.mT / math.sqrt(8) + bias).masked_fill(dense != 0, -torch.inf)
    want = (scores.softmax(-1).nan_to_num() @ values).transpose(1, 2)
    counts = (dense == 0).any(-1).expand(2, 4, -1).transpose(1, 2)
    torch.testing.assert_close(got[counts], want[counts])
    found, wanted = (torch.autograd.grad(x[counts].sum(), bias)[0] for x in (got, want))
    torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------- packed sequences


def ends_of(positions):
    starts = (positions.flatten() == 0).nonzero().flatten().to(torch.int32)
    return torch.cat([starts, starts.new_tensor([positions.numel()])])


@pytest.mark.parametrize("name", ["causal", "window", "chunks", "blocks", "or"])
def test_packed_sequences(name, monkeypatch):
    calls = spy(monkeypatch, "attention_varlen")
    mask, dense = masks(name, None, position_ids=PACKED)
    check(mask, dense)
    assert len(calls) == (name in ("causal", "window"))
    for call in calls:
        assert call["ends"][0].equal(ends_of(PACKED)) and call["ends"][2] == 7


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_of_models(name, monkeypatch):
    """By positions that start again, and as DataCollatorWithFlattening says it to flash-attn."""
    model = make(name)
    packed, padded = spy(monkeypatch, "attention_varlen"), spy(monkeypatch)
    ids = torch.randint(3, 67, (1, S), generator=torch.Generator().manual_seed(6))
    inputs = {"input_ids": ids, "position_ids": PACKED[:1], "use_cache": False}
    counts = torch.ones(1, S, dtype=torch.bool)
    compare(model, inputs, counts)
    want = run(model, "eager", inputs, counts)[0]
    ends = ends_of(PACKED[:1])
    said = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    for more in ({}, {"use_cache": True}):  # without a cache, and with one that hides the positions
        got = run(model, "fastattn", {**inputs, **said, **more}, counts)[0]
        assert (got - want).abs().max() <= 2e-4
    assert len(packed) == 6 and not padded
    # Padding that is told as well says more; flash-attn's path, too, goes by it.
    del inputs["position_ids"]
    inputs["attention_mask"] = padding_of((4, S))
    got, want = (run(model, "fastattn", {**inputs, **x}, counts)[0] for x in (said, {}))
    assert got.equal(want) and len(packed) == 6


def test_packed_sequences_have_no_position_bias():
    q, k, v = qkv()
    mask, _ = masks("causal", None, position_ids=PACKED)
    with pytest.raises(NotImplementedError, match="`position_bias` must be None for packed"):
        ours.attend(Module(), q, k, v, mask, position_bias=torch.zeros(1, 4, S, S))


# ------------------------------------------------------------------------------ what is never made


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that an operator gives."""

    found = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.found = max(self.found, x.numel())
        return out


LONG = 320
LONG_INPUTS = {
    "causal": {},
    "left": {"attention_mask": torch.ones(1, LONG).tril(-3)[:1] + (torch.arange(LONG) > 20)},
    "right": {"attention_mask": (torch.arange(LONG) < 300)[None].long()},
    "holes": {"attention_mask": (torch.arange(LONG) % 7 > 0)[None].long()},
    "packed": {"position_ids": torch.arange(LONG)[None] % 100, "use_cache": False},
    "static": {},
}


@pytest.mark.parametrize("inputs", LONG_INPUTS)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_no_matrix_is_made(name, inputs):
    model = make(name)
    given = dict(LONG_INPUTS[inputs])
    ids = torch.randint(3, 67, (1, LONG), generator=torch.Generator().manual_seed(8))
    found = {}
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        if inputs == "static":
            cache = transformers.StaticCache(config=model.config, max_cache_len=LONG + 20)
            given = with_cache(model, cache)
        with torch.no_grad(), Largest() as largest:
            model(ids, logits_to_keep=1, **given)
        found[implementation] = largest.found
    assert found["fastattn"] < LONG * LONG <= found["eager"]


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "vit", "whisper", "t5"])
def test_attention_weights_are_refused(name):
    model = make(name)
    inputs, _ = inputs_of(name, "")
    with pytest.raises(ValueError, match="`output_attentions` must be False with fastattn"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_a_mask_for_other_keys_is_refused():
    mask, _ = masks("causal", None)
    q, k, v = qkv(S, S + 1)
    with pytest.raises(
        ValueError, match="`attention_mask` must be made for 12 queries and 13 keys"
    ):
        ours.attend(Module(), q, k, v, mask)


def test_another_name():
    ours.register("theirs")
    model = transformers.LlamaForCausalLM(make("llama").config)
    model.set_attn_implementation("theirs")
    assert model.config._attn_implementation == "theirs"
    mask = theirs.create_causal_mask(model.config, torch.empty(1, 3, 8), None, None)
    assert isinstance(mask, ours.IntervalMask)
