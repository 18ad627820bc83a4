"""Plans with tables: as a user asks for one, at its knots, and with splines in place of the hidden layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from .._check import fail, require, require_integer
from .plan import Plan
from .table import FEWEST_KNOTS, Table


def with_table(plan: Plan, table: int | str | None, width: float) -> Plan:
    """The plan with the table that a user asked for: None, how many knots, or "auto"; ``width``: the shell's σ.

    Batch norms count edges beyond the cutoff, too: their tables do not end there.

    Raises:
        ValueError, TypeError: another value; a plan whose hidden coefficients are no functions of the radius.
    """
    if table is None:
        return replace(plan, table=None)
    automatic = isinstance(table, str)
    require(not automatic or table == "auto", "table", "None, a number of knots or 'auto'", repr(table))
    knots = FEWEST_KNOTS if isinstance(table, str) else table
    require_integer("table", knots, FEWEST_KNOTS)
    if (reason := plan.table_refusal) is not None:
        fail("table", "None", repr(table), f"Of this layer there can be no table: {reason}.")
    bounded = plan.cutoff is not None and not plan.norms
    length = cast(float, plan.cutoff) if bounded else 2 * width
    even = plan.radial is None or plan.radial.even
    return replace(plan, table=Table(knots, float(length), bounded, even, automatic=automatic))


def at_knots(plan: Plan) -> Plan:
    """The plan whose hidden features at a table's knots are wanted: without shell, cutoff and table."""
    return replace(plan, gamma=1.0, cutoff=None, table=None)


def tabulated(plan: Plan, types: int) -> Plan:
    """The plan with splines for ``types`` rows of attributes in place of its hidden layers and batch norms. An edge has
    one attribute, the number of its row, unless there is one row only."""
    frame, n = plan.frame, int(types > 1)
    given: dict[str, Any] = {"attribute": np.eye(n)}
    if frame.kind == "planar":
        zeros = np.zeros(n, dtype=np.int64)
        given |= {"attribute_order": zeros, "attribute_partner": zeros, "attribute_sign": np.zeros(n)}
    frame = replace(frame, regular=False, **given)  # splines are regular at the origin as they are
    table = replace(cast(Table, plan.table), types=types, automatic=False)
    return replace(plan, linears=(), activations=(), norms=(), frame=frame, table=table, radial=None)
