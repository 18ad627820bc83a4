"""The kernel MLP per edge in plain PyTorch: frame, hidden layers, hidden features h. Shared by `reference` and `eager`.

Near radius 0 a coefficient of order k ≥ 1 vanishes like r^k, and h = c · Y(x/r) would lose digits like eps / r in its
derivative. Regular frames therefore carry g = c / r for every order ≥ 1: with u₀ the part of the samples A z that the
orders 0 make and w = Σ_{k ≥ 1} A g, the samples are u₀ + r w and

    d = (φ(u₀ + r w) − φ(u₀)) / r,    c₀ = A⁻ (φ(u₀) + r d),    g = A⁻ d,

since A⁻ of orders ≥ 1 annihilates φ(u₀), which does not depend on the sample's angle. d is a difference quotient of φ.
c₀ and g / r^{k−1} are smooth functions of r², so r² + ε² may stand for r² (an error of ε²), and with it no derivative
meets a division by zero: the second derivatives at the origin come out right to rounding / ε.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..plan import Activation, Frame, Norm, Plan, Table
from ..plan.activations import difference_quotient, phi
from ..plan.moments import NormStatistics, StatisticsSource
from ..plan.packing import Parameters, Weights, cached, constant, dense_kernel, fold_norm, norm_affine, pack, running
from .spline import Interpolation, interpolated, interpolation

# Radii below this take the difference quotient; above it A⁻ φ(u₀ + r w) / r is right to eps / r.
NEAR = {torch.float32: 0.1, torch.float64: 0.01}
# ε² of regular frames, in the squared unit of the positions.
SOFTENING = {torch.float32: 1e-10, torch.float64: 1e-18}
# Squared lengths below this count as 0 elsewhere: their square would underflow.
ZERO = {torch.float32: 1e-24, torch.float64: 1e-100}


_NOTHING: Any = None  # where a frame has no such tensor


class EdgeFrame(NamedTuple):
    """E edges in their frames: the MLP's inputs, and the way back from hidden coefficients c to hidden features h.

    ``first`` and ``second`` say how they return, by kind of frame:

    - zonal: ``h[m] = first[m] c[coefficient[m]]``, first the harmonics r Y_m(x̂), without r for order 0; no ``second``.
    - planar: ``h[m] = first[m] c[m] + second[m] c[partner[m]]``, first cos kφ, second sign[m] sin kφ, k the order; for
      k ≥ 1 both times the radius where the frame is regular.
    - none: ``h = c``; neither.
    """

    inputs: Tensor  # (E, n_in); coefficients of orders >= 1 divided by the radius where the frame is regular
    radius: Tensor | None  # (E,) in regular frames
    first: Tensor = _NOTHING  # (E, d)
    second: Tensor = _NOTHING  # (E, d)


def safe_norm(x: Tensor) -> Tensor:
    """|x| along the last axis; exactly 0, with derivative 0, at the origin; NaN of NaN."""
    squared = x.square().sum(-1)
    zero = squared <= ZERO[x.dtype]
    return torch.where(zero, torch.ones_like(squared), squared).sqrt() * ~zero


def _soft_norm(x: Tensor) -> Tensor:
    """sqrt(|x|² + ε²) along the last axis."""
    return (x.square().sum(-1) + SOFTENING[x.dtype]).sqrt()


def _unit(x: Tensor, radius: Tensor) -> Tensor:
    """x / radius, 0 where the radius is 0."""
    return x / torch.where(radius > 0, radius, torch.ones_like(radius))[:, None]


def _monomials(u: Tensor, powers: NDArray[Any]) -> Tensor:
    """(E, n_monomials)."""
    table = [torch.ones_like(u)]
    for _ in range(int(powers.max())):
        table.append(table[-1] * u)
    stacked = torch.stack(table, dim=-1)  # (E, 3, degree + 1)
    columns = torch.tensor(powers, device=u.device)
    return stacked[:, 0, columns[:, 0]] * stacked[:, 1, columns[:, 1]] * stacked[:, 2, columns[:, 2]]


def _zonal_edge(frame: Frame, delta: Tensor, attributes: Tensor) -> EdgeFrame:
    radius = _soft_norm(delta)
    harmonics = constant(frame, "harmonics", delta)  # (d, n_monomials)
    degree = torch.tensor(frame.degrees, device=delta.device)
    y = _monomials(delta / radius[:, None], frame.powers) @ harmonics.T
    linear = delta @ harmonics[:, torch.tensor(_linear_monomials(frame), device=delta.device)].T
    # order 0: Y; order 1: r Y(x̂) = Y(x), exactly linear; above: r Y(x̂)
    first = torch.where(degree == 0, y, torch.where(degree == 1, linear, radius[:, None] * y))
    return EdgeFrame(torch.cat([torch.ones_like(delta[:, :1]), attributes], 1), radius, first)


@lru_cache(maxsize=64)
def _linear_monomials(frame: Frame) -> list[int]:
    """Positions of x, y, z among the monomials."""
    rows = frame.powers.tolist()
    return [rows.index(unit) for unit in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]


def _rotate(values: Tensor, first: Tensor, second: Tensor, partner: Tensor) -> Tensor:
    """first[m] c[m] + second[m] c[partner[m]] over the last axis."""
    return first * values + second * values.index_select(-1, partner)


def _multiples(c: Tensor, s: Tensor, order: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """(E, n): cos kφ, sin kφ for each k in ``order``, from cos φ and sin φ (E,)."""
    cosines, sines = [torch.ones_like(c)], [torch.zeros_like(s)]
    for _ in range(int(order.max(initial=0))):
        cosines.append(cosines[-1] * c - sines[-1] * s)
        sines.append(sines[-1] * c + cosines[-2] * s)
    pick = torch.tensor(order, device=c.device)
    return torch.stack(cosines, -1)[:, pick], torch.stack(sines, -1)[:, pick]


def _planar_edge(frame: Frame, delta: Tensor, attributes: Tensor) -> EdgeFrame:
    p = delta @ constant(frame, "plane", delta)
    if frame.regular:
        radius = _soft_norm(p)
        c, s = (p / radius[:, None]).unbind(-1)
    else:
        radius = safe_norm(p)
        direction = torch.where(radius[:, None] > 0, _unit(p, radius), _attribute_direction(frame, attributes))
        c, s = direction.unbind(-1)
    cosine, sine = _multiples(c, s, frame.attribute_order)
    turned = _rotate(
        attributes,
        cosine,
        -sine * constant(frame, "attribute_sign", delta),
        constant(frame, "attribute_partner", delta),
    )
    if frame.regular:
        turned_p = torch.ones_like(p[:, :1])
    else:  # (ρ, 0); on the axis x itself in the constant frame, which keeps its derivative there
        turned_p = torch.stack([c * p[:, 0] + s * p[:, 1], c * p[:, 1] - s * p[:, 0]], 1)
    inputs = torch.cat([turned_p, delta @ constant(frame, "axis", delta), turned], 1)
    first, second = _multiples(c, s, frame.order)
    if frame.regular:  # order 0 as it is; order 1 linear in x; above, radius times the unit vector's
        order = torch.tensor(frame.order, device=delta.device)
        linear = order == 1
        scale = torch.where(order == 0, torch.ones_like(first), radius[:, None])
        first = torch.where(linear, p[:, :1], scale * first)
        second = torch.where(linear, p[:, 1:], scale * second)
    return EdgeFrame(inputs, radius if frame.regular else None, first, second * constant(frame, "sign", delta))


def _attribute_direction(frame: Frame, attributes: Tensor) -> Tensor:
    """(E, 2) frame for edges on the axis, whose azimuth is undefined: the first nonzero attribute of order 1."""
    direction = attributes.new_zeros(len(attributes), 2)
    direction[:, 0] = 1
    for m in np.flatnonzero((frame.attribute_order == 1) & (frame.attribute_sign < 0))[::-1]:
        vector = attributes[:, [m, frame.attribute_partner[m]]].detach()
        norm = safe_norm(vector)
        direction = torch.where((norm > 0)[:, None], _unit(vector, norm), direction)
    return direction


def edge_frame(plan: Plan, delta: Tensor, attributes: Tensor) -> EdgeFrame:
    """MLP inputs in the edge's frame, and the way back."""
    frame = plan.frame
    attributes = attributes @ constant(frame, "attribute", delta)
    if frame.kind == "zonal":
        return _zonal_edge(frame, delta, attributes)
    if frame.kind == "planar":
        return _planar_edge(frame, delta, attributes)
    return EdgeFrame(torch.cat([delta, attributes], 1), None)


