"""Potentials as calculators of the Atomic Simulation Environment: molecular dynamics, relaxation, phonons with ASE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from .._check import load_extra, require
from ..graph.structures import Structures
from .evaluator import Atoms as PlainAtoms
from .evaluator import Evaluator

if TYPE_CHECKING:
    from ase import Atoms

    from .potential import Potential

_base = load_extra("ase.calculators.calculator", "ase")
_COUNTS = ("positions", "numbers", "cell", "pbc")
_voigt = load_extra("ase.stress", "ase").full_3x3_to_voigt_6_stress


def from_atoms(atoms: Atoms, r: float, dtype: torch.dtype = torch.float64) -> Structures:
    """A copy of ASE's ``atoms``, with edges up to length ``r`` (Å), the edges' vectors in ``dtype``; positions and cell
    stay in float64, in which the vectors are computed."""
    numbers, pos, cell = (torch.tensor(array) for array in (atoms.numbers, atoms.positions, atoms.cell.array))
    return Structures.single(numbers, pos, r, cell, atoms.pbc).to(dtype)


class Calculator(_base.Calculator):
    """A potential for ASE: energy, free_energy (eV), energies (eV per atom), forces (eV/Å), stress (eV/Å³, Voigt).

    Neighbours are found up to the cutoff plus ``skin`` and found anew when an atom has moved by more than half of it,
    or when species, cell or periodicity changed; pairs beyond the cutoff do not count. Charges and magnetic moments of
    the atoms are ignored: they are those of the potential's training data.

    Args:
        potential: a :class:`~implicit_steer.potentials.Potential`, or another module with its ``cutoff`` and
            ``predict``; it is copied. Its dtype and device are the calculation's, but vectors between atoms are
            computed, and energies of atoms added, in float64: use ``potential.double()`` for dynamics.
        skin: Å, ≥ 0.
        kwargs: of ASE's ``Calculator``: atoms, label, directory, restart.

    Raises:
        TypeError: ``potential`` or ``skin`` has another type, or a keyword is none of ASE's and would have no effect.
        ValueError: an unknown species; "stress" asked for without three lattice vectors; NaN or infinite positions or
            lattice vectors.

    Example:
        >>> atoms = ase.build.bulk("Cu", cubic=True)
        >>> atoms.calc = Calculator(Potential([29], cutoff=5.0).double())
        >>> atoms.get_forces().shape
        (4, 3)
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "energies", "forces", "stress"]

    def __init__(self, potential: Potential, skin: float = 0.3, **kwargs: Any):
        super().__init__(**kwargs)
        remedy = "The potential has nothing to set: total charge and spin are those of its training data."
        expected = "ASE's options (atoms, label, directory, restart)"
        require(not self.parameters, "kwargs", expected, dict(self.parameters), remedy, TypeError)
        self._evaluator = Evaluator(potential, skin)
        self.potential, self.skin = self._evaluator.potential, self._evaluator.skin

    def check_state(self, atoms: Atoms, tol: float = 0) -> list[str]:
        """What has changed since the last calculation, of what counts; ASE compares more, which takes longer."""
        if self.atoms is None:
            return list(_base.all_changes)
        return [name for name in _COUNTS if not np.array_equal(getattr(atoms, name), getattr(self.atoms, name))]

    def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=_base.all_changes) -> None:
        """Fill ``results``, with the stress where the cell has a volume."""
        super().calculate(atoms, properties, system_changes)
        has_volume = self.atoms.cell.rank == 3
        require("stress" not in properties or has_volume, "stress", "three lattice vectors", f"{self.atoms.cell}")
        plain = PlainAtoms(self.atoms.numbers, self.atoms.positions, self.atoms.cell.array, self.atoms.pbc)
        energy, energies, forces, stress = self._evaluator(plain, stress=has_volume)
        self.results = {
            "energy": energy.item(),
            "free_energy": energy.item(),
            "energies": energies.cpu().double().numpy(),
            "forces": forces.cpu().double().numpy(),
        }
        if has_volume:
            self.results["stress"] = _voigt(stress[0].cpu().double().numpy())
