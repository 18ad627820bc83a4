"""``python -m bench --device cuda``: the gate, then every backend and e3nn's layers, with what the device can do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from implicit_steer.ops import gpu_cost
from implicit_steer.ops.triton.configuration import seconds
from implicit_steer.testing.cases import Case

from . import report, speed
from .steps import MEASURES, Candidate, candidates, layer, step

_COPIED, _MULTIPLIED = 1 << 28, 4096  # bytes of a copy; rows of square matrices
_PROFILED = 5  # calls


def ceilings(device: torch.device, copied: int = _COPIED, rows: int = _MULTIPLIED) -> dict[str, float]:
    """What this device reaches: GB/s of a copy, read and written; TFLOP/s of float32 matrix products as torch's
    precision has them, and in TF32."""
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy, GB/s": 2 * copied / seconds(lambda: target.copy_(source), device) / 1e9}
    a, before = torch.randn(rows, rows, device=device), torch.get_float32_matmul_precision()
    for label, precision in (("float32", "highest"), ("TF32", "high")):
        torch.set_float32_matmul_precision(precision)
        try:
            found[f"{label}, TFLOP/s"] = 2 * rows**3 / seconds(lambda: a @ a, device) / 1e12
        finally:
            torch.set_float32_matmul_precision(before)
    return found


def work(case: Case, sampling: str) -> dict[str, float]:
    """What a forward pass does, counted from the plan: ``flop``, two per multiply-add; ``bytes`` of the tensors that
    Triton's kernels are given, each counted once."""
    from implicit_steer.ops.triton import aot  # which imports triton

    from .predict import bytes_of

    plan = case.layer(norm=None, sampling=sampling, backend="reference").implicit_kernel.plan
    cost, nodes = plan.cost(), case.nodes * case.copies
    flop = 2 * (
        case.edges * (cost["mlp per edge"] + cost["sparse coupling per edge"]) + nodes * cost["mixing per node"]
    )
    launches = [e for e in aot.launches_of(plan) if e.kernel.__name__.endswith("forward")]
    kept = [e for e in launches if not e.constants.get("STORE_Y")]
    return {"flop": flop, "bytes": sum(bytes_of(e, 64, 64 * 32) for e in kept) * case.edges / (64 * 32)}


