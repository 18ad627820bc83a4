"""``python -m bench table``: kernels from tables against the MLP of every edge, and how far their values are apart.

The layer is that of `cloud` without attributes: O(3), 8 scalars and 8 vectors in and out, SiLU, no batch norm, float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import implicit_steer as ist
from implicit_steer.plan import FUNCTIONS
from implicit_steer.testing.cases import Case
from implicit_steer.training import viz

from . import process
from .report import table
from .timing import interleaved, summary

KNOTS = 256
NODES, DEGREE = 1_000, 32
MEASURES = ("forward", "training")
SIZES = {(3, 8): (1.8, 1.5), (6, 16): (4.0, 3.0)}  # layers, channels → how many times faster each measure is to be
DEPTHS, DEEP_EDGES = (3, 4, 6, 8, 10), 600_000
GROWTH = 1.1  # time of the deepest MLP over that of the shallowest
FASTER = {"AVX-512": 300, "AVX2": 220}  # times than `materialise` forward, by instruction set
COUNTS = tuple(2**n for n in range(3, 12))  # knots at which errors are found
_RESOLVED = 1e-11  # errors above it are no rounding


def case(n_layers: int, n_channels: int, edges: int = NODES * DEGREE) -> Case:
    """The layer of `cloud` without attributes; a random graph where there are so many edges that neighbours take long
    to find."""
    nodes, few = max(DEGREE + 1, edges // DEGREE), edges <= NODES * DEGREE
    field = "8 scalar+vector"
    return Case("table", "O(3)", field, field, None, n_layers, n_channels, nodes, DEGREE, knn=few)


def step(which: Case, measure: str, **options: Any) -> Callable[[], Any]:
    """What is timed: a forward pass without gradients, or with those of features, edge vectors and parameters."""
    conv = which.layer(norm=None, activation="silu", **options).train(measure == "training")
    problem = which.inputs(conv)
    leaves = [*problem.requires_grad(), *conv.parameters()]
    call = partial(problem.run, conv)

    def train() -> Sequence[torch.Tensor]:
        output = call()
        return torch.autograd.grad(output, leaves, output.detach())

    return torch.no_grad()(call) if measure == "forward" else train


def peak_bytes(knots: str, measure: str, edges: str) -> int:
    """By how much the memory of this process rises in one step; for :func:`bench.process.ask`. No knots: no table."""
    run = step(case(3, 8, int(edges)), measure, table=int(knots) or None)
    run()  # what is made once and kept does not count
    return process.peak_memory(run)


def _medians(runs: dict[str, Callable[[], Any]], rounds: int, budget: float) -> dict[str, float]:
    return {name: summary(seconds)["median_ms"] for name, seconds in interleaved(runs, rounds, budget).items()}


def speed(edges: int, rounds: int, budget: float) -> list[dict[str, Any]]:
    """A record per size and measure: milliseconds with the MLP and with the table, their ratio and its bound."""
    records = []
    for (n_layers, n_channels), bounds in tqdm(SIZES.items(), desc="speed", unit="size"):
        for measure, bound in zip(MEASURES, bounds, strict=True):
            which = case(n_layers, n_channels, edges)
            runs = {name: step(which, measure, table=k) for name, k in (("mlp", None), ("table", KNOTS))}
            found = _medians(runs, rounds, budget)
            size = {"n_layers": n_layers, "n_channels": n_channels, "measure": measure}
            records.append(size | found | {"ratio": found["mlp"] / found["table"], "bound": bound})
    return records


def materialised(edges: int, rounds: int, budget: float) -> dict[str, Any]:
    """Milliseconds of the authors' algorithm and of the table, forward, their ratio and its bound."""
    which = case(3, 8, edges)
    naive = step(which, "forward", sampling="escnn", backend="reference")
    found = _medians({"materialise": naive, "table": step(which, "forward", table=KNOTS)}, rounds, budget)
    bound = FASTER.get(ist.info().instruction_set)
    return found | {"ratio": found["materialise"] / found["table"], "bound": bound}


def depth(edges: int, rounds: int, budget: float) -> list[dict[str, Any]]:
    """A record per measure: milliseconds by number of layers, with the table and with the MLP."""
    records = []
    for measure in tqdm(MEASURES, desc="depth", unit="measure"):
        runs = {}
        for n_layers in DEPTHS:
            which = case(n_layers, 8, edges)
            runs |= {(name, n_layers): step(which, measure, table=k) for name, k in (("mlp", None), ("table", KNOTS))}
        found = _medians(runs, rounds, budget)
        by_depth = {name: {n: found[name, n] for n in DEPTHS} for name in ("mlp", "table")}
        growth = by_depth["table"][DEPTHS[-1]] / by_depth["table"][DEPTHS[0]]
        records.append({"measure": measure, "growth": growth} | by_depth)
    return records


def errors(counts: Sequence[int] = COUNTS) -> list[dict[str, Any]]:
    """A record per activation: the error by number of knots G, and p of error ~ G^−p over the last four numbers of
    knots whose errors are not rounding."""
    records = []
    for activation in tqdm(FUNCTIONS, desc="errors", unit="activation"):
        layers = {n: case(3, 8).layer(norm=None, activation=activation, table=n).double() for n in counts}
        found = {n: conv.implicit_kernel.table_error() for n, conv in layers.items()}
        (a, e), *_, (b, f) = [(n, error) for n, error in found.items() if error > _RESOLVED][-4:]
        records.append({"activation": activation, "errors": found, "order": math.log(e / f) / math.log(b / a)})
    return records


