"""fastattn.bench.chunked and generate: what they call, on the CPU; no time is taken. And who runs
the suite decode."""

import pytest
from conftest import needs
from fastattn.bench import chunked, cli, generate


@needs("torch")
@pytest.mark.parametrize("singles", [0, 3])
@pytest.mark.parametrize("page", [1, 8, 64])
def test_one_call_says_what_two_say(singles, page):
    import torch

    step = chunked.Step(2, 20, singles, 50, hq=4, hk=2, d=16, page=page)
    calls = chunked.calls_of(torch, step, "cpu")
    assert chunked.check(torch, calls) < 1e-2
    assert torch.equal(calls["prompts"](), calls["paged prompts"]())
    calls["prompts"] = lambda: calls["paged prompts"]() + 1
    assert chunked.check(torch, calls) > 0.1


def test_what_is_printed_of_a_step():
    us = {"together": 3.0, "prompts": 2.0, "paged prompts": 2.5, "singles": 0.5}
    row = {"label": "step", "us": us, "error": 0.0, "x apart": 1.2, "x paged": 1.0}
    assert [*chunked.lines([row])][1][1:7] == ["3.0", "2.0", "2.5", "0.5", "1.200", "1.000"]


@needs("torch")
@needs("transformers")
def test_all_ways_say_the_same_tokens():
    import torch

    shape = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "inner": 96, "words": 100}
    config = generate.Config(b=2, start=24, tokens=6, **shape)
    with torch.inference_mode():
        ways = generate.Ways(torch, config, "cpu")
        ways.model.float()  # no token hangs on a rounding
        word = ways.fill(torch.randint(config.words, (config.b, config.start)))
        said = {way: ways.say(way, word) for way in ("fastattn", "sdpa", "direct")}
    for way in ("sdpa", "direct"):
        assert generate.agreement(said["fastattn"], said[way]) == (12, 12)


@needs("torch")
def test_tokens_agree_up_to_the_first_that_differs():
    import torch

    a, b = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 9, 3], [4, 5, 6]])
    assert generate.agreement(a, b) == (4, 6)


@pytest.mark.parametrize("gpu", [False, True])
def test_one_suite_for_both_devices(gpu, monkeypatch):
    called = []
    monkeypatch.setattr(cli, "gpu_usable", lambda: gpu)
    for module in (cli.decode, cli.serving):
        monkeypatch.setattr(module, "main", lambda more, module=module: called.append(module))
    assert cli.main(["--suite", "decode"]) == 0
    assert called == [cli.serving if gpu else cli.decode]
