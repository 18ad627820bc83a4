"""Tests of the Triton kernels on CPU tensors; run by tests/test_triton.py in a process with TRITON_INTERPRET=1."""

import pytest


@pytest.fixture(autouse=True)
def guarded():
    """Every launch under the guard, every uninitialised tensor full of NaN."""
    import interpreter

    interpreter.install()
    with interpreter.poisoned():
        yield
