"""A plan as the kernels read it: sizes, and tables of real numbers and of integers.

``columns.py`` says what r holds, ``mlp_tables.py`` makes the tables of the frame and the hidden layers,
``contract_tables.py``, with a worked example, those of the contraction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...plan import FUNCTIONS, Plan
from .columns import Columns
from .contract_tables import ContractTables, accumulators_of, extents_of, positions_of, row_extents, slots_of
from .mlp_tables import frame_tables, kind_of, layer_tables
from .sizes import Sizes

MOST_COEFFICIENTS = 512  # of a hidden layer: they stay on chip
_MOST_OF_AN_EDGE = 48  # coefficients of a hidden layer that a thread holds; more spill


def unsupported(plan: Plan) -> str | None:
    """Why the kernels cannot do this plan, or None."""
    order, activations = plan.frame.order, plan.activations
    if plan.is_frozen:
        return _too_wide(plan.hidden_coefficients) or _scattered(plan)
    if not activations:
        return None if plan.frame.kind == "none" else "without hidden layers, frame 'none'"
    first = activations[0]
    if any(a.function != first.function or a.channels != first.channels for a in activations):
        return "one activation function and one number of channels in all layers"
    if any(a.samples.shape != first.samples.shape for a in activations):
        return "equally many samples in all layers"
    if refused := _too_wide(len(order) * first.channels):
        return refused
    if plan.frame.regular and _mixes_orders(plan):
        return "hidden layers that keep coefficients of order 0 apart"
    return None if plan.frame.kind == "none" else _scattered(plan)


def _too_wide(n: int) -> str | None:
    """The refusal of so many coefficients."""
    return f"at most {MOST_COEFFICIENTS} coefficients in a hidden layer, not {n}" if n > MOST_COEFFICIENTS else None


def _scattered(plan: Plan) -> str | None:
    """The refusal of couplings that read each hidden field at other coordinates."""
    if any(len(set(c.hidden_start % plan.field_size)) > 1 for c in plan.couplings if not plan.reads_one(c)):
        return "couplings that read the same coordinates of all hidden fields"
    return None


def _mixes_orders(plan: Plan) -> bool:
    """Whether a hidden layer of a regular frame maps order 0 to higher ones or back."""
    order, c = plan.frame.order, len(plan.frame.order)
    for n, layer in enumerate(plan.linears):
        into = np.tile(order, layer.in_size // c) if n else np.array([1] + [0] * (layer.in_size - 1))
        out = np.tile(order, layer.out_size // c)
        if (np.abs(layer.bias).sum(1) * out).any():
            return True
        for block in layer.blocks:
            _, o, i = np.nonzero(block.basis)
            rows, columns = out[block.out_start[:, None] + o], into[block.in_start[:, None] + i]
            if ((rows[:, None] == 0) != (columns[None] == 0)).any():
                return True
    return False


def runs_edge_by_edge(plan: Plan) -> bool:
    """Whether edges.py does the hidden layers of a plan that the kernels can do."""
    return unsupported(plan) is None and _edge_by_edge(plan, Columns(plan))


def _edge_by_edge(plan: Plan, columns: Columns) -> bool:
    """Whether edges.py can do the hidden layers: of zonal frames, whose orders do not mix, and narrow."""
    zonal = plan.activations and plan.frame.kind == "zonal" and plan.frame.regular and columns.n_harmonics > 0
    return bool(zonal) and len(plan.frame.order) * columns.channels <= _MOST_OF_AN_EDGE


@dataclass(frozen=True, eq=False)
class Tables:
    """What the kernels read of a plan. ``numbers`` are real, ``indices`` integers; both become tensors on the
    device."""

    plan: Plan
    sizes: Sizes
    numbers: dict[str, NDArray[Any]]
    indices: dict[str, NDArray[Any]]
    mixing: list[NDArray[Any]]  # per coupling (b, s, o): Θ's coefficients in the intertwiners' θ
    position: NDArray[Any]  # of every (s, v, w, u, o) of all couplings in the flat Θ (n_t, C_out)
    pick: NDArray[Any]  # zonal: coordinates of q; planar: a coordinate of each order 1 .. most


@lru_cache(maxsize=256)
def tables(plan: Plan) -> Tables:
    """The plan's tables; cached."""
    columns = Columns(plan)
    numbers, indices, pick = frame_tables(plan, columns)
    layer_numbers, layer_indices = layer_tables(plan, columns)

    slots, mixing = zip(*(slots_of(columns, c) for c in plan.couplings), strict=True) if plan.couplings else ((), ())
    rows = row_extents(plan, slots)
    accumulators = [accumulators_of(c, s, rows[0]) for c, s in zip(plan.couplings, slots, strict=True)]
    all_accumulators = [a for found in accumulators for a in found]
    extents = extents_of(plan, columns, rows, all_accumulators)
    contract = ContractTables(all_accumulators, extents, columns)
    position = positions_of(plan, list(zip(accumulators, map(len, slots), strict=True)))

    numbers |= layer_numbers | contract.numbers
    indices |= layer_indices | contract.indices
    return Tables(plan, _sizes(plan, columns, numbers, contract), numbers, indices, list(mixing), position, pick)


def _sizes(plan: Plan, columns: Columns, numbers: dict[str, NDArray[Any]], contract: ContractTables) -> Sizes:
    frame, activations, table, channels = plan.frame, plan.activations, plan.table, columns.channels
    c = len(frame.order) if activations or table else 0
    zero = frame.n_zero if frame.regular else c
    return Sizes(
        kind=kind_of(plan),
        dim=frame.dim,
        n_attributes=frame.n_attributes,
        n_inputs=frame.n_position - frame.regular + frame.n_attributes,
        regular=frame.regular,
        channels=channels,
        n_zero=zero * channels,
        n_rest=(c - zero) * channels,
        n_columns=columns.one + 1,
        n_samples=channels * numbers["samples"].shape[1],
        n_layers=len(activations),
        n_knots=table.knots if table else 0,
        n_types=table.types if table else 0,
        bounded=table is not None and table.bounded,
        even=table is not None and table.even,
        n_harmonics=columns.n_harmonics,
        function=FUNCTIONS.index(activations[0].function) if activations else 0,
        in_size=plan.in_size,
        out_size=plan.out_size,
        n_t=contract.n_t,
        slots=contract.extents.slots,
        fields=contract.extents.fields,
        columns=contract.extents.columns,
        components=contract.extents.components,
        most_components=contract.extents.most_components,
        n_accumulators=len(contract.accumulators),
        n_slices=contract.n_slices,
        n_covered=contract.n_covered,
        has_cutoff=plan.cutoff is not None,
        edge_by_edge=_edge_by_edge(plan, columns),
    )
