"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from implicit_steer.ops import select
from implicit_steer.testing.cases import GROUPS, LARGE, SMALL, SPACES

from . import (
    accuracy,
    bound,
    device,
    dispatch,
    dispatch_triton,
    forces,
    potentials,
    process,
    related,
    report,
    scaling,
    small,
    speed,
    table,
    trainers,
    widths,
)
from .steps import DEVICES, candidates, use_device

_NAMED = SMALL | LARGE | GROUPS
_QUICK = {"rounds": 3, "budget": 0.0}
_QUICK_CASES, _QUICK_EDGES = ["molecules"], [1_000, 10_000]
_COMPILED = ["cloud", "molecules"]  # each takes minutes to compile
_MEMORY = ["cloud", "molecules", "materials", "cloud-l2"]  # unless --cases names others; a process per case
_SORT_BUDGET = 3.0  # seconds per number of edges


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    top.add_argument("section", nargs="?", choices=list(_SECTIONS), default="speed", help="(%(default)s)")
    cases = f"of implicit_steer.testing.cases ({' '.join(LARGE)} and one per space)"
    top.add_argument("--cases", nargs="+", choices=list(_NAMED), metavar="CASE", help=cases)
    compiled = f"cases on which eager is compiled as well ({' '.join(_COMPILED)})"
    top.add_argument("--compile", nargs="*", choices=list(_NAMED), metavar="CASE", help=compiled)
    top.add_argument("--edges", nargs="+", type=int, metavar="E", help=f"of scaling {scaling.EDGES}")
    top.add_argument("--widths", nargs="+", type=int, metavar="C", help=f"of related {list(widths.WIDTHS)}")
    top.add_argument("--backends", nargs="+", metavar="NAME", help="(all that run here)")
    top.add_argument("--spaces", nargs="+", choices=list(SPACES), default=list(SPACES), metavar="SPACE", help="(all)")
    top.add_argument(
        "--quick",
        action="store_true",
        help=f"3 rounds; {_QUICK_CASES[0]}, no compiling, no memory, no model; few edges",
    )
    top.add_argument("--repeats", type=int, metavar="N", default=15, help="rounds per measure at most (%(default)s)")
    budget = "for the rounds of a measure; at least 3 are made (%(default)s)"
    top.add_argument("--seconds", type=float, metavar="S", default=3.0, help=budget)
    where = "where speed and related are measured; speed on cuda with the ceilings of that device (%(default)s)"
    top.add_argument("--device", choices=DEVICES, default="cpu", help=where)
    tune = "with --device cuda: first measure and keep the fastest configurations of Triton's kernels"
    top.add_argument("--tune", action="store_true", help=tune)
    _add_potentials(top)
    top.add_argument("--threads", type=int, metavar="N", default=2, help="(%(default)s)")
    top.add_argument("--out", type=Path, metavar="DIR", default=Path("bench/results"), help="(%(default)s)")
    return top


def _add_potentials(top: argparse.ArgumentParser) -> None:
    group = top.add_argument_group("potentials")
    for name in ("mace", "nequip"):
        text = f"interpreter of an environment that has {name} (%(default)s)"
        group.add_argument(f"--{name}", metavar="PYTHON", default=f"build/{name}/bin/python", help=text)
    plan = potentials.Plan()
    minutes = f"of training; several give errors against time {plan.minutes}"
    group.add_argument("--minutes", nargs="+", type=float, metavar="M", help=minutes)
    group.add_argument("--systems", nargs="+", choices=plan.systems, metavar="SYSTEM", help=f"of {plan.systems}")
    group.add_argument("--structures", nargs="+", type=int, metavar="N", help=f"to train on {plan.structures}")


def _backend_names(args: argparse.Namespace, top: argparse.ArgumentParser) -> list[str]:
    known = select.availability()
    for name in args.backends or ():
        ok, reason = known.get(name, (False, f"unknown; there are {', '.join(known)}"))
        if not ok:
            top.error(f"--backends {name}: {reason}")
    return args.backends or [name for name, (ok, _) in known.items() if ok]


def _effort(args: argparse.Namespace) -> tuple[int, float]:
    """Rounds at most, and seconds for them."""
    return tuple(_QUICK.values()) if args.quick else (args.repeats, args.seconds)


def run_speed(args: argparse.Namespace, names: list[str]) -> int:
    """Gate, then measure, print and write. 1 on a red gate."""
    if args.device == "cuda":
        return run_on_gpu(args, names)
    (rounds, budget), whole = _effort(args), not args.quick
    cases = args.cases or (list(LARGE | GROUPS) if whole else _QUICK_CASES)
    compiled = args.compile if args.compile is not None else _COMPILED if whole else []
    results = {"environment": report.environment(), "skipped": {}}
    chosen = {}
    for name in cases:
        case = _NAMED[name]
        chosen[case], results["skipped"][name] = candidates(case, names, compile_eager=name in compiled)
    results["gate"] = [check.record() for check in speed.check_all(chosen)]
    heading = report.header(results["environment"]) + "\n\n" + report.gate_text(results["gate"])
    print(heading)
    if not all(check["ok"] for check in results["gate"]):
        report.write(args.out, "speed", results, heading)
        return 1
    results["times"] = speed.times(chosen, rounds, budget)
    bounded = [case for case, found in chosen.items() if bound.CANDIDATE in found]
    results["bound"] = bound.measure(bounded, rounds, budget)
    results["sorting"] = speed.sorting(rounds, min(budget, _SORT_BUDGET))
    weighed = {case: found for case, found in chosen.items() if case.name in (args.cases or _MEMORY)}
    results["memory"] = speed.memory(weighed, args.threads) if whole and process.measures_memory() else []
    results["lowering"] = process.ask(speed.construction, threads=args.threads) if whole else {}
    text = "\n\n".join([report.speed_text(results), bound.text(results["bound"])])
    print("\n" + text)
    report.write(args.out, "speed", results, heading + "\n\n" + text)
    report.speed_plots(results, args.out)
    return 0


