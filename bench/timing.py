"""Interleaved medians: every candidate runs once per round, so that a slow phase of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from tqdm import tqdm

MIN_ROUNDS = 3
Key = TypeVar("Key", bound=Hashable)


def seconds_of(run: Callable[[], Any], number: int = 1) -> float:
    """Seconds per call, over ``number`` calls in a row."""
    start = time.perf_counter()
    for _ in range(number):
        run()
    return (time.perf_counter() - start) / number


def interleaved(
    runs: Mapping[Key, Callable[[], Any]],
    rounds: int,
    budget: float,
    *,
    number: int = 1,
    progress: tqdm | None = None,
) -> dict[Key, list[float]]:
    """Seconds per call of each of ``runs``, one value per round, after one round that does not count.

    ``budget``: seconds; as many of ``rounds`` are made as fit, at least 3. ``number``: calls per value, for short ones.
    """
    warm_up = sum(number * seconds_of(run) for run in runs.values())
    count = max(MIN_ROUNDS, min(rounds, int(budget / warm_up)))
    times = {name: [] for name in runs}
    for n in range(count):
        if progress is not None:
            progress.set_postfix_str(f"round {n + 1} of {count}")
        for name, run in runs.items():
            times[name].append(seconds_of(run, number))
    return times


def summary(values: list[float]) -> dict[str, float | int]:
    """Median and quartiles in milliseconds, and the number of rounds."""
    low, median, high = (1e3 * q for q in statistics.quantiles(values, n=4, method="inclusive"))
    return {"median_ms": median, "q1_ms": low, "q3_ms": high, "rounds": len(values)}
