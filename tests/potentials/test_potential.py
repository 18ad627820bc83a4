"""The potential: derivatives, symmetries, smoothness, structures, and files."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from escnn import gspaces

import implicit_steer as ist
from implicit_steer import Graph
from implicit_steer.graph.structures import Structures
from implicit_steer.irreps import ImplicitPointConv
from implicit_steer.layers import PotentialNet
from implicit_steer.potentials import Potential, load_potential

CUTOFF = 4.0
SPECIES = [1, 6, 8]
# Relative to the largest force, or to the energy of each atom. Measured: 3e-15 and 1e-13 (an atom of small energy).
ROUNDING = 1e-12


def make(max_frequency=1, degree=0.5, **options):
    """A float64 potential with forces of some eV/Å, as of real molecules."""
    torch.manual_seed(0)
    potential = Potential(SPECIES, CUTOFF, max_frequency=max_frequency, channels=8, **options).double()
    potential.scale.fill_(100.0)
    potential.degree.fill_(degree)
    potential.shift.copy_(torch.tensor([-1.0, -5.0, -9.0]))
    return potential


OPTIONS = {"depthwise": True, "correlation": 2, "zbl": True}


@pytest.fixture(scope="module", params=["l0", "l1", "l2", "l1-table", "l2-options", "l1-options-table"])
def potential(request):
    """Potentials with fields up to l = 0, 1 and 2, with every option, and with splines in place of the MLPs of their
    kernels."""
    # products of messages grow with the square of their sizes
    made = make(int(request.param[1]), **(OPTIONS | {"degree": 10} if "options" in request.param else {}))
    return made.freeze_table() if request.param.endswith("table") else made


def structure(atoms):
    """ASE's atoms as float64 structures."""
    cell = torch.tensor(atoms.cell.array) if atoms.cell.rank else None
    return Structures.single(
        torch.tensor(atoms.numbers), torch.tensor(atoms.positions), CUTOFF, cell, atoms.pbc if atoms.cell.rank else None
    )


@pytest.fixture(scope="module")
def ethanol():
    """Nine atoms off their equilibrium."""
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return structure(atoms)


@pytest.fixture(scope="module")
def crystal():
    """Four atoms of three species in a skewed box that is smaller than the cutoff: atoms see their own images."""
    atoms = bulk("C", "fcc", a=2.9, cubic=True)
    atoms.numbers[:2] = 1, 8
    atoms.set_cell([[3.1, 0.1, 0], [0, 2.8, 0.4], [0.3, 0, 2.9]], scale_atoms=True)
    atoms.rattle(0.1, seed=2)
    built = structure(atoms)
    assert (built.edge_index[0] == built.edge_index[1]).any()
    return built


@pytest.fixture(params=["ethanol", "crystal"])
def structures(request):
    """Each of the two."""
    return request.getfixturevalue(request.param)


def at(structures, pos):
    """The same edges, other positions."""
    return replace(structures, pos=pos)


# ---- derivatives


def test_forces_are_minus_the_gradient(potential, structures):
    forces = potential.predict(structures).forces
    assert 0.3 < forces.abs().max() < 100
    step, worst = 3e-4, 0.0
    with torch.no_grad():
        for _ in range(50):
            direction = torch.randn_like(structures.pos)
            direction /= direction.norm()
            e = [potential(at(structures, structures.pos + s * step * direction)).item() for s in (1, -1, 2, -2)]
            slope = (8 * (e[0] - e[1]) - (e[2] - e[3])) / (12 * step)
            worst = max(worst, abs(slope + (forces * direction).sum().item()))
    # Central differences of fourth order at this step: 3e-11 of the norm measured. At 1e-3 they see the jumps of the
    # splines' third derivatives, 3e-10.
    assert worst < 1e-10 * forces.norm()


def test_forces_are_autograds(potential, structures):
    pos = structures.pos.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(potential(at(structures, pos)).sum(), pos)
    for options in ({}, {"create_graph": True}, {"stress": True} if structures.cell.any() else {}):
        forces = potential.predict(structures, **options).forces
        torch.testing.assert_close(forces, -gradient, rtol=0, atol=ROUNDING * gradient.abs().max().item())


def hessian(potential, structures):
    """(3N, 3N) by differentiating the forces."""
    pos = structures.pos.clone().requires_grad_()
    forces = potential.predict(at(structures, pos), create_graph=True).forces
    return -torch.stack([torch.autograd.grad(f, pos, retain_graph=True)[0].flatten() for f in forces.flatten()])


