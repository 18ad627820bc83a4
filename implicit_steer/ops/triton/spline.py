"""Hidden coefficients from the splines of a table, edge by edge; and the gradients of the splines' coefficients.

Formulas are those of ``plan/table.py`` and ``ops/spline.py``: x is compressed to v = x u(r) / r, and with position
p = u / s + ½ the coefficient of an edge is y = Σ_k B_k(p) b[first + k], k = 0 … 3. ``weights`` (n_knots rows of each
type, NR − 1) holds b in the columns of r; the row ``first`` is the cell of p, behind the rows of the types before. The
harmonics q are polynomials in v. ``scalars`` are γ, 1 / cutoff or 0, 1 / length and 1 / s; prefixes and constants are
those of the package's glossary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import frame
from .frame import ZONAL


@triton.jit
def compression(b_squared, p_scalars, BOUNDED: tl.constexpr):
    """From |x|² the scale v / x, and minus twice its derivative with respect to |x|²."""
    over_length = tl.load(p_scalars + 2)
    b_scale, b_fall = over_length + 0.0 * b_squared, 0.0 * b_squared
    if not BOUNDED:
        b_grown = 1.0 + b_squared * over_length * over_length
        b_scale = over_length / tl.sqrt(tl.sqrt(b_grown))
        b_fall = 0.5 * b_scale * over_length * over_length / b_grown
    return b_scale, b_fall


@triton.jit
def place(p_attr, o_edge, m_edge, b_u_squared, p_scalars, n_knots, NA: tl.constexpr, SOFT: tl.constexpr):
    """u / s, the row ``first``, how far p is behind it, at most 1, and where it is less. NaN counts to the last."""
    b_u = tl.sqrt(b_u_squared + SOFT) * tl.load(p_scalars + 3)
    b_position = b_u + 0.5
    m_inside = b_position < n_knots
    b_cell = tl.where(m_inside, b_position, n_knots - 1.0).to(tl.int32)
    b_t = b_position - b_cell.to(b_u.dtype)
    o_first = b_cell.to(tl.int64)
    if NA > 0:
        o_first += tl.load(p_attr + o_edge * NA, m_edge, 0.0).to(tl.int64) * (n_knots + 3)
    return b_u, o_first, tl.where(b_t > 1.0, 1.0, b_t), m_inside


@triton.jit
def splines(b_u, b_t, EVEN: tl.constexpr):
    """B_0 … B_3. In the first cell of an even table the outer two coefficients are equal, and so are the inner two:
    written in u their weights keep all digits at u = 0."""
    b_s = 1.0 - b_t
    b_w0, b_w3 = b_s * b_s * b_s / 6.0, b_t * b_t * b_t / 6.0
    b_w1 = (4.0 - 3.0 * b_t * b_t * (2.0 - b_t)) / 6.0
    b_w2 = (4.0 - 3.0 * b_s * b_s * (2.0 - b_s)) / 6.0
    if EVEN:
        m_first, b_outer = b_u < 0.5, (3.0 * b_u * b_u + 0.25) / 12.0
        b_w0, b_w3 = tl.where(m_first, b_outer, b_w0), tl.where(m_first, b_outer, b_w3)
        b_w1, b_w2 = tl.where(m_first, 0.5 - b_outer, b_w1), tl.where(m_first, 0.5 - b_outer, b_w2)
    return b_w0, b_w1, b_w2, b_w3


@triton.jit
def spline_slopes(b_u, b_t, m_inside, EVEN: tl.constexpr):
    """Their derivatives with respect to u / s, divided by u / s."""
    b_s, b_over = 1.0 - b_t, tl.where(m_inside, 1.0 / b_u, 0.0)
    b_w0, b_w3 = -0.5 * b_s * b_s * b_over, 0.5 * b_t * b_t * b_over
    b_w1, b_w2 = b_t * (1.5 * b_t - 2.0) * b_over, b_s * (2.0 - 1.5 * b_s) * b_over
    if EVEN:
        m_first = b_u < 0.5
        b_w0, b_w3 = tl.where(m_first, 0.5, b_w0), tl.where(m_first, 0.5, b_w3)
        b_w1, b_w2 = tl.where(m_first, -0.5, b_w1), tl.where(m_first, -0.5, b_w2)
    return b_w0, b_w1, b_w2, b_w3


@triton.jit
def row_of_spline(p_weights, o_first, m_block, o_column, K: tl.constexpr, NR: tl.constexpr):
    """b[first + K] in some columns (BE, BC)."""
    return tl.load(p_weights + (o_first + K)[:, None] * (NR - 1) + o_column[None, :], m_block, 0.0)


@triton.jit
def solid_harmonics(b_v0, b_v1, b_v2, p_harmonics, p_powers, p_plane, KIND: tl.constexpr, DIM: tl.constexpr,
                    NM: tl.constexpr, BM: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, DEGREE: tl.constexpr,
                    PREC: tl.constexpr):  # fmt: skip
    """q (BE, BQ): of a zonal frame Y(v); of a planar one real and imaginary part of (v₀ + i v₁)^k, k >= 1."""
    if KIND == ZONAL:
        return frame.harmonics(b_v0, b_v1, b_v2, p_harmonics, p_powers, NM, BM, NQ, BQ, DEGREE, PREC)
    else:
        o_q = tl.arange(0, BQ)
        b_plane0, b_plane1 = frame.planar_axes(b_v0, b_v1, b_v2, p_plane, DIM)
        b_re, b_im = frame.multiples(b_plane0, b_plane1, o_q // 2 + 1, NQ // 2)
        return tl.where((o_q % 2 == 0)[None, :], b_re, b_im)


@triton.jit
def solid_harmonics_backward(b_v0, b_v1, b_v2, b_d_q, p_harmonics, p_powers, p_plane, KIND: tl.constexpr,
                             DIM: tl.constexpr, NM: tl.constexpr, BM: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr,
                             DEGREE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """The gradient of v from that of q."""
    if KIND == ZONAL:
        b_d_v0, b_d_v1, b_d_v2, _ = frame.harmonics_backward(b_v0, b_v1, b_v2, b_d_q, p_harmonics, p_powers, NM, BM, NQ,
                                                             BQ, DEGREE, PREC)  # fmt: skip
        return b_d_v0, b_d_v1, b_d_v2
    else:
        o_q = tl.arange(0, BQ)
        b_plane0, b_plane1 = frame.planar_axes(b_v0, b_v1, b_v2, p_plane, DIM)
        b_d_re = tl.where((o_q % 2 == 0)[None, :], b_d_q, 0.0)
        b_d_im = tl.where((o_q % 2 == 1)[None, :], b_d_q, 0.0)
        b_d0, b_d1 = frame.turn_backward(b_plane0, b_plane1, o_q // 2 + 1, b_d_re, b_d_im, NQ // 2)
        b_d_v0 = b_d0 * tl.load(p_plane) + b_d1 * tl.load(p_plane + 1)
        b_d_v1 = b_d0 * tl.load(p_plane + 2) + b_d1 * tl.load(p_plane + 3)
        return b_d_v0, b_d_v1, b_d_v0 * 0.0


@triton.jit(do_not_specialize=["n_knots", "n_edges"])
def spline_forward(
    p_delta, p_attr, p_order, p_shell, p_scalars, p_harmonics, p_powers, p_plane, p_weights, p_r, p_q, n_knots, n_edges,
    KIND: tl.constexpr, DIM: tl.constexpr, NA: tl.constexpr, NM: tl.constexpr, BM: tl.constexpr, NQ: tl.constexpr,
    BQ: tl.constexpr, DEGREE: tl.constexpr, NR: tl.constexpr, BC: tl.constexpr, CUTOFF: tl.constexpr,
    BOUNDED: tl.constexpr, EVEN: tl.constexpr, SOFT: tl.constexpr, ZERO: tl.constexpr, PREC: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """delta (E, DIM), attr (E, NA): the type, shell: σ (1,) → q (E, NQ) and r = factor · (y, 1) (E, NR); rows sorted by
    target, BC columns of r at a time."""
    o_row = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_edge, o_q = o_row < n_edges, tl.arange(0, BQ)
    o_edge = tl.load(p_order + o_row, m_edge, 0).to(tl.int64)
    b_x0, b_x1, b_x2, b_squared = frame.positions(p_delta, o_edge, m_edge, DIM)
    b_scale, _ = compression(b_squared, p_scalars, BOUNDED)
    b_v0, b_v1, b_v2 = b_x0 * b_scale, b_x1 * b_scale, b_x2 * b_scale
    if NQ > 0:
        b_q = solid_harmonics(b_v0, b_v1, b_v2, p_harmonics, p_powers, p_plane, KIND, DIM, NM, BM, NQ, BQ, DEGREE, PREC)
        tl.store(p_q + o_row[:, None] * NQ + o_q[None, :], b_q, m_edge[:, None] & (o_q < NQ)[None, :])
    b_u_squared = b_v0 * b_v0 + b_v1 * b_v1 + b_v2 * b_v2
    b_u, o_first, b_t, _ = place(p_attr, o_edge, m_edge, b_u_squared, p_scalars, n_knots, NA, SOFT)
    b_w0, b_w1, b_w2, b_w3 = splines(b_u, b_t, EVEN)
    b_factor = frame.radial_factor(b_squared, p_shell, p_scalars, CUTOFF, ZERO)
    tl.store(p_r + o_row * NR + NR - 1, b_factor, m_edge)
    b_w0, b_w1, b_w2, b_w3 = b_w0 * b_factor, b_w1 * b_factor, b_w2 * b_factor, b_w3 * b_factor
    for i_c in tl.static_range(0, NR - 1, BC):
        o_column = i_c + tl.arange(0, BC)
        m_block = m_edge[:, None] & (o_column < NR - 1)[None, :]
        b_r = b_w0[:, None] * row_of_spline(p_weights, o_first, m_block, o_column, 0, NR)
        b_r += b_w1[:, None] * row_of_spline(p_weights, o_first, m_block, o_column, 1, NR)
        b_r += b_w2[:, None] * row_of_spline(p_weights, o_first, m_block, o_column, 2, NR)
        b_r += b_w3[:, None] * row_of_spline(p_weights, o_first, m_block, o_column, 3, NR)
        tl.store(p_r + o_row[:, None] * NR + o_column[None, :], b_r, m_block)


@triton.jit(do_not_specialize=["n_knots", "n_edges"])
def spline_backward(
    p_delta, p_attr, p_order, p_shell, p_scalars, p_harmonics, p_powers, p_plane, p_weights, p_d_r, p_d_q, p_d_delta,
    p_d_shell, p_first, p_spline, n_knots, n_edges,
    KIND: tl.constexpr, DIM: tl.constexpr, NA: tl.constexpr, NM: tl.constexpr, BM: tl.constexpr, NQ: tl.constexpr,
    BQ: tl.constexpr, DEGREE: tl.constexpr, NR: tl.constexpr, BC: tl.constexpr, CUTOFF: tl.constexpr,
    BOUNDED: tl.constexpr, EVEN: tl.constexpr, SOFT: tl.constexpr, ZERO: tl.constexpr, PREC: tl.constexpr,
    STORE_FACTORS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """d_r (E, NR), d_q (E, NQ) → d_delta (E, DIM) in the edges' own order, and d_shell (programs,), the parts of that
    of σ. For the gradient of the splines' coefficients STORE_FACTORS stores of every row ``first`` (E,) and
    factor · B_k, spline (E, 4)."""
    o_row = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_edge, o_q = o_row < n_edges, tl.arange(0, BQ)
    o_edge = tl.load(p_order + o_row, m_edge, 0).to(tl.int64)
    b_x0, b_x1, b_x2, b_squared = frame.positions(p_delta, o_edge, m_edge, DIM)
    b_scale, b_fall = compression(b_squared, p_scalars, BOUNDED)
    b_v0, b_v1, b_v2 = b_x0 * b_scale, b_x1 * b_scale, b_x2 * b_scale
    b_u_squared = b_v0 * b_v0 + b_v1 * b_v1 + b_v2 * b_v2
    b_u, o_first, b_t, m_inside = place(p_attr, o_edge, m_edge, b_u_squared, p_scalars, n_knots, NA, SOFT)
    b_w0, b_w1, b_w2, b_w3 = splines(b_u, b_t, EVEN)
    b_factor = frame.radial_factor(b_squared, p_shell, p_scalars, CUTOFF, ZERO)

    b_d0, b_d1, b_d2, b_d3 = b_u * 0.0, b_u * 0.0, b_u * 0.0, b_u * 0.0  # of factor · B_k
    for i_c in tl.static_range(0, NR - 1, BC):
        o_column = i_c + tl.arange(0, BC)
        m_block = m_edge[:, None] & (o_column < NR - 1)[None, :]
        b_d_r = tl.load(p_d_r + o_row[:, None] * NR + o_column[None, :], m_block, 0.0)
        b_d0 += tl.sum(b_d_r * row_of_spline(p_weights, o_first, m_block, o_column, 0, NR), 1)
        b_d1 += tl.sum(b_d_r * row_of_spline(p_weights, o_first, m_block, o_column, 1, NR), 1)
        b_d2 += tl.sum(b_d_r * row_of_spline(p_weights, o_first, m_block, o_column, 2, NR), 1)
        b_d3 += tl.sum(b_d_r * row_of_spline(p_weights, o_first, m_block, o_column, 3, NR), 1)
    b_d_factor = tl.load(p_d_r + o_row * NR + NR - 1, m_edge, 0.0)
    b_d_factor += b_d0 * b_w0 + b_d1 * b_w1 + b_d2 * b_w2 + b_d3 * b_w3
    b_slope, b_d_sigma = frame.radial_factor_backward(b_squared, b_d_factor, p_shell, p_scalars, CUTOFF, ZERO)
    tl.store(p_d_shell + tl.program_id(0), tl.sum(b_d_sigma, 0))
    if STORE_FACTORS:
        tl.store(p_first + o_row, o_first.to(tl.int32), m_edge)
        tl.store(p_spline + o_row * 4, b_w0 * b_factor, m_edge)
        tl.store(p_spline + o_row * 4 + 1, b_w1 * b_factor, m_edge)
        tl.store(p_spline + o_row * 4 + 2, b_w2 * b_factor, m_edge)
        tl.store(p_spline + o_row * 4 + 3, b_w3 * b_factor, m_edge)

    b_s0, b_s1, b_s2, b_s3 = spline_slopes(b_u, b_t, m_inside, EVEN)
    over_spacing = tl.load(p_scalars + 3)
    b_along = (b_d0 * b_s0 + b_d1 * b_s1 + b_d2 * b_s2 + b_d3 * b_s3) * b_factor * over_spacing * over_spacing
    b_d_v0, b_d_v1, b_d_v2 = b_along * b_v0, b_along * b_v1, b_along * b_v2
    if NQ > 0:
        b_d_q = tl.load(p_d_q + o_row[:, None] * NQ + o_q[None, :], m_edge[:, None] & (o_q < NQ)[None, :], 0.0)
        b_more0, b_more1, b_more2 = solid_harmonics_backward(b_v0, b_v1, b_v2, b_d_q, p_harmonics, p_powers, p_plane,
                                                             KIND, DIM, NM, BM, NQ, BQ, DEGREE, PREC)  # fmt: skip
        b_d_v0, b_d_v1, b_d_v2 = b_d_v0 + b_more0, b_d_v1 + b_more1, b_d_v2 + b_more2
    b_slope -= b_fall * (b_d_v0 * b_x0 + b_d_v1 * b_x1 + b_d_v2 * b_x2)
    tl.store(p_d_delta + o_edge * DIM, b_scale * b_d_v0 + b_slope * b_x0, m_edge)
    tl.store(p_d_delta + o_edge * DIM + 1, b_scale * b_d_v1 + b_slope * b_x1, m_edge)
    if DIM > 2:
        tl.store(p_d_delta + o_edge * DIM + 2, b_scale * b_d_v2 + b_slope * b_x2, m_edge)


@triton.jit(do_not_specialize=["n_rows"])
def knot_sums(
    p_values, p_spline, p_first, p_by_knot, p_knotptr, p_out, n_rows,
    NK: tl.constexpr, NV: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out[part, j] = Σ_e spline[e, j − first[e]] values[e] (parts, n_rows, NK), from values (E, NV) and spline (E, 4).

    Edges ``by_knot`` are sorted by first, those with first = j begin at knotptr[j]: what row j = program_id(0) adds up
    lies side by side. Program_id(2) adds one of equal parts of it, and program_id(1) takes BC columns."""
    i_row, i_part = tl.program_id(0), tl.program_id(2)
    o_column = tl.program_id(1) * BC + tl.arange(0, BC)
    begin, end = tl.load(p_knotptr + tl.maximum(i_row - 3, 0)), tl.load(p_knotptr + i_row + 1)
    share = tl.cdiv(end - begin, tl.num_programs(2))
    first, last = begin + i_part * share, tl.minimum(begin + (i_part + 1) * share, end)
    b_out = tl.zeros((BC,), p_out.dtype.element_ty)
    for i_edge in tl.range(first, last, BE):
        o_n = i_edge + tl.arange(0, BE)
        m_edge = o_n < last
        o_edge = tl.load(p_by_knot + o_n, m_edge, 0).to(tl.int64)
        o_spline = 4 * o_edge + i_row - tl.load(p_first + o_edge, m_edge, 0)
        b_weight = tl.load(p_spline + o_spline, m_edge, 0.0)
        m_block = m_edge[:, None] & (o_column < NK)[None, :]
        b_values = tl.load(p_values + o_edge[:, None] * NV + o_column[None, :], m_block, 0.0)
        b_out += tl.sum(b_weight[:, None] * b_values, 0)
    p_row = p_out + (i_part.to(tl.int64) * n_rows + i_row) * NK
    tl.store(p_row + o_column, b_out, o_column < NK)
