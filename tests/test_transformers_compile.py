"""fastattn.transformers in graphs of torch.compile, without a break."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.15")

import fastattn.transformers  # noqa: E402
from small_models import assert_like, inputs_of, make, one_thread, run  # noqa: E402, F401

fastattn.transformers.register()


@pytest.fixture(autouse=True)
def forget():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_training_in_one_graph(name):
    """Its lengths are symbols, and padding is only known by value: it may have holes."""
    model = make(name)
    whole, _ = inputs_of(name, "left")
    cases = []
    for columns, hole in ((12, None), (12, 7), (9, 7)):
        given = {n: x[:, -columns:].clone() for n, x in whole.items()} | {"use_cache": False}
        if hole:
            given["attention_mask"][1, hole] = 0
        cases.append((given, given["attention_mask"].bool()))
    wanted = [run(model, "eager", *case) for case in cases]
    model.set_attn_implementation("fastattn")
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend, dynamic=True)
    for case, (logits, gradients) in zip(cases, wanted, strict=True):
        assert_like(run(model, "fastattn", *case), logits, gradients)
    assert len(graphs) == 1
    assert sum(n.target is fastattn.attention for n in graphs[0].graph.nodes) == 2


def test_training_by_operators():
    """The same through AOTAutograd, which makes operators of them."""
    model = make("mistral", num_hidden_layers=1)
    given, counts = inputs_of("mistral", "left")
    given["use_cache"] = False
    wanted = run(model, "eager", given, counts)
    model.set_attn_implementation("fastattn")
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_like(run(model, "fastattn", given, counts), *wanted)


def test_a_static_cache_in_one_graph():
    """As generate() compiles decoding on a GPU by itself, told to do it here."""
    model = make("llama")
    inputs, _ = inputs_of("llama", "left")
    compiling = transformers.CompileConfig(fullgraph=True, backend="eager")
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    got = model.generate(**inputs, **options, compile_config=compiling)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    model.set_attn_implementation("eager")
    assert got.equal(model.generate(**inputs, **options))
