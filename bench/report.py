"""Results → JSON, Markdown tables, pictures."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import implicit_steer as ist
from implicit_steer.training import viz

from . import related
from .steps import COMPILED, MEASURES, TOLERANCE


def environment() -> dict[str, Any]:
    """Where and when something was measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "implicit_steer": asdict(ist.info()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def header(facts: dict[str, Any]) -> str:
    """The environment in a few lines."""
    return (
        f"{facts['date']}, {facts['processor']}, {facts['logical_cpus']} logical CPUs, {facts['threads']} threads, "
        f"load {facts['load_average']:.1f} at the start\n\n```\n{ist.info()}\n```"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, also legible as text: columns of equal width, all but the first flush right."""
    widths = [max(len(row[n]) for row in [columns, *rows]) for n in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for n, w in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def _factor(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def gate_text(checks: list[dict[str, Any]]) -> str:
    """The gate's verdict, with the worst check or the red one."""
    if not checks:
        return "Gate: only `reference` was asked for, nothing to compare."
    red = [c for c in checks if not c["ok"]]
    worst = red[0] if red else max(checks, key=lambda c: c["error"])
    place = f"{worst['case']}, {worst['backend']}, sampling {worst['sampling']}, {worst['measure']}: {worst['tensor']}"
    verdict = "RED: nothing was timed" if red else "green"
    count = f"{len(checks)} comparison{'s' if len(checks) > 1 else ''} with `reference` (large cases: on fewer nodes)"
    return (
        f"Gate: {verdict}. {count}, tolerance {TOLERANCE:.0e}; largest relative error {worst['error']:.1e} ({place})."
    )


def speed_text(results: dict[str, Any]) -> str:
    """Times, memory, sorting, construction, and where ours is worse."""
    parts = [
        "Medians in ms and peak memory in MB; factors are `materialise` (backend reference at sampling escnn, the "
        "authors' algorithm) divided by the row: above 1 is better. e3nn's layers are related operators, other "
        "functions at equal widths.\n",
        *(f"- {name} = {text}" for name, text in MEASURES.items()),
    ]
    for case in dict.fromkeys(r["case"] for r in results["times"]):
        parts += [f"\n### {case}\n", _case_table(results, case)]
        parts += [f"\nnot run: {who} ({why})" for who, why in results["skipped"].get(case, {}).items()]
    parts += ["\n### cpu vs eager\n", _table_of_rivals(results)]
    if results["sorting"]:
        rows = [
            [f"{r['edges']:,}", *(f"{r[k]['median_ms']:.4f}" for k in ("sort_by_key", "argsort")), _factor(r["ratio"])]
            for r in results["sorting"]
        ]
        columns = ["edges", "sort_by_key / ms", "torch.argsort(stable=True) / ms", "factor"]
        parts += ["\n### Sorting edges by node\n", table(columns, rows)]
    if results["lowering"]:
        first, second = results["lowering"]["first"], results["lowering"]["second"]
        parts.append(f"\nConstruction of the QM9 network: first {first:.2f} s, second in the process {second:.2f} s")
    return "\n".join([*parts, "", _losers(results)])


def _cells(records: list[dict[str, Any]], case: str, value: str, digits: str) -> dict[tuple[str, str], str]:
    """(candidate, measure) → the value, and its factor where there is a baseline."""
    return {
        (r["candidate"], r["measure"]): f"{r[value]:{digits}} ({_factor(r['ratio'])})".removesuffix(" ()")
        for r in records
        if r["case"] == case
    }


def _case_table(results: dict[str, Any], case: str) -> str:
    times = _cells(results["times"], case, "median_ms", ".1f")
    peaks = _cells(results["memory"], case, "peak_mb", ".0f")
    rows = []
    for label in dict.fromkeys(label for label, _ in times):
        cells = [times.get((label, m), "") for m in MEASURES]
        rows.append([label, *cells, *(peaks.get((label, m), "") for m in MEASURES if peaks)])
    return table(["", *(f"{m} / ms" for m in MEASURES), *(f"{m} / MB" for m in MEASURES if peaks)], rows)


def rivals(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per time of `cpu` and rival (`eager` at the same sampling; at exact sampling also `eager` compiled and e3nn):
    ``factor``, the rival's time over that of `cpu`."""
    found = []
    for ours in (r for r in records if r["backend"] == "cpu"):
        for other in records:
            same = all(ours[key] == other[key] for key in ("case", "measure"))
            sampled = other["backend"] in ("eager", COMPILED.backend) and other["sampling"] == ours["sampling"]
            related_operator = other["backend"] == related.NAME and ours["sampling"] == "auto"
            if same and (sampled or related_operator):
                factor = other["median_ms"] / ours["median_ms"]
                place = {key: ours[key] for key in ("case", "measure", "sampling")}
                found.append(place | {"rival": other["candidate"], "backend": other["backend"], "factor": factor})
    return found


def _table_of_rivals(results: dict[str, Any]) -> str:
    """The time of `eager` over that of `cpu`, per case and sampling."""
    found = {(r["case"], r["sampling"], r["measure"]): r for r in rivals(results["times"]) if r["backend"] == "eager"}
    rows = []
    for case, sampling in dict.fromkeys((case, sampling) for case, sampling, _ in found):
        rows.append([f"{case}, {sampling}", *(_factor(found[case, sampling, m]["factor"]) for m in MEASURES)])
    return table(["case, sampling", *MEASURES], rows)


def _losers(results: dict[str, Any]) -> str:
    lost = [
        f"- {r['case']}, {r['candidate']}, {r['measure']}: {what} {_factor(r['ratio'])}"
        for what, records in (("time", results["times"]), ("memory", results["memory"]))
        for r in records
        if r["ratio"] is not None and round(r["ratio"], 2) < 1 and r["backend"] != related.NAME
    ]
    lost += [
        f"- {r['case']}, cpu, {r['sampling']}, {r['measure']}: time {_factor(r['factor'])} of {r['rival']}"
        for r in rivals(results["times"])
        if round(r["factor"], 2) < 1
    ]
    lost += [f"- sorting {r['edges']:,} edges: {_factor(r['ratio'])}" for r in results["sorting"] if r["ratio"] < 1]
    return "\n".join(["Worse than the comparator:", *(lost or ["- nothing"])])


def speed_plots(results: dict[str, Any], out: Path) -> None:
    """``times-CASE.png`` for every case; what is no letter or digit in its name becomes ``-``."""
    for case in dict.fromkeys(r["case"] for r in results["times"]):
        groups = {name: {} for name in MEASURES}
        for r in results["times"]:
            if r["case"] == case:
                groups[r["measure"]][r["candidate"]] = r["median_ms"]
        name = re.sub(r"\W+", "-", case).strip("-")
        viz.time_bars(groups, title=f"{case}: median times").savefig(out / f"times-{name}.png")


def write(out: Path, name: str, results: dict[str, Any], text: str) -> None:
    """``name.json`` and ``name.md`` in the folder ``out``."""
    (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"{name}.md").write_text(text + "\n")
