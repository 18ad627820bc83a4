"""How far a table is from the MLP that it stands for, and how many knots an error takes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..graph import EdgeTypes, Graph
from ..plan import Plan, Table
from ..plan.moments import RUNNING
from ..plan.packing import Parameters
from ..plan.table import FEWEST_KNOTS
from .backend import Backend
from .radial import edge_attributes
from .table import evaluation

TOLERANCE = 1e-6  # of tables that choose their knots
_MOST_KNOTS = 1 << 17
_EDGES = 1 << 15  # at which the two are compared; more where knots or types are more
_SHELLS = 6  # radii without a cutoff, in units of σ: there the shell is 2e-8


def table_error(backend: Backend, plan: Plan, parameters: Parameters, rows: Tensor) -> float:
    """The largest error of an entry of K that the plan's table makes, relative to the largest entry, in float64, for
    these rows of attributes (T, A).

    Compared are as many columns of K as _EDGES allow, at least one for each type, at radii closer than the knots.
    """
    with torch.no_grad():
        parameters, rows = _in_float64(parameters), rows.detach().double()
        reach = _SHELLS * float(parameters.shell_width) if plan.cutoff is None else plan.cutoff
        n_radii = max(2048, 2 * _table(plan).knots)
        n_columns = max(1, min(plan.in_size, _EDGES // (n_radii * len(rows))))
        columns = torch.linspace(0, plan.in_size - 1, n_columns, dtype=torch.float64).round().long()
        x = torch.eye(plan.in_size, dtype=torch.float64)[columns]
        n_edges = n_radii * n_columns
        source = torch.arange(n_edges) % n_columns
        graph = Graph(torch.stack([source, torch.arange(n_edges)]), (n_columns, n_edges))
        direction = torch.arange(1.0, plan.frame.dim + 1, dtype=torch.float64)
        radii = torch.linspace(0, reach, n_radii, dtype=torch.float64).repeat_interleave(n_columns)
        delta = radii[:, None] * direction / direction.norm()
        found = [_compare(backend, plan, parameters, graph, x, delta, row) for row in rows.split(1)]
        return max(error for error, _ in found) / max(max(size for _, size in found), torch.finfo(torch.float64).tiny)


def _compare(
    backend: Backend, plan: Plan, parameters: Parameters, graph: Graph, x: Tensor, delta: Tensor, row: Tensor
) -> tuple[float, float]:
    """The largest error of a message, and the largest message, of edges with these attributes (1, A)."""
    types = EdgeTypes(torch.zeros(len(delta), dtype=torch.long), row)
    found = evaluation(backend, plan, parameters, delta, types, RUNNING)
    attributes = edge_attributes(plan, delta, types)
    table = backend.forward(found.plan, found.parameters, RUNNING, graph, x, delta, found.attributes)[0]
    exact = backend.forward(plan.per_edge, parameters, RUNNING, graph, x, delta, attributes)[0]
    return float((table - exact).abs().max()), float(exact.abs().max())


def choose_knots(backend: Backend, plan: Plan, parameters: Parameters, rows: Tensor) -> Plan:
    """The plan with the fewest knots whose error is below TOLERANCE, to about an eighth, by bisection; with the error
    that was found, of which other directions, radii and columns may have somewhat more: half of TOLERANCE is left to
    them. Where _MOST_KNOTS do not suffice, with these."""

    def error_of(knots: int) -> float:
        return table_error(backend, _with_knots(plan, knots), parameters, rows)

    too_few, enough = FEWEST_KNOTS, 4 * FEWEST_KNOTS
    bound = TOLERANCE / 2
    while (error := error_of(enough)) > bound and enough < _MOST_KNOTS:
        too_few, enough = enough, 2 * enough
    while error <= bound and enough - too_few > max(1, enough // 8):
        middle = math.isqrt(too_few * enough)
        if (found := error_of(middle)) <= bound:
            enough, error = middle, found
        else:
            too_few = middle
    return replace(plan, table=replace(_table(plan), knots=enough, error=error))


def _with_knots(plan: Plan, knots: int) -> Plan:
    return replace(plan, table=replace(_table(plan), knots=knots))


def _table(plan: Plan) -> Table:
    return cast(Table, plan.table)


def _in_float64(parameters: Parameters) -> Parameters:
    """Without the convolution's bias, which both have."""
    return parameters.changed(lambda t: t.detach().double())._replace(cache=None, bias=None)
