"""What the figures share: results of runs, read or trained; tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..._check import require
from ...training.runs import RunOptions


def kept_result(options: RunOptions, train: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The result of the run in ``options.out``: read, or trained to its end.

    Raises ``ValueError`` where the run there has other options.
    """
    out = Path(options.out)
    finished = out / "result.json"
    if not finished.exists():
        return train(replace(options, resume=(out / "last.ckpt").exists()))
    result = json.loads(finished.read_text())
    for name, value in options.identity().items():
        found = result["options"].get(name)  # None: a run from before the option
        require(found == value, name, f"{found!r} as in {finished}", repr(value), "Choose another folder with --runs.")
    return result


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], first: str = "---") -> str:
    """A Markdown table: columns to the right, the first one as ``first`` says."""
    rule = [first, *["---:"] * (len(heads) - 1)]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(row)} |" for row in rows)])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
