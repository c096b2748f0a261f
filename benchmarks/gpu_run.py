"""Everything that needs a GPU, in one call: tests, the memory checker, benchmarks.

    python benchmarks/gpu_run.py build                        # here: a machine with nvcc, no GPU
    python benchmarks/gpu_run.py run --out results            # there: a GPU, no compiler

`build` compiles the module in place and stores a copy under build/gpu/NAME.so; copies of several
variants can lie there side by side. `run` needs the sources' Python files and those modules, no
more. Each part runs under its own time limit and writes its own log, so that one that hangs costs
the others nothing. What comes back are few files: a-report.txt has what was printed, the tests' log
and of every log that failed what says why; b-all.tar.gz all logs and results; and the results:

    smoke     python -m fastattn, and a few calls of every variant; what fails ends the run
    tests     pytest -m gpu
    sanitize  compute-sanitizer's four tools over one small case per variant and feature, dealt
              to several processes, as many at once as there are CPUs; the first that finds a fault
              ends the others of its tool
    campaign  random cases against the reference, forward and backward: tests/campaign.py
    correctness, merge, grid, shapes, features
              benchmarks/correctness.py, merging beside a copy, and the suites of the benchmark, in
              parts of a few minutes; each writes NAME-PART.json: moved into benchmarks/results/ as
              DATE-CARD-PART.json they
              are what report.py makes the tables and pictures of
    compile   FlashAttention-4's kernels for these parts, each of which takes seconds, on all CPUs
              at once, into a cache that what follows reads
    backward-a, backward-b, backward-c, llama
              the same of gradients: the grid; float16, determinism, host time; the origin's shapes
              and everything special; a training step. An archive with FlashAttention-3's library
              has dew_flash_attn/libdew_flash_attn3.so in it. All of these only if --parts names
              them
    mutants   tests/mutants.py --gpu: faults planted in device code, of which a GPU test must fail;
              it builds with nvcc, and only if --parts names it
    bench     python benchmarks, with the arguments in --bench; only if --parts names it

On 16 CPUs tests and sanitizers take 200 to 270 s, 36,000 cases 40. For the results alone:
`--parts correctness,merge,grid,shapes,features --commit COMMIT --peers ...`; of gradients
`--parts smoke,compile,backward-a`, then each other part alone, under 300 s.

`run --module a=build/gpu/a.so --module b=build/gpu/b.so` repeats the parts for each module.
Archives named by --peers (.tar.xz, .whl) are unpacked once and put on the path, after our own.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

SPARED = "stopped, for another one failed"
ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fastattn"
STORE = ROOT / "build" / "gpu"
SUITES = {  # part -> arguments of the benchmark
    "grid": "--suite gpu-bf16 --peers cudnn,fa3,fa4",
    "shapes": "--suite gpu-origin --suite gpu-heads --suite gpu-gqa --suite gpu-varlen"
    " --suite gpu-scores --suite gpu-window --peers cudnn,fa3,fa4",
    "features": "--suite gpu-mask --suite gpu-host --suite gpu-fp16 --suite gpu-hostile"
    " --suite gpu-short --suite gpu-sustained --peers cudnn,fa3,sdpa,efficient",
    "backward-a": "--suite gpu-backward --peers cudnn,fa4,fa3-lib",
    "backward-b": "--suite gpu-backward-fp16 --suite gpu-backward-deterministic"
    " --suite gpu-backward-host --peers cudnn,sdpa",
    "backward-c": "--suite gpu-backward-origin --suite gpu-backward-gqa --suite gpu-backward-mask"
    " --suite gpu-backward-scores --suite gpu-backward-window --suite gpu-backward-varlen"
    " --peers cudnn,fa4,fa3-lib,jax.nn,flex",
}
COMPILED = (  # cells that make FlashAttention-4 compile what the parts of the backward pass need
    *(f"gpu-backward s512 d{d} {mask}" for d in (64, 128, 256) for mask in ("full", "causal")),
    *(f"gpu-backward-gqa s4096 {mask}" for mask in ("full", "causal")),
    *(f"gpu-backward-scores {change}" for change in ("softcap", "sink")),
    *("gpu-backward-window window", "gpu-backward-varlen causal"),
)
ALONE = (*SUITES, "bench", "correctness", "merge", "jax", "llama")  # with all threads
# Parts of our kernels' names: what another kernel writes initcheck does not see.
KERNELS = ("sm80", "sm90", "bwd_", "kvcache_", "merge_", "sparse", "gather_", "list_tiles")
KERNELS += ("pack_mask", "write_")
SECONDS = {  # part -> its time limit
    "smoke": 60,
    "tests": 240,
    "sanitize": 300,
    "campaign": 300,
    "correctness": 60,
    "merge": 90,
    "jax": 120,
    "mutants": 560,
    **{part: 290 if part.startswith("backward") else 400 for part in (*SUITES, "bench")},
    "llama": 120,
    "compile": 200,
}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# By themselves, or where there is time for more than what a change needs
EXTRA = (
    "bench",
    "mutants",
    "compile",
    "llama",
    *(part for part in SUITES if part.startswith("backward")),
)
# Lines of a log that say what failed, and where
TELLING = re.compile(r"={9} |FAILED|ERROR|E {3}|\S*(Error|Exception)\b|! |Fatal|assert")


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


def run_part(command, log, end, environment, failed):
    """Runs with a log until the time `end`, or until the event `failed`, which it sets if it fails
    itself; the whole process group ends with it. Returns a summary."""
    start = time.perf_counter()
    if failed.is_set():
        log.write_text("")
        return SPARED, 0.0
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
        code = None
        while code is None:
            if failed.is_set() or time.perf_counter() > end:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = SPARED if failed.is_set() else f"stopped after {end - start:.0f} s"
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.2)
    if code:
        failed.set()
    return code, time.perf_counter() - start


def telling(text, most=40):
    """Of a log the lines that say what failed, else its last."""
    lines = [line[:300] for line in text.splitlines()]
    return [line for line in lines if TELLING.match(line.lstrip("> "))][:most] or lines[-most:]


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
        flags = shlex.split(f"--error-exitcode 99 --print-limit 5 {ours} --tool")
        for tool in options.tools.split(",") if sanitizer() else []:
            for i in range(options.shards):
                part = ["--part", f"{i}/{options.shards}"]
                part += shlex.split(options.calls)
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
    elif part == "compile":
        flags = shlex.split("--peers fa4 --timings 20 --warmup 0")
        for i, text in enumerate(COMPILED):
            suite, _, words = text.partition(" ")
            chosen = ["--suite", suite, "--filter", words]
            yield f"{part}-{i}", [*python, ROOT / "benchmarks", *chosen, *flags]
    elif part == "correctness":
        yield part, [*python, ROOT / "benchmarks" / "correctness.py", *result_of(part)]
    elif part == "mutants":
        yield part, [*python, ROOT / "tests" / "mutants.py", "--gpu", "--jobs", "3"]
    elif part in ("merge", "jax", "llama"):
        yield part, [*python, "-m", f"fastattn.bench.{part}", *result_of(part)]
    else:
        chosen = shlex.split(f"--timings 20 --warmup 0.1 {SUITES.get(part, options.bench)}")
        yield part, [*python, ROOT / "benchmarks", *chosen, *result_of(part)]


def run_all(part, options, report, name, seconds, environment):
    """The commands of one part, as many at once as there are CPUs. Reports each log's end; returns
    whether all was well."""
    end, groups = time.perf_counter() + seconds, {}

    def one(item):
        label, command = item
        group = label.partition("-")[0] if part == "sanitize" else label  # the tool
        failed = groups.setdefault(group, threading.Event())
        log = report.logs / f"{name}-{label}.log"
        return log, *run_part(command, log, end, environment, failed)

    listed = list(commands(part, options, report.out, name))
    fine = bool(listed)  # the sanitizer may be missing
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for log, code, took in pool.map(one, listed):
            text = log.read_text(errors="replace")
            report.say(f"==== {log.stem}: {code or 'ok'}, {took:.0f} s")
            if code != SPARED:
                report.say("\n".join(text.splitlines()[-options.tail :]))
            if code and code != SPARED:
                report.failed[log.stem] = f"{code}", telling(text)
            fine &= code == 0
    return fine


class Report:
    """What is printed, which a-report.txt keeps, and the files that come back."""

    def __init__(self, out, work):
        self.out, self.logs, self.failed = out, work / "logs", {}
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.file = out / "a-report.txt"
        self.file.write_text("")

    def say(self, text):
        print(text, flush=True)
        with open(self.file, "a") as file:
            file.write(f"{text}\n")

    def pack(self):
        """After each part: a run that is stopped has what came before."""
        with tarfile.open(self.out / "b-all.tar.gz", "w:gz") as tar:
            for path in (*sorted(self.logs.iterdir()), *sorted(self.out.glob("*.json"))):
                tar.add(path, path.name)

    def end(self):
        """Every failure once more, the last thing that is printed; the tests' logs in the file."""
        with open(self.file, "a") as file:
            for log in sorted(self.logs.glob("*-tests.log")):
                file.write(f"==== {log.stem}, whole\n{log.read_text(errors='replace')}\n")
        for name, (code, lines) in self.failed.items():
            self.say("\n".join([f"==== FAILED {name}: {code}", *lines]))
        self.say(f"==== {len(self.failed)} failed")


def run(options):
    out, work = Path(options.out).resolve(), Path(options.work).resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, work)
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
        if "compile" in options.parts.split(","):
            environment |= {
                "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
                "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(work / "fa4"),
            }
        for part in options.parts.split(","):
            limit = getattr(options, f"{part}_seconds".replace("-", "_"))
            left = min(limit, deadline - time.perf_counter())
            threads = (
                None if part in ALONE else "2" if part == "tests" else "1"
            )  # of one among many
            many = {"OMP_NUM_THREADS": threads} if threads else {}
            if left < 5:
                report.say(f"==== {name}-{part}: no time left")
                fine = False
                continue
            well = run_all(part, options, report, name, left, environment | many)
            report.pack()
            fine &= well
            if part == "smoke" and not well:
                break
    report.end()
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
    parts = ",".join(part for part in SECONDS if part not in EXTRA)
    verb.add_argument("--parts", default=parts, help="default: %(default)s")
    verb.add_argument(
        "--tools", default=",".join(TOOLS), help="of the sanitizer; default: %(default)s"
    )
    verb.add_argument("--calls", default="", help="more arguments for tests/gpu/small_calls.py")
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
