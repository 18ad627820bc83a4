"""``python -m bench related``: every cell is measured or says why not, and what misses its target is printed."""

import pytest

from bench import process, related, widths


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(widths, "NODES", {"cpu": 12})
    monkeypatch.setattr(widths, "NEIGHBOURS", 3)
    monkeypatch.setattr(process, "ask", lambda function, *arguments, threads: 1_000_000)


def test_every_cell_is_measured(small):
    results = widths.measure([2], rounds=1, budget=0.0)
    cells = {(r["threads"], r["width"], r["candidate"], r["measure"]) for r in results["times"]}
    candidates = (*widths.OURS, *related.FORMS)
    assert cells == {(n, 2, c, m) for n in widths.THREADS["cpu"] for c in candidates for m in widths.TARGETS}
    assert all(r["median_ms"] > 0 for r in results["times"])
    assert {r["peak_mb"] for r in results["memory"]} == {1.0}
    text = widths.text(results)
    assert all(f"| 2, {candidate}" in text for candidate in candidates)
    assert all(f"not run: {form} (its kernels are for GPUs)" in text for form in related.KERNELS)


def test_what_would_not_fit_says_so(small, monkeypatch):
    monkeypatch.setattr(widths.os, "sysconf", lambda name: 1)
    results = widths.measure([2], rounds=1, budget=0.0)
    assert {r["candidate"] for r in results["times"]} == set(widths.OURS)
    assert f"not run: {related.FORMS[0]}, width 2, training (its weights per edge take 0 GB)" in widths.text(results)


def test_cells_that_miss_their_target_are_named():
    def record(candidate, median):
        return {"threads": 1, "width": 8, "candidate": candidate, "measure": "forward", "median_ms": median}

    times = [record("full", 2.0), record("depthwise", 0.5), record(widths.BASELINE, 10.0)]
    assert widths.losers(times) == ["- full, width 8, forward, 1 threads: 5.0 times NequIP form, target 10"]


def test_a_gpu_has_one_column_for_each_measure():
    record = {"threads": 1, "width": 8, "candidate": "full", "measure": "forward", "median_ms": 0.125}
    weighed = {"width": 8, "candidate": "full", "measure": "forward", "peak_mb": 3.0}
    text = widths.text({"device": "cuda", "times": [record], "memory": [weighed], "skipped": {}})
    assert "4096 nodes, 131,072 edges, float32, cuda" in text
    assert text.count("/ ms") == len(widths.TARGETS)
    assert "0.125" in text
