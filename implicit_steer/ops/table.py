"""Evaluation through a table: the MLP at the knots, then its splines in place of the hidden layers.

Both halves are calls of a backend: hidden features at G radii for each of T rows of attributes, and the operator of a
plan with splines (:func:`~implicit_steer.plan.table.tabulated`), whose parameters the splines' coefficients are. So
autograd composes the derivatives, second ones included, of what both know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _native
from .._check import fail
from ..graph.edge_types import EdgeTypes
from ..plan import Frame, Plan, Table
from ..plan.moments import RUNNING, Moments, NormStatistics, StatisticsSource
from ..plan.packing import CallCache, Parameters, cached, is_traced
from ..plan.table import SERIES, at_knots, tabulated
from .backend import Backend
from .kernel_mlp import SOFTENING, table_edge
from .native import bound
from .spline import interpolation

_NO_SHELL = 1e12  # σ of a shell that is 1 at every knot; its cube is finite in float32


@dataclass
class Tabulation:
    """What a layer keeps from call to call for the two halves of its evaluation through a table; in its CallCache."""

    plan: Plan
    source: Any = None  # the parameters of the last call, and
    parameters: Any = None  # what of them the MLP at the knots reads
    at_knots: CallCache = field(default_factory=CallCache)
    by_types: dict[int, CallCache] = field(default_factory=dict)
    coefficients: tuple[Tensor, Tensor] | None = None  # bytes of what they were made of; the splines' coefficients

    def knot_parameters(self, parameters: Parameters) -> Parameters:
        """The parameters without the shell; the same object while ``parameters`` is."""
        if self.source is not parameters or is_traced():
            shell = torch.full_like(parameters.shell_width.detach(), _NO_SHELL)
            made = Parameters(parameters.linears, parameters.norms, shell, self.at_knots)
            if is_traced():
                return made
            self.source, self.parameters = parameters, made
        return cast(Parameters, self.parameters)


def prepare(plan: Plan, parameters: Parameters) -> Tabulation:
    """For a plan with a table: what its calls share, with the native plans that torch.compile has to find there."""
    made = Tabulation(plan)
    knots, none = _knot_plan(plan), plan.frame.n_attributes == 0
    if bound.refusal(knots, torch.float32) is None:
        made.at_knots.native = bound.native_plan(knots, made.knot_parameters(parameters))
        if none:
            made.by_types[1] = CallCache(_native_table(plan, 1, parameters))
    made.source = made.parameters = None
    return made


def _native_table(plan: Plan, types: int, parameters: Parameters) -> Any:
    frozen = _tabulated(plan, types)
    empty = parameters.shell_width.new_empty(frozen.table_size, device="meta")
    return bound.native_plan(frozen, _with_splines(parameters, empty, None))


def _with_splines(parameters: Parameters, coefficients: Tensor, cache: CallCache | None) -> Parameters:
    linears = ((coefficients, None), parameters.linears[-1])
    return Parameters(linears, (), parameters.shell_width, cache, parameters.bias)


@lru_cache(maxsize=256)
def _knot_plan(plan: Plan) -> Plan:
    return at_knots(plan)


@lru_cache(maxsize=256)
def _tabulated(plan: Plan, types: int) -> Plan:
    return tabulated(plan, types)


# ---- values at the knots → coefficients


class _Knots(NamedTuple):
    """Constants: positions of the G + 4 knots on one ray (K, dim); from hidden features there to coefficients c:
    (d, c); u^(−k) (K, c); what gives values to the left of the first knot (5, 5); the series from values to spline
    coefficients (7,)."""

    positions: Tensor
    coefficients: Tensor
    scale: Tensor
    left: Tensor
    series: Tensor

    def splines(self, values: Tensor) -> Tensor:
        """(T, K, …) values at the knots → (T, G + 3, …) coefficients b_j, j = −2 … G."""
        flat = values.flatten(2)
        extended = torch.cat([self.left @ flat[:, :5], flat], 1)
        return (extended.unfold(1, 7, 1) @ self.series).view(len(flat), -1, *values.shape[2:])


@cached
def _knots(plan: Plan, dtype: torch.dtype, device: torch.device) -> _Knots:
    table, frame = cast(Table, plan.table), plan.frame
    direction, coefficients = _ray(frame)
    arrays = (
        table.radii[:, None] * direction,
        coefficients,
        table.positions[:, None] ** -frame.order.astype(np.float64),
        table.left,
        SERIES,
    )
    return _Knots(*(torch.tensor(a, dtype=dtype, device=device) for a in arrays))


def _ray(frame: Frame) -> tuple[NDArray[Any], NDArray[Any]]:
    """A direction (dim,), and the map (d, c) from hidden features on its ray to coefficients: the harmonics there,
    whose squares sum to 1 for each degree; in a planar frame, at azimuth 0, the two agree."""
    if frame.kind == "planar":
        return frame.plane[:, 0], np.eye(len(frame.order))
    direction = np.array([0.0, 0.0, 1.0])
    harmonics = frame.harmonics @ np.prod(direction**frame.powers, axis=1)
    return direction, harmonics[:, None] * (frame.coefficient[:, None] == np.arange(len(frame.order)))


def _coefficients(plan: Plan, knots: _Knots, h: Tensor, types: int) -> Tensor:
    """(T · (G + 3) · W · c,) from hidden features h (T · K, H) at the knots of every type."""
    c = h[:, :-1].unflatten(1, (-1, plan.field_size)) @ knots.coefficients  # (T · K, W, c)
    values = c.unflatten(0, (types, -1)) * knots.scale[:, None]
    return knots.splines(values).reshape(-1)


# ---- batch statistics


def _weights_of_splines(plan: Plan, types: int, delta: Tensor, attributes: Tensor) -> _WeightsOfSplines:
    """How much each spline coefficient counts among the edges."""
    frame, table = plan.frame, cast(Table, plan.table)
    frozen = _tabulated(plan, types)
    at = interpolation(frozen, delta, attributes, SOFTENING[delta.dtype])
    edge = table_edge(frozen, at.v)
    parts = [torch.ones_like(delta[:, :1]), edge.first, *([edge.second] if frame.kind == "planar" else [])]
    per_edge = torch.cat(parts, 1)  # (E, n)
    rows = (at.first[:, None] + torch.arange(4, device=delta.device)).reshape(-1, 1)
    values = (at.weights[:, :, None] * per_edge[:, None]).flatten(0, 1)
    size = types * table.n_coefficients, per_edge.shape[1]
    sums = values.new_zeros(size).scatter_add(0, rows.expand(-1, size[1]), values)
    knots = _knots(plan, delta.dtype, delta.device)
    return _WeightsOfSplines(plan, len(delta), sums.view(types, table.n_coefficients, -1), knots)


@dataclass(frozen=True)
class _WeightsOfSplines:
    """Moments over the edges, from hidden features at the knots. ``weights`` (T, G + 3, 1 + d, or 1 + 2 d): the sums
    over edges of B; and of B times first, and times second, of the way back."""

    plan: Plan
    n_edges: int
    weights: Tensor
    knots: _Knots

    def __call__(self, h: Tensor) -> Moments:
        """h (T · K, W, d) → number of edges, mean (W, d), sums of squared deviations (W, d): of a coordinate's degree
        the average, since splines know those of all its coordinates together."""
        frame, d, knots = self.plan.frame, self.plan.field_size, self.knots
        c = (h @ knots.coefficients).unflatten(0, (len(self.weights), -1))  # (T, K, W, c)
        squares = torch.einsum("tj,tjwc->wc", self.weights[..., 0], knots.splines(c.square()))
        b = knots.splines(c * knots.scale[:, None])
        first = self.weights[..., 1 : 1 + d]
        if frame.kind == "planar":
            partner = torch.tensor(frame.partner, device=h.device)
            sums = torch.einsum("tjd,tjwd->wd", first, b)
            sums = sums + torch.einsum("tjd,tjwd->wd", self.weights[..., 1 + d :], b[..., partner])
        else:
            own = torch.tensor(frame.coefficient, device=h.device)
            sums = torch.einsum("tjd,tjwd->wd", first, b[..., own])
            squares = squares[:, own] / (2 * torch.tensor(frame.order, device=h.device)[own] + 1)
        mean = sums / self.n_edges
        return self.n_edges, mean, squares - self.n_edges * mean.square()


# ---- the operator


class Evaluation(NamedTuple):
    """A call through a table: the plan with splines, its parameters, attributes, and the norms' statistics."""

    plan: Plan
    parameters: Parameters
    attributes: Tensor
    statistics: Sequence[NormStatistics]


