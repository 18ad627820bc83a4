"""``python -m implicit_steer train nbody --system springs``, or :func:`train_nbody` from Python."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from ..._check import require
from ...training import processes
from ...training.runs import (
    RegressionOptions,
    Run,
    add_gradient_arguments,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
)
from ..data.nbody import SYSTEMS, NBody

log = logging.getLogger(__name__)

HELP = "the motion of interacting particles"
DESCRIPTION = "Train a network to predict where particles will be; print the mean squared error on the test set."
GROUPS = ("o3", "so3", "so2")  # of the network; so2: rotations about z


@dataclass(frozen=True, kw_only=True)
class NBodyOptions(RegressionOptions):
    """A run on simulated particles. The command line has the same names; its help explains them.

    AdamW with a learning rate that falls to 0 along a cosine; mean squared error of the displacements, in units of
    their root mean square.
    """

    system: str = "springs"
    strength: float = 0.0
    group: str = "o3"
    epochs: int = 50
    batch_size: int = 64
    lr: float = 5e-3
    blocks: int = 2

    choices: ClassVar = {**RegressionOptions.choices, "system": SYSTEMS, "group": GROUPS}
    least: ClassVar = {**RegressionOptions.least, "blocks": 1}
    identity_names: ClassVar = ("system", "strength", "group", "epochs", *RegressionOptions.identity_names)

    def __post_init__(self):
        super().__post_init__()
        require(self.strength >= 0, "strength", "a number >= 0", self.strength)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`NBodyOptions`."""
    default = NBodyOptions()
    task = parser.add_argument_group("task")
    systems = "springs between particles, or charges (%(default)s)"
    task.add_argument("--system", choices=SYSTEMS, default=default.system, help=systems)
    strength = "stiffness k of the springs that tie particles to planes, or the field along z (%(default)s)"
    task.add_argument("--strength", type=float, metavar="K", default=default.strength, help=strength)
    task.add_argument("--limit", type=int, metavar="N", help="use N training simulations (all: 10,000)")
    add_gradient_arguments(add_training_arguments(parser, default, "systems"))
    model = add_model_arguments(parser, default)
    group = "of the network; so2: rotations about z (%(default)s)"
    model.add_argument("--group", choices=GROUPS, default=default.group, help=group)
    add_run_arguments(parser, default, "runs/nbody-SYSTEM-kK-GROUP-seedSEED")


def train_nbody(options: NBodyOptions) -> dict[str, Any]:
    """Train :class:`~implicit_steer.experiments.models.NBodyNet`, test the best epoch, write and return
    ``result.json``'s content.

    ``test_mse`` and ``val_mse`` are means over particles and coordinates. The folder, ``resume`` and reproducibility
    are as :func:`~implicit_steer.experiments.train.train_qm9` has them.

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option, a damaged file, or a folder
    that holds another run.
    """
    name = f"runs/nbody-{options.system}-k{options.strength:g}-{options.group}-seed{options.seed}"
    run = Run(options, name)
    # Only now: these import the packages that the run has checked.
    from lightning.pytorch import seed_everything

    from ...training.lightning import Regressor, fit_and_test
    from ..models.nbody import SPACES, NBodyNet

    with processes.first_process_first():
        data = NBody(options.system, **options.named("strength", "limit", "cache", "progress"))
    seed_everything(options.seed, verbose=False)
    model = NBodyNet(SPACES[options.group](), **options.network())
    training = {"schedule": "cosine", **options.named("epochs", "clip", "freeze_norms")}
    module = Regressor(model, 0.0, data.scale, options.lr, options.identity(), "mse", **training)
    sizes = {name: len(part) for name, part in (("train", data.train), ("val", data.val), ("test", data.test))}
    parameters = sum(parameter.numel() for parameter in module.parameters())
    task = options.named("system", "strength", "group")
    log.info("%s, k = %g, %s: %s simulations; %d parameters", *task.values(), sizes, parameters)
    metrics = fit_and_test(module, data, run)
    return run.finish({**task, **metrics, "parameters": parameters, "simulations": sizes})


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer train nbody``: train, and print the test error."""
    result = train_nbody(NBodyOptions.parsed(args))
    task = f"{result['system']}, strength {result['strength']:g}, {result['group']}"
    processes.say(f"test MSE {task}: {result['test_mse']:.3e} ({result['seconds']} s)")
