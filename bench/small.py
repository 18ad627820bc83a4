"""``python -m bench small``: what a call costs beyond its arithmetic: the layer of `cloud` on 10 nodes, 40 edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from implicit_steer.ops.native.bound import BoundKernel
from implicit_steer.ops.native.instruction_set import instruction_set
from implicit_steer.ops.select import BACKENDS
from implicit_steer.testing.cases import LARGE

from .report import table
from .steps import NORMS, Candidate, layer, operator_step, step
from .timing import interleaved, summary

CASE = replace(LARGE["cloud"], name="small", nodes=10, degree=4)


def native_step(case, candidate: Candidate, measure: str) -> Callable[[], Any]:
    """The native operator itself on packed weights; in training the gradients of ½ |output|² in these, x, edge_delta
    and attributes, by way of torch's autograd."""
    with_gradients = measure != "forward"
    conv = layer(case, candidate, NORMS[measure]).train(with_gradients)
    problem, parameters = case.inputs(conv), conv.implicit_kernel.parameters_for_op()
    bound = BoundKernel(conv.implicit_kernel.plan, parameters.cache.native, parameters)
    with torch.no_grad():
        _, packed = bound.packed()
    leaves = [t.requires_grad_(with_gradients) for t in (packed, problem.x, problem.delta, problem.attributes)]
    graph, run = problem.graph, torch.ops.implicit_steer.conv_forward
    edges, bias = (graph.src, graph.order, graph.rowptr), (bound.expansion, bound.bias.detach())
    arguments = *bound.arrays, *leaves, *edges, *bias, bound.mean, bound.plan.out_size, instruction_set()

    def forward_backward() -> tuple[torch.Tensor, ...]:
        output = run(*arguments)
        return torch.autograd.grad(output, leaves, output.detach())

    return forward_backward if with_gradients else torch.no_grad()(lambda: run(*arguments))


CALLS = {  # what is called → how, and microseconds that `cpu` should stay within
    "operator on packed weights, forward, no gradients": (native_step, "forward", 30),
    "operator on packed weights, forward + backward": (native_step, "train", 150),
    "operator on parameters, forward, no gradients": (operator_step, "forward", None),
    "operator on parameters, forward + backward": (operator_step, "train", None),
    "module, forward, no gradients": (step, "forward", 60),
    "module, forward + backward": (step, "train", 400),
}


def measure(names: list[str], rounds: int, budget: float) -> list[dict[str, Any]]:
    """A record per call and backend at exact sampling: median microseconds; evaluation mode, the graph given."""
    records = []
    for what, (make, kind, target) in tqdm(CALLS.items(), desc="small", unit="call"):
        able = [n for n in names if n == "cpu" or make is not native_step]
        if not able:
            continue
        runs = {name: make(CASE, Candidate(name, "auto"), kind) for name in able}
        for name, times in interleaved(runs, rounds, budget).items():
            values = {"us": 1e3 * summary(times)["median_ms"], "target_us": target if name == "cpu" else None}
            records.append({"call": what, "backend": name} | values)
    return records


def text(records: list[dict[str, Any]]) -> str:
    """The table, and what misses its target."""
    names = [name for name in BACKENDS if any(r["backend"] == name for r in records)]
    found = {(r["call"], r["backend"]): r["us"] for r in records}
    rows = []
    for what, (_, _, target) in CALLS.items():
        values = [f"{found[what, name]:,.0f}" if (what, name) in found else "" for name in names]
        rows.append([what, *values, f"{target or ''}"])
    missed = [f"- {r['call']}: {r['us']:,.0f} µs" for r in records if r["target_us"] and r["us"] > r["target_us"]]
    return "\n".join(
        [
            f"### Overhead: {CASE.nodes} nodes, {CASE.edges} edges, the layer of `cloud`, graph given, float32\n",
            "Microseconds, medians. The module runs without batch statistics (forward: evaluation mode, norms folded "
            "in; backward: norm=None).\n",
            table(["", *names, "target for cpu"], rows),
            "\n`cpu` above its target:",
            *(missed or ["- nowhere"]),
        ]
    )