def cold_starts(case: Case, chosen: Sequence[Candidate], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each candidate's first call, its compilation included."""
    found = []
    for candidate in chosen:
        run = step(case, candidate, "forward")
        found.append({"case": case.name, "candidate": candidate.label, "seconds": _once(run, device)})
    return found


def _once(run, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peaks(case: Case, chosen: Sequence[Candidate], device: torch.device) -> list[dict[str, Any]]:
    """A record per measure and candidate: most bytes allocated at a time in a call, in MB, beyond its inputs'."""
    found = []
    for measure in MEASURES:
        for candidate in (c for c in chosen if measure in c.measures):
            run = step(case, candidate, measure)
            run()  # what is made once and kept
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run()
            peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6
            found.append({"case": case.name, "measure": measure, "candidate": candidate.label, "peak_mb": peak})
    return found


def kernel_times(case: Case, chosen: Sequence[Candidate], most: int = 4) -> list[dict[str, Any]]:
    """Records of the ``most`` kernels that our backends spend most time in, µs per call, by torch's profiler."""
    found = []
    for measure, candidate in itertools.product(("forward", "train"), chosen):
        if candidate.backend not in gpu_cost.BACKENDS:
            continue
        run = step(case, candidate, measure)
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(_PROFILED):
                run()
            torch.cuda.synchronize()
        kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        of = {"case": case.name, "measure": measure, "candidate": candidate.label}
        for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:most]:
            name = e.key.removeprefix("void ").replace("implicit_steer::", "").replace("gpu::", "").split("(")[0]
            found.append(of | {"kernel": name, "us": e.self_device_time_total / _PROFILED})
        total = sum(e.self_device_time_total for e in kernels) / _PROFILED
        found.append(of | {"kernel": f"all of {sum(e.count for e in kernels) // _PROFILED} launches", "us": total})
    return found


def tune(case: Case, chosen: Sequence[Candidate], device: torch.device) -> dict[str, dict[str, Any]]:
    """Measure and keep the configurations of Triton's kernels: candidate → kernel → configuration."""
    from implicit_steer.ops.triton import configuration
    from implicit_steer.ops.triton.tables import tables

    found = {}
    for candidate in chosen:
        if candidate.backend == "triton":
            plan = layer(case, candidate, None).implicit_kernel.plan
            run, sizes = step(case, candidate, "train"), tables(plan).sizes
            configs = configuration.tune(run, sizes, torch.float32, device)
            found[candidate.label] = {kernel: config._asdict() for kernel, config in configs.items()}
    return found


def keep_times(times: Sequence[dict[str, Any]], cases: Sequence[Case], device: str) -> dict[str, float]:
    """Let "auto" choose between the GPU backends by these times: backend → seconds per predicted instruction."""
    by_name, found = {case.name: case for case in cases}, []
    for r in times:
        if r["backend"] in gpu_cost.BACKENDS and r["measure"] == "forward":
            case = by_name[r["case"]]
            plan = case.layer(sampling=r["sampling"], backend="reference").implicit_kernel.plan
            found.append((plan, case.edges, r["backend"], r["median_ms"] / 1e3))
    return gpu_cost.keep_times(device, found)


def achieved(times: Sequence[dict[str, Any]], cases: Sequence[Case], limits: dict[str, float]) -> list[list[str]]:
    """Rows of the table of `triton`'s forward passes against the ceilings."""
    rows, by_name = [], {case.name: case for case in cases}
    for r in times:
        if r["backend"] == "triton" and r["measure"] == "forward":
            amount, took = work(by_name[r["case"]], r["sampling"]), r["median_ms"] / 1e3
            bandwidth, rate = amount["bytes"] / took / 1e9, amount["flop"] / took / 1e12
            shares = bandwidth / limits["copy, GB/s"], rate / limits["float32, TFLOP/s"]
            name = f"{r['case']}, {r['sampling']}"
            rows.append([name, f"{bandwidth:.0f}", f"{shares[0]:.0%}", f"{rate:.2f}", f"{shares[1]:.0%}"])
    return rows


def text_of(results: dict[str, Any], rows: list[list[str]]) -> str:
    """Times, cold starts, ceilings and what was reached of them."""
    name = results["device"]
    limits = ", ".join(f"{label} {value:.1f}" for label, value in results["ceilings"].items())
    peak = {(r["case"], r["measure"], r["candidate"]): f"{r['peak_mb']:.1f}" for r in results["memory"]}
    times = [
        [
            f"{r['case']}, {r['measure']}",
            r["candidate"],
            f"{r['median_ms']:.3f}",
            f"{r['q1_ms']:.3f}–{r['q3_ms']:.3f}",
            f"{r['ratio']:.1f}" if r["ratio"] else "",
            peak.get((r["case"], r["measure"], r["candidate"]), ""),
        ]
        for r in results["times"]
    ]
    kernels = [
        [f"{r['case']}, {r['measure']}", r["candidate"], f"`{r['kernel']}`", f"{r['us']:.1f}"]
        for r in results["kernels"]
    ]
    starts = [[r["case"], r["candidate"], f"{r['seconds']:.2f}"] for r in results["cold starts"]]
    reached = ["forward pass of triton", "GB/s", "of copy", "TFLOP/s", "of float32"]
    return "\n\n".join(
        [
            f"{name}: measured ceilings: {limits}. e3nn: related operators, other functions.",
            report.table(
                ["case", "candidate", f"ms on {name}", "quartiles", "× faster than materialise", "peak MB"], times
            ),
            report.table(["case", "candidate", "kernel", "µs"], kernels),
            report.table(["case", "candidate", "first call, s"], starts),
            report.table(reached, rows),
        ]
    )


def run(
    cases: Sequence[Case], names: list[str], compiled: Sequence[str], effort: tuple[int, float], out: Path, tuned: bool
) -> int:
    """Gate, then measure, print and write; 1 on a red gate. ``tuned``: choose Triton's configurations first."""
    device = torch.device("cuda")
    results: dict[str, Any] = {"environment": report.environment(), "device": torch.cuda.get_device_name()}
    return measure(cases, names, compiled, effort, out, tuned, device, results)


def measure(cases, names, compiled, effort, out: Path, tuned: bool, device, results: dict[str, Any]) -> int:
    """:func:`run` on any device."""
    chosen, results["skipped"], results["cold starts"] = {}, {}, []
    for case in cases:
        chosen[case], results["skipped"][case.name] = candidates(case, names, compile_eager=case.name in compiled)
        results["cold starts"] += cold_starts(case, chosen[case], device)
    results["gate"] = [check.record() for check in speed.check_all(chosen)]
    heading = report.header(results["environment"]) + "\n\n" + report.gate_text(results["gate"])
    print(heading)
    out.mkdir(parents=True, exist_ok=True)
    if not all(check["ok"] for check in results["gate"]):
        report.write(out, "gpu", results, heading)
        return 1
    if tuned:
        results["configurations"] = {case.name: tune(case, found, device) for case, found in chosen.items()}
    results["ceilings"] = ceilings(device)
    results["times"] = speed.times(chosen, *effort)
    on_gpu = chosen.items() if device.type == "cuda" else ()
    results["memory"] = [record for case, found in on_gpu for record in peaks(case, found, device)]
    results["kernels"] = [record for case, found in on_gpu for record in kernel_times(case, found)]
    results["seconds per instruction"] = keep_times(results["times"], cases, results["device"])
    text = text_of(results, achieved(results["times"], cases, results["ceilings"]))
    print("\n" + text)
    report.write(out, "gpu", results, heading + "\n\n" + text)
    return 0