def _has_cuda() -> bool:
    """Whether there is a CUDA device; where not, that is printed."""
    if not torch.cuda.is_available():
        print("--device: expected a CUDA device for 'cuda', got none that torch finds.", file=sys.stderr)
    return torch.cuda.is_available()


def run_on_gpu(args: argparse.Namespace, names: list[str]) -> int:
    """Do what :func:`run_speed` does, on a CUDA device. 1 without one or on a red gate."""
    if not _has_cuda():
        return 1
    use_device("cuda")
    cases = [_NAMED[name] for name in args.cases or (_QUICK_CASES if args.quick else LARGE)]
    return device.run(cases, names, args.compile or (), _effort(args), args.out, args.tune)


def run_scaling(args: argparse.Namespace, names: list[str]) -> int:
    """Measure, print and write. 1 where the system does not tell peak memory."""
    if not process.measures_memory():
        print("scaling: expected a system that tells peak memory (Linux), got none.", file=sys.stderr)
        return 1
    sizes = args.edges or (_QUICK_EDGES if args.quick else scaling.EDGES)
    results = {"environment": report.environment(), "curves": scaling.measure(names, sizes, args.threads)}
    _finish("scaling", results, scaling.text(results["curves"]), args.out)
    scaling.plot(results["curves"], args.out)
    return 0


def run_small(args: argparse.Namespace, names: list[str]) -> int:
    """Measure, print and write."""
    results = {"environment": report.environment(), "calls": small.measure(names, *_effort(args))}
    _finish("small", results, small.text(results["calls"]), args.out)
    return 0


def run_dispatch(args: argparse.Namespace, _: list[str]) -> int:
    """Measure, print and write; `triton` where it is installed. 1 where a bound does not hold."""
    rounds, seconds = _effort(args)
    results = {"environment": report.environment(), "calls": dispatch.measure(rounds, seconds)}
    text, broken = dispatch.text(results["calls"]), dispatch.broken(results["calls"])
    if importlib.util.find_spec("triton") is not None:
        results["triton"] = dispatch_triton.measure_all(seconds=seconds)
        text += f"\n\n{dispatch_triton.text(results['triton'])}"
        broken += dispatch_triton.broken(results["triton"])
    _finish("dispatch", results, text, args.out)
    return 1 if broken else 0


def run_related(args: argparse.Namespace, _: list[str]) -> int:
    """Measure, print and write. 1 without e3nn, or without the device."""
    if args.device == "cuda" and not _has_cuda():
        return 1
    use_device(args.device)
    if importlib.util.find_spec(related.NAME) is None:
        print(f"related: expected the package {related.NAME}, got none. Run: pip install e3nn", file=sys.stderr)
        return 1
    sizes = args.widths or ([16] if args.quick else list(widths.WIDTHS))
    results = {"environment": report.environment()} | widths.measure(sizes, *_effort(args))
    _finish("related", results, widths.text(results), args.out)
    return 0


def run_forces(args: argparse.Namespace, names: list[str]) -> int:
    """Measure, print and write. 1 on a red gate."""
    results = {"environment": report.environment()} | forces.measure(names, *_effort(args), args.threads)
    _finish("forces", results, forces.text(results), args.out)
    return 0 if results["green"] else 1


def run_table(args: argparse.Namespace, _: list[str]) -> int:
    """Measure, print and write. 1 where a bound does not hold."""
    results = {"environment": report.environment()} | table.measure(args.quick, *_effort(args), args.threads)
    _finish("table", results, table.text(results), args.out)
    table.plots(results, args.out)
    return 1 if results["broken"] else 0


def run_potentials(args: argparse.Namespace, _: list[str]) -> int:
    """Measure, print and write."""
    given = {name: getattr(args, name) for name in ("minutes", "systems", "structures") if getattr(args, name)}
    plan = (potentials.QUICK if args.quick else potentials.Plan())._replace(**given)
    results = {"environment": report.environment()}
    everyone = trainers.trainers(args.mace, args.nequip, args.threads)
    results |= potentials.measure(plan, everyone, args.out / "potentials")
    _finish("potentials", results, potentials.text(results), args.out)
    potentials.plots(results, args.out)
    return 0


def _finish(section: str, results: dict, tables: str, out: Path) -> None:
    text = report.header(results["environment"]) + "\n\n" + tables
    print(text)
    report.write(out, section, results, text)


def run_accuracy(args: argparse.Namespace, _: list[str]) -> int:
    """Measure, print and write."""
    results = {"environment": report.environment()}
    results["equivariance"] = accuracy.equivariance(args.spaces)
    results["convergence"] = accuracy.convergence()
    _finish("accuracy", results, accuracy.text(results), args.out)
    accuracy.plot(results, args.out)
    return 0


_SECTIONS = {
    "speed": run_speed,
    "forces": run_forces,
    "accuracy": run_accuracy,
    "scaling": run_scaling,
    "small": run_small,
    "dispatch": run_dispatch,
    "related": run_related,
    "table": run_table,
    "potentials": run_potentials,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one section; the exit status."""
    top = parser()
    args = top.parse_args(argv)
    names = _backend_names(args, top)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    status = _SECTIONS[args.section](args, names)
    print(f"\nwritten to {args.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
