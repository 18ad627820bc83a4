"""The checks of a certificate: numbers that are 0 for an exact potential, and the bounds on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._check import load_extra
from ..graph.structures import Structures
from ..layers import PotentialNet
from .md import MDOptions, run_nve

if TYPE_CHECKING:
    from ase import Atoms

_STEP = 3e-4  # Å, of central differences of fourth order: they lose 1e-11 of a smooth energy, and as much to rounding
_STRAIN = 1e-4
_BESIDE_CUTOFF = 1e-5  # Å
_DIRECTIONS = 4  # random displacements of all atoms per structure

_Array = NDArray[np.float64]


class Bound(NamedTuple):
    """The most that a check's number may be."""

    float64: float
    float32: float


# Rounding is 1e-13 and 1e-6 of the forces; what breaks these bounds is no rounding.
BOUNDS = {
    "forces": Bound(1e-8, 1e-4),
    "stress": Bound(1e-7, 1e-3),
    "hessian": Bound(1e-9, 1e-3),
    "net force": Bound(1e-10, 1e-4),
    "net torque": Bound(1e-10, 1e-4),
    "rotation": Bound(1e-9, 1e-4),
    "reflection": Bound(1e-9, 1e-4),
    "translation": Bound(1e-9, 1e-4),
    "permutation": Bound(1e-9, 1e-4),
    "cutoff": Bound(1e-3, 1e-3),
    "dynamics": Bound(1e-2, 1e-2),
    "table": Bound(1e-4, 1e-4),
    "determinism": Bound(0.0, 0.0),
}
MEANING = {
    "forces": "forces against central differences of the energy (float32: against float64), relative",
    "stress": "stress against finite strain (float32: against float64), relative",
    "hessian": "asymmetry of the Hessian, relative",
    "net force": "sum of the forces over the sum of their sizes",
    "net torque": "sum of the torques over the sum of their sizes, of molecules",
    "rotation": "change of rotated-back forces, relative, and of the energy in eV per atom",
    "reflection": "the same of a reflection",
    "translation": "the same of a translation",
    "permutation": "the same of another order of the atoms",
    "cutoff": "jump of the forces where two atoms cross the cutoff, relative",
    "dynamics": "change of the total energy at a vanishing time step over that of the potential energy",
    "table": "forces with tables in place of the MLPs, against the MLPs', relative",
    "determinism": "largest difference between two runs",
}


class _Values(NamedTuple):
    """Energy in eV, forces (N, 3), stress (3, 3) or None."""

    energy: float
    forces: _Array
    stress: _Array | None


@dataclass(frozen=True)
class Variant:
    """A potential on one backend, in one dtype, with one kind of kernel.

    Attributes:
        exact: the same in float64 on the same backend, which float32 is compared with.
        of_mlp: with MLPs, which tables are compared with; None where it has them itself.
    """

    potential: PotentialNet
    backend: str
    dtype: str
    kernel: str
    exact: PotentialNet
    of_mlp: PotentialNet | None
    options: MDOptions

    def values(self, atoms: Atoms, potential: PotentialNet | None = None) -> _Values:
        potential = potential or self.potential
        found = potential.predict(_structures(potential, atoms), stress=atoms.cell.rank == 3)
        stress = None if found.stress is None else _array(found.stress[0])
        return _Values(float(found.energy[0]), _array(found.forces), stress)

    def energy(self, atoms: Atoms) -> float:
        with torch.no_grad():
            return float(self.potential(_structures(self.potential, atoms))[0])


def _structures(potential: PotentialNet, atoms: Atoms) -> Structures:
    from .ase import from_atoms  # it imports ASE

    like = next(iter(potential.parameters()))
    return from_atoms(atoms, potential.cutoff, like.dtype).to(like.device)


def _array(x: torch.Tensor) -> _Array:
    return x.detach().cpu().double().numpy()


def _relative(difference: _Array, scale: float) -> float:
    return float(np.linalg.norm(difference)) / max(scale, 1e-12)


def _worst(values: Any) -> float:
    """The largest; NaN where one is."""
    return float(np.max(values))


def _slope(energy: Callable[[float], float], step: float) -> float:
    """dE/ds at 0 by central differences of fourth order."""
    near, far = energy(step) - energy(-step), energy(2 * step) - energy(-2 * step)
    return (8 * near - far) / (12 * step)


# ---- the checks: variant, structure, random numbers → a number, or None where the structure has nothing to check


