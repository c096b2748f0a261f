"""Everything that needs a GPU, in one call: tests, the memory checker, benchmarks.

    python benchmarks/gpu_run.py build                        # here: a machine with nvcc, no GPU
    python benchmarks/gpu_run.py run --out results            # there: a GPU, no compiler

`build` compiles the module in place and stores a copy under build/gpu/NAME.so; copies of several
variants can lie there side by side. `run` needs the sources' Python files and those modules, no
more. Each part runs under its own time limit and writes its own log, so that one that hangs costs
the others nothing:

    smoke     python -m fastattn, and a few calls of every variant; what fails ends the run
    tests     pytest -m gpu
    sanitize  compute-sanitizer's four tools over one small case per variant and feature, dealt
              to several processes, as many at once as there are CPUs
    campaign  random cases against the reference, forward and backward: tests/campaign.py
    correctness, merge, grid, shapes, features
              benchmarks/correctness.py, merging beside a copy, and the suites of the benchmark, in
              parts of a few minutes; each writes NAME-PART.json: moved into benchmarks/results/ as
              DATE-CARD-PART.json they
              are what report.py makes the tables and pictures of
    mutants   tests/mutants.py --gpu: faults planted in device code, of which a GPU test must fail;
              it builds with nvcc, and only if --parts names it
    bench     python benchmarks, with the arguments in --bench; only if --parts names it

On 16 CPUs tests and sanitizers take 200 to 270 s, 36,000 cases 40. For the results alone:
`--parts correctness,merge,grid,shapes,features --commit COMMIT --peers ...`.

`run --module a=build/gpu/a.so --module b=build/gpu/b.so` repeats the parts for each module.
Archives named by --peers (.tar.xz, .whl) are unpacked once and put on the path, after our own.
"""

import argparse
import concurrent.futures
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fastattn"
STORE = ROOT / "build" / "gpu"
SUITES = {  # part -> arguments of the benchmark
    "grid": "--suite gpu-bf16 --peers cudnn,fa3,fa4",
    "shapes": "--suite gpu-origin --suite gpu-heads --suite gpu-gqa --suite gpu-varlen"
    " --suite gpu-scores --suite gpu-window --peers cudnn,fa3,fa4",
    "features": "--suite gpu-mask --suite gpu-host --suite gpu-fp16 --suite gpu-hostile"
    " --suite gpu-short --suite gpu-sustained --peers cudnn,fa3,sdpa,efficient",
}
# Parts of our kernels' names: what another kernel writes initcheck does not see.
KERNELS = ("sm90", "bwd_", "merge_", "list_tiles", "pack_mask", "write_")
SECONDS = {  # part -> its time limit
    "smoke": 60,
    "tests": 240,
    "sanitize": 300,
    "campaign": 300,
    "correctness": 60,
    "merge": 90,
    "jax": 120,
    "mutants": 560,
    **dict.fromkeys([*SUITES, "bench"], 400),
}
TOOLS = ("racecheck", "initcheck", "synccheck", "memcheck")  # the slowest first


def build(options):
    """Compiles in place and stores a copy."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True
    )
    STORE.mkdir(parents=True, exist_ok=True)
    target = STORE / f"{options.name}.so"
    shutil.copy2(module_in(PACKAGE), target)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.1f} MB")


def module_in(package):
    found = sorted(package.glob("_C*.so"))
    if not found:
        sys.exit(f"no module in {package}; build first")
    return found[0]


def assemble(name, module, work):
    """A package made of the sources' Python files and one module, on a path of its own."""
    package = work / name / "fastattn"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy2(module, package / "_C.abi3.so")
    return package.parent


def unpack(archives, work):
    """Peers' archives into one folder; each once, for unpacking 300 MB takes seconds."""
    site = work / "peers"
    for archive in map(Path, archives):
        done = site / f".{archive.name}"
        if done.exists():
            continue
        site.mkdir(parents=True, exist_ok=True)
        if archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(site)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(site, filter="fully_trusted")
        done.touch()
    return site


def run_part(command, log, seconds, environment):
    """Runs with a log and a time limit; the whole process group ends with it. Returns a summary."""
    start = time.perf_counter()
    with open(log, "w") as output:
        output.write(f"$ {shlex.join(map(str, command))}\n")
        output.flush()
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = f"stopped after {seconds:.0f} s"
    return code, time.perf_counter() - start


def sanitizer():
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    return next((place for place in places if place and Path(place).exists()), None)


