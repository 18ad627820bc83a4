"""A potential evaluated again and again while the atoms move, as the engines of molecular dynamics do."""

from __future__ import annotations

import copy
import math
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._check import require
from ..graph.structures import Structures
from ..layers.potential import PotentialNet, Prediction


class Atoms(NamedTuple):
    """numbers (N,), atomic numbers; pos (N, 3) in Å, float64; cell (3, 3), rows = lattice vectors, 0 where there are
    none; pbc (3,), which of them repeat."""

    numbers: NDArray[Any]
    pos: NDArray[Any]
    cell: NDArray[Any]
    pbc: NDArray[Any]


class Evaluator:
    """A copy of a potential, and the neighbours of the atoms that it was evaluated for last.

    Neighbours are found up to the cutoff plus ``skin`` and found anew when an atom has moved by more than half of it,
    or when species, cell or periodicity changed; pairs beyond the cutoff do not count.

    Args:
        potential: a :class:`~implicit_steer.potentials.Potential`, or another module with its ``cutoff`` and
            ``predict``; it is copied. Its dtype and device are the calculation's, but vectors between atoms are
            computed, and energies of atoms added, in float64.
        skin: Å, ≥ 0.

    Raises:
        TypeError: ``potential`` or ``skin`` has another type.
        ValueError: ``skin`` is negative, NaN or infinite.
    """

    def __init__(self, potential: PotentialNet, skin: float) -> None:
        is_potential = isinstance(potential, torch.nn.Module) and hasattr(potential, "predict")
        require(is_potential, "potential", "a Potential", type(potential).__name__, kind=TypeError)
        real = isinstance(skin, Real) and not isinstance(skin, bool)
        require(real, "skin", "a number", repr(skin), kind=TypeError)
        require(0 <= skin < math.inf, "skin", "a length >= 0 in Å", skin)
        self.potential = copy.deepcopy(potential).eval().requires_grad_(False)
        self.skin = float(skin)
        self._parameter = next(iter(self.potential.parameters()))
        self._near: tuple[Atoms, Structures] | None = None  # where neighbours were found, and all within the skin

    def __call__(self, atoms: Atoms, *, stress: bool) -> Prediction:
        """What the potential predicts for ``atoms``.

        Raises ``ValueError``: an unknown species; ``stress`` of a cell without a volume; NaN or infinite positions or
        lattice vectors.
        """
        if self._near is None or self._moved(self._near[0], atoms):
            self._near = Atoms(*map(np.array, atoms)), self._found(atoms)
        near = self._near[1]
        pos = torch.tensor(atoms.pos, device=self._parameter.device)
        return self.potential.predict(near.moved(pos).within(self.potential.cutoff), stress=stress)

    def _found(self, atoms: Atoms) -> Structures:
        """``atoms`` with the edges within the cutoff and the skin, on the potential's device."""
        numbers, pos, cell = map(torch.tensor, atoms[:3])
        found = Structures.single(numbers, pos, self.potential.cutoff + self.skin, cell, atoms.pbc)
        return found.to(self._parameter.dtype).to(self._parameter.device)

    def _moved(self, before: Atoms, atoms: Atoms) -> bool:
        if len(before.numbers) != len(atoms.numbers) or (before.numbers != atoms.numbers).any():
            return True
        if (before.pbc != atoms.pbc).any() or (before.cell != atoms.cell).any():
            return True
        moved = np.square(atoms.pos - before.pos).sum(1).max(initial=0.0)
        return not 4 * moved <= self.skin**2  # so that NaN, too, has moved: the search for neighbours refuses it
