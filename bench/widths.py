"""``python -m bench related``: convolutions on irreps against e3nn's related operators, at equal widths.

A width C is ``Cx0e + Cx1o`` in and out; 500 nodes with 32 neighbours each, no attributes, float32; with
``--device cuda`` 4,096 nodes, and cuEquivariance's and OpenEquivariance's kernels where they are installed. e3nn's
operators are other functions (see :mod:`bench.related`): what is compared is what a layer of that width takes.
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
from .steps import device
from .timing import interleaved, summary

WIDTHS = (16, 64, 128)
THREADS = {"cpu": (1, 2), "cuda": (1,)}  # by device
NODES, NEIGHBOURS = {"cpu": 500, "cuda": 4096}, 32
OURS = ("full", "depthwise", "full, table", "depthwise, table")
KNOTS = 256  # of the layers with a table
BASELINE = related.FORMS[1]  # NequIP's form
TARGETS = {"forward": 10.0, "training": 5.0}  # how many times faster than it ours are to be
_COPIES = {"forward": 2, "training": 4}  # of the weights per edge that e3nn's layer holds at its peak


def _problem(width: int) -> Problem:
    torch.manual_seed(0)
    on = device()
    pos = torch.rand(NODES[on.type], 3)
    edges = ist.knn_graph(pos, NEIGHBOURS)
    delta = pos[edges[1]] - pos[edges[0]]
    delta = (delta / delta.norm(dim=1).mean()).to(on)
    return Problem(torch.randn(len(pos), 4 * width).to(on), pos.to(on), ist.Graph(edges.to(on), len(pos)), delta, None)


def _module(candidate: str, width: int) -> torch.nn.Module:
    irreps = f"{width}x0e + {width}x1o"
    if candidate in OURS:
        kind, _, table = candidate.partition(", ")
        options = {"depthwise": kind == "depthwise", "table": KNOTS if table else None}
        return ImplicitPointConv(irreps, irreps, width=1.0, **options).to(device())
    return related.Layer(irreps, irreps, 0, candidate).to(device())


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
    """By how much the memory of this process, or on a GPU that of its tensors, rises in the second step. The first one
    loads code and makes what later ones keep."""
    run = _step(candidate, int(width), measure)
    run()
    if device().type == "cpu":
        return process.peak_memory(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def too_large(candidate: str, width: int, measure: str) -> str | None:
    """Why a candidate is not run: the weights that it holds for every edge take more than half of the memory."""
    if candidate in OURS:
        return None
    per_edge = _module(candidate, width).product.weight_numel
    needed = 4 * _COPIES[measure] * NODES[device().type] * NEIGHBOURS * per_edge
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device().type == "cuda":
        there = torch.cuda.mem_get_info()[1]
    return f"its weights per edge take {needed / 1e9:.0f} GB" if needed > there / 2 else None


def _peak(candidate: str, width: int, what: str) -> int:
    """:func:`peak_bytes`: on the CPU of a fresh process."""
    if device().type == "cuda":
        return peak_bytes(candidate, str(width), what)
    return process.ask(peak_bytes, candidate, str(width), what, threads=1)


def measure(widths: Sequence[int], rounds: int, budget: float) -> dict[str, Any]:
    """Records of times, by threads, width, candidate and measure, and of peak memory; and what was not run."""
    before, times, memory = torch.get_num_threads(), [], []
    forms, skipped = related.forms(device())
    settings, cells = THREADS[device().type], [(w, m) for w in widths for m in TARGETS]
    weighs = device().type == "cuda" or process.measures_memory()
    with tqdm(total=len(cells) * (len(settings) + 1), desc="related", unit="cell") as bar:
        for width, what in cells:
            refused = {c: too_large(c, width, what) for c in (*OURS, *forms)}
            skipped |= {f"{c}, width {width}, {what}": why for c, why in refused.items() if why}
            able = [c for c in refused if not refused[c]]
            for threads in settings:
                torch.set_num_threads(threads)
                runs = {c: _step(c, width, what) for c in able}
                for candidate, seconds in interleaved(runs, rounds, budget).items():
                    where = {"threads": threads, "width": width, "candidate": candidate, "measure": what}
                    times.append(where | summary(seconds))
                bar.update()
            for candidate in able if weighs else ():
                peak = _peak(candidate, width, what)
                memory.append({"width": width, "candidate": candidate, "measure": what, "peak_mb": peak / 1e6})
            bar.update()
    torch.set_num_threads(before)
    return {"device": device().type, "times": times, "memory": memory, "skipped": skipped}


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
    medians, on = _medians(results["times"]), results["device"]
    peaks = {(r["width"], r["candidate"], r["measure"]): r["peak_mb"] for r in results["memory"]}
    rows, digits = [], 1 if on == "cpu" else 3
    for width in dict.fromkeys(width for _, width, _, _ in medians):
        for candidate in dict.fromkeys(candidate for _, _, candidate, _ in medians):
            cells = []
            for what in TARGETS:
                for threads in THREADS[on]:
                    median = medians.get((threads, width, candidate, what))
                    baseline = medians.get((threads, width, BASELINE, what))
                    ratio = "" if median is None or baseline is None else f" ({baseline / median:.1f}x)"
                    cells.append("" if median is None else f"{median:.{digits}f}{ratio}")
                peak = peaks.get((width, candidate, what))
                cells.append("" if peak is None else f"{peak:.0f}")
            rows.append([f"{width}, {candidate}", *cells])
    columns = ["width C of Cx0e + Cx1o"]
    for what in TARGETS:
        where = [f", {n} thread{'s' * (n > 1)}" if on == "cpu" else "" for n in THREADS[on]]
        columns += [*(f"{what}{threads} / ms" for threads in where), "MB"]
    of_memory = "that of a process rises in its second step, one thread" if on == "cpu" else "tensors rise in a step"
    return "\n".join(
        [
            f"### Related operators: {NODES[on]} nodes, {NODES[on] * NEIGHBOURS:,} edges, float32, {on}\n",
            f"Medians; factors are {BASELINE} divided by the row: above 1 is faster than it. Memory: by how much "
            f"{of_memory}.\n",
            table(columns, rows),
            *(f"\nnot run: {what} ({why})" for what, why in results["skipped"].items()),
            f"\nless than {TARGETS['forward']:.0f} times as fast forward, {TARGETS['training']:.0f} times in training:",
            *(losers(results["times"]) or ["- nowhere"]),
        ]
    )
