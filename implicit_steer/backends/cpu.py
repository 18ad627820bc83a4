"""Backend `cpu`: one native pass per tile of edges (``csrc/cpu``): MLP, coupling, sum per node; backward likewise.

Nothing is stored per edge but one gradient of the gathered features, E × C_in. The hidden values are recomputed in the
backward pass. First derivatives only: asked for by name, differentiating a gradient raises; under "auto", gradients
that are to be differentiated again come from `eager`.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import native
from .._check import require
from ..graph import Graph
from ..packing import NormParameters, Weights, fold_linear, fold_theta, norm_affine
from ..plan import FUNCTIONS, Coupling, Linear, Norm, Plan
from . import eager
from .hidden import Statistics

INSTRUCTION_SETS = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3}
_NO_SECOND_DERIVATIVES = (
    "backend: expected one with second derivatives, got 'cpu', whose gradients cannot be differentiated again. "
    "Use backend='eager'."
)


def instruction_set() -> int:
    """Number of the instruction set to run, from the environment variable ``IMPLICIT_STEER_ISA``; 0: the widest."""
    name = os.environ.get("IMPLICIT_STEER_ISA", "auto")
    require(name in INSTRUCTION_SETS, "IMPLICIT_STEER_ISA", f"one of {tuple(INSTRUCTION_SETS)}", repr(name))
    return INSTRUCTION_SETS[name]


def supports(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """CPU tensors in float32 or float64, with the native extension; every plan that the lowering makes."""
    available, reason = native.available()
    if not available:
        return False, f"the native extension is missing: {reason}"
    if device.type != "cpu":
        return False, f"runs on CPU tensors, these are on {device}"
    if dtype not in (torch.float32, torch.float64):
        return False, f"computes in float32 or float64, not {dtype}"
    reason = _unsupported(plan)
    return reason is None, reason or "native, fused, one SIMD lane per edge"


@lru_cache(maxsize=256)
def _unsupported(plan: Plan) -> str | None:
    coefficients = len(plan.frame.order)
    if plan.frame.dim not in (1, 2, 3):
        return f"positions in 1 to 3 dimensions, not {plan.frame.dim}"
    if len({act.function for act in plan.activations}) > 1:
        return "one activation function in all layers"
    if any(act.samples.shape[1] != coefficients for act in plan.activations):
        return "one hidden representation in all layers"
    if not plan.activations:
        return None if plan.frame.kind == "none" else "without hidden layers, frame 'none'"
    d = _field_size(plan)
    if any((c.hidden_start % d).any() for c in plan.couplings if not _reads_one(plan, c)):
        return "couplings that read whole hidden fields"
    return None


def _field_size(plan: Plan) -> int:
    """d: coordinates of one hidden field."""
    if not plan.activations:
        return 1
    return len(plan.frame.coefficient) if plan.frame.kind == "zonal" else len(plan.frame.order)


def _reads_one(plan: Plan, c: Coupling) -> bool:
    return len(c.hidden_start) == 1 and c.basis.shape[3] == 1 and c.hidden_start[0] == plan.hidden_size - 1


# ---- the plan as two flat arrays, in the order in which csrc/plan.h reads them


class _Flat:
    """Two growing lists of numbers."""

    def __init__(self):
        self.ints: list[int] = []
        self.reals: list[float] = []

    def i(self, *values) -> None:
        for value in values:
            self.ints += np.asarray(value).reshape(-1).tolist()

    def r(self, *values) -> None:
        for value in values:
            self.reals += np.asarray(value, dtype=np.float64).reshape(-1).tolist()


class _Groups(NamedTuple):
    """Structural nonzeros of a linear layer: rows with equal columns together."""

    ints: list[int]  # per group: n_rows, n_columns, rows, columns
    count: int
    index: np.ndarray  # position in the flat (out, in) matrix of every packed value
    active: int  # coefficients of a channel that can differ from 0


def _groups(layer: Linear, coefficients: int) -> _Groups:
    pattern = np.zeros((layer.out_size, layer.in_size), dtype=bool)
    for block in layer.blocks:
        o, i = np.nonzero(np.abs(block.basis).sum(0))
        rows, columns = block.out_start[:, None, None] + o, block.in_start[None, :, None] + i
        pattern[np.broadcast_arrays(rows, columns)[0], np.broadcast_arrays(rows, columns)[1]] = True
    by_columns: dict[tuple, list[int]] = {}
    for row in range(layer.out_size):
        if pattern[row].any():
            by_columns.setdefault(tuple(np.flatnonzero(pattern[row])), []).append(row)
    ints, index = [], []
    for columns, rows in by_columns.items():
        ints += [len(rows), len(columns), *rows, *map(int, columns)]
        index.append((np.array(rows)[:, None] * layer.in_size + np.array(columns)).reshape(-1))
    nonzero = pattern.any(1) | (np.abs(layer.bias).sum(1) > 0)
    active = 1 + int((np.flatnonzero(nonzero) % coefficients).max(initial=0))
    return _Groups(ints, len(by_columns), np.concatenate([*index, np.zeros(0, dtype=np.int64)]), active)


class _Terms:
    """The couplings as terms ``T[slot, v, w] += t[v] · row[w]``, with ``t[v] = Σ_g f[v, i_g] G_g`` and
    ``G = Σ value · Y[m]``."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.rows: dict[tuple[int, ...], int] = {}  # positions of the channels → number
        self.g_input, self.g_first, self.nz_harmonic, self.nz_value = [], [0], [], []
        self.couplings = [self._coupling(c) for c in plan.couplings]
        # what the couplings read of a channel's coefficients
        coefficients = max(len(plan.frame.order), 1)
        used = max((p % coefficients for row in self.rows for p in row), default=0)
        self.used = coefficients if plan.frame.kind == "planar" else used + 1

    def _read(self, c: Coupling, m: int) -> tuple[int, int]:
        """Row (−1: the constant one) and harmonic (−1: none) of coordinate m of the coupling's hidden fields."""
        if _reads_one(self.plan, c):
            return -1, -1
        positions, harmonic = c.hidden_start + m, -1
        if self.plan.frame.kind == "zonal":
            d, coefficient = _field_size(self.plan), self.plan.frame.coefficient
            harmonic = m
            positions = c.hidden_start // d * len(self.plan.frame.order) + coefficient[m]
        return self.rows.setdefault(tuple(map(int, positions)), len(self.rows)), harmonic

    def _coupling(self, c: Coupling) -> list[int]:
        """The coupling's numbers but for its θ, which is put in front."""
        slots = {slot: n for n, slot in enumerate(c.slots)}
        terms: dict[tuple[int, int], dict[int, list[tuple[int, float]]]] = {}
        for b, o, i, m, value in c.nonzeros:
            row, harmonic = self._read(c, m)
            terms.setdefault((slots[b, o], row), {}).setdefault(i, []).append((harmonic, value))
        flat = []
        for (slot, row), inputs in terms.items():
            first = len(self.g_input)
            for i, products in inputs.items():
                self.g_input.append(i)
                self.nz_harmonic += [harmonic for harmonic, _ in products]
                self.nz_value += [value for _, value in products]
                self.g_first.append(len(self.nz_value))
            flat += [slot, max(row, 0), first, len(self.g_input)]
        sizes = [
            len(c.out_start),
            len(c.in_start),
            len(c.hidden_start),
            c.basis.shape[0],
            int(_reads_one(self.plan, c)),
        ]
        starts = [*c.out_start.tolist(), *c.in_start.tolist()]
        return [*sizes, len(slots), len(terms), *starts, *(n for slot in slots for n in slot), *flat]


