"""Frame and hidden layers in plain PyTorch on whole tensors, for the derivatives of their gradients, on weights as
layers.py reads them; and batch statistics of hidden coefficients. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...plan.activations import phi
from ...plan.moments import combined, moments
from ...plan.packing import constant
from ..kernel_mlp import (
    NEAR,
    SOFTENING,
    EdgeFrame,
    difference_near_origin,
    edge_frame,
    radial_factor,
    table_edge,
)
from ..spline import interpolation
from .prepared import Prepared
from .sizes import FRAME_KINDS
from .tables import Tables

_EDGES = 1 << 16  # whose full hidden features exist at a time


def geometry(
    tables: Tables, delta: Tensor, attr: Tensor, order: Tensor, shell_width: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, radius, factor and q, as frame.frame_forward writes them; ``attr`` in frame coordinates."""
    plan = tables.plan
    delta, attr = delta.index_select(0, order), attr.index_select(0, order)
    edge = edge_frame(plan, delta, attr @ constant(plan.frame, "attribute", attr).T)
    factor, q = radial_factor(plan, shell_width, delta), _harmonics(tables, edge)
    if not plan.frame.regular:
        return edge.inputs, delta.new_empty(0), factor, q
    return edge.inputs[:, 1:], cast(Tensor, edge.radius), factor, q


def _harmonics(tables: Tables, edge: EdgeFrame) -> Tensor:
    """q (E, n_harmonics)."""
    inputs = edge.inputs
    if tables.sizes.kind == FRAME_KINDS["none"]:
        return inputs.new_empty(len(inputs), 0)
    pick = torch.tensor(tables.pick, device=inputs.device)
    first = edge.first.index_select(1, pick)
    if tables.sizes.kind == FRAME_KINDS["zonal"]:
        return first
    sine = edge.second.index_select(1, pick) * constant(tables.plan.frame, "sign", inputs)[pick]
    return torch.stack([first, sine], -1).flatten(1)


def _pieces(prepared: Prepared, flat: Tensor) -> list[tuple[Tensor, Any, Tensor, Any]]:
    """Of the packed weights each layer's P₀, P₁ (or None), b and b₁ (or None), as layers.py names them."""
    k, regular, found = prepared.sizes.widths, prepared.sizes.regular, []
    for n, (start, _) in enumerate(prepared.sizes.layer_offsets()[:-1]):
        rows = [k["BI"], 1, 1] if n == 0 and regular else [k["B0"] if n else k["BI"], *([k["B1"]] * regular), 1]
        parts = flat[start : start + sum(rows) * k["NU"]].view(-1, k["NU"]).split(rows)
        if not regular:
            found.append((parts[0], None, parts[1][0], None))
        elif n == 0:
            found.append((parts[0], None, parts[1][0], parts[2][0]))
        else:
            found.append((parts[0], parts[1], parts[2][0], None))
    return found


