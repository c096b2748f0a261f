"""Declared support: the C code refuses what is not declared, and nothing else."""

import ctypes
import itertools
import shutil
import subprocess

import declared
import fastattn
import numpy as np
import pytest
from cases import arguments, function, make_inputs
from conftest import ROOT
from random_cases import random_case

LINES = [(b, o) for b, line in fastattn.info()["support"].items() for o in line]
FEATURES = fastattn.info()["support"]["cpu"]["forward"]["features"]  # the CPU has all of them
DTYPES = ("float64", "float32", "float16", "bfloat16")  # in the order of fa_dtype, from 1 on

SHIM = r"""
#include "support.h"
int32_t check(const char *backend, const char *operation, int dtype, uint32_t features, int32_t d,
              int32_t dv, char *text) {
    fa_error why = {""};
    const fa_demand demand = {(fa_dtype)dtype, features, d, dv};
    for (int32_t i = 0; i < FA_SUPPORT_COUNT; i++)
        if (!strcmp(fa_support_table[i].backend, backend) &&
            !strcmp(fa_support_table[i].operation, operation)) {
            const fa_status status = fa_check_support(i, &demand, &why);
            strcpy(text, why.text);
            return status;
        }
    return -1;
}
uint32_t demand(int flags, int left, int right, int lengths, int cu, int mask, double softcap,
                int alibi, int sink, double p, int hq, int hk, int hv, int dv, int lse,
                int invariant, int deterministic, int dmask, int append, int mass) {
    static int32_t x;
    static float f;
    fa_backward b = {.deterministic = deterministic};
    fa_params r = {.masks = {.flags = (uint32_t)flags, .left = left, .right = right}};
    r.what.hq = hq, r.what.hk = hk, r.what.hv = hv, r.what.d = 64, r.what.dv = dv;
    r.what.batch_invariant = invariant;
    if (lengths & 1) r.masks.q_lengths = &x;
    if (lengths & 2) r.masks.k_lengths = &x;
    if (lengths & 4) r.masks.k_start = &x;
    if (lengths & 8) r.masks.q_offset = &x;
    if (cu & 1) r.varlen.cu_q = &x;
    if (cu & 2) r.varlen.cu_k = &x;
    if (cu & 4) r.pages.table = &x;
    if (mask) r.scores.mask.data = &x, r.scores.mask_dtype = (fa_dtype)mask;
    r.scores.softcap = softcap;
    if (alibi) r.scores.alibi_slopes = &f;
    if (sink) r.scores.sink = &f;
    if (lse) r.what.lse.data = &x;
    r.dropout.p = p;
    b.forward = r;
    if (dmask) b.dmask.data = &x;
    fa_kvcache c = {.forward = r, .s_new = append};
    if (mass) c.mass.data = &x;
    if (append || mass) return fa_kvcache_demand(&c).features;
    if (!deterministic && !dmask) return fa_forward_demand(&r).features;
    return fa_backward_demand(&b).features;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("cc") or not (ROOT / "csrc").exists():
        pytest.skip("needs the sources and a C compiler")
    folder = tmp_path_factory.mktemp("support")
    (folder / "shim.c").write_text("#include <string.h>\n" + SHIM)
    sources = [folder / "shim.c", *sorted((ROOT / "csrc").glob("[!d]*.c"))]  # but dispatch.c
    command = ["cc", "-std=c11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-lm"]
    target = folder / "support.so"
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", *sources, "-o", target], check=True)
    made = ctypes.CDLL(str(target))
    made.demand.restype = ctypes.c_uint32
    return made


@pytest.mark.parametrize(("backend", "operation"), LINES)
def test_what_is_not_declared_is_refused_with_its_name(library, backend, operation):
    """Every dtype, head sizes on both sides of each end, no feature, each one, and each two."""
    text = ctypes.create_string_buffer(512)
    sizes = [(0, 0), (1, 1), (64, 64), (256, 256), (257, 257), (64, 300), (300, 64)]
    sets = [x for n in range(3) for x in itertools.combinations(range(len(FEATURES)), n)]
    refused = 0
    for (n, dtype), (d, dv), bits in itertools.product(enumerate(DTYPES, 1), sizes, sets):
        names = {FEATURES[i] for i in bits}
        if (d == dv) == ("dv" in names):
            continue  # no such request
        want = declared.refusal(backend, operation, dtype=dtype, d=d, dv=dv, features=names)
        mask = sum(1 << i for i in bits)
        status = library.check(backend.encode(), operation.encode(), n, mask, d, dv, text)
        assert (status == 0) == (want is None), (dtype, d, dv, names, text.value)
        if want in DTYPES:
            assert f"not {want}" in text.value.decode()
        if want == "head size":
            assert f"d = {d} and dv = {dv}" in text.value.decode()
        refused += want is not None
    complete = backend == "cpu" and operation in ("forward", "kvcache")  # all that there is
    assert refused == 0 if complete else refused > 0


BARE = dict(flags=0, left=0, right=0, lengths=0, cu=0, mask=0, softcap=0.0, alibi=0, sink=0)
BARE |= dict(p=0.0, hq=4, hk=4, hv=4, dv=64, lse=0, invariant=0, deterministic=0, dmask=0)
BARE |= dict(append=0, mass=0)
LEFT, RIGHT, OFFSET = 1, 2, 4
DEMANDS = [
    ({}, set()),
    ({"flags": RIGHT}, {"causal"}),
    ({"flags": RIGHT | OFFSET}, {"causal", "q_offset"}),
    ({"flags": RIGHT, "right": 3}, {"window"}),
    ({"flags": RIGHT, "right": -3}, {"window"}),
    ({"flags": LEFT}, {"window"}),
    ({"flags": LEFT | RIGHT, "left": 9}, {"causal", "window"}),
    ({"right": 5, "left": 5}, set()),
    *(({"lengths": bit}, {"lengths"}) for bit in (1, 2, 4)),
    ({"lengths": 8}, {"q_offset"}),
    ({"cu": 1 | 2}, {"varlen"}),
    ({"cu": 1}, {"varlen", "pages"}),
    ({"cu": 1 | 4}, {"varlen", "pages"}),
    ({"cu": 4}, {"pages"}),
    ({"mask": 5}, {"bool_mask"}),
    *(({"mask": dtype}, {"float_mask"}) for dtype in (1, 2, 3, 4)),
    ({"softcap": 1e-300}, {"softcap"}),
    ({"alibi": 1}, {"alibi"}),
    ({"sink": 1}, {"sink"}),
    ({"p": 1e-9}, {"dropout"}),
    ({"hk": 2, "hv": 2}, {"gqa"}),
    ({"hv": 2}, {"gqa", "kv_heads"}),
    ({"dv": 65}, {"dv"}),
    ({"lse": 1}, {"lse"}),
    ({"invariant": 1}, {"batch_invariant"}),
    ({"deterministic": 1, "lse": 1}, {"deterministic", "lse"}),
    ({"mask": 2, "dmask": 1}, {"float_mask", "dmask"}),
    ({"append": 1}, {"append"}),
    ({"mass": 1, "lse": 1}, {"mass", "lse"}),
]


@pytest.mark.parametrize(("change", "want"), DEMANDS)
def test_what_a_request_asks_for(library, change, want):
    values = [ctypes.c_double(v) if isinstance(v, float) else v for v in (BARE | change).values()]
    got = library.demand(*values)
    assert {name for i, name in enumerate(FEATURES) if got >> i & 1} == want


def test_every_feature_is_asked_for_by_some_request():
    assert set().union(*(want for _, want in DEMANDS)) == set(FEATURES)


def test_a_backend_takes_what_it_declares_and_no_more(place):
    """explain() of 300 random calls; on a GPU some are refused, on the CPU none."""
    framework, backend = place
    for seed in range(300):
        case = random_case(seed)
        given = arguments(case, make_inputs(case, not framework.flips), framework)
        said = fastattn.explain(function(case), **given, backend=backend)
        why = declared.refusal(backend, **declared.of_case(case))
        assert said.backend == (None if why else backend), f"{case}: {why}, {said}"


def test_declared_head_sizes_have_variants():
    """Each dtype has a variant of the largest heads for all ways to load and both kinds; none has
    one of larger heads, or of another dtype."""
    gpu_host = pytest.importorskip("gpu_host")
    line = fastattn.info()["support"]["sm90"]["forward"]
    dtypes = {{"float16": "FA_F16", "bfloat16": "FA_BF16"}[name] for name in line["dtypes"]}
    ways = [*((load, 0) for load in gpu_host.LOADS), ("FA_BOXES", 1), ("FA_STRIDED", 1)]
    for dtype, way in itertools.product(dtypes, ways):
        sizes = {
            (v["d"], v["dv"])
            for v in gpu_host.VARIANTS
            if (v["dtype"], v["loads"], v["general"]) == (dtype, *way)
        }
        assert max(sizes) == (line["d"][1], line["d"][1]), (dtype, way)
    assert {v["dtype"] for v in gpu_host.VARIANTS} == dtypes


def test_declared_gradients_have_variants():
    """Each dtype has a variant of the largest heads for all ways to load and both kinds; none has
    another's."""
    gpu_host = pytest.importorskip("gpu_host")
    line = fastattn.info()["support"]["sm90"]["backward"]
    variants = [v for v in gpu_host.EVERY_VARIANT if v.name.startswith("sm90_bwd_")]
    dtypes = {{"float16": "FA_F16", "bfloat16": "FA_BF16"}[name] for name in line["dtypes"]}
    for way in itertools.product(dtypes, (0, 1), (0, 1)):
        sizes = {
            (v["d"], v["dv"]) for v in variants if (v["dtype"], v["strided"], v["general"]) == way
        }
        assert max(sizes) == (line["d"][1], line["d"][1]), way
    assert {v["dtype"] for v in variants} == dtypes


def test_a_refusal_reaches_the_caller():
    """By the one way there is: a dtype, and a device, that no backend declares for the call."""
    x = np.ones((1, 2, 3, 8), np.float32)
    said = fastattn.explain(fastattn.attention, x, x, x)
    assert said.backend == "cpu" and said.kernel.startswith("cpu_")
    for name in fastattn.info()["backends"][:-1]:
        assert said.reasons[name] == "the arrays are on the CPU"
