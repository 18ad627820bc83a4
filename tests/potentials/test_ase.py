"""The ASE calculator against direct calls, and dynamics at constant energy."""

import csv
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.filters import UnitCellFilter
from ase.optimize import BFGS
from ase.stress import voigt_6_to_full_3x3_stress

from implicit_steer.__main__ import main
from implicit_steer.potentials import Potential, Structures
from implicit_steer.potentials.ase import Calculator, from_atoms
from implicit_steer.potentials.md import MDOptions, run_md, run_nve, start_structure

CUTOFF = 4.0


@pytest.fixture(scope="module")
def potential():
    """A float64 potential of H, C, O, Cu with forces of some eV/Å."""
    torch.manual_seed(0)
    potential = Potential([1, 6, 8, 29], CUTOFF, channels=8).double()
    potential.scale.fill_(100.0)
    potential.degree.fill_(0.5)
    return potential


def copper(repeat=2):
    """Rattled copper in a periodic box."""
    atoms = bulk("Cu", cubic=True).repeat(repeat)
    atoms.rattle(0.1, seed=0)
    return atoms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calculator_is_the_potential(potential, dtype):
    atoms = copper()
    atoms.calc = Calculator(potential.to(dtype))
    expected = potential.predict(from_atoms(atoms, CUTOFF, dtype), stress=True)
    potential.double()
    found = {name: atoms.calc.get_property(name, atoms) for name in Calculator.implemented_properties}
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]  # edges beyond the cutoff change the order of sums
    scale = expected.forces.abs().max().item()
    assert found["energy"] == found["free_energy"] == pytest.approx(expected.energy.item(), rel=tolerance)
    np.testing.assert_allclose(found["energies"], expected.energies.double(), rtol=tolerance)
    np.testing.assert_allclose(found["forces"], expected.forces.double(), rtol=0, atol=tolerance * scale)
    stress = voigt_6_to_full_3x3_stress(found["stress"])
    np.testing.assert_allclose(stress, expected.stress[0].double(), rtol=0, atol=tolerance)
    assert found["forces"].dtype == np.float64


def test_the_potential_is_copied(potential):
    atoms = copper(1)
    atoms.calc = Calculator(potential)
    assert all(parameter.requires_grad for parameter in potential.parameters())
    before = atoms.get_forces()
    with torch.no_grad():
        potential.embedding.weight.mul_(2)
        atoms.calc.reset()
        again = atoms.get_forces()
        potential.embedding.weight.div_(2)
    np.testing.assert_array_equal(again, before)


def test_neighbours_are_kept_within_the_skin(potential, monkeypatch):
    searches = []
    single = Structures.single
    monkeypatch.setattr(Structures, "single", lambda *args: searches.append(1) or single(*args))
    atoms, fresh = copper(), copper()
    atoms.calc, fresh.calc = Calculator(potential, skin=0.4), Calculator(potential, skin=0.0)
    rng = np.random.default_rng(0)
    for _ in range(8):
        move = 0.04 * rng.standard_normal(atoms.positions.shape)
        atoms.positions += move
        fresh.positions += move
        scale = np.abs(fresh.get_forces()).max()
        np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(), rtol=0, atol=1e-12 * scale)
    assert 8 < len(searches) < 16
    changes = [
        lambda: atoms.set_cell(1.01 * atoms.cell.array),
        lambda: atoms.set_pbc([True, True, False]),
        lambda: atoms.set_atomic_numbers([8] + 31 * [29]),
        lambda: atoms.pop(),
        lambda: None,
    ]
    for change, more in zip(changes, (1, 1, 1, 1, 0), strict=True):
        before = len(searches)
        change()
        atoms.get_potential_energy()
        assert len(searches) == before + more


def test_relaxation_of_a_cell(potential):
    atoms = copper(1)
    atoms.calc = Calculator(potential)
    start = atoms.get_potential_energy()
    BFGS(UnitCellFilter(atoms), logfile=None).run(steps=5)
    assert atoms.get_potential_energy() < start


def test_molecules_have_no_stress(potential):
    atoms = molecule("CH3OH")
    atoms.calc = Calculator(potential)
    assert atoms.get_forces().shape == (6, 3)
    with pytest.raises(ValueError, match="stress: expected three lattice vectors"):
        atoms.get_stress()


