"""The commands of ``python -m implicit_steer``: train, figure, md, certify, demo, info."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from ._check import is_explained
from .experiments.figures import groups as figure_groups
from .experiments.figures import nbody as figure_nbody
from .experiments.figures import qm9 as figure_qm9
from .experiments.train import modelnet, nbody, qm9
from .info import info
from .potentials import certificate, md
from .potentials import train as forces

TASKS = {"qm9": qm9, "forces": forces, "nbody": nbody, "modelnet": modelnet}


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m implicit_steer", description="Steerable implicit convolutions.")
    commands = top.add_subparsers(dest="command", required=True, metavar="{train,figure,md,certify,demo,info}")
    training = commands.add_parser("train", help="train a network")
    tasks = training.add_subparsers(dest="task", required=True, metavar=f"{{{','.join(TASKS)}}}")
    for name, task in TASKS.items():
        command = tasks.add_parser(name, help=task.HELP, description=task.DESCRIPTION)
        task.add_arguments(command)
        command.set_defaults(run=task.main)
    figure = commands.add_parser("figure", help="an experiment of the paper: a grid of runs, and its picture or table")
    experiments = figure.add_subparsers(dest="experiment", required=True, metavar="{qm9,nbody,groups}")
    molecules = experiments.add_parser(
        "qm9",
        help="molecules without and with attributes of their bonds",
        description="Train on QM9 with three choices of edge attributes; draw the errors, print a table.",
    )
    figure_qm9.add_arguments(molecules)
    particles = experiments.add_parser(
        "nbody",
        help="rotations about z against O(3)",
        description="Train on springs with planes of several stiffnesses; draw the test errors.",
    )
    figure_nbody.add_arguments(particles)
    groups = experiments.add_parser(
        "groups",
        help="the paper's eight groups on classes of meshes",
        description="Train a classifier of clouds of points for each group; print the accuracies.",
    )
    figure_groups.add_arguments(groups)
    dynamics = commands.add_parser(
        "md",
        help="molecular dynamics with a potential",
        description="Dynamics at constant energy in float64; print the drift of the total energy.",
    )
    md.add_md_arguments(dynamics)
    dynamics.set_defaults(run=md.main)
    certificate_of = commands.add_parser(
        "certify",
        help="whether a potential's forces are right",
        description="Check forces, stress, symmetries and dynamics of a potential; exit code 1 where a bound breaks.",
    )
    certificate.add_arguments(certificate_of)
    certificate_of.set_defaults(run=certificate.main)
    demo = commands.add_parser("demo", help="a tour on real molecules: at most five minutes")
    demo.add_argument("--out", metavar="DIR", default="demo", help="pictures and figures (%(default)s)")
    demo.set_defaults(run=_demo)
    commands.add_parser("info", help="versions and backends").set_defaults(run=_info)
    return top


def _demo(args: argparse.Namespace) -> None:
    from .experiments.demo import main as demo  # it needs the extras escnn and train

    demo(args)


def _info(args: argparse.Namespace) -> None:
    print(info())


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("implicit_steer").setLevel(logging.INFO)
    args = parser().parse_args(argv)
    if status := args.run(args):
        sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not is_explained(error):
            raise
        sys.exit(f"python -m implicit_steer: error: {error}")
