"""Launches of frame.py and layers.py: from edges to the hidden coefficients r, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...plan.activations import SMALL
from ..kernel_mlp import NEAR, SOFTENING, ZERO
from . import frame, launch, layers
from .configuration import exact_product, precision
from .prepared import Prepared
from .sizes import SAMPLES, cdiv, next_power_of_2

_EDGES = 1 << 18  # whose hidden coefficients the backward pass holds at a time
_PROGRAMS = {"cpu": 3, "cuda": 1024}  # partial sums of a weight gradient, at most

_FRAME_TABLES = (
    "scalars",
    "harmonics",
    "powers",
    "plane",
    "axis",
    "attribute_order",
    "attribute_partner",
    "attribute_sign",
    "pairs",
)


class LayerInputs(NamedTuple):
    """What the hidden layers read, edges sorted by target."""

    inputs: Tensor  # (E, n_inputs)
    radius: Tensor  # (E,), or (0,) where the frame is not regular
    factor: Tensor  # (E,) γ s(|x|)
    weights: Tensor  # flat, packed as packing.py says


# ---- frame


def edge_constants(p: Prepared) -> dict[str, Any]:
    """Those with which kernels read an edge, and make its radial factor and the harmonics of its frame."""
    s, indices = p.sizes, p.tables.indices
    degrees = (indices[name].max(initial=0) for name in ("powers", "attribute_order") if name in indices)
    monomials = indices["powers"].shape[1] if "powers" in indices else 0
    return {
        "KIND": s.kind,
        "DIM": s.dim,
        "NA": s.n_attributes,
        "NM": monomials,
        "BM": next_power_of_2(monomials, 16),
        "NQ": s.n_harmonics,
        "BQ": next_power_of_2(s.n_harmonics, 16),
        "DEGREE": int(max(degrees, default=0)),
        "CUTOFF": s.has_cutoff,
        "SOFT": SOFTENING[p.dtype],
        "ZERO": ZERO[p.dtype],
        "PREC": "ieee" if p.dtype == torch.float64 else "tf32x3",
    }


def _frame_constants(p: Prepared) -> dict[str, Any]:
    s = p.sizes
    own = {"BA": next_power_of_2(s.n_attributes), "NI": s.n_inputs, "PAIRS": len(p.tables.indices["pairs"])}
    return edge_constants(p) | own


def frame_forward(p: Prepared, delta: Tensor, attr: Tensor, order: Tensor, shell: Tensor) -> tuple[Tensor, ...]:
    """(E, dim), (E, n_attributes) → inputs (E, n_inputs), radius (E,) or (0,), factor (E,), q (E, n_harmonics), all in
    rows of ``order``."""
    s, n = p.sizes, len(delta)
    out = (
        delta.new_empty(n, s.n_inputs),
        delta.new_empty(n if s.regular else 0),
        delta.new_empty(n),
        delta.new_empty(n, s.n_harmonics),
    )
    variant = p.variant(frame.frame_forward, _frame_constants)
    arguments = delta, attr, order, shell, *p.some(_FRAME_TABLES), *out, n
    launch.launch(variant, (cdiv(n, variant.edges),), arguments)
    return out


def frame_backward(
    p: Prepared, delta: Tensor, attr: Tensor, order: Tensor, shell: Tensor, gradients: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of delta and attr, and parts of that of the shell's width, from those of frame_forward's results."""
    n, variant = len(delta), p.variant(frame.frame_backward, _frame_constants)
    programs = cdiv(n, variant.edges)
    out = torch.empty_like(delta), torch.empty_like(attr), delta.new_empty(programs)
    arguments = delta, attr, order, shell, *p.some(_FRAME_TABLES), *gradients, *out, n
    launch.launch(variant, (programs,), arguments)
    return out


# ---- hidden layers


def _layer_constants(p: Prepared) -> dict[str, Any]:
    s, multiply = p.sizes, precision(p.dtype)
    return p.sizes.widths | {
        "REGULAR": s.regular,
        "FN": s.function,
        "NEAR": NEAR[p.dtype],
        "SMALL": SMALL[p.dtype],
        "BU": SAMPLES,
        "PREC": exact_product(s) if multiply == "tf32x3" else multiply,
    }


def _forward_constants(p: Prepared, n_layers: int, store_r: bool, store_y: bool) -> dict[str, Any]:
    flags = {"NL": n_layers, "NR": p.sizes.n_columns, "STORE_R": store_r, "STORE_Y": store_y}
    return _layer_constants(p) | flags


def _backward_constants(p: Prepared, first: bool) -> dict[str, Any]:
    constants = _layer_constants(p)
    return constants | {"FIRST": first, "BI": constants["BI"] if first else constants["B0"]}


