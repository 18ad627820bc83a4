"""Every option of training and of the model at once: trained from the command line, then certified."""

import json
import signal

import pytest
import torch
from ase.build import bulk

from implicit_steer.__main__ import main
from implicit_steer.potentials import data as data_module
from implicit_steer.potentials import load_potential
from implicit_steer.potentials import train as forces
from implicit_steer.potentials.certificate import BOUNDS, certify

OPTIONS = (
    "--ema 0.9 --schedule plateau --patience 3 --batch-atoms 96 --radial-basis bessel --depthwise --correlation 2 --zbl"
)
SIZES = "--system metals --limit 8 --epochs 3 --channels 4 --cutoff 4 --num-threads 1 --no-progress"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of the run."""
    folder, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "CHUNK", 4)
        patch.setattr(forces, "EVALUATION", 4)
        main(f"train forces {SIZES} {OPTIONS} --cache {folder}/cache --out {folder}/run".split())
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    return folder / "run"


def test_it_is_trained_as_asked(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["forces_mae"] < result["zero_forces_mae"]
    given = {name: result["options"][name] for name in ("ema", "schedule", "patience", "batch_atoms")}
    assert given == {"ema": 0.9, "schedule": "plateau", "patience": 3, "batch_atoms": 96}
    assert (trained / "log.csv").read_text().splitlines()[-1].split(",")[:2] == ["2", "9"]  # 3 steps per epoch
    options = load_potential(trained / "potential.pt").options
    names = "radial_basis", "depthwise", "correlation", "zbl"
    assert [options[name] for name in names] == ["bessel", True, 2, True]


def test_it_is_certified(trained):
    """On a compressed crystal, whose neighbours repel each other, in both dtypes, with and without tables."""
    crystal = bulk("Cu", "fcc", a=3.0, cubic=True)
    crystal.numbers[1] = 79
    crystal.set_cell([[3.1, 0.1, 0], [0, 2.9, 0.4], [0.3, 0, 3.0]], scale_atoms=True)
    crystal.rattle(0.05, seed=1)
    potential = load_potential(trained / "potential.pt")
    for backend in ("cpu", "eager"):
        found = certify(potential, [crystal], backends=[backend], steps=20)
        assert found.ok, str(found)
        assert {f.check for f in found.findings} == set(BOUNDS) - {"net torque"}  # of molecules alone
        assert len({(f.dtype, f.kernel) for f in found.findings}) == 4


def test_it_is_certified_on_the_command_line(trained, capsys):
    quick = "--backends cpu --dtypes float64 --steps 10 --no-progress"
    assert not main(["certify", str(trained / "potential.pt"), *quick.split()])
    assert "All bounds hold." in capsys.readouterr().out
