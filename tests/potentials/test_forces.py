"""Labelled configurations and the fit of a potential to them: labels, cache, resumption, reproducibility, messages."""

import csv
import json
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

from implicit_steer.__main__ import main
from implicit_steer.graph.structures import Structures
from implicit_steer.potentials import Potential, load_potential, regressor
from implicit_steer.potentials import data as data_module
from implicit_steer.potentials import train as forces
from implicit_steer.potentials.data import MOLECULES, SYSTEMS, ForceData, draw
from implicit_steer.potentials.regressor import ForceRegressor
from implicit_steer.potentials.train import ForcesOptions, train_forces
from implicit_steer.training import chunks, processes
from implicit_steer.training.lightning import loader

# One result per seed AND number of threads: the number is part of every run.
SMALL = {
    "system": "metals",
    "limit": 8,
    "epochs": 3,
    "batch_size": 2,
    "channels": 4,
    "cutoff": 4.0,
    "progress": False,
    "num_threads": 1,
}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Small chunks and test sets, a cache of its own, and what training changes in the process put back."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(data_module, "CHUNK", 4)
        patch.setattr(forces, "EVALUATION", 4)
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


def fit(out, **options):
    """A run of the small size in ``out``."""
    return train_forces(ForcesOptions(out=str(out), **{**SMALL, **options}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run: folder, result."""
    out = tmp_path_factory.mktemp("run")
    return out, fit(out)


def rows(out):
    """The log without the clock."""
    with (out / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


# ---- data


def small_data(system="metals", **options):
    return ForceData(system, cutoff=4.0, progress=False, **{"train": 6, "val": 3, "test": 2, **options})


def test_labels_are_the_methods():
    data = small_data()
    assert [len(data.train), len(data.val), len(data.test)] == [6, 3, 2]
    for split, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        for number, single in enumerate(part.structures):
            atoms = draw("metals", 0, split, number)
            atoms.calc = EMT()
            assert single.energy.item() == atoms.get_potential_energy()
            np.testing.assert_allclose(single.forces, atoms.get_forces(), rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(single.numbers, atoms.numbers)
            expected = Structures.single(
                single.numbers, torch.tensor(atoms.positions), 4.0, torch.tensor(atoms.cell.array), atoms.pbc
            )
            assert torch.equal(single.edge_index, expected.edge_index)
            assert single.pos.dtype == single.shift.dtype == torch.float32


def test_batches():
    data = small_data()
    batch = data.train.__getitems__([3, 0])
    assert (batch.num_graphs, len(batch.pos)) == (2, 64)
    for n, index in enumerate((3, 0)):
        single, atoms = data.train[index], batch.batch == n
        assert torch.equal(batch.pos[atoms], single.pos)
        assert torch.equal(batch.forces[atoms], single.forces)
        edges = batch.batch[batch.edge_index[0]] == n
        torch.testing.assert_close(batch.edge_delta()[edges], single.edge_delta())


def test_another_seed_is_another_data_set():
    a, b = small_data(), small_data(seed=1)
    assert not torch.equal(a.train[0].pos, b.train[0].pos)
    assert not torch.equal(a.train[0].pos, a.val[0].pos)


def test_molecules_are_disturbed_about_their_equilibrium():
    start = SYSTEMS["molecules"].start()
    start.calc = SYSTEMS["molecules"].calculator()
    assert np.abs(start.get_forces()).max() < 2e-3
    formulas = {draw("molecules", 0, "train", number).get_chemical_formula() for number in range(60)}
    assert len(formulas) == len(MOLECULES)
    data = small_data("molecules")
    largest = max(single.forces.abs().max() for single in data.train.structures)
    assert 0.5 < largest < 30
    assert all(single.forces.sum(0).abs().max() < 1e-4 for single in data.train.structures)
    assert not any(single.shift.any() for single in data.train.structures)


def test_labels_are_the_same_in_every_run(tmp_path):
    threads = torch.get_num_threads()
    runs = []
    for name in ("a", "b"):
        data_module._equilibrium.cache_clear()
        runs.append(small_data("molecules", cache=tmp_path / name).train.structures)
    assert torch.get_num_threads() == threads
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first.pos, second.pos)
        assert torch.equal(first.energy, second.energy)
        assert torch.equal(first.forces, second.forces)


def test_cache_is_used_and_continued(tmp_path, monkeypatch):
    small_data(cache=tmp_path)
    paths = sorted(tmp_path.glob("metals-v*/*.npz"))
    names = ["test-000000", "train-000000", "train-000004", "val-000000"]
    assert [path.stem for path in paths] == names
    paths[0].unlink()
    paths[2].unlink()
    labelled, save = [], chunks.save_chunk

    def interrupted(path, chunk):
        save(path, chunk)
        raise KeyboardInterrupt

    monkeypatch.setattr(chunks, "save_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_data(cache=tmp_path)
    monkeypatch.setattr(chunks, "save_chunk", lambda path, chunk: labelled.append(path) or save(path, chunk))
    first = small_data(cache=tmp_path)
    assert len(labelled) == 1
    again = small_data(cache=tmp_path)
    assert len(labelled) == 1
    assert torch.equal(first.test[1].forces, again.test[1].forces)
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"test-000000.npz: expected the processed configurations .*Delete the file"):
        small_data(cache=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "x"}, r"system: expected one of \['metals', 'molecules'\], got 'x'"),
        ({"val": 0}, "val: expected a positive number of configurations, got 0"),
    ],
)
def test_wrong_data(options, message):
    with pytest.raises(ValueError, match=message):
        small_data(**options)


@pytest.mark.parametrize(
    ("module", "system"),
    [("ase", "metals"), ("tblite", "molecules"), ("lightning.pytorch", "metals")],
)
def test_missing_package(tmp_path, monkeypatch, module, system):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    message = rf"{package}: expected an installed package, got none. Run: pip install implicit_steer\[train\]"
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path / "out", system=system, cache=str(tmp_path / "cache"))


# ---- training


def test_loss_falls(run):
    out, result = run
    log = rows(out)
    assert [(row["epoch"], row["step"]) for row in log] == [("0", "4"), ("1", "8"), ("2", "12")]
    assert [round(float(row["lr"]) / ForcesOptions.lr, 2) for row in log] == [1.0, 0.75, 0.25]
    losses = [float(row["train_loss"]) for row in log]
    assert losses[0] > losses[-1]
    assert result["val_mae"] == pytest.approx(min(float(row["val_mae"]) for row in log))
    assert result["forces_mae"] < result["zero_forces_mae"]
    assert json.loads((out / "result.json").read_text()) == result


def test_the_saved_potential_has_the_printed_errors(run):
    out, result = run
    potential = load_potential(out / "potential.pt").double()
    data = ForceData("metals", cutoff=4.0, train=8, val=4, test=4, progress=False)
    test = Structures.join(data.test.structures).to(torch.float64)
    predicted = potential.predict(test)
    # float32 against float64.
    assert (predicted.forces - test.forces).abs().mean().item() == pytest.approx(result["forces_mae"], rel=1e-4)
    assert (predicted.energy - test.energy).abs().mean().item() / 32 == pytest.approx(result["energy_mae"], rel=1e-3)


def test_same_seed_same_result(run, tmp_path):
    again = fit(tmp_path / "a")
    names = ("energy_mae", "forces_mae")
    assert [again[name] for name in names] == [run[1][name] for name in names]
    assert rows(tmp_path / "a") == rows(run[0])
    assert fit(tmp_path / "b", seed=1)["forces_mae"] != run[1]["forces_mae"]


def interrupt(monkeypatch, out, epoch, step, **options):
    """A run in ``out`` that is interrupted in ``step`` of ``epoch``."""
    training_step = ForceRegressor.training_step

    def interrupted(self, batch, index):
        if (self.current_epoch, index) == (epoch, step):
            raise KeyboardInterrupt
        return training_step(self, batch, index)

    monkeypatch.setattr(ForceRegressor, "training_step", interrupted)
    with pytest.raises(SystemExit):
        fit(out, **options)
    monkeypatch.setattr(ForceRegressor, "training_step", training_step)


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (2, 3)])
def test_interrupted_and_resumed(run, tmp_path, monkeypatch, capsys, epoch, step):
    interrupt(monkeypatch, tmp_path, epoch, step)
    assert f"Interrupted in epoch {epoch}" in capsys.readouterr().out
    assert len(rows(tmp_path)) == epoch
    resumed = fit(tmp_path, resume=True)
    assert rows(tmp_path) == rows(run[0])
    assert resumed["forces_mae"] == run[1]["forces_mae"]
    states = [torch.load(out / "last.ckpt", weights_only=True)["state_dict"] for out in (tmp_path, run[0])]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "options",
    [
        {"system": "molecules", "ema": 0.6, "schedule": "constant", "batch_atoms": 24},
        {"schedule": "plateau", "epochs": 5, "lr": 0.1},
        {"patience": 1, "epochs": 20, "lr": 0.1, "ema": 0.5},
    ],
)
def test_options_of_training_are_resumed(tmp_path, monkeypatch, options):
    """Weights, averages, the learning rate, and when the run ends: as without the interruption."""
    monkeypatch.setitem(regressor.PLATEAU, "patience", 0)  # so that 5 epochs see it
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected = fit(whole, **options)
    interrupt(monkeypatch, part, 1, 1, **options)
    found = fit(part, resume=True, **options)
    assert rows(part) == rows(whole)
    assert found["forces_mae"] == expected["forces_mae"]
    saved = [torch.load(out / "last.ckpt", weights_only=True)["state_dict"] for out in (whole, part)]
    saved += [load_potential(out / "potential.pt").state_dict() for out in (whole, part)]
    for one, other in (saved[:2], saved[2:]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    rates = [float(row["lr"]) for row in rows(whole)]
    falls = len(set(rates)) > 1
    assert falls == (options.get("schedule") != "constant")
    if "patience" in options:  # a run that has ended is not trained any further
        assert len(rates) < 20
        assert fit(whole, resume=True, **options)["forces_mae"] == expected["forces_mae"]
        assert len(rows(whole)) == len(rates)
        errors = [float(row["val_mae"]) for row in rows(whole)]
        assert min(errors) == errors[-2]


def test_averaged_weights(run):
    """w̄ ← d w̄ + (1 − d) w from the second step on; what is validated and saved is w̄, what is trained w."""
    data = small_data()
    torch.manual_seed(0)
    potential = Potential((29, 79), 4.0, channels=2)
    module = ForceRegressor(potential, scale=1.0, energy_weight=1.0, lr=1e-3, epochs=1, options={}, ema=0.75)
    expected = None
    for _ in range(3):
        with torch.no_grad():
            for parameter in potential.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        module.on_train_batch_end()
        now = [p.detach().clone() for p in potential.parameters()]
        expected = now if expected is None else [0.75 * a + 0.25 * b for a, b in zip(expected, now, strict=True)]
    for found, wanted in zip(module.evaluated.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    batch = data.train.__getitems__([0, 1])
    forces = [module.differences(batch, create_graph=graph).forces[0].detach() for graph in (False, True)]
    torch.testing.assert_close(forces[0], module.evaluated.predict(batch).forces, rtol=0, atol=0)
    torch.testing.assert_close(forces[1], potential.predict(batch).forces, rtol=1e-4, atol=1e-5)
    optimised = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in potential.parameters()}


def test_batches_by_atoms():
    """All structures once per epoch, at most so many atoms together, a larger structure alone; one seed, one order."""
    data = ForceData("molecules", cutoff=4.0, train=30, val=1, test=1, progress=False).train
    assert max(data.atoms) == 9

    def epoch(number, seed=0, most=16):
        batches = loader(data, 2, seed, most)
        batches.batch_sampler.sampler.set_epoch(number)
        return [batch.energy.tolist() for batch in batches], [len(batch.pos) for batch in batches]

    everything = sorted(single.energy.item() for single in data.structures)
    for number in range(3):
        energies, atoms = epoch(number)
        assert sorted(e for batch in energies for e in batch) == everything
        assert max(atoms) <= 16
        assert all(a + b > 16 or len(batch) > 1 for a, b, batch in zip(atoms, atoms[1:], energies, strict=False))
    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert epoch(1) != epoch(1, seed=1)
    assert [len(batch) for batch in epoch(0, most=1)[0]] == [1] * 30
    assert [batch.num_graphs for batch in loader(data, 2, None, 1000)] == [30]


def test_batches_by_atoms_take_one_process(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="batch_atoms: expected None with several processes"):
        loader(small_data().train, 2, 0, 100)


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    """Its checkpoint does not know options that came later."""
    result = fit(tmp_path, epochs=1)
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)
    later = ("schedule", "ema", "patience", "batch_atoms")
    without = before | {"options": {k: v for k, v in before["options"].items() if k not in later}}
    torch.save(without, tmp_path / "last.ckpt")
    assert fit(tmp_path, epochs=1, resume=True)["forces_mae"] == result["forces_mae"]
    with pytest.raises(ValueError, match=r"ema: expected None as in the run to resume, got 0\.9"):
        fit(tmp_path, epochs=1, resume=True, ema=0.9)


def test_step_is_the_gradient_of_the_loss():
    """The native first derivatives and the second ones behind a training step, against ``reference``."""
    data = small_data()
    batch = data.train.__getitems__([0, 1]).to(torch.float64)
    gradients = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        potential = Potential((29, 79), 4.0, channels=4, backend=backend).double()
        potential.fit(batch)
        module = ForceRegressor(potential, scale=1.0, energy_weight=1.0, lr=1e-3, epochs=1, options={})
        energy, forces = module.errors(batch, create_graph=True)
        (energy + forces).backward()
        gradients.append([p.grad for p in potential.parameters()])
    for found, expected in zip(*gradients, strict=True):
        # Measured: 5e-16.
        assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = "train forces --system molecules --limit 4 --epochs 1 --batch-size 2 --channels 2"
    arguments += f" --out {out} --cache {tmp_path}"
    main([*arguments.split(), "--num-threads", "1"])
    captured = capsys.readouterr()
    result = json.loads((out / "result.json").read_text())
    energy, forces = (1000 * result[name] for name in ("energy_mae", "forces_mae"))
    assert f"test MAE molecules: energy {energy:.3f} meV per atom, forces {forces:.2f} meV/Å" in captured.out
    assert "deprecated" not in captured.err
    assert "molecules: 100%" in captured.err
    assert "Epoch 0: 100%" in captured.out + captured.err
    with pytest.raises(ValueError, match=r"out: expected a folder without a run, .*--resume.*--overwrite"):
        main(arguments.split())
    main([*arguments.split(), "--overwrite", "--no-progress"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"seed: expected 0 as in the run to resume, got 3"),
        ({"epochs": 5}, r"epochs: expected 3 as in the run to resume, got 5"),
        ({"out": "nowhere"}, r"resume: expected a checkpoint .*nowhere/last.ckpt"),
    ],
)
def test_resume_of_another_run(run, changes, message):
    options = {**SMALL, "out": str(run[0]), **changes}
    with pytest.raises(ValueError, match=message):
        train_forces(ForcesOptions(resume=True, **options))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("system", "x", "system: expected one of"),
        ("backend", "x", "backend: expected one of"),
        ("epochs", 0, "epochs: expected at least 1, got 0"),
        ("batch_size", 1, "batch_size: expected at least 2, got 1"),
        ("limit", 1, "limit: expected at least 2, got 1"),
        ("cutoff", 0.0, "cutoff: expected a positive number, got 0.0"),
        ("energy_weight", -1.0, "energy_weight: expected a positive number"),
        ("ema", 1.0, "ema: expected a number between 0 and 1, or None, got 1.0"),
        ("schedule", "steps", "schedule: expected one of"),
        ("patience", 0, "patience: expected at least 1, got 0"),
        ("batch_atoms", 0, "batch_atoms: expected at least 1, got 0"),
    ],
)
def test_wrong_option(option, value, message):
    with pytest.raises(ValueError, match=message):
        ForcesOptions(**{option: value})


def test_energies_are_compared_per_atom():
    batch = small_data().train.__getitems__([0, 1])
    potential = Potential((29, 79), 4.0, channels=2)
    module = ForceRegressor(potential, scale=1.0, energy_weight=1.0, lr=1e-3, epochs=1, options={})
    before, _ = module.errors(batch, create_graph=False)
    shifted, _ = module.errors(replace(batch, energy=batch.energy + 3200.0), create_graph=False)
    assert (shifted - before).abs() == pytest.approx(100, abs=2 * before.item())
