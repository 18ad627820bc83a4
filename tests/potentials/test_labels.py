"""Users' files: names, units and shapes of labels; what is wrong with a frame; training on them."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from implicit_steer.__main__ import main
from implicit_steer.graph.structures import Structures
from implicit_steer.potentials import Potential, load_potential
from implicit_steer.potentials.labels import FileData, Labels, check_stress_sign, error_tables, labelled
from implicit_steer.potentials.regressor import ForceRegressor
from implicit_steer.potentials.train import ForcesOptions, train_forces

CUTOFF = 4.0
SMALL = {
    "epochs": 2,
    "batch_size": 2,
    "channels": 4,
    "cutoff": CUTOFF,
    "max_frequency": 0,
    "progress": False,
    "num_threads": 1,
}


def alloy(seed):
    """Eight atoms of Cu and Au, labelled by effective medium theory with stress."""
    random = np.random.default_rng(seed)
    atoms = bulk("Cu", "fcc", a=3.7, cubic=True).repeat((2, 1, 1))
    atoms.numbers[random.integers(0, 8, 3)] = 79
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + random.uniform(-0.03, 0.03, (3, 3))), scale_atoms=True)
    atoms.rattle(0.08, rng=random)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["config_type"] = "gold" if (atoms.numbers == 79).sum() > 2 else "copper"
    return atoms


@pytest.fixture(scope="module")
def frames():
    return [alloy(seed) for seed in range(8)]


@pytest.fixture
def file(frames, tmp_path):
    """Extended XYZ as ASE writes it."""
    write(tmp_path / "alloys.extxyz", frames)
    return str(tmp_path / "alloys.extxyz")


def plain(atoms, **labels):
    """Without a calculator; with these in info or, of one row per atom, in arrays."""
    made = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    for name, value in labels.items():
        (made.arrays if np.shape(value)[:1] == (len(atoms),) else made.info)[name] = value
    return made


# ---- labels


def test_names_shapes_and_signs(frames):
    atoms = frames[0]
    energy, forces, voigt = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    matrix = atoms.get_stress(voigt=False)
    virial = -atoms.get_volume() * matrix
    given = [
        (atoms, Labels()),
        (plain(atoms, REF_energy=energy, REF_forces=forces, REF_stress=voigt), Labels()),
        (plain(atoms, energy=0.0, dft_energy=energy, dft_forces=forces, dft_virial=virial), Labels()),
        (plain(atoms, free_energy=energy, force=forces, virials=virial.reshape(-1)), Labels()),
        (plain(atoms, e=energy, f=forces, s=matrix, stress=-matrix), Labels("e", "f", "s")),
        (plain(atoms, e=[energy], f=forces, v=virial), Labels("e", "f", virial="v")),
    ]
    for structure, labels in given:
        found = labels.of(structure)
        assert found.energy == energy
        np.testing.assert_array_equal(found.forces, forces)
        np.testing.assert_allclose(found.stress, matrix, rtol=1e-12)
    assert Labels().of(plain(atoms, energy=energy, forces=forces)).stress is None


@pytest.mark.parametrize(
    ("labels", "changed", "message"),
    [
        (Labels(), {"energy": None}, r"frame 3: energy: expected one of 'REF_energy', .* only \['forces', 'stress'\]"),
        (Labels(), {"forces": None}, "frame 3: forces: expected one of 'REF_forces'"),
        (Labels(energy="e"), {}, "frame 3: energy: expected 'e', got only .* energy_key"),
        (Labels(stress="s"), {}, "frame 3: stress: expected 's'"),
        (Labels(), {"energy": float("nan")}, "frame 3: energy: expected finite numbers, got NaN or Inf"),
        (Labels(), {"energy": "low"}, "frame 3: energy: expected numbers, got 'low'"),
        (Labels(), {"energy": [1.0, 2.0]}, "frame 3: energy: expected one number"),
        (Labels(), {"forces": np.zeros((8, 2))}, "frame 3: forces: expected shape"),
        (Labels(), {"stress": np.zeros(5)}, "frame 3: stress: expected 6 numbers, 9"),
        (Labels(), {"stress": np.arange(9.0).reshape(3, 3)}, "frame 3: stress: expected a symmetric matrix"),
    ],
)
def test_wrong_labels(frames, labels, changed, message):
    atoms = frames[0]
    there = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    there = {name: value for name, value in (there | changed).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        labels.of(plain(atoms, **there), "frame 3")


def test_a_virial_needs_a_cell():
    water = molecule("H2O")
    with pytest.raises(ValueError, match="three lattice vectors beside a virial"):
        Labels().of(plain(water, energy=0.0, forces=np.zeros((3, 3)), virial=np.eye(3)))


def test_sign_of_the_stress(frames):
    atoms = frames[0]
    check_stress_sign(atoms, Labels(), EMT())
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": -atoms.get_stress()}
    with pytest.raises(ValueError, match=r"got the other one\. Name it as a virial"):
        check_stress_sign(plain(atoms, **labels), Labels(), EMT())


# ---- files


def test_as_ase_writes_them(file, frames):
    data = FileData(file, cutoff=CUTOFF, progress=False)
    assert data.species == (29, 79)
    assert data.sizes == {"train": 7, "val": 1, "test": 1}
    every = Structures.join([*data.train.structures, *data.val.structures])
    energies = sorted(atoms.get_potential_energy() for atoms in frames)
    np.testing.assert_allclose(every.energy.sort().values, energies, rtol=1e-7)
    assert every.stress.isfinite().all()
    assert data.test_kinds == [frames[n].info["config_type"] for n in range(8) if n not in _kept(data, frames)]


def _kept(data, frames):
    """Which frames are trained on."""
    energies = [single.energy.item() for single in data.train.structures]
    return {n for n, a in enumerate(frames) if min(abs(a.get_potential_energy() - e) for e in energies) < 1e-6}


def test_written_by_hand(tmp_path):
    """CRLF, odd spacing, columns in another order, mixed periodicity, one atom, a stress in one frame alone."""
    lines = [
        "2",
        'Properties=forces:R:3:species:S:1:pos:R:3   energy=-3.5 Lattice="4 0 0  0 4 0  0 0 9" pbc="T T F" '
        'stress="0.1 0 0 0 0.1 0 0 0 0.1"',
        "  0.1 0.0  0.0  Cu   0 0 0",
        "-0.1 0.0 0.0    Cu  2.1 0 0.0",
        "1",
        'Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="F F F"',
        "Cu 0 0 0 0 0 0",
        "2",
        'Properties=species:S:1:pos:R:3:forces:R:3 energy=-3.4 pbc="F F F"',
        "Cu 0 0 0 0.1 0 0",
        "Cu 2.2 0 0 -0.1 0 0",
    ]
    path = tmp_path / "hand.extxyz"
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
    data = FileData(str(path), cutoff=CUTOFF, valid=str(path), progress=False)
    joined = Structures.join(data.train.structures)
    assert joined.energy.tolist() == [-3.5, -1.0, -3.4]
    assert joined.stress.isfinite().all(-1).all(-1).tolist() == [True, False, False]
    assert data.isolated == {29: -1.0}
    assert joined.forces[0].tolist() == pytest.approx([0.1, 0, 0])


def test_unknown_element_in_the_test_file(file, tmp_path):
    silver = alloy(0)
    silver.numbers[1] = 47
    write(tmp_path / "test.extxyz", [alloy(1), silver])
    with pytest.raises(
        ValueError, match=r"frame 1 of .*test.extxyz: expected atomic numbers among \[29, 79\], got \[47\]"
    ):
        FileData(file, cutoff=CUTOFF, test=str(tmp_path / "test.extxyz"), progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data: expected a file that ASE reads"),
        (b"not a structure\n", "a file that ASE reads, got"),
        (b"", "expected a"),
        (b"3\nProperties=species:S:1:pos:R:3\nCu 0 0 0\n", "a file that ASE reads, got"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "frames.extxyz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FileData(str(path), cutoff=CUTOFF, progress=False)


def test_the_frame_at_which_a_file_ends_is_named(frames, tmp_path):
    path = tmp_path / "cut.extxyz"
    write(path, frames[:3])
    content = path.read_text()
    path.write_text(content[: content.rindex("Lattice") + 20])
    with pytest.raises(ValueError, match=r"frame 2 of .*cut.extxyz: expected a file that ASE reads, got .* cut short"):
        FileData(str(path), cutoff=CUTOFF, progress=False)


def test_a_frame_without_labels_is_named(frames, tmp_path):
    write(tmp_path / "f.extxyz", [*frames[:2], plain(frames[2])])
    with pytest.raises(ValueError, match=r"frame 2 of .*f.extxyz: energy: expected"):
        FileData(str(tmp_path / "f.extxyz"), cutoff=CUTOFF, progress=False)


# ---- training


def test_training_with_stress(file, frames, tmp_path, capsys):
    write(tmp_path / "test.extxyz", frames[:3])
    given = ["--data", file, "--test", str(tmp_path / "test.extxyz"), "--stress-weight", "1", "--huber", "0.1"]
    numbers = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "progress"]
    main(["train", "forces", *given, *numbers, "--no-progress", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["configurations"] == {"train": 7, "val": 1, "test": 3}
    assert set(result["elements"]) == {"Cu", "Au"}
    assert sum(kind["frames"] for kind in result["config_types"].values()) == 3
    assert all(f"config type {kind}" in printed for kind in result["config_types"])
    assert (tmp_path / "run" / "parity-forces.png").stat().st_size > 1000
    potential = load_potential(tmp_path / "run" / "potential.pt")
    tested = [labelled(atoms, CUTOFF, Labels()) for atoms in frames[:3]]
    errors = [(potential.predict(one, stress=True).stress - one.stress).abs().mean().item() for one in tested]
    assert np.mean(errors) == pytest.approx(result["stress_mae"], rel=1e-3)
    tables = error_tables([(one, potential.predict(one)) for one in tested], [""] * 3)
    assert tables["config_types"]["all"]["forces_mae"] == pytest.approx(result["forces_mae"], rel=1e-3)


def test_interrupted_and_resumed(file, tmp_path, monkeypatch):
    """Two epochs in one go, or interrupted in the second: the same last digit."""
    options = {"data": file, "stress_weight": 1.0} | SMALL
    whole = train_forces(ForcesOptions(out=str(tmp_path / "whole"), **options))
    training_step, part = ForceRegressor.training_step, str(tmp_path / "part")

    def interrupted(self, batch, index):
        if (self.current_epoch, index) == (1, 1):
            raise KeyboardInterrupt
        return training_step(self, batch, index)

    monkeypatch.setattr(ForceRegressor, "training_step", interrupted)
    with pytest.raises(SystemExit):
        train_forces(ForcesOptions(out=part, **options))
    monkeypatch.setattr(ForceRegressor, "training_step", training_step)
    with pytest.raises(ValueError, match=r"stress_weight: expected 1\.0 as in the run to resume"):
        train_forces(ForcesOptions(out=part, resume=True, **options | {"stress_weight": 2.0}))
    assert train_forces(ForcesOptions(out=part, resume=True, **options))["forces_mae"] == whole["forces_mae"]


def test_the_loss_has_stress_where_it_is_known(frames):
    """Its gradient is that of the formula; a molecule beside crystals changes nothing of their stress."""
    torch.manual_seed(0)
    crystals = [labelled(atoms, CUTOFF, Labels()) for atoms in frames[:2]]
    lone = labelled(plain(frames[2], energy=0.0, forces=np.zeros((8, 3))), CUTOFF, Labels())
    batch = Structures.join([crystals[0], lone, crystals[1]])
    potential = Potential([29, 79], CUTOFF, channels=4, max_frequency=0)
    made = {"scale": 2.0, "energy_weight": 3.0, "lr": 1e-3, "epochs": 1, "options": {}, "stress_weight": 5.0}
    module = ForceRegressor(potential, **made)
    module.log = lambda *args, **options: None
    loss = module.training_step(batch, 1)
    found = potential.predict(batch, create_graph=True)
    alone = potential.predict(Structures.join(crystals), stress=True, create_graph=True)
    volumes = torch.linalg.det(torch.cat([one.cell for one in crystals])).float()[:, None, None] / 8
    stress = torch.cat([one.stress for one in crystals])
    expected = (
        3.0 * (found.energy - batch.energy).abs().mean() / 8
        + (found.forces - batch.forces).abs().mean()
        + 5.0 * (volumes * (alone.stress - stress)).abs().mean()
    ) / 2.0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient = torch.autograd.grad(loss, potential.embedding.weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, potential.embedding.weight)[0].to(gradient))


def test_energies_of_single_atoms(frames, tmp_path):
    isolated = []
    for number, energy in ((29, -1.5), (79, -2.5)):
        isolated.append(plain(Atoms([number], [[0, 0, 0]]), energy=energy, forces=np.zeros((1, 3))))
    write(
        tmp_path / "all.extxyz",
        [*isolated, *(plain(a, energy=a.get_potential_energy(), forces=a.get_forces()) for a in frames)],
    )
    for n, e0 in enumerate(("isolated", "Cu=-1.5, Au=-2.5")):
        out = tmp_path / str(n)
        train_forces(ForcesOptions(data=str(tmp_path / "all.extxyz"), e0=e0, out=str(out), **SMALL))
        assert load_potential(out / "potential.pt").shift.tolist() == [-1.5, -2.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": "v.xyz"}, "data: expected a file beside valid"),
        ({"energy_key": "e"}, "data: expected a file beside energy_key"),
        ({"stress_weight": 1.0}, "data: expected a file with stress"),
        ({"stress_weight": -1.0, "data": "f"}, "stress_weight: expected a number >= 0"),
        ({"huber": 0.0}, "huber: expected a positive number"),
        ({"e0": "none"}, "e0: expected fit, isolated, or energies in eV"),
        ({"e0": "H=x"}, "e0: expected fit, isolated"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ForcesOptions(**options)


def test_missing_labels_of_options(frames, tmp_path):
    without = [plain(a, energy=a.get_potential_energy(), forces=a.get_forces()) for a in frames]
    write(tmp_path / "f.extxyz", without)
    options = SMALL | {"data": str(tmp_path / "f.extxyz"), "out": str(tmp_path / "run")}
    with pytest.raises(
        ValueError, match="stress_weight: expected 0, or frames with a stress, got none in the training"
    ):
        train_forces(ForcesOptions(stress_weight=1.0, **options))
    with pytest.raises(ValueError, match=r"shift: expected an energy of each of \[29, 79\], got none of \[79\]"):
        train_forces(ForcesOptions(e0="Cu=-1.0", **options))


def test_reading_is_what_was_written(file, frames):
    for before, after in zip(frames, read(file, ":"), strict=True):
        np.testing.assert_allclose(Labels().of(after).stress, Labels().of(before).stress, atol=1e-7)