def evaluation(
    backend: Backend,
    plan: Plan,
    parameters: Parameters,
    delta: Tensor,
    attributes: Tensor | EdgeTypes,
    statistics_from: StatisticsSource,
) -> Evaluation:
    """The splines of the MLP with these parameters, as the backend evaluates it, for the edges' rows of attributes.

    Raises:
        ValueError: attributes whose gradient is wanted edge by edge.
    """
    rows, numbers = _types(plan, delta, attributes)
    types = len(rows)
    kept = _kept(plan, parameters)
    frozen = _tabulated(plan, types)
    cache = None if kept is None else kept.by_types.get(types)
    if cache is None:
        cache = CallCache()
        if kept is not None and not is_traced():
            cache.native = (
                _native_table(plan, types, parameters) if bound.refusal(frozen, delta.dtype) is None else None
            )
            kept.by_types[types] = cache
    at = Tabulation(plan).knot_parameters(parameters) if kept is None else kept.knot_parameters(parameters)
    if statistics_from.measured:
        weighted = _weights_of_splines(plan, types, delta.detach(), numbers)
        statistics_from = StatisticsSource(measured=True, pool=statistics_from.pool, weighted=weighted)
        coefficients, statistics = _tabulate(backend, plan, at, rows, statistics_from)
    else:
        coefficients, statistics = _running(backend, plan, at, rows, kept), ()
    return Evaluation(frozen, _with_splines(parameters, coefficients, cache), numbers, statistics)


