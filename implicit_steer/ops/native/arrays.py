"""A plan as the native operator reads it: two flat arrays of numbers, and a sparse matrix that packs the parameters.

The counterparts in C++ are ``csrc/plan.h`` and ``csrc/packing.h``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...plan import FUNCTIONS, Activation, Coupling, Linear, Plan
from .terms import Monomials, Terms, hidden_field_size, padded, reads_one

_LARGEST_SEARCH = 400  # samples that are searched for pairs: all are compared with all


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


def _groups(layer: Linear, coefficients: int, into: np.ndarray, out: np.ndarray) -> _Groups:
    """``into`` (in_size,), ``out`` (out_size,): where the native code keeps each input and output."""
    pattern = np.zeros((layer.out_size, layer.in_size), dtype=bool)
    for block in layer.blocks:
        o, i = np.nonzero(np.abs(block.basis).sum(0))
        rows, columns = block.out_start[:, None, None] + o, block.in_start[None, :, None] + i
        pattern[np.broadcast_arrays(rows, columns)[0], np.broadcast_arrays(rows, columns)[1]] = True
    by_columns: dict[tuple, list[int]] = {}
    for row in range(layer.out_size):
        by_columns.setdefault(tuple(np.flatnonzero(pattern[row])), []).append(row)
    ints, index = [], []
    for key, rows in by_columns.items():
        columns = np.array(key, dtype=int)
        ints += [len(rows), len(columns), *out[rows].tolist(), *into[columns].tolist()]
        index.append((np.array(rows)[:, None] * layer.in_size + columns).reshape(-1))
    nonzero = pattern.any(1) | (np.abs(layer.bias).sum(1) > 0)
    active = 1 + int((np.flatnonzero(nonzero) % coefficients).max(initial=0))
    return _Groups(ints, len(by_columns), np.concatenate([*index, np.zeros(0, dtype=np.int64)]), active)


def _flatten_frame(plan: Plan, flat: _Flat, terms: Terms, position: np.ndarray) -> None:
    frame = plan.frame
    flat.i(int(np.array_equal(frame.attribute, np.eye(frame.n_attributes))))
    flat.r(frame.attribute)
    if frame.kind == "zonal":
        used = set(terms.nz_harmonic)
        entries = [(m, j) for m, j in zip(*np.nonzero(np.abs(frame.harmonics) > 1e-14), strict=True)]
        entries.sort(key=lambda entry: entry[0] not in used)
        monomials = Monomials()
        numbers = [monomials.add(tuple(frame.powers[j].tolist())) for _, j in entries]
        n_used = sum(m in used for m, _ in entries)
        n_used_monomials = 1 + max(numbers[:n_used], default=0)
        flat.i(len(entries), len(monomials.factors), n_used, n_used_monomials)
        flat.i(frame.order[frame.coefficient], monomials.factors)
        flat.i([(m, number) for (m, _), number in zip(entries, numbers, strict=True)])
        flat.r([frame.harmonics[m, j] for m, j in entries])
    elif frame.kind == "planar":
        flat.i(max(frame.order.max(initial=0), frame.attribute_order.max(initial=0)))
        order = np.argsort(position)
        flat.i(frame.order[order], position[frame.partner[order]], frame.attribute_order, frame.attribute_partner)
        flat.r(frame.plane, frame.axis, frame.sign[order], frame.attribute_sign)


def _match_pairs(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A sign per coefficient (c,) and a permutation (S,) with ``samples[permutation] = samples · sign``, if the samples
    have such a symmetry (an inversion, a half turn); the first one that leaves fewest samples fixed."""
    if len(samples) > _LARGEST_SEARCH:
        return None
    tolerance, best = 1e-9 * np.abs(samples).max(initial=0), None
    magnitude = np.abs(samples)
    equal = np.abs(magnitude[:, None] - magnitude).max(2) < tolerance  # (S, S)
    for partner in np.flatnonzero(equal[0])[1:]:
        found = _complete(samples, equal, tolerance, np.zeros(samples.shape[1]), {0: partner})
        if found is None or not (found[0] < 0).any():
            continue
        if best is None or (found[1] == np.arange(len(samples))).sum() < (best[1] == np.arange(len(samples))).sum():
            best = found
        if not (best[1] == np.arange(len(samples))).any():
            break
    return best


