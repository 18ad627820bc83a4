"""Evaluation through a table: the MLP at the knots, then its splines in place of the hidden layers.

Both halves are calls of a backend: hidden features at G radii for each of T rows of attributes, and the operator of a
plan with splines (:func:`~implicit_steer.plan.tabulated.tabulated`), whose parameters the splines' coefficients are. So
autograd composes the derivatives, second ones included, of what both know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _native
from .._native import is_native
from .._transforms import in_forward_mode, is_transformed
from ..graph import EdgeTypes
from ..plan import Frame, Plan, Table
from ..plan.moments import RUNNING, Moments, NormStatistics, StatisticsSource
from ..plan.packing import CallCache, Constants, Parameters, constant, is_traced
from ..plan.table import SERIES
from ..plan.tabulated import at_knots, tabulated
from .backend import Backend
from .native import bound
from .radial import edge_attributes

_NO_SHELL = 1e12  # σ of a shell that is 1 at every knot; its cube is finite in float32


class _Knots(NamedTuple):
    """Constants of a table: positions of the G + 4 knots on one ray (K, dim); from hidden features there to
    coefficients c: (d, c); u^(−k) (K, c); what gives values to the left of the first knot (5, 5); the terms of the
    series (7,), whose ends are equal."""

    positions: Tensor
    coefficients: Tensor
    scale: Tensor
    left: Tensor
    series: Tensor

    def splines(self, h: Tensor, channels: int) -> Tensor:
        """(T · K, at least W · d) hidden features at the knots → (T, G + 3, W, c) coefficients b_j, j = −2 … G."""
        if is_native(h) and not is_transformed() and not in_forward_mode():
            splines = torch.ops.implicit_steer.table_splines(h.contiguous(), *self[1:], channels)
        else:
            splines = self._plain_splines(h, channels)
        n = len(self.positions) + len(self.left) + 1 - len(self.series)
        return splines.view(-1, n, channels, self.scale.shape[1])

    def _plain_splines(self, h: Tensor, channels: int) -> Tensor:
        d, c = self.coefficients.shape
        values = (h[:, : channels * d].reshape(-1, d) @ self.coefficients).view(-1, len(self.positions), channels, c)
        values = (values * self.scale[:, None]).flatten(2)
        values = torch.cat([self.left @ values[:, : len(self.left)], values], 1)
        middle = len(SERIES) // 2
        n = values.shape[1] - 2 * middle
        total = values[:, middle : middle + n] * SERIES[middle]
        for k in range(middle):
            ends = values[:, k : k + n] + values[:, 2 * middle - k : 2 * middle - k + n]
            total = torch.add(total, ends, alpha=SERIES[k])
        return total


class _Splines(NamedTuple):
    """The plan with splines for T rows of attributes, and what calls of the operator with it keep."""

    plan: Plan
    cache: CallCache


class Tabulation:
    """What evaluating a plan through its table takes, and what a layer keeps of it from call to call.

    Attributes:
        plan, per_edge, at_knots: the plan itself; without table; and as it is evaluated at the knots.
    """

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        self.plan, self.per_edge, self.at_knots = plan, plan.per_edge, at_knots(plan)
        table, frame = cast(Table, plan.table), plan.frame
        direction, coefficients = _ray(frame)
        scale = table.positions[:, None] ** -frame.order.astype(np.float64)
        self._constants = Constants(table.radii[:, None] * direction, coefficients, scale, table.left, np.array(SERIES))
        self._knots_cache, self._splines = CallCache(), dict[int, _Splines]()
        self._coefficients: tuple[Tensor, Tensor] | None = None  # bytes of what they were made of; they themselves
        self._source: Parameters | None = None  # of the last call, and without the shell
        self._at_knots: Parameters | None = None
        self._with_splines: tuple[Parameters, Tensor, Parameters] | None = None  # of what, and what was made of it
        if bound.refusal(self.at_knots, torch.float32) is None:  # torch.compile has to find native plans
            self._knots_cache.native = bound.native_plan(self.at_knots, self.knot_parameters(parameters))
            self._source = None
        if plan.n_attributes == 0:
            self.splines(1, parameters)

    def knots(self, like: Tensor) -> _Knots:
        """The constants in the dtype and on the device of a tensor."""
        return _Knots(*self._constants.like(like))

    def knot_parameters(self, parameters: Parameters) -> Parameters:
        """The parameters without the shell; the same object while ``parameters`` is."""
        if self._source is parameters and not is_traced():
            return cast(Parameters, self._at_knots)
        shell = torch.full_like(parameters.shell_width.detach(), _NO_SHELL)
        made = Parameters(parameters.linears, parameters.norms, shell, self._knots_cache)
        if not is_traced():
            self._source, self._at_knots = parameters, made
        return made

    def with_splines(self, parameters: Parameters, coefficients: Tensor, cache: CallCache) -> Parameters:
        """As :func:`with_splines`; the same object while parameters and coefficients without gradients are, so that
        the native code keeps what it packed."""
        last = self._with_splines
        if last is None or last[0] is not parameters or last[1] is not coefficients or is_traced():
            made = with_splines(parameters, coefficients, cache)
            if coefficients.requires_grad or is_traced():
                return made
            self._with_splines = last = parameters, coefficients, made
        return last[2]

    def splines(self, types: int, parameters: Parameters) -> _Splines:
        """The plan for so many rows; it is made at its first call, which cannot be inside torch.compile."""
        if types not in self._splines:
            plan = tabulated(self.plan, types)
            native = None
            if bound.refusal(plan, torch.float32) is None:
                empty = parameters.shell_width.new_empty(plan.table_size, device="meta")
                native = bound.native_plan(plan, with_splines(parameters, empty, None))
            self._splines[types] = _Splines(plan, CallCache(native))
        return self._splines[types]

    def coefficients(self, backend: Backend, parameters: Parameters, rows: Tensor) -> Tensor:
        """The splines' coefficients at the norms' running statistics; without gradients, and on a CPU, made again only
        if a parameter, a statistic or a row holds other bytes than last time."""
        at = self.knot_parameters(parameters)
        sources = [t for pair in at.linears for t in pair if t is not None]
        sources += [*(t for norm in at.norms for t in norm), rows]
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if differentiable or is_traced() or rows.device.type != "cpu" or not _native.available()[0]:
            return self.tabulate(backend, at, rows, RUNNING)[0]
        last = self._coefficients
        if last is None or not torch.ops.implicit_steer.same_values(sources, last[0]):
            with torch.inference_mode(False), torch.no_grad():
                copy = torch.cat([t.reshape(-1) for t in sources])
                self._coefficients = last = copy, self.tabulate(backend, at, rows, RUNNING)[0]
        return last[1]

    def tabulate(
        self, backend: Backend, at: Parameters, rows: Tensor, statistics_from: StatisticsSource
    ) -> tuple[Tensor, Sequence[NormStatistics]]:
        """The splines' coefficients (T · (G + 3) · W · c,) of rows (T, A), and the norms' statistics if measured."""
        knots, types = self.knots(rows), len(rows)
        delta = knots.positions.expand(types, -1, -1).flatten(0, 1)
        attributes = rows[:, None].expand(-1, len(knots.positions), -1).flatten(0, 1)
        attributes = edge_attributes(self.plan, delta, attributes)
        h, statistics = backend.hidden(self.at_knots, at, statistics_from, delta, attributes)
        return knots.splines(h, (h.shape[1] - 1) // self.plan.field_size).reshape(-1), statistics


def with_splines(parameters: Parameters, coefficients: Tensor, cache: CallCache | None) -> Parameters:
    """The parameters of a plan with splines, which have these coefficients."""
    linears = ((coefficients, None), parameters.linears[-1])
    return Parameters(linears, (), parameters.shell_width, cache, parameters.bias)


def _ray(frame: Frame) -> tuple[NDArray[Any], NDArray[Any]]:
    """A direction (dim,), and the map (d, c) from hidden features on its ray to coefficients: the harmonics there,
    whose squares sum to 1 for each degree; in a planar frame, at azimuth 0, the two agree."""
    if frame.kind == "planar":
        return frame.plane[:, 0], np.eye(len(frame.order))
    direction = np.array([0.0, 0.0, 1.0])
    harmonics = frame.harmonics @ np.prod(direction**frame.powers, axis=1)
    return direction, harmonics[:, None] * (frame.coefficient[:, None] == np.arange(len(frame.order)))


# ---- batch statistics


@dataclass(frozen=True)
class _WeightsOfSplines:
    """Moments over the edges of what the splines give there, from hidden features at the knots.

    Attributes:
        sums: (T, G + 3, …) as :func:`~implicit_steer.ops.kernel_mlp.table_sums` gives them.
    """

    plan: Plan
    n_edges: int
    sums: Tensor
    knots: _Knots

    def __call__(self, h: Tensor) -> Moments:
        """h (T · K, W, d) → number of edges, mean (W, d), sums of squared deviations (W, d): of a coordinate's degree
        the average, since the rotation to the edge's frame keeps the sum of squares of each."""
        frame, d, knots = self.plan.frame, self.plan.field_size, self.knots
        b = knots.splines(h.flatten(1), h.shape[1]).double()  # (T, G + 3, W, c)
        ways, pairs = self.sums.double().split([self.sums.shape[-1] - 4 * b.shape[-1], 4 * b.shape[-1]], -1)
        pairs = pairs.unflatten(-1, (4, -1))  # (T, G + 3, 4, c): of b_j and b_{j + q}
        squares = torch.einsum("tjc,tjwc->wc", pairs[:, :, 0], b.square())
        for q in range(1, 4):
            squares = squares + 2 * torch.einsum("tjc,tjwc->wc", pairs[:, :-q, q], b[:, :-q] * b[:, q:])
        if frame.kind == "planar":
            partner = constant(frame, "partner", h)
            sums = torch.einsum("tjd,tjwd->wd", ways[..., :d], b)
            sums = sums + torch.einsum("tjd,tjwd->wd", ways[..., d:], b[..., partner])
        else:
            own = constant(frame, "coefficient", h)
            sums = torch.einsum("tjd,tjwd->wd", ways, b[..., own])
            squares = squares[:, own] / (2 * constant(frame, "degrees", h) + 1)
        mean = sums / self.n_edges
        squares = squares - self.n_edges * mean.square()
        return self.n_edges, mean.to(h.dtype), squares.to(h.dtype)


