"""The benchmark measures what it says, and nothing that is wrong."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from bench import accuracy, fresh, report, speed
from bench.__main__ import main
from bench.steps import MATERIALISE, MEASURES, TOLERANCE, Candidate, candidates, gate, relative_error, step
from bench.timing import interleaved, summary
from implicit_steer import backends, cases
from implicit_steer.backends import eager

CASE = cases.SMALL["o3"]


@pytest.fixture(autouse=True)
def threads():
    """The command line sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wrong_by(factor):
    """The eager backend, with outputs off by ``factor``."""

    def forward(*args):
        out, statistics = eager.forward(*args)
        return factor * out, statistics

    return SimpleNamespace(supports=eager.supports, forward=forward)


# ---- the whole command


def test_quick_run_writes_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "SORTED_EDGES", (1200,))
    assert main(["--quick", "--cases", "o3", "--threads", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "speed.json").read_text())
    runners = [name for name, (ok, _) in backends.availability().items() if ok]
    expected = {(m, b, s) for m in MEASURES for b in runners for s in ("auto", "escnn")}
    expected -= {
        (m, *who.split(", ")) for m in MEASURES for who in results["skipped"]["o3"]
    }  # backends that do not support it
    assert {(r["measure"], r["backend"], r["sampling"]) for r in results["times"]} == expected
    assert all(0 < r["q1_ms"] <= r["median_ms"] <= r["q3_ms"] and r["rounds"] == 3 for r in results["times"])
    base = {r["measure"]: r["median_ms"] for r in results["times"] if r["candidate"] == "materialise"}
    assert set(base) == set(MEASURES)
    assert all(r["ratio"] == pytest.approx(base[r["measure"]] / r["median_ms"]) for r in results["times"])
    assert results["gate"]
    assert all(check["ok"] and check["error"] <= TOLERANCE for check in results["gate"])
    assert results["sorting"][0]["ratio"] > 0
    assert results["environment"]["threads"] == 1
    assert results["environment"]["implicit_steer"]["versions"]["torch"] == torch.__version__
    assert "Gate: green" in printed
    assert "| materialise" in printed
    assert (tmp_path / "speed.md").read_text().strip() in printed
    assert (tmp_path / "times-o3.png").stat().st_size > 5000


def test_red_gate_stops_before_any_timing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "eager", wrong_by(1 + 1e-3))
    monkeypatch.setattr(speed, "times", lambda *_: pytest.fail("timed on a red gate"))
    assert main(["--quick", "--cases", "o3", "--backends", "eager", "--out", str(tmp_path)]) == 1
    assert "Gate: RED" in capsys.readouterr().out
    results = json.loads((tmp_path / "speed.json").read_text())
    assert "times" not in results
    assert [check["ok"] for check in results["gate"]] == [False]
    assert results["gate"][0]["error"] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(("name", "reason"), [("nonsense", "unknown"), ("later", "not built")])
def test_a_backend_asked_for_by_name_runs_or_says_why(name, reason, tmp_path, capsys, monkeypatch):
    known = backends.availability() | {"later": (False, "not built")}
    monkeypatch.setattr(backends, "availability", lambda: known)
    with pytest.raises(SystemExit):
        main(["--backends", name, "--out", str(tmp_path)])
    assert reason in capsys.readouterr().err


# ---- the gate


@pytest.mark.parametrize("factor", [1 + 4 * TOLERANCE, float("nan")])
def test_gate_is_red_on_small_and_on_undefined_errors(factor, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "eager", wrong_by(factor))
    checks = list(gate(CASE, [MATERIALISE, Candidate("eager", "auto")]))
    assert [check.measure for check in checks] == list(MEASURES)
    assert not any(check.ok for check in checks)


def test_gate_sees_a_wrong_gradient(monkeypatch):
    def forward(plan, weights, live, graph, x, delta, attributes):
        return eager.forward(plan, weights, live, graph, x, delta.detach(), attributes)

    monkeypatch.setitem(backends.BACKENDS, "eager", SimpleNamespace(supports=eager.supports, forward=forward))
    forward_check, *training = gate(CASE, [MATERIALISE, Candidate("eager", "auto")])
    assert forward_check.ok
    assert [(check.ok, check.tensor, check.error) for check in training] == 2 * [(False, "edge_delta", 1.0)]


