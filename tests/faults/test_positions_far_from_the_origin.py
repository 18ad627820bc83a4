"""Forces of a float32 potential have the digits of float32 wherever the atoms are, and in whichever cell."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from implicit_steer.graph.structures import Structures
from implicit_steer.potentials import Potential
from implicit_steer.potentials.ase import Calculator, from_atoms

CUTOFF = 4.0
# Of the largest force: float32 through the network, 1e-6; positions in float64 have 1e-9 Å at 10⁷ Å.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def potentials():
    """float32 and float64."""
    torch.manual_seed(0)
    single = Potential([1, 6, 8, 29], CUTOFF, channels=4, blocks=1)
    single.scale.fill_(100.0)
    single.degree.fill_(0.5)
    double = Potential(**single.options).double()
    double.load_state_dict(single.state_dict())
    return single, double


def start(kind):
    atoms = molecule("CH3CH2OH") if kind == "molecule" else bulk("Cu", cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.1, seed=0)
    if kind == "slab":
        atoms.pbc = True, True, False
    return atoms


def moved(kind, far):
    """All atoms together; in crystals each by another number of cells too, as in dynamics without wrapping."""
    atoms, rng = start(kind), np.random.default_rng(0)
    atoms.positions += far * np.array([1.0, -0.7, 0.3])
    if kind != "molecule":
        cells = rng.integers(-1, 2, (len(atoms), 3)) * np.floor(far / atoms.cell.lengths()) * atoms.pbc
        atoms.positions += cells @ atoms.cell.array
    return atoms


def calculated(potential, atoms):
    atoms = atoms.copy()
    atoms.calc = Calculator(potential)
    atoms.get_forces()
    atoms.positions[0] += 0.01  # within the skin
    return torch.tensor(atoms.get_forces())


def predicted(structures):
    """Forces of atoms of which the first is moved like the calculator's."""

    def run(potential, atoms):
        atoms = atoms.copy()
        atoms.positions[0] += 0.01
        found = potential.predict(structures(atoms, next(potential.parameters()).dtype), stress=atoms.cell.rank == 3)
        stress = found.forces[:0] if found.stress is None else found.stress[0]
        return torch.cat([found.forces, stress]).double()

    return run


def tensors(atoms, dtype):
    """Structures of float64 tensors."""
    numbers, pos, cell = (torch.tensor(array) for array in (atoms.numbers, atoms.positions, atoms.cell.array))
    return Structures.single(numbers, pos, CUTOFF, cell, atoms.pbc).to(dtype)


WAYS = {
    "calculator": calculated,
    "dtype of from_atoms": predicted(lambda atoms, dtype: from_atoms(atoms, CUTOFF, dtype)),
    "to": predicted(lambda atoms, dtype: from_atoms(atoms, CUTOFF).to(dtype)),
    "joined": predicted(lambda atoms, dtype: Structures.join([from_atoms(atoms, CUTOFF)]).to(dtype)),
    "tensors": predicted(tensors),
    "float64 structures": predicted(lambda atoms, dtype: from_atoms(atoms, CUTOFF)),
    "float32 vectors": predicted(lambda atoms, dtype: from_atoms(atoms, CUTOFF, torch.float32)),
}


@pytest.mark.parametrize("far", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("kind", ["molecule", "crystal", "slab"])
@pytest.mark.parametrize("way", WAYS)
def test_forces_are_those_near_the_origin(potentials, way, kind, far):
    expected = WAYS[way](potentials[1], start(kind))
    scale = expected.abs().max()
    assert scale > 0.1
    for potential in potentials:
        found = WAYS[way](potential, moved(kind, far))
        assert (found - expected).abs().max() < ROUNDING * scale


def test_fragments_far_from_each_other(potentials):
    """No origin is near all atoms of one structure."""
    atoms = start("molecule")
    expected = potentials[1].predict(from_atoms(atoms, CUTOFF)).forces
    other = atoms.copy()
    other.positions += 1e6
    together = other + atoms
    together.calc = Calculator(potentials[0])
    for forces in (
        torch.tensor(together.get_forces()),
        potentials[0].predict(from_atoms(together, CUTOFF, torch.float32)).forces,
    ):
        for fragment in forces.split(len(atoms)):
            assert (fragment - expected).abs().max() < ROUNDING * expected.abs().max()


def test_positions_keep_their_digits():
    """Rounding is of the vectors between atoms; a wider dtype is taken."""
    atoms = moved("crystal", 1e7)
    single, double = from_atoms(atoms, CUTOFF, torch.float32), from_atoms(atoms, CUTOFF)
    assert single.edge_delta().dtype == single.shift.dtype == torch.float32
    assert torch.equal(single.pos, double.pos)
    assert torch.equal(single.edge_delta(), double.edge_delta().float())
    assert torch.equal(single.edge_delta(torch.float64), double.edge_delta())
    assert double.edge_delta().norm(dim=1).max() < CUTOFF + 1e-6
    given = Structures.single(torch.ones(2).long(), torch.zeros(2, 3), 1.0)
    assert given.pos.dtype == torch.float32
    assert given.to(torch.float64).pos.dtype == given.to(torch.float64).edge_delta().dtype == torch.float64


def test_gradients_reach_wider_positions(potentials):
    """Of the energy, and of the forces, in a float32 potential."""
    structures = from_atoms(start("crystal"), CUTOFF, torch.float32)
    structures.pos.requires_grad_()
    structures.cell.requires_grad_()
    predicted = potentials[0].predict(structures, create_graph=True)
    assert predicted.forces.dtype == torch.float32
    by_pos, by_cell = torch.autograd.grad(potentials[0](structures).sum(), (structures.pos, structures.cell))
    torch.testing.assert_close(by_pos.float(), -predicted.forces, rtol=0, atol=1e-5 * by_pos.abs().max().item())
    assert by_cell.dtype == torch.float64
    assert torch.autograd.grad(predicted.forces.square().sum(), structures.pos)[0].abs().max() > 0


def test_a_shift_of_integers_is_named():
    structures = from_atoms(start("crystal"), CUTOFF)
    with pytest.raises(TypeError, match=r"shift: expected floating point, got torch.int64"):
        replace(structures, shift=structures.shift.long())
