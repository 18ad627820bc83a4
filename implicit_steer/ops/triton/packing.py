"""The sparse matrix that makes the packed weights: what the hidden layers read, and behind it Θ.

A packed weight is a sum of products of a parameter, a constant of the plan and, where a batch norm is folded in, a
*factor*: a scale or a shift of the norm, which depend on its statistics. The parameters and the statistics are one
vector, the **numbers**: the tensors of ``learned_tensors`` one after the other, then mean and variance of every norm.
The parameters' gradients are sums of the same kind over the gradient of the packed weights, by the transposed matrix;
so pack.py has one kernel for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ...plan import Plan
from ...plan.packing import parameter_starts
from ..packing_rows import bias_rows, linear_rows, selection
from .sizes import Sizes
from .tables import Tables

_ONE = (-1, -1, -1, -1)


class Entries(NamedTuple):
    """Sums in compressed rows: row n is Σ value · numbers[column] · factor · gradient[source] over the entries
    rowptr[n] .. rowptr[n + 1] − 1. Column −1: no number. Forward there is no gradient, and ``source`` is 0."""

    rowptr: NDArray[Any]
    column: NDArray[Any]
    factor: NDArray[Any]
    value: NDArray[Any]
    source: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Packing:
    """How a plan's weights are packed.

    Attributes:
        forward, transposed: rows of the packed weights; rows of the parameters' gradients.
        factors: (n, 4) positions among the numbers of a norm's weight, variance, bias and mean, −1 for what a factor
            lacks. With a = weight / sqrt(variance + eps) the factor is a, or bias − mean · a where there is a mean; a
            missing weight counts as 1, a missing bias as 0, and without a variance a is 1.
        eps: of the norms.
        layers_end: the packed weights before it are of the hidden layers, those behind it Θ.
        gradients_end: the same of their gradients.
        shell: position of the shell's width among the numbers.
    """

    forward: Entries
    transposed: Entries
    factors: NDArray[Any]
    eps: float
    layers_end: int
    gradients_end: int
    shell: int


class _Numbers:
    """Where parameters and statistics begin among the numbers, and the factors of the norms.

    Attributes:
        starts: of the parameters.
        scale, shift: per norm the factors of its channels (W,) and of their trivial coefficients (W, n_trivial).
    """

    def __init__(self, plan: Plan, sizes: Sequence[int], measured: bool) -> None:
        self.starts = parameter_starts(plan, sizes)
        self.n_parameters, self.factors = sum(sizes), [_ONE]
        self.scale, self.shift = [], []
        mean = self.n_parameters
        for norm, (weight, bias) in zip(plan.norms, self.starts.norms, strict=True):
            n_trivial = len(norm.trivial)
            # calls measure means of the trivial coefficients alone, norms keep those of all coordinates
            width, picked = (n_trivial, range(n_trivial)) if measured else (plan.field_size, norm.full_trivial)
            var = mean + norm.channels * width
            self.scale.append(self._add([(weight + w, var + w, -1, -1) for w in range(norm.channels)]))
            shifts = [
                (weight + w, var + w, bias + w * n_trivial + t, mean + w * width + int(picked[t]))
                for w in range(norm.channels)
                for t in range(n_trivial)
            ]
            self.shift.append(self._add(shifts).reshape(norm.channels, n_trivial))
            mean = var + norm.channels

    def _add(self, factors: list[tuple[int, int, int, int]]) -> NDArray[Any]:
        """Their numbers."""
        self.factors += factors
        return np.arange(len(self.factors) - len(factors), len(self.factors))

    def add_slopes(self) -> NDArray[Any]:
        """For every factor that of its derivative with respect to the norm's weight."""
        return np.concatenate([[0], self._add([(-1, var, -1, mean) for _, var, _, mean in self.factors[1:]])])


