"""README and the recipes: programs run, calls are right, every cell of the matrix is so."""

import dataclasses
import functools
import json
import re
import subprocess
import sys

import declared
import fastattn
import kvcache_cases
import ml_dtypes
import numpy as np
import pytest
import reference
import reference_sparse
import reference_sparsek_attention
import sparse_cases
import sparsek_attention_cases
import sparsek_cases
from conftest import ROOT, has, needs, python

# From the sources only: an installed package brings no README.
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no source tree")

TEXTS = [path for path in (ROOT / "README.md", ROOT / ".github" / "RECIPES.md") if path.exists()]
README = TEXTS[0].read_text() if TEXTS else ""


def programs(path, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


PROGRAMS = {f"{path.stem}-{i}": text for path in TEXTS for i, text in enumerate(programs(path))}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run(name, tmp_path):
    ours = r"fastattn\.(?=jax|torch|transformers)"  # need the framework of their name
    for module in set(re.findall(rf"^(?:import|from) (?:{ours})?(\w+)", PROGRAMS[name], re.M)):
        if not has(module):
            pytest.skip(f"{module} is not installed")
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[name])
    python(program)


def test_readme_opens_with_what_it_is():
    """The limits of this version, both pictures and both commands, before any program."""
    first, commands = README.partition("## Two commands")[::2]
    for words in (
        "A CPU has gradients of everything",
        "Hopper",
        "CPU",
        "JAX",
        "benchmarks/gpu-bf16.svg",
    ):
        assert words in first
    assert "benchmarks/cpu.svg" in first
    for command in ("pip install . && python -m fastattn", "pip install '.[test]' && pytest"):
        assert command in commands.partition("```python")[0]


def test_links_lead_somewhere():
    found = 0
    names = ("README.md", ".github/CONTRIBUTING.md", ".github/RECIPES.md", "kernels/README.md")
    for name in (*names, "CHANGELOG.md", "benchmarks/RESULTS.md"):
        path = ROOT / name
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists() or (ROOT / target).exists(), f"{name}: {target}"
            found += 1
    assert found > 20


def test_variables_are_read():
    """Each environment variable that README tells of is one that the sources ask for."""
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.[ch]")]
    text = "".join(path.read_text() for path in sources)
    names = set(re.findall(r"`(FASTATTN_\w+|OMP_\w+)", README))
    assert len(names) >= 3
    for name in names:
        assert f'"{name}"' in text, name


def test_published_numbers_are_what_the_result_files_say():
    subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", "--check"], check=True)


def test_the_notebook_shows_what_it_printed_and_drew():
    """On a page that runs nothing; and nothing of the machine that ran it but what it prints."""
    path = ROOT / "benchmarks" / "sdpa_comparison.ipynb"
    text = path.read_text()
    outputs = [x for cell in json.loads(text)["cells"] for x in cell.get("outputs", ())]
    assert [output["output_type"] for output in outputs] == ["stream"] * 2 + ["display_data"] * 3
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 3
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(home|root|tmp|usr|work)/|[A-Z]:\\\\|site-packages", text)


@needs("torch")
def test_what_the_default_gets_wrong_is_right_here(tmp_path):
    said = python(ROOT / "benchmarks" / "correctness.py", "--device", "cpu")
    lines = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert lines[0][-1] == "fastattn |" and len(lines) == 8
    assert all(line[-1] == "right |" for line in lines[1:])


# --------------------------------------------------------------------------------- padded batches

N = np.array([10, 7], np.int32)
PAST = np.array([7, 4], np.int32)


def arrays(b=2, hq=4, hk=4, sq=10, sk=10, d=64, dv=None, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv or d)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def padded(side, sq=10):
    """(b, sq, sk) bool by the plain words: which keys each row of a padded causal batch sees."""
    i, j = np.arange(sq)[None, :, None], np.arange(10)[None, None, :]
    n = N[:, None, None]
    if side == "right":
        return (i < n) & (j < n) & (j <= i)
    if side == "left":
        return (j >= 10 - n) & (j <= i)
    if side == "keys":
        return np.broadcast_to(j < n, (2, sq, 10))
    return j <= i + PAST[:, None, None]  # cache


