"""``python -m implicit_steer train modelnet --data ModelNet10.zip``, or :func:`train_modelnet` from Python."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from ...training import processes
from ...training.runs import SAMPLINGS, Run, RunOptions, add_numbers, add_run_arguments, add_training_arguments
from ..data.modelnet import ROTATIONS, ModelNet

log = logging.getLogger(__name__)

HELP = "classes of meshes"
DESCRIPTION = "Classify clouds of points on meshes; print the accuracy on the test set."
GROUPS = ("m", "inv", "so2-inv", "so2", "so2-f", "so2-m", "so3", "o3")


@dataclass(frozen=True, kw_only=True)
class ModelNetOptions(RunOptions):
    """A run on ModelNet or on furniture. The command line has the same names; its help explains them.

    AdamW, learning rate 1e-3 halved at epochs 25, 50, 75, ..., cross entropy with labels smoothed by 0.2.
    """

    data: str
    group: str = "so2"
    rotate: str = "z"
    points: int = 1024
    copies: int = 40
    neighbours: int = 16
    levels: int = 3
    width: int = 32
    max_frequency: int = 1
    dropout: float = 0.5
    sampling: str = "auto"

    choices: ClassVar = {"group": GROUPS, "rotate": ROTATIONS}
    least: ClassVar = {"copies": 1, "neighbours": 1, "levels": 1, "width": 1, "max_frequency": 0}
    identity_names: ClassVar = (
        *("data", "group", "rotate", "points", "copies", "neighbours", "levels", "width", "max_frequency", "dropout"),
        *("sampling", "epochs", "batch_size", "seed", "lr"),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`ModelNetOptions`."""
    default = ModelNetOptions(data="")
    task = parser.add_argument_group("task")
    data = "ModelNet10.zip, ModelNet40.zip, an unpacked folder; or furniture, of Debian's sweethome3d-furniture"
    task.add_argument("--data", metavar="PATH", required=True, help=data)
    task.add_argument("--rotate", choices=ROTATIONS, default=default.rotate, help="of every sample (%(default)s)")
    sizes = {"points": "points of a cloud", "copies": "samples of every test mesh, averaged"}
    add_numbers(task, default, sizes)
    add_training_arguments(parser, default, "clouds")
    model = parser.add_argument_group("model")
    model.add_argument("--group", choices=GROUPS, default=default.group, help="of the equivariance (%(default)s)")
    model.add_argument("--sampling", default=default.sampling, help=f"{SAMPLINGS} (%(default)s)")
    parts = {
        "neighbours": "edges into every point",
        "levels": "convolutions, each onto half of the points",
        "width": "numbers per point of a hidden layer, about",
        "max_frequency": "highest frequency of the fields",
        "dropout": "share of the last layer's inputs",
    }
    add_numbers(model, default, parts)
    add_run_arguments(parser, default, "runs/modelnet-GROUP-seedSEED")


def train_modelnet(options: ModelNetOptions) -> dict[str, Any]:
    """Train a classifier of clouds, test the best epoch, and write and return ``result.json``'s content.

    In ``options.out``: ``last.ckpt``, ``best.ckpt`` (the epoch of the lowest validation loss), ``log.csv``,
    ``result.json`` (``test_accuracy``, of probabilities averaged over the ``copies`` samples of every mesh;
    ``sample_accuracy``, of single samples; ``val_loss``; the numbers of meshes and the options). With ``resume`` the
    run continues after the last complete epoch and gives what it would have given without the interruption. One seed
    and one number of threads give one result, to the last digit, on a CPU.

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option, a damaged file, or a folder
    that holds another run.
    """
    run = Run(options, f"runs/modelnet-{options.group}-seed{options.seed}")
    # Only now: these import the packages that the run has checked.
    from lightning.pytorch import seed_everything

    from ...training.lightning import fit_and_test
    from ..models.modelnet import SPACES, ModelNetNet
    from .classifier import Classifier

    with processes.first_process_first():
        data = ModelNet(options.data, **options.named("points", "rotate", "copies", "seed", "cache", "progress"))
    seed_everything(options.seed, verbose=False)
    sizes = options.named("points", "neighbours", "levels", "width", "max_frequency", "dropout")
    convolution = options.named("sampling", "backend")
    model = ModelNetNet(len(data.classes), SPACES[options.group](), **sizes, **convolution)
    module = Classifier(model, len(data.split["test"]), options.copies, options.lr, options.seed, options.identity())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log.info("%s, group %s: %d parameters", data.name, options.group, parameters)
    metrics = fit_and_test(module, data, run)
    meshes = {name: len(rows) for name, rows in data.split.items()}
    return run.finish({"classes": data.classes, "meshes": meshes, "parameters": parameters, **metrics})


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer train modelnet``: train, and print the accuracy."""
    result = train_modelnet(ModelNetOptions.parsed(args))
    processes.say(
        f"test accuracy on {result['meshes']['test']} meshes in {len(result['classes'])} classes: "
        f"{100 * result['test_accuracy']:.1f} % (single samples: {100 * result['sample_accuracy']:.1f} %) "
        f"({result['seconds']} s)"
    )
