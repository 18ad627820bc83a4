"""Molecular dynamics at constant energy with a potential: ``python -m implicit_steer md POTENTIAL``, or :func:`run_md`.

The total energy of exact forces stays where it is up to the integrator's O(dt²) ripple; a drift shows forces that are
not the gradient of the energy.
"""

from __future__ import annotations

import argparse
import csv
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .._check import load_extra, require
from ..deploy import load
from ..layers import PotentialNet
from ..training import viz
from .data import SYSTEMS

if TYPE_CHECKING:
    from ase import Atoms

COLUMNS = ("time_ps", "potential_eV", "kinetic_eV", "total_eV")
RELAXED = 0.05  # eV/Å, the largest force at the start
RELAX_STEPS = 200  # at most


@dataclass(frozen=True)
class MDOptions:
    """A run. ``potential``: a file of :func:`implicit_steer.save` or ``Potential.save``. ``structure``: a name of
    :data:`~implicit_steer.potentials.data.SYSTEMS`, a file that ASE reads, or None for the first system whose
    species the potential knows. ``dt`` in fs. ``temperature`` in K: that of the initial velocities, which ``seed``
    draws; the run has about half of it."""

    potential: str
    structure: str | None = None
    steps: int = 20_000
    dt: float = 0.5
    temperature: float = 300.0
    seed: int = 0
    skin: float = 0.3
    out: str = "md"
    num_threads: int | None = None
    progress: bool = True

    def __post_init__(self):
        require(self.steps >= 2, "steps", "at least 2", self.steps)
        require(self.dt > 0, "dt", "a positive time in fs", self.dt)
        require(self.temperature >= 0, "temperature", "at least 0 K", self.temperature)
        require(self.num_threads is None or self.num_threads >= 1, "num_threads", "at least 1", self.num_threads)


class Trajectory(NamedTuple):
    """The :data:`COLUMNS` of every step, the start included, (steps + 1, 4); the number of atoms; seconds taken."""

    energies: np.ndarray
    atoms: int
    seconds: float

    def drift(self) -> float:
        """Slope of the line through the total energy, eV/atom/ps."""
        return float(np.polyfit(*self._total(), 1)[0]) / self.atoms

    def ripple(self) -> float:
        """Standard deviation of the total energy about that line, eV/atom."""
        time_ps, total = self._total()
        line = np.polynomial.Polynomial.fit(time_ps, total, 1)
        return float((total - line(time_ps)).std()) / self.atoms

    def _total(self) -> tuple[np.ndarray, np.ndarray]:
        """Time, and how the total energy has changed: energies of free atoms, 10⁷ eV, leave a fit too few digits."""
        return self.energies[:, 0], self.energies[:, 3] - self.energies[0, 3]


def read_potential(path: str | Path) -> PotentialNet:
    """The potential of a file that :func:`implicit_steer.save` or ``Potential.save`` wrote.

    Raises ``ValueError`` for a file without a potential, ``RuntimeError`` for a damaged one, and where a file with
    escnn's convolutions requires escnn, which is missing.
    """
    expected = "a potential that implicit_steer.save or Potential.save wrote"
    require(Path(path).is_file(), str(path), expected, "no file")
    if zipfile.is_zipfile(path):  # torch.save's
        from .potential import load_potential

        return load_potential(path)
    module = load(path)
    require(isinstance(module, PotentialNet), str(path), expected, type(module).__name__)
    return module


def start_structure(potential: PotentialNet, name: str | None) -> Atoms:
    """The structure that :class:`MDOptions` names.

    Raises ``ValueError`` for a file that ASE cannot read, and where no system has the potential's species.
    """
    if name is not None and name not in SYSTEMS:
        require(Path(name).is_file(), "structure", f"one of {list(SYSTEMS)} or a file", repr(name))
        return load_extra("ase.io", "ase").read(name)
    known = set(potential.species)
    fitting = [key for key in SYSTEMS if set(SYSTEMS[key].species) <= known] if name is None else [name]
    require(bool(fitting), "structure", "a file", None, f"No system has the potential's species {sorted(known)}.")
    return SYSTEMS[fitting[0]].start()


