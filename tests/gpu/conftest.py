"""Tests of the GPU backends. They are collected where there is a GPU, and in a process with TRITON_INTERPRET=1, in
which Triton interprets its kernels on CPU tensors: tests/ops/test_triton.py starts such processes."""

import pytest
import torch
from problems import BACKENDS, INTERPRETED

from implicit_steer.ops.triton import configuration

if INTERPRETED:
    collect_ignore = ["test_device.py"]
elif torch.cuda.is_available():
    collect_ignore = ["test_interpreter.py"]
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True, scope="session")
def guarded():
    """Interpreted, every launch under the guard, and parameters packed in a few large blocks: a program takes the same
    time for each."""
    if not INTERPRETED:
        yield
        return
    import interpreter

    interpreter.install()
    with configuration.using("pack", configuration.LaunchConfig(1 << 14, 4)):
        yield


@pytest.fixture(autouse=True)
def poisoned():
    """Every uninitialised tensor is full of NaN."""
    import interpreter

    torch.manual_seed(0)
    with interpreter.poisoned():
        yield
