"""Launches of contract.py, and the products with Θ between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import contract, launch
from .configuration import precision
from .prepared import Prepared
from .sizes import Sizes, cdiv, next_power_of_2

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
    """The graph; rows are edges sorted by target."""

    source: Tensor  # (E,) source node of each edge
    order: Tensor  # (E,) each row's edge
    rowptr: Tensor  # (N + 1,) first row of each target
    by_source: Tensor  # (E,) edges sorted by source
    colptr: Tensor  # (N + 1,) first of each source among them


def _batches(s: Sizes, n: int) -> list[range]:
    """Nodes whose T fits into the workspace."""
    size = max(1, min(_NODES, _NUMBERS // max(s.n_t, 1)))
    if 0 < n <= size:
        return [range(n)]
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


def _inputs_constants(p: Prepared, has_one: bool, need_x: bool, need_q: bool) -> dict[str, Any]:
    return _constants(p, has_one) | {"NEED_X": need_x, "NEED_Q": need_q}


def _sum_constants(p: Prepared) -> dict[str, Any]:
    return {"C": p.sizes.in_size, "BC": min(next_power_of_2(p.sizes.in_size), _COLUMNS)}


def _sums(p: Prepared, f: Factors, edges: Edges, nodes: range) -> Tensor:
    """T (nodes, n_t)."""
    t = f.x.new_empty(len(nodes), p.sizes.n_t)
    tables, graph = p.some(_FORWARD_TABLES), (edges.source, edges.order, edges.rowptr)
    variant = p.variant(contract.contract_forward, _constants, f.has_one)
    launch.launch(variant, (len(nodes), p.sizes.n_accumulators), (f.x, f.q, f.r, *graph, *tables, t, nodes.start))
    return t


def contract_forward(p: Prepared, f: Factors, edges: Edges) -> Tensor:
    """(N, C_out): T Θ."""
    n = len(edges.rowptr) - 1
    batches = _batches(p.sizes, n)
    if len(batches) == 1:
        return torch.mm(_sums(p, f, edges, batches[0]), f.theta)
    out = f.x.new_empty(n, p.sizes.out_size)
    for nodes in batches:
        torch.mm(_sums(p, f, edges, nodes), f.theta, out=out[nodes.start : nodes.stop])
    return out


def contract_backward(
    p: Prepared, grad: Tensor, f: Factors, edges: Edges, needs: Sequence[bool], d_theta: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of x, q and r from that of the output; those not needed are empty. That of Θ is written to
    ``d_theta``."""
    s, (need_x, need_q, need_r), n_edges = p.sizes, needs, len(f.r)
    empty = f.x.new_empty if s.n_covered == s.in_size else f.x.new_zeros
    d_rows, d_q, d_r = empty(n_edges, s.in_size), f.q.new_empty(s.n_slices, *f.q.shape), torch.empty_like(f.r)
    for nodes in _batches(s, len(edges.rowptr) - 1):
        g = grad[nodes.start : nodes.stop]
        if d_theta is not None:
            torch.addmm(d_theta, _sums(p, f, edges, nodes).T, g, beta=int(nodes.start > 0), out=d_theta)
        if need_x or need_q or need_r:
            d_t = torch.mm(g, f.theta.T)
        if need_x or need_q:
            _backward_inputs(p, f, edges, nodes, d_t, (d_rows, d_q), (need_x, need_q))
        if need_r:
            _backward_hidden(p, f, edges, nodes, d_t, d_r)
    d_x = _sum_by_source(p, d_rows, edges, len(f.x)) if need_x else f.x.new_empty(0)
    found = (d_x, d_q[0] if s.n_slices == 1 else d_q.sum(0), d_r)
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
    graph, tables = (edges.source, edges.order, edges.rowptr), p.some(_INPUTS_TABLES)
    variant = p.variant(contract.contract_backward_inputs, _inputs_constants, f.has_one, *needs)
    arguments = (f.x, f.q, f.r, *graph, *tables, d_t, *out, nodes.start, len(f.r))
    launch.launch(variant, (len(nodes), p.sizes.n_slices), arguments)


def _backward_hidden(p: Prepared, f: Factors, edges: Edges, nodes: range, d_t: Tensor, d_r: Tensor) -> None:
    graph, tables = (edges.source, edges.order, edges.rowptr), p.some(_HIDDEN_TABLES)
    variant = p.variant(contract.contract_backward_hidden, _constants, f.has_one)
    grid = (len(nodes), cdiv(p.sizes.n_columns, p.sizes.columns))
    launch.launch(variant, grid, (f.x, f.q, *graph, *tables, d_t, d_r, nodes.start))


def _sum_by_source(p: Prepared, rows: Tensor, edges: Edges, n: int) -> Tensor:
    """(n, C_in) from the edges' (E, C_in)."""
    out, variant = rows.new_empty(n, p.sizes.in_size), p.variant(contract.sum_by_source, _sum_constants)
    grid = (n, cdiv(p.sizes.in_size, variant.constants["BC"]))
    launch.launch(variant, grid, (rows, edges.by_source, edges.colptr, out))
    return out
