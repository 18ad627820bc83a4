"""``python -m implicit_steer train forces``, on files of one's own or a built-in system; :func:`train_forces`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .._check import fail, load_extra, require
from ..graph.structures import Structures
from ..training import processes, viz
from ..training.runs import Run, RunOptions, add_numbers, add_run_arguments, add_training_arguments
from .data import SYSTEMS, ForceData
from .potential import RADIAL_BASES

log = logging.getLogger(__name__)

HELP = "a potential of your own structures, or of built-in metals or molecules"
DESCRIPTION = "Fit a potential to energies, forces and stress; print the mean absolute errors on the test set."
EVALUATION = 100  # configurations of a built-in system for validation, and as many for the test
TRAINING = 400  # configurations of a built-in system for training, by default
SCHEDULES = ("cosine", "plateau", "constant")
_KEYS = ("energy", "forces", "stress", "virial")


@dataclass(frozen=True, kw_only=True)
class ForcesOptions(RunOptions):
    """A fit of a potential. The command line has the same names; its help explains them.

    With ``data`` the structures come from files (:class:`~implicit_steer.potentials.labels.FileData`), else from
    ``system``. ``e0``, the energies of single atoms: "fit", by least squares; "isolated", of the training frames with
    one atom; or numbers in eV, as "H=-13.6,O=-432.1"."""

    system: str = "molecules"
    data: str | None = None
    valid: str | None = None
    test: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    virial_key: str | None = None
    e0: str = "fit"
    limit: int | None = None
    epochs: int = 20
    batch_size: int = 4
    lr: float = 1e-2
    energy_weight: float = 1.0
    stress_weight: float = 0.0
    huber: float | None = None
    schedule: str = "cosine"
    ema: float | None = None
    patience: int | None = None
    batch_atoms: int | None = None
    cutoff: float = 5.0
    blocks: int = 2
    channels: int = 16
    max_frequency: int = 1
    radial_basis: str = "cosine"
    depthwise: bool = False
    correlation: int = 1
    zbl: bool = False

    choices: ClassVar = {
        "system": tuple(SYSTEMS),
        "schedule": SCHEDULES,
        "radial_basis": tuple(RADIAL_BASES),
        "correlation": (1, 2),
    }
    least: ClassVar = {"limit": 2, "blocks": 1, "channels": 1, "max_frequency": 0, "patience": 1, "batch_atoms": 1}
    identity_names: ClassVar = (
        *("system", "limit", "epochs", "batch_size", "seed", "lr", "energy_weight", "cutoff", "blocks", "channels"),
        *("max_frequency", "data", "valid", "test", "e0", "stress_weight", "huber"),
        *("schedule", "ema", "patience", "batch_atoms", "radial_basis", "depthwise", "correlation", "zbl"),
        *(f"{name}_key" for name in _KEYS),
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("lr", "cutoff", "energy_weight"):
            require(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        require(self.stress_weight >= 0, "stress_weight", "a number >= 0", self.stress_weight)
        require(self.huber is None or self.huber > 0, "huber", "a positive number, or None", self.huber)
        require(self.ema is None or 0 < self.ema < 1, "ema", "a number between 0 and 1, or None", self.ema)
        of_files = [name for name in ("valid", "test", *(f"{key}_key" for key in _KEYS)) if getattr(self, name)]
        require(self.data is not None or not of_files, "data", f"a file beside {', '.join(of_files)}", None)
        of_system = self.data is None and (self.stress_weight > 0 or self.e0 == "isolated")
        require(not of_system, "data", "a file with stress, or with isolated atoms", None)
        _atom_energies(self.e0)

    @property
    def name(self) -> str:
        """What the potential is of: the file without its suffix, or the system."""
        return Path(self.data).stem if self.data else self.system


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`ForcesOptions`."""
    default = ForcesOptions()
    task = parser.add_argument_group("task")
    systems = "metals: Cu-Au, effective medium theory; molecules: H, C, N, O, GFN2-xTB (%(default)s)"
    task.add_argument("--system", choices=tuple(SYSTEMS), default=default.system, help=systems)
    task.add_argument("--data", metavar="FILE", help="training frames that ASE reads (extended XYZ, …), not a system")
    task.add_argument("--valid", metavar="FILE", help="frames that choose the epoch (a tenth of --data)")
    task.add_argument("--test", metavar="FILE", help="frames that are tested (those of --valid)")
    for key in _KEYS:
        task.add_argument(f"--{key}-key", metavar="NAME", help=f"name of the {key} in the files (the usual ones)")
    e0 = "of single atoms: fit, isolated (frames of one atom) or H=-13.6,O=-432.1 in eV (%(default)s)"
    task.add_argument("--e0", metavar="ENERGIES", default=default.e0, help=e0)
    limit = f"training configurations (all of --data, {TRAINING} of a system)"
    task.add_argument("--limit", type=int, metavar="N", help=limit)
    weights = {
        "energy_weight": "of the energy per atom, relative to the forces times 1 Å",
        "stress_weight": "of volume times stress per atom, likewise",
    }
    training = add_training_arguments(parser, default, "configurations", **weights)
    training.add_argument("--huber", type=float, metavar="DELTA", help="Huber's loss, in typical forces (L1)")
    schedule = "of the learning rate: to 0 along a cosine, halved on a plateau, or constant (%(default)s)"
    training.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help=schedule)
    ema = "evaluate and save a moving average of the weights, d times itself plus 1 - d times them (none)"
    training.add_argument("--ema", type=float, metavar="D", help=ema)
    patience = "stop after so many epochs without a lower validation error (never)"
    training.add_argument("--patience", type=int, metavar="N", help=patience)
    atoms = "atoms per step at most, in place of --batch-size; a larger structure is a step of its own"
    training.add_argument("--batch-atoms", type=int, metavar="N", help=atoms)
    model = {
        "cutoff": "Å, the largest distance of interacting atoms",
        "blocks": "convolutions",
        "channels": "fields per layer",
        "max_frequency": "highest degree l of the fields",
    }
    network = parser.add_argument_group("model")
    add_numbers(network, default, model)
    basis = "functions of the distance that the kernels see (%(default)s)"
    network.add_argument("--radial-basis", choices=tuple(RADIAL_BASES), default=default.radial_basis, help=basis)
    network.add_argument("--depthwise", action="store_true", help="kernels that act channel by channel")
    correlation = "2: messages and their products with themselves (%(default)s)"
    network.add_argument("--correlation", type=int, choices=(1, 2), default=default.correlation, help=correlation)
    network.add_argument("--zbl", action="store_true", help="add the repulsion of nuclei at short distances")
    add_run_arguments(parser, default, "runs/SYSTEM-seedSEED")


