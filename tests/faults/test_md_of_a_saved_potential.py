"""``python -m implicit_steer md`` takes a potential of ``implicit_steer.save``, and says what it expects otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import ase.build
import pytest
import torch

import implicit_steer as ist
from implicit_steer.potentials import Potential, load_potential
from implicit_steer.potentials.md import MDOptions, run_md

ROOT = Path(ist.__file__).parent.parent
# As `python -m implicit_steer`, as if escnn were not installed.
CODE = """
import runpy, sys
sys.modules["escnn"] = None
runpy.run_module("implicit_steer", run_name="__main__")
"""
EXPECTED = r"expected a potential that implicit_steer\.save or Potential\.save wrote"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One potential in both forms, a structure, and files that hold none."""
    folder = tmp_path_factory.mktemp("md")
    potential = Potential([29], 3.0, channels=1, blocks=1)
    potential.save(folder / "potential.pt")
    ist.save(potential, folder / "potential.safetensors")
    ist.save(potential, folder / "frozen.safetensors", table=True)
    ist.save(torch.nn.ReLU(), folder / "other.safetensors")
    (folder / "text.pt").write_text("no potential")
    ase.build.bulk("Cu", cubic=True).write(folder / "start.xyz")
    return folder


def run(folder, name, **options):
    options = {"steps": 3, "progress": False, "out": str(folder / "out"), **options}
    return run_md(MDOptions(str(folder / name), str(folder / "start.xyz"), **options))


def test_both_files_give_the_same_run(folder):
    energies = [run(folder, name).energies for name in ("potential.safetensors", "potential.pt")]
    assert energies[0].shape == (4, 4)
    assert energies[0].tolist() == energies[1].tolist()


def test_a_frozen_potential_runs_alike(folder):
    """Splines in place of the kernels' MLPs change energies by as much as their error."""
    expected, found = (run(folder, f"{name}.safetensors").energies for name in ("potential", "frozen"))
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()


def test_the_command_line_without_escnn(folder):
    files = f"{folder}/potential.safetensors --structure {folder}/start.xyz --out {folder}/cli"
    command = [sys.executable, "-c", CODE, "md", *files.split(), "--steps", "3", "--no-progress"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "4 atoms, 3 steps of 0.5 fs" in done.stdout


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "other.safetensors",
            ValueError,
            "expected a potential that implicit_steer.save or Potential.save wrote, got ReLU",
        ),
        ("absent.pt", ValueError, "expected a potential that implicit_steer.save or Potential.save wrote, got no file"),
        ("text.pt", RuntimeError, "expected a safetensors file"),
    ],
)
def test_files_without_a_potential(name, kind, message, folder):
    with pytest.raises(kind, match=f"{name}: {message}"):
        run(folder, name)


def test_load_potential_names_the_other_reader(folder):
    with pytest.raises(ValueError, match=r"expected a file written by Potential\.save, got .*implicit_steer\.load"):
        load_potential(folder / "potential.safetensors")
    with pytest.raises(ValueError, match=r"text\.pt: expected a file written by Potential\.save"):
        load_potential(folder / "text.pt")
