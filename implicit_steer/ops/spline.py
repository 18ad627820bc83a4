"""The splines of a table (``plan/table.py``) in plain PyTorch: hidden coefficients per edge from the splines' own."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..plan import Plan, Table


class Interpolation(NamedTuple):
    """E edges in a table: v (E, dim), the position with |v| = u; the first of the four coefficients of its type that
    count (E,), among all (T · (G + 3)); their weights (E, 4)."""

    v: Tensor
    first: Tensor
    weights: Tensor


def compressed(table: Table, delta: Tensor) -> Tensor:
    """v = x u(r) / r, (E, dim)."""
    v = delta / table.length
    return v if table.bounded else v * (1 + v.square().sum(-1, keepdim=True)) ** -0.25


def interpolation(plan: Plan, delta: Tensor, attributes: Tensor, softening: float) -> Interpolation:
    """Where the edges are. attributes (E, 1): the number of each edge's row; (E, 0) where there is one row."""
    table = cast(Table, plan.table)
    v = compressed(table, delta)
    x = (v.square().sum(-1) + softening).sqrt() / table.spacing
    position = x + 0.5
    cell = torch.where(position < table.knots, position.detach(), table.knots - 1.0).long()  # NaN: the last
    t = (position - cell).clamp(max=1)
    s = 1 - t
    weights = torch.stack([s**3, 4 - 3 * t * t * (2 - t), 4 - 3 * s * s * (2 - s), t**3], -1) / 6
    if table.even:
        # In the first cell the outer two coefficients are equal, and so are the inner two. Written in x, whose
        # derivative by a position is x / u, their weights keep all digits at u = 0.
        outer = (3 * x * x + 0.25) / 12
        weights = torch.where(position[:, None] < 1, torch.stack([outer, 0.5 - outer, 0.5 - outer, outer], -1), weights)
    if attributes.shape[1]:
        cell = cell + attributes[:, 0].detach().long() * table.n_coefficients
    return Interpolation(v, cell, weights)


def interpolated(plan: Plan, coefficients: Tensor, at: Interpolation) -> Tensor:
    """(E, W, c): Σ_j b_j B(…), from the splines' coefficients (T · (G + 3) · W · c)."""
    channels, c = (plan.hidden_size - 1) // plan.field_size, len(plan.frame.order)
    rows = coefficients.view(-1, channels * c)
    y = sum(at.weights[:, k : k + 1] * rows.index_select(0, at.first + k) for k in range(4))
    return cast(Tensor, y).unflatten(1, (channels, c))