def _flatten_frame(plan: Plan, flat: _Flat, terms: _Terms) -> None:
    frame = plan.frame
    flat.i(int(np.array_equal(frame.attribute, np.eye(frame.n_attributes))))
    flat.r(frame.attribute)
    if frame.kind == "zonal":
        used = set(terms.nz_harmonic)
        entries = [(m, j) for m, j in zip(*np.nonzero(np.abs(frame.harmonics) > 1e-14), strict=True)]
        entries.sort(key=lambda entry: entry[0] not in used)
        monomials = list(dict.fromkeys(int(j) for _, j in entries))
        n_used = sum(m in used for m, _ in entries)
        n_used_monomials = len({j for _, j in entries[:n_used]})
        flat.i(len(entries), len(monomials), int(frame.powers.max()), n_used, n_used_monomials)
        flat.i(frame.order[frame.coefficient], frame.coefficient, frame.powers[monomials])
        flat.i([(m, monomials.index(j)) for m, j in entries])
        flat.r([frame.harmonics[m, j] for m, j in entries])
    elif frame.kind == "planar":
        flat.i(max(frame.order.max(initial=0), frame.attribute_order.max(initial=0)))
        flat.i(frame.order, frame.partner, frame.attribute_order, frame.attribute_partner)
        flat.r(frame.plane, frame.axis, frame.sign, frame.attribute_sign)


