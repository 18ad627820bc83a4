"""Batch statistics: where norms take them from, and mean and variance of rows that may be spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._transforms import is_transformed

Moments = tuple[int, Tensor, Tensor]  # number of rows, mean, sum of squared deviations from it
Pool = Callable[[int, Tensor, Tensor], Moments]  # some rows' moments → the moments of these and other processes' rows


class NormStatistics(NamedTuple):
    """What one batch norm of a kernel measures in a call: mean (channels, n_trivial), var (channels,)."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class StatisticsSource:
    """Where the batch norms of a kernel take their means and variances from. There are three kinds:

    - ``RUNNING``: what the norms keep (evaluation mode);
    - ``MEASURED``: the edges of this call (training mode);
    - ``StatisticsSource(measured=True, pool=pool)``: these edges together with those of other processes.

    ``weighted``: the points are the knots of a table; this gives the moments of the edges from values at the knots.
    """

    measured: bool
    pool: Pool | None = None  # adds the edges of other processes to what is measured
    weighted: Callable[[Tensor], Moments] | None = None

    def moments(self, rows: Tensor) -> Moments:
        """Moments over the edges that rows (N, ...) belong to or, at knots, stand for."""
        if self.weighted is None:
            return moments(rows, self.pool)
        found = self.weighted(rows)
        return found if self.pool is None else self.pool(*found)


RUNNING, MEASURED = StatisticsSource(measured=False), StatisticsSource(measured=True)


def moments(rows: Tensor, pool: Pool | None = None) -> Moments:
    """Moments of rows (N, ...), all 0 where there are none; ``pool`` adds the rows of other processes."""
    n = len(rows)
    mean = rows.mean(0) if n else rows.new_zeros(rows.shape[1:])
    found = n, mean, (rows - mean).square().sum(0)
    return found if pool is None else pool(*found)


def move_towards(kept: Sequence[Tensor], found: Sequence[Tensor], factor: float) -> None:
    """kept ← kept + factor · (found − kept), in place: running statistics."""
    if is_transformed():  # torch.func.vmap has no rule for _foreach_lerp_
        for old, new in zip(kept, found, strict=True):
            old.lerp_(new, factor)
    else:
        torch._foreach_lerp_(list(kept), list(found), factor)


def combined(parts: Sequence[Moments]) -> Moments:
    """Combine the moments of parts of the rows into the moments of all rows.

    Source: Chan, Golub, LeVeque, *Algorithms for computing the sample variance*, The American Statistician 37 (1983).
    """
    parts = [part for part in parts if part[0] > 0]  # without rows there is no mean
    n = sum(rows for rows, _, _ in parts)
    mean = torch.stack([rows / n * mean for rows, mean, _ in parts]).sum(0)
    return n, mean, torch.stack([squares + rows * (own - mean).square() for rows, own, squares in parts]).sum(0)
