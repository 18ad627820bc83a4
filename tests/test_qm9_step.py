"""The benchmark of the training step: what a part takes lands in its cell of the table."""

import importlib.util
import time

import numpy as np
import pytest
import torch
from escnn.nn import GeometricTensor

from bench import qm9_step
from implicit_steer.nn import IIDBatchNorm1d

PAUSE = 20.0  # ms


@pytest.fixture(autouse=True)
def _without_data(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


class Slow(torch.autograd.Function):
    """The identity; it takes a pause, and two on the way back."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(1e-3 * PAUSE)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(2e-3 * PAUSE)
        return grad


def test_times_land_in_their_cells(monkeypatch):
    forward = IIDBatchNorm1d.forward
    monkeypatch.setattr(
        IIDBatchNorm1d,
        "forward",
        lambda self, x: forward(self, GeometricTensor(Slow.apply(x.tensor), x.type, x.coords)),
    )
    results = qm9_step.measure(3, batch_size=4)
    parts = results["parts"]
    assert set(parts) == {*qm9_step.PARTS.values(), qm9_step.BATCH, qm9_step.REST, qm9_step.OPTIMIZER}
    assert all(sum(ms.values()) > 0 for ms in parts.values())
    norms = parts["node norms"]  # two in each of four blocks
    assert norms["forward"] >= 8 * PAUSE
    assert norms["backward"] >= 16 * PAUSE
    assert results["step"]["median_ms"] >= 24 * PAUSE
    assert all(parts[name][phase] < 8 * PAUSE for name in parts if name != "node norms" for phase in parts[name])


def test_prints_a_table(capsys):
    assert qm9_step.main(["--repeats", "3", "--batch-size", "4", "--threads", str(torch.get_num_threads())]) == 0
    printed = capsys.readouterr().out
    assert "4 molecules (made-up molecules; " in printed
    assert all(f"| {part}" in printed for part in qm9_step.PARTS.values())


def test_made_up_molecules_are_of_qm9s_size():
    data = qm9_step.synthetic(500)
    sizes, bonds = np.diff(data.ptr), np.diff(data.edge_ptr) // 2
    assert sizes.min() == 12
    assert sizes.max() == 24
    assert sizes.mean() == pytest.approx(18, abs=0.5)
    assert np.array_equal(bonds, sizes)
    molecule = data[7]
    pairs = {*zip(*molecule.edge_index.tolist(), strict=True)}
    assert pairs == {(j, i) for i, j in pairs}
    assert len({node for pair in pairs for node in pair}) == len(molecule.pos)
