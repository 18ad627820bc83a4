"""``python -m bench forces``: a training step on energies and forces, which differentiates the layer twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from implicit_steer.testing.cases import LARGE, Case

from . import process
from .report import table
from .steps import MATERIALISE, SAMPLINGS, Candidate, relative_error
from .timing import interleaved, summary

CASE = LARGE["cloud"]
CHECKED_NODES = 100  # on which every candidate is compared with `reference`
# Of float32 gradients through two derivatives, relative to the largest entry of each. Measured: 8e-6.
TOLERANCE = 1e-4
TARGETS = {MATERIALISE.label: 40, "eager": 5}  # times that `cpu` should be faster
MEMORY_TARGET = 1500  # bytes per edge of `cpu`


def step(case: Case, candidate: Candidate) -> Callable[[], dict[str, Tensor]]:
    """A call: out = layer(x, pos), E = ½ |out|², F = −∂E/∂pos, and the gradients of E / N + mean |F|² in x and the
    layer's parameters; SiLU, norm=None."""
    conv = case.layer(norm=None, sampling=candidate.sampling, backend=candidate.backend, activation="silu")
    problem = case.inputs(conv)
    graph, pos = problem.graph, problem.pos.clone().requires_grad_()
    problem.x = problem.x.clone().requires_grad_()
    leaves = {"x": problem.x} | dict(conv.named_parameters())

    def run() -> dict[str, Tensor]:
        here = replace(problem, pos=pos, delta=pos[graph.dst] - pos[graph.src])
        energy = 0.5 * here.run(conv).square().sum()
        (slope,) = torch.autograd.grad(energy, pos, create_graph=True)
        loss = energy / case.nodes + slope.square().mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return {"forces": -slope.detach()} | dict(zip(leaves, gradients, strict=True))

    return run


def peak_bytes(backend: str, sampling: str) -> int:
    """Peak memory of a training step beyond the layer and its inputs, measured right only in a fresh process."""
    run = step(CASE, Candidate(backend, sampling))
    run()  # what is made once and kept does not count
    return process.peak_memory(run)


def measure(names: list[str], rounds: int, budget: float, threads: int) -> dict[str, Any]:
    """``errors`` of every candidate on a small cloud; ``green``, whether all are within the tolerance, without which
    nothing is timed; ``records``: median, ratio to `materialise`, peak memory where the system tells it."""
    everyone = [MATERIALISE, *(Candidate(name, sampling) for sampling in SAMPLINGS for name in names)]
    everyone = list(dict.fromkeys(everyone))
    small, errors = replace(CASE, nodes=CHECKED_NODES), {}
    for candidate in tqdm([c for c in everyone if c.backend != "reference"], desc="gate", unit="candidate"):
        expected = step(small, Candidate("reference", candidate.sampling))()
        got = step(small, candidate)()
        errors[candidate.label] = max(relative_error(got[name], expected[name]) for name in expected)
    results = {"errors": errors, "green": all(error <= TOLERANCE for error in errors.values()), "records": []}
    if not results["green"]:
        return results
    times = interleaved({c: step(CASE, c) for c in everyone}, rounds, budget)
    base = summary(times[MATERIALISE])["median_ms"]
    for c in tqdm(everyone, desc="memory", unit="process"):
        peak = process.ask(peak_bytes, c.backend, c.sampling, threads=threads) if process.measures_memory() else None
        values = summary(times[c])
        record = {"candidate": c.label, "ratio": base / values["median_ms"], "bytes": peak} | values
        results["records"].append(record)
    return results


def missed(records: list[dict[str, Any]]) -> list[str]:
    """Where `cpu` is slower than TARGETS times a rival at its own sampling, or holds more than MEMORY_TARGET."""
    found, times = [], {r["candidate"]: r["median_ms"] for r in records}
    for record in records:
        backend, _, sampling = record["candidate"].partition(", ")
        if backend != "cpu":
            continue
        for rival, target in TARGETS.items():
            label = rival if rival == MATERIALISE.label else f"{rival}, {sampling}"
            ratio = times.get(label, float("inf")) / record["median_ms"]
            if ratio < target:
                found.append(f"- {record['candidate']}: {ratio:.1f}x {label}, below {target}x")
        if record["bytes"] is not None and record["bytes"] / CASE.edges > MEMORY_TARGET:
            found.append(f"- {record['candidate']}: {record['bytes'] / CASE.edges:,.0f} bytes per edge")
    return found


def text(results: dict[str, Any]) -> str:
    """The table, after the gate's verdict, and what falls short."""
    parts = [f"### Energy and forces: a training step, the layer of `cloud`, {CASE.edges:,} edges, SiLU, norm=None\n"]
    if results["errors"]:
        worst = max(results["errors"], key=results["errors"].get)
        gate = f"Gate: {'green' if results['green'] else 'RED: nothing was timed'}. Tolerance {TOLERANCE:.0e}; "
        error = results["errors"][worst]
        parts.append(f"{gate}largest relative error {error:.1e} ({worst}), {CHECKED_NODES} nodes.\n")
    if results["green"]:
        rows = []
        for r in results["records"]:
            peak = [] if r["bytes"] is None else [f"{r['bytes'] / 1e6:,.0f}", f"{r['bytes'] / CASE.edges:,.0f}"]
            rows.append([r["candidate"], f"{r['median_ms']:,.1f} ({r['ratio']:.1f}x)", *(peak or ["", ""])])
        parts.append(table(["", "median / ms", "peak memory / MB", "bytes per edge"], rows))
        bars = ", ".join(f"{target}x {rival}" for rival, target in TARGETS.items())
        parts.append(f"\n`cpu` short of its targets ({bars}, {MEMORY_TARGET:,} bytes per edge):")
        parts += missed(results["records"]) or ["- nowhere"]
    return "\n".join(parts)
