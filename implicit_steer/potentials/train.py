"""``python -m implicit_steer train forces --system molecules``, or :func:`train_forces` from Python."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from .._check import require
from ..graph.structures import Structures
from ..training import processes
from ..training.runs import Run, RunOptions, add_numbers, add_run_arguments, add_training_arguments
from .data import SYSTEMS, ForceData

log = logging.getLogger(__name__)

HELP = "a potential of metals or molecules"
DESCRIPTION = "Fit a potential to energies and forces; print the mean absolute errors on the test set."
EVALUATION = 100  # configurations each for validation and test


@dataclass(frozen=True, kw_only=True)
class ForcesOptions(RunOptions):
    """A fit of a potential. The command line has the same names; its help explains them."""

    system: str = "molecules"
    limit: int = 400
    epochs: int = 20
    batch_size: int = 4
    lr: float = 1e-2
    energy_weight: float = 1.0
    cutoff: float = 5.0
    blocks: int = 2
    channels: int = 16
    max_frequency: int = 1

    choices: ClassVar = {"system": tuple(SYSTEMS)}
    least: ClassVar = {"limit": 2, "blocks": 1, "channels": 1, "max_frequency": 0}
    identity_names: ClassVar = (
        *("system", "limit", "epochs", "batch_size", "seed", "lr", "energy_weight", "cutoff", "blocks", "channels"),
        "max_frequency",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("lr", "cutoff", "energy_weight"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`ForcesOptions`."""
    default = ForcesOptions()
    task = parser.add_argument_group("task")
    systems = "metals: Cu-Au, effective medium theory; molecules: H, C, N, O, GFN2-xTB (%(default)s)"
    task.add_argument("--system", choices=tuple(SYSTEMS), default=default.system, help=systems)
    add_numbers(task, default, {"limit": "training configurations"})
    weight = "of the energy per atom, relative to the forces times 1 Å"
    add_training_arguments(parser, default, "configurations", energy_weight=weight)
    model = {
        "cutoff": "Å, the largest distance of interacting atoms",
        "blocks": "convolutions",
        "channels": "fields per layer",
        "max_frequency": "highest degree l of the fields",
    }
    add_numbers(parser.add_argument_group("model"), default, model)
    add_run_arguments(parser, default, "runs/SYSTEM-seedSEED")


def train_forces(options: ForcesOptions) -> dict[str, Any]:
    """Fit a potential, test the best epoch, and write and return ``result.json``'s content.

    In ``options.out``: ``last.ckpt`` (the state after the last complete epoch, there from the first step on),
    ``best.ckpt`` (the epoch of the lowest validation error), ``log.csv`` (a row per epoch), ``result.json``
    (mean absolute errors of the test set: ``energy_mae`` in eV per atom, ``forces_mae`` in eV/Å over components;
    ``zero_forces_mae``, that of forces predicted as 0; and the options), ``potential.pt``
    (:func:`~implicit_steer.potentials.load_potential`). With ``resume`` the run continues after the last complete epoch
    and gives what it would have given without the interruption. One seed and one number of threads give one result,
    to the last digit, on a CPU.

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option, a damaged file, or a folder
    that holds another run.
    """
    run = Run(options, f"runs/{options.system}-seed{options.seed}", with_escnn=False)
    # Only now: these import the packages that the run has checked.
    from lightning.pytorch import seed_everything

    from ..training.lightning import fit_and_test
    from .potential import Potential
    from .regressor import ForceRegressor

    sizes = {"train": options.limit, "val": EVALUATION, "test": EVALUATION}
    with processes.first_process_first():
        data = ForceData(options.system, cutoff=options.cutoff, cache=options.cache, progress=options.progress, **sizes)
    seed_everything(options.seed, verbose=False)
    network = options.named("channels", "max_frequency", "blocks", "backend")
    potential = Potential(SYSTEMS[options.system].species, options.cutoff, **network)
    training = Structures.join(data.train.structures)
    potential.fit(training)
    module = ForceRegressor(
        potential,
        scale=float(training.forces.square().mean().sqrt()),
        energy_weight=options.energy_weight,
        lr=options.lr,
        epochs=options.epochs,
        options=options.identity(),
    )
    parameters = sum(parameter.numel() for parameter in potential.parameters())
    log.info("%s: %s configurations; %d parameters", options.system, sizes, parameters)
    metrics = fit_and_test(module, data, run)
    if processes.rank() == 0:
        potential.save(run.out / "potential.pt")
    result = {
        "system": options.system,
        "energy_mae": metrics["test_energy_mae"],
        "forces_mae": metrics["test_forces_mae"],
        "zero_forces_mae": float(Structures.join(data.test.structures).forces.abs().mean()),
        "val_mae": metrics["val_mae"],
        "configurations": sizes,
    }
    return run.finish(result)


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer train forces``: fit, and print the test errors."""
    result = train_forces(ForcesOptions.parsed(args))
    energy, forces, zero = (1000 * result[name] for name in ("energy_mae", "forces_mae", "zero_forces_mae"))
    processes.say(
        f"test MAE {result['system']}: energy {energy:.3f} meV per atom, forces {forces:.2f} meV/Å "
        f"(forces of 0: {zero:.0f}) ({result['seconds']} s)"
    )
