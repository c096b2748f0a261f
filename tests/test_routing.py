"""use_fastattn(): who is reached, who is not, and that nothing stays behind."""

import sys
import threading
import warnings

import pytest

torch = pytest.importorskip("torch")
from fastattn import _routing  # noqa: E402
from fastattn.torch import use_fastattn  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as by_name  # noqa: E402

OPERATORS = ("scaled_dot_product_attention", "_native_multi_head_attention", "linear", "bmm")


@pytest.fixture(autouse=True)
def strict():
    """Warnings are errors, and each reason may be warned of again."""
    _routing._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def slow_path():
    """torch.nn's own way without its fast paths, to compare with."""

    def run(module, *args, **keywords):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return module(*args, **keywords)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    return run


@pytest.fixture
def alone(monkeypatch):
    """Threads that libraries have left running (torch.compile does) count as gone, and with them
    what had to stay because of them."""
    running = threading.active_count
    others = running() - 1
    monkeypatch.setattr(threading, "active_count", lambda: running() - others)
    with use_fastattn():
        pass


def qkv(*shape):
    return [torch.randn(shape or (2, 4, 9, 16)) for _ in range(3)]


def tables():
    """Who answers torch's operators."""
    return [torch._C._dispatch_dump_table(f"aten::{name}") for name in OPERATORS]


def test_whoever_holds_the_function_is_reached(calls):
    q, k, v = qkv()
    want = by_name(q, k, v)
    operator = torch.ops.aten.scaled_dot_product_attention
    functions = (by_name, torch.nn.functional.scaled_dot_product_attention, operator)
    with use_fastattn("raise"):
        for n, function in enumerate(functions, 1):
            torch.testing.assert_close(function(q, k, v), want)
            assert len(calls) == n
        with torch.inference_mode():
            inside = [x.clone() for x in (q, k, v)]
            torch.testing.assert_close(by_name(*inside), want)
    assert len(calls) == 4
    assert torch.equal(by_name(q, k, v), want) and len(calls) == 4


def test_all_arguments_arrive():
    q, _, _ = qkv()
    k, v = torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 5)
    mask = torch.randn(9, 7)
    keywords = (
        {"attn_mask": mask, "scale": 0.3, "enable_gqa": True},
        {"is_causal": True, "enable_gqa": True},
        {"attn_mask": mask > 0, "enable_gqa": True},
    )
    for given in keywords:
        want = by_name(q, k, v, **given)
        with use_fastattn("raise"):
            got = by_name(q, k, v, **given)
        seen = (mask > 0).any(-1)  # torch 2.13 has NaN or 0 in other rows, as the backend likes
        torch.testing.assert_close(got[..., seen, :], want[..., seen, :])
    with use_fastattn("raise"):
        assert not by_name(q, k, v, dropout_p=1.0, enable_gqa=True).any()


def test_nothing_stays_behind(calls, alone):
    before, (q, k, v) = tables(), qkv()
    want = by_name(q, k, v)
    with use_fastattn():
        assert tables()[:2] != before[:2] and tables()[2:] == before[2:]
        assert not torch.overrides._get_current_function_mode_stack()
        with use_fastattn("raise"):
            by_name(q, k, v)
        by_name(q, k, v)  # the outer one still counts
        assert len(calls) == 2
    assert tables() == before and torch.equal(by_name(q, k, v), want)
    with pytest.raises(KeyError), use_fastattn(), use_fastattn():
        raise KeyError
    assert tables() == before and torch.equal(by_name(q, k, v), want)

    @use_fastattn()
    def decorated():
        return by_name(q, k, v)

    decorated()
    assert len(calls) == 3 and tables() == before
    with pytest.raises(ValueError, match='`fallback` must be "torch" or "raise", got \'jax\''):
        use_fastattn("jax")


def test_many_times_over():
    """Torch 2.10 miscounts references to what a thread is told: to None as well."""
    before = sys.getrefcount(_routing._route("raise", None))
    for _ in range(2000):
        with use_fastattn("raise"), use_fastattn():
            assert _routing._innermost() == ("torch", ("raise", None))
        assert _routing._innermost() is None
    assert sys.getrefcount(_routing._route("raise", None)) >= before


