"""What can be said about the Triton kernels without a GPU.

``python -m bench.gpu resources`` compiles the kernels that the cases launch, for A100, H100 and B200, and writes
docs/gpu-resources.md; ``python -m bench.gpu predict`` writes docs/gpu-predictions.md; ``python -m bench.gpu predict
--cuda FOLDER EMULATED`` prints the predictions for the CUDA kernels, with the arguments of bench.cuda, whose page has
them, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from implicit_steer.ops.triton import aot
from implicit_steer.ops.triton.configuration import exact_product
from implicit_steer.ops.triton.tables import tables
from implicit_steer.plan import Plan
from implicit_steer.plan.tabulated import tabulated
from implicit_steer.testing.cases import LARGE, SMALL

from . import cuda, predict
from .report import table

TABLES = {"cloud-table": "cloud"}  # cases with splines in place of the hidden layers → which
CASES = ("cloud", "cloud-so2", "o3-vector-attr", "c4")  # zonal, planar, no frame, finite group
_KNOTS = 256
_FOLDER = Path("docs")
_HEAD = ["kernel", "for", "warps", "registers", "stack", "shared memory", "occupancy", "tensor", "instructions"]
_RESOURCES = """# What the Triton kernels need

`python -m bench.gpu resources` reads this from code compiled ahead of time (float32, exact products). The tables show
registers per thread, bytes of stack and of shared memory, the share of a multiprocessor's warps that can be resident,
tensor-core instructions, and all instructions in the code. Hidden layers with more than 32 coefficients
of order ≥ 1 multiply on the ordinary units. `cloud-table` is `cloud` with a table of 256 knots. What was measured on a
GPU is in [gpu-h100.md](gpu-h100.md)."""


def meant_for_tensor_cores(plan: Plan) -> bool:
    """Whether the hidden layers' products run on tensor cores."""
    return exact_product(tables(plan).sizes) == "tf32x3"


def _plan(name: str) -> Plan:
    if name in TABLES:
        plan = LARGE[TABLES[name]].layer(norm=None, table=_KNOTS).implicit_kernel.plan
        return tabulated(plan, 1 + (plan.n_attributes > 0))
    return (SMALL | LARGE)[name].layer(norm=None).implicit_kernel.plan


def resources_text(names: Sequence[str], architectures: Sequence[int]) -> tuple[str, list[str]]:
    """The table, and what the gates hold against the kernels."""
    parts, failures = [], []
    for name in names:
        plan, rows = _plan(name), []
        on_tensor_cores = ("layers", "contract") if meant_for_tensor_cores(plan) else ("contract",)
        for found in tqdm(aot.report(plan, architectures), desc=name, unit="kernel"):
            failures += found.failures(found.kernel.startswith(on_tensor_cores))
            occupancy = f"{100 * found.occupancy:.0f} %"
            numbers = (found.warps, found.registers, found.stack, found.shared, occupancy, found.tensor_instructions)
            rows.append([found.kernel, f"sm_{found.architecture}", *map(str, numbers), str(found.size)])
        parts.append(f"## Case `{name}`\n\n{table(_HEAD, rows)}")
    verdict = "\n".join(["Gates failed:", *(f"- {f}" for f in failures)]) if failures else "All gates passed."
    return "\n\n".join([_RESOURCES, *parts, verdict]) + "\n", failures


def predictions_text(names: Sequence[str]) -> str:
    """Every launch on every device, and the sums."""
    parts = [f"# Predicted times\n\n{predict.__doc__.strip()}\n\nBy `python -m bench.gpu predict`: float32, "
             f"{predict.NODES * predict.DEGREE:,} edges, {predict.DEGREE} per node.\n"]  # fmt: skip
    for name in names:
        plan = _plan(name)
        for label, device in predict.DEVICES.items():
            found = predict.predict(plan, device)
            rows = []
            for p in found:
                low, high = p.microseconds
                numbers = (f"{p.megabytes:.0f}", f"{p.instructions:.0f}", p.bound, f"{low:.0f} – {high:.0f}")
                rows.append([p.kernel, f"{p.programs:,}", *numbers])
            head = ["kernel", "programs", "MB", "10⁶ warp instructions", "bound", "µs, PREDICTED"]
            sums = [f"{k} {a:.2f} – {b:.2f} ms" for k, (a, b) in predict.totals(found).items()]
            parts.append(f"## {name}, {label}: PREDICTED {', '.join(sums)}\n\n{table(head, rows)}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 where a gate failed."""
    top = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    top.add_argument("section", choices=["resources", "predict"])
    cases = f"({' '.join(CASES)}; resources: {' '.join(TABLES)}, too)"
    top.add_argument("--cases", nargs="+", choices=list(SMALL | LARGE | TABLES), metavar="CASE", help=cases)
    top.add_argument("--out", type=Path, default=_FOLDER, metavar="DIR", help="(%(default)s)")
    top.add_argument("--cuda", nargs=2, type=Path, metavar=("FOLDER", "EMULATED"), help="predict: the CUDA kernels")
    args = top.parse_args(arguments)
    if args.cuda and args.section != "predict":
        top.error(f"--cuda: expected section predict, got {args.section}")
    if args.cuda:
        folder, emulated = args.cuda
        kernels = cuda.kernels_of(folder / "libimplicit_steer_cuda.so")
        print(cuda.predictions_text(cuda.counted(kernels, folder, emulated)))
        return 0
    failures = []
    if args.section == "resources":
        text, failures = resources_text(args.cases or (*CASES, *TABLES), list(aot.ARCHITECTURES))
    else:
        text = predictions_text(args.cases or CASES)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "gpu-resources.md" if args.section == "resources" else "gpu-predictions.md"
    (args.out / name).write_text(text)
    print(text)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
