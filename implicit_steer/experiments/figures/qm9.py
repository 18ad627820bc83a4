"""``python -m implicit_steer figure qm9``: the paper's ablation of edge attributes, a run of each, and their curves."""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...training import viz
from ...training.runs import add_numbers
from ..data.qm9 import EDGE_ATTRIBUTES
from ..train.qm9 import QM9Options, add_schedule, train_qm9
from .results import kept_result, markdown

DEFAULT = QM9Options()
NUMBERS = {  # options of the runs that can be given → help
    "epochs": "passes over the training set",
    "batch_size": "molecules per step",
    "lr": "first learning rate",
    "seed": "of weights and shuffling",
    "channels": "fields per hidden layer",
}
HEAD = ("edge attributes", "parameters", "test MAE", "validation MAE", "s per epoch", "h in all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``figure qm9``."""
    add = parser.add_argument
    variants = "(all three)"
    add("--edge-attr", nargs="+", choices=EDGE_ATTRIBUTES, default=tuple(EDGE_ATTRIBUTES), help=variants)
    add("--target", default=DEFAULT.target, metavar="NAME", help="as in train qm9 (%(default)s)")
    add("--limit", type=int, metavar="N", help="use N training molecules (all: 100,000)")
    add_numbers(parser, DEFAULT, NUMBERS)
    add_schedule(parser, DEFAULT)
    add("--data", metavar="DIR", help="as in train qm9")
    add("--cache", metavar="DIR", help="prepared data ($IMPLICIT_STEER_CACHE, ~/.cache/implicit_steer)")
    add("--runs", metavar="DIR", default="runs/figure-qm9", help="training runs (%(default)s)")
    add("--out", metavar="FILE", default="docs/qm9.png", help="the picture (%(default)s)")
    parser.set_defaults(run=main)


def log_column(out: Path, name: str) -> dict[int, float]:
    """Epochs passed → the value in a column of a run's log."""
    with (out / "log.csv").open(newline="") as file:
        return {int(row["epoch"]) + 1: float(row[name]) for row in csv.DictReader(file)}


def table(results: Mapping[str, dict[str, Any]], runs: Path) -> str:
    """A Markdown table with one row for each variant."""
    rows = []
    for name, result in results.items():
        errors = [f"{result[error]:.2f} {result['unit']}" for error in ("test_mae", "val_mae")]
        seconds = log_column(runs / name, "seconds").values()  # of epochs, their validation included
        times = f"{statistics.median(seconds):.0f}", f"{sum(seconds) / 3600:.1f}"
        rows.append([name, f"{result['parameters']:,}", *errors, *times])
    return markdown(HEAD, rows)


def main(args: argparse.Namespace) -> None:
    """Run what is missing, draw, and print the table."""
    runs, results = Path(args.runs), {}
    names = ("target", "limit", "data", "cache", "schedule", *NUMBERS)
    options = replace(DEFAULT, **{name: getattr(args, name) for name in names})
    for name in args.edge_attr:
        results[name] = kept_result(replace(options, edge_attr=name, out=str(runs / name)), train_qm9)
    unit = next(iter(results.values()))["unit"]
    molecules = next(iter(results.values()))["molecules"]["train"]
    figure = viz.log_lines(
        {name: log_column(runs / name, "val_mae") for name in results},
        xlabel="epochs",
        ylabel=f"validation error of {options.target} (MAE, {unit})",
        title=f"QM9: {molecules:,} training molecules in batches of {options.batch_size}, "
        f"{options.channels} fields per layer, seed {options.seed}",
    )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(table(results, runs))
    print(f"{args.out}")
