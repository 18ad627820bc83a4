"""Energies, forces and stress of ASE's atoms, under whatever names a file has them, and whole files of such atoms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._check import fail, load_extra, require
from ..graph.structures import Structures
from .ase import from_atoms
from .data import StructureSet

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

# Names that are looked for, in this order: reference values come before what a calculator may have left behind.
_PREFIXES = ("REF_", "ref_", "DFT_", "dft_", "")
_GUESSES = {
    "energy": ("energy", "Energy", "free_energy", "TotEnergy"),
    "forces": ("forces", "force", "Forces"),
    "stress": ("stress", "Stress"),
    "virial": ("virial", "virials", "Virial"),
}
_SYMMETRIC = 1e-3  # of the largest entry, by which a stress may differ from its transpose
_VOIGT = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]  # ASE's order: xx, yy, zz, yz, xz, xy

# What ASE's readers raise where their parsing goes wrong.
_OF_READERS = (
    ValueError,
    LookupError,
    OSError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    StopIteration,
)

_Array = NDArray[np.float64]


class Values(NamedTuple):
    """Energy in eV; forces (N, 3) in eV/Å; stress (3, 3) in eV/Å³, positive under tension, or None."""

    energy: float
    forces: _Array
    stress: _Array | None


@dataclass(frozen=True)
class Labels:
    """Under which names atoms have their labels: in ``atoms.info``, ``atoms.arrays`` or the results of a calculator.

    None: the first of the usual names that is there, with and without REF_, ref_, DFT_ or dft_ in front.

    Attributes:
        energy: eV of the whole structure.
        forces: eV/Å.
        stress: eV/Å³, (3, 3), 9 numbers, or 6 in ASE's order; positive under tension, as in ASE.
        virial: eV, −V · stress; it counts where there is no stress.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None

    def of(self, atoms: Atoms, where: str = "atoms") -> Values:
        """The labels of ``atoms``, which messages call ``where``.

        Raises ``ValueError`` where energy or forces are missing, where a name that was given is not there, and where a
        label has another shape or is not finite.
        """
        there = {**(atoms.calc.results if atoms.calc is not None else {}), **atoms.info, **atoms.arrays}
        energy = self._find("energy", there, where, needed=True)
        forces = self._find("forces", there, where, needed=True)
        stress = self._find("stress", there, where, needed=self.stress is not None)
        if stress is None:
            virial = self._find("virial", there, where, needed=self.virial is not None)
            if virial is not None:
                require(atoms.cell.rank == 3, where, "a cell with three lattice vectors beside a virial", "none")
                stress = -_matrix(virial, f"{where}: virial") / atoms.get_volume()
        else:
            stress = _matrix(stress, f"{where}: stress")
        require(energy.size == 1, f"{where}: energy", "one number", f"shape {energy.shape}")
        require(forces.shape == (len(atoms), 3), f"{where}: forces", f"shape {(len(atoms), 3)}", forces.shape)
        for name, label in (("energy", energy), ("forces", forces), ("stress", stress)):
            finite = label is None or bool(np.isfinite(label).all())
            require(
                finite, f"{where}: {name}", "finite numbers", "NaN or Inf", "Leave the frame out, or label it anew."
            )
        return Values(energy.item(), forces, stress)

    def _find(self, label: str, there: Mapping[str, Any], where: str, needed: bool) -> Any:
        given = getattr(self, label)
        names = [given] if given else [prefix + name for prefix in _PREFIXES for name in _GUESSES[label]]
        found = next((name for name in names if name in there), None)
        if found is None:
            if not needed:
                return None
            expected = repr(given) if given else f"one of {', '.join(map(repr, names))}"
            others = sorted(set(there) - {"numbers", "positions"})
            fail(f"{where}: {label}", expected, f"only {others}", f"Say under which name it is: {label}_key.")
        try:
            return np.asarray(there[found], dtype=np.float64)
        except (TypeError, ValueError):
            fail(f"{where}: {label}", "numbers", repr(there[found])[:60])


