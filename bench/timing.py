"""Interleaved medians: every candidate has its turn in each round, so that a slow phase of the machine hits all alike.

A turn is one call, or as many as last 20 ms: a single call of 2 ms after a comparator of 400 ms would show
what that left in the caches.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from tqdm import tqdm

MIN_ROUNDS = 3
BLOCK = 0.02  # seconds: calls shorter than this are made in a row until they have lasted as long
Key = TypeVar("Key", bound=Hashable)


def seconds_of(run: Callable[[], Any], number: int = 1) -> float:
    """Seconds per call, over ``number`` calls in a row; a GPU's work included."""
    start = time.perf_counter()
    for _ in range(number):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


def interleaved(
    runs: Mapping[Key, Callable[[], Any]], rounds: int, budget: float, progress: tqdm | None = None
) -> dict[Key, list[float]]:
    """Seconds per call of each of ``runs``, one value per round, after two calls each that do not count.

    ``budget``: seconds; as many of ``rounds`` are made as fit, at least 3.
    """
    numbers, round_takes = {}, 0.0
    for name, run in runs.items():
        run()
        seconds = seconds_of(run)
        numbers[name] = max(1, math.ceil(BLOCK / max(seconds, 1e-9)))
        round_takes += numbers[name] * seconds
    count = max(MIN_ROUNDS, min(rounds, int(budget / max(round_takes, 1e-9))))
    times = {name: [] for name in runs}
    for n in range(count):
        if progress is not None:
            progress.set_postfix_str(f"round {n + 1} of {count}")
        for name, run in runs.items():
            times[name].append(seconds_of(run, numbers[name]))
    return times


def summary(values: list[float]) -> dict[str, float | int]:
    """Median and quartiles in milliseconds, and the number of rounds."""
    low, median, high = (1e3 * q for q in statistics.quantiles(values, n=4, method="inclusive"))
    return {"median_ms": median, "q1_ms": low, "q3_ms": high, "rounds": len(values)}
