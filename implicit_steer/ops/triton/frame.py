"""Edges into their own frames: the MLP's inputs, the radius, γ s(|x|), the harmonics q; and the reverse sweep.

Formulas and names are those of ``ops/kernel_mlp.py``, prefixes and constants those of the package's glossary. Edge
``order[n]`` becomes row n of what is written. KIND is a value of ``sizes.FRAME_KINDS``. Regular frames carry what
vanishes at the origin divided by the radius: their harmonics of order k > 0 have one factor of the radius.

Values of edges are (BE,) unless a shape is given: b_x0, b_x1, b_x2 the coordinates of x (0 beyond DIM), b_plane0 and
b_plane1 those in the plane of a planar frame, b_cos and b_sin of the azimuth φ. The tables of the frame are

===================================  ===============================================================================
scalars (2,)                         γ, and 1 / cutoff or 0
harmonics (NM, NQ), powers (3, NM)   zonal: Y_m = Σ_n harmonics[n, m] x^powers[0, n] y^powers[1, n] z^powers[2, n]
plane (DIM, 2), axis (DIM,)          planar: an orthonormal basis of the plane, and the axis orthogonal to it
attribute_order, _partner, _sign     planar, (NA,) each: how attributes turn: a'[m] = cos kφ a[m] − sign[m] sin kφ
                                     a[partner[m]], k the order
pairs (PAIRS, 2)                     planar: pairs of attributes of order 1 that give φ of edges on the axis
===================================  ===============================================================================
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations
from .sizes import FRAME_KINDS

NONE, ZONAL, REGULAR_PLANAR = (tl.constexpr(FRAME_KINDS[kind]) for kind in ("none", "zonal", "regular planar"))


@triton.jit
def position(p_delta, o_edge, m_edge, K: tl.constexpr, DIM: tl.constexpr):
    """Coordinate K of the edges' x; 0 beyond DIM."""
    if K < DIM:
        return tl.load(p_delta + o_edge * DIM + K, m_edge, 0.0)
    else:
        return tl.load(p_delta + o_edge * DIM, m_edge, 0.0) * 0.0


@triton.jit
def positions(p_delta, o_edge, m_edge, DIM: tl.constexpr):
    """The three coordinates of the edges' x (BE,), 0 beyond DIM, and |x|²."""
    b_x0 = position(p_delta, o_edge, m_edge, 0, DIM)
    b_x1 = position(p_delta, o_edge, m_edge, 1, DIM)
    b_x2 = position(p_delta, o_edge, m_edge, 2, DIM)
    return b_x0, b_x1, b_x2, b_x0 * b_x0 + b_x1 * b_x1 + b_x2 * b_x2


@triton.jit
def unit_of(b_squared, ZERO: tl.constexpr):
    """|p| and 1 / |p| from |p|², exactly 0 both where |p|² would underflow."""
    m_nonzero = (b_squared > ZERO) | (b_squared != b_squared)
    b_root = tl.sqrt(tl.where(m_nonzero, b_squared, 1.0))
    return tl.where(m_nonzero, b_root, 0.0), tl.where(m_nonzero, 1.0 / b_root, 0.0)


@triton.jit
def cutoff_of(b_squared, p_scalars, ZERO: tl.constexpr):
    """1 − 10 t³ + 15 t⁴ − 6 t⁵, t = min(|x| / cutoff, 1), and its derivative with respect to |x|² / 2."""
    over_cutoff = tl.load(p_scalars + 1)
    b_norm, b_over_norm = unit_of(b_squared, ZERO)
    t = b_norm * over_cutoff
    t = tl.where(t > 1.0, 1.0, t)
    b_value = 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t))
    return b_value, -30.0 * t * t * (1.0 - t) * (1.0 - t) * over_cutoff * b_over_norm


