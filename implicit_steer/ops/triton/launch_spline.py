"""Launches of spline.py: from edges to q and r by the splines of a table, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch, spline
from .launch_mlp import edge_constants
from .prepared import Prepared
from .sizes import cdiv, next_power_of_2

_COLUMNS = 64  # of r, or of what knots sum, that a program holds at a time, at most
_EDGES, _PARTS = 1 << 14, 16  # each part of a knot's sum is of so many edges, of all knots together; how many, at most

_TABLES = ("scalars", "harmonics", "powers", "plane")


def _constants(p: Prepared) -> dict[str, Any]:
    s = p.sizes
    block = min(next_power_of_2(s.n_columns - 1), _COLUMNS)
    return edge_constants(p) | {"NR": s.n_columns, "BC": block, "BOUNDED": s.bounded, "EVEN": s.even}


def _backward_constants(p: Prepared, store: bool) -> dict[str, Any]:
    return _constants(p) | {"STORE_FACTORS": store}


def _sum_constants(_: Prepared, columns: int, width: int) -> dict[str, Any]:
    return {"NK": columns, "NV": width, "BC": min(next_power_of_2(columns), _COLUMNS)}


def forward(
    p: Prepared, points: tuple[Tensor, Tensor, Tensor], shell: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """q (E, n_harmonics) and r (E, n_columns); ``points`` are delta, attributes and order."""
    delta, variant = points[0], p.variant(spline.spline_forward, _constants)
    n = len(delta)
    q, r = delta.new_empty(n, p.sizes.n_harmonics), delta.new_empty(n, p.sizes.n_columns)
    arguments = *points, shell, *p.some(_TABLES), weights, r, q, p.sizes.n_knots, n
    launch.launch(variant, (cdiv(n, variant.edges),), arguments)
    return q, r


def backward(
    p: Prepared,
    points: tuple[Tensor, Tensor, Tensor],
    shell: Tensor,
    weights: Tensor,
    d_q: Tensor,
    d_r: Tensor,
    d_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of delta and attributes, which is 0, and parts of that of the shell's width, from those of q and r.
    Those of the splines' coefficients are written to ``d_weights``."""
    delta, attr, _ = points
    variant, n = p.variant(spline.spline_backward, _backward_constants, d_weights is not None), len(delta)
    programs, stored = cdiv(n, variant.edges), 0 if d_weights is None else n
    d_delta, d_shell = torch.empty_like(delta), delta.new_empty(programs)
    first, factors = delta.new_empty(stored, dtype=torch.int32), delta.new_empty(stored, 4)
    gradients = d_r, d_q, d_delta, d_shell, first, factors
    arguments = *points, shell, *p.some(_TABLES), weights, *gradients, p.sizes.n_knots, n
    launch.launch(variant, (programs,), arguments)
    if d_weights is not None:
        _sums(p, d_r, factors, first, d_weights.view(p.sizes.n_rows, -1))
    return d_delta, torch.zeros_like(attr), d_shell


def knot_sums(p: Prepared, values: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    """out[j] = Σ_e weights[e, j − first[e]] values[e] (n_rows, C), in a fixed order; values (E, C), weights (E, 4),
    first (E,) in 32 bits."""
    out = values.new_empty(p.sizes.n_rows, values.shape[1])
    _sums(p, values, weights, first, out)
    return out


def _sums(p: Prepared, values: Tensor, weights: Tensor, first: Tensor, out: Tensor) -> None:
    """The first columns of :func:`knot_sums`, as many as ``out`` has, written to it."""
    n_rows, columns = out.shape
    cells, by_knot = torch.sort(first, stable=True)
    knotptr = torch.searchsorted(cells, p["rows"])
    variant = p.variant(spline.knot_sums, _sum_constants, columns, values.shape[1])
    partial = out.new_empty(min(1 + len(first) // _EDGES, _PARTS), n_rows, columns)
    grid = (n_rows, cdiv(columns, variant.constants["BC"]), len(partial))
    launch.launch(variant, grid, (values, weights, first, by_knot, knotptr, partial, n_rows))
    torch.sum(partial, 0, out=out)
