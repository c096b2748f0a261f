"""torch.compile with its own code generator: one program for all batch sizes, and its gradients."""

import shutil

import fastattn
import pytest

torch = pytest.importorskip("torch")


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_one_program_and_its_gradients(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")

    def loss(q, k, v):
        out = fastattn.scaled_dot_product_attention(1.5 * q, k, v, is_causal=True)
        return (out + 1).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for b in (3, 6, 7):  # no size equals another
        tensors = [torch.randn(b, 4, 5, 8, requires_grad=True) for _ in range(3)]
        want = torch.autograd.grad(loss(*tensors), tensors)
        with torch.compiler.set_stance("fail_on_recompile" if b > 3 else "default"):
            found = torch.autograd.grad(compiled(*tensors), tensors)
        for x, y in zip(found, want, strict=True):
            torch.testing.assert_close(x, y)