def in_another_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_with_is_for_one_thread_and_install_for_all(calls, alone):
    q, k, v = qkv()
    before = tables()
    with use_fastattn():
        in_another_thread(lambda: by_name(q, k, v))
        assert not calls
        by_name(q, k, v)
        assert len(calls) == 1
    routing = use_fastattn().install()
    again = use_fastattn().install()
    again.remove()
    in_another_thread(lambda: by_name(q, k, v))
    by_name(q, k, v)
    assert len(calls) == 3
    routing.remove()
    by_name(q, k, v)
    assert len(calls) == 3 and tables() == before
    with pytest.raises(ValueError, match="was not installed, or is removed already"):
        routing.remove()


def test_operators_are_not_changed_under_another_thread(alone):
    before, (q, k, v) = tables(), qkv()
    want, go = by_name(q, k, v), threading.Event()

    def leave_while_another_lives():
        with use_fastattn():
            go.wait()

    other = threading.Thread(target=leave_while_another_lives)
    with use_fastattn():
        other.start()
    go.set()
    other.join()  # the last one left while this thread lived
    assert tables() != before
    assert torch.equal(by_name(q, k, v), want)
    with use_fastattn():
        pass
    assert tables() == before


def test_what_fastattn_refuses_goes_to_torch(monkeypatch):
    q, k, v = qkv()
    refused = {"scale": float("inf")}
    with use_fastattn("raise"), pytest.raises(ValueError, match="`scale` must be finite"):
        by_name(q, k, v, **refused)
    with use_fastattn():
        with pytest.warns(UserWarning, match="torch's own attention is used here.*`scale`") as seen:
            by_name(q, k, v, **refused)
        assert seen[0].filename == __file__
        by_name(q[..., :3, :], k, v, **refused)  # the same reason
    with use_fastattn(), pytest.raises(RuntimeError):  # torch's: of both refusals the caller's own
        by_name(q, k[..., :3], v)
    with use_fastattn("raise"), pytest.raises(ValueError, match="`key` must have"):
        by_name(q, k[..., :3], v)

    def unserved(*args, **keywords):
        raise NotImplementedError("no backend serves it")

    monkeypatch.setattr(_routing, "scaled_dot_product_attention", unserved)
    with use_fastattn(), pytest.warns(UserWarning, match="no backend serves it"):  # another reason
        torch.testing.assert_close(by_name(q, k, v), torch.softmax(q @ k.mT / 4, -1) @ v)


def test_autocast(calls):
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        want = by_name(q, k, v)
        with use_fastattn("raise"):
            got = by_name(q, k, v)
    assert calls and got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, None), (None, 2, -1), (3, 0, None)])
def test_vmap(calls, dims):
    q, k, v = qkv()
    batched = [
        x if n is None else torch.stack([x, x + 0.5, -x], n)
        for x, n in zip((q, k, v), dims, strict=True)
    ]
    each = [
        [x if n is None else x.select(n, i) for x, n in zip(batched, dims, strict=True)]
        for i in range(3)
    ]
    want = torch.stack([by_name(*one) for one in each])
    with use_fastattn("raise"):
        got = torch.vmap(by_name, dims)(*batched)
    assert len(calls) == 1
    torch.testing.assert_close(got, want)


def test_vmap_of_masks_of_other_ranks_and_of_vmap(calls):
    q, k, v = qkv()
    masks = torch.randn(3, 9, 9)
    want = torch.stack([by_name(q, k, v, mask) for mask in masks])
    nested = torch.stack([want, want])
    with use_fastattn("raise"):
        got = torch.vmap(lambda mask: by_name(q, k, v, mask))(masks)
        torch.testing.assert_close(got, want)
        assert len(calls) == 1
        twice = torch.vmap(lambda v: torch.vmap(lambda m: by_name(q, k, v, m))(masks))
        torch.testing.assert_close(twice(torch.stack([v, v])), nested)
    assert len(calls) == 2


