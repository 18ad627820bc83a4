"""``python -m bench scaling``: time and peak memory of the layer of `cloud` against the number of edges."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from implicit_steer.testing.cases import LARGE, Case
from implicit_steer.training import viz

from . import process
from .report import table
from .steps import MATERIALISE, Candidate, step
from .timing import interleaved, summary

EDGES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
MEASURES = {"forward": "forward", "train": "forward + backward"}
RUNNERS = (MATERIALISE, Candidate("eager", "auto"), Candidate("cpu", "auto"))
TARGET = 600  # bytes per edge of `cpu`, forward + backward, beyond the inputs
ROUNDS, SECONDS = 5, 2.0  # per measure; at least 3 rounds are made
_TIME_LIMIT = 30.0  # seconds of one step that is still measured
_MEMORY_SHARE = 0.8  # of what is free
_AVAILABLE = re.compile(r"MemAvailable:\s+(\d+) kB")


def sized(edges: int) -> Case:
    """`cloud` with a random graph of mean degree 32 instead of neighbours, which would take long to find."""
    cloud = LARGE["cloud"]
    return replace(cloud, nodes=max(1, edges // cloud.degree), knn=False)


def costs(edges: str, backend: str, sampling: str) -> dict[str, dict[str, float]]:
    """Per measure the seconds (median) and the peak bytes beyond the layer and its inputs; memory is measured right
    only in a fresh process, see :func:`process.ask`."""
    found = {}
    for measure in MEASURES:
        run = step(sized(int(edges)), Candidate(backend, sampling), measure)
        times = interleaved({measure: run}, ROUNDS, SECONDS)[measure]
        found[measure] = {"seconds": summary(times)["median_ms"] / 1e3, "bytes": process.peak_memory(run)}
    return found


def _forecast(records: list[dict[str, Any]], edges: int) -> str | None:
    """Why the next size is not run, by linear extrapolation from the last one; None where it fits."""
    if not records:
        return None
    last = records[-1]
    factor, training = edges / last["edges"], last["train"]
    free = 1024 * int(_AVAILABLE.search(Path("/proc/meminfo").read_text())[1])
    if factor * training["bytes"] > _MEMORY_SHARE * free:
        return f"needs ~{factor * training['bytes'] / 1e9:.0f} GB, {free / 1e9:.0f} GB free"
    if factor * training["seconds"] > _TIME_LIMIT:
        return f"~{factor * training['seconds']:.0f} s, limit {_TIME_LIMIT:.0f} s"
    return None


def measure(names: list[str], sizes: tuple[int, ...], threads: int) -> dict[str, dict[str, Any]]:
    """Per runner of the backends ``names``: ``records`` per size (edges, and of each measure seconds and peak bytes,
    each size in a process of its own), and why it ``ends`` before the last."""
    runners = [c for c in RUNNERS if c.backend in names]
    found = {c.label: {"records": [], "ends": None} for c in runners}
    with tqdm(total=len(runners) * len(sizes), desc="scaling", unit="process") as progress:
        for c in runners:
            curve = found[c.label]
            for edges in sizes:
                curve["ends"] = curve["ends"] or _forecast(curve["records"], edges)
                if curve["ends"] is None:
                    measured = process.ask(costs, str(edges), c.backend, c.sampling, threads=threads)
                    curve["records"].append({"edges": sized(edges).edges} | measured)
                progress.update()
    return found


def bytes_per_edge(record: dict[str, Any]) -> float:
    """Peak memory of forward + backward beyond the inputs; gradients of the inputs count."""
    return record["train"]["bytes"] / record["edges"]


def text(curves: dict[str, dict[str, Any]]) -> str:
    """A table per runner, and whether `cpu` keeps to its memory."""
    parts = ["### Scaling: 8 scalars and vectors, random graph of mean degree 32, norm=None, float32"]
    columns = ["edges", *(f"{m} / ms" for m in MEASURES), *(f"{m} / MB" for m in MEASURES), "train / bytes per edge"]
    for label, curve in curves.items():
        rows = []
        for r in curve["records"]:
            times = [f"{1e3 * r[m]['seconds']:,.1f}" for m in MEASURES]
            peaks = [f"{r[m]['bytes'] / 1e6:,.1f}" for m in MEASURES]
            rows.append([f"{r['edges']:,}", *times, *peaks, f"{bytes_per_edge(r):,.0f}"])
        parts += [f"\n**{label}**\n", table(columns, rows)]
        if curve["ends"]:
            parts.append(f"\nnot run beyond: {curve['ends']}")
    over = [
        f"- {r['edges']:,} edges: {bytes_per_edge(r):,.0f}"
        for label, curve in curves.items()
        for r in curve["records"]
        if label.startswith("cpu") and bytes_per_edge(r) > TARGET
    ]
    return "\n".join([*parts, f"\n`cpu` above its {TARGET} bytes per edge:", *(over or ["- nowhere"])])


def plot(curves: dict[str, dict[str, Any]], out: Path) -> None:
    """``scaling-time.png`` and ``scaling-memory.png`` (forward + backward)."""
    notes = {label: curve["ends"] for label, curve in curves.items() if curve["ends"]}
    for name, ylabel, scale in (("seconds", "time / s", 1.0), ("bytes", "peak memory beyond the inputs / MB", 1e-6)):
        lines = {}
        for label, curve in curves.items():
            # a peak below the resolution of a page has no logarithm
            lines[label] = {r["edges"]: scale * r["train"][name] for r in curve["records"] if r["train"][name]}
        title = "forward + backward, O(3), 8 scalars and vectors"
        figure = viz.log_lines(lines, xlabel="edges", ylabel=ylabel, title=title, notes=notes)
        figure.savefig(out / f"scaling-{'time' if name == 'seconds' else 'memory'}.png")
