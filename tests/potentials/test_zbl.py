"""The repulsion of nuclei: the published function, its end, its derivatives; atoms in one place are named."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import covalent_radii
from ase.io import write

from implicit_steer.graph.structures import Structures
from implicit_steer.layers import ZBL, PotentialNet
from implicit_steer.layers.zbl import _COVALENT_RADII
from implicit_steer.potentials import Potential
from implicit_steer.potentials.ase import Calculator
from implicit_steer.potentials.labels import FileData, Labels


def energy(r, cutoff=5.0):
    """v(r) of Cu and O."""
    zbl = ZBL((8, 29), cutoff)
    return zbl(torch.tensor([1]), torch.tensor([[0.0, r, 0.0]], dtype=torch.float64)).item()


def test_it_is_the_published_function():
    """By hand for Cu-O at 0.5 Å: a = 0.4685 / (8^0.23 + 29^0.23) = 0.12385 Å, r / a = 4.0371, φ = 0.078936,
    e² Z Z' / r = 6681.4 eV; R = 0.66 + 1.32 Å, and p(0.5 / 1.98) = 0.99554: 525.05 eV."""
    a = 0.46850 / (8**0.23 + 29**0.23)
    terms = [(0.18175, 3.1998), (0.50986, 0.94229), (0.28022, 0.4029), (0.02817, 0.20162)]
    phi = sum(share * np.exp(-decay * 0.5 / a) for share, decay in terms)
    u = 0.5 / 1.98
    expected = 14.399645 * 8 * 29 / 0.5 * phi * (1 - 28 * u**6 + 48 * u**7 - 21 * u**8)
    assert energy(0.5) == pytest.approx(expected, rel=1e-12)
    assert energy(0.5) == pytest.approx(6681.435 * 0.078936 * 0.99554, rel=1e-5)
    assert sum(share for share, _ in terms) == pytest.approx(1, abs=1e-12)
    assert 1e-5 * energy(1e-5) == pytest.approx(14.399645 * 8 * 29, rel=1e-3)  # bare nuclei


def test_radii_are_ases():
    np.testing.assert_array_equal(_COVALENT_RADII, covalent_radii[1:97])


@pytest.mark.parametrize(("cutoff", "end"), [(5.0, 0.66 + 1.32), (1.5, 1.5)])
def test_it_ends_smoothly(cutoff, end):
    """(1 − r / R)³ times a constant near the end R: value and two derivatives are continuous."""
    assert energy(end, cutoff) == energy(end + 0.1, cutoff) == 0
    near = [energy(end - gap, cutoff) for gap in (0.008, 0.004, 0.002)]
    assert near[0] / near[1] == pytest.approx(8, rel=0.1)
    assert near[1] / near[2] == pytest.approx(8, rel=0.1)


def test_gradgradcheck():
    delta = torch.tensor([[0.4, 0.2, 0.1], [1.0, 0.5, -0.5], [2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    zbl, pairs = ZBL((8, 29), 5.0), torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda x: zbl(pairs, x), delta)
    assert torch.autograd.gradgradcheck(lambda x: zbl(pairs, x), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_added_to_a_potential(dtype):
    """Once per pair of atoms, half to each; forces push them apart."""
    torch.manual_seed(0)
    plain = Potential([8, 29], 4.0, channels=4).to(dtype)
    torch.manual_seed(0)
    with_zbl = Potential([8, 29], 4.0, channels=4, zbl=True).to(dtype)
    pair = Structures.single(torch.tensor([29, 8]), torch.tensor([[0, 0, 0], [0, 0, 0.8]], dtype=dtype), 4.0)
    before, after = plain.predict(pair), with_zbl.predict(pair)
    v = energy(0.8)
    exact = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    np.testing.assert_allclose((after.energies - before.energies).numpy(), [v / 2] * 2, rtol=exact)
    slope = (energy(0.8001) - energy(0.7999)) / 0.0002
    np.testing.assert_allclose((after.forces - before.forces)[:, 2].numpy(), [slope, -slope], rtol=1e-4)


@pytest.mark.parametrize(
    ("species", "cutoff", "message"),
    [
        ((8, 97), 4.0, r"species: expected atomic numbers from 1 to 96, .* got \[97\]"),
        ((8, 8), 4.0, "species: expected different atomic numbers"),
        ((8,), 0.0, "cutoff: expected a distance > 0"),
    ],
)
def test_wrong_arguments(species, cutoff, message):
    with pytest.raises(ValueError, match=message):
        ZBL(species, cutoff)


def test_the_species_are_those_of_the_potential():
    parts = Potential([1, 8], 3.0, channels=2).arguments()
    with pytest.raises(ValueError, match=r"zbl: expected one of the species \(1, 8\), got ZBL"):
        PotentialNet(**parts | {"zbl": ZBL((8, 1), 3.0)})


# ---- atoms in one place


def test_a_repulsion_names_atoms_in_one_place():
    potential = Potential([1, 8], 3.0, channels=2, blocks=1, zbl=True).double()
    apart = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    same = apart.clone()
    same[2] = same[1]
    numbers = torch.tensor([8, 1, 1])
    batch = Structures.join([Structures.single(numbers, pos, 3.0) for pos in (apart, same)])
    with pytest.raises(ValueError, match=r"got 0 Å between atoms 1 and 2 of structure 1\. Remove one"):
        potential.predict(batch)
    with pytest.raises(ValueError, match="between atoms 1 and 2 of structure 1"):
        potential(batch)
    with pytest.raises(ValueError, match=r"got 0 Å between atoms 1 and 2\."):
        potential.predict(Structures.single(numbers, same, 3.0))
    close = same.clone()
    close[2, 0] += 1e-5
    found = potential.predict(Structures.single(numbers, close, 3.0).to(torch.float32))
    assert found.forces.isfinite().all()


def test_ases_atoms_in_one_place():
    """Across a periodic boundary, too."""
    atoms = Atoms("HOH", [[0, 0, 0], [1, 0.5, 0], [4, 0, 0]], cell=[4, 4, 4], pbc=True)
    atoms.calc = Calculator(Potential([1, 8], 3.0, channels=2, blocks=1, zbl=True))
    with pytest.raises(
        ValueError, match="structures: expected atoms apart from each other, got 0 Å between atoms 0 and 2"
    ):
        atoms.get_potential_energy()


def test_frames_with_atoms_in_one_place(tmp_path):
    frames = [Atoms("H3", [[0, 0, 0], [1, 0.5, 0], [x, 0, 0]]) for x in (3.0, 0.0, 2.0)]
    for atoms in frames:
        atoms.info["energy_of_it"], atoms.arrays["forces_of_it"] = -1.0, np.zeros((3, 3))
    write(tmp_path / "f.extxyz", frames)

    with pytest.raises(ValueError, match=r"frame 1 of .*f.extxyz: expected atoms apart .* between atoms 0 and 2"):
        FileData(str(tmp_path / "f.extxyz"), cutoff=4.0, labels=Labels("energy_of_it", "forces_of_it"), progress=False)
