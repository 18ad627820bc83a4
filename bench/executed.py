"""How many instructions the warps of a CUDA kernel execute, found without a GPU from its machine code and the emulator.

The emulator of tests/simt (``conv_test DIR count CASE``) counts how often warps execute every memory instruction. Its
debug information and that of the machine code name the same source lines, each with the calls around it. Where n
memory instructions of a kernel come from one line and the same calls, each gets 1/n of the line's count; pieces of one
load or store of the source, some of which the compiler leaves out, count as one, and one that is several of those that
the emulator counts as so many. A basic block is executed as often as the median of its memory instructions, but for
those with a guard that never ran; a block that has none as often as the block that dominates it, or at the head of a
loop as the most executed block of the loop; never, if the blocks that it dominates were counted and never ran; and no
more often than the blocks that may follow it, all together. So the copies of a loop's body that the compiler makes
share its count evenly.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from .sass import Code, Instruction, Lines, output_of

# Arrays that grow with the graph, as the emulator's tests name them; scratch are the partial results of warps, which on
# a GPU have about as many edges each as there.
_OF_THE_GRAPH = {"delta", "attr", "x", "src", "order", "rowptr", "colptr", "order_by_source", "out", "grad_out",
                 "grad_edge", "grad_x", "grad_delta", "grad_attr", "node_sums", "scratch"}  # fmt: skip


@dataclass
class Launch:
    """What the emulator counted of a kernel: all warps; threads and bytes of dynamic shared memory of a block."""

    symbol: str
    edges: int
    nodes: int
    warps: int
    threads: int
    shared: int
    # place of an instruction in the library → executions, bytes at a time
    accesses: dict[int, tuple[int, int]] = field(default_factory=dict)
    touched: dict[str, int] = field(default_factory=dict)  # array → bytes

    @property
    def bytes_per_edge(self) -> float:
        """Of the arrays that grow with the graph."""
        return sum(n for name, n in self.touched.items() if name in _OF_THE_GRAPH) / self.edges

    @property
    def is_proportional(self) -> bool:
        """Whether its work grows as the graph does: not that on weights, nor the sums of their gradients over warps."""
        return self.bytes_per_edge > 0 and "grad_weights" not in self.touched


def launches_of(counts: Path) -> list[Launch]:
    """What ``conv_test … count`` printed."""
    found: list[Launch] = []
    for line in counts.read_text().splitlines():
        first, *rest = line.split()
        if first == "kernel":
            found.append(Launch(rest[0], *map(int, rest[1:])))
        elif first.startswith("0x"):
            found[-1].accesses[int(first, 16)] = int(rest[0]), int(rest[1])
        else:
            found[-1].touched[first] = int(rest[0])
    return found


def lines_of(library: Path, places: Iterable[int]) -> dict[int, Lines]:
    """Where the instructions of the emulated library come from."""
    found: dict[int, list[tuple[str, int]]] = {}
    current: list[tuple[str, int]] = []
    places_text = (hex(place) for place in places)
    printed = output_of("addr2line", "--inlines", "--addresses", "--exe", library, *places_text)
    for line in printed.splitlines():
        if line.startswith("0x"):
            current = found.setdefault(int(line, 16), [])
        elif match := re.match(r"(.+):(\d+)", line):
            current.append((os.path.normpath(match[1]), int(match[2])))
    return {place: tuple(lines) for place, lines in found.items()}


def _present(block: Iterable[Instruction], widths: dict[Lines, set[int]]) -> Counter[Lines]:
    """How many loads and stores of the source the block's memory instructions are, by line; ``widths``: of those, in
    bytes. Where a line has several widths, none of its instructions is taken for a piece, or for more than one."""
    found, pieces = Counter[Lines](), defaultdict[tuple[Lines, str, str, int], set[int]](set)
    for instruction in block:
        lines, access = instruction.lines, instruction.access
        width = min(widths[lines]) if access and len(widths[lines]) == 1 else 0
        if access and access.width < width:
            key = lines, instruction.opcode, access.registers, access.offset // width
            if pieces[key] and access.offset not in pieces[key]:
                pieces[key].add(access.offset)
                continue
            pieces[key] = {access.offset}
        found[lines] += max(access.width // width, 1) if access and width else 1
    return found


def executions(code: Code, launch: Launch, lines: dict[int, Lines]) -> dict[int, float]:
    """Basic block → how often warps execute it, all together."""
    counted, widths = Counter[Lines](), defaultdict[Lines, set[int]](set)
    for place, (n, width) in launch.accesses.items():
        counted[lines[place]] += n
        widths[lines[place]].add(width)
    memory = {b: [i for i in code.blocks[b] if i.access] for b in code.dominators}
    present = Counter[Lines]()
    for of_block in memory.values():
        present.update(_present(of_block, widths))
    known = {}  # of blocks with memory instructions, which were counted
    for b, of_block in memory.items():
        if of_block:
            ran = [i for i in of_block if counted[i.lines] or not i.guarded] or of_block
            known[b] = median(counted[i.lines] / present[i.lines] for i in ran)
    below = dict(known)  # of the most executed block that it dominates, itself included
    for block in reversed(code.dominators):
        if block in below:
            above = code.dominators[block]
            below[above] = max(below.get(above, 0.0), below[block])
    in_loop: dict[int, list[float]] = defaultdict(list)  # header → of the blocks in no loop inside
    loop_of = code.innermost()
    for block, n in known.items():
        if block in loop_of:
            in_loop[loop_of[block].header].append(n)
    found: dict[int, float] = {}
    for block, above in code.dominators.items():
        if block in known or below.get(block) == 0:
            found[block] = known.get(block, 0.0)
        elif block == 0:
            found[block] = launch.warps
        elif in_loop[block]:
            found[block] = max(in_loop[block])
        else:
            while above in loop_of and block not in loop_of[above].blocks:  # behind a loop, as before it
                above = code.dominators[loop_of[above].header]
            found[block] = found[above]
    for block in reversed(code.dominators):
        if block not in known and (behind := code.successors[block]):
            found[block] = min(found[block], sum(found[n] for n in behind))
    return found


def by_loop(code: Code, executed: dict[int, float]) -> dict[str | None, Counter[str]]:
    """Name of a loop → how many instructions warps execute in it and in no loop with a name inside, by opcode; None:
    outside of all."""
    found: dict[str | None, Counter[str]] = defaultdict(Counter)
    loop_of = code.innermost(named=True)
    for block, n in executed.items():
        into = found[loop_of[block].name if block in loop_of else None]
        for opcode, of_block in code.counts(block).items():
            into[opcode] += n * of_block
    return dict(found)
