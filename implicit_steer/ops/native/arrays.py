"""A plan as the native operator reads it: two flat arrays of numbers, and a sparse matrix that packs the parameters.

The counterparts in C++ are ``csrc/plan.h`` and ``csrc/packing.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from ...plan import FUNCTIONS, Frame, Linear, Plan
from ...plan.packing import parameter_starts
from ..packing_rows import bias_rows, linear_rows, selection
from .headers import CouplingHeader, LayerHeader, PlanHeader
from .packing_matrix import PackingMatrix, ThetaLayouts, dense_couplings, kernel_rows, theta_layouts
from .sample_pairs import sample_pairs
from .terms import Monomials, Terms, padded

FRAME_KINDS = ("none", "zonal", "planar")  # FrameKind of csrc/plan.h


class PlanArrays(NamedTuple):
    """A plan ready for the native code."""

    ints: Tensor  # int32
    reals: dict[torch.dtype, Tensor]
    rowptr: Tensor  # the packing matrix in compressed rows, int32
    column: Tensor
    values: dict[torch.dtype, Tensor]

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The plan."""
        return self.ints, self.reals[dtype]

    def matrix(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What packs the parameters."""
        return self.rowptr, self.column, self.values[dtype]


@lru_cache(maxsize=256)
def plan_arrays(plan: Plan, sizes: tuple[int, ...]) -> PlanArrays:
    """``sizes``: of the parameters, in the order of ``packing.learned_tensors``."""
    builder = _Builder(plan, sizes)
    builder.pack_table()
    builder.pack_hidden_layers()
    builder.pack_batch_norms()
    builder.pack_shell_width()
    builder.pack_last_layer()
    numbers = builder.plan_numbers()
    return _as_tensors(numbers, builder.packing.stacked())


def _as_tensors(numbers: _Numbers, matrix: sparse.csr_matrix) -> PlanArrays:
    """On the CPU, also where a layer is built under another default device, as on "meta": they are kept."""

    def by_dtype(reals: Any) -> dict[torch.dtype, Tensor]:
        return {dtype: torch.as_tensor(reals, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}

    def int32(ints: Any) -> Tensor:
        return torch.as_tensor(ints, dtype=torch.int32, device="cpu")

    return PlanArrays(
        int32(numbers.ints), by_dtype(numbers.reals), int32(matrix.indptr), int32(matrix.indices), by_dtype(matrix.data)
    )


class _Numbers:
    """Two growing lists: the plan's integers and its real numbers, in the order in which csrc/plan.h reads them."""

    def __init__(self) -> None:
        self.ints: list[int] = []
        self.reals: list[float] = []

    def add_ints(self, *values: Any) -> None:
        for value in values:
            self.ints += np.asarray(value).reshape(-1).tolist()

    def add_reals(self, *values: Any) -> None:
        for value in values:
            self.reals += np.asarray(value, dtype=np.float64).reshape(-1).tolist()


class _RowGroups(NamedTuple):
    """The structural nonzeros of a linear layer, rows with equal columns together."""

    ints: list[int]  # per group: n_rows, n_columns, rows, columns
    n_groups: int
    places: NDArray[Any]  # position in the flat (out, in) matrix of every packed value
    n_active: int  # coefficients of a channel that can differ from 0: the first ones


def _row_groups(layer: Linear, coefficients: int, in_position: NDArray[Any], out_position: NDArray[Any]) -> _RowGroups:
    """``in_position`` (in_size,), ``out_position`` (out_size,): where the native code keeps each input and output."""
    nonzero = np.zeros((layer.out_size, layer.in_size), dtype=bool)
    for block in layer.blocks:
        o, i = np.nonzero(np.abs(block.basis).sum(0))
        nonzero[block.out_start[:, None, None] + o, block.in_start[None, :, None] + i] = True
    by_columns: dict[tuple[int, ...], list[int]] = {}
    for row in range(layer.out_size):
        by_columns.setdefault(tuple(np.flatnonzero(nonzero[row])), []).append(row)
    ints: list[int] = []
    places = [np.zeros(0, dtype=np.int64)]
    for key, rows in by_columns.items():
        columns = np.array(key, dtype=int)
        ints += [len(rows), len(columns), *out_position[rows].tolist(), *in_position[columns].tolist()]
        places.append((np.array(rows)[:, None] * layer.in_size + columns).reshape(-1))
    active = np.flatnonzero(nonzero.any(1) | (np.abs(layer.bias).sum(1) > 0)) % coefficients
    return _RowGroups(ints, len(by_columns), np.concatenate(places), 1 + int(active.max(initial=0)))


class _PackedLinear(NamedTuple):
    """Where a hidden layer's numbers are among the packed weights."""

    groups: _RowGroups
    weight: int
    bias: int


class _PackedNorm(NamedTuple):
    """Where a batch norm's scale and shift are among the packed weights, and its parameters among all; −1: none."""

    affine: int = -1
    weight: int = -1
    bias: int = -1


class _Harmonics(NamedTuple):
    """Each Y_m of a zonal frame as a sum of monomials; what the couplings read comes first. Empty for other frames."""

    terms: list[tuple[int, int]]  # m, number of the monomial
    values: list[float]  # of each term
    monomials: list[tuple[int, int]]  # as Monomials.factors
    used: int = 0  # terms that the couplings read
    used_monomials: int = 0


def _harmonics(frame: Frame, used: set[int]) -> _Harmonics:
    """``used``: the m that the couplings read."""
    if frame.kind != "zonal":
        return _Harmonics([], [], [])
    entries = [(m, j) for m, j in zip(*np.nonzero(np.abs(frame.harmonics) > 1e-14), strict=True)]
    entries.sort(key=lambda entry: entry[0] not in used)
    monomials = Monomials()
    of_entry = [monomials.add(tuple(frame.powers[j].tolist())) for _, j in entries]
    n_used = sum(m in used for m, _ in entries)
    terms = [(m, monomial) for (m, _), monomial in zip(entries, of_entry, strict=True)]
    values = [frame.harmonics[entry] for entry in entries]
    return _Harmonics(terms, values, monomials.factors, n_used, 1 + max(of_entry[:n_used], default=0))


class _Builder:
    """The arrays of one plan. Each ``pack_`` step adds rows to the packing matrix and keeps where the packed weights
    that they make begin; they follow each other in the order of the parameters. The last step, ``plan_numbers``, writes
    the plan with these positions."""

    def __init__(self, plan: Plan, sizes: tuple[int, ...]) -> None:
        self.plan, self.pairs = plan, sample_pairs(plan)
        self.couplings = dense_couplings(plan) if plan.dense_coupling else plan.couplings
        self.terms = Terms(plan, self.couplings, self.pairs.position)
        self.harmonics = _harmonics(plan.frame, set(self.terms.nz_harmonic))
        self.adjoint, self.harmonic_terms = self.terms.adjoint(), self.terms.harmonic_terms()
        self.n_coefficients = max(len(plan.frame.order), 1)  # of a channel
        self.n_inputs = plan.frame.n_position + plan.frame.n_attributes
        self.n_trivial = len(plan.norms[0].trivial) if plan.norms else 0
        self.starts = parameter_starts(plan, sizes)
        self.packing = PackingMatrix(sum(sizes))
        self.linears: list[_PackedLinear] = []
        self.norms: list[_PackedNorm] = []

    # ---- the packed weights

    def pack_table(self) -> None:
        """Spline by spline, each with the coefficients that couplings read, and of each a row of all channels."""
        self.table = 0
        if self.plan.is_frozen:
            first, channels = self.starts.splines, self.plan.hidden_coefficients // self.n_coefficients
            parameters = np.arange(first, first + self.plan.table_size)
            read = parameters.reshape(-1, channels, self.n_coefficients)[:, :, : self.terms.used].swapaxes(1, 2)
            filled = ((0, 0), (0, 0), (0, padded(channels) - channels))
            self.table = self.packing.add_copies(np.pad(read, filled, constant_values=-1).reshape(-1))

    def pack_hidden_layers(self) -> None:
        """W of every hidden layer as groups of rows, and b, row by row."""
        n_parameters = self.packing.n_parameters
        in_position = np.arange(self.n_inputs)
        for layer, (weights_start, bias_start) in zip(self.plan.linears, self.starts.linears, strict=True):
            channels = np.arange(layer.out_size // self.n_coefficients)
            out_position = (channels[:, None] * self.n_coefficients + self.pairs.position).reshape(-1)
            groups = _row_groups(layer, self.n_coefficients, in_position, out_position)
            weight = self.packing.add(linear_rows(layer, groups.places, weights_start, n_parameters))
            bias = self.packing.add(bias_rows(layer, np.argsort(out_position), bias_start, n_parameters))
            self.linears.append(_PackedLinear(groups, weight, bias))
            in_position = out_position

    def pack_batch_norms(self) -> None:
        """Scales and shifts depend on statistics: the native code sets them, the matrix leaves them 0."""
        for norm, (weight, bias) in zip(self.plan.norms, self.starts.norms, strict=True):
            affine = self.packing.add_copies(np.full(norm.channels * (1 + self.n_trivial), -1))
            self.norms.append(_PackedNorm(affine, weight, bias))

    def pack_shell_width(self) -> None:
        self.shell = self.packing.add_copies(np.array([self.starts.shell]))

    def pack_last_layer(self) -> None:
        """θ of all couplings in one layout, then in the other: only the first one's gradient is computed, which makes
        the weights before it the first ``n_grad``."""
        starts, rows_of = self.starts.last | {"kernel": 0}, self._theta_rows()
        layouts: list[ThetaLayouts] = []
        for coupling in self.couplings:
            constant = self.plan.reads_one(coupling)
            layouts.append(theta_layouts(coupling, starts[coupling.parameter], constant))
        self.theta = [self.packing.add(rows_of(layout.theta)) for layout in layouts]
        self.n_grad = self.packing.n_rows
        self.theta_forward = [self.packing.add(rows_of(layout.theta_forward)) for layout in layouts]

    def _theta_rows(self) -> Callable[[NDArray[Any]], sparse.csr_matrix]:
        """What makes rows of the packing matrix of the positions in a layout of θ: of parameters or, in a dense
        coupling, of entries of the kernel tensor."""
        n_parameters = self.packing.n_parameters
        if not self.plan.dense_coupling:
            return lambda parameters: selection(parameters, n_parameters)
        kernel = kernel_rows(self.plan, self.starts.last, n_parameters)
        return lambda entries: selection(entries, kernel.shape[0]) @ kernel

    # ---- the plan

    def plan_numbers(self) -> _Numbers:
        numbers, terms = _Numbers(), self.terms
        self._add_scalars(numbers)
        self._add_frame(numbers)
        for n in range(len(self.plan.linears)):
            self._add_layer(numbers, n)
        numbers.add_ints(0, np.cumsum([len(row) for row in terms.rows]), [p for row in terms.rows for p in row])
        self._add_products(numbers)
        for n in range(len(self.couplings)):
            self._add_coupling(numbers, n)
        return numbers

    def _header(self) -> PlanHeader:
        plan, frame, terms = self.plan, self.plan.frame, self.terms
        hidden, table, harmonics = plan.hidden_coefficients, plan.table if plan.is_frozen else None, self.harmonics
        orders = [*frame.order, *frame.attribute_order] if frame.kind == "planar" else []
        return PlanHeader(
            kind=FRAME_KINDS.index(frame.kind),
            dim=frame.dim,
            n_attr=frame.n_attributes,
            regular=frame.regular,
            n_inputs=self.n_inputs,
            in_size=plan.in_size,
            out_size=plan.out_size,
            n_layers=len(plan.linears),
            d=plan.field_size,
            c=self.n_coefficients,
            channels=hidden // self.n_coefficients,
            order_zero=frame.n_zero,
            function=FUNCTIONS.index(plan.activations[0].function) if plan.activations else 0,
            n_couplings=len(self.couplings),
            n_rows=len(terms.rows),
            n_g=len(terms.factors),
            n_weights=self.packing.n_rows,
            n_grad=self.n_grad,
            shell_at=self.shell,
            has_cutoff=plan.cutoff is not None,
            hidden_flat=hidden,
            has_norms=bool(plan.norms),
            n_trivial=self.n_trivial,
            n_parameters=self.packing.n_parameters,
            n_even=int((~self.pairs.odd).sum()),
            n_gathered=len(terms.inputs.channel),
            n_mixed=len(terms.outputs.channel),
            n_sums=terms.n_sums,
            n_slot_sums=terms.n_slot_sums,
            n_read=terms.used,
            n_knots=table.knots if table else 0,
            n_types=table.types if table else 0,
            table_at=self.table,
            bounded=table is not None and table.bounded,
            even=table is not None and table.even,
            attribute_identity=np.array_equal(frame.attribute, np.eye(frame.n_attributes)),
            n_harmonics=len(harmonics.terms),
            n_monomials=len(harmonics.monomials),
            used_harmonics=harmonics.used,
            used_monomials=harmonics.used_monomials,
            max_power=max(orders, default=0),
            n_products=len(terms.products) // 4,
            product_size=terms.product_size,
            n_adjoint=len(self.adjoint[0]) // 4,
            n_harmonic_terms=len(self.harmonic_terms[1]),
        )

    def _add_scalars(self, numbers: _Numbers) -> None:
        """The header, and what places coefficients, inputs and outputs."""
        plan, position, zonal = self.plan, self.pairs.position, self.plan.frame.kind == "zonal"
        numbers.add_ints(self._header())
        numbers.add_reals(plan.gamma, plan.cutoff or 1.0, plan.norms[0].eps if plan.norms else 0.0)
        numbers.add_reals(plan.table.length if plan.table else 1.0, plan.table.spacing if plan.table else 1.0)
        numbers.add_ints(position[plan.frame.coefficient] if zonal else position)
        if plan.norms:
            # Coordinates of h: those of the frame's coefficients but for zonal frames.
            measured = plan.norms[0].measured
            numbers.add_ints(position[plan.norms[0].trivial], measured if zonal else position[measured])
        output_place = np.full(plan.out_size, -1)
        channel = np.array(self.terms.outputs.channel, dtype=int)
        output_place[channel[channel >= 0]] = np.flatnonzero(channel >= 0)
        numbers.add_ints(self.terms.inputs.channel, output_place)

    def _add_frame(self, numbers: _Numbers) -> None:
        frame, position, order, harmonics = self.plan.frame, self.pairs.position, self.pairs.order, self.harmonics
        numbers.add_reals(frame.attribute)
        if frame.kind == "zonal":
            numbers.add_ints(frame.degrees, harmonics.monomials, harmonics.terms)
            numbers.add_reals(harmonics.values)
        elif frame.kind == "planar":
            numbers.add_ints(frame.order[order], position[frame.partner[order]])
            numbers.add_ints(frame.attribute_order, frame.attribute_partner)
            numbers.add_reals(frame.plane, frame.axis, frame.sign[order], frame.attribute_sign)

    def _add_products(self, numbers: _Numbers) -> None:
        terms, (adjoint, adjoint_terms), (harmonic_terms, values) = self.terms, self.adjoint, self.harmonic_terms
        numbers.add_ints(terms.products, [place for place, _, _ in terms.factors], terms.g_first, terms.nz_harmonic)
        numbers.add_reals(terms.nz_value)
        numbers.add_ints(adjoint, [place for place, _ in adjoint_terms], [g for _, g in adjoint_terms], harmonic_terms)
        numbers.add_reals(values)

    def _add_layer(self, numbers: _Numbers, n: int) -> None:
        plan, pairs = self.plan, self.pairs
        layer, act, packed = plan.linears[n], plan.activations[n], self.linears[n]
        norm = self.norms[n] if plan.norms else _PackedNorm()
        # coefficients of the activation that anything reads: the last one's that the couplings do
        is_last = n + 1 == len(plan.linears)
        n_read = self.terms.used if is_last and not plan.norms else self.n_coefficients
        (in_even, in_odd), (out_even, out_odd) = map(pairs.parity_counts, (packed.groups.n_active, n_read))
        header = LayerHeader(
            in_size=layer.in_size,
            out_size=layer.out_size,
            n_samples=len(act.samples),
            weight=packed.weight,
            bias=packed.bias,
            affine=norm.affine,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            n_values=len(packed.groups.places),
            n_pairs=len(pairs.first),
            in_even=in_even,
            in_odd=in_odd,
            out_even=out_even,
            out_odd=out_odd,
            n_groups=packed.groups.n_groups,
        )
        numbers.add_ints(header, len(packed.groups.ints), packed.groups.ints)
        samples, inverse = act.samples[:, pairs.order], act.inverse.T[:, pairs.order]
        kept = [*pairs.first, *pairs.single]  # of each pair the first
        numbers.add_reals(samples, inverse, samples[kept], inverse[kept])

    def _add_coupling(self, numbers: _Numbers, n: int) -> None:
        coupling, terms = self.couplings[n], self.terms.couplings[n]
        header = CouplingHeader(
            n_out=len(coupling.out_start),
            n_in=len(coupling.in_start),
            n_hidden=len(coupling.hidden_start),
            n_basis=coupling.basis.shape[0],
            constant=self.plan.reads_one(coupling),
            depthwise=coupling.depthwise,
            n_slots=len(terms.slots),
            n_groups=len(terms.groups),
            n_blocks=len(terms.blocks),
            theta=self.theta[n],
            theta_forward=self.theta_forward[n],
            out_at=terms.out_at,
        )
        numbers.add_ints(header, terms.slots, terms.groups, terms.blocks, terms.places)