def _kept(plan: Plan, parameters: Parameters) -> Tabulation | None:
    cache = parameters.cache
    if cache is None:
        return None
    if cache.table is None or cache.table.plan is not plan:
        cache.table = prepare(plan, parameters)
    return cast(Tabulation, cache.table)


def _types(plan: Plan, delta: Tensor, attributes: Tensor | EdgeTypes) -> tuple[Tensor, Tensor]:
    """Rows (T, A), and the number of each edge's row (E, 1), or (E, 0) where there is one row."""
    if isinstance(attributes, Tensor):
        if attributes.shape[1] == 0:
            return attributes.new_empty(1, 0), attributes
        if attributes.requires_grad:
            remedy = "Pass EdgeTypes, whose rows may require gradients, or build the layer with table=None."
            fail(
                "edge_attr", "attributes without gradients, as the layer has a table", "some that require them", remedy
            )
        attributes = EdgeTypes.from_rows(attributes)
    rows = attributes.rows.to(delta.dtype)
    if len(rows) == 1:
        return rows, delta.new_empty(len(delta), 0)
    return rows, attributes.index.to(delta.dtype)[:, None]


def _running(backend: Backend, plan: Plan, at: Parameters, rows: Tensor, kept: Tabulation | None) -> Tensor:
    """The coefficients at the norms' running statistics; without gradients, and on a CPU, made again only if a
    parameter, a statistic or a row holds other bytes than last time."""
    sources = [t for pair in at.linears for t in pair if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (*sources, rows, *_of_norms(at)))
    if differentiable or kept is None or is_traced() or rows.device.type != "cpu" or not _native.available()[0]:
        return _tabulate(backend, plan, at, rows, RUNNING)[0]
    sources = [*sources, *(t for norm in at.norms for t in norm), rows]
    last = kept.coefficients
    if last is None or last[0].dtype != rows.dtype or not torch.ops.implicit_steer.same_values(sources, last[0]):
        with torch.inference_mode(False), torch.no_grad():
            copy = torch.cat([t.reshape(-1) for t in sources])
            kept.coefficients = last = copy, _tabulate(backend, plan, at, rows, RUNNING)[0]
    return last[1]


def _of_norms(at: Parameters) -> list[Tensor]:
    return [t for norm in at.norms for t in (norm.weight, norm.bias)]


def _tabulate(
    backend: Backend, plan: Plan, at: Parameters, rows: Tensor, statistics_from: StatisticsSource
) -> tuple[Tensor, Sequence[NormStatistics]]:
    knots, types = _knots(plan, rows.dtype, rows.device), len(rows)
    delta = knots.positions.repeat(types, 1)
    attributes = rows.repeat_interleave(len(knots.positions), 0)
    h, statistics = backend.hidden(_knot_plan(plan), at, statistics_from, delta, attributes)
    return _coefficients(plan, knots, h, types), statistics
