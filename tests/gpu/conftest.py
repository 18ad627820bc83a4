"""Tests of the GPU backends: on a GPU, or, in a process with TRITON_INTERPRET=1, of Triton's kernels on CPU tensors."""

import pytest
import torch
from problems import BACKENDS, INTERPRETED


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def guarded():
    """Every uninitialised tensor full of NaN; interpreted, every launch under the guard."""
    import interpreter

    torch.manual_seed(0)
    if INTERPRETED:
        interpreter.install()
    with interpreter.poisoned():
        yield