def test_hessian(potential, structures):
    matrix = hessian(potential, structures)
    # 8e-16 of the largest entry measured.
    assert (matrix - matrix.t()).abs().max() < 1e-10 * min(1.0, matrix.abs().max())
    step, direction = 3e-5, torch.randn_like(structures.pos)
    ends = [potential.predict(at(structures, structures.pos + s * step * direction)).forces for s in (1, -1)]
    numeric = -(ends[0] - ends[1]).flatten() / (2 * step)
    # Central differences: 6e-8 measured.
    assert (matrix @ direction.flatten() - numeric).norm() < 1e-6 * numeric.norm()


def test_weights_learn_from_forces(potential, ethanol):
    names, parameters = zip(*potential.named_parameters(), strict=True)
    target = torch.randn_like(ethanol.pos)

    def loss(create_graph):
        return (potential.predict(ethanol, create_graph=create_graph).forces - target).square().sum()

    gradients = torch.autograd.grad(loss(True), parameters, materialize_grads=True)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        direction, step, values = torch.randn_like(parameter), 1e-5, []
        for change in (step, -2 * step, step):  # forth, back, home
            with torch.no_grad():
                parameter.add_(change * direction)
            values.append(loss(False).item())
        slope = (values[0] - values[1]) / (2 * step)
        # Central differences: 2e-8 of the slope measured.
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-6, abs=1e-5), name


def strained(structures, strain):
    """Positions and cell under x → (1 + ε) x."""
    deform = torch.eye(3, dtype=torch.float64) + strain
    return replace(structures, pos=structures.pos @ deform, cell=structures.cell @ deform)


def test_stress_is_the_derivative_by_strain(potential, crystal):
    stress = potential.predict(crystal, stress=True).stress[0]
    volume, step, scale = torch.linalg.det(crystal.cell[0]).abs().item(), 1e-5, stress.abs().max().item()
    assert torch.equal(stress, stress.t())
    with torch.no_grad():
        for i, j in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[i, j] += 0.5 * step
            strain[j, i] += 0.5 * step
            ends = [potential(strained(crystal, sign * strain)).item() for sign in (1, -1)]
            # Central differences: 5e-10 measured.
            assert (ends[0] - ends[1]) / (2 * step * volume) == pytest.approx(stress[i, j].item(), abs=1e-7 * scale)


def test_gradient_by_the_cell(potential, crystal):
    cell = crystal.cell.clone().requires_grad_()
    pos = crystal.pos.clone().requires_grad_()
    by_cell, by_pos = torch.autograd.grad(potential(replace(crystal, pos=pos, cell=cell)).sum(), (cell, pos))
    virial = crystal.cell[0].t() @ by_cell[0] + crystal.pos.t() @ by_pos
    expected = potential.predict(crystal, stress=True).stress[0] * torch.linalg.det(crystal.cell[0]).abs()
    torch.testing.assert_close((virial + virial.t()) / 2, expected, rtol=0, atol=1e-11)


# ---- symmetries


def test_no_net_force_and_no_net_torque(potential, structures):
    forces = potential.predict(structures).forces
    assert forces.sum(0).abs().max() < 1e-10
    if not structures.cell.any():
        assert torch.linalg.cross(structures.pos, forces).sum(0).abs().max() < 1e-10


def test_rotations_and_reflections(potential, structures):
    group = gspaces.flipRot3dOnR3().fibergroup
    base = potential.predict(structures, stress=structures.cell.any().item())
    determinants = set()
    for _ in range(10):
        q = torch.tensor(group.standard_representation()(group.sample()))
        determinants.add(round(torch.linalg.det(q).item()))
        moved = replace(structures, pos=structures.pos @ q.t() + torch.randn(3), cell=structures.cell @ q.t())
        found = potential.predict(moved, stress=base.stress is not None)
        torch.testing.assert_close(found.energies, base.energies, rtol=ROUNDING, atol=0)
        scale = base.forces.abs().max().item()
        torch.testing.assert_close(found.forces, base.forces @ q.t(), rtol=0, atol=ROUNDING * scale)
        if base.stress is not None:
            torch.testing.assert_close(found.stress, q @ base.stress @ q.t(), rtol=0, atol=ROUNDING)
    assert determinants == {1, -1}


def test_permutations(potential, structures):
    base = potential.predict(structures)
    order = torch.randperm(len(structures.pos))
    place = torch.argsort(order)
    moved = replace(
        structures,
        numbers=structures.numbers[order],
        pos=structures.pos[order],
        edge_index=place[structures.edge_index].flip(1),
        shift=structures.shift.flip(0),
    )
    found = potential.predict(moved)
    torch.testing.assert_close(found.energy, base.energy, rtol=ROUNDING, atol=0)
    scale = base.forces.abs().max().item()
    torch.testing.assert_close(found.forces, base.forces[order], rtol=0, atol=ROUNDING * scale)