def test_gradients_of_all_inputs_and_parameters_are_compared():
    found = step(CASE, MATERIALISE, "train-batch")()
    parameters = dict(CASE.layer(norm="batch").named_parameters())
    assert set(found) == {"output", "x", "edge_delta", "edge_attr", *parameters}
    assert all(float(tensor.abs().max()) > 0 for tensor in found.values())


def test_relative_error():
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a + torch.tensor([0.0, 0.4]), a) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.25]), torch.zeros(1)) == 0.25
    assert relative_error(a[:1], a) == relative_error(a.double(), a) == float("inf")
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0


def test_unsupported_candidates_are_left_out_with_their_reason(monkeypatch):
    narrow = SimpleNamespace(
        supports=lambda plan, device, dtype: (plan.sampling == "escnn", "grids only"), forward=eager.forward
    )
    monkeypatch.setitem(backends.BACKENDS, "eager", narrow)
    found, skipped = candidates(CASE, ["reference", "eager"])
    assert found == [MATERIALISE, Candidate("reference", "auto"), Candidate("eager", "escnn")]
    assert skipped == {"eager, auto": "grids only"}
    _, skipped = candidates(cases.SMALL["o3-vector-attr"], ["reference"])
    assert list(skipped) == ["auto"]


# ---- the instruments


def test_rounds_are_interleaved_and_within_the_budget():
    calls = []
    runs = {name: lambda name=name: (calls.append(name), time.sleep(0.01)) for name in "ab"}
    times = interleaved(runs, rounds=50, budget=0.1)
    assert calls == ["a", "b"] * (1 + len(times["a"]))
    assert 3 <= len(times["a"]) == len(times["b"]) <= 6
    assert min(times["a"]) >= 0.01
    assert summary([0.001, 0.002, 0.003, 0.004, 0.1]) == pytest.approx(
        {"median_ms": 3, "q1_ms": 2, "q3_ms": 4, "rounds": 5}
    )


def test_peak_memory_counts_what_is_freed_again():
    def run():
        for _ in range(2):
            torch.ones(16_000_000)  # 64 MB

    assert fresh.peak_memory(run) == pytest.approx(64e6, rel=0.1)


def test_memory_of_a_case_in_a_process_of_its_own():
    peaks = fresh.ask("memory", "o3", "reference", "escnn", 1)
    assert set(peaks) == set(MEASURES)
    assert all(0 <= peak < 50 for peak in peaks.values())


def test_sorting_is_measured_against_argsort(monkeypatch):
    monkeypatch.setattr(speed, "SORTED_EDGES", (3200,))
    (record,) = speed.sorting(rounds=3, budget=0.0)
    assert (record["edges"], record["nodes"]) == (3200, 100)
    assert record["ratio"] == pytest.approx(record["argsort"]["median_ms"] / record["sort_by_key"]["median_ms"])


def test_losers_are_listed():
    row = {"case": "o3", "measure": "train", "candidate": "eager, auto", "ratio": 0.5, "median_ms": 1.0}
    results = {"times": [row | {"measure": m} for m in MEASURES], "memory": [], "sorting": [], "lowering": {}}
    text = report.speed_text(results | {"skipped": {"o3": {"cpu, auto": "not built"}}})
    assert "- o3, eager, auto, train: time 0.50x" in text
    assert "not run: cpu, auto (not built)" in text


# ---- accuracy


def test_exact_sampling_is_equivariant_and_the_grid_is_not():
    (record,) = accuracy.equivariance(["O(3)"])
    assert record["exact, float64"] < 1e-13
    assert 1e-5 < record["escnn, float64"] < 1


def test_accuracy_tables_and_plot(tmp_path):
    results = {
        "equivariance": accuracy.equivariance(["SO(2) on R2"]),
        "convergence": accuracy.convergence(counts=(6, 24)),
    }
    text = accuracy.text(results)
    assert "| SO(2) on R2 | exact-" in text
    for network in results["convergence"]:
        assert network["errors"][24] < network["errors"][6] / 10
    accuracy.plot(results, tmp_path)
    assert (tmp_path / "convergence.png").stat().st_size > 5000