def _matrix(value: _Array, name: str) -> _Array:
    """(3, 3) of 6 numbers in ASE's order, 9, or (3, 3)."""
    flat = value.reshape(-1)
    require(flat.size in (6, 9), name, "6 numbers, 9, or shape (3, 3)", f"shape {value.shape}")
    matrix = flat[_VOIGT] if flat.size == 6 else flat.reshape(3, 3)
    skew = np.abs(matrix - matrix.T).max()
    require(not skew > _SYMMETRIC * np.abs(matrix).max(), name, "a symmetric matrix", f"an asymmetry of {skew:.1e}")
    return (matrix + matrix.T) / 2


def labelled(atoms: Atoms, cutoff: float, labels: Labels, where: str = "atoms") -> Structures:
    """``atoms`` with edges up to ``cutoff`` (Å) and their labels; what depends on distances in float32.

    Raises what :meth:`Labels.of` raises, and ``ValueError`` where two atoms are in one place."""
    found = labels.of(atoms, where)
    single = from_atoms(atoms, cutoff, torch.float32)
    single.require_apart(where)
    stress = None if found.stress is None else torch.from_numpy(found.stress).float()[None]
    energy = torch.tensor([found.energy], dtype=torch.float64)
    return replace(single, energy=energy, forces=torch.from_numpy(found.forces).float(), stress=stress)


def check_stress_sign(atoms: Atoms, labels: Labels, calculator: Calculator) -> None:
    """Compare the sign of a labelled stress with finite strain of ``calculator``, the method that made the labels.

    Raises ``ValueError`` where it is the other one.
    """
    given = labels.of(atoms).stress
    require(given is not None, "atoms", "a labelled stress", "none")
    strained = atoms.copy()
    strained.calc = calculator
    difference = load_extra("ase.calculators.fd", "ase").calculate_numerical_stress(strained, voigt=False)
    agrees = bool((np.asarray(given) * difference).sum() >= 0)
    remedy = "Name it as a virial, or change its sign: a stress is positive under tension, a virial is −V · stress."
    require(agrees, "stress", "the sign of the derivative of the energy by strain", "the other one", remedy)


# ---- files


