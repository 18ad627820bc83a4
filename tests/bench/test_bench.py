"""The benchmark measures what it says, and nothing that is wrong."""

import json
import time
from dataclasses import replace

import pytest
import torch

from bench import accuracy, bound, device, forces, process, related, report, scaling, small, speed, steps
from bench.__main__ import main
from bench.compiled import compiled_call
from bench.steps import COMPILED, MATERIALISE, MEASURES, TOLERANCE, Candidate, candidates, gate, relative_error, step
from bench.timing import interleaved, summary
from implicit_steer import _native
from implicit_steer.ops import select
from implicit_steer.ops.reference.eager import Eager
from implicit_steer.plan import FUNCTIONS
from implicit_steer.testing import cases

CASE = cases.SMALL["o3"]


@pytest.fixture(autouse=True)
def threads():
    """The command line sets torch's threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wrong_by(factor):
    """The eager backend, with outputs off by ``factor``."""

    class Wrong(Eager):
        def forward(self, *arguments):
            out, statistics = super().forward(*arguments)
            return factor * out, statistics

    return Wrong()


# ---- the whole command


def test_quick_run_writes_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "SORTED_EDGES", (1200,))
    assert main(["--quick", "--cases", "o3", "--threads", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "speed.json").read_text())
    runners = [name for name, (ok, _) in select.availability().items() if ok]
    expected = {(m, b, s) for m in MEASURES for b in runners for s in ("auto", "escnn")}
    expected -= {(m, "reference", "auto") for m in MEASURES}
    expected -= {
        (m, *who.split(", ")) for m in MEASURES for who in results["skipped"]["o3"]
    }  # backends that do not support it
    forms = () if "e3nn" in results["skipped"]["o3"] else related.FORMS
    expected |= {(m, "e3nn", form) for m in ("forward", "train") for form in forms}
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
    monkeypatch.setitem(select.BACKENDS, "eager", wrong_by(1 + 1e-3))
    monkeypatch.setattr(speed, "times", lambda *_: pytest.fail("timed on a red gate"))
    assert main(["--quick", "--cases", "o3", "--backends", "eager", "--out", str(tmp_path)]) == 1
    assert "Gate: RED" in capsys.readouterr().out
    results = json.loads((tmp_path / "speed.json").read_text())
    assert "times" not in results
    assert [check["ok"] for check in results["gate"]] == [False]
    assert results["gate"][0]["error"] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(("name", "reason"), [("nonsense", "unknown"), ("later", "not built")])
def test_a_backend_asked_for_by_name_runs_or_says_why(name, reason, tmp_path, capsys, monkeypatch):
    known = select.availability() | {"later": (False, "not built")}
    monkeypatch.setattr(select, "availability", lambda: known)
    with pytest.raises(SystemExit):
        main(["--backends", name, "--out", str(tmp_path)])
    assert reason in capsys.readouterr().err


# ---- the gate


@pytest.mark.parametrize("factor", [1 + 4 * TOLERANCE, float("nan")])
def test_gate_is_red_on_small_and_on_undefined_errors(factor, monkeypatch):
    monkeypatch.setitem(select.BACKENDS, "eager", wrong_by(factor))
    checks = list(gate(CASE, [MATERIALISE, Candidate("eager", "auto")]))
    assert [check.measure for check in checks] == list(MEASURES)
    assert not any(check.ok for check in checks)


def test_gate_sees_a_wrong_gradient(monkeypatch):
    class Wrong(Eager):
        def forward(self, plan, parameters, statistics_from, graph, x, delta, attributes):
            return super().forward(plan, parameters, statistics_from, graph, x, delta.detach(), attributes)

    monkeypatch.setitem(select.BACKENDS, "eager", Wrong())
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
    class Narrow(Eager):
        def supports(self, plan, device, dtype):
            return plan.sampling == "escnn", "grids only"

    monkeypatch.setitem(select.BACKENDS, "eager", Narrow())
    found, skipped = candidates(CASE, ["reference", "eager"])
    ours = [c for c in found if c.backend in select.BACKENDS]
    assert ours == [MATERIALISE, Candidate("eager", "escnn")]
    assert skipped["eager, auto"] == "grids only"
    _, skipped = candidates(cases.SMALL["o3-vector-attr"], ["reference"])
    assert list(skipped) == ["auto", "e3nn"]


# ---- the instruments


def test_rounds_are_interleaved_and_within_the_budget():
    calls = []
    runs = {name: lambda name=name, s=s: (calls.append(name), time.sleep(s)) for name, s in (("a", 0.03), ("b", 0.008))}
    times = interleaved(runs, rounds=50, budget=0.3)
    turn = calls[4:].index("a", 1)  # after two calls each that do not count
    assert calls == ["a"] * 2 + ["b"] * 2 + (["a"] + ["b"] * (turn - 1)) * len(times["a"])
    assert 2 <= turn - 1 <= 3  # as many as last 20 ms
    assert 3 <= len(times["a"]) == len(times["b"]) <= 7
    assert min(times["a"]) >= 0.03
    assert min(times["b"]) >= 0.008
    assert summary([0.001, 0.002, 0.003, 0.004, 0.1]) == pytest.approx(
        {"median_ms": 3, "q1_ms": 2, "q3_ms": 4, "rounds": 5}
    )


def test_peak_memory_counts_what_is_freed_again():
    def run():
        for _ in range(2):
            torch.ones(16_000_000)  # 64 MB

    assert process.peak_memory(run) == pytest.approx(64e6, rel=0.1)


def test_memory_of_a_case_in_a_process_of_its_own():
    peaks = process.ask(speed.peaks, "o3", "reference/escnn", "eager/auto", threads=1)
    assert list(peaks) == ["reference/escnn", "eager/auto"]
    assert all(set(of) == set(MEASURES) for of in peaks.values())
    assert all(0 <= peak < 50 for of in peaks.values() for peak in of.values())


def test_sorting_is_measured_against_argsort(monkeypatch):
    monkeypatch.setattr(speed, "SORTED_EDGES", (3200,))
    (record,) = speed.sorting(rounds=3, budget=0.0)
    assert (record["edges"], record["nodes"]) == (3200, 100)
    assert record["ratio"] == pytest.approx(record["argsort"]["median_ms"] / record["sort_by_key"]["median_ms"])


def test_losers_are_listed():
    row = {"case": "o3", "candidate": "eager, auto", "backend": "eager", "sampling": "auto"}
    row |= {"ratio": 0.5, "median_ms": 1.0}
    results = {"times": [row | {"measure": m} for m in MEASURES], "memory": [], "sorting": [], "lowering": {}}
    text = report.speed_text(results | {"skipped": {"o3": {"cpu, auto": "not built"}}})
    assert "- o3, eager, auto, train: time 0.50x" in text
    assert "not run: cpu, auto (not built)" in text


# ---- comparators


def test_every_rival_of_cpu_is_compared_and_the_faster_ones_are_listed():
    def record(backend, sampling, milliseconds, measure):
        place = {"case": "cloud", "measure": measure, "ratio": None, "median_ms": milliseconds}
        return place | {"candidate": f"{backend}, {sampling}", "backend": backend, "sampling": sampling}

    ours = [record("cpu", "auto", 2.0, m) for m in MEASURES] + [record("cpu", "escnn", 8.0, m) for m in MEASURES]
    eager = [record("eager", "auto", 6.0, m) for m in MEASURES] + [record("eager", "escnn", 7.0, m) for m in MEASURES]
    others = [record("eager, compiled", "auto", 1.0, "train"), record("e3nn", "NequIP form", 1.5, "forward")]
    found = {(r["rival"], r["sampling"], r["measure"]): r["factor"] for r in report.rivals([*ours, *eager, *others])}
    assert {f for (_, sampling, _), f in found.items() if sampling == "escnn"} == {7 / 8}
    assert found["eager, compiled, auto", "auto", "train"] == 0.5
    assert len(found) == 2 * len(MEASURES) + 2
    results = {"times": [*ours, *eager, *others], "memory": [], "sorting": [], "lowering": {}, "skipped": {}}
    text = report.speed_text(results)
    assert "| cloud, auto    |   3.00x | 3.00x |       3.00x |" in text
    lost = text.partition("Worse than the comparator:\n")[2].splitlines()
    assert len(lost) == len(MEASURES) + 2
    assert "- cloud, cpu, auto, forward: time 0.75x of e3nn, NequIP form" in lost


def test_a_reference_that_is_too_large_is_not_run_and_says_why():
    found, skipped = candidates(cases.LARGE["materials"], ["reference", "eager"])
    assert skipped["materialise"] == "would need about 14.7 GB"  # 6 x 600,000 x 32 x 32 x 4 bytes
    assert "materialise" not in {c.label for c in found}
    row = {"case": "materials", "backend": "eager", "sampling": "auto", "candidate": "eager, auto", "median_ms": 2.0}
    results = {"times": [row | {"measure": "train", "ratio": None}], "memory": [], "sorting": [], "lowering": {}}
    text = report.speed_text(results | {"skipped": {"materials": skipped}})
    assert "not run: materialise (would need about 14.7 GB)" in text


def test_a_large_case_is_checked_on_fewer_nodes():
    small = steps.checked_case(cases.LARGE["materials"])
    assert (small.nodes, small.degree, small.uniform) == (678, 60, True)  # 1 GB of 14.7
    assert steps.reference_bytes(small) <= steps.GATE_LIMIT
    assert steps.checked_case(CASE) == CASE


@pytest.mark.parametrize("measure", COMPILED.measures)
def test_what_is_compiled_records_the_call_and_its_derivatives(measure, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda recorded, dynamic: recorded)
    conv = CASE.layer(norm=steps.NORMS[measure], backend="eager").train(measure != "forward")
    problem = CASE.inputs(conv)
    leaves = [*problem.requires_grad(), *conv.parameters()]
    ours, expected = compiled_call(conv, problem)(), problem.run(conv)
    assert relative_error(ours.detach(), expected.detach()) <= TOLERANCE
    pairs = zip(*(torch.autograd.grad(out, leaves, out.detach()) for out in (ours, expected)), strict=True)
    assert max(relative_error(a, b) for a, b in pairs) <= TOLERANCE


def test_why_eager_could_not_be_compiled_is_reported(monkeypatch):
    def compile_(*_, **__):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", compile_)
    found, skipped = candidates(cases.SMALL["o3-l2"], ["eager"], compile_eager=True)
    assert skipped[COMPILED.label] == "no compiler"
    assert COMPILED not in found


@pytest.mark.parametrize("form", related.FORMS)
@pytest.mark.parametrize("name", ["o3", "o3-l2", "o3-no-attr", "o3-mixed"])
def test_related_operators_are_equivariant_layers_of_equal_widths(name, form):
    o3 = pytest.importorskip("e3nn.o3")
    torch.manual_seed(0)
    case = replace(cases.SMALL[name], knn=True)  # at distance 0 e3nn's Bessel functions are NaN
    assert related.why_not(case) is None
    conv = case.layer()
    problem = case.inputs(conv)
    size = 0 if conv.edge_attr_type is None else conv.edge_attr_type.size
    layer = related.Layer(related.irreps(conv.in_type), related.irreps(conv.out_type), size, form)
    assert (layer.into.dim, layer.out.dim) == (conv.in_type.size, conv.out_type.size)
    matrix = -o3.rand_matrix()  # a rotation and the inversion
    into, out = (irreps.D_from_matrix(matrix) for irreps in (layer.into, layer.out))
    moved = replace(problem, x=problem.x @ into.T, delta=problem.delta @ matrix.T)
    with torch.no_grad():
        expected = layer(problem) @ out.T
        assert float((layer(moved) - expected).norm() / expected.norm()) < 1e-4


def test_related_operators_have_their_domain():
    pytest.importorskip("e3nn")
    assert related.why_not(cases.SMALL["so2"]) == "only for O(3)"
    assert related.why_not(cases.SMALL["o3-vector-attr"]) == "only for scalar attributes"


def test_kernels_of_others_are_measured_where_they_are_installed(monkeypatch):
    gpu = torch.device("cuda")
    assert related.forms(torch.device("cpu")) == (
        list(related.FORMS),
        dict.fromkeys(related.KERNELS, "its kernels are for GPUs"),
    )
    monkeypatch.setattr(related.importlib.util, "find_spec", lambda name: name == "openequivariance" or None)
    found, skipped = related.forms(gpu)
    assert found == [*related.FORMS, "NequIP form, OpenEquivariance"]
    assert skipped == {"NequIP form, cuEquivariance": "cuequivariance_torch is not installed"}
    found = step(replace(CASE, knn=True), Candidate("e3nn", "NequIP form"), "train")()
    assert {"output", "x", "edge_delta", "edge_attr"} < set(found)
    assert all(float(tensor.abs().max()) > 0 for tensor in found.values())


# ---- cases


def test_the_box_is_uniform_and_every_space_has_a_case():
    case = replace(cases.LARGE["materials"], nodes=1000)
    delta = case.inputs(case.layer()).delta
    assert len(delta) == case.edges == 60_000
    assert float(delta.norm(dim=1).mean()) == pytest.approx(1, rel=0.2)
    assert set(cases.GROUPS) == set(cases.SPACES)


# ---- the arithmetic bound


def test_lane_operations_are_those_counted_by_hand():
    count = bound.lane_operations(cases.LARGE["cloud"].layer().implicit_kernel.plan, 1 / 32)
    assert count == {
        "linear layers": 2 * 8 + 4 * 64,  # two scalars to 8 scalars; 8 to 8 channels of 4 coefficients
        "samples": 8 * 10 * (1 + 4) + 8 * 10 * (4 + 3) + 8 * 10,
        "φ": 2 * 8 * 10 * 11,
        "coupling": 21 * 8 + 11 * 64 + 4 * 8,
        "mixing": 5888 / 32,
    }
    assert set(bound.PHI) == set(FUNCTIONS)


@pytest.mark.skipif(not _native.available()[0], reason="needs the native extension")
def test_the_bound_is_the_count_over_the_peak():
    torch.set_num_threads(1)
    baseline, widest = (torch.ops.implicit_steer.fma_peak(isa) for isa in (1, 0))
    assert baseline > 1e8
    assert 0.5 * baseline < widest < 1e13
    found = bound.measure([CASE], rounds=3, budget=0.0)
    (record,) = found["records"]
    assert record["bound_ms"] == pytest.approx(1e3 * 60 * sum(record["count"].values()) / found["peak"])
    assert record["operator share"] == pytest.approx(record["bound_ms"] / record["operator"])
    assert "| o3   |" in bound.text(found)


# ---- scaling and small graphs


def linear_costs(function, edges, backend, sampling, threads):
    per_edge = {"reference": 1e6, "eager": 4e3, "cpu": 500}[backend]
    found = {"bytes": per_edge * int(edges), "seconds": 1e-6 * int(edges)}
    return dict.fromkeys(scaling.MEASURES, found)


def test_scaling_stops_where_the_next_size_does_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(process, "ask", linear_costs)
    sizes = ["3200", "320000", "320000000"]
    assert main(["scaling", "--edges", *sizes, "--out", str(tmp_path)]) == 0
    curves = json.loads((tmp_path / "scaling.json").read_text())["curves"]
    assert {label: len(curve["records"]) for label, curve in curves.items()} == {
        "materialise": 1,
        "eager, auto": 2,
        "cpu, auto": 2,
    }
    assert curves["materialise"]["ends"].startswith("needs ~320 GB")
    printed = capsys.readouterr().out
    assert "not run beyond: needs ~1280 GB" in printed
    assert "`cpu` above its 600 bytes per edge:\n- nowhere" in printed
    assert all((tmp_path / f"scaling-{name}.png").stat().st_size > 5000 for name in ("time", "memory"))
    monkeypatch.setattr(scaling, "TARGET", 400)
    assert "- 3,200 edges: 500" in scaling.text(curves)


@pytest.mark.skipif(not process.measures_memory(), reason="this system does not tell peak memory")
def test_one_size_of_the_scaling_is_measured():
    found = scaling.costs("1600", "eager", "auto")
    assert set(found) == set(scaling.MEASURES)
    assert all(0 < f["seconds"] < 60 and 0 <= f["bytes"] < 1e9 for f in found.values())
    assert scaling.sized(1600).edges == 1600


def test_overhead_of_small_graphs(tmp_path, capsys, monkeypatch):
    calls = {name: (make, kind, target and 1e-3) for name, (make, kind, target) in small.CALLS.items()}
    monkeypatch.setattr(small, "CALLS", calls)
    assert main(["small", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    calls = json.loads((tmp_path / "small.json").read_text())["calls"]
    names = [name for name, (ok, _) in select.availability().items() if ok]
    made = {(call, name) for call, (make, *_) in small.CALLS.items() for name in names if make is not small.native_step}
    made |= {(call, "cpu") for call in small.CALLS if "cpu" in names}
    assert {(r["call"], r["backend"]) for r in calls} == made
    assert all(r["us"] > 1 for r in calls)
    missed = capsys.readouterr().out.partition("`cpu` above its target:")[2]
    assert missed.count("- operator") == missed.count("- module") == (2 if "cpu" in names else 0)


# ---- energy and forces


@pytest.fixture
def small_forces(monkeypatch):
    """One small case instead of the cloud, and made-up peaks of memory."""
    monkeypatch.setattr(forces, "CASE", replace(cases.SMALL["o3"], knn=True))
    monkeypatch.setattr(forces, "CHECKED_NODES", 12)
    peaks = {"reference": 10**6, "eager": 10**5, "cpu": 10**4}
    monkeypatch.setattr(process, "ask", lambda function, backend, sampling, threads: peaks[backend])
    monkeypatch.setattr(process, "measures_memory", lambda: True)


@pytest.mark.usefixtures("small_forces")
def test_training_on_forces(tmp_path, capsys, monkeypatch):
    assert main(["forces", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "forces.json").read_text())
    names = [name for name, (ok, _) in select.availability().items() if ok]
    rest = [f"{name}, {s}" for s in steps.SAMPLINGS for name in names if (name, s) != ("reference", "escnn")]
    assert [r["candidate"] for r in results["records"]] == ["materialise", *rest]
    assert set(results["errors"]) == {label for label in rest if not label.startswith("reference")}
    assert all(0 <= error < forces.TOLERANCE for error in results["errors"].values())
    assert "Gate: green" in capsys.readouterr().out
    monkeypatch.setattr(process, "measures_memory", lambda: False)
    assert main(["forces", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(forces, "TOLERANCE", 0.0)
    assert main(["forces", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 1
    assert "Gate: RED: nothing was timed" in capsys.readouterr().out


def test_targets_of_training_on_forces():
    times = {"materialise": 400.0, "eager, auto": 49.0, "cpu, auto": 10.0, "eager, escnn": 60.0, "cpu, escnn": 11.0}
    records = [{"candidate": name, "median_ms": ms, "bytes": None} for name, ms in times.items()]
    assert forces.missed(records) == [
        "- cpu, auto: 4.9x eager, auto, below 5x",
        "- cpu, escnn: 36.4x materialise, below 40x",
    ]
    records[2]["bytes"] = 1501 * forces.CASE.edges
    assert "- cpu, auto: 1,501 bytes per edge" in forces.missed(records)


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


def test_text_of_a_gpu():
    """Times with what they need of memory, and the kernels in them."""
    measured = {"case": "cloud", "measure": "train", "candidate": "cuda, auto"}
    times = {"median_ms": 3.3, "q1_ms": 3.2, "q3_ms": 3.4, "ratio": 7.3, "backend": "cuda", "sampling": "auto"}
    text = device.text_of(
        {
            "device": "a GPU",
            "ceilings": {"copy, GB/s": 3000.0},
            "times": [measured | times, measured | times | {"candidate": "e3nn", "ratio": None}],
            "memory": [measured | {"peak_mb": 58.8}],
            "kernels": [measured | {"kernel": "conv_backward", "us": 2356.9}],
            "cold starts": [measured | {"seconds": 0.5}],
        },
        [],
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["cloud, train", "cuda, auto", "3.300", "3.200–3.400", "7.3", "58.8"] in rows
    assert ["cloud, train", "e3nn", "3.300", "3.200–3.400", "", ""] in rows
    assert ["cloud, train", "cuda, auto", "`conv_backward`", "2356.9"] in rows
