"""Reads the machine code of a compiled kernel, without cuobjdump: setup.py and the tests use it.

An nvcc object holds one cubin, an ELF file, per architecture; every section .text.<kernel> of it is
a kernel. SASS instructions of sm_70 and newer are 16 bytes: the low 12 bits are the opcode, bits
12 to 14 the guard predicate (7: always) and 15 its negation.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

WGMMA = {0x9F0, 0xDF0, 0x9F3, 0xDF3}  # HGMMA and QGMMA, A from shared memory and from registers
LOCAL = {0x387: "STL", 0x983: "LDL"}
BRANCH, CALL, RETURN, EXIT, TRAP = 0x947, 0x944, 0x950, 0x94D, 0x95A

# What ptxas says, as "info", when it serialises wgmma or ignores setmaxnreg. C7519 is harmless.
SLOW = re.compile(r"^.*\bC75(?:0[89]|1[0-8])\b.*$", re.M)


@dataclass(frozen=True)
class Kernel:
    name: str
    code: tuple[tuple[int, int], ...]  # (low, high) 64 bits of every instruction

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


def kernels(data: bytes) -> list[Kernel]:
    """Every kernel in an nvcc object (or in anything else that holds cubins uncompressed)."""
    found = []
    for cubin in _cubins(data):
        table = struct.unpack_from("<Q", cubin, 40)[0]
        size, count, names = struct.unpack_from("<HHH", cubin, 58)
        # (name, type, flags, address, offset, size)
        sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
        for section in sections:
            at = sections[names][4] + section[0]
            name = cubin[at : cubin.index(b"\0", at)].decode()
            if name.startswith(".text."):
                code = cubin[section[4] : section[4] + section[5]]
                found.append(
                    Kernel(name.removeprefix(".text."), tuple(struct.iter_unpack("<QQ", code)))
                )
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