# ---- the operator


class Evaluation(NamedTuple):
    """What a backend is called with: plan, parameters, source of statistics and attributes (E, A); and, of a call
    through a table, the statistics that the norms measured at the knots."""

    plan: Plan
    parameters: Parameters
    statistics_from: StatisticsSource
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
        ValueError: attributes (E, A) that require gradients, which rows that edges share do not give edge by edge.
    """
    rows, numbers = _types(delta, attributes)
    tabulation = tabulation_of(plan, parameters)
    splines = tabulation.splines(len(rows), parameters)
    statistics: Sequence[NormStatistics] = ()
    if statistics_from.measured:
        sums = backend.table_sums(splines.plan, splines.cache.native, delta.detach(), numbers)
        weighted = _WeightsOfSplines(plan, len(delta), sums.unflatten(0, (len(rows), -1)), tabulation.knots(rows))
        statistics_from = StatisticsSource(measured=True, pool=statistics_from.pool, weighted=weighted)
        at = tabulation.knot_parameters(parameters)
        coefficients, statistics = tabulation.tabulate(backend, at, rows, statistics_from)
    else:
        coefficients = tabulation.coefficients(backend, parameters, rows)
    parameters = tabulation.with_splines(parameters, coefficients, splines.cache)
    return Evaluation(splines.plan, parameters, RUNNING, numbers, statistics)


def tabulation_of(plan: Plan, parameters: Parameters) -> Tabulation:
    """What a layer keeps for its plan with a table, in its cache; made anew for another plan."""
    cache = parameters.cache
    if cache is None:
        return Tabulation(plan, parameters)
    if cache.table is None or cache.table.plan is not plan:
        cache.table = Tabulation(plan, parameters)
    return cast(Tabulation, cache.table)


def _types(delta: Tensor, attributes: Tensor | EdgeTypes) -> tuple[Tensor, Tensor]:
    """Rows (T, A), and the number of each edge's row (E, 1), or (E, 0) where there is one row."""
    if isinstance(attributes, Tensor):
        if attributes.shape[1] == 0:
            return delta.new_empty(1, 0), attributes.to(delta.dtype)
        attributes = EdgeTypes.from_rows(attributes)
    rows = attributes.rows.to(delta.dtype)
    if len(rows) == 1:
        return rows, delta.new_empty(len(delta), 0)
    return rows, attributes.index.to(delta.dtype)[:, None]
