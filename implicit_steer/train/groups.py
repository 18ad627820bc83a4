"""``python -m implicit_steer groups --data furniture``: one network per group and seed, and a table of accuracies."""

from __future__ import annotations

import argparse
import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .._check import require
from .modelnet import GROUPS, ModelNetOptions, train_modelnet
from .modelnet import add_arguments as add_modelnet_arguments

log = logging.getLogger(__name__)

HELP = "compare the paper's eight groups on classes of meshes"
DESCRIPTION = (
    "Train a classifier of clouds per group and seed, each like 'train modelnet', continuing where an interrupted "
    "comparison stopped; print the table of accuracies. --group, --seed, --resume and --overwrite have no effect."
)
NAMES = dict(zip(GROUPS, ("M", "Inv", "SO(2) ⋊ Inv", "SO(2)", "SO(2) ⋊ F", "SO(2) ⋊ M", "SO(3)", "O(3)"), strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``train modelnet``, and those of the comparison."""
    study = parser.add_argument_group("comparison")
    study.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help="(all eight)")
    study.add_argument("--seeds", type=int, metavar="N", default=3, help="runs of every group (%(default)s)")
    circle = "samples around the axis in kernels of the groups with SO(2) (as --sampling says)"
    study.add_argument("--circle", type=int, metavar="N", help=circle)
    study.add_argument("--table", action="store_true", help="no training: the table of the runs that are in --out")
    add_modelnet_arguments(parser)


def compare(
    options: ModelNetOptions, out: Path, groups: tuple[str, ...] = GROUPS, seeds: int = 3, circle: int | None = None
) -> None:
    """Train ``groups`` × seeds 0 … ``seeds`` − 1 in ``out/GROUP-seedSEED``; complete runs are left as they are."""
    require(seeds >= 1, "seeds", "at least 1", seeds)
    for seed in range(seeds):
        for group in groups:
            folder = out / f"{group}-seed{seed}"
            if (folder / "result.json").exists():
                continue
            sampling = f"exact-{circle}" if circle and group.startswith("so2") else options.sampling
            begun = (folder / "last.ckpt").exists()
            changes = {"group": group, "seed": seed, "sampling": sampling, "out": str(folder), "resume": begun}
            result = train_modelnet(replace(options, **changes, overwrite=False))
            log.info("%s, seed %d: %.1f %%", NAMES[group], seed, 100 * result["test_accuracy"])


def table(out: Path) -> str:
    """Markdown: accuracy of every group in ``out``, mean ± standard deviation over seeds, in %."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*/result.json")):
        result = json.loads(path.read_text())
        with (path.parent / "log.csv").open(newline="") as file:
            result["epoch_seconds"] = float(np.median([float(row["seconds"]) for row in csv.DictReader(file)]))
        runs.setdefault(result["options"]["group"], []).append(result)
    require(bool(runs), str(out), "complete runs GROUP-seedSEED", "none", "Run the comparison without --table.")
    lines = [
        "| group | parameters | accuracy, % | of single samples, % | seconds per epoch | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for group in (group for group in GROUPS if group in runs):
        columns = [str(runs[group][0]["parameters"])]
        for name in ("test_accuracy", "sample_accuracy"):
            values = 100 * np.array([run[name] for run in runs[group]])
            columns.append(f"{values.mean():.1f} ± {values.std(ddof=min(1, len(values) - 1)):.1f}")
        columns += [f"{np.median([run['epoch_seconds'] for run in runs[group]]):.1f}", str(len(runs[group]))]
        lines.append(f"| {NAMES[group]} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer groups``: train what is missing, and print the table."""
    options = ModelNetOptions.parsed(args)
    out = Path(args.out or "runs/groups")
    if not args.table:
        compare(options, out, tuple(args.groups), args.seeds, args.circle)
    print(table(out))
