"""``python -m implicit_steer figure nbody``: an experiment of the paper as a grid of runs, drawn with its spread.

Runs are kept: a finished run is read, an interrupted one goes on, a missing one is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scipy.stats import ttest_ind

from ...training import viz
from ...training.runs import add_numbers
from ..train.nbody import NBodyOptions, train_nbody
from .results import kept_result, markdown, mean_and_spread

NAMES = {"o3": "O(3)", "so2": "SO(2) about z"}
# Networks of one width: a particle has 8 · 4 and 11 · 3 hidden coefficients, a kernel MLP 8 · 16 and 18 · 7.
WIDTHS = {"o3": {"channels": 8, "kernel_channels": 8}, "so2": {"channels": 11, "kernel_channels": 18}}
STRENGTHS = (0.0, 1.0, 10.0)
DEFAULT = NBodyOptions(limit=10_000, epochs=12, blocks=1, num_threads=1)
NUMBERS = {  # options of the runs that can be given → help
    "limit": "training simulations",
    "epochs": "passes over them",
    "lr": "first learning rate",
    "blocks": "residual blocks",
    "num_threads": "CPU threads",
}

Errors = Mapping[str, Mapping[float, Sequence[float]]]  # group → strength → test error of every seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``figure nbody``."""
    add = parser.add_argument
    strengths = "stiffnesses of the springs to the planes (0 1 10)"
    add("--strengths", type=float, nargs="+", metavar="K", default=STRENGTHS, help=strengths)
    add("--seeds", type=int, metavar="N", default=3, help="runs of each (%(default)s)")
    add_numbers(parser, DEFAULT, NUMBERS)
    add("--cache", metavar="DIR", help="simulations ($IMPLICIT_STEER_CACHE, ~/.cache/implicit_steer)")
    add("--runs", metavar="DIR", default="runs/figure-nbody", help="training runs (%(default)s)")
    add("--out", metavar="FILE", default="docs/nbody.png", help="the picture (%(default)s)")
    parser.set_defaults(run=main)


def nbody_errors(options: NBodyOptions, runs: Path, strengths: Sequence[float], seeds: int) -> Errors:
    """The test errors of all runs in ``runs``, seed by seed; trains those that are not there.

    Raises ``ValueError`` where a run there has other options.
    """
    errors: dict[str, dict[float, list[float]]] = {name: {k: [] for k in strengths} for name in NAMES}
    for seed in range(seeds):
        for strength in strengths:
            for group in NAMES:
                out = runs / f"k{strength:g}-{group}-seed{seed}"
                own = replace(options, strength=strength, group=group, seed=seed, out=str(out), **WIDTHS[group])
                errors[group][strength].append(kept_result(own, train_nbody)["test_mse"])
    return errors


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer figure nbody``: run what is missing, draw, and print the table."""
    options = replace(DEFAULT, cache=args.cache, **{name: getattr(args, name) for name in NUMBERS})
    errors = nbody_errors(options, Path(args.runs), args.strengths, args.seeds)
    figure = viz.error_bars(
        {NAMES[group]: curve for group, curve in errors.items()},
        xlabel="stiffness k of the springs between particles and planes",
        ylabel="test error of the displacement (MSE)",
        title=f"{options.limit:,} training simulations, {options.epochs} epochs, mean and s.d. of {args.seeds} seeds",
    )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out)
    print(nbody_table(errors, args.strengths))
    print(f"{args.out}")


def nbody_table(errors: Errors, strengths: Sequence[float]) -> str:
    """Markdown: mean and standard deviation of every network's errors, and p, the probability of means so far apart or
    farther if both networks had the same (Welch's t-test, from two seeds on)."""
    rows = []
    for strength in strengths:
        samples = [errors[group][strength] for group in NAMES]
        cells = [f"{mean:.2e} ± {spread:.1e}" for mean, spread in map(mean_and_spread, samples)]
        p = f"{ttest_ind(*samples, equal_var=False).pvalue:.2g}" if len(samples[0]) > 1 else "–"
        rows.append([f"{strength:g}", *cells, p])
    return markdown(("k", *NAMES.values(), "p"), rows, first="---:")
