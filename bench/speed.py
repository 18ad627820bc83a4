"""The sections of ``python -m bench``: the gate, times, peak memory, sorting of edges, construction of a model."""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm import tqdm

from implicit_steer.experiments.models import QM9Net
from implicit_steer.graph.graph import sort_by_key
from implicit_steer.testing.cases import GROUPS, LARGE, SMALL, Case

from . import process
from .steps import COMPILED, MATERIALISE, MEASURES, Candidate, Check, gate, step
from .timing import interleaved, summary

SORTED_EDGES = (1_200, 32_000, 1_000_000)
_SORT_DEGREE = 32  # edges per node

Chosen = dict[Case, list[Candidate]]


def check_all(chosen: Chosen) -> list[Check]:
    """The gate, case by case, until one check is red."""
    checks = []
    for case, candidates in tqdm(chosen.items(), desc="gate", unit="case"):
        for check in gate(case, candidates):
            checks.append(check)
            if not check.ok:
                return checks
    return checks


def times(chosen: Chosen, rounds: int, budget: float) -> list[dict[str, Any]]:
    """A record per case, measure and candidate: median, quartiles, and the ratio to `materialise`."""
    records = []
    with tqdm(total=len(chosen) * len(MEASURES), desc="times", unit="measure") as progress:
        for case, candidates in chosen.items():
            for measure in MEASURES:
                runs = {c: step(case, c, measure) for c in candidates if measure in c.measures}
                found = {c: summary(t) for c, t in interleaved(runs, rounds, budget, progress=progress).items()}
                baseline = found[MATERIALISE]["median_ms"] if MATERIALISE in found else None
                for candidate, values in found.items():
                    record = _record(case, candidate, measure)
                    records.append(record | values | {"ratio": baseline and baseline / values["median_ms"]})
                progress.update()
    return records


def peaks(case: str, *candidates: str) -> dict[str, dict[str, float]]:
    """Per candidate ("backend/sampling") the peak memory in MB of each measure, beyond the layer and its inputs;
    measured right only in a fresh process."""
    named, found = SMALL | LARGE | GROUPS, {}
    for name in candidates:
        candidate = Candidate(*name.split("/"))
        found[name] = {}
        for measure in candidate.measures:
            run = step(named[case], candidate, measure)
            run()  # what is made once and kept does not count
            found[name][measure] = process.peak_memory(run) / 1e6
    return found


def construction() -> dict[str, float]:
    """Seconds to construct the paper's QM9 network (4 blocks, 9 convolutions), the first and the second time in a
    process."""
    seconds = {}
    for name in ("first", "second"):
        start = time.perf_counter()
        QM9Net()
        seconds[name] = time.perf_counter() - start
    return seconds


def memory(chosen: Chosen, threads: int) -> list[dict[str, Any]]:
    """A record per case, measure and candidate: peak memory in MB, each case in a process of its own.

    A compiled candidate is left out: the fresh process would have to compile it again.
    """
    records = []
    for case, candidates in tqdm(chosen.items(), desc="memory", unit="process"):
        asked = {f"{c.backend}/{c.sampling}": c for c in candidates if c != COMPILED}
        found = process.ask(peaks, case.name, *asked, threads=threads)
        of_all = {(asked[name], measure): peak for name, of in found.items() for measure, peak in of.items()}
        for (c, measure), peak in of_all.items():
            baseline = of_all.get((MATERIALISE, measure))
            ratio = baseline / peak if baseline and peak else None
            records.append(_record(case, c, measure) | {"peak_mb": peak, "ratio": ratio})
    return records


def _record(case: Case, candidate: Candidate, measure: str) -> dict[str, Any]:
    return {
        "case": case.name,
        "measure": measure,
        "candidate": candidate.label,
        "backend": candidate.backend,
        "sampling": candidate.sampling,
    }


def sorting(rounds: int, budget: float) -> list[dict[str, Any]]:
    """``sort_by_key``, which also gives the offsets of the nodes, against a stable ``torch.argsort`` alone."""
    records = []
    for edges in tqdm(SORTED_EDGES, desc="sorting", unit="size"):
        nodes = edges // _SORT_DEGREE
        key = torch.randint(0, nodes, (edges,), generator=torch.Generator().manual_seed(0))
        runs = {
            "sort_by_key": lambda key=key, nodes=nodes: sort_by_key(key, nodes),
            "argsort": lambda key=key: torch.argsort(key, stable=True),
        }
        found = {name: summary(t) for name, t in interleaved(runs, rounds, budget).items()}
        ours, theirs = (found[name]["median_ms"] for name in runs)
        records.append({"edges": edges, "nodes": nodes, "ratio": theirs / ours} | found)
    return records