def commands(part, options, out, name):
    """(label, command) of a part; the labels name the logs."""
    python, cases = (
        [sys.executable, "-X", "faulthandler"],
        ROOT / "tests" / "gpu" / "small_calls.py",
    )

    def result_of(part):
        commit = ["--commit", options.commit] if options.commit else []
        return ["--json", out / f"{name}-{part}.json", *commit]

    if part == "smoke":
        yield "hello", [*python, "-m", "fastattn"]
        yield "smoke", [*python, cases, "--smoke"]
    elif part == "tests":
        flags = shlex.split("-m pytest -m gpu -q -rsx --durations=8")
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        yield "tests", [*python, *flags, *workers, ROOT / "tests", *shlex.split(options.pytest)]
    elif part == "sanitize":
        ours = " ".join(f"--kernel-name kernel_substring={x}" for x in KERNELS)
        flags = shlex.split(f"--error-exitcode 99 {ours} --tool")
        for tool in options.tools.split(",") if sanitizer() else []:
            for i in range(options.shards):
                part = ["--part", f"{i}/{options.shards}"]
                yield f"{tool}-{i}", [sanitizer(), *flags, tool, *python, cases, *part]
    elif part == "campaign":
        flags = shlex.split("--framework torch:cuda --backend sm90")
        script = ROOT / "tests" / "campaign.py"
        yield (
            "campaign",
            [*python, script, *flags, "--seed", options.seed, "--cases", options.cases],
        )
        flags += ["--gradients", "--cases", options.gradients]
        yield "gradients", [*python, script, *flags, "--seed", options.seed]
    elif part == "correctness":
        yield part, [*python, ROOT / "benchmarks" / "correctness.py", *result_of(part)]
    elif part == "mutants":
        yield part, [*python, ROOT / "tests" / "mutants.py", "--gpu", "--jobs", "3"]
    elif part in ("merge", "jax"):
        yield part, [*python, "-m", f"fastattn.bench.{part}", *result_of(part)]
    else:
        chosen = shlex.split(f"--timings 20 --warmup 0.1 {SUITES.get(part, options.bench)}")
        yield part, [*python, ROOT / "benchmarks", *chosen, *result_of(part)]


def run_all(part, options, out, name, seconds, environment):
    """The commands of one part, as many at once as there are CPUs. Prints each log's end; returns
    whether all was well."""
    listed = [
        (out / f"{name}-{label}.log", command)
        for label, command in commands(part, options, out, name)
    ]

    end = time.perf_counter() + seconds

    def one(item):
        return run_part(item[1], item[0], max(end - time.perf_counter(), 0), environment)

    fine = bool(listed)  # the sanitizer may be missing
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for (log, _), (code, took) in zip(listed, pool.map(one, listed), strict=True):
            lines = log.read_text(errors="replace").splitlines()
            print(f"==== {log.stem}: {code or 'ok'}, {took:.0f} s")
            print("\n".join(lines[-options.tail :]), flush=True)
            fine &= code == 0
    return fine


def run(options):
    out, work = Path(options.out).resolve(), Path(options.work).resolve()
    out.mkdir(parents=True, exist_ok=True)
    modules = dict(text.split("=", 1) for text in options.module)
    site = unpack(options.peers, work)
    dsl = site / "nvidia_cutlass_dsl" / "dsl_packages"  # a .pth file would add it in site-packages
    fine, deadline = True, time.perf_counter() + options.seconds

    for name, module in (modules or {"fastattn": module_in(PACKAGE)}).items():
        paths = [assemble(name, module, work), site, dsl, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
            "PYTHONUNBUFFERED": "1",
            "FASTATTN_TEST_GPU": "1",  # tests without a GPU fail, and are not skipped
        }
        for part in options.parts.split(","):
            left = min(getattr(options, f"{part}_seconds"), deadline - time.perf_counter())
            alone = part in (*SUITES, "bench", "correctness", "merge", "jax")
            threads = None if alone else "2" if part == "tests" else "1"  # of one among many
            many = {"OMP_NUM_THREADS": threads} if threads else {}
            if left < 5:
                print(f"==== {name}-{part}: no time left")
                fine = False
            elif not run_all(part, options, out, name, left, environment | many):
                fine = False
                if part == "smoke":
                    break
    sys.exit(not fine)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)

    verb = verbs.add_parser("build", help="compile, and store the module under build/gpu")
    verb.add_argument("--name", default="fastattn", help="of this variant")
    verb.set_defaults(verb=build)

    verb = verbs.add_parser("run", help="tests, sanitizer and benchmarks on this machine's GPU")
    verb.add_argument("--out", required=True, help="folder for logs and results")
    verb.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="(repeats) default: in place",
    )
    verb.add_argument(
        "--peers", nargs="*", default=[], metavar="ARCHIVE", help="wheels or tar files of peers"
    )
    parts = ",".join(part for part in SECONDS if part not in ("bench", "mutants"))
    verb.add_argument("--parts", default=parts, help="default: %(default)s")
    verb.add_argument(
        "--tools", default=",".join(TOOLS), help="of the sanitizer; default: %(default)s"
    )
    verb.add_argument(
        "--shards", type=int, default=14, help="processes a tool, each with some of the variants"
    )
    verb.add_argument("--cases", type=int, default=36_000, help="of the campaign")
    verb.add_argument("--gradients", type=int, default=20_000, help="cases of their campaign")
    verb.add_argument("--seed", type=int, default=0, help="of the campaign's first case")
    verb.add_argument("--pytest", default="", help="more arguments for pytest")
    verb.add_argument("--bench", default="", help="arguments of the part bench")
    verb.add_argument("--commit", help="of the sources, to be recorded in the results")
    verb.add_argument("--work", default=ROOT / "build" / "gpu-run", help="scratch folder")
    verb.add_argument(
        "--seconds", type=float, default=580, help="for everything; default: %(default)s"
    )
    for part, seconds in SECONDS.items():
        verb.add_argument(
            f"--{part}-seconds", type=float, default=seconds, help="default: %(default)s"
        )
    verb.add_argument("--tail", type=int, default=25, help="lines of each log to print")
    verb.set_defaults(verb=run)

    options = parser.parse_args()
    options.verb(options)


if __name__ == "__main__":
    main()
