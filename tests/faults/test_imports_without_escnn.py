"""Without escnn every module of the package imports, or says what to install: none ends in a ModuleNotFoundError."""

import os
import subprocess
import sys
from pathlib import Path

import implicit_steer as ist

ROOT = Path(ist.__file__).parent.parent
CODE = """
import importlib, pkgutil, sys
sys.modules["escnn"] = None  # as if it were not installed
import implicit_steer
from implicit_steer._check import is_explained
for module in pkgutil.walk_packages(implicit_steer.__path__, "implicit_steer.", onerror=lambda name: None):
    if module.name.rpartition(".")[2] in ("__main__", "_ops"):
        continue
    try:
        importlib.import_module(module.name)
    except RuntimeError as error:
        assert is_explained(error), module.name
        print(f"{module.name}: {error}")
    else:
        print(f"{module.name}: imported")
for name in ("nn",):
    try:
        getattr(implicit_steer, name)
    except RuntimeError as error:
        print(f"attribute {name}: {error}")
"""
EXPLANATION = "escnn: expected an installed package, got none. Run: pip install implicit_steer[escnn]"


def test_every_module_imports_or_says_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(lines.values()) == {"imported", EXPLANATION}
    for name in ("implicit_steer.nn", "implicit_steer.experiments.models", "attribute nn"):
        assert lines[name] == EXPLANATION
    for name in (
        "implicit_steer.deploy",
        "implicit_steer.layers",
        "implicit_steer.potentials.md",
        "implicit_steer.experiments.data",
    ):
        assert lines[name] == "imported"
