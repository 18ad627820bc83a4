"""Edges into their own frames: the MLP's inputs, the radius, γ s(|x|), the harmonics q; and the reverse sweep.

Formulas and names are those of ``ops/kernel_mlp.py``. Edge number ``order[n]`` becomes row n of what is written. KIND
is a number of ``tables.KINDS``. Regular frames carry what vanishes at the origin divided by the radius: their harmonics
of order k > 0 have one factor of the radius."""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations


@triton.jit
def position(delta, e, ok, K: tl.constexpr, DIM: tl.constexpr):
    """Coordinate K of the edges' x, (BE,); 0 beyond DIM."""
    if K < DIM:
        return tl.load(delta + e * DIM + K, ok, 0.0)
    else:
        return tl.load(delta + e * DIM, ok, 0.0) * 0.0


@triton.jit
def unit_of(squared, ZERO: tl.constexpr):
    """|p| and 1 / |p|, exactly 0 both where |p|² would underflow."""
    nonzero = (squared > ZERO) | (squared != squared)
    root = tl.sqrt(tl.where(nonzero, squared, 1.0))
    return tl.where(nonzero, root, 0.0), tl.where(nonzero, 1.0 / root, 0.0)


@triton.jit
def cutoff_of(squared, scalars, ZERO: tl.constexpr):
    """1 − 10 t³ + 15 t⁴ − 6 t⁵, t = min(|x| / cutoff, 1), and its derivative with respect to |x|² / 2."""
    inverse = tl.load(scalars + 1)
    norm, over = unit_of(squared, ZERO)
    t = norm * inverse
    t = tl.where(t > 1.0, 1.0, t)
    return 1.0 - t * t * t * (10.0 - t * (15.0 - 6.0 * t)), -30.0 * t * t * (1.0 - t) * (1.0 - t) * inverse * over


@triton.jit
def monomials(ux, uy, uz, px, py, pz, DEGREE: tl.constexpr):
    """(BE, n): ux^px uy^py uz^pz for the exponents (n,); 0 where one is negative."""
    found = tl.where((px >= 0) & (py >= 0) & (pz >= 0), 1.0, 0.0)[None, :].to(ux.dtype) + 0.0 * ux[:, None]
    for n in tl.static_range(DEGREE):
        found = tl.where((px > n)[None, :], found * ux[:, None], found)
        found = tl.where((py > n)[None, :], found * uy[:, None], found)
        found = tl.where((pz > n)[None, :], found * uz[:, None], found)
    return found


@triton.jit
def multiples(c, s, order, MOST: tl.constexpr):
    """(BE, n): cos kφ, sin kφ for the orders k (n,), from cos φ and sin φ (BE,); k < 0 counts as 0."""
    re = 1.0 + 0.0 * c[:, None] * order[None, :].to(c.dtype)
    im = 0.0 * re
    for n in tl.static_range(MOST):
        more = (order > n)[None, :]
        turned = re * c[:, None] - im * s[:, None]
        im = tl.where(more, re * s[:, None] + im * c[:, None], im)
        re = tl.where(more, turned, re)
    return re, im


@triton.jit
def azimuth(attr, e, ok, p0, p1, pairs, A: tl.constexpr, PAIRS: tl.constexpr, ZERO: tl.constexpr):
    """ρ, 1 / ρ (0 on the axis), cos φ, sin φ; on the axis φ is that of the first nonzero attribute of order 1, or 0."""
    rho, inverse = unit_of(p0 * p0 + p1 * p1, ZERO)
    c = tl.where(inverse != 0, p0 * inverse, 1.0)
    s = tl.where(inverse != 0, p1 * inverse, 0.0)
    for n in tl.static_range(PAIRS):
        a = tl.load(attr + e * A + tl.load(pairs + 2 * n), ok, 0.0)
        b = tl.load(attr + e * A + tl.load(pairs + 2 * n + 1), ok, 0.0)
        _, over = unit_of(a * a + b * b, ZERO)
        found = (inverse == 0) & (over != 0)
        c, s = tl.where(found, a * over, c), tl.where(found, b * over, s)
    return rho, inverse, c, s