def test_the_four_right_calls():
    """As README has them, against the visible keys of each."""
    q, k, v = arrays()
    new = q[:, :, :3]
    scope = {"fastattn": fastattn, "q": q, "k": k, "v": v, "n": N, "past": PAST, "new": new}
    section = README.partition("### Padded batches")[2].partition("###")[0]
    calls = re.findall(r"^fastattn\.attention\(.*\)", section, re.MULTILINE)
    assert len(calls) == 4
    for call, side in zip(calls, ("right", "keys", "left", "cache"), strict=True):
        rows = new if side == "cache" else q
        seen = padded(side, rows.shape[2])[:, None]
        out = eval(call, scope)
        exact = reference.attention(rows, k, v, mask=np.broadcast_to(seen, (2, 4, *seen.shape[2:])))
        np.testing.assert_allclose(out, exact.out, atol=1e-6, err_msg=call)


def test_the_wrong_call_is_wrong():
    """What README warns of: the diagonal shifts by the padding."""
    q, k, v = arrays()
    wrong = fastattn.attention(q, k, v, causal=True, k_lengths=N)
    right = fastattn.attention(q, k, v, causal=True, q_lengths=N, k_lengths=N)
    assert np.abs(wrong[1, :, :7] - right[1, :, :7]).max() > 0.1
    np.testing.assert_array_equal(wrong[0], right[0])


# ------------------------------------------------------------------------------ what runs where


def computes(dtype=np.float32, hq=4, d=64, dv=None, **keywords):
    """The CPU backend computes it, and rightly."""
    q, k, v = arrays(hq=hq, hk=2, sk=13, d=d, dv=dv, dtype=dtype)
    out, lse = fastattn.attention(q, k, v, backend="cpu", return_lse=True, **keywords)
    assert reference.check(out, lse, q, k, v, **keywords) == []


def packs(**keywords):
    rng, cu = np.random.default_rng(0), np.array([0, 4, 4, 10], np.int32)
    q, k, v = (rng.standard_normal((10, 2, 64), np.float32) for _ in range(3))
    fastattn.attention_varlen(q, k, v, cu, cu, 6, 6, backend="cpu", **keywords)


def pages(**more):
    rng, cu = np.random.default_rng(0), np.array([0, 4, 4, 10], np.int32)
    q, k, v = (rng.standard_normal(shape) for shape in ((10, 2, 64), (5, 4, 2, 64), (5, 4, 2, 64)))
    table, n = np.array([[4, 0], [9, 9], [1, 2]], np.int32), np.array([8, 0, 5], np.int32)
    given = {"page_table": table, "seqused_k": n, "causal": True, "backend": "cpu", **more}
    out = fastattn.attention_varlen(q, k, v, cu, None, 6, 8, **given)
    for a, b, keys in ((0, 4, [4, 0]), (4, 10, [1, 2])):
        own = (x[keys].reshape(1, 8, 2, 64)[:, : 8 if a == 0 else 5] for x in (k, v))
        want = fastattn.attention(q[None, a:b], *own, causal=True, layout="bshd")
        assert np.array_equal(out[a:b], want[0])


def merges(dtype):
    """Parts of the keys give, merged, what all of them give."""
    q, k, v = arrays(hq=4, hk=2, sk=13, d=64, dtype=dtype)
    halves = slice(0, 6), slice(6, None)
    parts = [fastattn.attention(q, k[:, :, x], v[:, :, x], return_lse=True) for x in halves]
    want = reference.merge_states(*zip(*parts, strict=True))
    for mine, theirs in zip(fastattn.merge_states(*zip(*parts, strict=True)), want, strict=True):
        np.testing.assert_allclose(mine.astype(float), theirs.astype(float), rtol=1e-2, atol=1e-3)


def caches(**more):
    case = kvcache_cases.Case(seed=0, page_size=8, leftpad=True, **more)
    for dtype in ("float32", "bfloat16"):
        assert not kvcache_cases.run(dataclasses.replace(case, dtype=dtype), backend="cpu")


def selects():
    for case in (sparsek_cases.Case(), sparsek_cases.Case(lists=False, dtype="bfloat16")):
        assert not sparsek_cases.run(case)


def sparse():
    call = sparse_cases.random_call(3, "float32")
    results = sparse_cases.run(call, poison=False)
    given = {**call.keywords, "dout": call.dout, "dlse": call.dlse}
    assert not reference_sparse.complaints(results, *call.arrays.values(), **given)


