"""Repulsion of nuclei at short distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import require
from ..plan.packing import Constants

_COULOMB = 14.399645  # e² / 4πε₀, eV Å
_SCREENING_LENGTH = 0.46850  # 0.8854 Bohr radii, Å
_CHARGE_POWER = 0.23
_SHARES = (0.18175, 0.50986, 0.28022, 0.02817)
_DECAYS = (3.19980, 0.94229, 0.40290, 0.20162)

# Å, of hydrogen to curium: Cordero et al., Dalton Transactions 2008, 2832 (carbon sp³; Mn, Fe, Co of low spin).
_COVALENT_RADII = (
    *(0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41, 1.21, 1.11, 1.07, 1.05, 1.02, 1.06),
    *(2.03, 1.76, 1.70, 1.60, 1.53, 1.39, 1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22, 1.20, 1.19, 1.20, 1.20, 1.16),
    *(2.20, 1.95, 1.90, 1.75, 1.64, 1.54, 1.47, 1.46, 1.42, 1.39, 1.45, 1.44, 1.42, 1.39, 1.39, 1.38, 1.39, 1.40),
    *(2.44, 2.15, 2.07, 2.04, 2.03, 2.01, 1.99, 1.98, 1.98, 1.96, 1.94, 1.92, 1.92, 1.89, 1.90, 1.87, 1.87, 1.75),
    *(1.70, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36, 1.32, 1.45, 1.46, 1.48, 1.40, 1.50, 1.50, 2.60, 2.21, 2.15, 2.06),
    *(2.00, 1.96, 1.90, 1.87, 1.80, 1.69),
)


class ZBL(torch.nn.Module):
    """v(r) = (e² / 4πε₀) Z₁ Z₂ / r · Σ_k s_k exp(−d_k r / a) · p(r / R),  a = 0.8854 a₀ / (Z₁^0.23 + Z₂^0.23):
    the universal repulsion of Ziegler, Biersack and Littmark of two nuclei, in eV at r in Å.

    p(u) = 1 − 28 u⁶ + 48 u⁷ − 21 u⁸ takes it to 0, with two continuous derivatives, at R, the sum of the covalent
    radii, or the cutoff if that is shorter. Nothing is learned. It diverges at r = 0.

    Args:
        species: different atomic numbers, 1 to 96.
        cutoff: the largest distance, in Å.

    Raises:
        ValueError: an atomic number whose covalent radius is not known, or that comes twice; a cutoff ≤ 0.

    Sources: J. F. Ziegler, J. P. Biersack, U. Littmark, *The Stopping and Range of Ions in Solids*, Pergamon 1985, for
    a, s and d; the end at the covalent radii is that of MACE (Batatia et al., NeurIPS 2022, and its code).
    """

    def __init__(self, species: tuple[int, ...], cutoff: float) -> None:
        super().__init__()
        require(len(set(species)) == len(species), "species", "different atomic numbers", species)
        require(cutoff > 0, "cutoff", "a distance > 0", cutoff)
        unknown = [z for z in species if not 1 <= z <= len(_COVALENT_RADII)]
        expected = f"atomic numbers from 1 to {len(_COVALENT_RADII)}, whose covalent radii are known"
        require(not unknown, "species", expected, unknown, "Build the potential without zbl.")
        self.species, self.cutoff = tuple(species), float(cutoff)
        charges = np.array(self.species, dtype=np.float64)
        radii = np.array([_COVALENT_RADII[z - 1] for z in self.species])
        strength = _COULOMB * charges[:, None] * charges
        screening = _SCREENING_LENGTH / (charges[:, None] ** _CHARGE_POWER + charges**_CHARGE_POWER)
        ends = np.minimum(radii[:, None] + radii, self.cutoff)
        pairs = np.stack([strength, screening, ends], -1).reshape(-1, 3)  # row first · count + second
        self._constants = Constants(pairs, np.array(_SHARES), np.array(_DECAYS))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"species": self.species, "cutoff": self.cutoff}

    def forward(self, pair: Tensor, delta: Tensor) -> Tensor:
        """v (E,) in eV, from the pairs of species (E,), first · count + second as positions in ``species``, and the
        vectors between the atoms (E, 3) in Å, none of them 0."""
        pairs, shares, decays = self._constants.like(delta)
        strength, screening, end = pairs.index_select(0, pair).unbind(1)
        r = delta.square().sum(1).sqrt()
        screened = (-(r / screening)[:, None] * decays).exp() @ shares
        u = (r / end).clamp(max=1)
        return strength / r * screened * (1 - u**6 * (28 - 48 * u + 21 * u**2))

    def extra_repr(self) -> str:
        """What distinguishes this repulsion."""
        return f"species={list(self.species)}, cutoff={self.cutoff} Å"