def _forces(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    forces = variant.values(atoms).forces
    size = float(np.linalg.norm(forces))
    if variant.dtype != "float64":
        return _relative(forces - variant.values(atoms, variant.exact).forces, size)
    differences = []
    for _ in range(_DIRECTIONS):
        direction = random.standard_normal(forces.shape)
        direction /= np.linalg.norm(direction)
        slope = _slope(lambda s, along=direction: variant.energy(_displaced(atoms, s * along)), _STEP)
        differences.append(slope + (forces * direction).sum())
    return _worst(np.abs(differences)) / max(size, 1e-12)


def _stress(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float | None:
    found = variant.values(atoms)
    if found.stress is None:
        return None
    volume = abs(np.linalg.det(atoms.cell.array))
    scale = max(float(np.linalg.norm(found.stress)), np.linalg.norm(found.forces) * variant.potential.cutoff / volume)
    if variant.dtype != "float64":
        return _relative(found.stress - np.asarray(variant.values(atoms, variant.exact).stress), scale)
    expected = np.zeros((3, 3))
    for a, b in itertools.combinations_with_replacement(range(3), 2):
        unit = np.zeros((3, 3))
        unit[a, b] = unit[b, a] = 0.5 + 0.5 * (a == b)  # off the diagonal both entries, so that they count once
        slope = _slope(lambda s, strain=unit: variant.energy(_strained(atoms, s * strain)), _STRAIN)
        expected[a, b] = expected[b, a] = slope / volume
    return _relative(found.stress - expected, scale)


def _hessian(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    """|uᵀ H v − vᵀ H u| over the sizes of both products, for random displacements u and v."""
    structures, like = _structures(variant.potential, atoms), next(iter(variant.potential.parameters()))
    pos = structures.pos.clone().requires_grad_()
    forces = variant.potential.predict(structures.moved(pos), create_graph=True).forces
    u, v = (torch.from_numpy(random.standard_normal((2, *pos.shape))).to(like.device)).unbind()
    products = [
        torch.autograd.grad((forces.double() * direction).sum(), pos, retain_graph=True)[0].double()
        for direction in (u, v)
    ]
    difference = (products[0] * v).sum() - (products[1] * u).sum()
    return float(difference.abs() / (products[0].norm() * v.norm() + products[1].norm() * u.norm()).clamp(min=1e-12))


def _net_force(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    forces = variant.values(atoms).forces
    return _relative(forces.sum(0), float(np.linalg.norm(forces, axis=1).sum()))


def _net_torque(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float | None:
    if atoms.pbc.any():
        return None
    forces, arms = variant.values(atoms).forces, atoms.positions - atoms.positions.mean(0)
    sizes = np.linalg.norm(arms, axis=1) * np.linalg.norm(forces, axis=1)
    return _relative(np.cross(arms, forces).sum(0), float(sizes.sum()))


def _rotation(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    return _turned(variant, atoms, _random_rotation(random))


def _reflection(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    return _turned(variant, atoms, -_random_rotation(random))


def _turned(variant: Variant, atoms: Atoms, turn: _Array) -> float:
    image = atoms.copy()
    image.set_cell(atoms.cell.array @ turn.T)
    image.positions = atoms.positions @ turn.T
    return _changed(variant, atoms, image, lambda forces: forces @ turn)


def _translation(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    image = _displaced(atoms, random.uniform(-1, 1, 3))
    if atoms.pbc.any():
        image.wrap()
    return _changed(variant, atoms, image, lambda forces: forces)


def _permutation(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    order = random.permutation(len(atoms))
    return _changed(variant, atoms, atoms[order], lambda forces: forces[np.argsort(order)])


def _changed(variant: Variant, atoms: Atoms, image: Atoms, back: Callable[[_Array], _Array]) -> float:
    """By how much the image's energy and forces, brought back, differ from the structure's."""
    before, after = variant.values(atoms), variant.values(image)
    moved = _relative(back(after.forces) - before.forces, float(np.linalg.norm(before.forces)))
    return _worst([moved, abs(after.energy - before.energy) / len(atoms)])


def _cutoff(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    """Three atoms, of which the second crosses the cutoff of the first, for all pairs of species in the structure."""
    ase, r, jumps = load_extra("ase", "ase"), variant.potential.cutoff, []
    for pair in itertools.combinations_with_replacement(sorted(set(atoms.numbers)), 2):
        inside, outside = (
            variant.values(ase.Atoms([*pair, pair[0]], [[0, 0, 0], [r + side, 0, 0], [0, r / 2, 0]])).forces
            for side in (-_BESIDE_CUTOFF, _BESIDE_CUTOFF)
        )
        jumps.append(_relative(inside - outside, float(np.linalg.norm(outside))))
    return _worst(jumps)


def _dynamics(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    """What the total energy has gained at most, at a vanishing time step, from runs with one step and half of it."""
    from .ase import Calculator  # it imports ASE

    changes, moved = [], 0.0
    for halves in (1, 2):
        moving = atoms.copy()
        moving.calc = Calculator(variant.potential)
        options = replace(variant.options, dt=variant.options.dt / halves, steps=variant.options.steps * halves)
        _, potential, _, total = run_nve(moving, options).energies[::halves].T
        changes.append(total - total[0])
        moved = float(np.ptp(potential))
    left = (4 * changes[1] - changes[0]) / 3  # the O(dt²) of velocity Verlet cancels
    return _worst(np.abs(left)) / max(moved, 1e-12)


def _table(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float | None:
    if variant.of_mlp is None:
        return None
    expected = variant.values(atoms, variant.of_mlp).forces
    return _relative(variant.values(atoms).forces - expected, float(np.linalg.norm(expected)))


def _determinism(variant: Variant, atoms: Atoms, random: np.random.Generator) -> float:
    first, second = variant.values(atoms), variant.values(atoms)
    return _worst(np.abs(np.append(second.forces - first.forces, second.energy - first.energy)))


CHECKS: dict[str, Callable[[Variant, Any, np.random.Generator], float | None]] = {
    "forces": _forces,
    "stress": _stress,
    "hessian": _hessian,
    "net force": _net_force,
    "net torque": _net_torque,
    "rotation": _rotation,
    "reflection": _reflection,
    "translation": _translation,
    "permutation": _permutation,
    "cutoff": _cutoff,
    "dynamics": _dynamics,
    "table": _table,
    "determinism": _determinism,
}


def _displaced(atoms: Atoms, displacement: _Array) -> Atoms:
    moved = atoms.copy()
    moved.positions += displacement
    return moved


def _strained(atoms: Atoms, strain: _Array) -> Atoms:
    """The positions and the cell times 1 + strain."""
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return moved


def _random_rotation(random: np.random.Generator) -> _Array:
    turn, triangle = np.linalg.qr(random.standard_normal((3, 3)))
    turn = turn * np.sign(np.diag(triangle))
    return turn * np.sign(np.linalg.det(turn))