def run_nve(atoms: Atoms, options: MDOptions) -> Trajectory:
    """Velocity Verlet of ``atoms``, which have a calculator, from random velocities without total momentum (and, of a
    molecule, angular momentum)."""
    units, velocities = load_extra("ase.units", "ase"), load_extra("ase.md.velocitydistribution", "ase")
    verlet, tqdm = load_extra("ase.md.verlet", "ase"), load_extra("tqdm")
    generator = np.random.default_rng(options.seed)
    velocities.thermalize_momenta(atoms, options.temperature, rng=generator)
    velocities.Stationary(atoms)
    if not atoms.pbc.any():
        velocities.ZeroRotation(atoms)
    dynamics = verlet.VelocityVerlet(atoms, timestep=options.dt * units.fs)
    rows, started = [], time.perf_counter()
    with tqdm.tqdm(total=options.steps, desc="md", unit="step", disable=not options.progress) as bar:
        for step in dynamics.irun(options.steps):
            potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
            rows.append((len(rows) * options.dt / 1000, potential, kinetic, potential + kinetic))
            bar.update(bool(step) or len(rows) > 1)
    return Trajectory(np.array(rows), len(atoms), time.perf_counter() - started)


def run_md(options: MDOptions) -> Trajectory:
    """Relax the structure roughly, then run; writes ``energies.csv``, ``energies.png``, ``final.xyz`` in
    ``options.out``.

    Raises ``RuntimeError`` where a package is missing, ``ValueError`` for a wrong option or file.
    """
    load_extra("ase", "ase")
    from .ase import Calculator  # only now: it imports the package checked above

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    potential = read_potential(options.potential).double()
    atoms = start_structure(potential, options.structure)
    atoms.calc = Calculator(potential, options.skin)
    load_extra("ase.optimize").BFGS(atoms, logfile=None).run(fmax=RELAXED, steps=RELAX_STEPS)
    trajectory = run_nve(atoms, options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "energies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(trajectory.energies.tolist())
    viz.energy_conservation(trajectory.energies[:, 0], trajectory.energies[:, 1:] / len(atoms)).savefig(
        out / "energies.png"
    )
    atoms.calc = None
    atoms.write(out / "final.xyz")
    return trajectory


def add_md_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`MDOptions`."""
    default = MDOptions("")
    parser.add_argument(
        "potential", help="potential.pt of a run of `train forces`, or a potential that implicit_steer.save wrote"
    )
    structure = f"{', '.join(SYSTEMS)}, or a file that ASE reads (the first with the potential's species)"
    parser.add_argument("--structure", help=structure)
    options = {
        "steps": "of the integrator",
        "dt": "fs, length of a step",
        "temperature": "K, of the first velocities",
        "seed": "of the first velocities",
        "skin": "Å, beyond the cutoff where neighbours are kept",
    }
    for name, text in options.items():
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), metavar="X", default=value, help=f"{text} (%(default)s)")
    parser.add_argument("--out", metavar="DIR", default=default.out, help="energies and pictures (%(default)s)")
    parser.add_argument("--num-threads", type=int, metavar="N", help="CPU threads (torch's default)")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def main(args: argparse.Namespace) -> None:
    """``python -m implicit_steer md``: run, and print the drift of the total energy."""
    options = MDOptions(**{name: getattr(args, name) for name in MDOptions.__dataclass_fields__})
    run = run_md(options)
    length = run.energies[-1, 0]
    print(
        f"{run.atoms} atoms, {options.steps} steps of {options.dt:g} fs ({length:g} ps): total energy drifts by "
        f"{run.drift():.1e} eV/atom/ps, ripple {run.ripple():.1e} eV/atom; "
        f"{1000 * run.seconds / options.steps:.1f} ms per step ({run.seconds:.0f} s)"
    )