def table_edge(plan: Plan, v: Tensor) -> EdgeFrame:
    """The way back from the coefficients that splines give, divided by u^k: first and second, as functions of v, whose
    length is u, are u^k times those of the direction."""
    frame = plan.frame
    if frame.kind == "zonal":
        return EdgeFrame(v, None, _monomials(v, frame.powers) @ constant(frame, "harmonics", v).T)
    p = v @ constant(frame, "plane", v)
    first, second = _multiples(p[:, 0], p[:, 1], frame.order)
    return EdgeFrame(v, None, first, second * constant(frame, "sign", v))


def _from_table(plan: Plan, parameters: Parameters, delta: Tensor, attributes: Tensor) -> Tensor:
    """(E, W · d): hidden features of a plan with splines instead of hidden layers."""
    at = interpolation(plan, delta, attributes, SOFTENING[delta.dtype])
    y = interpolated(plan, parameters.linears[0][0], at)
    return _expand(plan.frame, table_edge(plan, at.v), y).flatten(1)


def _expand(frame: Frame, edge: EdgeFrame, y: Tensor) -> Tensor:
    """Coefficients (E, W, c) → full hidden features (E, W, d)."""
    if frame.kind == "none":
        return y
    if frame.kind == "zonal":
        parts, start = [], 0
        for coefficient, run in groupby(frame.coefficient.tolist()):
            end = start + len(list(run))
            parts.append(y[:, :, coefficient : coefficient + 1] * edge.first[:, None, start:end])
            start = end
        return torch.cat(parts, -1)
    return _rotate(y, edge.first[:, None], edge.second[:, None], constant(frame, "partner", y))


