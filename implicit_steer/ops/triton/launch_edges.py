"""Launches of edges.py: from edges to q and r in one kernel, and the way back in another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...plan.activations import SMALL
from ..kernel_mlp import NEAR, SOFTENING, ZERO
from . import edges, launch
from .prepared import Prepared
from .sizes import cdiv

_EDGES = 1 << 18  # whose layers' inputs the backward pass holds at a time


def _bits(n: int) -> int:
    """Of the least power of two >= n."""
    return (n - 1).bit_length()


def _constants(p: Prepared, n_layers: int) -> dict[str, Any]:
    s, tables = p.sizes, p.tables
    harmonics, powers = tables.numbers["harmonics"], tables.indices["powers"]
    return {
        "HARMONICS": tuple(harmonics.ravel().tolist()),
        "POWERS": tuple(powers.ravel().tolist()),
        "NM": len(harmonics),
        "NQ": s.n_harmonics,
        "NI": s.n_inputs,
        "NW": s.channels,
        "NC": s.coefficients,
        "NS": s.n_samples // s.channels,
        "NL": n_layers,
        "CUTOFF": s.has_cutoff,
        "FN": s.function,
        "NEAR": NEAR[p.dtype],
        "SMALL": SMALL[p.dtype],
        "SOFT": SOFTENING[p.dtype],
        "ZERO": ZERO[p.dtype],
    }


def _forward_constants(p: Prepared, n_layers: int, scaled: bool) -> dict[str, Any]:
    columns = p.sizes.n_columns if scaled else p.sizes.channels * p.sizes.coefficients
    bits = {"BITS": _bits(columns), "BITS_Q": _bits(p.sizes.n_harmonics)}
    return _constants(p, n_layers) | bits | {"NR": columns, "SCALED": scaled}


def _backward_constants(p: Prepared, store: bool) -> dict[str, Any]:
    s, (_, n_y, n_z) = p.sizes, p.sizes.gradient_shape
    bits = {"BITS": _bits(n_z), "BITS_I": _bits(s.n_inputs + 1)}
    return _constants(p, s.n_layers) | bits | {"NR": s.n_columns, "NY": n_y, "STORE_FACTORS": store}


def forward(
    p: Prepared, points: tuple[Tensor, Tensor, Tensor], shell: Tensor, weights: Tensor, n_layers: int, scaled: bool
) -> tuple[Tensor, Tensor]:
    """q (E, n_harmonics), and r (E, n_columns) or, not ``scaled``, the coefficients y of layer ``n_layers`` − 1
    (E, n_zero + n_rest); ``points`` are delta, attributes and order."""
    delta, variant = points[0], p.variant(edges.edges_forward, _forward_constants, n_layers, scaled)
    n = len(delta)
    q, r = delta.new_empty(n, p.sizes.n_harmonics), delta.new_empty(n, variant.constants["NR"])
    arguments = *points, shell, p["scalars"], weights, p["sample_rows"], r, q, n
    launch.launch(variant, (cdiv(n, variant.edges),), arguments)
    return q, r


def backward(
    p: Prepared,
    points: tuple[Tensor, Tensor, Tensor],
    shell: Tensor,
    weights: Tensor,
    d_q: Tensor,
    d_r: Tensor,
    d_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of delta and attributes, and parts of that of the shell's width, from those of q and r. Those of the
    weights are written to ``d_weights``: for every layer the products (inputs and 1) x z, see ``gradient_shape``."""
    delta, attr, _ = points
    variant = p.variant(edges.edges_backward, _backward_constants, d_weights is not None)
    n, (n_layers, n_y, n_z) = len(delta), p.sizes.gradient_shape
    block = -(-_EDGES // variant.edges) * variant.edges
    d_delta, d_attr = torch.empty_like(delta), torch.empty_like(attr)
    d_shell = delta.new_empty(cdiv(n, variant.edges))
    size = 0 if d_weights is None else min(n, block)
    y, d_z = delta.new_empty(n_layers, size, n_y), delta.new_empty(n_layers, size, n_z)
    for first in range(0, n, block):
        some = min(block, n - first)
        parts = d_shell if some == n else d_shell[first // variant.edges :]
        if some < size:
            y, d_z = delta.new_empty(n_layers, some, n_y), delta.new_empty(n_layers, some, n_z)
        gradients = d_r, d_q, d_delta, d_attr, parts, y, d_z
        arguments = *points, shell, p["scalars"], weights, p["sample_rows"], *gradients, first, some
        launch.launch(variant, (cdiv(some, variant.edges),), arguments)
        if d_weights is not None:
            out = d_weights.view(p.sizes.gradient_shape)
            torch.baddbmm(out, y.mT, d_z, beta=int(first > 0), out=out)
    if d_weights is not None and n == 0:
        d_weights.zero_()
    return d_delta, d_attr, d_shell