def _inputs_constants(p: Prepared, first: bool, add: bool) -> dict[str, Any]:
    return _backward_constants(p, first) | {"ADD": add}


def _forward(p: Prepared, given: LayerInputs, edges: range, n_layers: int, r: Tensor | None, y: Tensor | None) -> None:
    """Write r of these edges, or all layers' coefficients y."""
    variant = p.variant(layers.layers_forward, _forward_constants, n_layers, r is not None, y is not None)
    out = (given.factor if t is None else t for t in (r, y))  # a pointer that is not used
    arguments = *given, p["inverse"], *out, edges.start, edges.stop, len(edges)
    launch.launch(variant, (cdiv(len(edges), variant.edges),), arguments)


def layers_forward(p: Prepared, given: LayerInputs) -> Tensor:
    """r (E, n_columns)."""
    n = len(given.factor)
    r = given.factor.new_empty(n, p.sizes.n_columns)
    _forward(p, given, range(n), p.sizes.n_layers, r, None)
    return r


def hidden_coefficients(p: Prepared, given: LayerInputs, n_layers: int) -> Tensor:
    """(E, n_zero + n_rest) of layer ``n_layers`` − 1, without the factor; the weights are of so many layers."""
    n = len(given.factor)
    y = given.factor.new_empty(n_layers, n, p.sizes.n_zero + p.sizes.n_rest)
    _forward(p, given, range(n), n_layers, None, y)
    return y[-1]


def layers_backward(p: Prepared, given: LayerInputs, grad: Tensor, d_weights: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of inputs, radius and factor from that of r; those of the weights are written to ``d_weights``."""
    s, (inputs, radius, factor, _) = p.sizes, given
    d_inputs, d_radius, d_factor = out = tuple(torch.empty_like(t) for t in (inputs, radius, factor))
    for begin in range(0, len(factor), _EDGES):
        edges = range(begin, min(begin + _EDGES, len(factor)))
        here, used = slice(edges.start, edges.stop), s.n_columns - 1
        y = factor.new_empty(s.n_layers, len(edges), s.n_zero + s.n_rest)
        _forward(p, given, edges, s.n_layers, None, y)
        d_factor[here] = (grad[here, :used] * y[-1][:, :used]).sum(1) + grad[here, used]
        d_y = torch.zeros_like(y[0])
        d_y[:, :used] = grad[here, :used] * factor[here, None]
        _reverse_sweep(p, given, y, d_y, edges, d_inputs, d_radius, d_weights)
    if d_weights is not None and len(factor) == 0:
        d_weights.zero_()
    return out


def _reverse_sweep(
    p: Prepared,
    given: LayerInputs,
    y: Tensor,
    d_y: Tensor,
    edges: range,
    d_inputs: Tensor,
    d_radius: Tensor,
    d_weights: Tensor | None,
) -> None:
    """All layers of some edges, the last first, from their coefficients y and the gradient d_y of the last layer's. The
    gradients of inputs and radius are written, those of the weights too, or added where other edges came before."""
    n_layers, offsets = p.sizes.n_layers, p.sizes.layer_offsets()
    for n in reversed(range(n_layers)):
        first = n == 0
        shared = (given.inputs, given.radius, y[max(n - 1, 0)], d_y, given.weights, p["inverse"])
        if d_weights is not None:
            (start, _), (end, _) = offsets[n], offsets[n + 1]
            _add_weights(p, shared, edges, offsets[n], first, d_weights[start:end])
        variant = p.variant(layers.layers_backward_inputs, _inputs_constants, first, n < n_layers - 1)
        d_in = d_inputs if first else torch.empty_like(d_y)
        arguments = (*shared, d_in, d_radius, edges.start, edges.stop, *offsets[n])
        launch.launch(variant, (cdiv(len(edges), variant.edges),), arguments)
        d_y = d_in


def _add_weights(
    p: Prepared, shared: tuple[Tensor, ...], edges: range, offsets: tuple[int, int], first: bool, out: Tensor
) -> None:
    """The gradient of one layer's weights, in partial sums of some edges each; added to that of earlier edges."""
    variant = p.variant(layers.layers_backward_weights, _backward_constants, first)
    programs = min(cdiv(len(edges), variant.edges), _PROGRAMS[out.device.type])
    partial = out.new_empty(programs, len(out))
    arguments = (*shared, partial, edges.start, edges.stop, *offsets, len(out))
    launch.launch(variant, (programs, variant.constants["NU"] // variant.constants["BU"]), arguments)
    if edges.start == 0:
        torch.sum(partial, 0, out=out)
    else:
        out += partial.sum(0)
