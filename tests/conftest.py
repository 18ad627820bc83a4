"""Every test runs on 2 threads, from the same seeds."""

import gc
import os

# Threads that wait by spinning slow everything down where the cores are shared; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

from implicit_steer import _native
from implicit_steer.deploy import kinds
from implicit_steer.ops.native import instruction_set

torch.set_num_threads(2)
gc.set_threshold(100_000, 50, 1000)  # layers are many objects: looking for garbage took a tenth of the time


# Tests that only `make test-slow` runs: they take seconds each, most of them in processes of their own.
SLOW = (
    "tests/bench/",
    "tests/docs/",
    "tests/deploy/test_deploy_fuzz.py",
    "tests/deploy/test_packaging.py::test_a_",
    "tests/deploy/test_packaging.py::test_every_option",
    "tests/deploy/test_register.py::test_in_a_process_without_escnn",
    "tests/experiments/test_torch_models.py",
    "tests/faults/test_defaults_of_pytorch.py",
    "tests/faults/test_first_builds.py::test_first_builds_take_seconds",
    "tests/faults/test_imports_without_escnn.py",
    "tests/faults/test_install_without_the_native_extension.py",
    "tests/faults/test_md_of_a_saved_potential.py",
    "tests/faults/test_memory_of_large_fields.py",
    "tests/faults/test_strides_off_centre.py",
    "tests/irreps/test_construction.py",
    "tests/nn/test_first_steps.py",
    "tests/ops/test_hypothesis.py",
    "tests/ops/test_torch.py",
    "tests/ops/test_triton.py::test_a_cpu_machine_never_imports_triton",
    "tests/ops/test_triton.py::test_interpreted",
    "tests/ops/test_triton_aot.py",
    "tests/potentials/test_ase.py::test_energy_is_conserved",
    "tests/potentials/test_lammps.py",
    "tests/potentials/test_options.py::test_it_is_certified",
    "tests/test_package.py::test_a_wrong_option_has_no_traceback",
    "tests/test_package.py::test_commands_without_escnn",
    "tests/test_package.py::test_cuda_kernels",
    "tests/test_package.py::test_setup",
    "tests/test_package.py::test_source_distribution",
    "tests/test_package.py::test_wheel",
    "tests/training/test_processes.py",
)
# Of these the longest go first: at the end they would keep one process busy and the others waiting.
LONGEST = ("tests/ops/test_triton.py", "tests/docs/", "tests/deploy/test_packaging.py")


def pytest_collection_modifyitems(items):
    """Mark the slow tests, and put the longest ones first."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(autouse=True)
def _reproducible():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # for devices that are not there it would format the stack
        torch.default_generator.manual_seed(0)
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


@pytest.fixture
def registrations():
    """Forgets what a test registers with ``implicit_steer.register``, which holds for the whole process."""
    tables = kinds._BY_CLASS, kinds.REGISTERED
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture(params=["native", "torch"])
def any_sort(request, monkeypatch):
    """Runs a test with the native sort and with the one that stands in for it."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "available", lambda: (False, "switched off by a test"))
