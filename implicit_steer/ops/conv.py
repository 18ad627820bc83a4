"""The one operator: out_i = bias + Σ_{e: j→i} γ s(|x_e|) K(x_e, a_e) f_j, and the kernel K alone."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..graph import EdgeTypes, Graph
from ..plan import Plan, Table
from ..plan.moments import RUNNING, NormStatistics, StatisticsSource
from ..plan.packing import Parameters, is_traced
from ..plan.tabulated import tabulated
from . import select, table, table_error
from .backend import Backend
from .native import bound
from .native.convolution import NativeBackend
from .radial import edge_attributes
from .triton import backend as triton
from .triton.handle import Handle


def compute_dtype(parameters: Parameters) -> torch.dtype:
    """float64 with float64 parameters, else float32."""
    return torch.float64 if parameters.shell_width.dtype == torch.float64 else torch.float32


def engine_plans(plan: Plan, parameters: Parameters, *, values: bool) -> tuple[bound.NativePlan | None, Handle | None]:
    """The plan for the native code and for `triton`; None where these cannot run it here. They are made before
    torch.compile, which finds them in ``parameters.cache``. ``values``: also prepare it for the kernel's values."""
    handle = triton.handle(plan)
    if plan.table is not None and not plan.is_frozen and parameters.cache is not None:
        plan = table.tabulation_of(plan, parameters).per_edge
    if bound.refusal(plan, torch.float32):
        return None, handle
    native = bound.native_plan(plan, parameters)
    if values:
        native.kernel_entries()
    return native, handle


