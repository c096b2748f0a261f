"""fastattn.transformers: models of a few thousand random weights against their own eager attention.

Logits at positions that are not padding within 2e-4, gradients of all parameters within 5e-3 of the
largest, generated tokens equal.
"""

import fastattn
import fastattn.torch
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.15")

import fastattn.transformers  # noqa: E402
from small_models import (  # noqa: E402
    DECODERS,
    MODELS,
    TEXT,
    compare,
    inputs_of,
    make,
    one_thread,  # noqa: F401
    spy,
    with_cache,
)

fastattn.transformers.register()


@pytest.fixture
def seen(monkeypatch):
    return spy(monkeypatch)


def shape_of(x):
    return tuple(x.shape) if isinstance(x, torch.Tensor) else x


CASES = [(n, padding) for n in MODELS for padding in ("", "left", "right") if n != "vit"]


@pytest.mark.parametrize(("name", "padding"), [*CASES, ("vit", "")])
def test_logits_and_gradients(name, padding, seen):
    model = make(name)
    compare(model, *inputs_of(name, padding))
    features = MODELS[name][1]
    assert features in [{n: shape_of(call.get(n)) for n in features} for call in seen]
    heads = getattr(model.config.get_text_config(), "num_key_value_heads", 4)
    assert {call["k"].shape[2] for call in seen} == {heads}  # not repeated


GENERATORS = [*DECODERS, "whisper", "t5"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generated_tokens(name, cache):
    model = make(name)
    inputs, _ = inputs_of(name, "left")
    inputs = {n: x for n, x in inputs.items() if not n.startswith("decoder")}
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    got = model.generate(**inputs, **options)
    model.set_attn_implementation("eager")
    want = model.generate(**inputs, **options)
    assert got.shape[1] >= 12 and len(got.unique()) > 4
    assert got.equal(want)


def test_several_tokens_after_a_static_cache_was_filled():
    """Neither the first nor the last tokens: where the queries lie is a tensor."""
    model = make("mistral")
    ids = torch.randint(3, 67, (2, 14), generator=torch.Generator().manual_seed(1))
    found = []
    for implementation in ("eager", "fastattn"):
        model.set_attn_implementation(implementation)
        for static in (False, True):
            cache = transformers.DynamicCache(config=model.config)
            if static:
                cache = transformers.StaticCache(config=model.config, max_cache_len=20)
            with torch.no_grad():
                parts = [
                    model(ids[:, at], **with_cache(model, cache)).logits
                    for at in (slice(0, 6), slice(6, 10), slice(10, 11), slice(11, 14))
                ]
            found.append(torch.cat(parts, 1))
    assert all((x - found[0]).abs().max() <= 2e-4 for x in found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpoints_and_dropout(reentrant, seen):
    """Masks survive torch's checkpoints, and training hands its dropout on."""
    model = make("llama").train()
    inputs, counts = inputs_of("llama", "left")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(model, inputs, counts)
    assert {call["dropout_p"] for call in seen} == {0.0}
    model = make("gpt2").train()
    model(**inputs)
    assert seen[-1]["dropout_p"] == 0.1


@pytest.mark.parametrize("alibi", [False, True])
def test_falcon_through_use_fastattn(alibi):
    """It asks torch, not transformers' registry: ALiBi is a float mask there. (Its eager attention
    adds that twice, which is why torch's is what it is compared with.)"""
    sizes = {**TEXT, "num_kv_heads": 4, "alibi": alibi, "new_decoder_architecture": False}
    config = transformers.AutoConfig.for_model("falcon", **sizes)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    inputs, counts = inputs_of("falcon", "left")
    want = model(**inputs).logits[counts]
    with fastattn.torch.use_fastattn(fallback="raise"):
        assert 0 < (model(**inputs).logits[counts] - want).abs().max() <= 2e-4


def test_a_model_that_does_not_ask_the_registry_is_refused():
    config = transformers.AutoConfig.for_model("bloom", **TEXT, n_layer=1, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    with pytest.raises(TypeError, match="does not ask transformers' AttentionInterface"):
        model(**inputs_of("bloom", "left")[0])
