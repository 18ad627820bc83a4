"""Launches of contract.py, and the products with Θ between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import contract, launch
from .configuration import precision
from .prepared import Prepared
from .sizes import Sizes, next_power_of_2

_NODES, _NUMBERS = 4096, 1 << 23  # of the workspace for T, at most
_COLUMNS = 64  # of x that a program of sum_by_source adds up, at most

_FORWARD_TABLES = (
    "coupling",
    "constant",
    "acc_term_begin",
    "acc_start",
    "acc_extent",
    "acc_offset",
    "term_column",
    "term_chunks",
)
_INPUTS_TABLES = (
    "coupling",
    "constant",
    "acc_extent",
    "acc_offset",
    "term_acc",
    "term_column",
    "slice_term_begin",
    "slice_term",
    "slice_chunk",
    "slice_start",
    "slice_components",
)
_HIDDEN_TABLES = (
    "coupling",
    "constant",
    "acc_start",
    "acc_extent",
    "acc_offset",
    "term_acc",
    "term_chunks",
    "window_term_begin",
    "window_term",
    "window_place",
)


class Factors(NamedTuple):
    """What is multiplied; T is linear in x and r, affine in q."""

    has_one: bool  # whether q₀ = 1, or 0 (for derivatives in a direction of q)
    x: Tensor  # (N, C_in)
    q: Tensor  # (E, n_harmonics), as r in rows sorted by target
    r: Tensor  # (E, n_columns)
    theta: Tensor  # (n_t, C_out)


class Edges(NamedTuple):
    """The graph, edges in rows sorted by target."""

    source: Tensor  # (E,) source node of each row
    rowptr: Tensor  # (N + 1,) first row of each target
    order: Tensor  # (E,) each row's edge
    by_source: Tensor  # (E,) edges sorted by source
    colptr: Tensor  # (N + 1,) first of each source among them


def _batches(s: Sizes, n: int) -> list[range]:
    """Nodes whose T fits into the workspace."""
    size = max(1, min(_NODES, _NUMBERS // max(s.n_t, 1)))
    return [range(node, min(node + size, n)) for node in range(0, n, size)]


def _constants(p: Prepared, has_one: bool) -> dict[str, Any]:
    s = p.sizes
    return {
        "C_IN": s.in_size,
        "NQ": s.n_harmonics,
        "BQ": next_power_of_2(s.n_harmonics, 16),
        "NR": s.n_columns,
        "NT": s.n_t,
        "S": s.slots,
        "V": s.fields,
        "W": s.columns,
        "D": s.components,
        "D_ALL": s.most_components,
        "HAS_ONE": has_one,
        "PREC": precision(p.dtype),
    }


def _sums(p: Prepared, f: Factors, edges: Edges, nodes: range) -> Tensor:
    """T (nodes, n_t)."""
    t = f.x.new_empty(len(nodes), p.sizes.n_t)
    tables = (p[name] for name in _FORWARD_TABLES)
    arguments = (f.x, f.q, f.r, edges.source, edges.rowptr, *tables, t, nodes.start)
    grid, config = (len(nodes), p.sizes.n_accumulators), p.config(contract.contract_forward)
    launch.launch(contract.contract_forward, grid, arguments, _constants(p, f.has_one), config)
    return t


def contract_forward(p: Prepared, f: Factors, edges: Edges) -> Tensor:
    """(N, C_out): T Θ."""
    n = len(edges.rowptr) - 1
    out = f.x.new_empty(n, p.sizes.out_size)
    for nodes in _batches(p.sizes, n):
        torch.mm(_sums(p, f, edges, nodes), f.theta, out=out[nodes.start : nodes.stop])
    return out


def contract_backward(p: Prepared, grad: Tensor, f: Factors, edges: Edges, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of x, q, r and Θ from that of the output; those not needed are empty."""
    s, (need_x, need_q, need_r, need_theta), n_edges = p.sizes, needs, len(f.r)
    empty = f.x.new_empty if s.n_covered == s.in_size else f.x.new_zeros
    d_rows, d_q = empty(n_edges, s.in_size), f.q.new_empty(s.n_slices, *f.q.shape)
    d_r, d_theta = torch.empty_like(f.r), torch.zeros_like(f.theta)
    for nodes in _batches(s, len(edges.rowptr) - 1):
        g = grad[nodes.start : nodes.stop]
        if need_theta:
            d_theta.addmm_(_sums(p, f, edges, nodes).T, g)
        if need_x or need_q or need_r:
            d_t = g @ f.theta.T
        if need_x or need_q:
            _backward_inputs(p, f, edges, nodes, d_t, (d_rows, d_q), (need_x, need_q))
        if need_r:
            _backward_hidden(p, f, edges, nodes, d_t, d_r)
    d_x = _sum_by_source(p, d_rows, edges, len(f.x)) if need_x else f.x.new_empty(0)
    found = (d_x, d_q[0] if s.n_slices == 1 else d_q.sum(0), d_r, d_theta)
    return tuple(t if need else t.new_empty(0) for t, need in zip(found, needs, strict=True))


def _backward_inputs(
    p: Prepared,
    f: Factors,
    edges: Edges,
    nodes: range,
    d_t: Tensor,
    out: tuple[Tensor, Tensor],
    needs: tuple[bool, bool],
) -> None:
    """Of the features gathered by the edges, (E, C_in), and of q, (slices, E, n_harmonics)."""
    tables = (p[name] for name in _INPUTS_TABLES)
    arguments = (f.x, f.q, f.r, edges.source, edges.rowptr, edges.order, *tables, d_t, *out, nodes.start, len(f.r))
    constants = _constants(p, f.has_one) | {"NEED_X": needs[0], "NEED_Q": needs[1]}
    grid, config = (len(nodes), p.sizes.n_slices), p.config(contract.contract_backward_inputs)
    launch.launch(contract.contract_backward_inputs, grid, arguments, constants, config)


def _backward_hidden(p: Prepared, f: Factors, edges: Edges, nodes: range, d_t: Tensor, d_r: Tensor) -> None:
    tables = (p[name] for name in _HIDDEN_TABLES)
    arguments = (f.x, f.q, edges.source, edges.rowptr, *tables, d_t, d_r, nodes.start)
    grid = (len(nodes), triton.cdiv(p.sizes.n_columns, p.sizes.columns))
    config = p.config(contract.contract_backward_hidden)
    launch.launch(contract.contract_backward_hidden, grid, arguments, _constants(p, f.has_one), config)


def _sum_by_source(p: Prepared, rows: Tensor, edges: Edges, n: int) -> Tensor:
    """(n, C_in) from the edges' (E, C_in)."""
    out, size = rows.new_empty(n, p.sizes.in_size), p.sizes.in_size
    width = min(next_power_of_2(size), _COLUMNS)
    grid, config = (n, triton.cdiv(size, width)), p.config(contract.sum_by_source)
    arguments = (rows, edges.by_source, edges.colptr, out)
    launch.launch(contract.sum_by_source, grid, arguments, {"C": size, "BC": width}, config)
    return out
