"""``python -m bench related``: convolutions on irreps against e3nn's related operators, at equal widths.

A width C is ``Cx0e + Cx1o`` in and out; 500 nodes with 32 neighbours each, no attributes, float32. e3nn's operators are
other functions (see :mod:`bench.related`): what is compared is what a layer of that width takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import implicit_steer as ist
from implicit_steer.irreps import ImplicitPointConv
from implicit_steer.testing.cases import Problem

from . import process, related
from .report import table
from .timing import interleaved, summary

WIDTHS, THREADS = (16, 64, 128), (1, 2)
NODES, NEIGHBOURS = 500, 32
OURS = ("full", "depthwise", "full, table", "depthwise, table")
KNOTS = 256  # of the layers with a table
CANDIDATES = (*OURS, *related.FORMS)
BASELINE = related.FORMS[1]  # NequIP's form
TARGETS = {"forward": 10.0, "training": 5.0}  # how many times faster than it ours are to be
_COPIES = {"forward": 2, "training": 4}  # of the weights per edge that e3nn's layer holds at its peak


def _problem(width: int) -> Problem:
    torch.manual_seed(0)
    pos = torch.rand(NODES, 3)
    edges = ist.knn_graph(pos, NEIGHBOURS)
    delta = pos[edges[1]] - pos[edges[0]]
    delta = delta / delta.norm(dim=1).mean()
    return Problem(torch.randn(NODES, 4 * width), pos, ist.Graph(edges, NODES), delta, None)


def _module(candidate: str, width: int) -> torch.nn.Module:
    irreps = f"{width}x0e + {width}x1o"
    if candidate in OURS:
        kind, _, table = candidate.partition(", ")
        options = {"depthwise": kind == "depthwise", "table": KNOTS if table else None}
        return ImplicitPointConv(irreps, irreps, width=1.0, **options)
    return related.Layer(irreps, irreps, 0, candidate)


def _step(candidate: str, width: int, measure: str) -> Callable[[], Any]:
    """What is timed: a forward pass without gradients, or with those of features, edge vectors and parameters."""
    problem, module = _problem(width), _module(candidate, width)
    call = partial(module, problem)
    if candidate in OURS:
        call = partial(module, problem.x, problem.graph, problem.delta)
    if measure == "forward":
        return torch.no_grad()(call)
    leaves = [problem.x.requires_grad_(), problem.delta.requires_grad_(), *module.parameters()]

    def train() -> Sequence[torch.Tensor]:
        output = call()
        return torch.autograd.grad(output, leaves, output.detach())

    return train


def peak_bytes(candidate: str, width: str, measure: str) -> int:
    """By how much the memory of this process rises in the second step; for :func:`bench.process.ask`. The first one
    loads code and makes what later ones keep."""
    run = _step(candidate, int(width), measure)
    run()
    return process.peak_memory(run)


def too_large(candidate: str, width: int, measure: str) -> str | None:
    """Why a candidate is not run: the weights that it holds for every edge take more than half of the memory."""
    if candidate in OURS:
        return None
    per_edge = _module(candidate, width).product.weight_numel
    needed = 4 * _COPIES[measure] * NODES * NEIGHBOURS * per_edge
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"its weights per edge take {needed / 1e9:.0f} GB" if needed > there / 2 else None


def measure(widths: Sequence[int], rounds: int, budget: float) -> dict[str, Any]:
    """Records of times, by threads, width, candidate and measure, and of peak memory; and what was not run."""
    before, times, memory, skipped = torch.get_num_threads(), [], [], {}
    cells = [(w, m) for w in widths for m in TARGETS]
    with tqdm(total=len(cells) * (len(THREADS) + 1), desc="related", unit="cell") as bar:
        for width, what in cells:
            refused = {c: too_large(c, width, what) for c in CANDIDATES}
            skipped |= {f"{c}, width {width}, {what}": why for c, why in refused.items() if why}
            able = [c for c in CANDIDATES if not refused[c]]
            for threads in THREADS:
                torch.set_num_threads(threads)
                runs = {c: _step(c, width, what) for c in able}
                for candidate, seconds in interleaved(runs, rounds, budget).items():
                    where = {"threads": threads, "width": width, "candidate": candidate, "measure": what}
                    times.append(where | summary(seconds))
                bar.update()
            for candidate in able if process.measures_memory() else ():
                peak = process.ask(peak_bytes, candidate, str(width), what, threads=1)
                memory.append({"width": width, "candidate": candidate, "measure": what, "peak_mb": peak / 1e6})
            bar.update()
    torch.set_num_threads(before)
    return {"times": times, "memory": memory, "skipped": skipped}


def losers(times: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of ours that miss their target."""
    found = _medians(times)
    missed = []
    for (threads, width, candidate, what), median in found.items():
        baseline = found.get((threads, width, BASELINE, what))
        if candidate in OURS and baseline is not None and (ratio := baseline / median) < TARGETS[what]:
            cell = f"{candidate}, width {width}, {what}, {threads} threads"
            missed.append(f"- {cell}: {ratio:.1f} times {BASELINE}, target {TARGETS[what]:.0f}")
    return missed


def _medians(times: Sequence[dict[str, Any]]) -> dict[tuple[int, int, str, str], float]:
    return {(r["threads"], r["width"], r["candidate"], r["measure"]): r["median_ms"] for r in times}


def text(results: dict[str, Any]) -> str:
    """The table, what was not run, and what misses its target."""
    medians = _medians(results["times"])
    peaks = {(r["width"], r["candidate"], r["measure"]): r["peak_mb"] for r in results["memory"]}
    rows = []
    for width in dict.fromkeys(width for _, width, _, _ in medians):
        for candidate in CANDIDATES:
            cells = []
            for what in TARGETS:
                for threads in THREADS:
                    median = medians.get((threads, width, candidate, what))
                    baseline = medians.get((threads, width, BASELINE, what))
                    ratio = "" if median is None or baseline is None else f" ({baseline / median:.1f}x)"
                    cells.append("" if median is None else f"{median:.1f}{ratio}")
                peak = peaks.get((width, candidate, what))
                cells.append("" if peak is None else f"{peak:.0f}")
            rows.append([f"{width}, {candidate}", *cells])
    columns = [f"{what}, {n} thread{'s' * (n > 1)} / ms" for what in TARGETS for n in THREADS]
    columns = [*columns[:2], "MB", *columns[2:], "MB"]
    return "\n".join(
        [
            f"### Related operators: {NODES} nodes, {NODES * NEIGHBOURS:,} edges, float32\n",
            f"Medians; factors are {BASELINE} divided by the row: above 1 is faster than it. Memory: by how much that "
            "of a process rises in its second step, one thread.\n",
            table(["width C of Cx0e + Cx1o", *columns], rows),
            *(f"\nnot run: {what} ({why})" for what, why in results["skipped"].items()),
            f"\nless than {TARGETS['forward']:.0f} times as fast forward, {TARGETS['training']:.0f} times in training:",
            *(losers(results["times"]) or ["- nowhere"]),
        ]
    )
