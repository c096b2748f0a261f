"""10,000 calls of a build with AddressSanitizer and UBSan: `python tests/sanitize.py`.

    FASTATTN_CUDA=0 FASTATTN_SANITIZE=1 python setup.py build_ext --build-lib /some/where
    LD_PRELOAD=libasan.so:libubsan.so UBSAN_OPTIONS=halt_on_error=1 python tests/sanitize.py

Random cases of every kind, a quarter of them of caches, as many of SparseK and of lists of keys,
half with their gradients, mostly without a verdict on their values (test_property.py and
test_backward.py have that), each sentence of test_errors*.py, merge_states, explain and info, on
every vector level and from several threads at once. NumPy alone: other frameworks have findings of
their own.

A second, shorter run asks LeakSanitizer about what C has allocated (test_frameworks.py counts
Python's objects). The interpreter leaves some hundred blocks at its end, so a leak counts where a
function of ours stands in its stack; that some are found shows that it looked.
"""

import os
import re
import subprocess
import sys
import threading

import cases
import fastattn
import gradient_cases
import kvcache_cases
import numpy as np
import random_cases
import sparse_cases
import sparsek_cases
from conftest import LEVELS


def small(seed):
    """The case of a seed with the sizes of a test that runs 10 times slower."""
    case = random_cases.random_case(seed)
    if case.b * case.hq * case.sq * case.sk * case.d > 10**6:
        return small(seed + 10**7)
    return case


def calls(first, count):
    for seed in range(first, first + count):
        if seed % 4 == 0:
            kvcache_cases.run(kvcache_cases.random_case(seed))
            sparsek_cases.run(sparsek_cases.random_case(seed))
            sparse_cases.run(sparse_cases.random_call(seed), poison=seed % 8 == 0)
            continue
        case = small(seed)
        if seed % 2:
            gradient_cases.call(case)
            continue
        inputs = cases.make_inputs(case)
        keywords = cases.arguments(case, inputs, cases.NumPy())
        if inputs.out:
            keywords["out"] = inputs.out.view
        function = cases.function(case)
        out, lse = function(**keywords)
        assert out.dtype == cases.dtype_of(case.dtype)
        fastattn.explain(function, **keywords)
        if case.packed:
            assert lse.shape == (case.hq, len(out))
        else:
            assert lse.shape == (case.b, case.hq, case.sq)
            fastattn.merge_states([out, out], [lse, lse], layout=case.layout)


def sentences():
    from test_errors import WRONG, a
    from test_errors_kvcache import ALL as KVCACHE_WRONG
    from test_errors_varlen import VARLEN, VARLEN_WRONG

    for exception, _, arguments in VARLEN_WRONG.values():
        try:
            fastattn.attention_varlen(**{**VARLEN, **arguments})
        except exception:
            continue
        raise AssertionError(arguments)
    for exception, arguments, _ in KVCACHE_WRONG:
        try:
            fastattn.attention_kvcache(**arguments)
        except exception:
            continue
        raise AssertionError(arguments)
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 8)}
    for exception, _, arguments in WRONG.values():
        arguments = {**shapes, **arguments}
        for name in shapes:
            if isinstance(arguments[name], tuple):
                arguments[name] = a(*arguments[name])
        try:
            fastattn.attention(**arguments)
        except exception:
            continue
        raise AssertionError(arguments)
    fastattn.info()


def places():
    """Strides out of all bounds, `out` between the elements of inputs, deleters."""
    import test_memory

    for stride in test_memory.FAR:
        for argument in ("q", "mask", "out"):
            test_memory.test_a_stride_whose_extent_no_address_has(argument, stride)
    for layout in ("bshd", "bhsd"):
        test_memory.test_out_beside_q_k_and_v_in_one_buffer("numpy", layout)
    for wrong in ("k", "v", "mask", "sink", "out"):
        test_memory.test_an_exception_is_kept_while_deleters_run(wrong, versioned=True)
    test_memory.test_strides_whose_sum_no_address_has()
    test_memory.test_out_in_other_columns_rows_and_heads()
    test_memory.test_out_between_the_bytes_of_other_dtypes()
    test_memory.test_overlap_is_what_brute_force_says()
    test_memory.test_a_ctrl_c_is_kept_while_deleters_run()


def main(count):
    failures = []

    def work(first):
        try:
            calls(first, count // 4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n * count,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    sentences()
    places()
    print(f"sanitize: {count} calls at level {fastattn.info()['cpu']['level']}", flush=True)


def leaks():
    """The blocks that nothing points to at the end and that were made under a function of ours."""
    options = "detect_leaks=1:abort_on_error=1:exitcode=0"
    environment = {
        **os.environ,
        "ASAN_OPTIONS": options,
        "FASTATTN_CPU_LEVEL": fastattn.info()["cpu"]["level"],
    }
    done = subprocess.run(
        [sys.executable, __file__, "200"], env=environment, stderr=subprocess.PIPE, text=True
    )
    found = [x for x in done.stderr.split("\n\n") if re.match(r"\w+ leak of", x.strip())]
    ours = [x for x in found if re.search(r"[ /](?:csrc/|_C\.)", x)]
    if done.returncode or ours or not found:
        sys.exit("\n\n".join(ours) or done.stderr[-4000:] or "LeakSanitizer says nothing")
    print(f"sanitize: none of {len(found)} leaks is ours")


if __name__ == "__main__":
    np.seterr(all="ignore")
    if os.environ.get("FASTATTN_CPU_LEVEL"):
        main(int(sys.argv[1]))
    else:
        levels = LEVELS[: LEVELS.index(fastattn.info()["cpu"]["level"]) + 1]
        for level in levels:
            environment = {**os.environ, "FASTATTN_CPU_LEVEL": level, "FASTATTN_NUM_THREADS": "3"}
            subprocess.run(
                [sys.executable, __file__, str(10_000 // len(levels))], env=environment, check=True
            )
        leaks()
