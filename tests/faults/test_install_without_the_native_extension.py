"""An installation without the native extension says so: pip in its last line, and the first layer in a warning."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import implicit_steer as ist

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(ist.__file__).parent

TYPES = """
import escnn, torch
import implicit_steer as ist
from implicit_steer import nn

space = escnn.gspaces.flipRot3dOnR3()
fields = space.type(space.trivial_repr, space.irrep(1, 1))
pos, edges = torch.randn(9, 3), torch.randint(0, 9, (2, 20))
"""

CONVOLUTIONS = """
for _ in range(2):
    conv = nn.ImplicitPointConv(fields, fields, None, 2, 4, backend="auto")
    conv(fields(torch.randn(9, 4), pos), edges, torch.randn(20, 3))
"""

OTHERS = [
    "a = nn.FourierActivation(space, 2, 1); a(a.in_type(torch.randn(9, a.in_type.size), pos))",
    "nn.IIDBatchNorm1d(fields)(fields(torch.randn(9, 4), pos))",
    "nn.ImplicitKernel(fields, fields, None, 2, 4)(pos)",
]

LOADED = """
import torch
import implicit_steer as ist

conv = ist.load("conv.safetensors")
conv(torch.randn(9, 4), torch.randint(0, 9, (2, 20)), torch.randn(20, 3))
"""


def run(command, **options):
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


@pytest.fixture
def pip(tmp_path):
    """Installs a copy of the source tree into tmp_path / "installed", on a machine without compiler, CMake and ninja;
    returns what pip prints."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copytree(PACKAGE, source / "implicit_steer", ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md"):
        shutil.copy(ROOT / name, source)

    def pip(*options, **environment):
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", *options]
        environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)} | environment
        done = run([*command, "--target", tmp_path / "installed", source], env=environment)
        assert done.returncode == 0, done.stdout
        return done.stdout

    return pip


@pytest.fixture
def pure(tmp_path):
    """A folder that holds the package without its shared objects."""
    ignored = shutil.ignore_patterns("*.so", "_not_built.txt", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "pure" / "implicit_steer", ignore=ignored)
    return tmp_path / "pure"


def warnings_of(code, folder):
    """The lines of warnings about the native extension that ``code`` prints with the package in ``folder``."""
    done = run([sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if "UserWarning: The native extension" in line]


def test_pip_and_the_first_layer_say_what_was_missing(pip, tmp_path):
    *_, last = pip().strip().splitlines()
    assert last == f"Successfully installed implicit_steer-{ist.__version__}+native.extension.not.built"
    (warning,) = warnings_of(TYPES + CONVOLUTIONS, tmp_path / "installed")
    assert "lacked cmake, ninja, a C++17 compiler (c++ or g++ or clang++)" in warning
    assert "Install that, then reinstall implicit_steer" in warning


def test_nothing_is_said_where_it_was_not_wanted(pip, tmp_path):
    *_, last = pip(IMPLICIT_STEER_NATIVE="off").strip().splitlines()
    assert last == f"Successfully installed implicit_steer-{ist.__version__}"
    assert warnings_of(TYPES + CONVOLUTIONS, tmp_path / "installed") == []


def test_a_library_that_is_absent(pure):
    (warning,) = warnings_of(TYPES + CONVOLUTIONS, pure)
    assert "_ops.so is not in" in warning
    assert "Install a C++ compiler, cmake and ninja" in warning


def test_a_library_that_does_not_load(pure):
    (pure / "implicit_steer" / "_ops.so").write_bytes(b"not a library")
    (warning,) = warnings_of(TYPES + CONVOLUTIONS, pure)
    assert "not loaded: " in warning
    assert "Reinstall implicit_steer" in warning


def test_a_backend_asked_for_by_name_is_no_surprise(pure):
    assert warnings_of(TYPES + CONVOLUTIONS.replace("auto", "eager"), pure) == []


@pytest.mark.parametrize("layer", OTHERS)
def test_layers_without_a_choice_of_backend(layer, pure):
    assert len(warnings_of(TYPES + layer, pure)) == 1


def test_loaded_layers(pure):
    warnings_of(TYPES + CONVOLUTIONS + "ist.save(conv, 'conv.safetensors')", pure)
    assert len(warnings_of(LOADED, pure)) == 1
