"""``python -m bench potentials``: this package is trained and measured, others that are missing say so."""

import json
import sys

import ase.io
import pytest
import torch

from bench import potentials, trainers
from bench.__main__ import main
from bench.potentials import Plan
from bench.trainers import Files, Trainer

FAKE = """#!{python}
import json, sys, time
epochs = [int(a.partition("=")[2]) for a in sys.argv if a.startswith("--max_num_epochs=")]
if sys.argv[1] == "-c":
    print("0.0")
elif epochs:
    time.sleep(0.02 * epochs[0])
elif sys.argv[2] == "errors":
    print("a line of the package")
    print(json.dumps({{"energy_mae": 1e-9, "forces_mae": 1e-9, "frames": 1, "parameters": 7}}))
else:
    sys.exit("no memory left")
"""


@pytest.fixture(autouse=True)
def threads():
    """The command line sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(potentials, "_rates", lambda *_: {"epoch": 1.0, "start": 0.0})
    monkeypatch.setattr(potentials, "DYNAMICS_SECONDS", 0.1)
    monkeypatch.setattr(potentials, "QUICK", Plan(("metals",), (10,), (0.01,), (2,), 3))


@pytest.fixture
def fake(tmp_path):
    """An interpreter that has MACE and is better and faster than anyone, but cannot run dynamics."""
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("small")
def test_quick_run(tmp_path, capsys, fake):
    command = ["potentials", "--quick", "--threads", "1", "--mace", fake, "--nequip", "/none", "--out", str(tmp_path)]
    assert main(command) == 0
    results = json.loads((tmp_path / "potentials.json").read_text())
    assert results["versions"]["mace"] == "0.0"
    assert results["versions"]["nequip"] is None
    ours, theirs = results["errors"]
    assert (ours["kind"], theirs["kind"]) == ("implicit_steer", "mace")
    assert ours["epochs"] >= 1
    assert 0 < ours["forces_mae"] < 1
    assert ours["parameters"] > 1000 > theirs["parameters"]
    steps = {r["kind"]: r for r in results["dynamics"]}
    assert steps["implicit_steer"]["atoms"] == 32
    assert steps["implicit_steer"]["seconds"] > 0 < steps["implicit_steer"]["peak_mb"]
    assert "no memory left" in steps["mace"]["failed"]
    printed = capsys.readouterr().out
    assert "- nequip: not installed" in printed
    assert "not measured: mace: python failed: no memory left" in printed
    assert "forces_mae" in printed.partition("Behind the best of the others:")[2]
    assert (tmp_path / "potentials-metals.png").stat().st_size > 5000

    assert main(command) == 0  # every stage that succeeded is read, none is made again
    assert json.loads((tmp_path / "potentials.json").read_text())["errors"] == results["errors"]


@pytest.mark.parametrize("epoch", [0.01, 3.0])
def test_pilots_tell_the_time_of_an_epoch(epoch, monkeypatch):
    monkeypatch.setattr(potentials, "_timed", lambda trainer, files, epochs, folder: 8.0 + epoch * epochs)
    sets = potentials._Sets(None, None, "", 1)
    assert potentials._rates(None, sets, None) == pytest.approx({"epoch": epoch, "start": 8.0})


def test_a_stage_is_made_again_where_its_settings_changed(tmp_path):
    path, made = tmp_path / "stage.json", []

    def make():
        made.append(1)
        return {"count": len(made)}

    assert [potentials._stage(path, [5.0], make)["count"] for _ in range(2)] == [1, 1]
    assert potentials._stage(path, [4.0], make)["count"] == 2


def test_files_have_energies_and_forces_under_names_that_everyone_reads(tmp_path):
    sets = potentials._files("metals", 10, 3, tmp_path)
    assert set(sets.full.e0) == {"Cu", "Au"}
    counts = [len(ase.io.read(path, ":")) for path in (sets.full.train, sets.full.valid, sets.test)]
    assert counts == [10, 1, 3]
    atoms = ase.io.read(sets.test)
    assert atoms.pbc.all()
    assert atoms.arrays["REF_forces"].shape == (32, 3)
    assert isinstance(atoms.info["REF_energy"], float)


def test_models_are_of_one_size(tmp_path):
    files = Files("train.extxyz", "valid.extxyz", {"Cu": -1.0, "Au": -2.0})
    given = {t.kind: t.training(files, 8, tmp_path) for t in trainers.trainers("/m/python", "/n/python", 2)}
    ours, mace = given["implicit_steer"], given["mace"]
    assert {"--channels=32", "--max-frequency=1", "--blocks=2", "--cutoff=5.0", "--e0=Cu=-1.0,Au=-2.0"} <= set(ours)
    assert {"--num_channels=32", "--max_L=1", "--num_interactions=2", "--r_max=5.0"} <= set(mace)
    assert "--E0s={29: -1.0, 79: -2.0}" in mace
    model = json.loads((tmp_path / "config.yaml").read_text())["training_module"]["model"]
    sizes = {"num_features": 32, "l_max": 1, "num_layers": 2, "r_max": 5.0, "per_type_energy_shifts": files.e0}
    assert {name: model[name] for name in sizes} == sizes
    assert given["nequip"][0] == "/n/nequip-train"


def test_a_failure_names_its_log(tmp_path):
    trainer = Trainer("implicit_steer", sys.executable, 1)
    with pytest.raises(RuntimeError, match=r"failed: no such weights; see .*log\.txt"):
        trainer.run([sys.executable, "-c", "raise SystemExit('no such weights')"], tmp_path)
