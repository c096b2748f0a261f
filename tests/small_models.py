"""Models of transformers with a few thousand random weights, and what they are judged by."""

import inspect

import fastattn
import pytest
import torch
import transformers

TEXT = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
LOCAL = {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**LOCAL, "query_pre_attn_scalar": 16}
SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
# By model: its configuration, and what must be among the arguments of attention(): tensors by shape
DECODERS = {
    "llama": (GROUPED, {"causal": True}),
    "mistral": ({**GROUPED, "sliding_window": 5}, {"window": (4, 0)}),
    "qwen3": (GROUPED, {"causal": True}),
    "gemma2": ({**GEMMA, "attn_logit_softcapping": 3.0}, {"window": (4, 0), "softcap": 3.0}),
    "gemma3_text": (GEMMA, {"window": (4, 0), "scale": 0.25}),
    "gpt2": ({"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"causal": True}),
    "gpt_oss": (
        {**LOCAL, "num_local_experts": 2, "num_experts_per_tok": 2},
        {"window": (4, 0), "sink": (4,)},
    ),
    "deepseek_v3": (
        {
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,  # no experts, whose choice jumps
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
        },
        {"q": (2, 12, 4, 24), "v": (2, 12, 4, 12)},
    ),
}
OTHERS = {
    "bert": ({}, {"causal": False}),
    "vit": ({"image_size": 16, "patch_size": 4, "num_channels": 3}, {"causal": False}),
    "whisper": (
        {
            **SMALL,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
        },
        {"causal": True},
    ),
    "t5": (
        {
            **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
            "decoder_start_token_id": 0,
        },
        {"mask": (1, 4, 12, 12), "scale": 1.0},
    ),
}
MODELS = {**DECODERS, **OTHERS}
KINDS = {
    "bert": transformers.AutoModelForMaskedLM,
    "vit": transformers.AutoModelForImageClassification,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
    "t5": transformers.AutoModelForSeq2SeqLM,
}


def make(name, **more):
    """A model whose attention weights are far from equal."""
    config = transformers.AutoConfig.for_model(name, **{**TEXT, **MODELS[name][0], **more})
    kind = KINDS.get(name, transformers.AutoModelForCausalLM)
    model = kind.from_config(config, attn_implementation="fastattn").eval()
    assert model.config._attn_implementation == "fastattn"
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def inputs_of(name, padding):
    """(inputs, which logits count)."""
    torch.manual_seed(7)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}, torch.ones(2, dtype=torch.bool)
    ids = torch.randint(3, 67, (2, 12))
    real = torch.ones_like(ids)
    if padding == "left":
        real[1, :5] = 0
    if padding == "right":
        real[1, 9:] = 0
    if name == "whisper":
        sound = torch.randn(2, 8, 32)
        inputs = {"input_features": sound, "decoder_input_ids": ids}
        return inputs | {"decoder_attention_mask": real}, real.bool()
    if name == "t5":
        inputs = {"input_ids": ids, "attention_mask": real, "decoder_input_ids": ids.flip(1)}
        return inputs, torch.ones_like(real).bool()
    return {"input_ids": ids} | ({"attention_mask": real} if padding else {}), real.bool()


def run(model, implementation, inputs, counts):
    """Logits that count, and the gradients of their weighted sum."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(**inputs).logits[counts]
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_like(found, want, want_gradients):
    got, gradients = found
    assert (got - want).abs().max() <= 2e-4
    assert gradients.keys() == want_gradients.keys()
    largest = max(x.abs().max() for x in want_gradients.values())
    for name, wanted in want_gradients.items():  # that of a bias of keys is 0, but for rounding
        error = (gradients[name] - wanted).abs().max()
        assert error <= 5e-3 * wanted.abs().max() + 1e-6 * largest, name


def compare(model, inputs, counts):
    want, want_gradients = run(model, "eager", inputs, counts)
    assert want.abs().max() > 1e-2
    assert_like(run(model, "fastattn", inputs, counts), want, want_gradients)


def with_cache(model, cache):
    """The argument that hands it over, by the name of this release."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads do not pay for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    fastattn.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    fastattn.set_num_threads(None)


def spy(monkeypatch, name="attention"):
    """The arguments of each call of that function of fastattn by fastattn.transformers."""
    import fastattn.transformers as ours

    calls, function = [], getattr(fastattn, name)

    def spied(q, k, v, *ends, **keywords):
        calls.append({"q": q, "k": k, "v": v, "ends": ends, **keywords})
        return function(q, k, v, *ends, **keywords)

    monkeypatch.setattr(ours, name, spied)
    return calls
