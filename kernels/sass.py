"""Reads the machine code of a compiled kernel, without cuobjdump: setup.py and the tests use it.

An nvcc object holds one cubin, an ELF file, per architecture; every section .text.<kernel> of it is
a kernel. SASS instructions of sm_70 and newer are 16 bytes: the low 12 bits are the opcode, bits
12 to 14 the guard predicate (7: always) and 15 its negation.

    python kernels/sass.py compare OLD NEW [--common]

says of each kernel of two builds (modules, objects, or folders of objects) whether its machine
code is the same. Symbols may differ, and where in the constant bank a parameter lies, as long as
what was one parameter still is, everywhere. Exit status 1: one differs, or is in one of the two
alone (--common: those are left out).
"""

import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WGMMA = {0x9F0, 0xDF0, 0x9F3, 0xDF3}  # HGMMA and QGMMA, A from shared memory and from registers
LOCAL = {0x387: "STL", 0x983: "LDL"}
BRANCH, CALL, RETURN, EXIT, TRAP = 0x947, 0x944, 0x950, 0x94D, 0x95A
BARRIER = 0xB1D  # an immediate where other opcodes of its form have the constant bank
PARAMETERS = 0x210  # where those of a kernel begin, in bank 0 on sm_90

# What ptxas says, as "info", when it serialises wgmma or ignores setmaxnreg. C7519 is harmless.
SLOW = re.compile(r"^.*\bC75(?:0[89]|1[0-8])\b.*$", re.M)


@dataclass(frozen=True)
class Kernel:
    name: str
    code: tuple[tuple[int, int], ...]  # (low, high) 64 bits of every instruction
    registers: int = 0  # of a thread, at the launch
    architecture: int = 90  # compute capability, times 10

    def variant(self) -> str:
        """The function's name in the source: the first that the symbol spells out. Of a template
        its arguments follow; then the architecture, if that is not Hopper."""
        where = "" if self.architecture == 90 else f" on sm_{self.architecture}"
        match = re.search(r"_Z[A-Z]*(\d+)(\w+)", self.name)
        if not match:
            return self.name + where
        name, rest = match[2][: int(match[1])], match[2][int(match[1]) :]
        return (name + rest if rest.startswith("I") else name) + where

    def parameter(self, i: int) -> int | None:
        """The constant bank's offset that an instruction reads, if a parameter lies there."""
        low, _ = self.code[i]
        if (low >> 9) & 7 not in (3, 5) or low & 0xFFF == BARRIER or (low >> 54) & 31:
            return None
        offset = (low >> 38) & 0xFFFF
        return offset if offset >= PARAMETERS else None

    def opcodes(self) -> list[int]:
        return [low & 0xFFF for low, _ in self.code]

    def successors(self, i: int) -> list[int]:
        """The instructions that may run next."""
        low, high = self.code[i]
        opcode, after = low & 0xFFF, [i + 1] if i + 1 < len(self.code) else []
        always = (low >> 12) & 7 == 7
        if opcode in (RETURN, EXIT, TRAP):
            return [] if always else after
        if opcode not in (BRANCH, CALL):
            return after
        # The offset counts 4 bytes from the next instruction: bits 16-23, then 34 and up.
        above = (low >> 34) - (1 << 30 if low >> 63 else 0)
        target = i + 1 + ((above << 8 | (low >> 16) & 0xFF) >> 2)
        taken_always = always and opcode == BRANCH and (high >> 23) & 7 == 7
        return [t for t in [target] if 0 <= t < len(self.code)] + ([] if taken_always else after)

    def loops(self) -> list[set[int]]:
        """The outermost loops: strongly connected sets of instructions (Tarjan, iterative)."""
        found, stack, index, low, on_stack = [], [], {}, {}, set()
        for root in range(len(self.code)):
            work = [] if root in index else [(root, iter(self.successors(root)))]
            while work:
                node, following = work[-1]
                if node not in index:
                    index[node] = low[node] = len(index)
                    stack.append(node)
                    on_stack.add(node)
                for child in following:
                    if child not in index:
                        work.append((child, iter(self.successors(child))))
                        break
                    if child in on_stack:
                        low[node] = min(low[node], index[child])
                else:
                    work.pop()
                    if work:
                        parent = work[-1][0]
                        low[parent] = min(low[parent], low[node])
                    if low[node] == index[node]:
                        at = stack.index(node)
                        loop = set(stack[at:])
                        del stack[at:]
                        on_stack -= loop
                        if len(loop) > 1:
                            found.append(loop)
        return found


def _cubins(data: bytes) -> Iterator[bytes]:
    at = data.find(b"\x7fELF", 1)
    while at >= 0:
        if struct.unpack_from("<H", data, at + 18)[0] == 190:  # EM_CUDA
            yield data[at:]
        at = data.find(b"\x7fELF", at + 1)


