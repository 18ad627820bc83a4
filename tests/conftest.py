"""Every test runs on 2 threads, from the same seeds."""

import os

# Threads that wait by spinning slow everything down where the cores are shared; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

from implicit_steer import _native
from implicit_steer.ops.native import instruction_set

torch.set_num_threads(2)


def pytest_collection_modifyitems(items):
    """The longest ones first: at the end they would keep one process busy and the others waiting."""
    longest = ("tests/ops/test_triton.py", "tests/docs/test_tutorials.py")
    items.sort(key=lambda item: not item.nodeid.startswith(longest))


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def use_isa(monkeypatch):
    """Sets the instruction set, and undoes it."""

    def use(name):
        monkeypatch.setenv("IMPLICIT_STEER_ISA", name)
        instruction_set._instruction_set.cache_clear()

    yield use
    monkeypatch.undo()
    instruction_set._instruction_set.cache_clear()


@pytest.fixture
def threads():
    """Sets the number of threads, and undoes it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def any_sort(request, monkeypatch):
    """Runs a test with the native sort and with the one that stands in for it."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "available", lambda: (False, "switched off by a test"))