class _Sums:
    """Sums of products (parameter, factor) as sparse matrices, with a column for every such pair."""

    def __init__(self, plan: Plan, numbers: _Numbers) -> None:
        self.plan, self.numbers, self.n_factors = plan, numbers, len(numbers.factors)

    def matrix(self, n_rows: int, row: Any, parameter: Any, factor: Any, value: Any) -> sparse.csr_matrix:
        """(n_rows, pairs); arguments broadcast."""
        row, parameter, factor, value = (a.reshape(-1) for a in np.broadcast_arrays(row, parameter, factor, value))
        column = parameter.astype(np.int64) * self.n_factors + factor
        shape = n_rows, self.numbers.n_parameters * self.n_factors
        return sparse.coo_matrix((value.astype(float), (row, column)), shape=shape).tocsr()

    def linear(self, n: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Rows of the flat W (out, in) and of b (out,) of a hidden layer, the norm before it folded in."""
        numbers, layer = self.numbers, self.plan.linears[n]
        (first, first_bias), size = numbers.starts.linears[n], layer.out_size * layer.in_size
        w = linear_rows(layer, np.arange(size), first, numbers.n_parameters).tocoo()
        b = bias_rows(layer, np.arange(layer.out_size), first_bias, numbers.n_parameters).tocoo()
        bias = self.matrix(layer.out_size, b.row, b.col, 0, b.data)
        if n == 0 or not self.plan.norms:
            return self.matrix(size, w.row, w.col, 0, w.data), bias
        norm, out, column = self.plan.norms[n - 1], w.row // layer.in_size, w.row % layer.in_size
        channel, coefficient = np.divmod(column, layer.in_size // norm.channels)
        for t, trivial in enumerate(norm.trivial):
            here = coefficient == trivial
            shift = numbers.shift[n - 1][channel[here], t]
            bias = bias + self.matrix(layer.out_size, out[here], w.col[here], shift, w.data[here])
        return self.matrix(size, w.row, w.col, numbers.scale[n - 1][channel], w.data), bias

    def splines(self, sizes: Sizes) -> sparse.csr_matrix:
        """Rows of the splines' coefficients: of (row, channel w, coefficient c) column c W + w of r, as far as r has
        it."""
        row, column = np.ix_(np.arange(sizes.n_rows), np.arange(sizes.n_columns - 1))
        c, w = np.divmod(column, sizes.channels)
        parameter = self.numbers.starts.splines + (row * sizes.channels + w) * sizes.coefficients + c
        return self.matrix(parameter.size, np.arange(parameter.size), parameter.reshape(-1), 0, 1.0)

    def theta(self) -> list[sparse.csr_matrix]:
        """Rows of the flat θ (U, V, W, n_b) of every coupling, the last norm folded in."""
        plan, numbers, found = self.plan, self.numbers, []
        parameters = [numbers.starts.last[c.parameter] + c.theta_positions for c in plan.couplings]
        for c, p in zip(plan.couplings, parameters, strict=True):
            folded = plan.norms and c.parameter == "weights"
            factor = numbers.scale[-1][:, None] if folded else 0
            found.append(self.matrix(p.size, np.arange(p.size).reshape(p.shape), p, factor, 1.0))
        for c, p in zip(plan.couplings, parameters, strict=True):
            if plan.norms and c.fold_into >= 0:
                _, n_t, n_s = c.fold.shape
                u, v, w, b, t, s = np.ix_(*map(np.arange, (*p.shape, n_t, n_s)))
                row = (u * p.shape[1] + v) * n_s + s
                moved = self.matrix(
                    p.shape[0] * p.shape[1] * n_s, row, p[u, v, w, b], numbers.shift[-1][w, t], c.fold[b, t, s]
                )
                found[c.fold_into] = found[c.fold_into] + moved
        return found


def _layer_layout(found: Tables, n: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """What makes a layer's packed weights, as layers.py reads them, of its flat W and of b: A W with its rows in the
    order of the blocks P₀, P₁, b, b₁."""
    plan, sizes = found.plan, found.sizes
    k, channels, regular, samples = sizes.widths, sizes.channels, sizes.regular, plan.activations[n].samples
    n_s, n_c = samples.shape
    z, n_in, inputs = sizes.n_zero // channels, plan.linears[n].in_size, np.arange(plan.linears[n].in_size)
    parts = []  # inputs, their rows, coefficients that they act on
    if n == 0:
        biases = k["BI"]
        parts.append((inputs[regular:], inputs[: n_in - regular], range(z)))
        if regular:
            parts.append((inputs[:1], inputs[:1] + biases + 1, range(z, n_c)))
    else:
        biases = k["B0"] + regular * k["B1"]
        v, c = np.divmod(inputs, n_c)
        parts.append((inputs[c < z], (c * channels + v)[c < z], range(z)))
        parts.append((inputs[c >= z], (k["B0"] + (c - z) * channels + v)[c >= z], range(z, n_c)))
    (start, _), (end, _) = sizes.layer_offsets()[n : n + 2]
    w, s = np.ix_(np.arange(channels), np.arange(n_s))
    places = [
        np.broadcast_arrays(
            row * k["NU"] + (w * n_s + s)[..., None], (w[..., None] * n_c + c) * n_in + i, samples[s, c][..., None]
        )
        for i, row, used in parts
        for c in used
    ]
    rows, columns, values = (np.concatenate([a.ravel() for a in part]) for part in zip(*places, strict=True))
    of_bias = [(biases * k["NU"] + w * n_s + s, w * n_c + c, samples[s, c]) for c in range(z)]
    row, column, value = (np.concatenate([np.broadcast_to(p, (channels, n_s)).ravel() for p in part])
                          for part in zip(*of_bias, strict=True))  # fmt: skip
    bias = sparse.coo_matrix((value, (row, column)), shape=(end - start, channels * n_c))
    shape = end - start, channels * n_c * n_in
    return sparse.coo_matrix((values, (rows, columns)), shape=shape).tocsr(), bias.tocsr()


def _edge_layout(found: Tables, n: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """What makes a layer's packed weights, as edges.py reads them, of its flat W and of b."""
    n_w, n_c, n_in = found.sizes.channels, found.sizes.coefficients, found.plan.linears[n].in_size
    if n == 0:
        u, inputs, orders = np.arange(n_w), np.arange(1, n_in)[:, None], np.arange(1, n_c)[:, None]
        before, behind = u * n_c * n_in + inputs, (u * n_c + orders) * n_in
    else:
        c, v, u = np.ix_(*map(np.arange, (n_c, n_w, n_w)))
        before, behind = (u * n_c + c) * n_in + v * n_c + c, np.zeros(0, int)
    of_w = np.concatenate([before.ravel(), np.full(n_w, -1), behind.ravel()])
    of_b = np.concatenate([np.full(before.size, -1), np.arange(n_w) * n_c, np.full(behind.size, -1)])
    return selection(of_w, n_w * n_c * n_in), selection(of_b, n_w * n_c)


def _edge_gradients(found: Tables) -> NDArray[Any]:
    """Of every packed weight of the hidden layers, as edges.py reads them, the place of its gradient in
    ``gradient_shape``."""
    sizes, parts = found.sizes, []
    n_w, n_c, (n_layers, _, _) = sizes.channels, sizes.coefficients, sizes.gradient_shape
    u = np.arange(n_w)
    for n in range(n_layers):
        if n == 0:
            inputs, orders = np.arange(sizes.n_inputs)[:, None], np.arange(n_c)[:, None]
            rows, columns = (inputs, np.full_like(orders, sizes.n_inputs)), (u * n_c, u * n_c + orders)
        else:
            c, v, out = np.ix_(*map(np.arange, (n_c, n_w, n_w)))
            rows, columns = (v * n_c + c, np.array(n_w * n_c)), (out * n_c + c, u * n_c)
        for row, column in zip(rows, columns, strict=True):
            row, column = np.broadcast_arrays(row, column)
            parts.append(np.ravel_multi_index((np.full_like(row, n), row, column), sizes.gradient_shape).ravel())
    return np.concatenate(parts)


def _theta_layouts(found: Tables) -> list[sparse.csr_matrix]:
    """What makes the flat Θ (n_t, C_out) of the flat θ of every coupling."""
    layouts, first = [], 0
    for c, mixing in zip(found.plan.couplings, found.mixing, strict=True):
        (n_u, n_v), n_w, (n_b, n_s, n_o) = c.row.shape, len(c.hidden_start), mixing.shape
        shape = n_s, n_v, n_w, n_u, n_o
        position = found.position[first : first + np.prod(shape)].reshape(shape)
        first += position.size
        b, s, o = np.nonzero(mixing)
        u, v, w = (a[..., None] for a in np.ix_(*map(np.arange, (n_u, n_v, n_w))))
        row, column, value = np.broadcast_arrays(
            position[s, v, w, u, o], ((u * n_v + v) * n_w + w) * n_b + b, mixing[b, s, o]
        )
        size = found.sizes.n_t * found.sizes.out_size, n_u * n_v * n_w * n_b
        layouts.append(sparse.coo_matrix((value.ravel(), (row.ravel(), column.ravel())), shape=size).tocsr())
    return layouts


def _entries(n_rows: int, row: Any, column: Any, factor: Any, value: Any, source: Any) -> Entries:
    order = np.argsort(row, kind="stable")
    rowptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_rows))])
    return Entries(rowptr, column[order], factor[order], value[order], source[order])