def keeps():
    call = sparsek_attention_cases.random_call(45, "float32")
    results = sparsek_attention_cases.run(call)
    given = {**call.keywords, "dout": call.dout, "dlse": call.dlse}
    assert not reference_sparsek_attention.complaints(
        results, *call.arrays.values(), call.k, **given
    )


def grades(hk=2, dtype="float32", grade_mask=False, **keywords):
    torch = pytest.importorskip("torch")

    def normal(*shape):
        return torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True)

    arrays = [normal(1, h, 5, 16) for h in (2, hk, hk)]
    masks = [normal(5, 5)] if grade_mask else []
    given = {"mask": masks[0]} if masks else {}
    fastattn.attention(*arrays, **keywords, **given, backend="cpu").sum().backward()
    assert all(x.grad.shape == x.shape for x in (*arrays, *masks))


MASKS = [np.tri(10, 13, dtype=bool), np.random.default_rng(1).standard_normal((4, 1, 13))]
CALLS = {  # line of the matrix -> calls
    "float64 to bfloat16; any d and dv up to 512; merging parts, but of float64": [
        functools.partial(computes, np.float16),
        functools.partial(computes, ml_dtypes.bfloat16),
        functools.partial(computes, np.float64),
        functools.partial(computes, np.float32),
        *(functools.partial(computes, d=d, dv=dv) for d, dv in ((512, 512), (1, 255), (300, 8))),
        *(functools.partial(merges, t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)),
    ],
    "causal, windows of any sign, q_offset, lengths, start, bool and float masks": [
        functools.partial(computes, **keywords)
        for keywords in (
            {"causal": True},
            {"causal": "top-left"},
            {"window": (3, 0)},
            {"window": (None, 2), "causal": True},
            {"q_lengths": N, "k_lengths": N + 3, "causal": True},
            {"k_start": N - 5},
            {"causal": True, "q_offset": 3},
            {"window": (-1, 4)},
            {"window": (5, -2)},
            {"window": (5, 1), "q_offset": PAST},
            {"mask": MASKS[0]},
            {"mask": MASKS[1].astype(np.float32)},
            {"mask": MASKS[1].astype(np.float16)},
        )
    ],
    "softcap, ALiBi, sink, dropout, grouped heads, any strides, lse, packed sequences": [
        functools.partial(computes, softcap=5.0),
        functools.partial(computes, alibi_slopes=np.array([0.5, 0.25, 0.1, 0.0], np.float32)),
        functools.partial(computes, sink=np.array([0, 1, -1, 2], np.float32)),
        functools.partial(computes, dropout_p=0.5, seed=3),
        functools.partial(computes, hq=8),
        packs,
    ],
    "gradients of all the above but merging, deterministic ones too": [
        grades,
        functools.partial(grades, causal=True, q_offset=3),
        functools.partial(grades, window=(2, 1)),
        functools.partial(grades, hk=1),
        functools.partial(grades, softcap=5.0),
        functools.partial(grades, deterministic=True),
        functools.partial(grades, grade_mask=True),
        functools.partial(grades, grade_mask=True, dtype="bfloat16"),
    ],
    "d and dv above 512": [functools.partial(computes, d=576, dv=512)],
    "caches of keys: pages, new keys written, rotary positions, the mass": [
        functools.partial(caches, s_new=None),
        functools.partial(caches, rotary=8, mass=True),
    ],
    "page_table of packed sequences": [pages],
    "masks and dropout with page_table": [
        functools.partial(pages, mask=np.ones((6, 8), bool)),
        functools.partial(pages, mask=np.zeros((6, 8), np.float32)),
    ],
    "SparseK: gates, lists of the greatest keys, gradients": [selects],
    "lists of keys or key blocks, with gates, and their gradients": [sparse],
    "SparseK attention, to the keys it keeps and a window, and its gradients": [keeps],
}


