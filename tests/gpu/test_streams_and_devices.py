"""How a call behaves on a GPU: streams, graphs, devices, memory, errors, other frameworks."""

import itertools
import os

import declared
import fastattn
import pytest
from conftest import needs, python

import gpu
from gpu import inputs, normal, torch

pytestmark = gpu.marks

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave JAX's share to the others
CYCLES = 200_000_000  # about 0.1 s of a GPU


def arrays(seed=0):
    return inputs(2, 4, 2, 300, 300, 128, seed=seed)


# ------------------------------------------------------------------------------------------ streams


def test_runs_on_the_current_stream():
    """On a side stream whose inputs are late: a launch on any other stream would read zeros."""
    values, stream = arrays(), torch.cuda.Stream()
    q, k, v = (torch.zeros_like(x) for x in values)
    expected = fastattn.attention(*values)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        for room, value in zip((q, k, v), values, strict=True):
            room.copy_(value)
        out = fastattn.attention(q, k, v)
        assert not stream.query()  # it neither waited nor made the host wait
    stream.synchronize()
    assert torch.equal(out, expected)


def test_never_synchronises():
    q, k, v = arrays()
    fastattn.attention(q, k, v)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    fastattn.attention(q, k, v, causal=True, return_lse=True)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_two_streams_at_once():
    streams = [torch.cuda.Stream() for _ in range(4)]
    requests = [arrays(seed) for seed in range(4)]
    expected = [fastattn.attention(*request, causal=True) for request in requests]
    torch.cuda.synchronize()
    for _ in range(50):
        outs = []
        for stream, request in zip(streams, requests, strict=True):
            with torch.cuda.stream(stream):
                outs.append(fastattn.attention(*request, causal=True))
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(outs, expected, strict=True))


def test_graph_replay_equals_eager():
    """Captured once, replayed after the inputs change, twice in a row and on two streams."""
    q, k, v = arrays()
    for causal, d in [(False, 64), (True, 128)]:
        q, k, v = inputs(2, 4, 2, 300, 300, d)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = fastattn.attention(q, k, v, causal=causal, return_lse=True)
        for seed in range(1, 4):
            for room, value in zip((q, k, v), inputs(2, 4, 2, 300, 300, d, seed=seed), strict=True):
                room.copy_(value)
            out.fill_(torch.nan)
            graph.replay()
            graph.replay()
            eager, eager_lse = fastattn.attention(q, k, v, causal=causal, return_lse=True)
            assert torch.equal(out, eager) and torch.equal(lse, eager_lse)


def test_first_call_may_be_captured():
    """Nothing in a process' first call is illegal during a capture."""
    python(
        "-c",
        "import torch, fastattn\n"
        "q = torch.randn(1, 2, 128, 64, device='cuda', dtype=torch.bfloat16)\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph): out = fastattn.attention(q, q, q)\n"
        "out.fill_(torch.nan); graph.replay()\n"
        "assert torch.equal(out, fastattn.attention(q, q, q))",
    )


def test_first_call_is_quick():
    """No compiler, no network: under a second slower than the second call."""
    python(
        "-c",
        "import time, torch, fastattn\n"
        "q = torch.randn(1, 2, 128, 64, device='cuda', dtype=torch.bfloat16)\n"
        "def call():\n"
        "    torch.cuda.synchronize(); start = time.perf_counter()\n"
        "    fastattn.attention(q, q, q); torch.cuda.synchronize()\n"
        "    return time.perf_counter() - start\n"
        "first, second = call(), call()\n"
        "assert first - second < 1, (first, second)",
    )


# ------------------------------------------------------------------------------------------ devices


def test_leaves_the_current_device():
    q, k, v = arrays()
    before = torch.cuda.current_device()
    fastattn.attention(q, k, v)
    assert torch.cuda.current_device() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device():
    expected = fastattn.attention(*arrays())
    q, k, v = (x.to("cuda:1") for x in arrays())
    with torch.cuda.device(0):
        out = fastattn.attention(q, k, v)
        assert torch.cuda.current_device() == 0
    assert out.device == q.device and torch.equal(out.to("cuda:0"), expected)


def test_thread_without_a_context():
    import threading

    q, k, v = arrays()
    expected, got = fastattn.attention(q, k, v), []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: got.append(fastattn.attention(q, k, v)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(got[0], expected)


def test_arrays_of_two_devices():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="`k` must be on cuda:0"):
        fastattn.attention(q, k.cpu(), v)


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("return_lse", [False, True])
def test_allocates_outputs_and_at_most_one_workspace(return_lse):
    q, k, v = inputs(1, 4, 4, 4096, 4096, 128)
    fastattn.attention(q, k, v, return_lse=return_lse)
    torch.cuda.synchronize()

    def calls():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before, free = calls(), torch.cuda.mem_get_info()[0]
    result = fastattn.attention(q, k, v, return_lse=return_lse)
    torch.cuda.synchronize()
    assert calls() - before <= 2 + return_lse
    if "PYTEST_XDIST_WORKER" not in os.environ:  # else the others allocate too
        assert torch.cuda.mem_get_info()[0] == free  # nothing from the driver
    out = result[0] if return_lse else result
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    again = fastattn.attention(q, k, v, out=out)
    assert again is out and torch.cuda.max_memory_allocated() - held <= 2**20  # never O(sq sk)


def test_outputs_follow_record_stream():
    """An output in use on a second stream is not given away before that stream is done with it."""
    side, out = torch.cuda.Stream(), fastattn.attention(*arrays())
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
    out.record_stream(side)
    address, shape = out.data_ptr(), out.shape
    del out
    again = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    assert address not in [x.data_ptr() for x in again]
    torch.cuda.synchronize()


