"""The sparse matrix that makes the packed weights of the native code from a layer's parameters, one flat vector.

Its counterpart in C++ is ``SparseMatrix`` of ``csrc/packing.h``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ...plan import Coupling, Plan
from ...plan.packing import kernel_positions
from ..packing_rows import selection
from .terms import PANEL, padded


class PackingMatrix:
    """The matrix, one block of rows after the other; as many columns as there are parameters, ``n_parameters``."""

    def __init__(self, n_parameters: int) -> None:
        self.n_parameters, self.n_rows = n_parameters, 0
        self._blocks: list[sparse.csr_matrix] = []

    def add(self, rows: sparse.csr_matrix) -> int:
        """The position of the first of these rows among the packed weights."""
        first = self.n_rows
        self._blocks.append(rows)
        self.n_rows += rows.shape[0]
        return first

    def add_copies(self, parameters: NDArray[Any]) -> int:
        """The position of the first of rows that copy one of these parameters each; −1: a row that gives 0."""
        return self.add(selection(parameters, self.n_parameters))

    def stacked(self) -> sparse.csr_matrix:
        """All rows; the blocks, which of large fields take as much memory, are given up."""
        blocks, self._blocks = self._blocks, []
        return sparse.vstack(blocks, format="csr")


# ---- the last layer


class ThetaLayouts(NamedTuple):
    """The parameter of every number of a coupling's θ in both layouts; −1 in the padding of rows of channels."""

    theta: NDArray[Any]  # [b][u][v, w], for the reverse sweep; [b][v, w] where depthwise
    theta_forward: NDArray[Any]  # [b][panel of u][v][w][u], for the forward pass; [b][w][u]


def theta_layouts(coupling: Coupling, start: int, constant: bool) -> ThetaLayouts:
    """``start``: of the coupling's parameter; ``constant``: it reads the constant hidden feature."""
    parameters = start + coupling.theta_positions  # (U, V, W, b); V = 1 where depthwise
    theta = parameters.transpose((3, 1, 0, 2) if coupling.depthwise else (3, 0, 1, 2))
    theta = theta[..., 0] if constant else _padded_rows(theta).reshape(*theta.shape[:2], -1)
    forward = _padded_rows(parameters.transpose(3, 1, 2, 0))
    panel = forward.shape[-1] if coupling.depthwise else PANEL
    panels = [forward[..., u : u + panel].reshape(len(forward), -1) for u in range(0, forward.shape[-1], panel)]
    return ThetaLayouts(_padded_rows(theta).reshape(-1), np.concatenate(panels, axis=1).reshape(-1))


def _padded_rows(numbers: NDArray[Any]) -> NDArray[Any]:
    """The last axis filled up with −1 to the size of a row of channels."""
    size = numbers.shape[-1]
    return np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, padded(size) - size)], constant_values=-1)


def dense_couplings(plan: Plan) -> tuple[Coupling, ...]:
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


def kernel_entries(plan: Plan, n_weights: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of every product θ·B: its position in the flat (C_out, C_in, H) kernel tensor, that of θ among the last layer's
    parameters, ``n_weights`` weights and then its bias, and B."""
    fields = [(*c.row.shape, len(c.hidden_start)) for c in plan.couplings]
    counts = [math.prod(n) * c.counts[0] for n, c in zip(fields, plan.couplings, strict=True)]
    position, column, value = (np.empty(sum(counts), dtype) for dtype in (np.int64, np.int64, float))
    ends = np.cumsum(counts)
    for c, n, count, end in zip(plan.couplings, fields, counts, ends, strict=True):
        b, o, i, m = np.nonzero(c.basis)
        u, v, w, _ = np.ogrid[: n[0], : n[1], : n[2], :1]
        kernel_positions(plan, c, (u, v, w), (o, i, m), out=position[end - count : end].reshape(*n, len(b)))
        here = column[end - count : end].reshape(*n, len(b))  # theta_positions of the nonzeros, in place
        here[...] = c.row[u, v] + w * len(c.basis) + (0 if c.parameter == "weights" else n_weights)
        here += b
        value[end - count : end].reshape(*n, len(b))[...] = c.basis[b, o, i, m]
    return position, column, value


def kernel_rows(plan: Plan, starts: dict[str, int], n_parameters: int) -> sparse.csr_matrix:
    """(C_out · C_in · H, n_parameters): the rows of the flat kernel tensor; ``starts``: of the last layer's weights and
    bias among the parameters."""
    position, column, value = kernel_entries(plan, starts["bias"] - starts["weights"])
    column += starts["weights"]
    shape = plan.out_size * plan.in_size * plan.hidden_size, n_parameters
    return sparse.coo_matrix((value, (position, column)), shape=shape).tocsr()
