"""``python -m implicit_steer``: train, md, demo, info."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from . import info, md, train, train_forces


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m implicit_steer", description="Steerable implicit convolutions.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{train,md,demo,info}")
    training = commands.add_parser("train", help="train a network")
    tasks = training.add_subparsers(dest="task", required=True, metavar="{qm9,forces}")
    qm9 = tasks.add_parser(
        "qm9",
        help="a property of small molecules",
        description="Train the paper's network on QM9; print the mean absolute error on the test set.",
    )
    train.add_qm9_arguments(qm9)
    qm9.set_defaults(run=train.main)
    forces = tasks.add_parser(
        "forces",
        help="a potential of metals or molecules",
        description="Fit a potential to energies and forces; print the mean absolute errors on the test set.",
    )
    train_forces.add_forces_arguments(forces)
    forces.set_defaults(run=train_forces.main)
    dynamics = commands.add_parser(
        "md",
        help="molecular dynamics with a potential",
        description="Dynamics at constant energy in float64; print the drift of the total energy.",
    )
    md.add_md_arguments(dynamics)
    dynamics.set_defaults(run=md.main)
    demo = commands.add_parser("demo", help="a tour on real molecules: at most five minutes")
    demo.add_argument("--out", metavar="DIR", default="demo", help="pictures and figures (%(default)s)")
    demo.set_defaults(run=_demo)
    commands.add_parser("info", help="versions and backends").set_defaults(run=_info)
    return top


def _demo(args: argparse.Namespace) -> None:
    from .demo import main as demo  # it needs the extras escnn and train

    demo(args)


def _info(args: argparse.Namespace) -> None:
    print(info())


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("implicit_steer").setLevel(logging.INFO)
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