def _complete(
    samples: np.ndarray, equal: np.ndarray, tolerance: float, sign: np.ndarray, image: dict[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The signs (0: not known) and images of samples completed, or None. Depth first over a sample's possible images,
    the sample with fewest first, itself last."""
    for row, other in image.items():
        present = np.abs(samples[row]) > 1e3 * tolerance
        sign = np.where(sign != 0, sign, np.sign(samples[row] * samples[other]) * present)
    if (sign != 0).all():
        permutation = [np.flatnonzero(np.abs(samples - row * sign).max(1) < tolerance) for row in samples]
        return (sign, np.array([p[0] for p in permutation])) if all(len(p) for p in permutation) else None
    left = [row for row in range(len(samples)) if row not in image]
    if not left:  # coefficients that are 0 in all samples
        return _complete(samples, equal, tolerance, np.where(sign == 0, 1.0, sign), image)
    known = sign != 0
    distance = np.abs(samples[left][:, None, known] * sign[known] - samples[:, known]).max(2, initial=0)
    possible = equal[left] & (distance < tolerance)
    at = int(possible.sum(1).argmin())
    for other in sorted(np.flatnonzero(possible[at]), key=lambda other: other == left[at]):
        found = _complete(samples, equal, tolerance, sign, {**image, left[at]: other})
        if found is not None:
            return found
    return None


class _Pairs(NamedTuple):
    """Samples in pairs that differ by the sign of the odd coefficients; then those without a partner."""

    first: list[int]
    single: list[int]
    odd: np.ndarray  # (c,) bool


@lru_cache(maxsize=256)
def _pairs(plan: Plan) -> _Pairs:
    """Of the samples of a plan, which are the same in every layer; none where they are not, or where an odd coefficient
    of order 0 would not come first."""
    if not plan.activations:
        return _Pairs([], [], np.zeros(1, dtype=bool))
    act = plan.activations[0]
    none = _Pairs([], list(range(len(act.samples))), np.zeros(act.samples.shape[1], dtype=bool))
    equal = all(np.array_equal(act.samples, other.samples) for other in plan.activations)
    found = _match_pairs(act.samples) if equal else None
    if found is None:
        return none
    sign, permutation = found
    size = np.abs(act.inverse).max(initial=0)
    if not np.allclose(act.inverse.T[permutation], act.inverse.T * sign, rtol=0, atol=1e-9 * size):
        return none
    if plan.frame.regular and (sign[plan.frame.order == 0] < 0).any():
        return none
    rows = range(len(permutation))
    return _Pairs([s for s in rows if s < permutation[s]], [s for s in rows if s == permutation[s]], sign < 0)


class _Position:
    """Hands out positions in a vector."""

    def __init__(self):
        self.next = 0

    def take(self, size: int) -> int:
        self.next += size
        return self.next - size


class Prepared(NamedTuple):
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


def _linear_matrix(layer: Linear, index: np.ndarray, at: int, n_parameters: int) -> sparse.csr_matrix:
    """(values of W in packed order, n_parameters); the layer's weights start at parameter ``at``."""
    rows, columns, values = [], [], []
    for block in layer.blocks:
        n_b, o, i = block.basis.shape
        u, v, b, o, i = np.ix_(range(len(block.out_start)), range(len(block.in_start)), range(n_b), range(o), range(i))
        row = (block.out_start[u] + o) * layer.in_size + block.in_start[v] + i
        column = at + block.offset + (u * block.n_in + block.columns[v]) * n_b + b
        value = block.basis[b, o, i]
        row, column, value = np.broadcast_arrays(row, column, value)
        rows.append(row[value != 0]), columns.append(column[value != 0]), values.append(value[value != 0])
    entries = (np.concatenate([*values, [0.0]]), (np.concatenate([*rows, [0]]), np.concatenate([*columns, [0]])))
    dense = sparse.coo_matrix(entries, shape=(layer.out_size * layer.in_size, n_parameters)).tocsr()
    return dense[index]


def _selection(columns: np.ndarray, n_parameters: int) -> sparse.csr_matrix:
    """Rows that copy one parameter each; column −1: an empty row."""
    inside = np.flatnonzero(columns >= 0)
    entries = (np.ones(len(inside)), (inside, columns[inside]))
    return sparse.coo_matrix(entries, shape=(len(columns), n_parameters)).tocsr()


def _pad(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    width = [(0, 0)] * array.ndim
    width[axis] = (0, size - array.shape[axis])
    return np.pad(array, width, constant_values=-1)


def _theta_layouts(columns: np.ndarray, constant: bool) -> tuple[np.ndarray, np.ndarray]:
    """Parameter numbers (U, V, W, b) of θ in the order [b][u][v, w] of the backward and [b][v][w][u] of the forward
    direction, rows of channels padded with −1."""
    n_out, _, n_hidden, n_b = columns.shape
    by_in = columns.transpose(3, 0, 1, 2)
    by_in = by_in[..., 0] if constant else _pad(by_in, 3, padded(n_hidden)).reshape(n_b, n_out, -1)
    by_out = _pad(columns.transpose(3, 1, 2, 0), 3, padded(n_out))
    return _pad(by_in, 2, padded(by_in.shape[2])).reshape(-1), by_out.reshape(-1)


def _dense_couplings(plan: Plan) -> tuple[Coupling, ...]:
    """The outer product f ⊗ h, mixed by the whole kernel tensor (C_out, C_in, H): coordinates count as fields."""
    n_out, n_in, n_hidden = plan.out_size, plan.in_size, plan.hidden_size
    row = np.arange(n_out * n_in).reshape(n_out, n_in) * n_hidden
    parts = (np.arange(n_hidden - 1), np.array([n_hidden - 1]))
    return tuple(
        Coupling(
            parameter="kernel",
            row=row + part[0],
            out_start=np.arange(n_out),
            in_start=np.arange(n_in),
            hidden_start=part,
            basis=np.ones((1, 1, 1, 1)),
            fold=np.zeros((0, 0, 0)),
            fold_into=-1,
        )
        for part in parts
        if len(part)
    )


def kernel_entries(plan: Plan, n_weights: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every product θ·B: its position in the flat (C_out, C_in, H) kernel tensor, that of θ among the last layer's
    parameters, ``n_weights`` weights and then its bias, and B."""
    fields = [(len(c.out_start), len(c.in_start), len(c.hidden_start)) for c in plan.couplings]
    counts = [math.prod(n) * c.counts[0] for n, c in zip(fields, plan.couplings, strict=True)]
    position, column, value = (np.empty(sum(counts), dtype) for dtype in (np.int64, np.int64, float))
    ends = np.cumsum(counts)
    for c, n, count, end in zip(plan.couplings, fields, counts, ends, strict=True):
        b, o, i, m = np.nonzero(c.basis)
        u, v, w, _ = np.ogrid[: n[0], : n[1], : n[2], :1]
        here = position[end - count : end].reshape(*n, len(b))
        here[...] = (c.out_start[u] + o) * plan.in_size + c.in_start[v] + i
        here *= plan.hidden_size
        here += c.hidden_start[w] + m
        here = column[end - count : end].reshape(*n, len(b))
        here[...] = c.row[u, v] + w * len(c.basis) + (0 if c.parameter == "weights" else n_weights)
        here += b
        value[end - count : end].reshape(*n, len(b))[...] = c.basis[b, o, i, m]
    return position, column, value


def _kernel_matrix(plan: Plan, begin: dict[str, int], n_parameters: int) -> sparse.csr_matrix:
    """(C_out · C_in · H, n_parameters): the flat kernel tensor of the parameters; ``begin``: of the last layer's."""
    position, column, value = kernel_entries(plan, begin["bias"] - begin["weights"])
    column += begin["weights"]
    shape = plan.out_size * plan.in_size * plan.hidden_size, n_parameters
    return sparse.coo_matrix((value, (position, column)), shape=shape).tocsr()


@lru_cache(maxsize=256)
def prepare(plan: Plan, sizes: tuple[int, ...]) -> Prepared:
    """``sizes``: of the parameters, in the order in which ops/native/cpu.py puts them into one vector."""
    frame, flat, place, pairs = plan.frame, _Flat(), _Position(), _pairs(plan)
    couplings = _dense_couplings(plan) if plan.dense_coupling else plan.couplings
    position = np.argsort(np.argsort(pairs.odd, kind="stable"))  # of each coefficient in a channel: even ones first
    terms = Terms(plan, couplings, position)
    starts, n_parameters = iter(np.cumsum([0, *sizes]).tolist()), sum(sizes)
    coefficients, n_trivial = max(len(frame.order), 1), len(plan.norms[0].trivial) if plan.norms else 0
    groups, layers, matrices, into = [], [], [], np.arange(frame.n_position + frame.n_attributes)
    for layer in plan.linears:
        channels = np.arange(layer.out_size // coefficients)
        out = (channels[:, None] * coefficients + position).reshape(-1)
        group = _groups(layer, coefficients, into, out)
        groups.append(group)
        into = out
        layers.append([place.take(len(group.index)), place.take(layer.out_size), -1, -1, -1])
        matrices.append(_linear_matrix(layer, group.index, next(starts), n_parameters))
        bias = sparse.lil_matrix((layer.out_size, n_parameters))
        if layer.bias.shape[1]:
            start = next(starts)
            bias[:, start : start + layer.bias.shape[1]] = layer.bias[np.argsort(out)]
        matrices.append(bias.tocsr())
    for numbers, norm in zip(layers, plan.norms, strict=False):
        size = norm.channels * (1 + n_trivial)
        numbers[2:] = [place.take(size), next(starts), next(starts) if n_trivial else -1]
        matrices.append(_selection(np.full(size, -1), n_parameters))
    shell = place.take(1)
    matrices.append(_selection(np.array([next(starts)]), n_parameters))
    begin = dict(zip(("weights", "bias"), starts, strict=False))
    kernel = _kernel_matrix(plan, begin, n_parameters) if plan.dense_coupling else None
    begin["kernel"] = 0
    backward, forward = [], []
    for c in couplings:
        per_row = np.arange(len(c.hidden_start) * c.basis.shape[0]).reshape(len(c.hidden_start), -1)
        columns = begin[c.parameter] + c.row[:, :, None, None] + per_row
        by_in, by_out = _theta_layouts(columns, reads_one(plan, c))
        backward.append(by_in), forward.append(by_out)
    theta = [[place.take(len(columns))] for columns in backward]
    n_grad = place.next
    for starts_at, columns in zip(theta, forward, strict=True):
        starts_at.append(place.take(len(columns)))
    for columns in (*backward, *forward):
        matrices.append(
            _selection(columns, n_parameters) if kernel is None else _selection(columns, kernel.shape[0]) @ kernel
        )
    sizes = (len(couplings), place.next, n_grad, shell, n_trivial, n_parameters)
    _flatten_header(plan, flat, terms, position, sizes)
    _flatten_frame(plan, flat, terms, position)
    for n, (layer, group, act) in enumerate(zip(plan.linears, groups, plan.activations, strict=True)):
        used = terms.used if n + 1 == len(plan.linears) and not plan.norms else coefficients
        _flatten_layer(flat, layer, group, act, pairs, used, layers[n])
    flat.i(0, np.cumsum([len(row) for row in terms.rows]), [p for row in terms.rows for p in row])
    _flatten_products(flat, terms)
    for numbers, at in zip(terms.couplings, theta, strict=True):
        flat.i(numbers[:8], at, numbers[8:])
    del kernel
    packing = sparse.vstack(matrices, format="csr")
    matrices.clear()  # of large fields they take as much memory as the whole
    return _as_tensors(flat, packing)


def _as_tensors(flat: _Flat, matrix: sparse.csr_matrix) -> Prepared:
    def by_dtype(numbers) -> dict[torch.dtype, Tensor]:
        return {dtype: torch.as_tensor(numbers, dtype=dtype) for dtype in (torch.float32, torch.float64)}

    def int32(numbers) -> Tensor:
        return torch.as_tensor(numbers, dtype=torch.int32)

    return Prepared(
        int32(flat.ints), by_dtype(flat.reals), int32(matrix.indptr), int32(matrix.indices), by_dtype(matrix.data)
    )


def _flatten_header(plan: Plan, flat: _Flat, terms: Terms, position: np.ndarray, sizes: tuple[int, ...]) -> None:
    frame, (n_couplings, n_weights, n_grad, shell, n_trivial, n_parameters) = plan.frame, sizes
    coefficients = max(len(frame.order), 1)
    n_inputs = frame.n_position + frame.n_attributes
    hidden = plan.linears[-1].out_size if plan.linears else n_inputs
    kind = ("none", "zonal", "planar").index(frame.kind)
    function = FUNCTIONS.index(plan.activations[0].function) if plan.activations else 0
    order_zero = int(np.searchsorted(frame.order, 1))
    flat.i(kind, frame.dim, frame.n_attributes, int(frame.regular), n_inputs, plan.in_size, plan.out_size)
    flat.i(len(plan.linears), hidden_field_size(plan), coefficients, hidden // coefficients, order_zero, function)
    flat.i(n_couplings, len(terms.rows), len(terms.factors), n_weights, n_grad, shell)
    place = np.full(plan.out_size, -1)
    inside = np.array(terms.outputs.channel, dtype=int)
    place[inside[inside >= 0]] = np.flatnonzero(inside >= 0)
    flat.i(int(plan.cutoff is not None), hidden, int(bool(plan.norms)), n_trivial, n_parameters)
    flat.i(int((~_pairs(plan).odd).sum()), len(terms.inputs.channel), len(terms.outputs.channel))
    flat.r(plan.gamma, plan.cutoff or 1.0, plan.norms[0].eps if plan.norms else 0.0)
    flat.i(position[frame.coefficient] if frame.kind == "zonal" else position)
    if plan.norms:
        measured = plan.norms[0].measured  # coordinates of h: those of the frame's coefficients but for zonal frames
        flat.i(position[plan.norms[0].trivial], measured if frame.kind == "zonal" else position[measured])
    flat.i(terms.inputs.channel, place)


def _flatten_products(flat: _Flat, terms: Terms) -> None:
    flat.i(len(terms.products) // 4, terms.product_size, terms.products, [place for place, _, _ in terms.factors])
    flat.i(terms.g_first, terms.nz_harmonic)
    flat.r(terms.nz_value)
    (adjoint, adjoint_terms), (harmonic_terms, values) = terms.adjoint(), terms.harmonic_terms()
    flat.i(len(adjoint) // 4, adjoint, [place for place, _ in adjoint_terms], [g for _, g in adjoint_terms])
    flat.i(len(values), harmonic_terms)
    flat.r(values)


def _flatten_layer(
    flat: _Flat, layer: Linear, group: _Groups, act: Activation, pairs: _Pairs, used: int, positions: list[int]
) -> None:
    rows, order = [*pairs.first, *pairs.single], np.argsort(pairs.odd, kind="stable")
    flat.i(layer.in_size, layer.out_size, len(act.samples), *positions, len(group.index), len(pairs.first))
    for count in (group.active, used):
        odd = int(pairs.odd[:count].sum())
        flat.i(count - odd, odd)
    flat.i(group.count, len(group.ints), group.ints)
    samples, inverse = act.samples[:, order], act.inverse.T[:, order]
    flat.r(samples, inverse, samples[rows], inverse[rows])
