"""Energies of free atoms of 10⁴ eV do not cost the digits of the interactions, whatever the potential's dtype."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk

import implicit_steer as ist
from implicit_steer.graph.structures import Structures
from implicit_steer.potentials import Potential, load_potential
from implicit_steer.potentials.ase import Calculator, from_atoms
from implicit_steer.potentials.md import Trajectory
from implicit_steer.potentials.regressor import ForceRegressor

CUTOFF, SHIFT = 4.0, -44_600.0


def make(dtype=torch.float32):
    """A potential of copper with interactions of some eV under the energy of the free atom."""
    torch.manual_seed(0)
    potential = Potential([29], CUTOFF, channels=4, blocks=1)
    potential.scale.fill_(10.0)
    potential.shift.fill_(SHIFT)
    return potential.to(dtype)


def crystals():
    """108 atoms, the cell between 2 % smaller and larger."""
    atoms = bulk("Cu", cubic=True).repeat(3)
    found = []
    for factor in np.linspace(0.98, 1.02, 9):
        found.append(atoms.copy())
        found[-1].set_cell(factor * atoms.cell.array, scale_atoms=True)
    return found


@pytest.fixture(scope="module")
def exact():
    """E(V) − E(V₀) in float64, without the free atoms."""
    potential = make(torch.float64)
    potential.shift.zero_()
    energy = torch.cat([potential(from_atoms(atoms, CUTOFF)) for atoms in crystals()]).detach()
    assert (energy - energy[4]).abs().max() > 0.1
    return (energy - energy[4]).numpy()


def assert_right(energy, exact):
    # 10 eV per atom, of which float32 keeps 1e-6, for 108 atoms whose errors add up at worst.
    np.testing.assert_allclose(energy - energy[4], exact, rtol=0, atol=1e-4)


def through_predict(potential):
    return torch.cat([potential.predict(from_atoms(atoms, CUTOFF, torch.float32)).energy for atoms in crystals()])


WAYS = {
    "predict": through_predict,
    "forward": lambda p: torch.cat([p(from_atoms(atoms, CUTOFF, torch.float32)) for atoms in crystals()]).detach(),
    "batch": lambda p: (
        p.predict(Structures.join([from_atoms(atoms, CUTOFF, torch.float32) for atoms in crystals()])).energy
    ),
    "sums of atoms": lambda p: torch.stack(
        [p.predict(from_atoms(atoms, CUTOFF, torch.float32)).energies.sum() for atoms in crystals()]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_differences_of_energies(way, exact):
    energy = WAYS[way](make())
    assert energy.dtype == torch.float64
    assert_right(energy.numpy(), exact)


@pytest.mark.parametrize("name", ["energy", "energies"])
def test_differences_of_the_calculators_energies(name, exact):
    calculator, found = Calculator(make()), []
    for atoms in crystals():
        atoms.calc = calculator
        found.append(np.sum(calculator.get_property(name, atoms)))
    assert_right(np.array(found), exact)


def as_before(potential):
    """As a file of an earlier version has it."""
    potential._buffers["shift"] = potential.shift.float()
    return potential


@pytest.mark.parametrize(
    "convert",
    [
        lambda p: p.double().float(),
        lambda p: p.half().float(),
        lambda p: p.to(torch.float32),
        lambda p: p.to("cpu", torch.float32),
        copy.deepcopy,
        lambda p: as_before(p).float(),
    ],
    ids=["float", "half", "to dtype", "to device and dtype", "copy", "of old"],
)
def test_the_shift_stays_float64(convert):
    potential = make()
    potential.shift.fill_(SHIFT + 1e-6)
    old = convert(potential)
    assert old.shift.dtype == torch.float64
    assert old.embedding.weight.dtype == old.scale.dtype == torch.float32
    torch.testing.assert_close(old.shift, potential.shift.double(), rtol=0, atol=0)


@pytest.mark.parametrize("before", [False, True], ids=["of now", "of old"])
@pytest.mark.parametrize("form", ["deployed", "saved", "state", "assigned"])
def test_files_keep_or_widen_it(form, before, tmp_path, exact):
    """Also files whose shift is float32, which earlier versions wrote."""
    potential = as_before(make()) if before else make()
    if form == "deployed":
        ist.save(potential, tmp_path / "potential.safetensors")
        loaded = ist.load(tmp_path / "potential.safetensors")
    elif form == "saved":
        potential.save(tmp_path / "potential.pt")
        loaded = load_potential(tmp_path / "potential.pt")
        assert loaded.shift.dtype == torch.float64
    else:
        loaded = Potential(**potential.options)
        loaded.load_state_dict(potential.state_dict(), assign=form == "assigned")
    assert loaded.embedding.weight.dtype == torch.float32
    assert_right(through_predict(loaded).numpy(), exact)


def labelled(energies):
    """The crystals with these energies (9,) and forces of 1 eV/Å."""
    found = []
    for atoms, energy in zip(crystals(), energies, strict=True):
        single = from_atoms(atoms, CUTOFF, torch.float32)
        energy = torch.tensor([energy], dtype=torch.float64)
        found.append(replace(single, energy=energy, forces=torch.ones(len(atoms), 3)))
    return Structures.join(found)


def test_errors_in_training_are_those_of_the_interactions(exact):
    """The loss and its gradient: against the same potential and targets without the free atoms."""
    losses, gradients = [], []
    for shift in (SHIFT, 0.0):
        potential = make()
        potential.shift.fill_(shift)
        module = ForceRegressor(potential, scale=1.0, energy_weight=1.0, lr=1e-3, epochs=1, options={})
        # The first energy per atom: of the order of 1 eV
        batch = labelled(108 * shift + exact + 108.0)
        energy, _ = module.errors(batch, create_graph=True)
        losses.append(energy.item())
        gradients.append(torch.autograd.grad(energy, potential.head[2].weight)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * gradients[1].abs().max().item())


def test_a_fit_leaves_the_interactions(exact):
    """Least squares of energies of 5 · 10⁶ eV: what is left over is what was added."""
    potential = make()
    potential.fit(labelled(108 * SHIFT + exact))
    assert potential.shift.dtype == torch.float64
    assert potential.shift.item() == pytest.approx(SHIFT + exact.mean() / 108, abs=1e-9)


def test_drift_and_ripple_of_large_energies():
    """The fitted line through 5 · 10⁶ eV took digits from its slope."""
    time_ps = np.linspace(0, 10, 1001)
    change = 1e-8 * time_ps + 1e-7 * np.sin(1e3 * time_ps)
    found, expected = (
        Trajectory(np.stack([time_ps, change + e, 0 * change, change + e], 1), 1, 0.0) for e in (-5e6, 0.0)
    )
    # -5e6 itself is known to 1e-9.
    assert found.drift() == pytest.approx(expected.drift(), abs=3e-11)
    assert found.ripple() == pytest.approx(expected.ripple(), abs=1e-9)