def test_vmap_draws_as_its_randomness_says(calls):
    q, k, v = (torch.randn(2, 1, 1, 64, 8) for _ in range(3))
    k, v, q = (x[:1].expand_as(x) for x in (k, v, q))

    def drop(q, k, v):
        return by_name(q, k, v, dropout_p=0.5)

    with use_fastattn("raise"):
        first, second = torch.vmap(drop, randomness="different")(q, k, v)
        assert len(calls) == 1 and not torch.equal(first, second)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its speed
            first, second = torch.vmap(drop, randomness="same")(q, k, v)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="random"):
            torch.vmap(drop)(q, k, v)


def test_vmap_of_threads_that_are_not_routed(calls):
    q, k, v = qkv(3, 2, 9, 16)
    want, got = by_name(q, k, v), []
    with use_fastattn(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its speed
        in_another_thread(lambda: got.append(torch.vmap(by_name)(q, k, v)))
    torch.testing.assert_close(got[0], want)
    assert not calls


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CAUSAL = torch.ones(5, 5).triu(1).bool()


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(calls, slow_path, batch_first):
    module = torch.nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
    x = torch.randn(2, 5, 32)
    x = x if batch_first else x.transpose(0, 1)
    for masks in (
        {},
        {"key_padding_mask": PADDING},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
        {"attn_mask": torch.randn(5, 5)},
    ):
        with torch.no_grad():
            want = slow_path(module, x, x, x, need_weights=False, **masks)[0]
            before = len(calls)
            with use_fastattn("raise"):
                got = module(x, x, x, need_weights=False, **masks)[0]
            assert len(calls) == before + 1
            torch.testing.assert_close(got, want)
    with torch.no_grad(), use_fastattn("raise"):
        weights = module(x, x, x)[1]  # torch's own: not reached, and said so
    assert weights.shape == (2, 5, 5) and len(calls) == before + 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("masks", "name"),
    [
        ({}, "scaled_dot_product_attention"),
        ({"src_key_padding_mask": PADDING}, "attention_varlen"),
        ({"mask": CAUSAL}, "scaled_dot_product_attention"),
        ({"mask": CAUSAL, "src_key_padding_mask": PADDING}, "scaled_dot_product_attention"),
        ({"mask": torch.randn(5, 5)}, "scaled_dot_product_attention"),  # torch's fast path: NaN
    ],
)
def test_transformer_encoder(calls, slow_path, masks, name):
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder, x = torch.nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 32)
    real = ~PADDING if "src_key_padding_mask" in masks else ...
    with torch.no_grad():
        want = slow_path(encoder, x, **masks)
        with use_fastattn("raise"):
            got = encoder(x, **masks)
        torch.testing.assert_close(got[real], want[real])
    assert calls == [name] * 2


def test_transformer_decoder(calls):
    layer = torch.nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
    decoder = torch.nn.TransformerDecoder(layer, 2).eval()
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    with torch.no_grad():
        want = decoder(x, memory, tgt_mask=CAUSAL)
        with use_fastattn("raise"):
            got = decoder(x, memory, tgt_mask=CAUSAL)
    torch.testing.assert_close(got, want)
    assert len(calls) == 4


def test_a_graph_made_before_is_not_reached(calls):
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: by_name(q, k, v) * 1, backend="aot_eager")
    compiled(q, k, v)
    with use_fastattn():
        compiled(q, k, v)
        assert not calls
        torch.compile(lambda q, k, v: by_name(q, k, v) * 1, backend="aot_eager")(q, k, v)
        assert calls  # what torch has kept of the operator is not asked
    calls.clear()
    torch.compile(lambda q, k, v: by_name(q, k, v) * 1, backend="aot_eager")(q, k, v)
    assert not calls


def test_transformers_sdpa(calls):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**small, **heads, attn_implementation="sdpa")
    model, ids = transformers.LlamaModel(config).eval(), torch.arange(10)[None]
    with torch.no_grad():
        want = model(ids).last_hidden_state
        with use_fastattn("raise"):
            got = model(ids).last_hidden_state
    torch.testing.assert_close(got, want)
    assert len(calls) == 2
