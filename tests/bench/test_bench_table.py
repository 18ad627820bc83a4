"""``python -m bench table``: everything is measured, and bounds that do not hold are told."""

import json

import pytest
import torch

from bench import process, table
from bench.__main__ import main
from implicit_steer.plan import FUNCTIONS


@pytest.fixture
def small(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(table, "DEPTHS", (3, 4))
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("small")
def test_quick_run(tmp_path, capsys):
    assert main(["table", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "table.json").read_text())
    assert [(r["n_layers"], r["n_channels"], r["measure"]) for r in results["speed"]] == [
        (*size, measure) for size in table.SIZES for measure in table.MEASURES
    ]
    assert all(r["ratio"] == pytest.approx(r["mlp"] / r["table"]) and r["table"] > 0 for r in results["speed"])
    assert results["materialised"]["ratio"] > 1
    assert [r["activation"] for r in results["errors"]] == list(FUNCTIONS)
    assert all(1 > max(r["errors"].values()) > min(r["errors"].values()) > 0 for r in results["errors"])
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().strip() in printed
    assert "Bounds that do not hold:\n- none" in printed
    assert all((tmp_path / f"table-{name}.png").stat().st_size > 5000 for name in ("error", "depth"))


def test_the_order_of_smooth_activations():
    smooth = {r["activation"]: r["order"] for r in table.errors((128, 256)) if r["activation"] not in ("elu", "relu")}
    assert all(3 < order < 5 for order in smooth.values()), smooth


def test_memory_is_asked_of_fresh_processes(monkeypatch):
    asked = []
    monkeypatch.setattr(process, "ask", lambda function, *a, threads: asked.append((function, *a)) or 2_000_000)
    assert table.memory(1000, 1) == [{"measure": m, "mlp": 2.0, "table": 2.0} for m in table.MEASURES]
    assert {a[1] for a in asked} == {"0", "256"}
    assert table.peak_bytes("16", "forward", "320") >= 0


def test_bounds_that_do_not_hold():
    def results(ratio, growth, naive):
        speed = [{"n_layers": 3, "n_channels": 8, "measure": "forward", "ratio": ratio, "bound": 1.8}]
        deep = [{"measure": "training", "growth": growth}]
        return {"speed": speed, "depth": deep, "materialised": {"ratio": naive, "bound": 300}}

    assert table.broken(results(1.8, 1.1, 300)) == []
    assert table.broken(results(1.7, 1.2, 299)) == [
        "3 layers of 8 channels, forward: 1.70 times the MLP's speed, bound 1.8",
        "10 layers, training: 1.20 times the time of 3, bound 1.1",
        "299 times the speed of materialise, bound 300",
    ]
