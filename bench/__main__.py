"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from implicit_steer import backends
from implicit_steer.cases import LARGE, SMALL, SPACES

from . import accuracy, fresh, report, speed
from .steps import candidates

_NAMED = SMALL | LARGE
_QUICK = {"rounds": 3, "budget": 0.0}
_SORT_BUDGET = 3.0  # seconds per number of edges


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    top.add_argument("section", nargs="?", choices=("speed", "accuracy"), default="speed", help="(%(default)s)")
    cases = f"of implicit_steer.cases ({' '.join(LARGE)})"
    top.add_argument("--cases", nargs="+", choices=list(_NAMED), default=list(LARGE), metavar="CASE", help=cases)
    top.add_argument("--backends", nargs="+", metavar="NAME", help="(all that run here)")
    top.add_argument("--spaces", nargs="+", choices=list(SPACES), default=list(SPACES), metavar="SPACE", help="(all)")
    top.add_argument("--quick", action="store_true", help="3 rounds; no memory, no construction of models")
    top.add_argument("--repeats", type=int, metavar="N", default=15, help="rounds per measure at most (%(default)s)")
    budget = "for the rounds of a measure; at least 3 are made (%(default)s)"
    top.add_argument("--seconds", type=float, metavar="S", default=20.0, help=budget)
    top.add_argument("--threads", type=int, metavar="N", default=2, help="(%(default)s)")
    top.add_argument("--out", type=Path, metavar="DIR", default=Path("bench/results"), help="(%(default)s)")
    return top


def _backend_names(args: argparse.Namespace, top: argparse.ArgumentParser) -> list[str]:
    known = backends.availability()
    for name in args.backends or ():
        ok, reason = known.get(name, (False, f"unknown; there are {', '.join(known)}"))
        if not ok:
            top.error(f"--backends {name}: {reason}")
    return args.backends or [name for name, (ok, _) in known.items() if ok]


def run_speed(args: argparse.Namespace, names: list[str]) -> int:
    """Gate, then measure, print and write. 1 on a red gate."""
    rounds, budget = _QUICK.values() if args.quick else (args.repeats, args.seconds)
    results = {"environment": report.environment(), "skipped": {}}
    chosen = {}
    for name in args.cases:
        chosen[_NAMED[name]], results["skipped"][name] = candidates(_NAMED[name], names)
    results["gate"] = [check.record() for check in speed.check_all(chosen)]
    heading = report.header(results["environment"]) + "\n\n" + report.gate_text(results["gate"])
    print(heading)
    if not all(check["ok"] for check in results["gate"]):
        report.write(args.out, "speed", results, heading)
        return 1
    whole = not args.quick
    results["times"] = speed.times(chosen, rounds, budget)
    results["sorting"] = speed.sorting(rounds, min(budget, _SORT_BUDGET))
    results["memory"] = speed.memory(chosen, args.threads) if whole and fresh.measures_memory() else []
    results["lowering"] = fresh.ask("lowering", args.threads) if whole else {}
    text = report.speed_text(results)
    print("\n" + text)
    report.write(args.out, "speed", results, heading + "\n\n" + text)
    report.speed_plots(results, args.out)
    return 0


def run_accuracy(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    results = {"environment": report.environment()}
    results["equivariance"] = accuracy.equivariance(args.spaces)
    results["convergence"] = accuracy.convergence()
    text = report.header(results["environment"]) + "\n\n" + accuracy.text(results)
    print(text)
    report.write(args.out, "accuracy", results, text)
    accuracy.plot(results, args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one section; the exit status."""
    top = parser()
    args = top.parse_args(argv)
    names = _backend_names(args, top)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    status = run_accuracy(args) if args.section == "accuracy" else run_speed(args, names)
    print(f"\nwritten to {args.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
