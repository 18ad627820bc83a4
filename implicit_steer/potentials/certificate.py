"""Whether a potential's forces are right: ``python -m implicit_steer certify POTENTIAL``, or :func:`certify`.

Every check is a number that is 0 for an exact potential, and a bound on it. Each is made for every backend that runs
here, in both dtypes, with the kernels' MLPs and with tables in their place, on the user's own structures.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._check import load_extra, require
from ..graph.structures import Structures
from ..layers import PotentialNet
from ..ops import select
from .md import MDOptions, read_potential, run_nve, start_structure

if TYPE_CHECKING:
    from ase import Atoms

DTYPES = {"float64": torch.float64, "float32": torch.float32}
KERNELS = ("mlp", "table")
_STEP = 3e-4  # Å, of central differences of fourth order: they lose 1e-11 of a smooth energy, and as much to rounding
_STRAIN = 1e-4
_BESIDE_CUTOFF = 1e-5  # Å
_DIRECTIONS = 4  # random displacements of all atoms per structure
_RATTLE = 0.05  # Å, of the structure that is taken where none is given

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


@dataclass(frozen=True)
class Finding:
    """One check of one variant: the worst number over the structures, and in which of them (from 0)."""

    check: str
    backend: str
    dtype: str
    kernel: str
    value: float
    bound: float
    structure: int

    @property
    def ok(self) -> bool:
        """Whether the bound holds; NaN breaks it."""
        return self.value <= self.bound


@dataclass(frozen=True)
class Certificate:
    """All findings about a potential, on how many structures."""

    findings: tuple[Finding, ...]
    structures: int

    @property
    def ok(self) -> bool:
        """Whether every bound holds."""
        return all(finding.ok for finding in self.findings)

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings that break their bounds."""
        return tuple(finding for finding in self.findings if not finding.ok)

    def __str__(self) -> str:
        lines = [f"Certificate on {self.structures} structure{'s' * (self.structures > 1)}"]
        for variant, found in itertools.groupby(self.findings, lambda f: (f.backend, f.dtype, f.kernel)):
            lines += ["", ", ".join(variant)]
            for f in found:
                verdict = "" if f.ok else f"  BROKEN, structure {f.structure}"
                lines.append(f"  {f.check:<12} {f.value:8.1e} <= {f.bound:.0e}{verdict}")
        checks = dict.fromkeys(f.check for f in self.findings)
        lines += ["", *(f"{check}: {MEANING[check]}" for check in checks), ""]
        n = len(self.broken)
        lines.append("All bounds hold." if self.ok else f"{n} of {len(self.findings)} bounds are broken.")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The findings, each with its verdict, as JSON."""
        found = [asdict(finding) | {"ok": finding.ok} for finding in self.findings]
        return json.dumps({"ok": self.ok, "structures": self.structures, "findings": found}, indent=1)


# ---- what is checked


class _Values(NamedTuple):
    """Energy in eV, forces (N, 3), stress (3, 3) or None."""

    energy: float
    forces: _Array
    stress: _Array | None


@dataclass(frozen=True)
class _Variant:
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


def _forces(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
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


def _stress(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float | None:
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


def _hessian(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
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


def _net_force(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
    forces = variant.values(atoms).forces
    return _relative(forces.sum(0), float(np.linalg.norm(forces, axis=1).sum()))


def _net_torque(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float | None:
    if atoms.pbc.any():
        return None
    forces, arms = variant.values(atoms).forces, atoms.positions - atoms.positions.mean(0)
    sizes = np.linalg.norm(arms, axis=1) * np.linalg.norm(forces, axis=1)
    return _relative(np.cross(arms, forces).sum(0), float(sizes.sum()))


def _rotation(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
    return _turned(variant, atoms, _random_rotation(random))


def _reflection(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
    return _turned(variant, atoms, -_random_rotation(random))


def _turned(variant: _Variant, atoms: Atoms, turn: _Array) -> float:
    image = atoms.copy()
    image.set_cell(atoms.cell.array @ turn.T)
    image.positions = atoms.positions @ turn.T
    return _changed(variant, atoms, image, lambda forces: forces @ turn)


def _translation(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
    image = _displaced(atoms, random.uniform(-1, 1, 3))
    if atoms.pbc.any():
        image.wrap()
    return _changed(variant, atoms, image, lambda forces: forces)


def _permutation(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
    order = random.permutation(len(atoms))
    return _changed(variant, atoms, atoms[order], lambda forces: forces[np.argsort(order)])


def _changed(variant: _Variant, atoms: Atoms, image: Atoms, back: Callable[[_Array], _Array]) -> float:
    """By how much the image's energy and forces, brought back, differ from the structure's."""
    before, after = variant.values(atoms), variant.values(image)
    moved = _relative(back(after.forces) - before.forces, float(np.linalg.norm(before.forces)))
    return _worst([moved, abs(after.energy - before.energy) / len(atoms)])


def _cutoff(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
    """Three atoms, of which the second crosses the cutoff of the first, for all pairs of species in the structure."""
    ase, r, jumps = load_extra("ase", "ase"), variant.potential.cutoff, []
    for pair in itertools.combinations_with_replacement(sorted(set(atoms.numbers)), 2):
        inside, outside = (
            variant.values(ase.Atoms([*pair, pair[0]], [[0, 0, 0], [r + side, 0, 0], [0, r / 2, 0]])).forces
            for side in (-_BESIDE_CUTOFF, _BESIDE_CUTOFF)
        )
        jumps.append(_relative(inside - outside, float(np.linalg.norm(outside))))
    return _worst(jumps)


def _dynamics(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
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


def _table(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float | None:
    if variant.of_mlp is None:
        return None
    expected = variant.values(atoms, variant.of_mlp).forces
    return _relative(variant.values(atoms).forces - expected, float(np.linalg.norm(expected)))


def _determinism(variant: _Variant, atoms: Atoms, random: np.random.Generator) -> float:
    first, second = variant.values(atoms), variant.values(atoms)
    return _worst(np.abs(np.append(second.forces - first.forces, second.energy - first.energy)))


_CHECKS: dict[str, Callable[[_Variant, Any, np.random.Generator], float | None]] = {
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


# ---- all of it


def certify(
    potential: PotentialNet,
    structures: Sequence[Atoms],
    *,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    kernels: Sequence[str] = KERNELS,
    checks: Sequence[str] = tuple(BOUNDS),
    bounds: Mapping[str, Bound] = BOUNDS,
    steps: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> Certificate:
    """Check a potential on ASE's structures.

    Args:
        potential: a :class:`Potential`, or what :func:`implicit_steer.load` gives; it is copied.
        structures: at least one, with forces: an ideal crystal, where all are 0, shows nothing.
        backends: names; by default all that run here and compute second derivatives.
        dtypes, kernels: of "float64" and "float32"; of "mlp" and "table". A frozen potential has tables alone.
        checks: some of :data:`BOUNDS`; :data:`MEANING` says what each number is.
        bounds: of the checks, by dtype.
        steps: of the dynamics at constant energy, 0.5 fs each, from 300 K.
        seed: of displacements, rotations, orders and velocities.
        progress: whether to show a progress bar.

    Raises:
        TypeError: ``potential`` is none.
        ValueError: no structure; a name that is unknown; an atom of an unknown species.
        RuntimeError: ASE is missing, or a backend does not run here.

    Example:
        >>> atoms = ase.build.bulk("Cu", cubic=True)
        >>> atoms.rattle(0.05)
        >>> certify(Potential([29], cutoff=4.0), [atoms], backends=["cpu"], steps=20).ok
        True
    """
    tqdm = load_extra("tqdm")
    require(isinstance(potential, PotentialNet), "potential", "a Potential", type(potential).__name__, kind=TypeError)
    require(len(structures) > 0, "structures", "at least one", "none")
    _known("dtypes", dtypes, DTYPES), _known("kernels", kernels, KERNELS), _known("checks", checks, BOUNDS)
    names = _usable(potential) if backends is None else list(backends)
    _known("backends", names, select.BACKENDS)
    options = MDOptions("", steps=steps, dt=0.5, seed=seed, progress=False)
    variants = list(_variants(potential, names, dtypes, kernels, options))
    findings = []
    total = len(variants) * len(checks)
    with tqdm.tqdm(total=total, desc="certify", unit="check", disable=not progress) as bar:
        for variant in variants:
            for check in checks:
                found = [_CHECKS[check](variant, atoms, np.random.default_rng(seed)) for atoms in structures]
                numbers = {n: value for n, value in enumerate(found) if value is not None}
                if numbers:
                    structure = max(numbers, key=lambda n, of=numbers: (of[n] != of[n], of[n]))  # NaN is the worst
                    value = numbers[structure]
                    bound = getattr(bounds[check], variant.dtype)
                    names_of = variant.backend, variant.dtype, variant.kernel
                    findings.append(Finding(check, *names_of, value, bound, structure))
                bar.update()
    return Certificate(tuple(findings), len(structures))


def _known(name: str, given: Sequence[str], among: Any) -> None:
    wrong = [value for value in given if value not in among]
    require(len(given) > 0 and not wrong, name, f"some of {list(among)}", wrong or "none")


def _usable(potential: PotentialNet) -> list[str]:
    """The backends, but for the oracle, that run here on the device of the potential."""
    device, kernels = next(iter(potential.parameters())).device, [c.implicit_kernel for c in _convolutions(potential)]
    return [
        name
        for name, backend in select.BACKENDS.items()
        if name != "reference"
        and all(backend.supports(k.plan, device, dtype)[0] for k in kernels for dtype in DTYPES.values())
    ]


def _convolutions(potential: PotentialNet) -> list[Any]:
    return [module for module in potential.modules() if hasattr(module, "implicit_kernel")]


def _variants(
    potential: PotentialNet, backends: Sequence[str], dtypes: Sequence[str], kernels: Sequence[str], options: MDOptions
) -> Iterator[_Variant]:
    frozen = any(c.implicit_kernel.plan.is_frozen for c in _convolutions(potential))
    of_kernel = {"table": potential} if frozen else {"mlp": potential, "table": potential.freeze_table()}
    for backend, dtype, kernel in itertools.product(backends, dtypes, (k for k in kernels if k in of_kernel)):
        own = _copy(of_kernel[kernel], backend, dtype)
        exact = _copy(of_kernel[kernel], backend, "float64")
        of_mlp = _copy(of_kernel["mlp"], backend, dtype) if kernel == "table" and not frozen else None
        yield _Variant(own, backend, dtype, kernel, exact, of_mlp, options)


def _copy(potential: PotentialNet, backend: str, dtype: str) -> PotentialNet:
    made = copy.deepcopy(potential).to(DTYPES[dtype]).eval().requires_grad_(False)
    for conv in _convolutions(made):
        conv.backend = backend
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m implicit_steer certify``."""
    parser.add_argument("potential", help="a file of `train forces`, implicit_steer.save or Potential.save")
    parser.add_argument("--structures", nargs="+", metavar="FILE", help="that ASE reads (a built-in one, rattled)")
    parser.add_argument("--limit", type=int, metavar="N", default=3, help="structures of each file (%(default)s)")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="(all that run here)")
    for name, known in (("dtypes", DTYPES), ("kernels", KERNELS), ("checks", BOUNDS)):
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME", default=list(known), help="(%(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", default=200, help="of the dynamics (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the findings to this file")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def main(args: argparse.Namespace) -> int:
    """``python -m implicit_steer certify``: print the certificate; 1 where a bound is broken."""
    potential = read_potential(args.potential)
    structures = _read(potential, args.structures, args.limit)
    options = {name: getattr(args, name) for name in ("backends", "dtypes", "kernels", "checks", "steps", "progress")}
    found = certify(potential, structures, **options)
    print(found)
    if args.json:
        Path(args.json).write_text(found.to_json())
    return int(not found.ok)


def _read(potential: PotentialNet, files: Sequence[str] | None, limit: int) -> list[Atoms]:
    if not files:
        atoms = start_structure(potential, None)
        atoms.rattle(_RATTLE, seed=0)
        return [atoms]
    require(limit >= 1, "limit", "at least 1", limit)
    read = load_extra("ase.io", "ase").read
    found = []
    for file in files:
        require(Path(file).is_file(), "structures", "a file that ASE reads", repr(file))
        found += read(file, f":{limit}")
    return found
