"""What the compiled CUDA kernels take of a GPU, and gates on it: ``python -m bench.cuda FOLDER EMULATED`` writes
docs/cuda_kernels.md; ``make cuda-kernels`` fills FOLDER and makes EMULATED, the emulated kernels' library, first.

FOLDER holds the library of kernels and its object files, compiled with ``-lineinfo``; ``counts.txt``, what the emulator
of tests/simt counts in a forward and a backward pass; and ``mma.o``, the products that csrc/cuda/mma.cuh offers.
Registers, memory and instructions of every kernel are read from machine code; no GPU is needed.

Gates: no stack and no local memory, no generic loads (every address is known to be shared or global), no arithmetic in
double in kernels of float, loads of 128 bits in the kernels of single sizes, the products on tensor cores, and the
budgets of bench/budgets.py for the instructions that loops execute. What may break them, and how far, is listed below
with the reason: ``EXCUSED``, ``EXCUSED_DOUBLE``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import budgets, cuda_times
from .executed import Launch, by_loop, executions, launches_of, lines_of
from .predict import DEVICES
from .report import table
from .sass import disassemble, output_of, readable

PAGE = Path("docs/cuda_kernels.md")
_REGISTERS, _WARPS = 65536, 64  # of a multiprocessor
_SHARED = {80: 164, 90: 228, 100: 228, 120: 100}  # KB of a multiprocessor; 1 KB of it goes to each block
# Kernel and count that need not be 0 → the most that it may be, and why.
EXCUSED = {
    ("sum_rows<float, double>", "double"): (99, "the sums of batch statistics are formed in double"),
    ("norm_statistics<float>", "double"): (999, "variances from those sums"),
    ("norm_moments<float>", "double"): (999, "means and squared deviations from those sums"),
}
# The same for kernels of double, by architecture: for second derivatives, and on sm_120 for first ones, the compiler
# needs more than 255 registers, the most that a thread can have.
EXCUSED_DOUBLE = {"sm_100": {"stack": 40, "local": 40}, "sm_120": {"stack": 160, "local": 112}}
_INTRODUCTION = """# What the CUDA kernels need

`make cuda-kernels` reads this table from the machine code. It shows the registers per thread on each architecture; on
the newest one, all instructions in the code, the loads from shared (LDS) and global memory (LDG), and how many of
these load 128 bits; and bytes of stack, local accesses and generic accesses, each the largest on any architecture.
Gates hold these three to 0, except in double, where 255 registers are not enough: there the stack may take 40 bytes
on sm_100 and 160 on sm_120, with local accesses to it. `Exact<φ, W, V, ×>` are kernels for at most V scalars and V
vectors as inputs and as outputs with W hidden channels, with the products u × x or without them, `Tabulated<W, V, ×>`
the same with a table in place of the MLP, `Grid<φ, W, V>` those for as many on a grid of the sphere, with W channels
of 16 coefficients; `tile_…` are those for l <= 2 and any number of fields, `Tiled<φ, c, W>` their MLPs of W channels
of c coefficients, `WithTangents<…>` and `Dual<…>` kernels of second derivatives, `wide_…` those for many fields of
other kinds, `conv_…` those for all others. What was measured on a GPU is in [gpu-h100.md](gpu-h100.md)."""
_LOOPS = """## Executed instructions