@triton.jit
def planar_axes(x0, x1, x2, plane, DIM: tl.constexpr):
    """The two coordinates of x in the plane."""
    p0 = x0 * tl.load(plane) + x1 * tl.load(plane + 2)
    p1 = x0 * tl.load(plane + 1) + x1 * tl.load(plane + 3)
    if DIM > 2:
        p0 += x2 * tl.load(plane + 4)
        p1 += x2 * tl.load(plane + 5)
    return p0, p1


@triton.jit
def frame_forward(
    delta, attr, order, shell, scalars, harmonics, powers, plane, axis, attribute_order, attribute_partner,
    attribute_sign, pairs, inputs, radius, factor, q, E,
    KIND: tl.constexpr, DIM: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, NI: tl.constexpr, NM: tl.constexpr,
    NMP: tl.constexpr, NQ: tl.constexpr, NQP: tl.constexpr, DEGREE: tl.constexpr, PAIRS: tl.constexpr,
    CUTOFF: tl.constexpr, SOFT: tl.constexpr, ZERO: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """delta (E, DIM), attr (E, A), in rows of the given order → inputs (E, NI), radius (E,), factor (E,), q (E, NQ)."""
    n = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    ok = n < E
    e = tl.load(order + n, ok, 0).to(tl.int64)
    x0, x1, x2 = position(delta, e, ok, 0, DIM), position(delta, e, ok, 1, DIM), position(delta, e, ok, 2, DIM)
    squared = x0 * x0 + x1 * x1 + x2 * x2
    sigma = tl.load(shell)
    s_of = tl.load(scalars) * tl.exp(-0.5 * squared / (sigma * sigma))
    if CUTOFF:
        cut, _ = cutoff_of(squared, scalars, ZERO)
        s_of *= cut
    tl.store(factor + n, s_of, ok)

    a, m = tl.arange(0, AP), tl.arange(0, NQP)
    here = ok[:, None] & (a < A)[None, :]
    turned = tl.load(attr + e[:, None] * A + a[None, :], here, 0.0)
    if KIND == 0:
        for k in tl.static_range(DIM):
            tl.store(inputs + n * NI + k, position(delta, e, ok, k, DIM), ok)
    elif KIND == 1:
        r = tl.sqrt(squared + SOFT)
        tl.store(radius + n, r, ok)
        j = tl.arange(0, NMP)
        px, py = tl.load(powers + j, j < NM, 0), tl.load(powers + NM + j, j < NM, 0)
        pz = tl.load(powers + 2 * NM + j, j < NM, 0)
        table = tl.load(harmonics + j[:, None] * NQ + m[None, :], (j < NM)[:, None] & (m < NQ)[None, :], 0.0)
        y = activations.dot(monomials(x0 / r, x1 / r, x2 / r, px, py, pz, DEGREE), table, PREC)
        tl.store(q + n[:, None] * NQ + m[None, :], y * r[:, None], ok[:, None] & (m < NQ)[None, :])
    else:
        p0, p1 = planar_axes(x0, x1, x2, plane, DIM)
        scale = 1.0 + 0.0 * p0
        if KIND == 2:
            r = tl.sqrt(p0 * p0 + p1 * p1 + SOFT)
            tl.store(radius + n, r, ok)
            c, s, scale = p0 / r, p1 / r, r
        else:
            _, _, c, s = azimuth(attr, e, ok, p0, p1, pairs, A, PAIRS, ZERO)
            tl.store(inputs + n * NI, c * p0 + s * p1, ok)
            tl.store(inputs + n * NI + 1, c * p1 - s * p0, ok)
            k = tl.load(attribute_order + a, a < A, 0)
            partner, sign = tl.load(attribute_partner + a, a < A, 0), tl.load(attribute_sign + a, a < A, 0.0)
            cosine, sine = multiples(c, s, k, DEGREE)
            other = tl.load(attr + e[:, None] * A + partner[None, :], here, 0.0)
            turned = cosine * turned - sine * sign[None, :] * other
        if DIM > 2:
            along = x0 * tl.load(axis) + x1 * tl.load(axis + 1) + x2 * tl.load(axis + 2)
            tl.store(inputs + n * NI + (NI - A - 1), along, ok)
        cosine, sine = multiples(c, s, m // 2 + 1, NQ // 2)
        found = tl.where((m % 2 == 0)[None, :], cosine, sine) * scale[:, None]
        tl.store(q + n[:, None] * NQ + m[None, :], found, ok[:, None] & (m < NQ)[None, :])
    tl.store(inputs + n[:, None] * NI + (NI - A) + a[None, :], turned, here)


@triton.jit
def zonal_backward(x0, x1, x2, r, dq, dr, harmonics, powers, NM: tl.constexpr, NMP: tl.constexpr, NQ: tl.constexpr,
                   NQP: tl.constexpr, DEGREE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Gradients of x from those of q = r Y(x / r) and of r."""
    j, m = tl.arange(0, NMP), tl.arange(0, NQP)
    px, py = tl.load(powers + j, j < NM, 0), tl.load(powers + NM + j, j < NM, 0)
    pz = tl.load(powers + 2 * NM + j, j < NM, 0)
    table = tl.load(harmonics + j[None, :] * NQ + m[:, None], (j < NM)[None, :] & (m < NQ)[:, None], 0.0)
    of_monomials = activations.dot(dq, table, PREC)  # of r · monomial
    ux, uy, uz = x0 / r, x1 / r, x2 / r
    dr += tl.sum(of_monomials * monomials(ux, uy, uz, px, py, pz, DEGREE), 1)
    # d_unit / r, the factor r of q taken out
    d0 = tl.sum(of_monomials * px[None, :].to(r.dtype) * monomials(ux, uy, uz, px - 1, py, pz, DEGREE), 1)
    d1 = tl.sum(of_monomials * py[None, :].to(r.dtype) * monomials(ux, uy, uz, px, py - 1, pz, DEGREE), 1)
    d2 = tl.sum(of_monomials * pz[None, :].to(r.dtype) * monomials(ux, uy, uz, px, py, pz - 1, DEGREE), 1)
    dr -= d0 * ux + d1 * uy + d2 * uz
    return d0 + dr * ux, d1 + dr * uy, d2 + dr * uz


@triton.jit
def turn_backward(c, s, order, d_cosine, d_sine, MOST: tl.constexpr):
    """Gradients of (cos φ, sin φ) from those of cos kφ and sin kφ (BE, n): (c + is)^k has derivative k (c +
    is)^(k−1)."""
    re, im = multiples(c, s, order - 1, MOST)
    k = order[None, :].to(c.dtype)
    return tl.sum(k * (d_cosine * re + d_sine * im), 1), tl.sum(k * (d_sine * re - d_cosine * im), 1)


@triton.jit
def frame_backward(
    delta, attr, order, shell, scalars, harmonics, powers, plane, axis, attribute_order, attribute_partner,
    attribute_sign, pairs, d_inputs, d_radius, d_factor, d_q, d_delta, d_attr, d_shell, E,
    KIND: tl.constexpr, DIM: tl.constexpr, A: tl.constexpr, AP: tl.constexpr, NI: tl.constexpr, NM: tl.constexpr,
    NMP: tl.constexpr, NQ: tl.constexpr, NQP: tl.constexpr, DEGREE: tl.constexpr, PAIRS: tl.constexpr,
    CUTOFF: tl.constexpr, SOFT: tl.constexpr, ZERO: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of delta and attr, in the edges' own order, and d_shell (programs,) of the shell's width."""
    n = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    ok = n < E
    e = tl.load(order + n, ok, 0).to(tl.int64)
    x0, x1, x2 = position(delta, e, ok, 0, DIM), position(delta, e, ok, 1, DIM), position(delta, e, ok, 2, DIM)
    squared = x0 * x0 + x1 * x1 + x2 * x2
    sigma = tl.load(shell)
    gauss = tl.load(scalars) * tl.exp(-0.5 * squared / (sigma * sigma)) * tl.load(d_factor + n, ok, 0.0)
    slope = -gauss / (sigma * sigma)  # of |x|² / 2
    if CUTOFF:
        cut, of_cut = cutoff_of(squared, scalars, ZERO)
        slope = slope * cut + gauss * of_cut
        gauss *= cut
    tl.store(d_shell + tl.program_id(0), tl.sum(gauss * squared / (sigma * sigma * sigma), 0))
    g0, g1, g2 = slope * x0, slope * x1, slope * x2

    a, m = tl.arange(0, AP), tl.arange(0, NQP)
    here = ok[:, None] & (a < A)[None, :]
    of_turned = tl.load(d_inputs + n[:, None] * NI + (NI - A) + a[None, :], here, 0.0)
    if KIND == 0:
        g0 += tl.load(d_inputs + n * NI, ok, 0.0)
        if DIM > 1:
            g1 += tl.load(d_inputs + n * NI + 1, ok, 0.0)
        if DIM > 2:
            g2 += tl.load(d_inputs + n * NI + 2, ok, 0.0)
    elif KIND == 1:
        dq = tl.load(d_q + n[:, None] * NQ + m[None, :], ok[:, None] & (m < NQ)[None, :], 0.0)
        dr = tl.load(d_radius + n, ok, 0.0)
        r = tl.sqrt(squared + SOFT)
        h0, h1, h2 = zonal_backward(x0, x1, x2, r, dq, dr, harmonics, powers, NM, NMP, NQ, NQP, DEGREE, PREC)
        g0, g1, g2 = g0 + h0, g1 + h1, g2 + h2
    else:
        dq = tl.load(d_q + n[:, None] * NQ + m[None, :], ok[:, None] & (m < NQ)[None, :], 0.0)
        of_cosine, of_sine = tl.where((m % 2 == 0)[None, :], dq, 0.0), tl.where((m % 2 == 1)[None, :], dq, 0.0)
        p0, p1 = planar_axes(x0, x1, x2, plane, DIM)
        if KIND == 2:
            r = tl.sqrt(p0 * p0 + p1 * p1 + SOFT)
            inverse, c, s = 1.0 / r, p0 / r, p1 / r
            dc, ds = turn_backward(c, s, m // 2 + 1, of_cosine, of_sine, NQ // 2)
            cosine, sine = multiples(c, s, m // 2 + 1, NQ // 2)
            dr = tl.load(d_radius + n, ok, 0.0) + tl.sum(of_cosine * cosine + of_sine * sine, 1)
            dr -= dc * c + ds * s  # of q / r, whose factor r cancels 1 / r
            h0, h1 = dc + dr * c, ds + dr * s
        else:
            _, inverse, c, s = azimuth(attr, e, ok, p0, p1, pairs, A, PAIRS, ZERO)
            dc, ds = turn_backward(c, s, m // 2 + 1, of_cosine, of_sine, NQ // 2)
            k = tl.load(attribute_order + a, a < A, 0)
            partner, sign = tl.load(attribute_partner + a, a < A, 0), tl.load(attribute_sign + a, a < A, 0.0)
            cosine, sine = multiples(c, s, k, DEGREE)
            mine = tl.load(attr + e[:, None] * A + a[None, :], here, 0.0)
            other = tl.load(attr + e[:, None] * A + partner[None, :], here, 0.0)
            of_other = tl.load(d_inputs + n[:, None] * NI + (NI - A) + partner[None, :], here, 0.0)
            tc, ts = turn_backward(c, s, k, of_turned * mine, -of_turned * sign[None, :] * other, DEGREE)
            dc, ds = dc + tc, ds + ts
            # the partner's sign is the opposite one
            of_turned = cosine * of_turned + sine * sign[None, :] * of_other
            first = tl.load(d_inputs + n * NI, ok, 0.0)
            second = tl.where(inverse != 0, 0.0, tl.load(d_inputs + n * NI + 1, ok, 0.0))  # off the axis it stays 0
            along = (dc * c + ds * s) * inverse
            h0 = c * first - s * second + dc * inverse - along * p0 * inverse
            h1 = s * first + c * second + ds * inverse - along * p1 * inverse
        g0 += h0 * tl.load(plane) + h1 * tl.load(plane + 1)
        g1 += h0 * tl.load(plane + 2) + h1 * tl.load(plane + 3)
        if DIM > 2:
            g2 += h0 * tl.load(plane + 4) + h1 * tl.load(plane + 5)
            of_axis = tl.load(d_inputs + n * NI + (NI - A - 1), ok, 0.0)
            g0 += of_axis * tl.load(axis)
            g1 += of_axis * tl.load(axis + 1)
            g2 += of_axis * tl.load(axis + 2)
    tl.store(d_delta + e * DIM, g0, ok)
    if DIM > 1:
        tl.store(d_delta + e * DIM + 1, g1, ok)
    if DIM > 2:
        tl.store(d_delta + e * DIM + 2, g2, ok)
    tl.store(d_attr + e[:, None] * A + a[None, :], of_turned, here)