def memory(edges: int, threads: int) -> list[dict[str, Any]]:
    """A record per measure: peak memory in MB beyond the layer and its inputs, each step in a process of its own."""
    records = []
    for measure in MEASURES:
        asked = {"mlp": "0", "table": str(KNOTS)}
        peaks = {k: process.ask(peak_bytes, n, measure, str(edges), threads=threads) for k, n in asked.items()}
        records.append({"measure": measure} | {name: peak / 1e6 for name, peak in peaks.items()})
    return records


def measure(quick: bool, rounds: int, budget: float, threads: int) -> dict[str, Any]:
    """Everything; ``quick``: on few edges, where no bound holds."""
    edges, deep = (40 * DEGREE, 80 * DEGREE) if quick else (NODES * DEGREE, DEEP_EDGES)
    results: dict[str, Any] = {"edges": edges, "deep_edges": deep, "speed": speed(edges, rounds, budget)}
    results["materialised"] = materialised(edges, rounds, budget)
    results["depth"] = depth(deep, rounds, budget)
    results["errors"] = errors(COUNTS[:4] if quick else COUNTS)
    results["memory"] = memory(edges, threads) if process.measures_memory() and not quick else []
    results["broken"] = [] if quick else broken(results)
    return results


def broken(results: dict[str, Any]) -> list[str]:
    """The bounds that do not hold."""
    found = [
        f"{r['n_layers']} layers of {r['n_channels']} channels, {r['measure']}: {r['ratio']:.2f} times the MLP's "
        f"speed, bound {r['bound']:g}"
        for r in results["speed"]
        if r["ratio"] < r["bound"]
    ]
    found += [
        f"{DEPTHS[-1]} layers, {r['measure']}: {r['growth']:.2f} times the time of {DEPTHS[0]}, bound {GROWTH:g}"
        for r in results["depth"]
        if r["growth"] > GROWTH
    ]
    naive = results["materialised"]
    if naive["bound"] is not None and naive["ratio"] < naive["bound"]:
        found.append(f"{naive['ratio']:.0f} times the speed of materialise, bound {naive['bound']}")
    return found


def text(results: dict[str, Any]) -> str:
    """The tables, and which bounds do not hold."""
    sizes = []
    for r in results["speed"]:
        what = f"{r['n_layers']} layers, {r['n_channels']} channels, {r['measure']}"
        sizes.append([what, *(f"{r[k]:.2f}" for k in ("mlp", "table")), f"{r['ratio']:.1f}x", f"{r['bound']:g}x"])
    naive = results["materialised"]
    what = "materialise instead of the MLP, 3 layers, 8 channels, forward"
    bound = "" if naive["bound"] is None else f"{naive['bound']}x"
    sizes.append([what, f"{naive['materialise']:.1f}", f"{naive['table']:.2f}", f"{naive['ratio']:.0f}x", bound])
    deep = [
        [f"{r['measure']}, {label}", *(f"{t:.1f}" for t in r[name].values())]
        for r in results["depth"]
        for name, label in (("mlp", "MLP"), ("table", f"{KNOTS} knots"))
    ]
    counts = list(results["errors"][0]["errors"])
    rows = [
        [r["activation"], *(f"{e:.1e}" for e in r["errors"].values()), f"{r['order']:.1f}"] for r in results["errors"]
    ]
    parts = [
        f"### {KNOTS} knots against the MLP of every edge, {results['edges']:,} edges\n",
        table(["", "MLP / ms", "table / ms", "faster", "bound"], sizes),
        f"\n### Time by depth, 8 channels, {results['deep_edges']:,} edges, milliseconds\n",
        table(["", *(f"{n} layers" for n in DEPTHS)], deep),
        "\n### Largest error of K, relative to its largest entry, 3 layers of 8 channels, float64\n",
        table(["knots", *map(str, counts), "order"], rows),
    ]
    if results["memory"]:
        peaks = [[r["measure"], *(f"{r[name]:.1f}" for name in ("mlp", "table"))] for r in results["memory"]]
        parts += ["\n### Peak memory beyond layer and inputs\n", table(["", "MLP / MB", "table / MB"], peaks)]
    return "\n".join([*parts, "\nBounds that do not hold:", *(f"- {b}" for b in results["broken"] or ["none"])])


def plots(results: dict[str, Any], out: Path) -> None:
    """``table-error.png`` and ``table-depth.png``."""
    found = results["errors"]
    curves = {r["activation"]: list(r["errors"].values()) for r in found}
    figure = viz.convergence(
        list(found[0]["errors"]),
        curves,
        xlabel="G, knots of the table",
        ylabel="largest error of K, relative",
        title="Kernels from tables against their MLP, O(3), 3 layers",
    )
    figure.savefig(out / "table-error.png")
    lines = {
        f"{label}, {r['measure']}": r[name]
        for r in results["depth"]
        for name, label in (("mlp", "MLP"), ("table", f"{KNOTS} knots"))
    }
    title = f"{results['deep_edges']:,} edges, O(3), 8 scalars and vectors"
    figure = viz.log_lines(lines, xlabel="layers of the MLP", ylabel="time / ms", title=title)
    figure.savefig(out / "table-depth.png")