def test_a_supercell_has_the_same_energies(potential):
    atoms = bulk("C", "fcc", a=2.9, cubic=True)
    atoms.numbers[:2] = 1, 8
    atoms.rattle(0.1, seed=2)
    small, large = (potential.predict(structure(a), stress=True) for a in (atoms, atoms.repeat((2, 1, 3))))
    torch.testing.assert_close(large.energies, small.energies.repeat(6), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(large.forces, small.forces.repeat(6, 1), rtol=0, atol=1e-11)
    torch.testing.assert_close(large.stress, small.stress, rtol=0, atol=1e-13)


# ---- smoothness


def test_energy_and_forces_are_continuous_at_the_cutoff(potential):
    pair = torch.tensor([[0.0, 0, 0], [0, 0, 0.9]], dtype=torch.float64)

    def third_atom(gap):
        """Of three atoms, the last one ``gap`` within the cutoff of the second."""
        pos = torch.cat([pair, torch.tensor([[0, 0, 0.9 + CUTOFF - gap]], dtype=torch.float64)])
        structures = Structures.single(torch.tensor([8, 1, 6]), pos, CUTOFF)
        assert structures.edge_index.shape[1] == (4 if gap > 0 else 2)
        return potential.predict(structures)

    outside, gaps = third_atom(-1e-9), (0.008, 0.004, 0.002)
    assert not outside.forces[2].any()
    inside = [third_atom(gap) for gap in gaps]
    energy = [(p.energy - outside.energy).abs().item() for p in inside]
    forces = [(p.forces - outside.forces).abs().max().item() for p in inside]
    # The envelope is 10 (gap / cutoff)³: value and two derivatives vanish at the cutoff.
    for k in (0, 1):
        assert energy[k] / energy[k + 1] == pytest.approx(8, rel=0.1)
        assert forces[k] / forces[k + 1] == pytest.approx(4, rel=0.1)
    just = third_atom(1e-6)
    # Measured: 7e-15 and 1e-13; 10 (gap / cutoff)³ = 2e-19.
    assert (just.energy - outside.energy).abs() < 1e-12 * outside.energy.abs()
    assert (just.forces - outside.forces).abs().max() < 1e-10


def test_edges_beyond_the_cutoff_do_not_count(potential, ethanol):
    pos = ethanol.pos
    longer = Structures.single(ethanol.numbers, pos, CUTOFF + 1)
    assert longer.edge_index.shape[1] > ethanol.edge_index.shape[1]
    # Measured: 0; only the order of sums differs.
    torch.testing.assert_close(potential.predict(longer).energy, potential.predict(ethanol).energy, rtol=1e-14, atol=0)
    back = longer.within(CUTOFF)
    assert torch.equal(back.edge_index, ethanol.edge_index)


# ---- structures


def test_structures_of_a_batch_do_not_meet(potential, ethanol, crystal):
    alone = [potential.predict(s) for s in (ethanol, crystal, ethanol)]
    together = potential.predict(Structures.join([ethanol, crystal, ethanol]))
    torch.testing.assert_close(together.energy, torch.cat([p.energy for p in alone]), rtol=1e-13, atol=0)
    torch.testing.assert_close(together.forces, torch.cat([p.forces for p in alone]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_atoms_without_neighbours(potential, n):
    pos = 100.0 * torch.arange(3 * n, dtype=torch.float64).view(n, 3)
    alone = Structures.single(torch.full((n,), 8), pos, CUTOFF)
    assert alone.edge_index.shape == (2, 0)
    predicted = potential.predict(alone)
    assert not predicted.forces.any()
    assert predicted.energy.isfinite().all()
    if n == 2:
        assert predicted.energies[0] == predicted.energies[1]


def test_float32_agrees(potential, ethanol):
    exact = potential.predict(ethanol)
    single = copy.deepcopy(potential).float().predict(ethanol.to(torch.float32))
    assert single.forces.dtype == torch.float32
    # Measured: 7e-7.
    assert (single.forces - exact.forces).norm() < 1e-5 * exact.forces.norm()


def test_fit():
    torch.manual_seed(3)
    parts, forces = [], []
    for _ in range(6):
        numbers = torch.tensor(SPECIES)[torch.randint(3, (5,))]
        single = Structures.single(numbers, torch.rand(5, 3, dtype=torch.float64) * 3, CUTOFF)
        energy = torch.where(numbers == 1, -1.0, torch.where(numbers == 6, -5.0, -9.0)).sum()[None]
        forces.append(numbers[:, None] * torch.ones(5, 3, dtype=torch.float64))
        parts.append(replace(single, energy=energy.double(), forces=forces[-1]))
    potential, joined = make(), Structures.join(parts)
    potential.fit(joined)
    torch.testing.assert_close(potential.shift, torch.tensor([-1.0, -5, -9]).double())
    torch.testing.assert_close(potential.scale, torch.tensor([1.0, 6, 8]).double())
    assert potential.degree == pytest.approx(joined.edge_index.shape[1] / 30)


# ---- files and messages


def test_convolutions_that_are_given_their_cosines(ethanol):
    """As in files of earlier versions, where the cosines come first among the attributes."""
    potential = make()
    convolutions = torch.nn.ModuleList()
    for conv in potential.convolutions:
        arguments = conv.arguments()
        n_attributes = arguments.pop("radial").size + arguments.pop("edge_attr")
        convolutions.append(ImplicitPointConv(**arguments, edge_attr=n_attributes))
    net = PotentialNet(**potential.arguments() | {"convolutions": convolutions}).double()
    net.load_state_dict(potential.state_dict())
    for ours, theirs in zip(net.predict(ethanol)[:3], potential.predict(ethanol)[:3], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("max_frequency", [0, 1, 2])
def test_saved_and_loaded(max_frequency, ethanol, tmp_path):
    potential = make(max_frequency)
    potential.save(tmp_path / "potential.pt")
    again = load_potential(tmp_path / "potential.pt")
    assert not again.training
    assert torch.equal(again.predict(ethanol).forces, potential.predict(ethanol).forces)
    before = torch.load(tmp_path / "potential.pt", weights_only=True)  # as earlier versions wrote it
    torch.save(before | {"options": {k: v for k, v in before["options"].items() if k not in OPTIONS}}, tmp_path / "old")
    assert torch.equal(load_potential(tmp_path / "old").predict(ethanol).forces, potential.predict(ethanol).forces)
    (tmp_path / "short.pt").write_bytes((tmp_path / "potential.pt").read_bytes()[:3000])
    torch.save({"other": 1}, tmp_path / "other.pt")
    for name in ("short.pt", "other.pt", "absent.pt"):
        with pytest.raises(ValueError, match=rf"{name}: expected a file written by Potential.save"):
            load_potential(tmp_path / name)


def test_options_are_saved(ethanol, tmp_path):
    """In both kinds of files, also with splines; files without them hold nothing that earlier versions do not know."""
    potential = make(**OPTIONS)
    potential.save(tmp_path / "potential.pt")
    ist.save(potential, tmp_path / "potential.safetensors")
    ist.save(potential, tmp_path / "table.safetensors", table=True)
    expected = potential.predict(ethanol).forces
    for loaded in (load_potential(tmp_path / "potential.pt"), ist.load(tmp_path / "potential.safetensors")):
        assert torch.equal(loaded.predict(ethanol).forces, expected)
    frozen = ist.load(tmp_path / "table.safetensors")
    assert frozen.zbl is not None
    torch.testing.assert_close(frozen.predict(ethanol).forces, potential.freeze_table().predict(ethanol).forces)
    ist.save(make(), tmp_path / "plain.safetensors")
    for name, knows in (("plain", False), ("potential", True)):
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        assert [word in content for word in (b"products", b"zbl", b"ZBL", b"TensorSquare")] == [knows] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_channels(ethanol, dtype):
    """128, in both forms of the kernels: it builds, predicts and has gradients; depthwise has a fraction of the
    weights."""
    sizes = []
    for depthwise in (False, True):
        potential = Potential(SPECIES, CUTOFF, channels=128, depthwise=depthwise, correlation=2).to(dtype)
        found = potential.predict(ethanol.to(dtype), create_graph=True)
        found.forces.square().sum().backward()
        assert found.forces.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in potential.parameters())
        sizes.append(sum(p.numel() for p in potential.parameters()))
    assert sizes[1] < sizes[0] / 2  # 0.5 and 1.3 million


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"species": []}, TypeError, "species: expected different atomic numbers from 1 to 118"),
        ({"species": [1, 1]}, ValueError, "species: expected different"),
        ({"species": [0]}, ValueError, "species: expected different"),
        ({"species": ["H"]}, ValueError, "species: expected different"),
        ({"cutoff": 0}, ValueError, "cutoff: expected a positive radius in Å, got 0"),
        ({"cutoff": float("inf")}, ValueError, "cutoff: expected a positive radius"),
        ({"activation": "elu"}, ValueError, "activation: expected one of .* smooth, got 'elu'"),
        ({"blocks": 0}, ValueError, "blocks: expected an integer >= 1, got 0"),
        ({"max_frequency": -1}, ValueError, "max_frequency: expected an integer >= 0"),
        ({"channels": 2.5}, ValueError, "channels: expected an integer >= 1"),
        ({"radial": -1}, ValueError, "radial: expected an integer >= 0"),
        ({"radial_basis": "sine"}, ValueError, r"radial_basis: expected one of \('cosine', 'bessel'\), got"),
        ({"backend": "x"}, ValueError, "backend: expected one of"),
        ({"depthwise": 1}, TypeError, "depthwise: expected True or False"),
        ({"correlation": 3}, ValueError, "correlation: expected 1 or 2, got 3"),
        ({"zbl": 1}, TypeError, "zbl: expected True or False"),
        ({"species": [97], "zbl": True}, ValueError, r"species: expected atomic numbers from 1 to 96, .* got \[97\]"),
    ],
)
def test_wrong_options(options, kind, message):
    with pytest.raises(kind, match=message):
        Potential(**{"species": [1], "cutoff": 3.0, **options})