BOTH = ({"dtype": "float16"}, {"dtype": "bfloat16"})
MASKED, POSITIONS = ("bool_mask", "float_mask"), ("causal", "window", "lengths")
ASKS = {  # line of the matrix -> what it asks a backend to declare, in 16 bits if it names none
    "float64 to bfloat16; any d and dv up to 512; merging parts, but of float64": (
        *({"d": d, "dv": dv} for d, dv in ((64, 64), (512, 512), (1, 256), (257, 1))),
        *({"dtype": dtype, "d": 512} for dtype in ("float64", "float32")),
        {"operation": "merge"},
        {"operation": "merge", "dtype": "float32"},
    ),
    "causal, windows of any sign, q_offset, lengths, start, bool and float masks": tuple(
        {"features": (*POSITIONS, "q_offset", mask)} for mask in MASKED
    ),
    "softcap, ALiBi, sink, dropout, grouped heads, any strides, lse, packed sequences": (
        {"features": ("softcap", "alibi", "sink", "dropout", "gqa", "lse", "varlen")},
    ),
    "gradients of all the above but merging, deterministic ones too": (
        {"operation": "backward", "features": (*POSITIONS, "q_offset", "gqa", "lse", "sink")},
        {"operation": "backward", "features": ("varlen", "softcap", "alibi", "dropout")},
        {"operation": "backward", "features": ("bool_mask",)},
        {"operation": "backward", "features": ("float_mask", "dmask")},
        {"operation": "backward", "features": ("float_mask", "dmask"), "dtype": "float32"},
        {"operation": "backward", "d": 512, "dv": 1},
        {"operation": "backward", "dtype": "float32"},
        {"operation": "backward", "dtype": "float64", "d": 512},
        {"operation": "backward", "features": ("deterministic", "varlen", "gqa", "bool_mask")},
    ),
    "d and dv above 512": ({"d": 513, "dv": 64}, {"d": 576, "dv": 512}),
    "caches of keys: pages, new keys written, rotary positions, the mass": (
        {"operation": "kvcache"},
        {"operation": "kvcache", "features": (*POSITIONS, "pages", "gqa", "lse", "sink")},
        {"operation": "kvcache", "features": ("softcap", "alibi", "batch_invariant")},
        {"operation": "kvcache", "features": ("append", "mass", "varlen", "pages")},
    ),
    "page_table of packed sequences": (
        {"features": ("pages", "varlen", *POSITIONS, "q_offset", "gqa", "lse", "sink", "softcap")},
    ),
    "masks and dropout with page_table": tuple(
        {"features": ("pages", one)} for one in (*MASKED, "dropout")
    ),
    "SparseK: gates, lists of the greatest keys, gradients": tuple(
        {"operation": name, "d": 0, "features": ("lengths", "window", "q_offset")}
        for name in ("sparsek", "sparsek_backward")
    ),
    "lists of keys or key blocks, with gates, and their gradients": (
        {"operation": "sparse"},
        {"operation": "sparse_backward"},
    ),
    "SparseK attention, to the keys it keeps and a window, and its gradients": tuple(
        {"operation": name, "features": ("window", "lengths", "q_offset", "varlen", "gqa", "sink")}
        for name in ("sparsek_attention", "sparsek_attention_backward")
    ),
}


GPUS = {"Hopper": ("sm90", "sm80"), "others": ("sm80",)}  # the backends that take their arrays


def serves(backends, what):
    """Whether one of the backends declares what a line of the matrix says."""
    asked = [two | one for one in ASKS[what] for two in BOTH]
    found = {any(declared.serves(x, **one) for x in backends) for one in asked}
    assert len(found) == 1, f"{what} is true in part"
    return found.pop()


def matrix():
    section = README.partition("### What runs where")[2].partition("##")[0]
    lines = re.findall(r"^\| (\S.*?)((?: \| (?:yes|no)){3}) \|$", section, re.MULTILINE)
    return {what: tuple(x == "yes" for x in said.split(" | ")[1:]) for what, said in lines}


def test_every_line_of_the_matrix_is_tried():
    assert set(matrix()) == set(CALLS)


@pytest.mark.parametrize("what", CALLS)
def test_the_matrix_is_true(what):
    on_cpu, *on_gpus = matrix()[what]
    for call in CALLS[what]:
        if on_cpu:
            call()
        else:
            with pytest.raises(NotImplementedError):
                call()
    found = [serves(backends, what) for backends in (("cpu",), *GPUS.values())]
    assert found == [on_cpu, *on_gpus]
