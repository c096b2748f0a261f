"""Models of transformers under autocast in bfloat16, with torch's attention replaced by ours.

Each is made from a small configuration with random weights, in float32. Judged by the outputs of
the float32 model with torch's attention: ours under autocast may be off by 1.5 times what torch's
under autocast is.
"""

import fastattn
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
SPEECH = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}

MODELS = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma3_text": {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "gpt2": {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "deepseek_v3": {  # heads of 24 for q and k, of 16 for v; no experts, whose choice jumps
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "bert": {},
    "modernbert": {"local_attention": 8},
    "vit": IMAGE,
    "whisper": {**SPEECH, "num_mel_bins": 16, "max_source_positions": 32},
}


def model_and_inputs(name):
    config = transformers.AutoConfig.for_model(name, **{**TEXT, **MODELS[name]})
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(3, 128, (2, 37))
    if name == "whisper":
        return model, {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, :9] = 0  # left padding
    return model, {"input_ids": ids, "attention_mask": mask}


def outputs(model, inputs, monkeypatch, attend, low):
    """The last hidden states that count, and how often attention was called."""
    calls = 0

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        return attend(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        last = model(**inputs).last_hidden_state
    monkeypatch.undo()
    if "attention_mask" in inputs:
        last = last[inputs["attention_mask"].bool()]
    return last.double(), calls


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast(name, monkeypatch):
    model, inputs = model_and_inputs(name)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    ours = fastattn.scaled_dot_product_attention
    exact, calls = outputs(model, inputs, monkeypatch, sdpa, low=False)
    theirs, _ = outputs(model, inputs, monkeypatch, sdpa, low=True)
    got, our_calls = outputs(model, inputs, monkeypatch, ours, low=True)
    assert our_calls == calls >= 2
    allowed = 1.5 * (theirs - exact).abs().max()
    assert 0 < (got - exact).abs().max() <= allowed
    # In float32 both agree to the last digits.
    got, _ = outputs(model, inputs, monkeypatch, ours, low=False)
    assert (got - exact).abs().max() < 1e-4 * exact.abs().max()