def test_wrong_structures(ethanol):
    potential, pos = make(), ethanol.pos
    with pytest.raises(ValueError, match=r"numbers: expected atomic numbers among \[1, 6, 8\], got \[7, 200\]"):
        potential.predict(replace(ethanol, numbers=torch.tensor([7, 200] + 7 * [1])))
    with pytest.raises(ValueError, match="stress: expected cells with three lattice vectors"):
        potential.predict(ethanol, stress=True)
    with pytest.raises(TypeError, match="numbers: expected a tensor of integers"):
        Structures.single(ethanol.numbers.float(), pos, CUTOFF)
    with pytest.raises(ValueError, match=r"numbers: expected .*, got \(3,\)"):
        Structures.single(ethanol.numbers[:3], pos, CUTOFF)
    with pytest.raises(ValueError, match=r"pos: expected shape \(N, 3\), got \(9, 2\)"):
        Structures.single(ethanol.numbers, pos[:, :2], CUTOFF)
    with pytest.raises(ValueError, match=r"edge_index\[0\]: expected sources in 0 .. 8, got index 9"):
        potential.predict(replace(ethanol, edge_index=ethanol.edge_index + 1))
    wrong = {"numbers": ethanol.numbers[1:], "cell": torch.eye(3), "shift": ethanol.shift[1:], "batch": torch.zeros(2)}
    for name, tensor in {**wrong, "edge_index": ethanol.edge_index.t(), "forces": pos[1:], "energy": pos[0]}.items():
        with pytest.raises(ValueError, match=r"(shift|" + name + r"): expected shape \("):
            replace(ethanol, **{name: tensor})
    with pytest.raises(ValueError, match="parts: expected at least one structure"):
        Structures.join([])