@pytest.mark.parametrize(
    "atoms",
    [
        Atoms(),
        Atoms("Cu"),
        Atoms("Cu", cell=[1.8, 1.8, 1.8], pbc=True),
        Atoms("Cu", cell=[[0, 2.0, 0], [2.0, 0, 0], [0, 0, 2.0]], pbc=True),
        Atoms("CuO", [[0, 0, 0], [0, 0, 1.9]], cell=[2.5, 2.5, 0], pbc=[True, True, False]),
        Atoms("Cu2"),
    ],
    ids=["none", "one", "cell smaller than the cutoff", "left-handed cell", "slab", "in one place"],
)
def test_unusual_structures(potential, atoms):
    atoms.calc = Calculator(potential)
    forces = atoms.get_forces()
    assert np.isfinite(atoms.get_potential_energy())
    assert np.abs(forces.sum(0)).max(initial=0) < 1e-12
    if atoms.cell.rank == 3:
        supercell = atoms.repeat(2)
        supercell.calc = Calculator(potential)
        assert supercell.get_potential_energy() == pytest.approx(8 * atoms.get_potential_energy(), rel=1e-11)
        np.testing.assert_allclose(supercell.get_stress(), atoms.get_stress(), rtol=1e-9, atol=1e-13)


def test_messages(potential, monkeypatch):
    for skin in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"skin: expected a length >= 0 in Å, got {skin}"):
            Calculator(potential, skin=skin)
    with pytest.raises(TypeError, match="skin: expected a number, got '1'"):
        Calculator(potential, skin="1")
    with pytest.raises(TypeError, match="potential: expected a Potential, got Linear"):
        Calculator(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"kwargs: expected ASE's options .* got {'charge': 1}"):
        Calculator(potential, charge=1)
    atoms = molecule("NH3")
    atoms.calc = Calculator(potential)
    with pytest.raises(ValueError, match=r"numbers: expected atomic numbers among \[1, 6, 8, 29\], got \[7\]"):
        atoms.get_potential_energy()
    monkeypatch.delitem(sys.modules, "implicit_steer.potentials.ase")
    monkeypatch.setitem(sys.modules, "ase", None)
    monkeypatch.setitem(sys.modules, "ase.calculators.calculator", None)
    with pytest.raises(RuntimeError, match=r"pip install implicit_steer\[ase\]"):
        import implicit_steer.potentials.ase  # noqa: F401


# ---- dynamics


@pytest.mark.parametrize("table", [False, True], ids=["mlp", "table"])
def test_energy_is_conserved(potential, table):
    if table:
        potential = potential.freeze_table()
    runs = []
    for dt in (1.0, 0.5):
        atoms = copper()
        atoms.calc = Calculator(potential)
        BFGS(atoms, logfile=None).run(steps=5)
        options = MDOptions("", steps=int(300 / dt), dt=dt, temperature=300.0, progress=False)
        runs.append(run_nve(atoms, options))
        assert runs[-1].energies.shape == (int(300 / dt) + 1, 4)
        assert np.ptp(runs[-1].energies[:, 1]) / 32 > 1e-3  # it moves
    coarse, fine = (run.energies[:, 3] for run in runs)
    # eV/atom/ps. Measured: 2e-8.
    assert abs(runs[1].drift()) < 1e-5
    # Velocity Verlet: the ripple is of second order in the step.
    ratio = np.abs(coarse - coarse[0]).max() / np.abs(fine - fine[0]).max()
    # Measured: 4.0007.
    assert ratio == pytest.approx(4, abs=0.2)


def test_command_line(potential, tmp_path, capsys):
    potential.save(tmp_path / "potential.pt")
    copper().write(tmp_path / "start.xyz")
    arguments = f"md {tmp_path}/potential.pt --structure {tmp_path}/start.xyz --steps 20 --out {tmp_path}/md"
    main([*arguments.split(), "--num-threads", "2"])
    captured = capsys.readouterr()
    assert "32 atoms, 20 steps of 0.5 fs (0.01 ps): total energy drifts by" in captured.out
    assert "20/20" in captured.err
    with (tmp_path / "md" / "energies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21
    assert float(rows[-1]["time_ps"]) == pytest.approx(0.01)
    assert (tmp_path / "md" / "energies.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "md" / "final.xyz").exists()
    again = run_md(
        MDOptions(f"{tmp_path}/potential.pt", f"{tmp_path}/start.xyz", 20, out=f"{tmp_path}/b", progress=False)
    )
    assert [float(row["total_eV"]) for row in rows] == again.energies[:, 3].tolist()


def test_start_structures():
    metal = Potential([29, 79], CUTOFF, channels=1)
    assert set(start_structure(metal, None).numbers) == {29, 79}
    assert len(start_structure(metal, "metals")) == 32
    with pytest.raises(ValueError, match=r"structure: expected a file, got None. No system has the potential's"):
        start_structure(Potential([1], CUTOFF, channels=1), None)
    with pytest.raises(ValueError, match=r"structure: expected one of \['metals', 'molecules'\] or a file, got 'x'"):
        start_structure(metal, "x")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", 1, "steps: expected at least 2, got 1"),
        ("dt", 0.0, "dt: expected a positive time in fs, got 0.0"),
        ("temperature", -1.0, "temperature: expected at least 0 K"),
        ("num_threads", 0, "num_threads: expected at least 1"),
    ],
)
def test_wrong_option(option, value, message):
    with pytest.raises(ValueError, match=message):
        MDOptions("x", **{option: value})
