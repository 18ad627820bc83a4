"""The package around the mathematics: what it imports, what it tells about itself, and life without the extension."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import implicit_steer as ist
from implicit_steer import _native
from implicit_steer.__main__ import main
from implicit_steer._check import is_explained

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(ist.__file__).parent


def run(code, cwd=ROOT, **environment):
    """Standard output of a fresh Python process that runs ``code``."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pure_python(tmp_path):
    """A folder that holds the package as a pure Python install leaves it: without its shared objects."""
    shutil.copytree(PACKAGE, tmp_path / "implicit_steer", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


# ---- imports


def test_import_is_light():
    code = "import sys, implicit_steer; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = set(run(code).split())
    assert "torch" in loaded
    assert not loaded & {"escnn", "py3nj", "triton", "scipy", "lightning", "rdkit", "pandas", "matplotlib"}


def test_public_names():
    assert all(hasattr(ist, name) for name in ist.__all__)
    assert set(dir(ist)) > set(ist.__all__)
    packages = ("deploy", "experiments", "layers", "nn", "potentials")
    assert all(getattr(ist, name).__name__ == f"implicit_steer.{name}" for name in packages)
    assert ist.viz.__name__ == "implicit_steer.training.viz"
    assert ist.lammps.__name__ == "implicit_steer.potentials.lammps"
    assert re.fullmatch(r"\d+\.\d+\.\d+", ist.__version__)


# ---- info


def test_info_with_the_native_extension():
    facts = ist.info()
    assert facts.native == (True, f"loaded from {PACKAGE / '_ops.so'}")
    assert facts.versions["implicit_steer"] == ist.__version__ == facts.build["version"]
    assert facts.versions["torch"] == torch.__version__
    assert facts.backends["reference"][0]
    assert facts.backends["eager"][0]
    assert all(isinstance(ok, bool) and reason for ok, reason in facts.backends.values())
    assert facts.instruction_set in ("baseline", "AVX2", "AVX-512")
    assert "baseline" in facts.instruction_sets
    assert facts.build["compiler"]
    assert facts.build["openmp"]


def test_info_prints_every_fact():
    facts = ist.info()
    text = str(facts)
    named = [f"{name} {version}" for name, version in facts.versions.items()]
    named += [f"backend {name}" for name in facts.backends] + [reason for _, reason in facts.backends.values()]
    named += [facts.instruction_set, facts.native[1], facts.cuda_device, "CUDA architectures", facts.build["compiler"]]
    assert [part for part in named if part not in text] == []


def test_info_names_what_is_not_installed(monkeypatch):
    # sys.modules: the package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["implicit_steer.info"], "_PACKAGES", ("numpy", "no-such-package"))
    assert ist.info().versions["no-such-package"] == "not installed"


def test_instruction_set_is_torchs():
    widest = {"AVX512": "AVX-512", "AVX2": "AVX2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    assert _native.build_info().cpu_instruction_set() == widest


# ---- without the native extension


def test_pure_python_install_says_so_and_works(pure_python):
    code = """
import torch, implicit_steer as ist
graph = ist.Graph(torch.tensor([[0, 1, 2, 2], [1, 2, 1, 0]]), 3)
assert graph.order.tolist() == [3, 0, 2, 1] and graph.colptr.tolist() == [0, 1, 2, 4]
assert ist.knn_graph(torch.eye(4), 2).shape == (2, 8)
facts = ist.info()
assert facts.build == {} and facts.instruction_sets == () and facts.instruction_set == "unknown"
assert facts.backends["eager"][0]
print(facts)
"""
    text = run(code, cwd=pure_python, PYTHONPATH=str(pure_python))
    assert re.search(r"native extension +no \(not built: _ops.so is not in .*reinstall", text)


def test_a_library_that_does_not_load_gives_its_reason(pure_python):
    (pure_python / "implicit_steer" / "_ops.so").write_bytes(b"not a library")
    text = run("import implicit_steer as ist; print(ist.info().native)", pure_python, PYTHONPATH=str(pure_python))
    assert text.startswith("(False, 'not loaded: ")
    assert "_ops.so" in text


# ---- types


def test_lazy_names_are_typed():
    """A type checker does not see what ``__getattr__`` finds: each is imported for it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING"]
    imported = {alias.name for node in block.body for alias in node.names}
    assert imported == {"load", "register", "save", *ist._FOUND}
    for function in (ist.load, ist.save, ist.deploy.copy_state, ist.register):
        parameters = inspect.signature(function).parameters.values()
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters)


# ---- building


@pytest.fixture
def build(tmp_path):
    """Runs setup.py, to build the extension or with another command, in a copy of the source tree, on a machine without
    compiler, CMake and ninja."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "implicit_steer").mkdir()
    for name in ("__init__.py", "py.typed"):
        shutil.copy(PACKAGE / name, tmp_path / "implicit_steer")

    def build(mode, *command, **variables):
        command = [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))]
        environment = {k: v for k, v in os.environ.items() if k != "CXX"}
        environment |= {"PATH": str(tmp_path), "IMPLICIT_STEER_NATIVE": mode} | variables
        return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)

    return build


