"""Planted faults: each must make a test fail, or the tests have a hole.

    python tests/mutants.py           # 8 of them, drawn from the commit's hash
    python tests/mutants.py --all     # the whole list; prints faults and the tests that caught them
    python tests/mutants.py --gpu     # those of device code, with nvcc and a GPU

Written ones are in mutants_list.py. Mechanical ones are drawn here: in the files that the list
names, a comparison, a connective or a sign is turned, a constant moved by 1. Each such site has a
rank, the hash of the seed, its line and what it becomes, and the least come first: a change of the
code draws anew where it touches the code, nowhere else. One that no input can tell from the
original is listed with the argument, at most one in ten, and the next draw takes its place.

Each is planted in a copy of the tree. What catches it must pass there again once it is taken out.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import mutants_list as listed

ROOT = Path(__file__).resolve().parent.parent
SEED = "2026"
SECONDS = 600  # a test that takes longer hangs
GPU = {"FASTATTN_VARIANTS": listed.GPU_VARIANTS, "FASTATTN_TEST_GPU": "1"}
TURNS = {
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    **{"&&": "||", "||": "&&", "+": "-", "-": "+", "+=": "-=", "-=": "+="},
}
SITE = re.compile(r"(?<= )(?:[<>]=?|[=!]=|&&|\|\||[-+]=?)(?= )|(?<![\w.#])\d+(?![\w.])")
# What is no code, and constants that are only room for text.
BLANK = re.compile(
    r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^ *#[^\n]*|\bchar \w+\[\d+\]|snprintf\(\w+, \d+', re.S | re.M
)
# The lesser or the greater of two: where they are equal, either.
SAME = re.compile(
    r"if \((.+) [<>]=? (.+)\) \1 = \2[,;]"
    r"|([^=?:(]+?) [<>]=? ([^?:]+?) \? (?:\3 : \4|\4 : \3)[;,)\]]"
)


@dataclass(frozen=True)
class Fault:
    file: str
    before: str  # whole lines, found exactly once in the file; of a mechanical one its line
    after: str
    tests: str  # arguments of pytest
    builds: bool = True  # the tests look at the module, not only at sources
    at: int | None = None  # of a mechanical one: where `before` begins

    def __str__(self):
        old, new = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}: {old}  ->  {new or '(nothing)'}"

    def planted(self, text):
        """The file's text with the fault."""
        at = self.at if self.at is not None else text.find(self.before)
        if self.at is None and text.count(self.before) != 1:
            sys.exit(
                f"mutants_list.py must follow the code: in {self.file} this is found "
                f"{text.count(self.before)} times, and must be once: {self.before!r}"
            )
        return text[:at] + self.after + text[at + len(self.before) :]


def sites(place):
    """The mechanical faults of a file, those of least rank first, one a line."""
    text = (ROOT / place.file).read_text()
    code = BLANK.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    ranked = []
    for site in SITE.finditer(code):
        first = code.rfind("\n", 0, site.start()) + 1
        last = code.index("\n", site.end())
        line, at = text[first:last], site.start() - first
        if site[0].isdigit():  # 0 and 1 may be truth values
            number = int(site[0])
            new = [1 - number] if number < 2 else [number + 1, number - 1]
        else:
            new = [] if SAME.search(line) and site[0][0] in "<>" else [TURNS[site[0]]]
        for turned in map(str, new):
            after = line[:at] + turned + line[at + len(site[0]) :]
            key = f"{SEED} {place.file} {text[:first].count(line)} {line.strip()} {after.strip()}"
            rank = hashlib.sha256(key.encode()).digest()
            ranked.append(
                (rank, first, Fault(place.file, line, after, place.tests, place.builds, first))
            )
    lines = set()
    for _, first, fault in sorted(ranked, key=lambda one: one[0]):
        if first not in lines:
            yield fault
        if not is_listed(fault):
            lines.add(first)


def is_listed(fault):
    return any(
        (fault.file, fault.before.strip(), fault.after.strip()) == (file, before, after)
        for file, before, after, _ in listed.EQUIVALENT
    )


def mechanical():
    """Those drawn, and how many equivalent ones were passed over."""
    drawn, passed = [], 0
    for place in listed.PLACES:
        taken = 0
        for fault in sites(place):
            if taken == place.draws:
                break
            passed += is_listed(fault)
            if not is_listed(fault):
                drawn.append(fault)
                taken += 1
        if taken < place.draws:
            sys.exit(f"{place.file} has no {place.draws} sites, but {taken}")
    return drawn, passed


def all_faults():
    """The whole list, by the rules that it must keep."""
    written = [Fault(*fault) for fault in listed.FAULTS]
    drawn, passed = mechanical()
    faults = drawn + written
    for fault in written:
        file = ROOT / fault.file
        fault.planted(file.read_text() if file.exists() else "")
    kernels = sum(fault.file.startswith("kernels/") for fault in faults)
    rules = {
        f"at least 40, not {len(faults)}": len(faults) >= 40,
        f"half of them mechanical, not {len(drawn)}": 2 * len(drawn) >= len(faults),
        f"10 in kernels/, not {kernels}": kernels >= 10,
        f"equivalent at most one in ten, not {passed}": 10 * passed <= len(faults),
        f"all listed equivalents met, not {passed}": passed == len(listed.EQUIVALENT),
    }
    for rule, holds in rules.items():
        if not holds:
            sys.exit(f"mutants: there must be {rule}")
    return faults