class FileData:
    """Structures of a user's files, as training takes them: ``train``, ``val`` and ``test``.

    Args:
        train: a file that ASE reads, for instance extended XYZ.
        cutoff: Å, the length of the longest edges.
        valid: the same of the frames that choose an epoch; None: a tenth of ``train``, drawn at random.
        test: the same of the frames that are tested; None: those of ``valid``.
        labels: the names of energy, forces, stress and virial.
        limit: frames of ``train`` at most, the first ones; None: all.
        seed: of the frames that are drawn.
        progress: whether to show a progress bar.

    Attributes:
        species: atomic numbers of the training frames, ascending.
        sizes: how many frames each set has.
        test_kinds: ``config_type`` of every frame of the test set, "" where there is none.
        isolated: the energy of single atoms in the training file, by atomic number.

    Raises:
        ValueError: a file that ASE cannot read, or without frames; a frame without energy or forces, with one that is
            not finite, or with two atoms in one place; an element that no training frame has. The message names the
            file and the frame, from 0.
    """

    def __init__(
        self,
        train: str,
        *,
        cutoff: float,
        valid: str | None = None,
        test: str | None = None,
        labels: Labels | None = None,
        limit: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ):
        labels = labels or Labels()
        frames = _read(train, "data")[:limit]
        self.species = tuple(sorted({int(number) for atoms in frames for number in atoms.numbers}))
        given = [("train", train, frames)]
        given += [(name, path, _read(path, name)) for name, path in (("valid", valid), ("test", test)) if path]
        sets = {}
        for name, path, found in given:
            _check_species(path, found, self.species)
            sets[name] = _structures(path, found, cutoff, labels, progress)
        kinds = {name: [str(atoms.info.get("config_type", "")) for atoms in found] for name, _, found in given}
        self.isolated = {
            int(atoms.numbers[0]): single.energy.item()
            for atoms, single in zip(frames, sets["train"], strict=True)
            if len(atoms) == 1
        }
        if valid is None:
            require(len(frames) >= 3, train, "at least 3 frames, or a file to validate with", len(frames))
            order = np.random.default_rng(seed).permutation(len(frames))
            held = sorted(order[: max(1, len(frames) // 10)].tolist())
            kinds["valid"] = [kinds["train"][n] for n in held]
            sets["valid"] = [sets["train"][n] for n in held]
            sets["train"] = [single for n, single in enumerate(sets["train"]) if n not in set(held)]
        self.train, self.val = StructureSet(sets["train"]), StructureSet(sets["valid"])
        self.test = StructureSet(sets["test"]) if test else self.val
        self.test_kinds = kinds["test" if test else "valid"]
        self.sizes = {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


def _read(path: str, name: str) -> list[Atoms]:
    io = load_extra("ase.io", "ase")
    require(Path(path).is_file(), name, "a file that ASE reads", repr(path))
    frames: list[Atoms] = []
    try:
        frames.extend(io.iread(path, ":"))  # frame by frame, to know which one cannot be read
    except (*_OF_READERS, load_extra("ase.io.formats", "ase").UnknownFileTypeError) as error:
        where = f"frame {len(frames)} of {path}" if frames else path
        remedy = "Copy the file again if it was cut short, or mend the frame." if frames else ""
        fail(where, "a file that ASE reads", f"{type(error).__name__}: {error}", remedy)
    require(len(frames) > 0, path, "at least one frame", "none")
    return frames


def _check_species(path: str, frames: Sequence[Atoms], species: Sequence[int]) -> None:
    for n, atoms in enumerate(frames):
        unknown = sorted({int(number) for number in atoms.numbers} - set(species))
        remedy = "Train on frames that have these elements, or leave the frame out."
        require(not unknown, f"frame {n} of {path}", f"atomic numbers among {list(species)}", unknown, remedy)


def _structures(path: str, frames: Sequence[Atoms], cutoff: float, labels: Labels, progress: bool) -> list[Structures]:
    bar = load_extra("tqdm").tqdm(frames, desc=Path(path).name, unit="frame", disable=not progress)
    return [labelled(atoms, cutoff, labels, f"frame {n} of {path}") for n, atoms in enumerate(bar)]


# ---- errors


def error_tables(tested: Sequence[tuple[Structures, Any]], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean absolute errors by element (forces, eV/Å) and by config type (energy per atom in eV, forces in eV/Å).

    ``tested``: single structures with what :meth:`~implicit_steer.potentials.PotentialNet.predict` says of them.
    """
    symbols = load_extra("ase.data", "ase").chemical_symbols
    by_element: dict[str, Counter[str]] = {}
    by_kind: dict[str, Counter[str]] = {}
    for (single, found), kind in zip(tested, kinds, strict=True):
        wrong = (found.forces - single.forces).abs().sum(1).tolist()
        for number, error in zip(single.numbers.tolist(), wrong, strict=True):
            by_element.setdefault(symbols[number], Counter()).update(atoms=1, forces=error / 3)
        energy = abs(found.energy.item() - single.energy.item()) / len(single.numbers)
        of_kind = by_kind.setdefault(kind or "all", Counter())
        of_kind.update(frames=1, energy=energy, atoms=len(single.numbers), forces=sum(wrong) / 3)
    return {
        "elements": {k: {"forces_mae": c["forces"] / c["atoms"], "atoms": c["atoms"]} for k, c in by_element.items()},
        "config_types": {
            k: {"energy_mae": c["energy"] / c["frames"], "forces_mae": c["forces"] / c["atoms"], "frames": c["frames"]}
            for k, c in by_kind.items()
        },
    }
