"""Mean and variance of rows that may be spread over processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Number of rows, mean, and sum of squared deviations from it → those with the rows of other processes.
Pool = Callable[[int, Tensor, Tensor], tuple[int, Tensor, Tensor]]


def moments(rows: Tensor, pool: Pool | bool) -> tuple[int, Tensor, Tensor]:
    """Of rows (N, ...): N, mean (...), sum of squared deviations from it (...); 0 without rows. ``pool`` may add
    others."""
    n = len(rows)
    mean = rows.mean(0) if n else rows.new_zeros(rows.shape[1:])
    found = n, mean, (rows - mean).square_().sum(0)
    return pool(*found) if callable(pool) else found
