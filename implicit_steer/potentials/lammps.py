"""Potentials in LAMMPS, through its library interface: molecular dynamics and minimisation on one or several ranks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._check import require
from .evaluator import Atoms, Evaluator

if TYPE_CHECKING:
    from lammps import lammps

    from .potential import Potential

_VOIGT = [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]  # LAMMPS's order of a virial: xx, yy, zz, xy, xz, yz


def attach(
    lmp: lammps,
    potential: Potential,
    types: Sequence[int] | None = None,
    *,
    skin: float = 0.3,
    fix: str = "implicit_steer",
) -> None:
    """Let ``potential`` act on all atoms of a LAMMPS simulation: F = −∂E/∂pos, virial −V σ, by ``fix external``.

    The energy counts in LAMMPS's potential energy, that of each atom in ``compute pe/atom``, and the virial in the
    pressure, as those of a pair style do; pair styles beside it add to them. There is no virial per atom. On several
    MPI ranks each of them evaluates the potential for all atoms and keeps the forces of its own: the trajectory is that
    of one rank, and the potential takes as long. The atoms need consecutive IDs, which ``reset_atoms id`` gives them.
    LAMMPS's ``unfix`` with the name of ``fix`` detaches the potential.

    Where the potential raises an error in a run, LAMMPS's command raises an ``Exception`` with its message; later runs
    require the command ``timer timeout off``.

    Args:
        lmp: a simulation in units ``metal`` (eV, Å) whose box exists.
        potential: a :class:`~implicit_steer.potentials.Potential`, or another module with its ``cutoff`` and
            ``predict``; it is copied. Use ``potential.double()`` for dynamics.
        types: the atomic number of each of LAMMPS's atom types; by default the potential's species, in their order.
        skin: Å, ≥ 0: neighbours up to the cutoff plus ``skin`` are found anew when an atom has moved by more than half
            of it, has been moved to the other side of a periodic box, or when the box changes.
        fix: name of the fix, which must not exist yet.

    Raises:
        TypeError: ``potential``, ``types`` or ``skin`` has another type.
        ValueError: other units; ``types`` are not as many as LAMMPS has; the fix exists.

    Example:
        >>> lmp = lammps.lammps()
        >>> lmp.file("in.copper")  # units metal, atoms of one type, no pair style, fix nve
        >>> attach(lmp, load_potential("copper.pt").double(), types=[29])
        >>> lmp.command("run 1000")
    """
    units = lmp.extract_global("units")
    require(units == "metal", "lmp", "a simulation in units metal (eV, Å)", f"units {units}")
    require(bool(lmp.extract_setting("box_exist")), "lmp", "a simulation with a box", "none", "Create it first.")
    require(not lmp.has_id("fix", fix), "fix", "a name that no fix has", repr(fix))
    evaluator = Evaluator(potential, skin)
    numbers = _numbers(potential.species if types is None else types, lmp.extract_setting("ntypes"))
    lmp.command(f"fix {fix} all external pf/callback 1 1")
    lmp.command(f"fix_modify {fix} energy yes virial yes")
    lmp.set_fix_external_callback(fix, _Callback(lmp, evaluator, numbers, fix))


def _numbers(types: Any, n_types: int) -> NDArray[np.int64]:
    """The atomic number of each type (n_types + 1,); the first one stands for no type."""
    expected = f"{n_types} atomic numbers, one for each of LAMMPS's atom types"
    whole = isinstance(types, Sequence) and all(isinstance(z, int) and not isinstance(z, bool) for z in types)
    require(whole, "types", expected, repr(types), kind=TypeError)
    require(len(types) == n_types, "types", expected, repr(types))
    return np.array([0, *types])


class _Callback:
    """What LAMMPS calls for forces, on every rank at the same time."""

    def __init__(self, lmp: lammps, evaluator: Evaluator, numbers: NDArray[np.int64], fix: str) -> None:
        self._lmp, self._evaluator, self._numbers, self._fix = lmp, evaluator, numbers, fix

    def __call__(self, _: Any, step: int, n_local: int, tag: NDArray[Any], x: NDArray[Any], f: NDArray[Any]) -> None:
        try:
            self._compute(tag, f)
        except Exception as error:  # noqa: BLE001  # ctypes would print any error, and LAMMPS go on
            self._stop(f"{type(error).__name__}: {error}")

    def _compute(self, tag: NDArray[Any], f: NDArray[Any]) -> None:
        """Fill the forces ``f`` (n_local, 3) on the atoms with these IDs (n_local,), and tell LAMMPS energy and
        virial."""
        lmp, atoms = self._lmp, self._atoms()
        found = self._evaluator(atoms, stress=True)
        own = tag - 1
        f[:] = found.forces.cpu().double().numpy()[own]
        volume = abs(np.linalg.det(atoms.cell))
        virial = -volume * found.stress[0].cpu().double().numpy()
        lmp.fix_external_set_energy_global(self._fix, found.energy.item())
        lmp.fix_external_set_virial_global(self._fix, virial[_VOIGT].tolist())
        energies = np.ascontiguousarray(found.energies.cpu().numpy()[own])
        pointer = energies.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
        lmp.lib.lammps_fix_external_set_energy_peratom(lmp.lmp, self._fix.encode(), pointer)  # without a list of them

    def _atoms(self) -> Atoms:
        """All atoms, in the order of their IDs."""
        lmp = self._lmp
        types, pos = (np.array(lmp.gather_atoms(*what)) for what in (("type", 0, 1), ("x", 1, 3)))
        low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
        pbc = np.array(periodic, dtype=bool)
        sizes = np.where(pbc, np.subtract(high, low), 1.0)  # a shrink-wrapped box would change at every step
        cell = np.diag(sizes)
        cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
        return Atoms(self._numbers[types], pos.reshape(-1, 3), cell, pbc)

    def _stop(self, message: str) -> None:
        """End the run, with an error that the command which runs it raises.

        LAMMPS has no function that fails a run from a callback. But a library call that fails leaves its message for
        the command behind it, and the message of this one holds the text that is no variable."""
        lmp = self._lmp
        lmp.lib.lammps_free(lmp.lib.lammps_expand(lmp.lmp, f"${{{message.replace('}', ')')}}}".encode()))
        lmp.lib.lammps_force_timeout(lmp.lmp)
