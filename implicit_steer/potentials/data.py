"""Configurations of atoms with energies and forces from a real method, made on this machine.

- ``metals``: 32 atoms of Cu and Au on a strained, rattled fcc lattice with periodic boundaries, labelled by effective
  medium theory (Jacobsen, Stoltze, Nørskov, Surface Science 366, 394 (1996), as ASE implements it);
- ``molecules``: small molecules of H, C, N and O, displaced from equilibrium along their normal modes as at a random
  temperature, labelled by GFN2-xTB (Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652 (2019), the package
  tblite).

Every configuration depends on the system, the seed, the split and its number alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .._check import load_extra, require
from .._files import cache_folder
from ..graph.structures import Structures
from ..training import chunks

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
CHUNK = 50  # configurations per cache file: 0.1 to 0.5 s of work
CACHE_VERSION = 1  # part of the cache's name: raise it when the content of a chunk changes

MOLECULES = ("H2O", "CH4", "NH3", "H2CO", "CH3OH", "CH3CN", "HCOOH", "CH3CHO", "CH3CH2OH")
TEMPERATURE = (50.0, 1500.0)  # K, of the molecules
MOLECULE_RATTLE = 0.02  # Å, standard deviation of every coordinate, beside the normal modes
SOFT, FREE = 200.0, 60.0  # 1/cm: softer modes move as far as this one; below, translations and rotations, not at all
METAL_RATTLE = (0.0, 0.12)  # Å
METAL_STRAIN = 0.03  # largest entry of the strain
LATTICE_CONSTANTS = {29: 3.59, 79: 4.06}  # Å, of Cu and Au in effective medium theory


@dataclass(frozen=True)
class System:
    """What is computed: the packages whose versions matter, species, a configuration from a generator, a labeller,
    and an undisturbed configuration to start dynamics from."""

    packages: tuple[str, ...]
    species: tuple[int, ...]
    draw: Callable[[np.random.Generator], Atoms]
    calculator: Callable[[], Calculator]
    start: Callable[[], Atoms]


def _alloy(rng: np.random.Generator, strain: float, rattle: tuple[float, float]) -> Atoms:
    copper, gold = LATTICE_CONSTANTS
    build = load_extra("ase.build")
    share = rng.random()
    constant = LATTICE_CONSTANTS[copper] * (1 - share) + LATTICE_CONSTANTS[gold] * share
    atoms = build.bulk("Cu", "fcc", a=constant, cubic=True).repeat(2)
    atoms.numbers[:] = np.where(rng.random(len(atoms)) < share, gold, copper)
    change = rng.uniform(-strain, strain, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (change + change.T) / 2), scale_atoms=True)
    atoms.positions += rng.uniform(*rattle) * rng.standard_normal(atoms.positions.shape)
    return atoms


def _xtb() -> Calculator:
    # The default accuracy leaves 1e-4 eV/Å that depend on the calculation before.
    return load_extra("tblite.ase").TBLite(method="GFN2-xTB", accuracy=0.01, verbosity=0)


def _molecule(rng: np.random.Generator) -> Atoms:
    atoms, modes = _normal_modes(MOLECULES[rng.integers(len(MOLECULES))])
    shape = atoms.positions.shape
    thermal = np.sqrt(rng.uniform(*TEMPERATURE)) * modes @ rng.standard_normal(modes.shape[1])
    atoms.positions += thermal.reshape(shape) + MOLECULE_RATTLE * rng.standard_normal(shape)
    return atoms


@cache
def _equilibrium(name: str) -> tuple[Atoms, np.ndarray]:
    """The relaxed molecule, and D (3N, 3N) in Å/√K: √T D ξ, ξ normal, are thermal displacements at T.

    D = M^-1/2 V √k_B / ω Vᵀ over the modes V; as a function of the Hessian it is the same for all choices of V.
    """
    atoms = load_extra("ase.build").molecule(name)
    atoms.calc = _xtb()
    load_extra("ase.optimize").BFGS(atoms, logfile=None).run(fmax=1e-3)
    relaxed, step, rows = atoms.positions.copy(), 1e-3, []
    for move in np.eye(relaxed.size).reshape(-1, *relaxed.shape):
        forces = []
        for sign in (1, -1):
            atoms.positions = relaxed + sign * step * move
            forces.append(atoms.get_forces().ravel())
        rows.append((forces[1] - forces[0]) / (2 * step))
    units = load_extra("ase.units")
    root_mass = np.repeat(np.sqrt(atoms.get_masses()), 3)
    squares, vectors = np.linalg.eigh((np.array(rows) + np.array(rows).T) / 2 / np.outer(root_mass, root_mass))
    frequency = np.sqrt(np.abs(squares))
    per_cm = units.invcm / (units._hbar * units.J * units.s)  # angular frequency of 1/cm in ASE's unit of time
    amplitude = np.sqrt(units.kB) / np.maximum(frequency, SOFT * per_cm) * (frequency > FREE * per_cm)
    atoms.positions, atoms.calc = relaxed, None
    return atoms, (vectors / root_mass[:, None] * amplitude) @ vectors.T


def _normal_modes(name: str) -> tuple[Atoms, np.ndarray]:
    atoms, modes = _equilibrium(name)
    return atoms.copy(), modes


SYSTEMS = {
    "metals": System(
        packages=("ase",),
        species=(29, 79),
        draw=lambda rng: _alloy(rng, METAL_STRAIN, METAL_RATTLE),
        calculator=lambda: load_extra("ase.calculators.emt").EMT(),
        start=lambda: _alloy(np.random.default_rng(0), 0.0, (0.0, 0.0)),
    ),
    "molecules": System(
        packages=("ase", "tblite"),
        species=(1, 6, 7, 8),
        draw=_molecule,
        calculator=_xtb,
        start=lambda: _normal_modes("CH3CH2OH")[0],
    ),
}


class StructureSet(torch.utils.data.Dataset):
    """Labelled structures; a list of indices gives them as one :class:`Structures`.

    Raises ``ValueError`` that names the first structure whose energy or forces are not finite.

    Use with ``DataLoader(dataset, batch_size, collate_fn=lambda batch: batch)``.
    """

    def __init__(self, structures: list[Structures]):
        for number, single in enumerate(structures):
            single.require_finite_labels(f"structures[{number}]")
        self.structures = structures

    @property
    def atoms(self) -> list[int]:
        """How many atoms each structure has."""
        return [len(single.pos) for single in self.structures]

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> Structures:
        return self.structures[index]

    def __getitems__(self, indices: list[int]) -> Structures:
        """The structures ``indices``, in that order, as one batch."""
        return Structures.join([self.structures[index] for index in indices])


class ForceData:
    """``train``, ``val`` and ``test`` configurations of a system, each a :class:`StructureSet`.

    - ``system``: one of :data:`SYSTEMS`.
    - ``cutoff``: Å, the length of the longest edges.
    - ``train``, ``val``, ``test``: how many configurations.
    - ``seed``: of the configurations.
    - ``cache``: folder for labelled configurations; None: ``$IMPLICIT_STEER_CACHE``, else ``implicit_steer`` in
      ``$XDG_CACHE_HOME`` or ``~/.cache``. Written chunk by chunk: an interrupted run continues where it stopped.
    - ``progress``: show a bar while configurations are labelled.

    Positions, cells and forces are float32 (Å, eV/Å), energies float64 (eV).

    Raises ``ValueError`` for a wrong argument or a damaged file, ``RuntimeError`` where a package is missing.

    Example:
        >>> data = ForceData("metals", cutoff=5.0, train=100, val=20, test=20)
        >>> data.train.__getitems__([0, 1]).forces.shape
        torch.Size([64, 3])
    """

    def __init__(
        self,
        system: str,
        *,
        cutoff: float,
        train: int = 500,
        val: int = 100,
        test: int = 100,
        seed: int = 0,
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        require(system in SYSTEMS, "system", f"one of {list(SYSTEMS)}", repr(system))
        counts = dict(zip(SPLITS, (train, val, test), strict=True))
        for name, count in counts.items():
            require(count >= 1, name, "a positive number of configurations", count)
        load_extra("ase")
        self.system, self.seed = system, seed
        folder = cache_folder(cache) / _cache_name(system, seed)
        wanted = {
            folder / f"{name}-{start:06d}.npz": np.arange(start, start + CHUNK)
            for name in SPLITS
            for start in range(0, counts[name], CHUNK)
        }
        missing = {path: rows for path, rows in wanted.items() if not path.exists()}
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            _label(system, seed, missing, progress)
        parts: dict[str, list[Structures]] = {name: [] for name in SPLITS}
        for path, rows in wanted.items():
            chunk = chunks.load_chunk(path, rows, "configurations")
            parts[path.name.partition("-")[0]] += _structures(chunk, cutoff)
        self.train, self.val, self.test = (StructureSet(parts[name][: counts[name]]) for name in SPLITS)


def draw(system: str, seed: int, split: str, number: int) -> Atoms:
    """Configuration ``number`` of a split, without labels."""
    return SYSTEMS[system].draw(np.random.default_rng((seed, SPLITS.index(split), number)))


def _cache_name(system: str, seed: int) -> str:
    """The cache's name holds a digest of the packages' versions, because labels differ between them."""
    for package in SYSTEMS[system].packages:
        load_extra(package)
    versions = [importlib.metadata.version(package) for package in SYSTEMS[system].packages]
    return f"{system}-v{CACHE_VERSION}-seed{seed}-{hashlib.sha256(repr(versions).encode()).hexdigest()[:12]}"


def _label(system: str, seed: int, missing: dict[Path, np.ndarray], progress: bool) -> None:
    tqdm, calculator = load_extra("tqdm"), SYSTEMS[system].calculator
    total, one_thread = sum(len(rows) for rows in missing.values()), load_extra("threadpoolctl").threadpool_limits
    calculator()  # loads the libraries whose threads are limited below
    log.info("%s: labelling %d configurations", system, total)
    # On one thread xTB gives the same bits in every run.
    with one_thread(1), tqdm.tqdm(total=total, desc=system, unit="configuration", disable=not progress) as bar:
        for path, rows in missing.items():
            configurations = []
            for number in rows.tolist():
                atoms = draw(system, seed, path.name.partition("-")[0], number)
                atoms.calc = calculator()  # a fresh one: no result depends on the one before
                atoms.get_forces()
                configurations.append(atoms)
                bar.update()
            chunks.save_chunk(path, _chunk(rows, configurations))


def _chunk(rows: np.ndarray, configurations: list[Atoms]) -> dict[str, np.ndarray]:
    return {
        "row": rows,
        "atoms": np.array([len(atoms) for atoms in configurations]),
        "numbers": np.concatenate([atoms.numbers for atoms in configurations]),
        "position": np.concatenate([atoms.positions for atoms in configurations]),
        "cell": np.stack([atoms.cell.array for atoms in configurations]),
        "pbc": np.stack([atoms.pbc for atoms in configurations]),
        "energy": np.array([atoms.get_potential_energy() for atoms in configurations]),
        "forces": np.concatenate([atoms.get_forces() for atoms in configurations]),
    }


def _structures(chunk: dict[str, np.ndarray], cutoff: float) -> list[Structures]:
    ends = np.cumsum(chunk["atoms"])
    structures = []
    for n, (start, end) in enumerate(zip(ends - chunk["atoms"], ends, strict=True)):
        numbers, pos, forces = (torch.from_numpy(chunk[name][start:end]) for name in ("numbers", "position", "forces"))
        single = Structures.single(numbers, pos, cutoff, torch.from_numpy(chunk["cell"][n]), chunk["pbc"][n])
        rounded = {name: getattr(single, name).float() for name in ("pos", "cell", "shift")}
        energy = torch.from_numpy(chunk["energy"][n : n + 1])
        structures.append(replace(single, **rounded, energy=energy, forces=forces.float()))
    return structures