def layers(
    prepared: Prepared, inputs: Tensor, radius: Tensor, factor: Tensor, linears: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """r (E, n_columns), from W (out, in) and b (out,) of the layers."""
    if not linears:
        return torch.cat([inputs * factor[:, None], factor[:, None]], 1)
    k, s, weights = prepared.sizes.widths, prepared.sizes, pack_layers(prepared, linears)
    name, y0 = prepared.tables.plan.activations[0].function, inputs
    y1: Tensor | None = None
    r = radius[:, None]
    for (p0, p1, b, b1), (_, start) in zip(_pieces(prepared, weights), prepared.sizes.layer_offsets(), strict=False):
        inverse = prepared["inverse"][start:]
        q0 = inverse[: k["NU"] * k["B0"]].view(k["NU"], -1)[:, : s.n_zero]
        u0 = y0 @ p0[: y0.shape[1]] + b
        if not s.regular:
            y0 = phi(name, u0) @ q0
            continue
        w = b1 if y1 is None else y1 @ p1[: s.n_rest]
        near = r < NEAR[u0.dtype]
        # each branch gets a radius at which it is finite, for the gradient's sake
        r_near, r_far = torch.where(near, r, torch.zeros_like(r)), torch.where(near, torch.ones_like(r), r)
        p = phi(name, u0 + r * w)
        d = torch.where(near, difference_near_origin(name, u0, w, r_near), p / r_far)
        q1 = inverse[k["NU"] * k["B0"] :][: k["NU"] * k["B1"]].view(k["NU"], -1)[:, : s.n_rest]
        y0, y1 = p @ q0, d @ q1
    y = y0 if y1 is None else torch.cat([y0, y1], 1)
    return torch.cat([y[:, : s.n_columns - 1] * factor[:, None], factor[:, None]], 1)


def splines(
    prepared: Prepared, delta: Tensor, attr: Tensor, order: Tensor, shell_width: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """q and r, as launch_spline.forward writes them, from the splines' own coefficients."""
    plan, s = prepared.tables.plan, prepared.sizes
    delta, attr = delta.index_select(0, order), attr.index_select(0, order)
    at = interpolation(plan, delta, attr, SOFTENING[delta.dtype])
    rows = coefficients.view(s.n_rows, s.channels, -1).transpose(1, 2).flatten(1)[:, : s.n_columns - 1]
    y = spline_product(0, plan.digest, at.first, None, at.weights, rows)
    factor = radial_factor(plan, shell_width, delta)[:, None]
    return _harmonics(prepared.tables, table_edge(plan, at.v)), torch.cat([y * factor, factor], 1)


class _SplineProduct(torch.autograd.Function):
    """See :func:`spline_product`."""

    @staticmethod
    def forward(ctx: Any, without: int, key: str, first: Tensor, y: Any, weights: Any, rows: Any) -> Tensor:
        ctx.call = without, key
        ctx.save_for_backward(first, y, weights, rows)
        if without == 2:
            return torch.ops.implicit_steer.triton_knot_sums(key, y, weights, first.int())
        read = [rows.index_select(0, first + k) for k in range(4)]
        if without == 1:
            return torch.stack([(y * row).sum(1) for row in read], 1)
        return cast(Tensor, sum(weights[:, k : k + 1] * row for k, row in enumerate(read)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (without, key), (first, *factors) = ctx.call, ctx.saved_tensors
        factors[without] = grad
        found: list[Tensor | None] = [None] * 3
        for n in range(3):
            if ctx.needs_input_grad[3 + n]:
                found[n] = spline_product(n, key, first, *(None if k == n else f for k, f in enumerate(factors)))
        return None, None, None, *found


def spline_product(
    without: int, key: str, first: Tensor, y: Tensor | None, weights: Tensor | None, rows: Tensor | None
) -> Tensor:
    """The derivative of Σ_e Σ_k ⟨y[e], rows[first[e] + k]⟩ weights[e, k] with respect to argument ``without`` of y
    (E, C), weights (E, 4) and rows (n_rows, C), which is None. Its own derivatives are of the same kind, and sums over
    edges have a fixed order: those of index_select have none on a GPU. ``key``: of the plan."""
    return cast(Tensor, _SplineProduct.apply(without, key, first, y, weights, rows))  # type: ignore[no-untyped-call]


def _coordinates(prepared: Prepared, y: Tensor, q: Tensor) -> Tensor:
    """Full hidden features (E, d, channels) from coefficients y (E, c, channels)."""
    if prepared.sizes.kind == FRAME_KINDS["none"]:
        return y
    (rho, j), value = prepared["way_back"].long(), prepared["way_back_value"]
    q = torch.cat([torch.ones_like(q[:, :1]), q], 1)
    first, second = (q[:, j[n]] * value[n] for n in (0, 1))
    return first[..., None] * y[:, rho[0]] + second[..., None] * y[:, rho[1]]


def feature_moments(prepared: Prepared, y: Tensor, q: Tensor) -> Tensor:
    """(2, d, channels): mean of the full hidden features over all edges, and sum of squared deviations from it, from
    hidden coefficients (E, n_zero + n_rest). The sums of some edges at a time are put together."""
    pieces = zip(y.view(len(y), -1, prepared.sizes.channels).split(_EDGES), q.split(_EDGES), strict=True)
    parts = [moments(_coordinates(prepared, some, direction)) for some, direction in pieces]
    _, mean, squares = combined(parts) if len(parts) > 1 else parts[0]
    return torch.stack([mean, squares])


def pack_layers(prepared: Prepared, linears: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The packed weights from W (out, in) and b (out,) of the first layers: A W in the order of layers.py, filled up
    with 0."""
    k, s = prepared.sizes.widths, prepared.sizes
    z, parts = s.n_zero // s.channels, []
    samples = prepared["samples"]  # (layers, S, c)

    def add(matrix: Tensor, rows: int) -> None:
        """Flatten a matrix (inputs, …), filled up to so many rows of NU."""
        flat = matrix.flatten(1)
        parts.append(torch.nn.functional.pad(flat, (0, k["NU"] - flat.shape[1], 0, rows - len(flat))).reshape(-1))

    for n, (w, b) in enumerate(linears):
        zero, rest = samples[n][:, :z], samples[n][:, z:]
        w, b = w.view(s.channels, -1, w.shape[1]), b.view(s.channels, -1)
        if n == 0:
            first = w[:, :, 1:] if s.regular else w  # but the constant one of regular frames
            add(torch.einsum("sc,wci->iws", zero, first[:, :z]), k["BI"])
        else:
            w = w.unflatten(2, (s.channels, -1))
            add(torch.einsum("sc,wcvk->kvws", zero, w[:, :z, :, :z]).flatten(0, 1), k["B0"])
            if s.regular:
                add(torch.einsum("sc,wcvk->kvws", rest, w[:, z:, :, z:]).flatten(0, 1), k["B1"])
        add(torch.einsum("sc,wc->ws", zero, b[:, :z])[None], 1)
        if s.regular and n == 0:
            add(torch.einsum("sc,wc->ws", rest, w[:, z:, 0])[None], 1)
    return torch.cat(parts)


def pack_theta(prepared: Prepared, theta: Sequence[Tensor]) -> Tensor:
    """Θ (n_t, C_out) from θ (U, V, W, b) of every coupling."""
    s, mixing = prepared.sizes, prepared.mixing
    values = [torch.einsum("uvwb,bso->svwuo", t, m).reshape(-1) for t, m in zip(theta, mixing, strict=True)]
    flat = prepared["scalars"].new_zeros(s.n_t * s.out_size)
    if values:
        flat = flat.index_copy(0, prepared.position, torch.cat(values))
    return flat.view(s.n_t, s.out_size)
