"""Fitting a potential to energies and forces: ``python -m implicit_steer train forces --system molecules``, or
:func:`train_forces` from Python."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ._check import require
from ._extras import load_extra
from .backends import NAMES as BACKEND_NAMES
from .data.forces import SYSTEMS, ForceData
from .structures import Structures
from .train import add_machine_arguments, prepare_folder, write_json

log = logging.getLogger(__name__)

EVALUATION = 100  # configurations each for validation and test


@dataclass(frozen=True)
class ForcesOptions:
    """A fit of a potential. The command line has the same names; its help explains them."""

    system: str = "molecules"
    limit: int = 400
    epochs: int = 20
    batch_size: int = 4
    seed: int = 0
    lr: float = 1e-2
    energy_weight: float = 1.0
    cutoff: float = 5.0
    blocks: int = 2
    channels: int = 16
    max_frequency: int = 1
    backend: str = "auto"
    device: str = "auto"
    num_threads: int | None = None
    cache: str | None = None
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self):
        for name, allowed in {"system": tuple(SYSTEMS), "backend": BACKEND_NAMES}.items():
            require(getattr(self, name) in allowed, name, f"one of {list(allowed)}", repr(getattr(self, name)))
        least_values = {"epochs": 1, "batch_size": 2, "limit": 2, "blocks": 1, "channels": 1, "max_frequency": 0}
        for name, least in {**least_values, "num_threads": 1}.items():
            value = getattr(self, name)
            require(value is None or value >= least, name, f"at least {least}", value)
        for name in ("lr", "cutoff", "energy_weight"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the interrupted one."""
        names = ["system", "limit", "epochs", "batch_size", "seed", "lr", "energy_weight", "cutoff", "blocks"]
        return {name: getattr(self, name) for name in [*names, "channels", "max_frequency"]}


def add_forces_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`ForcesOptions`."""
    default = ForcesOptions()
    task = parser.add_argument_group("task")
    systems = "metals: Cu-Au, effective medium theory; molecules: H, C, N, O, GFN2-xTB (%(default)s)"
    task.add_argument("--system", choices=tuple(SYSTEMS), default=default.system, help=systems)
    configurations = "training configurations (%(default)s)"
    task.add_argument("--limit", type=int, metavar="N", default=default.limit, help=configurations)
    cache = "labelled configurations ($IMPLICIT_STEER_CACHE, ~/.cache/implicit_steer)"
    task.add_argument("--cache", metavar="DIR", help=cache)
    training = parser.add_argument_group("training")
    numbers = {
        "epochs": "passes over the training set",
        "batch_size": "configurations per step",
        "seed": "of weights and shuffling",
        "lr": "first learning rate",
        "energy_weight": "of the energy per atom, relative to the forces times 1 Å",
    }
    model = parser.add_argument_group("model")
    sizes = {
        "cutoff": "Å, the largest distance of interacting atoms",
        "blocks": "convolutions",
        "channels": "fields per layer",
        "max_frequency": "highest degree l of the fields",
    }
    for group, options in ((training, numbers), (model, sizes)):
        for name, text in options.items():
            value = getattr(default, name)
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, type=type(value), metavar="N", default=value, help=f"{text} (%(default)s)")
    add_machine_arguments(parser, default, "runs/SYSTEM-seedSEED")


def train_forces(options: ForcesOptions) -> dict[str, Any]:
    """Fit a potential, test the best epoch, and write and return ``result.json``'s content.

    In ``options.out``: ``last.ckpt`` (the state after the last complete epoch, there from the first step on),
    ``best.ckpt`` (the epoch of the lowest validation error), ``log.csv`` (a row per epoch), ``result.json``
    (mean absolute errors of the test set: ``energy_mae`` in eV per atom, ``forces_mae`` in eV/Å over components;
    ``zero_forces_mae``, that of forces predicted as 0; and the options), ``potential.pt``
    (:func:`~implicit_steer.models.load_potential`). With ``resume`` the run continues after the last complete epoch
    and gives what it would have given without the interruption. One seed and one number of threads give one result,
    to the last digit, on a CPU.

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option, a damaged file, or a folder
    that holds another run.
    """
    lightning = load_extra("lightning.pytorch")
    load_extra("escnn", "escnn")
    # Only now: these import the packages checked above.
    from ._lightning import loader, trainer_for
    from ._lightning_forces import ForceRegressor
    from .models import Potential

    started = time.time()
    out = Path(options.out or f"runs/{options.system}-seed{options.seed}")
    checkpoint = prepare_folder(out, options)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    sizes = {"train": options.limit, "val": EVALUATION, "test": EVALUATION}
    data = ForceData(options.system, cutoff=options.cutoff, cache=options.cache, progress=options.progress, **sizes)
    lightning.seed_everything(options.seed, verbose=False)
    potential = Potential(
        SYSTEMS[options.system].species,
        options.cutoff,
        channels=options.channels,
        max_frequency=options.max_frequency,
        blocks=options.blocks,
        backend=options.backend,
    )
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
    trainer = trainer_for(out, options.epochs, options.device, options.progress)
    train, val = loader(data.train, options.batch_size, options.seed), loader(data.val, 4 * options.batch_size)
    trainer.fit(module, train, val, ckpt_path=checkpoint)
    best, test = str(out / "best.ckpt"), loader(data.test, 4 * options.batch_size)
    metrics = trainer.test(module, test, ckpt_path=best, verbose=False)[0]
    potential.save(out / "potential.pt")
    result = {
        "system": options.system,
        "energy_mae": metrics["test_energy_mae"],
        "forces_mae": metrics["test_forces_mae"],
        "zero_forces_mae": float(Structures.join(data.test.structures).forces.abs().mean()),
        "val_mae": float(trainer.checkpoint_callback.best_model_score),
        "configurations": sizes,
        "seconds": round(time.time() - started, 1),
        "threads": torch.get_num_threads(),
        "options": asdict(options),
    }
    write_json(out / "result.json", result)
    return result


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer train forces``: fit, and print the test errors."""
    values = {name: getattr(args, name) for name in ForcesOptions.__dataclass_fields__}
    result = train_forces(ForcesOptions(**values))
    energy, forces, zero = (1000 * result[name] for name in ("energy_mae", "forces_mae", "zero_forces_mae"))
    print(
        f"test MAE {result['system']}: energy {energy:.3f} meV per atom, forces {forces:.2f} meV/Å "
        f"(forces of 0: {zero:.0f}) ({result['seconds']} s)"
    )