@triton.jit
def radial_factor(b_squared, p_shell, p_scalars, CUTOFF: tl.constexpr, ZERO: tl.constexpr):
    """γ s(|x|) from |x|²."""
    sigma = tl.load(p_shell)
    b_factor = tl.load(p_scalars) * tl.exp(-0.5 * b_squared / (sigma * sigma))
    if CUTOFF:
        b_cutoff, _ = cutoff_of(b_squared, p_scalars, ZERO)
        b_factor *= b_cutoff
    return b_factor


@triton.jit
def radial_factor_backward(b_squared, b_d_factor, p_shell, p_scalars, CUTOFF: tl.constexpr, ZERO: tl.constexpr):
    """From the gradient of the factor those of |x|² / 2 and of σ, edge by edge."""
    sigma = tl.load(p_shell)
    b_gauss = tl.load(p_scalars) * tl.exp(-0.5 * b_squared / (sigma * sigma)) * b_d_factor
    b_slope = -b_gauss / (sigma * sigma)
    if CUTOFF:
        b_cutoff, b_cutoff_slope = cutoff_of(b_squared, p_scalars, ZERO)
        b_slope = b_slope * b_cutoff + b_gauss * b_cutoff_slope
        b_gauss *= b_cutoff
    return b_slope, b_gauss * b_squared / (sigma * sigma * sigma)


@triton.jit
def monomials(b_u0, b_u1, b_u2, b_n0, b_n1, b_n2, DEGREE: tl.constexpr):
    """(BE, n): u₀^n₀ u₁^n₁ u₂^n₂ for the exponents (n,); 0 where one is negative."""
    m_exponents = (b_n0 >= 0) & (b_n1 >= 0) & (b_n2 >= 0)
    b_found = tl.where(m_exponents, 1.0, 0.0)[None, :].to(b_u0.dtype) + 0.0 * b_u0[:, None]
    for n in tl.static_range(DEGREE):
        b_found = tl.where((b_n0 > n)[None, :], b_found * b_u0[:, None], b_found)
        b_found = tl.where((b_n1 > n)[None, :], b_found * b_u1[:, None], b_found)
        b_found = tl.where((b_n2 > n)[None, :], b_found * b_u2[:, None], b_found)
    return b_found