def test_out_of_memory_is_the_frameworks_error():
    q, k, v = inputs(1, 1, 1, 1, 8, 64)
    q = normal(2**20, 64)[None, None].expand(64, 4096, -1, -1)  # an output of 35 TB
    k, v = (x.expand(64, 4096, 8, 64) for x in (k, v))
    with pytest.raises((MemoryError, RuntimeError), match=r"(?i)memory"):
        fastattn.attention(q, k, v)
    fastattn.attention(*arrays())


# ------------------------------------------------------------------------------------------- errors


@needs("cupy")
def test_a_launch_error_is_raised_in_the_same_call():
    """A blocking stream that is being captured makes every launch on the legacy stream an error."""
    import cupy

    q, k, v = arrays()
    out = fastattn.attention(q, k, v)
    torch.cuda.synchronize()
    capturing = cupy.cuda.Stream(non_blocking=False)
    capturing.begin_capture()
    try:
        with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureImplicit"):
            fastattn.attention(q, k, v, out=out)
    finally:
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            capturing.end_capture()
    expected = fastattn.attention(q, k, v)
    torch.cuda.synchronize()
    assert torch.isfinite(expected).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_hopper_has_no_kernel_for_the_portable_backend_has(dtype):
    q, k, v = (x.to(dtype) for x in arrays())
    said = fastattn.explain(fastattn.attention, q, k, v)
    assert said.backend == "sm80" and said.kernel.startswith("sm80_fwd_f")
    with pytest.raises(NotImplementedError, match=r"sm90.*float16 and bfloat16, not float(32|64)"):
        fastattn.attention(q, k, v, backend="sm90")


def test_cpu_backend_refuses_gpu_arrays():
    with pytest.raises(NotImplementedError, match="cpu"):
        fastattn.attention(*arrays(), backend="cpu")


def test_explain_names_the_kernel_that_is_launched():
    from torch.profiler import ProfilerActivity, profile

    mask = torch.ones(512, 512, dtype=torch.bool, device="cuda").tril(7)
    changes = {}, {"softcap": 20.0}, {"mask": mask}, {"mask": mask.half()}
    changes += {"dropout_p": 0.1, "seed": 1}, {"alibi_slopes": torch.ones(4, device="cuda")}
    changes += {"return_lse": True}, {"out": None}
    for d, change in itertools.product((64, 80, 128, 256), changes):
        q, k, v = inputs(1, 4, 4, 512, 512, d)
        if "out" in change:  # rows that no copy engine takes
            change = {"out": torch.empty(1, 4, 512, d + 1, dtype=q.dtype, device="cuda")[..., :d]}
        said = fastattn.explain(fastattn.attention, q, k, v, **change)
        assert said.backend == "sm90" and said.kernel.startswith("sm90")
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            fastattn.attention(q, k, v, **change)
            torch.cuda.synchronize()
        launched = [event.name for event in recorded.events() if "mem" not in event.name.lower()]
        names = [name.partition("(")[0] for name in launched]
        assert said.kernel in names, (said.kernel, launched)


def test_info_knows_the_device():
    text = str(fastattn.info())
    assert torch.cuda.get_device_name() in text and "sm90" in text


# --------------------------------------------------------------------------------- other frameworks


@needs("cupy")
def test_cupy():
    """Arrays on CuPy's current stream, which is not torch's; the output comes from its pool."""
    import cupy

    q, k, v = (x.half() for x in arrays())
    expected = fastattn.attention(q, k, v, causal=True)
    torch.cuda.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        rooms = [cupy.zeros(x.shape, cupy.float16) for x in (q, k, v)]
        values = [cupy.from_dlpack(x) for x in (q, k, v)]
        stream.synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(CYCLES)
        for room, value in zip(rooms, values, strict=True):
            room[...] = value
        used = cupy.get_default_memory_pool().used_bytes()
        out, lse = fastattn.attention(*rooms, causal=True, return_lse=True)
        assert not stream.done
        assert cupy.get_default_memory_pool().used_bytes() > used
    assert (
        type(out) is type(q_like := rooms[0])
        and out.dtype == q_like.dtype
        and lse.dtype == cupy.float32
    )
    stream.synchronize()
    assert torch.equal(torch.from_dlpack(out), expected)


@needs("cupy")
def test_cupy_graph():
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        q, k, v = (cupy.from_dlpack(x.half().contiguous()) for x in arrays())
        out = cupy.empty_like(q)
        fastattn.attention(q, k, v, out=out)
        stream.synchronize()
        stream.begin_capture()
        fastattn.attention(q, k, v, out=out)
        graph = stream.end_capture()
        q *= 2
        out[...] = cupy.nan
        graph.launch(stream)
        eager = fastattn.attention(q, k, v)
        stream.synchronize()
        assert bool((out == eager).all())


def test_autograd_never_loses_a_gradient():
    q, k, v = (x.requires_grad_() for x in inputs(2, 4, 2, 300, 300, 256))
    if not declared.serves("sm90", "backward", d=256):
        with pytest.raises(NotImplementedError, match="sm90: it takes d and dv from 1 to "):
            fastattn.attention(q, k, v)
    assert fastattn.attention(*(x[..., :64] for x in (q, k, v))).requires_grad
    with torch.no_grad():
        assert not fastattn.attention(q, k, v).requires_grad


def test_the_drop_in_equals_torch():
    q, k, v = inputs(2, 4, 4, 300, 500, 64)
    for causal in (False, True):
        ours = fastattn.scaled_dot_product_attention(q, k, v, is_causal=causal)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=causal
        )
        assert (ours - theirs).abs().max() < 2e-2
