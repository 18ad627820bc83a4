"""``python -m bench forces``: a training step on energies and forces, which differentiates the layer twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from implicit_steer.cases import LARGE, Case

from . import fresh
from .report import table
from .steps import MATERIALISE, SAMPLINGS, Candidate, relative_error
from .timing import interleaved, summary

CASE = LARGE["cloud"]
CHECKED_NODES = 100  # on which every candidate is compared with `reference`
# Of float32 gradients through two derivatives, relative to the largest entry of each. Measured: 8e-6.
TOLERANCE = 1e-4
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


def measure(names: list[str], rounds: int, budget: float, threads: int) -> dict[str, Any]:
    """``errors`` of every candidate on a small cloud, and ``records``: median, peak memory, ratio to `materialise`.

    Nothing is timed if an error is above the tolerance.
    """
    rivals = [Candidate(name, sampling) for sampling in SAMPLINGS for name in names if name != MATERIALISE.backend]
    small, errors = replace(CASE, nodes=CHECKED_NODES), {}
    for candidate in tqdm(rivals, desc="gate", unit="candidate"):
        expected = step(small, Candidate("reference", candidate.sampling))()
        got = step(small, candidate)()
        errors[candidate.label] = max(relative_error(got[name], expected[name]) for name in expected)
    if not all(error <= TOLERANCE for error in errors.values()):
        return {"errors": errors, "records": []}
    everyone = [MATERIALISE, *rivals]
    times = interleaved({c: step(CASE, c) for c in everyone}, rounds, budget)
    base, records = summary(times[MATERIALISE])["median_ms"], []
    for c in tqdm(everyone if fresh.measures_memory() else [], desc="memory", unit="process"):
        peak = fresh.ask("forces", c.backend, c.sampling, threads)["bytes"]
        values = summary(times[c])
        records.append({"candidate": c.label, "ratio": base / values["median_ms"], "bytes": peak} | values)
    return {"errors": errors, "records": records}


def text(results: dict[str, Any]) -> str:
    """The table, after the gate's verdict."""
    worst = max(results["errors"], key=results["errors"].get)
    green = bool(results["records"])
    gate = f"Gate: {'green' if green else 'RED: nothing was timed'}. Tolerance {TOLERANCE:.0e}; largest relative error "
    rows = [
        [
            r["candidate"],
            f"{r['median_ms']:,.1f} ({r['ratio']:.1f}x)",
            f"{r['bytes'] / 1e6:,.0f}",
            f"{r['bytes'] / CASE.edges:,.0f}",
        ]
        for r in results["records"]
    ]
    columns = ["", "median / ms", "peak memory / MB", "bytes per edge"]
    limit = f"\nMemory that `cpu` should stay within: {MEMORY_TARGET} bytes per edge."
    return "\n".join(
        [
            f"### Energy and forces: a training step, the layer of `cloud`, {CASE.edges:,} edges, SiLU, norm=None\n",
            f"{gate}{results['errors'][worst]:.1e} ({worst}), {CHECKED_NODES} nodes.\n",
            *([table(columns, rows), limit] if green else []),
        ]
    )
