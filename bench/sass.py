"""Machine code of CUDA kernels as basic blocks and loops, read with nvdisasm; no GPU is needed.

Where nvcc was given ``-lineinfo``, which changes no instruction, every instruction says which source line it comes
from, and through which calls. A loop has a name where the line of its ``for`` ends in a comment ``// loop: NAME``:
its branch back comes from that line, whatever the compiler did to the loop. Labels in the code would be no such names:
the compiler numbers them, and an empty ``asm`` statement leaves no trace in machine code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*([^;]*);")
_TARGET, _LABELS = re.compile(r"`\((\.L_x_\d+)\)"), re.compile(r"\.L_x_\d+")
_NAME = re.compile(r"//\s*loop: (.+?)\s*$")
_MEMORY = {"LDS", "STS", "LDG", "STG", "LD", "ST", "LDGSTS", "ATOM", "ATOMG", "ATOMS", "RED", "REDG"}
_PLACE, _WIDTH = re.compile(r"\[([^\[\]]*?)(?:\+(-?0x[0-9a-f]+))?\]"), re.compile(r"\.(U?8|S8|U?16|S16|64|128)\b")

Lines = tuple[tuple[str, int], ...]  # (file, line) of an instruction, then of the calls around it, innermost first


def output_of(name: str, *arguments: str | Path, **options) -> str:
    """What the program prints. It is on the path or in NVIDIA's package of its name; NVIDIA's programs call each
    other."""
    path = f"{os.environ['PATH']}:{sysconfig.get_path('purelib')}/nvidia/cu13/bin"
    program = shutil.which(name, path=path)
    if program is None:
        sys.exit(f"{name}: not found. Install binutils and, of NVIDIA, cuobjdump and nvdisasm (CUDA toolkit).")
    environment = os.environ | {"PATH": path}
    command = [program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, **options).stdout


def readable(symbols: Iterable[str]) -> dict[str, str]:
    """Mangled name → ``kernel<template arguments>``."""
    symbols, names = list(symbols), {}
    for symbol, name in zip(symbols, output_of("c++filt", input="\n".join(symbols)).splitlines(), strict=True):
        name = re.sub(r"implicit_steer::|gpu::|^void ", "", name)
        names[symbol] = re.sub(r" (?=>)", "", re.split(r"\((?![^<]*>)", name, maxsplit=1)[0])
    return names


@dataclass(frozen=True)
class Access:
    """Where an instruction loads or stores: the text of its registers, the offset to them, the width in bytes."""

    registers: str
    offset: int
    width: int


@dataclass(frozen=True)
class Instruction:
    """``opcode``: its first word, as LDS; ``guarded``: it may do nothing; ``targets``: the labels that it branches
    to, of which a switch (BRX) has several, but none where only lanes do so that do not run together (BRA.DIV);
    ``access``: of one that loads or stores."""

    opcode: str
    targets: tuple[str, ...]
    guarded: bool
    lines: Lines
    access: Access | None = None


@dataclass
class Loop:
    """The blocks of a natural loop; ``name``: of the ``for`` that it comes from."""

    header: int
    blocks: set[int]
    name: str | None


@dataclass
class Code:
    """A kernel's basic blocks, and of each the numbers of those that may follow it.

    ``dominators``: block that can be reached → the last one through which every way to it leads, the first block first;
    ``loops``: outer ones before those inside."""

    blocks: list[list[Instruction]]
    successors: list[list[int]]
    dominators: dict[int, int] = field(init=False)
    loops: list[Loop] = field(init=False)

    def __post_init__(self) -> None:
        self.dominators = _dominators(self.successors)
        self.loops = _loops(self)

    def counts(self, block: int) -> Counter[str]:
        """Its instructions by opcode."""
        return Counter(instruction.opcode for instruction in self.blocks[block])

    def innermost(self, named: bool = False) -> dict[int, Loop]:
        """Block → the smallest loop, or loop with a name, that it lies in."""
        return {block: loop for loop in self.loops if loop.name or not named for block in loop.blocks}


def _jumps(instruction: Instruction) -> bool:
    """Whether control may go on at its targets. ptxas writes some branches of sm_80 as a CALL with a guard whose target
    does not return; a CALL without one returns."""
    return instruction.opcode in ("BRA", "BRX") or (instruction.opcode == "CALL" and instruction.guarded)


def _ends(instruction: Instruction) -> bool:
    """Whether control never goes on to the next instruction."""
    return instruction.opcode in ("BRA", "BRX", "EXIT", "RET") and not instruction.guarded


def code_of(instructions: list[Instruction], labels: dict[str, int]) -> Code:
    """Basic blocks; ``labels``: name → number of the instruction behind it."""
    leaders = {0, *(n for n in labels.values() if n < len(instructions))}
    leaders |= {n + 1 for n, i in enumerate(instructions[:-1]) if _jumps(i) or i.opcode in ("EXIT", "RET")}
    starts = sorted(leaders)
    number = {start: n for n, start in enumerate(starts)}
    blocks = [instructions[a:b] for a, b in zip(starts, [*starts[1:], len(instructions)], strict=True)]
    successors: list[list[int]] = []
    for n, block in enumerate(blocks):
        last, follow = block[-1], []
        if _jumps(last):
            places = (labels.get(target, len(instructions)) for target in dict.fromkeys(last.targets))
            follow += [number[place] for place in places if place < len(instructions)]
        if not _ends(last) and n + 1 < len(blocks):
            follow.append(n + 1)
        successors.append(follow)
    return Code(blocks, successors)


def _postorder(successors: list[list[int]]) -> list[int]:
    """The blocks that can be reached from the first one, each after those that follow it."""
    order, seen, stack = [], {0}, [(0, iter(successors[0]))]
    while stack:
        block, following = stack[-1]
        for n in following:
            if n not in seen:
                seen.add(n)
                stack.append((n, iter(successors[n])))
                break
        else:
            order.append(block)
            stack.pop()
    return order


def _predecessors(successors: list[list[int]], among: Collection[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {block: [] for block in among}
    for block in among:
        for n in successors[block]:
            found[n].append(block)
    return found


def _dominators(successors: list[list[int]]) -> dict[int, int]:
    """Cooper, Harvey and Kennedy, A simple, fast dominance algorithm (2001)."""
    order = _postorder(successors)[::-1]
    place, before = {block: n for n, block in enumerate(order)}, _predecessors(successors, order)
    found, changed = {0: 0}, True

    def common(a: int, b: int) -> int:
        while a != b:
            if place[a] > place[b]:
                a = found[a]
            else:
                b = found[b]
        return a

    while changed:
        changed = False
        for block in order[1:]:
            known = [p for p in before[block] if p in found]
            new = known[0]
            for p in known[1:]:
                new = common(p, new)
            changed |= found.get(block) != new
            found[block] = new
    return {block: found[block] for block in order}


def _loops(code: Code) -> list[Loop]:
    before = _predecessors(code.successors, code.dominators)
    found: dict[int, Loop] = {}
    for block in code.dominators:
        for header in code.successors[block]:
            above = block
            while above not in (0, header):
                above = code.dominators[above]
            if above != header:  # no branch back
                continue
            loop, stack = found.setdefault(header, Loop(header, {header}, None)), [block]
            while stack:
                n = stack.pop()
                if n not in loop.blocks:
                    loop.blocks.add(n)
                    stack += before[n]
            for file, line in code.blocks[block][-1].lines[:1]:
                loop.name = _names_in(file).get(line, loop.name)
    return sorted(found.values(), key=lambda loop: -len(loop.blocks))


@cache
def _names_in(file: str) -> dict[int, str]:
    """Line → name of the loop whose head it belongs to."""
    found, head = {}, []
    for n, text in enumerate(Path(file).read_text().splitlines() if Path(file).exists() else [], 1):
        head = [n] if re.search(r"\b(for|while) \(", text) else [*head, n]
        if match := _NAME.search(text):
            found |= dict.fromkeys(head, match[1])
    return found


def _access(opcode: str, modifiers: str, operands: str) -> Access | None:
    places = _PLACE.findall(operands) if opcode in _MEMORY else []
    if not places:
        return None
    registers, offset = places[-1]
    width = _WIDTH.search(modifiers)
    return Access(registers, int(offset or "0", 16), int(width[1].lstrip("US")) // 8 if width else 4)


def parse(text: Iterable[str]) -> dict[str, Code]:
    """Symbol → its code, of the lines that nvdisasm prints."""
    found: dict[str, Code] = {}
    symbol, instructions, labels = "", [], {}
    lines, pending = (), []

    def finish() -> None:
        if instructions:
            found[symbol] = code_of(instructions, labels)

    for line in text:
        if line.startswith(".text."):
            finish()
            symbol, instructions, labels, lines, pending = line[6:].rstrip(":"), [], {}, (), []
        elif not symbol:
            continue
        elif match := _LINE.search(line):
            pending.append((os.path.normpath(match[1]), int(match[2])))
        elif match := _LABEL.match(line.strip()):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.search(line):
            lines, pending = (tuple(pending) or lines), []
            guard, opcode, modifiers, operands = match.groups()
            target = None if ".DIV" in modifiers else _TARGET.search(operands)
            always = opcode == "BRA" and target and target[0] == operands.strip()
            guarded = bool(guard) or (opcode == "BRA" and not always)
            targets = tuple(_LABELS.findall(operands)) if opcode == "BRX" else (target[1],) if target else ()
            instructions.append(Instruction(opcode, targets, guarded, lines, _access(opcode, modifiers, operands)))
    finish()
    return found


def disassemble(objects: Iterable[Path], wanted: Collection[str]) -> dict[tuple[str, str], Code]:
    """(architecture, symbol) → code, of the kernels with these symbols in object files. In a library two files of one
    name could not be told apart."""
    found: dict[tuple[str, str], Code] = {}
    for compiled in objects:
        with TemporaryDirectory() as folder:
            output_of("cuobjdump", "-xelf", "all", compiled.absolute(), cwd=folder)
            for cubin in Path(folder).glob("*.cubin"):
                architecture = re.search(r"sm_\d+", cubin.name)
                symbols = (line.split() for line in output_of("readelf", "--symbols", "--wide", cubin).splitlines())
                numbers = [row[0].rstrip(":") for row in symbols if row and row[-1] in wanted]
                if numbers and architecture:
                    text = output_of("nvdisasm", "-c", "-gi", "-fun", ",".join(numbers), cubin)
                    found |= {(architecture[0], symbol): code for symbol, code in parse(text.splitlines()).items()}
    return found
