"""Continuous batching of transformers, whose keys lie in pages: through sdpa, routed here.

Of names it takes "paged|eager", "sdpa" and what has "flash" in it and is a package or a kernel of
the hub that it can load; a name registered with its AttentionInterface is neither.
"""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

import fastattn.transformers  # noqa: E402
from fastattn.torch import use_fastattn  # noqa: E402
from small_models import make, one_thread  # noqa: E402, F401

fastattn.transformers.register()
NEW = 10


def prompts():
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(3, 67, (n,), generator=rng).tolist() for n in (5, 17, 9)]


def batched(model):
    options = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    how = transformers.ContinuousBatchingConfig(
        auto_switch_to_flash=False, num_blocks=64, max_batch_tokens=64
    )
    found = model.generate_batch(
        prompts(), generation_config=options, continuous_batching_config=how, progress_bar=False
    )
    return [list(request.generated_tokens) for request in found.values()]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_tokens_are_those_of_one_by_one(name, calls):
    model = make(name)
    model.set_attn_implementation("sdpa")
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = [model.generate(torch.tensor([x]), **options)[0, len(x) :].tolist() for x in prompts()]
    assert not calls
    routing = use_fastattn("raise").install()  # it generates in a thread of its own
    try:
        assert batched(model) == wanted
    finally:
        routing.remove()
    assert len(calls) >= 2 * NEW and len({x for row in wanted for x in row}) > 8


def test_a_registered_name_is_not_taken():
    with pytest.raises(ValueError, match="fastattn is not supported for continuous batching"):
        batched(make("llama"))
