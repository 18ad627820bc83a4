"""Rows of the sparse matrices that make a backend's packed weights from a layer's parameters, one flat vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ..plan import Linear


def selection(columns: NDArray[Any], n_columns: int) -> sparse.csr_matrix:
    """Rows with a single 1 each, in these columns; column −1: an empty row."""
    inside = columns >= 0
    chosen, ends = columns[inside], np.concatenate([[0], np.cumsum(inside)])
    return sparse.csr_matrix((np.ones(len(chosen)), chosen, ends), shape=(len(columns), n_columns))


def linear_rows(layer: Linear, index: NDArray[Any], start: int, n_parameters: int) -> sparse.csr_matrix:
    """The rows of the values of W (out, in) at ``index`` in its flat form, whose weights start at parameter
    ``start``."""
    rows, columns, values = [], [], []
    for block in layer.blocks:
        n_b, n_o, n_i = block.basis.shape
        fields = len(block.out_start), len(block.in_start)
        u, v, b, o, i = np.ix_(*map(np.arange, (*fields, n_b, n_o, n_i)))
        row = (block.out_start[u] + o) * layer.in_size + block.in_start[v] + i
        column = start + block.offset + (u * block.n_in + block.columns[v]) * n_b + b
        value = block.basis[b, o, i]
        row, column, value = np.broadcast_arrays(row, column, value)
        rows.append(row[value != 0])
        columns.append(column[value != 0])
        values.append(value[value != 0])
    entries = (np.concatenate([*values, [0.0]]), (np.concatenate([*rows, [0]]), np.concatenate([*columns, [0]])))
    dense = sparse.coo_matrix(entries, shape=(layer.out_size * layer.in_size, n_parameters)).tocsr()
    return dense[index]


def bias_rows(layer: Linear, order: NDArray[Any], start: int, n_parameters: int) -> sparse.csr_matrix:
    """The rows of the bias, its coefficients in this order; its parameters, if it has some, start at ``start``."""
    rows, n = sparse.lil_matrix((layer.out_size, n_parameters)), layer.bias.shape[1]
    if n:
        rows[:, start : start + n] = layer.bias[order]
    return rows.tocsr()
