"""``python -m implicit_steer figure groups``: a classifier of clouds per group and seed, and a table of accuracies."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...training.runs import add_numbers
from ..train.modelnet import GROUPS, ModelNetOptions, train_modelnet
from .results import kept_result, markdown, mean_and_spread

NAMES = {
    "m": "M",
    "inv": "Inv",
    "so2-inv": "SO(2) ⋊ Inv",
    "so2": "SO(2)",
    "so2-f": "SO(2) ⋊ F",
    "so2-m": "SO(2) ⋊ M",
    "so3": "SO(3)",
    "o3": "O(3)",
}
DEFAULT = ModelNetOptions(
    data="furniture",
    points=64,
    neighbours=8,
    copies=8,
    epochs=24,
    batch_size=16,
    lr=4e-3,
    dropout=0.2,
    num_threads=1,
    progress=False,
)
NUMBERS = {  # options of the runs that can be given → help
    "points": "points of a cloud",
    "neighbours": "edges into every point",
    "levels": "convolutions, each onto half of the points",
    "width": "numbers per point of a hidden layer, about",
    "copies": "samples of every test mesh",
    "epochs": "passes over the training set",
    "batch_size": "clouds per step",
    "lr": "first learning rate",
    "num_threads": "CPU threads",
}
HEAD = ("group", "parameters", "accuracy, %", "of single samples, %", "time per run, s")
CIRCLE = 10  # samples around the axis in kernels of groups with SO(2)

Results = Mapping[str, Sequence[dict[str, Any]]]  # group → results of every seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``figure groups``."""
    add = parser.add_argument
    add("--data", metavar="PATH", default=DEFAULT.data, help="as in train modelnet (%(default)s)")
    add("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help="(all eight)")
    add("--seeds", type=int, metavar="N", default=3, help="runs of each (%(default)s)")
    add_numbers(parser, DEFAULT, NUMBERS)
    circle = "samples around the axis in kernels of groups with SO(2) (%(default)s)"
    add("--circle", type=int, metavar="N", default=CIRCLE, help=circle)
    add("--cache", metavar="DIR", help="meshes ($IMPLICIT_STEER_CACHE, ~/.cache/implicit_steer)")
    add("--runs", metavar="DIR", default="runs/figure-groups", help="training runs (%(default)s)")
    parser.set_defaults(run=main)


def results(options: ModelNetOptions, runs: Path, groups: Sequence[str], seeds: int, circle: int) -> Results:
    """The results of all runs in ``runs``, seed by seed; trains those that are not there.

    Raises ``ValueError`` where a run there has other options.
    """
    found: dict[str, list[dict[str, Any]]] = {group: [] for group in groups}
    for seed in range(seeds):
        for group in groups:
            sampling = f"exact-{circle}" if group.startswith("so2") else options.sampling
            own = {"group": group, "seed": seed, "sampling": sampling, "out": str(runs / f"{group}-seed{seed}")}
            found[group].append(kept_result(replace(options, **own), train_modelnet))
    return found


def table(found: Results) -> str:
    """Markdown: accuracy of every group, mean ± standard deviation over seeds, in %."""
    rows = []
    for group, runs in found.items():
        cells = [NAMES[group], str(runs[0]["parameters"])]
        for name in ("test_accuracy", "sample_accuracy"):
            mean, spread = mean_and_spread([100 * run[name] for run in runs])
            cells.append(f"{mean:.1f} ± {spread:.1f}")
        cells.append(f"{mean_and_spread([run['seconds'] for run in runs])[0]:.0f}")
        rows.append(cells)
    return markdown(HEAD, rows)


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer figure groups``: run what is missing, and print the table."""
    given = {name: getattr(args, name) for name in ("data", "cache", *NUMBERS)}
    options = replace(DEFAULT, **given)
    found = results(options, Path(args.runs), args.groups, args.seeds, args.circle)
    meshes = next(iter(found.values()))[0]["meshes"]
    print(
        f"{options.data}: {meshes['train']} meshes for training, {meshes['val']} for validation, {meshes['test']} for"
    )
    print(f"testing; {options.points} points, {options.epochs} epochs, mean ± s.d. of {args.seeds} seeds\n")
    print(table(found))