def train_forces(options: ForcesOptions) -> dict[str, Any]:
    """Fit a potential, test the best epoch, and write and return ``result.json``'s content.

    In ``options.out``: ``last.ckpt`` (the state after the last complete epoch, there from the first step on),
    ``best.ckpt`` (the epoch of the lowest validation error), ``log.csv`` (a row per epoch), ``result.json``
    (mean absolute errors of the test set: ``energy_mae`` in eV per atom, ``forces_mae`` in eV/Å over components;
    ``zero_forces_mae``, that of forces predicted as 0; ``stress_mae`` in eV/Å³ where stress is learned; and the
    options), ``potential.pt`` (:func:`~implicit_steer.potentials.load_potential`). Of a user's files also the errors by
    element and by ``config_type``, and ``parity-forces.png`` and ``parity-energy.png``. With ``resume`` the run
    continues after the last complete epoch and gives what it would have given without the interruption. One seed and
    one number of threads give one result, to the last digit, on a CPU.

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option, a damaged file, or a folder
    that holds another run.
    """
    run = Run(options, f"runs/{options.name}-seed{options.seed}", with_escnn=False)
    # Only now: these import the packages that the run has checked.
    from lightning.pytorch import seed_everything

    from ..training.lightning import fit_and_test
    from .potential import Potential
    from .regressor import ForceRegressor

    data, species, sizes = _data(options)
    seed_everything(options.seed, verbose=False)
    fields, interaction = ("channels", "max_frequency", "blocks"), ("radial_basis", "depthwise", "correlation", "zbl")
    network = options.named(*fields, *interaction, "backend")
    potential = Potential(species, options.cutoff, **network)
    training = Structures.join(data.train.structures)
    _require_stress(options, training, Structures.join(data.val.structures))
    potential.fit(training, data.isolated if options.e0 == "isolated" else _atom_energies(options.e0))
    module = ForceRegressor(
        potential,
        scale=float(training.forces.square().mean().sqrt()) or 1.0,
        lr=options.lr,
        epochs=options.epochs,
        options=options.identity(),
        **options.named("energy_weight", "stress_weight", "huber", "schedule", "ema"),
    )
    parameters = sum(parameter.numel() for parameter in potential.parameters())
    log.info("%s: %s configurations; %d parameters", options.name, sizes, parameters)
    metrics = fit_and_test(module, data, run, **options.named("patience", "batch_atoms"))
    if processes.rank() == 0:
        module.evaluated.save(run.out / "potential.pt")
    result = {
        "system": options.name,
        "energy_mae": metrics["test_energy_mae"],
        "forces_mae": metrics["test_forces_mae"],
        "zero_forces_mae": float(Structures.join(data.test.structures).forces.abs().mean()),
        "val_mae": metrics["val_mae"],
        "configurations": sizes,
    }
    if options.stress_weight > 0:
        result["stress_mae"] = metrics["test_stress_mae"]
    if options.data and processes.rank() == 0:
        result |= _tables(run.out, module.evaluated.eval(), data)
    return run.finish(result)