class Tree:
    """A copy of the sources with its own build."""

    def __init__(self, folder, gpu):
        self.root = folder / "tree"
        others = (".*", "build", "dist", "__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*others))
        path = os.environ["PATH"]
        if not gpu:  # a warning is no test; and little optimization is fast to compile
            for name in filter(shutil.which, ("cc", "gcc", "g++")):
                tool = folder / "bin" / name
                tool.parent.mkdir(exist_ok=True)
                tool.write_text(f'#!/bin/sh\nexec "{shutil.which(name)}" "$@" -w -O1\n')
                tool.chmod(0o755)
            path = f"{folder / 'bin'}{os.pathsep}{path}"
        self.environment = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": f"{self.root / 'python'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "PYTHONDONTWRITEBYTECODE": "1",
            **(GPU if gpu else {"FASTATTN_CUDA": "0"}),
        }
        for name in ("FASTATTN_STRICT", "PYTEST_ADDOPTS"):
            self.environment.pop(name, None)
        code, said = self.build()
        if code != 0:
            sys.exit(f"the tree does not build:\n{said[-4000:]}")
        self.kept = folder / "kept"
        shutil.copytree(self.root / "build", self.kept)
        self.module = next((self.root / "python" / "fastattn").glob("_C*.so"))
        shutil.copy2(self.module, folder / "module")

    def run(self, *command):
        """The exit status, None where it hangs, and what it wrote."""
        options = {"cwd": self.root, "env": self.environment, "start_new_session": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, errors="replace", **options, **pipes)
        try:
            said = process.communicate(timeout=SECONDS)[0]
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]

    def build(self):
        return self.run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")

    def test(self, *arguments):
        """The test that failed or that ended the process, None if all passed; what was written."""
        flags = ["-x", "-v", "--tb=short", "-p", "no:cacheprovider"]
        code, said = self.run(sys.executable, "-m", "pytest", *flags, *arguments)
        if code == 0:
            return None, said
        failed = re.findall(r"^(tests/\S+::.*?) (?:FAILED|ERROR) +\[", said, re.M)
        begun = re.findall(r"^(tests/\S+::.*?) *(?:$|Fatal)", said, re.M)  # a crash, or it hangs
        return (failed or begun or [None])[-1] or f"exit {code}", said

    def judge(self, fault):
        """The test that caught it, or None; and what is wrong with that."""
        file = self.root / fault.file
        text, times = file.read_text(), file.stat()
        file.write_text(fault.planted(text))
        code, said = self.build() if fault.builds else (0, "")
        if code == 0:
            caught, said = self.test(*shlex.split(fault.tests))
        file.write_text(text)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        if fault.builds:
            shutil.rmtree(self.root / "build")
            shutil.copytree(self.kept, self.root / "build")
            shutil.copy2(self.kept.parent / "module", self.module)
        if code != 0 or re.search(r"^\S+:\d+:\d+: error: ", said, re.M):
            return None, f"does not compile\n{said[-1500:]}"
        if not caught:
            return None, "NOT CAUGHT"
        again, said = self.test(caught)
        if again:
            return None, f"{caught} does not pass without it\n{said[-1500:]}"
        return caught, None


def chosen(options):
    if options.gpu:
        return [Fault(*fault) for fault in listed.GPU_FAULTS]
    faults = all_faults()
    if options.only:
        return [fault for fault in faults if re.search(options.only, str(fault))]
    if options.all:
        return faults
    ask = ["git", "rev-parse", "HEAD"]
    commit = options.commit or subprocess.check_output(ask, cwd=ROOT, text=True)

    def drawn(fault):
        return hashlib.sha256(f"{commit.strip()} {fault}".encode()).digest()

    return sorted(faults, key=drawn)[:8]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="not 8 of them")
    parser.add_argument("--gpu", action="store_true", help="those that only a GPU shows")
    parser.add_argument("--only", metavar="RE", help="those in whose line this is found")
    parser.add_argument("--commit", help="from whose hash the 8 are drawn; default: HEAD")
    parser.add_argument("--list", action="store_true", help="print them, plant none")
    parser.add_argument("--jobs", type=int, default=1, help="copies of the tree at work")
    options = parser.parse_args()
    faults = chosen(options)
    if options.list:
        print(*faults, sep="\n")
        return
    holes = 0
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        folders = [Path(folder) / str(i) for i in range(options.jobs)]
        for each in folders:
            each.mkdir()
        trees = queue.SimpleQueue()
        for tree in pool.map(Tree, folders, itertools.repeat(options.gpu)):
            trees.put(tree)

        def judge(fault):
            tree, begun = trees.get(), time.monotonic()
            try:
                return *tree.judge(fault), time.monotonic() - begun
            finally:
                trees.put(tree)

        for fault, (caught, wrong, took) in zip(faults, pool.map(judge, faults), strict=True):
            holes += caught is None
            print(
                f"{fault}\n    {'caught by ' + caught if caught else wrong}, {took:.0f} s",
                flush=True,
            )
    print(f"{len(faults) - holes} of {len(faults)} faults caught, {time.monotonic() - start:.0f} s")
    sys.exit(holes > 0 or not faults)


if __name__ == "__main__":
    main()
