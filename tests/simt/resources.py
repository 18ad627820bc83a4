"""What the compiled CUDA kernels take of a GPU, and gates on it: ``python tests/simt/resources.py LIBRARY PAGE``.

Reads registers, memory and instructions of every kernel from the library's machine code with cuobjdump; no GPU is
needed. Without ``--write`` the tables in PAGE, a Markdown file, must be those that are found.

Gates: no stack and no local memory, no generic loads (every address is known to be shared or global), and no arithmetic
in double in kernels of float. What may break them is listed in ``EXCUSED``, with the reason.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

BEGIN, END = "<!-- resources: written by tests/simt/resources.py -->", "<!-- end of resources -->"
# Kernel and count that need not be 0 → why.
EXCUSED = {
    ("sum_rows", "double"): "the sums of batch statistics are formed in double",
    ("norm_statistics", "double"): "variances from those sums",
}


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    shared: int  # static
    instructions: Counter = field(default_factory=Counter)

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
        base = self.name.split("<")[0]
        broken = [(what, n) for what, n in self.counts.items() if n and (base, what) not in EXCUSED]
        return [f"{self.architecture} {self.name}: {what} {n}, expected 0" for what, n in broken]


def tool(name: str) -> str:
    """Where the program is: on the path, or in NVIDIA's package of its name."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    found = shutil.which(name) or (str(packaged) if packaged.exists() else None)
    if found is None:
        sys.exit(f"{name}: not found. Install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or the CUDA toolkit.")
    return found


def readable(symbols: list[str]) -> dict[str, str]:
    """Mangled name → ``kernel<kinds of numbers>``."""
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
            count = found[architecture, symbol].instructions
            count[match[1]] += 1
            if "128" in (match[2] or "").split("."):
                count[f"{match[1]}.128"] += 1
    names = readable([kernel.name for kernel in found.values()])
    for kernel in found.values():
        kernel.name = names[kernel.name]
    return list(found.values())


def table(kernels: list[Kernel]) -> str:
    """Per kernel: registers by architecture, static shared memory, instructions and loads on the newest one."""
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a[3:]))
    by_name: dict[str, dict[str, Kernel]] = {}
    for k in kernels:
        by_name.setdefault(k.name, {})[k.architecture] = k
    columns = f"registers on {', '.join(architectures)} | instructions | LDS | LDG | stack, local, generic"
    rows = [f"| kernel | {columns} |", "|---|---|---|---|---|---|"]
    for name, of in sorted(by_name.items()):
        k = of[architectures[-1]]
        registers = ", ".join(str(of[a].registers) for a in architectures)
        worst = [max(o.counts[what] for o in of.values()) for what in ("stack", "local", "generic")]
        n = k.instructions
        size = f"{sum(v for key, v in n.items() if '.' not in key):,}"
        rows.append(f"| `{name}` | {registers} | {size} | {n['LDS']} | {n['LDG']} | {', '.join(map(str, worst))} |")
    return "\n".join(rows)


def main() -> None:
    """The gates, then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    options = parser.parse_args()
    kernels = kernels_of(options.library)
    failures = [failure for kernel in kernels for failure in kernel.failures()]
    text = options.page.read_text()
    before, rest = text.split(BEGIN)
    page = f"{before}{BEGIN}\n\n{table(kernels)}\n\n{END}{rest.split(END)[1]}"
    if options.write:
        options.page.write_text(page)
    elif page != text:
        failures.append(f"{options.page}: not what is found; run again with --write")
    print("\n".join(failures) or f"{len(kernels)} kernels: all gates hold, {options.page} says what they take")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