def _data(options: ForcesOptions) -> tuple[Any, Sequence[int], dict[str, int]]:
    """The sets, the species, and how many configurations each set has."""
    if options.data:
        from .labels import FileData, Labels  # these import ASE

        labels = Labels(**{key: getattr(options, f"{key}_key") for key in _KEYS})
        given = options.named("cutoff", "valid", "test", "limit", "seed", "progress")
        found = FileData(options.data, labels=labels, **given)
        return found, found.species, found.sizes
    sizes = {"train": options.limit or TRAINING, "val": EVALUATION, "test": EVALUATION}
    with processes.first_process_first():
        data = ForceData(options.system, cutoff=options.cutoff, cache=options.cache, progress=options.progress, **sizes)
    return data, SYSTEMS[options.system].species, sizes


def _atom_energies(e0: str) -> dict[int, float] | None:
    """Energies of single atoms by atomic number, or None where they are found otherwise."""
    if e0 in ("fit", "isolated"):
        return None
    numbers, found = load_extra("ase.data", "ase").atomic_numbers, {}
    for entry in e0.split(","):
        symbol, _, value = (part.strip() for part in entry.partition("="))
        try:
            found[numbers[symbol]] = float(value)
        except (KeyError, ValueError):
            fail("e0", "fit, isolated, or energies in eV as H=-13.6,O=-432.1", repr(entry))
    return found


def _require_stress(options: ForcesOptions, *sets: Structures) -> None:
    for name, structures in zip(("training", "validation"), sets, strict=True):
        known = structures.stress is not None and bool(structures.stress.isfinite().all(-1).all(-1).any())
        got = f"none in the {name} frames"
        require(options.stress_weight == 0 or known, "stress_weight", "0, or frames with a stress", got)


def _tables(out: Path, potential: Any, data: Any) -> dict[str, Any]:
    """Errors by element and config type; draws ``parity.png``."""
    from .labels import error_tables

    tested = [(single, potential.predict(single)) for single in data.test.structures]
    pairs = {
        "forces": [(single.forces.flatten(), found.forces.flatten()) for single, found in tested],
        "energy": [(single.energy / len(single.pos), found.energy / len(single.pos)) for single, found in tested],
    }
    for name, label in (("forces", "force, eV/Å"), ("energy", "energy per atom, eV")):
        true, predicted = (torch.cat(values).double().numpy() for values in zip(*pairs[name], strict=True))
        viz.parity(true, {"test": predicted}, label=label).savefig(out / f"parity-{name}.png")
    return error_tables(tested, data.test_kinds)


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer train forces``: fit, and print the test errors."""
    result = train_forces(ForcesOptions.parsed(args))
    energy, forces, zero = (1000 * result[name] for name in ("energy_mae", "forces_mae", "zero_forces_mae"))
    processes.say(
        f"test MAE {result['system']}: energy {energy:.3f} meV per atom, forces {forces:.2f} meV/Å "
        f"(forces of 0: {zero:.0f}) ({result['seconds']} s)"
    )
    if "stress_mae" in result:
        processes.say(f"stress: {1000 * result['stress_mae']:.3f} meV/Å³")
    for kind, rows in (("element", result.get("elements", {})), ("config type", result.get("config_types", {}))):
        for name, errors in rows.items():
            energy = f"energy {1000 * errors['energy_mae']:.3f} meV per atom, " if "energy_mae" in errors else ""
            processes.say(f"  {kind} {name}: {energy}forces {1000 * errors['forces_mae']:.2f} meV/Å")