def _cast(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    if parameters.shell_width.dtype == dtype:
        return parameters
    return parameters.changed(lambda t: t.to(dtype))


def _possible_source(plan: Plan, statistics_from: StatisticsSource, edges: int) -> StatisticsSource:
    """``statistics_from``, or ``RUNNING`` where there are no norms, or no edges of any process to measure them on."""
    measurable = statistics_from.measured and plan.norms and (edges > 0 or statistics_from.pool is not None)
    return statistics_from if measurable else RUNNING


def _per_edge(chosen: Backend, plan: Plan, delta: Tensor, attributes: Tensor | EdgeTypes) -> bool:
    """Whether the backend evaluates the MLP for every edge, and not the splines of a table."""
    found = plan.table
    if found is None or plan.is_frozen or not chosen.takes_tables:
        return True
    if not found.automatic:
        return False
    if found.error is None or found.error > table_error.TOLERANCE:
        return True
    types = attributes.shape[1] == 0 if isinstance(attributes, Tensor) else len(attributes.rows)  # 0: not known
    return types == 0 or found.knots * types >= len(delta) or delta.device.type != "cpu"


def _evaluation(
    chosen: Backend,
    plan: Plan,
    parameters: Parameters,
    delta: Tensor,
    attributes: Tensor | EdgeTypes,
    statistics_from: StatisticsSource,
) -> table.Evaluation:
    """What the backend gets: the plan itself and attributes (E, A), or one with splines instead of hidden layers."""
    if not _per_edge(chosen, plan, delta, attributes):
        return table.evaluation(chosen, plan, parameters, delta, attributes, statistics_from)
    attributes = edge_attributes(plan, delta, attributes)
    if plan.table is not None and not plan.is_frozen:
        plan = table.tabulation_of(plan, parameters).per_edge
    return table.Evaluation(plan, parameters, statistics_from, attributes, ())


class _Served(NamedTuple):
    """The backend of a call that took plan and tensors as they were, and what its choice rested on."""

    plan: Plan
    parameters: Parameters
    backend: str
    dtype: torch.dtype
    device: torch.device
    chosen: NativeBackend | triton.Triton

    def serves(
        self, plan: Plan, parameters: Parameters, backend: str, x: Tensor, delta: Tensor, attributes: Tensor | EdgeTypes
    ) -> bool:
        """Whether a call with these arguments rests on the same."""
        if self.plan is not plan or self.parameters is not parameters or self.backend != backend:
            return False
        dtype, width = self.dtype, parameters.shell_width  # .to() leaves the same objects
        if width.dtype != dtype or width.device != self.device or x.dtype != dtype or delta.dtype != dtype:
            return False
        return isinstance(attributes, Tensor) and attributes.dtype == dtype


def implicit_conv(
    plan: Plan,
    parameters: Parameters,
    graph: Graph,
    x: Tensor,
    delta: Tensor,
    attributes: Tensor | EdgeTypes,
    *,
    statistics_from: StatisticsSource,
    backend: str = "auto",
) -> tuple[Tensor, Sequence[NormStatistics]]:
    """out_i = bias + Σ_{e: j→i} γ s(|x_e|) K(x_e, a_e) f_j. The arguments are taken as valid: ``nn`` checks them.

    Args:
        plan: what to compute.
        parameters: what was learned.
        graph: N_src, N_dst nodes and E edges.
        x: (N_src, C_in) features, any floating dtype; the arithmetic is the parameters' (at least float32).
        delta: (E, dim), position of the target minus that of the source.
        attributes: (E, A) without the radial inputs, A = 0 without attributes; or the types of the edges.
        statistics_from: where the batch norms take their statistics from.
        backend: name, or "auto".

    Returns:
        (N_dst, C_out) in the arithmetic's dtype, and one :class:`NormStatistics` per batch norm if they were measured.
    """
    statistics_from = _possible_source(plan, statistics_from, graph.num_edges)
    cache = None if is_traced() else parameters.cache
    served = cache and cache.served
    if served and served.serves(plan, parameters, backend, x, delta, attributes):
        return served.chosen.forward(plan, parameters, statistics_from, graph, x, delta, attributes)
    dtype = compute_dtype(parameters)
    chosen = (
        select.choose_in_compiled(backend, parameters, x.device)
        or select.choose(backend, plan, x.device, dtype, graph.num_edges)[0]
    )
    given = plan, parameters, attributes
    parameters = _cast(parameters, dtype)
    x, delta = (t if t.dtype == dtype else t.to(dtype) for t in (x, delta))
    found = _evaluation(chosen, plan, parameters, delta, attributes, statistics_from)
    plan, parameters, statistics_from, attributes, of_table = found
    as_given = all(map(operator.is_, given, (plan, parameters, attributes)))
    if cache is not None and as_given and isinstance(chosen, (NativeBackend, triton.Triton)):
        cache.served = _Served(plan, parameters, backend, dtype, x.device, chosen)
    out, statistics = chosen.forward(plan, parameters, statistics_from, graph, x, delta, attributes)
    return out, of_table if len(of_table) else statistics


def implicit_kernel(
    plan: Plan,
    parameters: Parameters,
    delta: Tensor,
    attributes: Tensor | EdgeTypes,
    *,
    statistics_from: StatisticsSource,
) -> tuple[Tensor, Sequence[NormStatistics]]:
    """K (P, C_out, C_in) at P points, from delta (P, dim) and attributes (P, A), or their types; and the statistics of
    every batch norm if they were measured."""
    dtype = compute_dtype(parameters)
    chosen = (
        select.choose_in_compiled("cpu", parameters, delta.device)
        or select.choose_for_kernel(plan, delta.device, dtype)[0]
    )
    parameters = _cast(parameters, dtype)
    statistics_from = _possible_source(plan, statistics_from, delta.shape[0])
    points = delta.to(dtype)
    found = _evaluation(chosen, plan, parameters, points, attributes, statistics_from)
    plan, parameters, statistics_from, attributes, of_table = found
    k, statistics = chosen.kernel(plan, parameters, statistics_from, points, attributes)
    return k.to(delta.dtype), of_table if len(of_table) else statistics


def frozen(plan: Plan, parameters: Parameters, rows: Tensor) -> tuple[Plan, Tensor]:
    """The plan with the splines of its table in place of its hidden layers, for rows (T, A) of attributes, and the
    splines' coefficients (T (G + 3) W c,), at the norms' running statistics and in the arithmetic's dtype. The new
    plan's table has its error. A table that chooses its knots does so here. All tensors are on the CPU."""
    dtype = compute_dtype(parameters)
    parameters, rows = _cast(parameters, dtype), rows.to(dtype)
    with torch.no_grad():
        if cast(Table, plan.table).automatic and cast(Table, plan.table).error is None:
            plan = table_error.choose_knots(select.for_comparison(plan), plan, parameters, rows)
        backend, tabulation = select.choose("auto", plan, rows.device, dtype)[0], table.Tabulation(plan, parameters)
        coefficients, _ = tabulation.tabulate(backend, tabulation.knot_parameters(parameters), rows, RUNNING)
        error = table_error.table_error(select.for_comparison(plan), plan, parameters, rows)
    found = replace(cast(Table, plan.table), error=error)
    return tabulated(replace(plan, table=found), len(rows)), coefficients