@pytest.mark.parametrize(
    ("mode", "succeeds", "message"),
    [
        ("auto", True, r"not built, this machine lacks cmake, ninja, a C\+\+17 compiler .* installed as pure Python"),
        ("require", False, "this machine lacks cmake, ninja.* IMPLICIT_STEER_NATIVE=require"),
        ("off", True, ""),
        ("yes", False, "expected auto, require or off, got 'yes'"),
    ],
)
def test_setup_without_a_compiler(build, mode, succeeds, message):
    done = build(mode)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, output
    assert re.search(message, output), output


def test_setup_without_the_extension_removes_an_old_one(build, tmp_path):
    old = tmp_path / "implicit_steer" / "_ops.so"
    old.touch()
    build("off")
    assert not old.exists()


def test_wheel_without_the_extension_is_for_every_platform(build, tmp_path):
    done = build("off", "bdist_wheel", "--dist-dir", "dist")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"implicit_steer-{ist.__version__}-py3-none-any.whl"
    assert "implicit_steer/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_source_distribution_says_that_it_is_typed(build, tmp_path):
    done = build("off", "sdist", "--dist-dir", "dist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as files:
        assert any(name.endswith("/implicit_steer/py.typed") for name in files.getnames())


def test_wheel_that_lacks_the_extension_says_so(build, tmp_path):
    done = build("auto", "bdist_wheel", "--dist-dir", "dist")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"implicit_steer-{ist.__version__}+native.extension.not.built-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as content:
        assert content.read("implicit_steer/_not_built.txt").startswith(b"cmake, ninja, a C++17 compiler")
    done = build("off", "bdist_wheel", "--dist-dir", "dist")
    with zipfile.ZipFile(tmp_path / "dist" / f"implicit_steer-{ist.__version__}-py3-none-any.whl") as content:
        assert content.read("implicit_steer/_not_built.txt") == b"off"


@pytest.fixture
def configure(build, tmp_path):
    """Like ``build``, on a machine with tools that do nothing and an nvidia-smi that runs ``script``; returns what is
    printed, CMake's arguments among it."""

    def configure(script, **variables):
        tools = {"cmake": 'echo "$@"', "ninja": ":", "g++": ":"} | ({"nvidia-smi": script} if script else {})
        for name, line in tools.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)
        done = build("require", CUDA_VISIBLE_DEVICES="", **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return configure


@pytest.mark.parametrize(
    ("script", "architectures"),
    [("echo 9.0", "90"), ("echo 12.0; echo 8.0; echo 12.0", "80;120"), ("echo 7.5; echo '[N/A]'; echo 8.6", "86")],
)
def test_cuda_kernels_are_compiled_for_the_gpus_of_the_machine(configure, script, architectures):
    for mode in ("auto", "require"):
        printed = configure(script, IMPLICIT_STEER_CUDA=mode)
        assert f"-DCUDA_KERNELS={mode} -DCUDA_ARCHITECTURES={architectures}\n" in printed


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (None, "no GPU"),  # no nvidia-smi
        ("echo 'No devices were found'", "no GPU"),
        ("echo 'Field is not a valid field to query'; exit 2", "no GPU"),
        ("echo 7.5", "75"),
    ],
)
def test_cuda_kernels_are_not_compiled_without_a_gpu_for_them(configure, script, found):
    printed = configure(script, IMPLICIT_STEER_CUDA="auto")
    assert "-DCUDA_KERNELS=off\n" in printed
    assert f"CUDA kernels: not built. They are for GPUs of compute capability 80 or newer; here: {found}." in printed
    assert "IMPLICIT_STEER_CUDA=require builds them" in printed


def test_cuda_kernels_can_be_asked_for_without_a_gpu(configure):
    printed = configure(":", IMPLICIT_STEER_CUDA="require")
    assert "-DCUDA_KERNELS=require\n" in printed  # for every architecture in CMakeLists.txt
    for mode in ("auto", "require", "off"):
        printed = configure("echo 8.0", IMPLICIT_STEER_CUDA=mode, IMPLICIT_STEER_CUDA_ARCHITECTURES="90 100")
        assert f"-DCUDA_KERNELS={mode} -DCUDA_ARCHITECTURES=90;100\n" in printed


# ---- the command line

WRONG = {
    "train qm9 --limit 0": "limit: expected at least 2, got 0",
    "train qm9 --sampling exactly": "sampling: expected 'auto'",
    "train modelnet --data /nonexistent": "root: expected a zip or a folder of meshes",
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.items())
def test_wrong_options_are_explained(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        main(arguments.split())
    assert is_explained(error.value)


def test_other_errors_are_not():
    with pytest.raises(ZeroDivisionError) as error:
        _ = 1 / 0
    assert not is_explained(error.value)
    assert not is_explained(ValueError())


def test_a_wrong_option_has_no_traceback():
    arguments, message = next(iter(WRONG.items()))
    command = [sys.executable, "-m", "implicit_steer", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1
    assert f"python -m implicit_steer: error: {message}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("info", "^backend reference +yes"),
        ("train qm9", "^python -m implicit_steer: error: escnn: .* pip install implicit_steer.escnn.$"),
        ("figure nbody", "^python -m implicit_steer: error: escnn: .* pip install implicit_steer.escnn.$"),
    ],
)
def test_commands_without_escnn(command, printed, tmp_path):
    code = """
import runpy, sys
sys.modules["escnn"] = None  # as if it were not installed
runpy.run_module("implicit_steer", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code, *command.split()], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == (command != "info")
    assert re.search(printed, done.stdout + done.stderr, re.MULTILINE), done.stderr
    assert list(tmp_path.iterdir()) == []  # it fails before it writes
