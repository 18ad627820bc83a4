"""What the compiled CUDA kernels take of a GPU, and gates on it: ``python -m bench.cuda LIBRARY COUNTS`` writes
docs/cuda_kernels.md; ``make cuda-kernels`` makes the library and COUNTS first.

Registers, memory and instructions of every kernel are read from the library's machine code with cuobjdump; no GPU is
needed. COUNTS is what the emulator of tests/simt counts in a forward and a backward pass: ``conv_test … count``.

Gates: no stack and no local memory, no generic loads (every address is known to be shared or global), no arithmetic in
double in kernels of float, and loads of 128 bits in the specialised kernels. What may break them, and how far, is
listed below with the reason: ``EXCUSED``, ``EXCUSED_DOUBLE``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .predict import DEVICES
from .report import table

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
the newest one, all instructions in the code, the loads from shared (LDS) and global memory (LDG), and how many of these
load 128 bits; and bytes of stack, local accesses and generic accesses, each the largest on any architecture. Gates hold
these three to 0, except in double, where 255 registers are not enough: there the stack may take 40 bytes on sm_100 and
160 on sm_120, with local accesses to it. `Specialised<φ, c, W>` are kernels for W channels of c coefficients in every
hidden layer, `Generic` those for all others. What was measured on a GPU is in [gpu-h100.md](gpu-h100.md)."""
_PREDICTION = """## Predicted times

These are PREDICTIONS, never measurements, for 1,000,000 edges, 32 per node, in float32: the benchmark's case `cloud` (8
fields of l <= 1, three hidden layers of 8 channels). The emulator counts the memory instructions of every warp. On an
H100, with 12 and 16 resident warps, Nsight Compute found that these kernels execute 7.4 and 8.4 instructions for each
memory instruction, and that 7.8 and 8.4 cycles pass between two instructions of a warp. The prediction takes the means
of these figures: resident warps share the cycles, at most four instructions start per cycle, and the clock is the
highest one. The two passes took 0.98 and 1.33 times what is predicted, which gives the two ends of a range. Occupancy
is the share of a multiprocessor's warps that registers and shared memory let be resident. Launches and counts are those
for the shared memory of sm_90; where there is less, a warp takes fewer edges at a time."""
_PER_ACCESS, _CYCLES = 7.9, 8.1  # instructions, and cycles between those of a warp; measured, see above
_TAKEN = 0.98, 1.33  # times the prediction


@dataclass
class Kernel:
    """One kernel for one architecture."""

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
        if "Specialised<" in self.name and not self.wide:
            found.append(f"{self.architecture} {self.name}: no load of 128 bits")
        return found


def tool(name: str) -> str:
    """Where the program is: on the path, or in NVIDIA's package of its name."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    found = shutil.which(name) or (str(packaged) if packaged.exists() else None)
    if found is None:
        sys.exit(f"{name}: not found. Install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or the CUDA toolkit.")
    return found


def readable(symbols: list[str]) -> dict[str, str]:
    """Mangled name → ``kernel<template arguments>``."""
    run = subprocess.run(["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True)
    names = {}
    for symbol, name in zip(symbols, run.stdout.splitlines(), strict=True):
        name = re.sub(r"implicit_steer::|gpu::|^void ", "", name)
        names[symbol] = re.sub(r" (?=>)", "", re.split(r"\((?![^<]*>)", name, maxsplit=1)[0])
    return names


def kernels_of(library: Path) -> list[Kernel]:
    """All kernels of all architectures."""
    cuobjdump = tool("cuobjdump")
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:{Path(cuobjdump).parent}:/usr/bin:/bin"}

    def dump(option: str) -> list[str]:
        run = subprocess.run([cuobjdump, option, library], check=True, capture_output=True, text=True, env=environment)
        return run.stdout.splitlines()

    found: dict[tuple[str, str], Kernel] = {}
    architecture = symbol = ""
    for line in dump("--dump-resource-usage"):
        if match := re.search(r"\barch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+?):?$", line):
            symbol = match[1]
        elif "REG:" in line:
            number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
            found[architecture, symbol] = Kernel(symbol, architecture, number["REG"], number["STACK"], number["SHARED"])
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


@dataclass
class Launch:
    """What the emulator counted of a kernel: memory instructions of warps per edge; threads and bytes of a block."""

    instructions: float
    threads: int
    shared: int

    def occupancy(self, kernel: Kernel) -> float:
        """Share of a multiprocessor's warps that can be resident."""
        warps = self.threads // 32
        of_registers = _REGISTERS // (-(-kernel.registers // 8) * 8 * self.threads)
        architecture = int(kernel.architecture[3:])
        of_system = 1024 if architecture < 90 else 0  # from sm_90 on cuobjdump counts it among the kernel's
        of_memory = _SHARED[architecture] * 1024 // (self.shared + kernel.shared + of_system)
        return min(of_registers, of_memory, _WARPS // warps) * warps / _WARPS


def predictions(kernels: Sequence[Kernel], launches: dict[str, Launch]) -> str:
    """The table of the kernels that were counted, in float, and those devices of bench/predict.py that they were
    compiled for."""
    rows, compiled = [], {kernel.architecture for kernel in kernels}
    devices = {label: device for label, device in DEVICES.items() if f"sm_{device.architecture}" in compiled}
    for label, device in devices.items():
        for name, launch in launches.items():
            specialised = name.endswith("_specialised")
            kinds = ("float, Specialised<Elu, 4, 8>",) if specialised else ("float", "float, float", "float, long")
            names = [f"{name.removesuffix('_specialised')}<{kind}>" for kind in kinds]
            (kernel,) = (k for k in kernels if k.name in names and k.architecture == f"sm_{device.architecture}")
            executed, occupancy = launch.instructions * _PER_ACCESS, launch.occupancy(kernel)
            cycles = 1e6 * executed * max(1 / 4, _CYCLES / (occupancy * _WARPS))
            low, high = (1e3 * share * cycles / (device.clock * 1e9 * device.multiprocessors) for share in _TAKEN)
            counts = f"{executed:,.0f}", f"{launch.instructions:,.0f}"
            rows.append([f"`{kernel.name}`", label, *counts, f"{100 * occupancy:.0f} %", f"{low:.2f} – {high:.2f}"])
    head = ["kernel", "device", "warp instructions per edge", "to memory", "occupancy", "ms, PREDICTED"]
    return table(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("counts", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE, help="(%(default)s)")
    options = parser.parse_args(arguments)
    kernels = kernels_of(options.library)
    failures = [failure for kernel in kernels for failure in kernel.failures()]
    launches = {}
    for line in options.counts.read_text().splitlines():
        name, instructions, threads, shared = line.split()
        launches[name] = Launch(float(instructions), int(threads), int(shared))
    parts = [_INTRODUCTION, resources(kernels), _PREDICTION, predictions(kernels, launches)]
    options.page.write_text("\n\n".join(parts) + "\n")
    print("\n".join(failures) or f"{len(kernels)} kernels: all gates hold, {options.page} says what they take")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