class _Prepared(NamedTuple):
    """A plan ready for the native code."""

    ints: Tensor  # int32
    reals: dict[torch.dtype, Tensor]
    values: list[Tensor]  # per hidden layer: positions of the packed values in W


@lru_cache(maxsize=256)
def _prepare(plan: Plan) -> _Prepared:
    frame, flat, terms = plan.frame, _Flat(), _Terms(plan)
    coefficients = max(len(frame.order), 1)
    groups = [_groups(layer, coefficients) for layer in plan.linears]
    position, layers = 0, []
    for layer, group in zip(plan.linears, groups, strict=True):
        layers.append((position, position + len(group.index)))
        position += len(group.index) + layer.out_size
    theta = []
    for c in plan.couplings:
        theta.append(position)
        position += c.row.size * len(c.hidden_start) * c.basis.shape[0]
    n_inputs = frame.n_position + frame.n_attributes
    hidden = plan.linears[-1].out_size if plan.linears else n_inputs
    kind = ("none", "zonal", "planar").index(frame.kind)
    function = FUNCTIONS.index(plan.activations[0].function) if plan.activations else 0
    order_zero = int(np.searchsorted(frame.order, 1))
    flat.i(kind, frame.dim, frame.n_attributes, int(frame.regular), n_inputs, plan.in_size, plan.out_size)
    flat.i(len(plan.linears), _field_size(plan), coefficients, hidden // coefficients, order_zero, function)
    flat.i(len(plan.couplings), len(terms.rows), len(terms.g_input), position + 1, position)
    flat.i(int(plan.cutoff is not None), hidden)
    flat.r(plan.gamma, plan.cutoff or 1.0)
    _flatten_frame(plan, flat, terms)
    for n, (layer, group, act) in enumerate(zip(plan.linears, groups, plan.activations, strict=True)):
        used = terms.used if n + 1 == len(plan.linears) else coefficients
        flat.i(layer.in_size, layer.out_size, group.active, used, len(act.samples), *layers[n], len(group.index))
        flat.i(group.count, len(group.ints), group.ints)
        flat.r(act.samples, act.inverse.T)
    flat.i(0, np.cumsum([len(row) for row in terms.rows]), [p for row in terms.rows for p in row])
    flat.i(terms.g_input, terms.g_first, terms.nz_harmonic)
    flat.r(terms.nz_value)
    for numbers, at in zip(terms.couplings, theta, strict=True):
        flat.i(numbers[:7], at, numbers[7:])
    reals = {dtype: torch.tensor(flat.reals, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    values = [torch.tensor(group.index) for group in groups]
    return _Prepared(torch.tensor(flat.ints, dtype=torch.int32), reals, values)


def _pack(prepared: _Prepared, weights: Weights) -> Tensor:
    """All weights in one vector, as the native code reads them; differentiable."""
    parts = []
    for index, (w, b) in zip(prepared.values, weights.linears, strict=True):
        parts += [w.reshape(-1).index_select(0, index), b]
    parts += [theta.reshape(-1) for theta in weights.theta]
    return torch.cat([*parts, weights.shell_width.reshape(1)])


def _unpack(plan: Plan, prepared: _Prepared, packed: Tensor) -> Weights:
    """The inverse of :func:`_pack`."""
    linears, position = [], 0

    def take(count: int) -> Tensor:
        nonlocal position
        position += count
        return packed[position - count : position]

    for layer, index in zip(plan.linears, prepared.values, strict=True):
        dense = packed.new_zeros(layer.out_size * layer.in_size).index_copy(0, index, take(len(index)))
        linears.append((dense.view(layer.out_size, layer.in_size), take(layer.out_size)))
    shapes = [(*c.row.shape, len(c.hidden_start), c.basis.shape[0]) for c in plan.couplings]
    return Weights(linears, [take(math.prod(shape)).view(shape) for shape in shapes], take(1))


# ---- the operator


class _Gradients(torch.autograd.Function):
    """The gradients, as a node of the graph of their own, so that differentiating them raises."""

    @staticmethod
    def forward(ctx, needs, plan_tensors, graph, isa, grad, weights, x, delta, attributes):
        by_source = (graph.order_by_source, graph.colptr) if needs[1] else (graph.order, graph.rowptr)
        edges = (graph.src, graph.order, graph.rowptr)
        weights_first = (needs[1], needs[2], needs[3], needs[0])
        grads = torch.ops.implicit_steer.conv_backward(
            *plan_tensors, weights, x, delta, attributes, *edges, grad.contiguous(), *by_source, *weights_first, isa
        )
        grad_x, grad_delta, grad_attributes, grad_weights = grads
        by_input = (grad_weights[0] if needs[0] else None, grad_x, grad_delta, grad_attributes)
        return tuple(g if need else None for g, need in zip(by_input, needs, strict=True))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_NO_SECOND_DERIVATIVES)


def _eager_gradients(plan: Plan, graph: Graph, needs: tuple[bool, ...], grad: Tensor, *inputs: Tensor) -> list:
    """Gradients that can be differentiated again: those of `eager` at the same packed weights, x, delta, attributes."""
    packed, *rest = inputs
    with torch.enable_grad():
        out, _ = eager.forward(plan, _unpack(plan, _prepare(plan), packed), (), graph, *rest)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, plan_tensors, graph, isa, weights, x, delta, attributes):
        ctx.save_for_backward(weights, x, delta, attributes)
        ctx.plan, ctx.rest = plan, (plan_tensors, graph, isa)
        edges = (graph.src, graph.order, graph.rowptr)
        return torch.ops.implicit_steer.conv_forward(*plan_tensors, weights, x, delta, attributes, *edges, isa)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[4:]
        if ctx.plan is not None and torch.is_grad_enabled():  # create_graph=True
            gradients = _eager_gradients(ctx.plan, ctx.rest[1], needs, grad, *ctx.saved_tensors)
        else:
            gradients = _Gradients.apply(needs, *ctx.rest, grad, *ctx.saved_tensors)
        return None, None, None, None, *gradients


@lru_cache(maxsize=256)
def _trivial_coordinates(plan: Plan, norm: Norm) -> Tensor:
    """Where a full hidden field holds its trivial coefficients; zonal ones as they are, their harmonic being 1."""
    if plan.frame.kind == "zonal":
        return torch.tensor(norm.full_trivial)
    return torch.tensor(norm.trivial)  # a field's coordinates are its coefficients, turned


def _with_statistics(
    plan: Plan,
    prepared: _Prepared,
    weights: Weights,
    live: tuple[NormParameters, ...],
    delta: Tensor,
    attributes: Tensor,
    isa: int,
) -> tuple[Weights, list[Statistics]]:
    """The weights with the batch norms folded in, norm after norm, and their statistics over these edges."""
    linears, theta, statistics = list(weights.linears), weights.theta, []
    reals, dtype = prepared.reals[delta.dtype], delta.dtype
    geometry = delta.detach(), attributes.detach()
    for n, (norm, act) in enumerate(zip(plan.norms, plan.activations, strict=True)):
        with torch.no_grad():
            packed = _pack(prepared, Weights(linears, theta, weights.shell_width))
            mean, var = torch.ops.implicit_steer.conv_statistics(prepared.ints, reals, packed, *geometry, n, isa)
            mean = mean.view(act.channels, -1).index_select(1, _trivial_coordinates(plan, norm))
            statistics.append(Statistics(mean.to(dtype), var.view(act.channels, -1).mean(1).to(dtype)))
        affine = norm_affine(norm, live[n], *statistics[-1])
        if n + 1 < len(linears):
            linears[n + 1] = fold_linear(norm, act, linears[n + 1], *affine)
        else:
            theta = fold_theta(plan, theta, *affine)
    return Weights(linears, theta, weights.shell_width), statistics


def forward(
    plan: Plan,
    weights: Weights,
    live: tuple[NormParameters, ...],
    graph: Graph,
    x: Tensor,
    delta: Tensor,
    attributes: Tensor,
    *,
    eager_second_order: bool = False,
) -> tuple[Tensor, list[Statistics]]:
    """out_i = Σ_{e: j→i} K(x_e, a_e) f_j, shape (N, C_out).

    With ``eager_second_order``, gradients asked for with ``create_graph=True`` are those of `eager`.
    """
    prepared, isa, statistics = _prepare(plan), instruction_set(), []
    x, delta, attributes = x.contiguous(), delta.contiguous(), attributes.contiguous()
    if live:
        weights, statistics = _with_statistics(plan, prepared, weights, live, delta, attributes, isa)
    packed = _pack(prepared, weights)
    tensors = prepared.ints, prepared.reals[packed.dtype]
    plan_if_twice = plan if eager_second_order else None
    return _Conv.apply(plan_if_twice, tensors, graph, isa, packed, x, delta, attributes), statistics
