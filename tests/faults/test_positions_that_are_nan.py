"""Positions that are NaN or infinite never end in a finite energy with forces of 0."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk, molecule
from ase.md.verlet import VelocityVerlet

from implicit_steer.ops.kernel_mlp import safe_norm
from implicit_steer.potentials import Potential
from implicit_steer.potentials.ase import Calculator, from_atoms

CUTOFF = 4.0
REFUSED = "pos: expected finite positions, got NaN or Inf in 1 of"


@pytest.fixture(scope="module")
def potential():
    """A small one in float64."""
    torch.manual_seed(0)
    return Potential([1, 6, 8, 29], CUTOFF, channels=2, blocks=1).double()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("skin", [0.0, 0.3])
@pytest.mark.parametrize(
    "atoms", [molecule("CH3OH"), bulk("Cu", cubic=True), molecule("O")], ids=["molecule", "crystal", "one atom"]
)
def test_the_calculator_refuses_them_at_every_call(potential, atoms, skin, value):
    """The first call did; later ones gave a finite energy and forces of 0."""
    atoms = atoms.copy()
    atoms.calc = Calculator(potential, skin)
    atoms.get_forces()
    before = atoms.positions.copy()
    atoms.positions[0, 1] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSED):
            atoms.get_forces()
        with pytest.raises(ValueError, match=REFUSED):
            atoms.get_potential_energy()
    atoms.positions = before
    assert np.isfinite(atoms.get_potential_energy())


def test_a_cell_of_nan_is_refused_at_every_call(potential):
    atoms = bulk("Cu", cubic=True)
    atoms.calc = Calculator(potential)
    atoms.get_forces()
    atoms.cell[0, 0] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="cell: expected finite lattice vectors, got NaN or Inf"):
            atoms.get_forces()


def test_dynamics_with_nan_momenta_stop(potential):
    """They went on, at a constant energy."""
    atoms = molecule("CH3OH")
    atoms.calc = Calculator(potential)
    atoms.get_forces()
    atoms.set_momenta(np.full((len(atoms), 3), np.nan))
    with pytest.raises(ValueError, match="pos: expected finite positions"):
        VelocityVerlet(atoms, timestep=units.fs).run(3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("radial", [0, 4])
def test_predictions_are_nan(value, backend, radial):
    """Also where no edge within the cutoff is left; other structures of the batch are what they were."""
    torch.manual_seed(0)
    potential = Potential([1, 6, 8], CUTOFF, channels=2, blocks=1, radial=radial, backend=backend).double()
    good = from_atoms(molecule("CH3OH"), CUTOFF + 1)
    pos = good.pos.clone()
    pos[2, 0] = value
    bad = good.moved(pos)
    alone = from_atoms(molecule("O"), CUTOFF)
    batch = [bad, good, bad.within(CUTOFF), alone.moved(alone.pos * value + value)]
    batch = type(good).join([replace(part, cell=10 * torch.eye(3).double()[None]) for part in batch])
    found, expected = potential.predict(batch, stress=True), potential.predict(good)
    for energy in (found.energy, potential(batch)):
        assert energy.isnan().tolist() == [True, False, True, True]
        torch.testing.assert_close(energy[1], expected.energy[0], rtol=1e-12, atol=0)
    forces = [found.forces[batch.batch == n] for n in range(4)]
    assert all(forces[n].isnan().all(1).any() for n in (0, 2, 3))
    torch.testing.assert_close(forces[1], expected.forces, rtol=0, atol=1e-12)


def test_edges_of_nan_stay_within_any_radius():
    """They were left out, as if they were long."""
    good = from_atoms(molecule("CH3OH"), CUTOFF)
    pos = good.pos.clone()
    pos[2, 0] = np.nan
    kept = good.moved(pos).within(1e-3)
    assert kept.edge_index.shape[1] == (good.edge_index == 2).any(0).sum() > 0
    assert kept.edge_delta().isnan().any(1).all()


def test_the_length_of_nan_is_nan():
    """It was 0: the comparison that looks for short vectors let NaN pass."""
    vectors = torch.tensor([[np.nan, 0], [3, 4], [0, 0], [np.inf, 0]], requires_grad=True)
    lengths = safe_norm(vectors)
    torch.testing.assert_close(lengths.detach(), torch.tensor([np.nan, 5, 0, np.inf]), equal_nan=True, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(lengths[2], vectors)
    assert not gradient[1:3].any()
