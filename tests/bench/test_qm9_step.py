"""The benchmark of the training step: what a part takes lands in its cell of the table."""

import importlib.util
import time

import numpy as np
import pytest
import torch
from escnn.nn import GeometricTensor

from bench import qm9_step
from implicit_steer.nn import IIDBatchNorm1d
from implicit_steer.ops.select import BACKENDS

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
    sizes = ["--channels", "3", "--max-frequency", "2"]
    options = ["--steps", "3", "--batch-size", "4", *sizes, "--threads", str(torch.get_num_threads())]
    assert qm9_step.main(options) == 0
    printed = capsys.readouterr().out
    assert "3 fields l <= 2 per layer, 4 molecules (made-up molecules; " in printed
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


# ---- against another backend

AGAINST_REFERENCE = ["--against", "reference", "--steps", "2", "--batch-size", "4"]


def test_blocks_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = qm9_step.by_turns(steps, 25)
    sizes = [3] * 8 + [1]
    assert "".join(calls) == "".join(n * "a" + n * "b" for n in sizes)
    assert [[len(block) for block in blocks] for blocks in times.values()] == [sizes, sizes]


def test_what_blocks_make_of_their_times(monkeypatch):
    """Medians of all steps; of the blocks' ratios 10, 20, 30 the quartiles."""
    blocks = {"auto": [[1e-3, 9e-3, 2e-3], [2e-3], [3e-3]], "reference": [[20e-3, 1.0, 0.0], [40e-3], [90e-3]]}
    monkeypatch.setattr(qm9_step, "by_turns", lambda steps, count: blocks)
    found = qm9_step.compare("reference", 5, batch_size=4)
    assert found["ratio"] == pytest.approx([15, 20, 25])
    assert [found["times"][name]["median_ms"] for name in blocks] == pytest.approx([2, 40])
    printed = qm9_step.comparison_text(found)
    assert "Ratio 20.0 (quartiles over blocks 15.0 to 25.0), 5 steps each." in printed
    assert [line.split("|")[-2].strip() for line in printed.splitlines() if line.startswith(("| a", "| r"))] == [
        "50",
        "1000",
    ]


def test_the_other_backend_runs(monkeypatch):
    """Nine convolutions in each of its steps."""
    forward, calls = BACKENDS["reference"].forward, []
    monkeypatch.setattr(BACKENDS["reference"], "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    qm9_step.compare("reference", 2, batch_size=4)
    assert len(calls) == 9 * (1 + qm9_step.WARM_UP + 2)


def test_both_have_the_same_batches(monkeypatch):
    gather, asked = qm9_step.MoleculeSet.__getitems__, []
    monkeypatch.setattr(
        qm9_step.MoleculeSet, "__getitems__", lambda self, ids: asked.append(tuple(ids)) or gather(self, ids)
    )
    qm9_step.compare("eager", 2, batch_size=4)
    gate, *timed = asked
    assert len(timed) == 2 * (1 + qm9_step.WARM_UP + 2)
    assert timed[0] == gate
    assert all(timed.count(ids) == 2 for ids in timed)


@pytest.mark.parametrize("rival", ["reference", "materialise"])
def test_prints_times_of_an_epoch(rival, capsys):
    options = ["--against", rival, *AGAINST_REFERENCE[2:], "--threads", str(torch.get_num_threads())]
    assert qm9_step.main(options) == 0
    printed = capsys.readouterr().out
    assert "Gate: green" in printed
    assert "epoch of 25,000 steps" in printed
    assert all(f"| {name}" in printed for name in ("auto", rival))


def test_materialise_is_the_authors_algorithm(monkeypatch):
    """Their sampling in its steps and in the one whose gradients are compared with it; ours is timed at our own."""
    built, made = [], qm9_step.QM9Net
    monkeypatch.setattr(qm9_step, "QM9Net", lambda **options: built.append(options) or made(**options))
    sizes = {"channels": 3, "max_frequency": 0}
    qm9_step.compare("materialise", 2, batch_size=4, sizes=sizes)
    assert all(o.items() >= sizes.items() for o in built)
    assert sorted((o["backend"], o["sampling"]) for o in built) == [
        ("auto", "auto"),
        ("auto", "escnn"),
        ("reference", "escnn"),
    ]


def test_different_gradients_are_not_timed(monkeypatch, capsys):
    forward = BACKENDS["reference"].forward

    def wrong(*arguments):
        out, statistics = forward(*arguments)
        return 1.01 * out, statistics

    monkeypatch.setattr(BACKENDS["reference"], "forward", wrong)
    assert qm9_step.main([*AGAINST_REFERENCE, "--threads", str(torch.get_num_threads())]) == 1
    printed = capsys.readouterr().out
    assert "RED" in printed
    assert "Ratio" not in printed