def test_core_takes_plain_tensors(ethanol):
    potential = make()
    species = potential.species_of(ethanol.numbers)
    energies = potential.atomic_energies(species, Graph(ethanol.edge_index, 9), ethanol.edge_delta())
    assert torch.equal(energies.detach(), potential.predict(ethanol).energies)
    np.testing.assert_allclose(potential(ethanol).item(), energies.sum().item(), rtol=1e-14)


@pytest.mark.parametrize("inside", [False, True])
def test_predicts_in_inference_mode(ethanol, inside):
    """Of structures made outside and inside of it."""
    potential = make()
    expected = potential.predict(ethanol)
    with torch.inference_mode():
        found = potential.predict(ethanol.copied() if inside else ethanol)
    torch.testing.assert_close(found.energy, expected.energy, rtol=0, atol=0)
    torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=0)


def test_labels_are_joined_or_missing(ethanol):
    labelled = replace(ethanol, energy=torch.zeros(1).double(), forces=torch.zeros_like(ethanol.pos))
    joined = Structures.join([labelled, labelled])
    assert joined.energy.shape == (2,)
    assert Structures.join([ethanol, ethanol]).energy is None
    for parts in ([labelled, ethanol], [ethanol, labelled]):
        with pytest.raises(ValueError, match="parts: expected energy in all or in none, got 1 of 2"):
            Structures.join(parts)
    with pytest.raises(ValueError, match="structures: expected some with energy, got some without"):
        make().fit(ethanol)
