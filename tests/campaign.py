"""Random cases by the thousand: `python tests/campaign.py --cases 100000 --seed 0`.

With --gradients those of the backward pass, with --caches those of attention_kvcache, each without
what the backend does not declare; with --sparsek calls of sparsek and sparsek_lists and their
gradients.

Case number n of a campaign is the same on every machine: it depends on `seed + n` alone. A wrong
one is printed as the line that runs it again, and once more with as many fields at their defaults
as it takes to still fail.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import cases
import declared
import gradient_cases
import kvcache_cases
import random_cases
import sparsek_cases
from random_cases import shrink

CHUNK = 250


def check(case, framework, backend, what="cases"):
    """'' if right, else what is wrong; None if neither declared nor taken."""
    try:
        if what == "gradients":
            return "; ".join(gradient_cases.run(case, None, framework, backend))
        if what == "caches":
            return "; ".join(kvcache_cases.run(case, framework, backend=backend))
        if what == "sparsek":
            return "; ".join(sparsek_cases.run(case, framework, backend))
        return "; ".join(cases.run(case, framework, backend))
    except cases.Refused:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def framework_of(name):
    return cases.NumPy() if name == "numpy" else cases.Torch(name.partition(":")[2] or "cpu")


MODULES = {
    **{"cases": cases, "gradients": gradient_cases},
    **{"caches": kvcache_cases, "sparsek": sparsek_cases},
}


def case_of(seed, backend, what):
    if what == "sparsek":
        return sparsek_cases.random_case(seed)
    if what == "caches":
        return kvcache_cases.narrowed(kvcache_cases.random_case(seed), backend)
    case = random_cases.random_case(seed)
    return declared.narrowed(case, backend, "backward") if what == "gradients" else case


def check_range(start, stop, framework, backend, what="cases"):
    framework = framework_of(framework)
    results = (
        (seed, check(case_of(seed, backend, what), framework, backend, what))
        for seed in range(start, stop)
    )
    found = [(seed, result) for seed, result in results if result != ""]
    module = MODULES[what]
    spent, module.luck = module.luck, cases.Luck()
    return found, spent


def report(case, result, framework, backend, what="cases"):
    def crashed(said):
        return "Error: " in said

    def fails(simpler):
        said = check(simpler, framework, backend, what)
        return said and crashed(said) == crashed(result)

    small = shrink(case, fails)
    print(f"WRONG {case!r}\n  {result}", flush=True)
    if small != case:
        print(f"  smaller: {small!r}\n  {check(small, framework, backend, what)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--framework", default="numpy", help="numpy, torch or torch:cuda")
    parser.add_argument("--backend", help="cpu or sm90; default: the best that takes the arrays")
    what = parser.add_mutually_exclusive_group()
    for name in list(MODULES)[1:]:
        what.add_argument(f"--{name}", action="store_const", const=name, dest="what")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--case", help="run this one: Case(...)")
    parser.add_argument("--max-wrong", type=int, default=20, help="stop after this many")
    options = parser.parse_args()
    kind = options.what or "cases"
    if kind in ("gradients", "caches"):
        options.backend = options.backend or "cpu"
    how = options.framework, options.backend, kind

    if options.case:
        case = eval(options.case, {"Case": getattr(MODULES[kind], "Case", cases.Case)})
        result = check(case, framework_of(how[0]), *how[1:])
        print({"": "right", None: "refused"}.get(result, result))
        return int(bool(result))

    if options.jobs > 1:  # the processes share the cores; one thread each
        for name in ("FASTATTN_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(name, "1")
    print(
        f"campaign: {options.cases} {kind}, seed "
        f"{options.seed}, {options.framework}, "
        f"{options.jobs} jobs",
        flush=True,
    )
    began, done, wrong, refused, luck = time.monotonic(), 0, 0, 0, cases.Luck()
    stop = options.seed + options.cases
    fresh = multiprocessing.get_context("spawn")  # libraries count their threads when they load
    with ProcessPoolExecutor(options.jobs, fresh) as pool:
        chunks = [(s, min(s + CHUNK, stop)) for s in range(options.seed, stop, CHUNK)]
        jobs = [pool.submit(check_range, *chunk, *how) for chunk in chunks]
        for chunk, job in zip(chunks, jobs, strict=True):
            found, spent = job.result()
            luck.judged, luck.redrawn = luck.judged + spent.judged, luck.redrawn + spent.redrawn
            for seed, result in found:
                if result is None:
                    refused += 1
                    continue
                wrong += 1
                case = case_of(seed, *how[1:])
                report(case, result, framework_of(how[0]), *how[1:])
            before, done = done, done + chunk[1] - chunk[0]
            if done == options.cases or before // 10000 != done // 10000:
                print(
                    f"{done} cases, {wrong} wrong, {refused} refused, "
                    f"{time.monotonic() - began:.0f} s",
                    flush=True,
                )
            if wrong >= options.max_wrong:
                pool.shutdown(cancel_futures=True)
                break
    if luck.redrawn:
        print(f"{luck}{': too many' if luck.strained else ''}")
    return int(wrong > 0 or luck.strained)


if __name__ == "__main__":
    sys.exit(main())
