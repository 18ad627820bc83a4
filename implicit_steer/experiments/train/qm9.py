"""``python -m implicit_steer train qm9 --target homo``, or :func:`train_qm9` from Python."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..._check import require
from ...deploy import copy_state, load, save
from ...training import processes
from ...training.runs import (
    RegressionOptions,
    Run,
    add_gradient_arguments,
    add_model_arguments,
    add_numbers,
    add_run_arguments,
    add_training_arguments,
)
from ..data.qm9 import EDGE_ATTRIBUTES, QM9, TARGETS, TENSOR

log = logging.getLogger(__name__)

HELP = "a property of small molecules"
SCHEDULES = ("steps", "cosine", "onecycle")
MODEL_NUMBERS = {
    "max_frequency": "of the hidden fields",
    "reach": "initial width of the kernels' shells, in the unit of the normalised positions, 1.7415 Å",
}
DESCRIPTION = "Train the paper's network on QM9; print the mean absolute error on the test set."


@dataclass(frozen=True, kw_only=True)
class QM9Options(RegressionOptions):
    """A run on QM9. The command line has the same names; its help explains them.

    The defaults are the paper's: AdamW, learning rate 1e-3 halved at epochs 25, 50, 75, 100 and 125, weight decay 1e-8,
    batches of 32, L1 loss on the standardised target. ``schedule`` "cosine" lets the learning rate fall to 0 over
    ``epochs`` instead of in "steps", "onecycle" lets it rise first. ``start`` is the ``model.safetensors`` of a run
    with a network of the same sizes, which this run trains further.
    """

    target: str = "homo"
    schedule: str = "steps"
    edge_attr: str = "bonds+atoms"
    max_frequency: int = 1
    reach: float = 0.5
    start: str | None = None
    data: str | None = None

    choices: ClassVar = {
        **RegressionOptions.choices,
        "edge_attr": tuple(EDGE_ATTRIBUTES),
        "schedule": SCHEDULES,
        "target": TARGETS,
    }
    least: ClassVar = {**RegressionOptions.least, "blocks": 0, "max_frequency": 0}
    identity_names: ClassVar = (
        *("target", "edge_attr", "schedule", "start", "max_frequency", "reach"),
        *RegressionOptions.identity_names,
    )

    def __post_init__(self):
        super().__post_init__()
        there = self.start is None or self.resume or Path(self.start).is_file()
        require(there, "start", "the model.safetensors of a run", f"no file {self.start}")

    def identity(self) -> dict[str, Any]:
        """With the epochs, where the learning rate depends on them."""
        return super().identity() | (self.named("epochs") if self.schedule != "steps" else {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`QM9Options`."""
    default = QM9Options()
    task = parser.add_argument_group("task")
    task.add_argument("--target", choices=TARGETS, default=default.target, help="the property (%(default)s)")
    task.add_argument("--limit", type=int, metavar="N", help="use N training molecules (all: 100,000)")
    task.add_argument(
        "--edge-attr",
        choices=EDGE_ATTRIBUTES,
        default=default.edge_attr,
        help="bond types, or with the elements of both ends (%(default)s)",
    )
    task.add_argument("--data", metavar="DIR", help="PyG's raw files or qm9pack's CSV files (the installed qm9pack)")
    training = add_training_arguments(parser, default, "molecules")
    add_schedule(training, default)
    add_gradient_arguments(training)
    start = "model.safetensors of a run, whose network is trained further (random weights)"
    training.add_argument("--start", metavar="FILE", help=start)
    model = add_model_arguments(parser, default)
    add_numbers(model, default, MODEL_NUMBERS)
    add_run_arguments(parser, default, "runs/qm9-TARGET-seedSEED")


def add_schedule(group: Any, default: QM9Options) -> None:
    """``--schedule``."""
    schedule = "learning rate: halved at epochs 25, 50, ... as the paper's, falling to 0, or rising first (%(default)s)"
    group.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help=schedule)


def train_qm9(options: QM9Options) -> dict[str, Any]:
    """Train the paper's network on QM9, test the best epoch, and write and return ``result.json``'s content.

    In ``options.out``: ``last.ckpt`` (the state after the last complete epoch, there from the first step on),
    ``best.ckpt`` (the epoch of the lowest validation error), ``log.csv`` (a row per epoch), ``model.safetensors`` (the
    network of that epoch, for :func:`implicit_steer.load`, which needs no escnn), ``result.json`` (``test_mae``,
    ``val_mae`` in ``unit``, the options, and ``mean`` and ``std``: what is predicted is ``mean + std * model(batch)``).
    With ``resume`` the run continues after the last complete epoch and gives what it would have given without the
    interruption. One seed and one number of threads give one result, to the last digit, on a CPU.

    Of the polarizability ``test_mae`` is the mean over the nine entries of the matrix, each matrix compared along those
    of its possible axes that fit best; ``test_equivariance_error`` says how well the predictions turn with the
    molecules (:class:`~implicit_steer.training.lightning.AxesRegressor`).

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option, a damaged file, or a folder
    that holds another run.
    """
    run = Run(options, f"runs/qm9-{options.target}-seed{options.seed}")
    # Only now: these import the packages that the run has checked.
    from lightning.pytorch import seed_everything

    from ...training.lightning import AxesRegressor, Regressor, fit_and_test
    from ..models import QM9Net

    with processes.first_process_first():
        data = QM9(options.data, **options.named("target", "limit", "edge_attr", "cache", "progress"))
    seed_everything(options.seed, verbose=False)
    tensor = options.target == TENSOR
    own = options.named("edge_attr", "max_frequency", "reach")
    model = QM9Net(tensors=options.channels if tensor else 0, **own, **options.network())
    if options.start is not None and not options.resume:
        copy_state(load(options.start), model)
    regressor = AxesRegressor if tensor else Regressor
    training = options.named("schedule", "epochs", "clip", "freeze_norms")
    module = regressor(model, data.mean, data.std, options.lr, options.identity(), **training)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    molecules = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    text = "QM9 %s: %d training, %d validation, %d test molecules; %d parameters"
    log.info(text, options.target, *molecules.values(), parameters)
    metrics = fit_and_test(module, data, run)
    if processes.rank() == 0:
        save(module.model.eval(), run.out / "model.safetensors")
    scale = {name: torch.as_tensor(getattr(data, name)).tolist() for name in ("mean", "std")}
    task = {"target": options.target, "unit": data.unit, **scale, "molecules": molecules, "parameters": parameters}
    return run.finish({**task, **metrics})


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer train qm9``: train, and print the test error."""
    result = train_qm9(QM9Options.parsed(args))
    processes.say(f"test MAE {result['target']}: {result['test_mae']:.4f} {result['unit']} ({result['seconds']} s)")
    if result["target"] == TENSOR:
        processes.say(f"turned molecules: predictions turn with them to {result['test_equivariance_error']:.1e}")