The table shows what warps execute on sm_90 in the loops that have a name in the source. The counts are those of the
benchmark's case `cloud`, which has 32 edges per node, 8 fields of l <= 1 and three layers of 8 channels. Kernels of
16 fields or 16 channels are counted in the same case with 16 of them, grid kernels in that case on the authors' grid,
kernels for tables in that case without attributes, with 256 knots, tile kernels with 8 fields of each of l = 0, 1 and
2, wide kernels with 64 fields as inputs and 8 as outputs; what the last two leave to a library, and wide ones to the
kernel MLP's kernels, is not counted. Kernels of second derivatives are counted in the first of these cases that
launches them. A kernel of several passes is counted in the first one. The emulator counts how often every memory
instruction runs, the machine code says what stands around it (`bench/executed.py`). A loop's row leaves out loops
with a name inside. `bench/budgets.py` holds the budgets, which are gates."""
_CLASSES = {"FP32": ("FFMA", "FADD", "FMUL"), "MUFU": ("MUFU",), "HMMA": ("HMMA",), "LDS": ("LDS",), "STS": ("STS",),
            "LDG": ("LDG",), "STG": ("STG",), "SHFL": ("SHFL",), "BAR": ("BAR", "WARPSYNC")}  # fmt: skip


@dataclass
class Kernel:
    """One kernel for one architecture."""

    symbol: str
    name: str
    architecture: str
    registers: int
    stack: int
    shared: int  # static
    instructions: Counter = field(default_factory=Counter)
    wide: int = 0  # loads of 128 bits

    @property
    def counts(self) -> dict[str, int]:
        """What the gates look at, by name."""
        n = self.instructions
        return {
            "stack": self.stack,
            "local": n["LDL"] + n["STL"],
            "generic": n["LD"] + n["ST"],
            "double": n["DFMA"] + n["DADD"] + n["DMUL"] if "double" not in self.name else 0,
        }

    def failures(self) -> list[str]:
        """The gates that it breaks."""
        most = {what: EXCUSED.get((self.name, what), (0, ""))[0] for what in self.counts}
        if "double" in self.name:
            most |= EXCUSED_DOUBLE.get(self.architecture, {})
        broken = [(what, n) for what, n in self.counts.items() if n > most[what]]
        found = [f"{self.architecture} {self.name}: {what} {n}, expected {most[what]}" for what, n in broken]
        if re.search("Tiled<|Exact<|Tabulated<|Grid<", self.name) and not self.wide:
            found.append(f"{self.architecture} {self.name}: no load of 128 bits")
        return found


def kernels_of(library: Path) -> list[Kernel]:
    """All kernels of all architectures."""

    def dump(option: str) -> list[str]:
        return output_of("cuobjdump", option, library).splitlines()

    found: dict[tuple[str, str], Kernel] = {}
    architecture = symbol = ""
    for line in dump("--dump-resource-usage"):
        if match := re.search(r"\barch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+?):?$", line):
            symbol = match[1]
        elif "REG:" in line:
            number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
            sizes = number["REG"], number["STACK"], number["SHARED"]
            found[architecture, symbol] = Kernel(symbol, symbol, architecture, *sizes)
    for line in dump("-sass"):
        if match := re.search(r"code for (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            symbol = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\.[A-Z0-9_.]*)?", line):
            kernel = found[architecture, symbol]
            kernel.instructions[match[1]] += 1
            kernel.wide += match[1] in ("LDS", "LDG") and ".128" in (match[2] or "")
    names = readable([kernel.name for kernel in found.values()])
    for kernel in found.values():
        kernel.name = names[kernel.name]
    return list(found.values())


def resources(kernels: Sequence[Kernel]) -> str:
    """The table of all kernels."""
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a[3:]))
    by_name: dict[str, dict[str, Kernel]] = {}
    for k in kernels:
        by_name.setdefault(k.name, {})[k.architecture] = k
    rows = []
    for name, of in sorted(by_name.items()):
        n = of[architectures[-1]].instructions
        registers = ", ".join(str(of[a].registers) for a in architectures)
        worst = ", ".join(str(max(o.counts[what] for o in of.values())) for what in ("stack", "local", "generic"))
        loads = str(n["LDS"]), str(n["LDG"]), str(of[architectures[-1]].wide)
        rows.append([f"`{name}`", registers, f"{n.total():,}", *loads, worst])
    loads = ["LDS", "LDG", "of 128 bits"]
    head = ["kernel", f"registers, {', '.join(architectures)}", "instructions", *loads, "stack, local, generic"]
    return table(head, rows)


def occupancy(kernel: Kernel, launch: Launch) -> float:
    """Share of a multiprocessor's warps that can be resident: as many blocks as fit, of as many warps as were counted;
    where none fits, one of fewer warps, with memory in proportion to them, although not all of it is the warps'."""
    warps = launch.threads // 32
    of_registers = _REGISTERS // (-(-kernel.registers // 8) * 8 * launch.threads)
    architecture = int(kernel.architecture[3:])
    of_system = 1024 if architecture < 90 else 0  # from sm_90 on cuobjdump counts it among the kernel's
    memory, needed = _SHARED[architecture] * 1024, launch.shared + kernel.shared + of_system
    of_memory = memory // needed
    if of_memory == 0:
        return warps * memory // needed / _WARPS
    return min(of_registers, of_memory, _WARPS // warps) * warps / _WARPS


@dataclass
class Counted:
    """A kernel whose launch the emulator counted: loop → instructions that warps execute, by opcode."""

    kernel: Kernel
    launch: Launch
    loops: dict[str | None, Counter[str]]

    @property
    def sizes(self) -> dict[str, int]:
        """What budgets are stated per."""
        return {"edge": self.launch.edges, "node": self.launch.nodes}


def counted(kernels: Sequence[Kernel], folder: Path, emulated: Path) -> list[Counted]:
    """Of every architecture the kernels whose work is proportional to the graph, but for those that have every
    activation function in their code: which one runs is not seen from memory instructions."""
    by_symbol: dict[str, Launch] = {}  # of the first pass of the first case that launches it
    for launch in launches_of(folder / "counts.txt"):
        by_symbol.setdefault(launch.symbol, launch)
    names = {kernel.symbol: kernel.name for kernel in kernels}
    launches = [x for x in by_symbol.values() if x.is_proportional and not names[x.symbol].startswith("conv_")]
    lines = lines_of(emulated, {place for launch in launches for place in launch.accesses})
    codes = disassemble(folder.rglob("*.cu.o"), {launch.symbol for launch in launches})
    found, of = [], {(kernel.architecture, kernel.symbol): kernel for kernel in kernels}
    for (architecture, symbol), code in codes.items():
        for launch in launches:
            if launch.symbol == symbol:
                loops = by_loop(code, executions(code, launch, lines))
                found.append(Counted(of[architecture, symbol], launch, loops))
    return sorted(found, key=lambda c: (c.kernel.name, c.kernel.architecture))


def loops_text(found: Sequence[Counted]) -> str:
    """The table of loops, whole kernels first."""
    rows = []
    for c in found:
        spent, of_kernel = budgets.spent(c.loops), budgets.BUDGETS.get(c.kernel.name, {})
        for loop in sorted(spent, key=lambda loop: -spent[loop]):
            budget = of_kernel.get(loop, budgets.Budget(float("inf"), "edge"))
            size = c.sizes[budget.per]
            opcodes = sum(c.loops.values(), Counter()) if loop == budgets.WHOLE else c.loops[loop]
            classes = (f"{sum(opcodes[o] for o in of) / size:.0f}" for of in _CLASSES.values())
            most = f"{budget.most:g}" if loop in of_kernel else ""
            rows.append([f"`{c.kernel.name}`", loop, budget.per, f"{spent[loop] / size:.0f}", most, *classes])
    return table(["kernel", "loop", "per", "executed", "budget", *_CLASSES], rows)


def predictions_text(found: Sequence[Counted]) -> str:
    """The predictions."""
    rows = []
    for label, device in DEVICES.items():
        for c in found:
            if c.kernel.architecture != f"sm_{device.architecture}":
                continue
            of_edge, share = cuda_times.per_edge(c.loops, c.launch.edges), occupancy(c.kernel, c.launch)
            prediction = cuda_times.predict(of_edge, c.launch.bytes_per_edge, share * _WARPS, device)
            executed, (low, high) = sum(of_edge.values()), prediction.microseconds
            counts = f"{executed:,.0f}", f"{c.launch.bytes_per_edge:,.0f}", f"{100 * share:.0f} %"
            rows.append([f"`{c.kernel.name}`", label, *counts, prediction.bound, f"{low:.0f} – {high:.0f}"])
    head = ["kernel", "device", "warp instructions per edge", "bytes per edge", "occupancy", "bound", "µs, PREDICTED"]
    return "\n\n".join(["## Predicted times", (cuda_times.__doc__ or "").strip(), table(head, rows)])


def products_failures(compiled: Path) -> list[str]:
    """Whether one product of csrc/cuda/mma.cuh is one instruction of tensor cores, by 3xTF32 three."""
    found = sorted(kernel.instructions["HMMA"] for kernel in kernels_of(compiled))
    return [] if found == [1, 3] else [f"{compiled.name}: HMMA {found}, expected [1, 3]"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("emulated", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE, help="(%(default)s)")
    options = parser.parse_args(arguments)
    kernels = kernels_of(options.folder / "libimplicit_steer_cuda.so")
    found = counted(kernels, options.folder, options.emulated)
    failures = [failure for kernel in kernels for failure in kernel.failures()]
    failures += products_failures(options.folder / "mma.o")
    budgeted = [c for c in found if c.kernel.architecture == budgets.ARCHITECTURE]
    for c in budgeted:
        failures += budgets.failures(c.kernel.name, c.loops, c.sizes)
    for name in budgets.BUDGETS.keys() - {c.kernel.name for c in budgeted}:
        failures.append(f"{budgets.ARCHITECTURE} {name}: has a budget, but was not counted")
    loops = loops_text(budgeted)
    parts = [_INTRODUCTION, resources(kernels), _LOOPS, loops, predictions_text(found)]
    options.page.write_text("\n\n".join(parts) + "\n")
    print(loops)
    print("\n".join(failures) or f"{len(kernels)} kernels: all gates hold, {options.page} says what they take")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