@triton.jit
def harmonics(b_u0, b_u1, b_u2, p_harmonics, p_powers, NM: tl.constexpr, BM: tl.constexpr, NQ: tl.constexpr,
              BQ: tl.constexpr, DEGREE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Y(u) (BE, BQ), for u of any length."""
    o_m, o_q = tl.arange(0, BM), tl.arange(0, BQ)
    b_n0, b_n1 = tl.load(p_powers + o_m, o_m < NM, 0), tl.load(p_powers + NM + o_m, o_m < NM, 0)
    b_n2 = tl.load(p_powers + 2 * NM + o_m, o_m < NM, 0)
    m_table = (o_m < NM)[:, None] & (o_q < NQ)[None, :]
    b_table = tl.load(p_harmonics + o_m[:, None] * NQ + o_q[None, :], m_table, 0.0)
    return activations.dot(monomials(b_u0, b_u1, b_u2, b_n0, b_n1, b_n2, DEGREE), b_table, PREC)


@triton.jit
def harmonics_backward(b_u0, b_u1, b_u2, b_d_q, p_harmonics, p_powers, NM: tl.constexpr, BM: tl.constexpr,
                       NQ: tl.constexpr, BQ: tl.constexpr, DEGREE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """From the gradient of Y(u) (BE, BQ) that of u, and its product with Y(u)."""
    o_m, o_q = tl.arange(0, BM), tl.arange(0, BQ)
    b_n0, b_n1 = tl.load(p_powers + o_m, o_m < NM, 0), tl.load(p_powers + NM + o_m, o_m < NM, 0)
    b_n2 = tl.load(p_powers + 2 * NM + o_m, o_m < NM, 0)
    m_table = (o_m < NM)[None, :] & (o_q < NQ)[:, None]
    b_table = tl.load(p_harmonics + o_m[None, :] * NQ + o_q[:, None], m_table, 0.0)
    b_d_m = activations.dot(b_d_q, b_table, PREC)  # (BE, BM) of the monomials
    b_product = tl.sum(b_d_m * monomials(b_u0, b_u1, b_u2, b_n0, b_n1, b_n2, DEGREE), 1)
    dtype = b_u0.dtype
    b_d_u0 = tl.sum(b_d_m * b_n0[None, :].to(dtype) * monomials(b_u0, b_u1, b_u2, b_n0 - 1, b_n1, b_n2, DEGREE), 1)
    b_d_u1 = tl.sum(b_d_m * b_n1[None, :].to(dtype) * monomials(b_u0, b_u1, b_u2, b_n0, b_n1 - 1, b_n2, DEGREE), 1)
    b_d_u2 = tl.sum(b_d_m * b_n2[None, :].to(dtype) * monomials(b_u0, b_u1, b_u2, b_n0, b_n1, b_n2 - 1, DEGREE), 1)
    return b_d_u0, b_d_u1, b_d_u2, b_product


@triton.jit
def multiples(b_cos, b_sin, b_k, MOST: tl.constexpr):
    """(BE, n): cos kφ, sin kφ for the orders k (n,), from cos φ and sin φ; k < 0 counts as 0."""
    b_re = 1.0 + 0.0 * b_cos[:, None] * b_k[None, :].to(b_cos.dtype)
    b_im = 0.0 * b_re
    for n in tl.static_range(MOST):
        m_more = (b_k > n)[None, :]
        b_turned = b_re * b_cos[:, None] - b_im * b_sin[:, None]
        b_im = tl.where(m_more, b_re * b_sin[:, None] + b_im * b_cos[:, None], b_im)
        b_re = tl.where(m_more, b_turned, b_re)
    return b_re, b_im


@triton.jit
def azimuth(p_attr, o_edge, m_edge, b_plane0, b_plane1, p_pairs, NA: tl.constexpr, PAIRS: tl.constexpr,
            ZERO: tl.constexpr):  # fmt: skip
    """1 / ρ (0 on the axis), cos φ, sin φ; on the axis φ is that of the first nonzero attribute of order 1, or 0."""
    _, b_over_rho = unit_of(b_plane0 * b_plane0 + b_plane1 * b_plane1, ZERO)
    b_cos = tl.where(b_over_rho != 0, b_plane0 * b_over_rho, 1.0)
    b_sin = tl.where(b_over_rho != 0, b_plane1 * b_over_rho, 0.0)
    for n in tl.static_range(PAIRS):
        b_a0 = tl.load(p_attr + o_edge * NA + tl.load(p_pairs + 2 * n), m_edge, 0.0)
        b_a1 = tl.load(p_attr + o_edge * NA + tl.load(p_pairs + 2 * n + 1), m_edge, 0.0)
        _, b_over = unit_of(b_a0 * b_a0 + b_a1 * b_a1, ZERO)
        m_found = (b_over_rho == 0) & (b_over != 0)
        b_cos, b_sin = tl.where(m_found, b_a0 * b_over, b_cos), tl.where(m_found, b_a1 * b_over, b_sin)
    return b_over_rho, b_cos, b_sin


@triton.jit
def planar_axes(b_x0, b_x1, b_x2, p_plane, DIM: tl.constexpr):
    """The two coordinates of x in the plane."""
    b_plane0 = b_x0 * tl.load(p_plane) + b_x1 * tl.load(p_plane + 2)
    b_plane1 = b_x0 * tl.load(p_plane + 1) + b_x1 * tl.load(p_plane + 3)
    if DIM > 2:
        b_plane0 += b_x2 * tl.load(p_plane + 4)
        b_plane1 += b_x2 * tl.load(p_plane + 5)
    return b_plane0, b_plane1


@triton.jit(do_not_specialize=["n_edges"])
def frame_forward(
    p_delta, p_attr, p_order, p_shell, p_scalars, p_harmonics, p_powers, p_plane, p_axis, p_attribute_order,
    p_attribute_partner, p_attribute_sign, p_pairs, p_inputs, p_radius, p_factor, p_q, n_edges,
    KIND: tl.constexpr, DIM: tl.constexpr, NA: tl.constexpr, BA: tl.constexpr, NI: tl.constexpr, NM: tl.constexpr,
    BM: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, DEGREE: tl.constexpr, PAIRS: tl.constexpr,
    CUTOFF: tl.constexpr, SOFT: tl.constexpr, ZERO: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """delta (E, DIM), attr (E, NA), shell: σ (1,) → inputs (E, NI), radius (E,), factor (E,), q (E, NQ)."""
    o_row = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_edge = o_row < n_edges
    o_edge = tl.load(p_order + o_row, m_edge, 0).to(tl.int64)
    b_x0, b_x1, b_x2, b_squared = positions(p_delta, o_edge, m_edge, DIM)
    tl.store(p_factor + o_row, radial_factor(b_squared, p_shell, p_scalars, CUTOFF, ZERO), m_edge)

    o_a, o_q = tl.arange(0, BA), tl.arange(0, BQ)
    m_attr = m_edge[:, None] & (o_a < NA)[None, :]
    b_attr = tl.load(p_attr + o_edge[:, None] * NA + o_a[None, :], m_attr, 0.0)
    if KIND == NONE:
        for k in tl.static_range(DIM):
            tl.store(p_inputs + o_row * NI + k, position(p_delta, o_edge, m_edge, k, DIM), m_edge)
    elif KIND == ZONAL:
        b_radius = tl.sqrt(b_squared + SOFT)
        tl.store(p_radius + o_row, b_radius, m_edge)
        b_u0, b_u1, b_u2 = b_x0 / b_radius, b_x1 / b_radius, b_x2 / b_radius
        b_y = harmonics(b_u0, b_u1, b_u2, p_harmonics, p_powers, NM, BM, NQ, BQ, DEGREE, PREC)
        tl.store(
            p_q + o_row[:, None] * NQ + o_q[None, :], b_y * b_radius[:, None], m_edge[:, None] & (o_q < NQ)[None, :]
        )
    else:
        b_plane0, b_plane1 = planar_axes(b_x0, b_x1, b_x2, p_plane, DIM)
        b_scale = 1.0 + 0.0 * b_plane0
        if KIND == REGULAR_PLANAR:
            b_radius = tl.sqrt(b_plane0 * b_plane0 + b_plane1 * b_plane1 + SOFT)
            tl.store(p_radius + o_row, b_radius, m_edge)
            b_cos, b_sin, b_scale = b_plane0 / b_radius, b_plane1 / b_radius, b_radius
        else:
            _, b_cos, b_sin = azimuth(p_attr, o_edge, m_edge, b_plane0, b_plane1, p_pairs, NA, PAIRS, ZERO)
            tl.store(p_inputs + o_row * NI, b_cos * b_plane0 + b_sin * b_plane1, m_edge)
            tl.store(p_inputs + o_row * NI + 1, b_cos * b_plane1 - b_sin * b_plane0, m_edge)
            b_k = tl.load(p_attribute_order + o_a, o_a < NA, 0)
            o_partner = tl.load(p_attribute_partner + o_a, o_a < NA, 0)
            b_sign = tl.load(p_attribute_sign + o_a, o_a < NA, 0.0)
            b_cos_k, b_sin_k = multiples(b_cos, b_sin, b_k, DEGREE)
            b_other = tl.load(p_attr + o_edge[:, None] * NA + o_partner[None, :], m_attr, 0.0)
            b_attr = b_cos_k * b_attr - b_sin_k * b_sign[None, :] * b_other
        if DIM > 2:
            b_along = b_x0 * tl.load(p_axis) + b_x1 * tl.load(p_axis + 1) + b_x2 * tl.load(p_axis + 2)
            tl.store(p_inputs + o_row * NI + (NI - NA - 1), b_along, m_edge)
        b_cos_k, b_sin_k = multiples(b_cos, b_sin, o_q // 2 + 1, NQ // 2)
        b_q = tl.where((o_q % 2 == 0)[None, :], b_cos_k, b_sin_k) * b_scale[:, None]
        tl.store(p_q + o_row[:, None] * NQ + o_q[None, :], b_q, m_edge[:, None] & (o_q < NQ)[None, :])
    tl.store(p_inputs + o_row[:, None] * NI + (NI - NA) + o_a[None, :], b_attr, m_attr)


@triton.jit
def zonal_backward(b_x0, b_x1, b_x2, b_radius, b_d_q, b_d_radius, p_harmonics, p_powers, NM: tl.constexpr,
                   BM: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, DEGREE: tl.constexpr,
                   PREC: tl.constexpr):  # fmt: skip
    """Gradients of x from those of q = r Y(x / r) (BE, BQ) and of the radius r."""
    b_u0, b_u1, b_u2 = b_x0 / b_radius, b_x1 / b_radius, b_x2 / b_radius
    # of u divided by r, the factor r of q taken out
    b_d_u0, b_d_u1, b_d_u2, b_product = harmonics_backward(b_u0, b_u1, b_u2, b_d_q, p_harmonics, p_powers, NM, BM, NQ,
                                                           BQ, DEGREE, PREC)  # fmt: skip
    b_d_radius += b_product
    b_d_radius -= b_d_u0 * b_u0 + b_d_u1 * b_u1 + b_d_u2 * b_u2
    return b_d_u0 + b_d_radius * b_u0, b_d_u1 + b_d_radius * b_u1, b_d_u2 + b_d_radius * b_u2


@triton.jit
def turn_backward(b_cos, b_sin, b_k, b_d_cos, b_d_sin, MOST: tl.constexpr):
    """Gradients of cos φ and sin φ from those of cos kφ and sin kφ (BE, n): (c + is)^k has derivative k (c +
    is)^(k−1)."""
    b_re, b_im = multiples(b_cos, b_sin, b_k - 1, MOST)
    b_order = b_k[None, :].to(b_cos.dtype)
    b_d_c = tl.sum(b_order * (b_d_cos * b_re + b_d_sin * b_im), 1)
    return b_d_c, tl.sum(b_order * (b_d_sin * b_re - b_d_cos * b_im), 1)


@triton.jit
def attributes_backward(
    p_attr, p_attribute_order, p_attribute_partner, p_attribute_sign, p_d_inputs, o_edge, o_row, m_attr, b_cos, b_sin,
    b_d_attr, NA: tl.constexpr, BA: tl.constexpr, NI: tl.constexpr, DEGREE: tl.constexpr,
):  # fmt: skip
    """Gradients of the attributes (BE, BA) and of cos φ and sin φ from that of the turned attributes, ``b_d_attr``."""
    o_a = tl.arange(0, BA)
    b_k = tl.load(p_attribute_order + o_a, o_a < NA, 0)
    o_partner = tl.load(p_attribute_partner + o_a, o_a < NA, 0)
    b_sign = tl.load(p_attribute_sign + o_a, o_a < NA, 0.0)
    b_cos_k, b_sin_k = multiples(b_cos, b_sin, b_k, DEGREE)
    b_attr = tl.load(p_attr + o_edge[:, None] * NA + o_a[None, :], m_attr, 0.0)
    b_other = tl.load(p_attr + o_edge[:, None] * NA + o_partner[None, :], m_attr, 0.0)
    b_d_other = tl.load(p_d_inputs + o_row[:, None] * NI + (NI - NA) + o_partner[None, :], m_attr, 0.0)
    b_d_sin_k = -b_d_attr * b_sign[None, :] * b_other
    b_d_cos, b_d_sin = turn_backward(b_cos, b_sin, b_k, b_d_attr * b_attr, b_d_sin_k, DEGREE)
    # the partner's sign is the opposite one
    return b_cos_k * b_d_attr + b_sin_k * b_sign[None, :] * b_d_other, b_d_cos, b_d_sin


@triton.jit(do_not_specialize=["n_edges"])
def frame_backward(
    p_delta, p_attr, p_order, p_shell, p_scalars, p_harmonics, p_powers, p_plane, p_axis, p_attribute_order,
    p_attribute_partner, p_attribute_sign, p_pairs, p_d_inputs, p_d_radius, p_d_factor, p_d_q, p_d_delta, p_d_attr,
    p_d_shell, n_edges,
    KIND: tl.constexpr, DIM: tl.constexpr, NA: tl.constexpr, BA: tl.constexpr, NI: tl.constexpr, NM: tl.constexpr,
    BM: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, DEGREE: tl.constexpr, PAIRS: tl.constexpr,
    CUTOFF: tl.constexpr, SOFT: tl.constexpr, ZERO: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of delta and attr, in the edges' own order, and d_shell (programs,), the parts of that of σ."""
    o_row = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_edge = o_row < n_edges
    o_edge = tl.load(p_order + o_row, m_edge, 0).to(tl.int64)
    b_x0, b_x1, b_x2, b_squared = positions(p_delta, o_edge, m_edge, DIM)
    b_d_factor = tl.load(p_d_factor + o_row, m_edge, 0.0)
    b_slope, b_d_sigma = radial_factor_backward(b_squared, b_d_factor, p_shell, p_scalars, CUTOFF, ZERO)
    tl.store(p_d_shell + tl.program_id(0), tl.sum(b_d_sigma, 0))
    b_d_x0, b_d_x1, b_d_x2 = b_slope * b_x0, b_slope * b_x1, b_slope * b_x2

    o_a, o_q = tl.arange(0, BA), tl.arange(0, BQ)
    m_attr = m_edge[:, None] & (o_a < NA)[None, :]
    b_d_attr = tl.load(p_d_inputs + o_row[:, None] * NI + (NI - NA) + o_a[None, :], m_attr, 0.0)
    if KIND == NONE:
        b_d_x0 += tl.load(p_d_inputs + o_row * NI, m_edge, 0.0)
        if DIM > 1:
            b_d_x1 += tl.load(p_d_inputs + o_row * NI + 1, m_edge, 0.0)
        if DIM > 2:
            b_d_x2 += tl.load(p_d_inputs + o_row * NI + 2, m_edge, 0.0)
    elif KIND == ZONAL:
        b_d_q = tl.load(p_d_q + o_row[:, None] * NQ + o_q[None, :], m_edge[:, None] & (o_q < NQ)[None, :], 0.0)
        b_d_radius = tl.load(p_d_radius + o_row, m_edge, 0.0)
        b_radius = tl.sqrt(b_squared + SOFT)
        b_more0, b_more1, b_more2 = zonal_backward(b_x0, b_x1, b_x2, b_radius, b_d_q, b_d_radius, p_harmonics, p_powers,
                                                   NM, BM, NQ, BQ, DEGREE, PREC)  # fmt: skip
        b_d_x0, b_d_x1, b_d_x2 = b_d_x0 + b_more0, b_d_x1 + b_more1, b_d_x2 + b_more2
    else:
        b_d_q = tl.load(p_d_q + o_row[:, None] * NQ + o_q[None, :], m_edge[:, None] & (o_q < NQ)[None, :], 0.0)
        b_d_cos_k = tl.where((o_q % 2 == 0)[None, :], b_d_q, 0.0)
        b_d_sin_k = tl.where((o_q % 2 == 1)[None, :], b_d_q, 0.0)
        b_plane0, b_plane1 = planar_axes(b_x0, b_x1, b_x2, p_plane, DIM)
        if KIND == REGULAR_PLANAR:
            b_radius = tl.sqrt(b_plane0 * b_plane0 + b_plane1 * b_plane1 + SOFT)
            b_cos, b_sin = b_plane0 / b_radius, b_plane1 / b_radius
            b_d_cos, b_d_sin = turn_backward(b_cos, b_sin, o_q // 2 + 1, b_d_cos_k, b_d_sin_k, NQ // 2)
            b_cos_k, b_sin_k = multiples(b_cos, b_sin, o_q // 2 + 1, NQ // 2)
            b_d_radius = tl.load(p_d_radius + o_row, m_edge, 0.0)
            b_d_radius += tl.sum(b_d_cos_k * b_cos_k + b_d_sin_k * b_sin_k, 1)
            b_d_radius -= b_d_cos * b_cos + b_d_sin * b_sin  # of q / r, whose factor r cancels 1 / r
            b_d_plane0, b_d_plane1 = b_d_cos + b_d_radius * b_cos, b_d_sin + b_d_radius * b_sin
        else:
            b_over_rho, b_cos, b_sin = azimuth(p_attr, o_edge, m_edge, b_plane0, b_plane1, p_pairs, NA, PAIRS, ZERO)
            b_d_cos, b_d_sin = turn_backward(b_cos, b_sin, o_q // 2 + 1, b_d_cos_k, b_d_sin_k, NQ // 2)
            b_d_attr, b_more_cos, b_more_sin = attributes_backward(
                p_attr, p_attribute_order, p_attribute_partner, p_attribute_sign, p_d_inputs, o_edge, o_row, m_attr,
                b_cos, b_sin, b_d_attr, NA, BA, NI, DEGREE,
            )  # fmt: skip
            b_d_cos, b_d_sin = b_d_cos + b_more_cos, b_d_sin + b_more_sin
            b_in0 = tl.load(p_d_inputs + o_row * NI, m_edge, 0.0)
            # the second input stays 0 off the axis
            b_in1 = tl.where(b_over_rho != 0, 0.0, tl.load(p_d_inputs + o_row * NI + 1, m_edge, 0.0))
            b_along = (b_d_cos * b_cos + b_d_sin * b_sin) * b_over_rho
            b_d_plane0 = b_cos * b_in0 - b_sin * b_in1 + b_d_cos * b_over_rho - b_along * b_plane0 * b_over_rho
            b_d_plane1 = b_sin * b_in0 + b_cos * b_in1 + b_d_sin * b_over_rho - b_along * b_plane1 * b_over_rho
        b_d_x0 += b_d_plane0 * tl.load(p_plane) + b_d_plane1 * tl.load(p_plane + 1)
        b_d_x1 += b_d_plane0 * tl.load(p_plane + 2) + b_d_plane1 * tl.load(p_plane + 3)
        if DIM > 2:
            b_d_x2 += b_d_plane0 * tl.load(p_plane + 4) + b_d_plane1 * tl.load(p_plane + 5)
            b_d_along = tl.load(p_d_inputs + o_row * NI + (NI - NA - 1), m_edge, 0.0)
            b_d_x0 += b_d_along * tl.load(p_axis)
            b_d_x1 += b_d_along * tl.load(p_axis + 1)
            b_d_x2 += b_d_along * tl.load(p_axis + 2)
    tl.store(p_d_delta + o_edge * DIM, b_d_x0, m_edge)
    if DIM > 1:
        tl.store(p_d_delta + o_edge * DIM + 1, b_d_x1, m_edge)
    if DIM > 2:
        tl.store(p_d_delta + o_edge * DIM + 2, b_d_x2, m_edge)
    tl.store(p_d_attr + o_edge[:, None] * NA + o_a[None, :], b_d_attr, m_attr)
