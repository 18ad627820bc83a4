"""Structures have memory of their own, and labels that are NaN or infinite are named before anything is fitted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk

from implicit_steer.graph.structures import Structures
from implicit_steer.potentials import Potential
from implicit_steer.potentials.ase import from_atoms
from implicit_steer.potentials.data import StructureSet

CUTOFF = 4.0


def test_atoms_that_change_later_do_not_change_the_structures():
    """The numbers were the same memory."""
    atoms = bulk("Cu", cubic=True)
    structures = from_atoms(atoms, CUTOFF)
    before = structures.copied()
    atoms.numbers[:] = 79
    atoms.positions[:] = 1.0
    atoms.cell[:] = 1.0
    atoms.pbc[:] = False
    for name in ("numbers", "pos", "cell", "shift", "edge_index"):
        assert torch.equal(getattr(structures, name), getattr(before, name))


def test_tensors_that_change_later_do_not_change_the_structures():
    numbers, pos, cell = torch.tensor([29, 29]), torch.rand(2, 3), 4 * torch.eye(3)
    structures = Structures.single(numbers, pos, CUTOFF, cell)
    before = structures.copied()
    for tensor in (numbers, pos, cell):
        tensor.zero_()
    assert torch.equal(structures.numbers, before.numbers)
    assert torch.equal(structures.pos, before.pos)
    assert torch.equal(structures.cell, before.cell)


def labelled(seed):
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[: seed % 3] = 79
    atoms.rattle(0.1, seed=seed)
    forces = torch.tensor(np.random.default_rng(seed).standard_normal((4, 3)))
    return replace(from_atoms(atoms, CUTOFF), energy=torch.tensor([-4.0 - seed]).double(), forces=forces)


def spoilt(name, value):
    """Six structures, one label of numbers 2 and 4 not finite."""
    parts = [labelled(seed) for seed in range(6)]
    for number in (2, 4):
        labels = getattr(parts[number], name).clone()
        labels[-1] = value
        parts[number] = replace(parts[number], **{name: labels})
    return parts


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["energy", "forces"])
def test_a_fit_names_the_structures(name, value):
    """Their NaN went into every shift, and a scale of 1 was kept; nothing is changed now."""
    potential = Potential([29, 79], CUTOFF, channels=1, blocks=1)
    before = {key: tensor.clone() for key, tensor in potential.state_dict().items()}
    message = rf"structures: expected finite {name}, got NaN or Inf in 2 of 6: indices \[2, 4\]\."
    with pytest.raises(ValueError, match=message):
        potential.fit(Structures.join(spoilt(name, value)))
    assert all(torch.equal(tensor, before[key]) for key, tensor in potential.state_dict().items())
    potential.fit(Structures.join([labelled(seed) for seed in range(6)]))
    assert potential.shift.isfinite().all()


@pytest.mark.parametrize("name", ["energy", "forces"])
def test_a_data_set_names_the_structure(name):
    """Training on it would end in weights of NaN."""
    message = rf"structures\[2\]: expected finite {name}, got NaN or Inf in 1 of 1"
    with pytest.raises(ValueError, match=message):
        StructureSet(spoilt(name, np.nan))
    assert len(StructureSet([labelled(0), from_atoms(bulk("Cu"), CUTOFF)])) == 2