def _registers(info: bytes) -> dict[int, int]:
    """Registers of a thread by the kernel's symbol, from a section .nv.info: attributes of a form,
    a number and two bytes, which are a size where the format is 4."""
    found, at = {}, 0
    while at < len(info):
        form, number, size = struct.unpack_from("<BBH", info, at)
        if (form, number) == (4, 0x2F):
            symbol, count = struct.unpack_from("<II", info, at + 4)
            found[symbol] = count
        at += 4 + (size if form == 4 else 0)
    return found


def kernels(data: bytes) -> list[Kernel]:
    """Every kernel in an nvcc object (or in anything else that holds cubins uncompressed)."""
    found = []
    for cubin in _cubins(data):
        table = struct.unpack_from("<Q", cubin, 40)[0]
        size, count, names = struct.unpack_from("<HHH", cubin, 58)
        # (name, type, flags, address, offset, size, link, info)
        sections = [struct.unpack_from("<IIQQQQII", cubin, table + size * i) for i in range(count)]
        registers, texts = {}, []
        abi, marks = cubin[8], struct.unpack_from("<I", cubin, 48)[0]
        architecture = marks >> 8 & 0xFF if abi >= 8 else marks & 0xFF  # before CUDA 13
        for section in sections:
            at = sections[names][4] + section[0]
            name = cubin[at : cubin.index(b"\0", at)].decode()
            content = cubin[section[4] : section[4] + section[5]]
            if name == ".nv.info":
                registers = _registers(content)
            if name.startswith(".text."):
                # Before sm_90 the upper 8 bits are the number of registers.
                texts.append((name.removeprefix(".text."), content, section[7] & 0xFFFFFF))
        found += [
            Kernel(name, tuple(struct.iter_unpack("<QQ", code)), registers[symbol], architecture)
            for name, code, symbol in texts
        ]
    return found


def check(data: bytes, log: str) -> list[str]:
    """What slows the kernels of an object down without an error: one sentence each."""
    problems = [" ".join(line.split()) for line in SLOW.findall(log)]
    for kernel in kernels(data):
        opcodes = kernel.opcodes()
        for loop in kernel.loops():
            spills = [opcodes[i] for i in sorted(loop) if opcodes[i] in LOCAL]
            if spills and any(opcodes[i] in WGMMA for i in loop):
                counts = ", ".join(f"{spills.count(op)} {LOCAL[op]}" for op in sorted(set(spills)))
                problems.append(f"{kernel.name}: local memory in a loop that holds wgmma: {counts}")
    return problems


def difference(old: Kernel, new: Kernel) -> str | None:
    """The first thing in which the machine code differs, or None."""
    if old.registers != new.registers:
        return f"{new.registers} registers, {old.registers} before"
    there, back = {}, {}  # parameters, one to one
    for i, (before, after) in enumerate(zip(old.code, new.code, strict=False)):
        x, y = old.parameter(i), new.parameter(i)
        if x is not None and y is not None:
            if there.setdefault(x, y) != y or back.setdefault(y, x) != x:
                return f"instruction {i} reads parameter {y:#x}, {x:#x} before"
            before = before[0] & ~(0xFFFF << 38), before[1]
            after = after[0] & ~(0xFFFF << 38), after[1]
        if before != after:
            return "instruction {} is {:016x} {:016x}, {:016x} {:016x} before".format(
                i, *reversed(new.code[i]), *reversed(old.code[i])
            )
    if len(old.code) != len(new.code):
        return f"{len(new.code)} instructions, {len(old.code)} before"
    return None


def read(path: Path) -> dict[str, Kernel]:
    """The kernels of a file, or of a folder's objects: of each variant the newest."""
    files = sorted(path.glob("*.o"), key=lambda f: f.stat().st_mtime) if path.is_dir() else [path]
    files = [f for f in files if not f.name.endswith(".tmp.o")]  # being written
    found = {k.variant(): k for f in files for k in kernels(f.read_bytes())}
    if not found:
        raise SystemExit(f"{path} must hold kernels, and has none")
    return found


def compare(old: dict[str, Kernel], new: dict[str, Kernel], common: bool = False) -> int:
    """Prints a line per variant; returns how many differ."""
    names = sorted(old.keys() & new.keys() if common else old.keys() | new.keys())
    differ = 0
    for name in names:
        if name not in new or name not in old:
            problem = f"only in the {'old' if name in old else 'new'} build"
        else:
            problem = difference(old[name], new[name])
        differ += problem is not None
        print(f"{name}: {problem or 'identical'}")
    print(f"{len(names) - differ} of {len(names)} identical")
    return differ if names else 1


def main(arguments: list[str]) -> int:
    common = "--common" in arguments
    words = [word for word in arguments if word != "--common"]
    if len(words) != 3 or words[0] != "compare":
        raise SystemExit("usage: python kernels/sass.py compare OLD NEW [--common]")
    return 1 if compare(read(Path(words[1])), read(Path(words[2])), common) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