@cached
def _samples(act: Activation, merged: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    samples, inverse = (act.samples, act.inverse) if merged else act.unmerged
    return torch.tensor(samples, dtype=dtype, device=device), torch.tensor(inverse, dtype=dtype, device=device)


def difference_near_origin(function: str, u0: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """d = (φ(u₀ + r w) − φ(u₀)) / r on samples, accurate down to r = 0, where it is φ′(u₀) w."""
    return w * difference_quotient(function, u0, r * w)


def _near_origin(act: Activation, n: int, z: Tensor, radius: Tensor, samples: Tensor, inverse: Tensor) -> Tensor:
    """The activation on (E, W, c) coefficients, n of them of order 0, by difference quotients."""
    r = radius[:, None, None]
    u0 = z[..., :n] @ samples[:, :n].T  # (E, W, S)
    w = z[..., n:] @ samples[:, n:].T
    d = difference_near_origin(act.function, u0, w, r)
    return torch.cat([(phi(act.function, u0) + r * d) @ inverse[:n].T, d @ inverse[n:].T], -1)


def _activate(plan: Plan, act: Activation, edge: EdgeFrame, z: Tensor, merged: bool) -> Tensor:
    """Fourier activation on (E, W, c) coefficients."""
    samples, inverse = _samples(act, merged, z.dtype, z.device)
    if edge.radius is None:
        return phi(act.function, z @ samples.T) @ inverse.T
    near = edge.radius < NEAR[z.dtype]
    rows = near.nonzero().squeeze(1)
    n = plan.frame.n_zero
    r = torch.where(near, torch.ones_like(edge.radius), edge.radius)[:, None, None]
    scale = torch.cat([torch.ones_like(r).expand(-1, -1, n), r.expand(-1, -1, z.shape[2] - n)], -1)
    y = phi(act.function, (z * scale) @ samples.T) @ inverse.T / scale
    if len(rows):
        z_near, r_near = z.index_select(0, rows), edge.radius.index_select(0, rows)
        y = y.index_copy(0, rows, _near_origin(act, n, z_near, r_near, samples, inverse))
    return y


def _statistics(norm: Norm, h: Tensor, statistics_from: StatisticsSource) -> NormStatistics:
    """Batch statistics of the hidden features h (E, W, d) over the edges, detached as in escnn: means of the trivial
    coefficients, variances of all."""
    n, mean, squares = statistics_from.moments(h.detach())
    return NormStatistics(mean.index_select(1, constant(norm, "measured", h)), squares.mean(1) / (n - 1))


def hidden_features(
    plan: Plan,
    parameters: Parameters,
    statistics_from: StatisticsSource,
    delta: Tensor,
    attributes: Tensor,
    merged: bool = True,
) -> tuple[Tensor, Weights, list[NormStatistics]]:
    """h (E, H) with the constant one last, the weights with all batch norms folded in, and the statistics of each norm
    if they are measured. ``merged``: equal samples are evaluated once."""
    measured = statistics_from.measured
    weights, statistics = pack(plan, parameters, fold=not measured), []
    if plan.is_frozen:
        y = _from_table(plan, parameters, delta, attributes)
        return torch.cat([y, y.new_ones(len(y), 1)], 1), weights, []
    edge = edge_frame(plan, delta, attributes)
    y = edge.inputs
    for n, act in enumerate(plan.activations):
        w, b = weights.linears[n]
        z = torch.nn.functional.linear(y, w, b).unflatten(1, (act.channels, -1))
        y = _activate(plan, act, edge, z, merged)
        if measured and plan.norms:
            statistics.append(_statistics(plan.norms[n], _expand(plan.frame, edge, y), statistics_from))
            fold_norm(plan, weights, n, parameters.norms[n], *statistics[-1])
        if n + 1 < len(weights.linears):
            y = y.flatten(1)
    if plan.activations:
        y = _expand(plan.frame, edge, y).flatten(1)
    h = torch.cat([y, y.new_ones(len(y), 1)], 1)
    return h, weights, statistics


def normed_features(
    plan: Plan, parameters: Parameters, statistics_from: StatisticsSource, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, list[NormStatistics]]:
    """h (E, H), behind the last batch norm, which :func:`hidden_features` leaves to θ; times the radial factor."""
    h, weights, statistics = hidden_features(plan, parameters, statistics_from, delta, attributes)
    if plan.norms:
        norm, p = plan.norms[-1], parameters.norms[-1]
        mean, var = statistics[-1] if statistics else running(p, constant(norm, "full_trivial", p.mean))
        scale, shift = norm_affine(norm, p, mean, var)
        y = h[:, :-1].unflatten(1, (norm.channels, -1)) * scale[:, None]
        y = y.index_add(2, constant(norm, "measured", h), shift.expand(len(y), -1, -1))
        h = torch.cat([y.flatten(1), h[:, -1:]], 1)
    return h * radial_factor(plan, weights.shell_width, delta)[:, None], statistics


def radial_factor(plan: Plan, shell_width: Tensor, delta: Tensor) -> Tensor:
    """γ · s(|x|) (E,): the Gaussian shell exp(−½ (|x| / σ)²), times the smooth cutoff 1 − 10 t³ + 15 t⁴ − 6 t⁵,
    t = min(|x| / cutoff, 1), whose value and first two derivatives vanish at the cutoff."""
    factor = plan.gamma * torch.exp(-0.5 * delta.square().sum(-1) / shell_width.reshape(()).square())
    if plan.cutoff is None:
        return factor
    t = (safe_norm(delta) / plan.cutoff).clamp(max=1)
    return factor * (1 - t**3 * (10 - t * (15 - 6 * t)))


def plain_kernel(
    plan: Plan, parameters: Parameters, statistics_from: StatisticsSource, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, list[NormStatistics]]:
    """K(x, a) = γ s(|x|) · mat(MLP(x ⊕ a)), shape (E, C_out, C_in); every sample evaluated, none merged."""
    h, weights, statistics = hidden_features(plan, parameters, statistics_from, delta, attributes, merged=False)
    k = (h @ dense_kernel(plan, weights).flatten(0, 1).T).view(len(h), plan.out_size, plan.in_size)
    return k * radial_factor(plan, weights.shell_width, delta)[:, None, None], statistics


class TableSums(NamedTuple):
    """What :func:`table_sums` adds up, for E edges."""

    at: Interpolation
    ways: Tensor  # (E, d), in a planar frame (E, 2 d): first and second of EdgeFrame
    powers: Tensor  # (E, c) u^(2k), k the order of each coefficient
    products: list[Tensor]  # for q = 0 … 3: B_k B_{k+q} (E, 4)


def table_summands(plan: Plan, delta: Tensor, attributes: Tensor) -> TableSums:
    """The summands of :func:`table_sums`."""
    order = constant(plan.frame, "order", delta)
    at = interpolation(plan, delta, attributes, SOFTENING[delta.dtype])
    edge, weights = table_edge(plan, at.v), torch.nn.functional.pad(at.weights, (0, 3))  # B_4 … B_6 = 0
    ways = torch.cat([edge.first, *([edge.second] if plan.frame.kind == "planar" else [])], 1)
    powers = at.v.square().sum(1, keepdim=True) ** order
    return TableSums(at, ways, powers, [at.weights * weights[:, q : q + 4] for q in range(4)])


def table_sums(plan: Plan, delta: Tensor, attributes: Tensor) -> Tensor:
    """How much the splines of a plan count among the edges, in row j of (T · (G + 3), n) one after the other:

    - Σ_e B_j first, in a planar frame also Σ_e B_j second, with the way back of :class:`EdgeFrame`: (d,) each;
    - Σ_e B_j B_{j+q} u^(2k) for q = 0 … 3 and every coefficient, of order k: (4, c).
    """
    table, (at, ways, powers, products) = cast(Table, plan.table), table_summands(plan, delta, attributes)
    values = []
    for k in range(4):
        pairs = (of_q[:, k, None] * powers for of_q in products)
        values.append(torch.cat([at.weights[:, k, None] * ways, *pairs], 1))
    rows, stacked = at.first[:, None] + torch.arange(4, device=delta.device), torch.stack(values, 1).flatten(0, 1)
    sums = stacked.new_zeros(table.types * table.n_coefficients, stacked.shape[1])
    if stacked.is_cuda:  # in a fixed order: there index_put sorts, and on a processor it adds from all threads at once
        return sums.index_put((rows.reshape(-1),), stacked, accumulate=True)
    return sums.index_add(0, rows.reshape(-1), stacked)
