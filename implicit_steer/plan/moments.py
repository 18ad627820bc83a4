"""Mean and variance of rows that may be spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .packing import is_transformed

Moments = tuple[int, Tensor, Tensor]  # number of rows, mean, sum of squared deviations from it
Pool = Callable[[int, Tensor, Tensor], Moments]  # those of some rows → those with the rows of other processes


def moments(rows: Tensor, pool: Pool | bool) -> Moments:
    """Of rows (N, ...), 0 without rows; ``pool`` may add others."""
    n = len(rows)
    mean = rows.mean(0) if n else rows.new_zeros(rows.shape[1:])
    found = n, mean, (rows - mean).square().sum(0)
    return pool(*found) if callable(pool) else found


def move_towards(kept: Sequence[Tensor], found: Sequence[Tensor], factor: float) -> None:
    """kept ← kept + factor · (found − kept), in place: running statistics."""
    if is_transformed():  # of which torch.func.vmap knows only the single step
        for old, new in zip(kept, found, strict=True):
            old.lerp_(new, factor)
    else:
        torch._foreach_lerp_(kept, found, factor)


def combined(parts: Sequence[Moments]) -> Moments:
    """Of all rows together, from those of parts of them.

    Source: Chan, Golub, LeVeque, *Algorithms for computing the sample variance*, The American Statistician 37 (1983).
    """
    parts = [part for part in parts if part[0] > 0]  # without rows there is no mean
    n = sum(rows for rows, _, _ in parts)
    mean = torch.stack([rows / n * mean for rows, mean, _ in parts]).sum(0)
    return n, mean, torch.stack([squares + rows * (own - mean).square() for rows, own, squares in parts]).sum(0)
