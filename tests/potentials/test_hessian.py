"""Second derivatives by the positions against a loop, central differences and ASE's vibrations."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.optimize import BFGS
from ase.vibrations import Vibrations, VibrationsData

from implicit_steer.potentials import Potential, Structures
from implicit_steer.potentials.ase import Calculator, from_atoms

CUTOFF = 4.0


@pytest.fixture(scope="module")
def potential():
    """A float64 potential with forces of some eV/Å."""
    torch.manual_seed(0)
    potential = Potential([1, 6, 8, 29], CUTOFF, channels=4, kernel_channels=4).double()
    potential.scale.fill_(100.0)
    potential.degree.fill_(2.0)
    return potential


def looped(potential, structures):
    """Row by row."""
    pos = structures.pos.clone().requires_grad_()
    forces = potential.predict(structures.moved(pos), create_graph=True).forces.flatten()
    rows = [torch.autograd.grad(force, pos, retain_graph=True)[0] for force in forces]
    return -torch.stack(rows).view(*pos.shape, *pos.shape)


@pytest.mark.parametrize("table", [False, True], ids=["mlp", "table"])
@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_the_rows_of_a_loop(potential, name, table):
    atoms = (
        molecule("CH3CH2OH") if name == "molecule" else bulk("Cu", cubic=True).repeat((3, 3, 1))
    )  # more than a chunk
    atoms.rattle(0.05, seed=0)
    if table:
        potential = potential.freeze_table(knots=64)
    structures = from_atoms(atoms, CUTOFF)
    found = potential.hessian(structures)
    expected = looped(potential, structures)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)
    flat = found.view(3 * len(atoms), -1)
    torch.testing.assert_close(flat, flat.T, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(found.sum(2), torch.zeros_like(found[:, :, 0]), rtol=0, atol=1e-11 * scale)
    assert all(p.requires_grad for p in potential.head.parameters())


def test_central_differences_and_frequencies(potential, tmp_path):
    """Of a relaxed molecule: ASE moves each atom by 0.005 Å."""
    atoms = molecule("H2O")
    atoms.calc = Calculator(potential)
    BFGS(atoms, logfile=None).run(fmax=1e-5, steps=300)
    found = VibrationsData(atoms, potential.hessian(from_atoms(atoms, CUTOFF)).numpy())
    by_ase = Vibrations(atoms, name=str(tmp_path / "vibrations"), delta=0.005, nfree=4)
    by_ase.run()
    expected = by_ase.get_vibrations()
    scale = np.abs(expected.get_hessian()).max()
    # Measured: the differences' own error, of fourth order in the displacement.
    np.testing.assert_allclose(found.get_hessian(), expected.get_hessian(), rtol=0, atol=1e-4 * scale)
    energies = [np.sort_complex(v.get_energies()) for v in (found, expected)]
    np.testing.assert_allclose(*energies, rtol=0, atol=1e-2 * np.abs(energies[1]).max())


def test_unusual_structures(potential):
    assert potential.hessian(from_atoms(Atoms("Cu"), CUTOFF)).abs().max() == 0
    assert potential.hessian(from_atoms(Atoms(), CUTOFF)).shape == (0, 3, 0, 3)
    single = from_atoms(molecule("H2O"), CUTOFF, torch.float32)
    with torch.no_grad():
        found = potential.float().hessian(single)
    exact = potential.double().hessian(single.to(torch.float64))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4 * exact.abs().max().item())
    with pytest.raises(ValueError, match="structures: expected one structure, got 2 of them"):
        potential.hessian(Structures.join([single, single]))