def packing(found: Tables, sizes: Sequence[int], measured: bool) -> Packing:
    """The packing of a plan's weights from tensors of these sizes.

    Args:
        sizes: of the tensors of ``learned_tensors``.
        measured: whether the statistics are those that a call measured, or those that the norms keep.
    """
    plan, numbers = found.plan, _Numbers(found.plan, sizes, measured)
    terms, blocks = _Sums(plan, numbers), []
    layout = _edge_layout if found.sizes.edge_by_edge else _layer_layout
    if plan.is_frozen:
        blocks.append(terms.splines(found.sizes))
    for n in range(len(plan.linears)):
        (w, b), (of_w, of_b) = terms.linear(n), layout(found, n)
        blocks.append(of_w @ w + of_b @ b)
    layers_end, size = sum(block.shape[0] for block in blocks), found.sizes.n_t * found.sizes.out_size
    theta = terms.matrix(size, [], [], [], [])
    for of_theta, rows in zip(_theta_layouts(found), terms.theta(), strict=True):
        theta = theta + of_theta @ rows
    all_rows = sparse.vstack([*blocks, theta], format="csr").tocoo()
    row, value = all_rows.row, all_rows.data
    column, factor = np.divmod(all_rows.col, terms.n_factors)
    forward = _entries(all_rows.shape[0], row, column, factor, value, np.zeros_like(row))
    slopes = numbers.add_slopes()
    factors = np.array(numbers.factors)
    weight, _, bias, _ = factors[factor].T
    normed, shifted, one = weight >= 0, bias >= 0, np.zeros_like(factor)
    parts = (
        (column, one - 1, factor, value, row),
        (weight[normed], column[normed], slopes[factor[normed]], value[normed], row[normed]),
        (bias[shifted], column[shifted], one[shifted], value[shifted], row[shifted]),
    )
    of_parameters, columns, of_factors, values, source = (np.concatenate(a) for a in zip(*parts, strict=True))
    gradients_end = found.sizes.n_gradients
    places = _edge_gradients(found) if found.sizes.edge_by_edge else np.arange(layers_end)
    places = np.concatenate([places, gradients_end + np.arange(size)])
    transposed = _entries(numbers.n_parameters, of_parameters, columns, of_factors, values, places[source])
    eps = plan.norms[0].eps if plan.norms else 0.0
    return Packing(forward, transposed, factors, eps, layers_end, gradients_end, numbers.starts.shell)
