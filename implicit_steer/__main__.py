"""``python -m implicit_steer``: train, groups, md, demo, info."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from . import info, md
from .train import TASKS, groups


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m implicit_steer", description="Steerable implicit convolutions.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{train,groups,md,demo,info}")
    training = commands.add_parser("train", help="train a network")
    tasks = training.add_subparsers(dest="task", required=True, metavar=f"{{{','.join(TASKS)}}}")
    for name, task in TASKS.items():
        command = tasks.add_parser(name, help=task.HELP, description=task.DESCRIPTION)
        task.add_arguments(command)
        command.set_defaults(run=task.main)
    comparison = commands.add_parser("groups", help=groups.HELP, description=groups.DESCRIPTION)
    groups.add_arguments(comparison)
    comparison.set_defaults(run=groups.main)
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
