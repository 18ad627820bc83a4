"""Frame and hidden layers of zonal frames edge by edge, for layers narrow enough that a thread holds an edge.

An edge's coefficients are in registers, a vector of edges (BE,) for each: ``b_y[w NC + c]`` is coefficient c of channel
w, divided by the radius r for c >= 1, whose order is >= 1. Weights and samples are scalars. Per layer, W acting on each
order apart,

    z[u, c] = Σ_v W_c[u, v] y[v, c] + b[u] δ_c0,   u₀ = A[s, 0] z[u, 0],   w = Σ_{c >= 1} A[s, c] z[u, c],
    p_s = φ(u₀ + r w),   y[u, 0] = Σ_s A⁻[0, s] p_s,   y[u, c] = Σ_s A⁻[c, s] p_s / r,

where near the origin r w times the difference quotient of φ stands for p_s in the last sum, as in layers.py.

Of one layer ``weights`` holds W_c (NC, NW, NW) as [c][v][u] and b (NW,); of the first, whose inputs are the NI
attributes and, for c >= 1, the constant one, W_0 (NI, NW) as [i][u], b (NW,) and W_c (NC − 1, NW). ``sample_rows`` (NL,
NS, 2 NC) holds of every sample the row A[s] and the column A⁻[:, s]. HARMONICS (NM, NQ) and POWERS (3, NM) are tuples:
the tables of frame.py. The other constants and the prefixes are those of the package's glossary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations, frame


@triton.jit
def power(b_u, N: tl.constexpr):
    """u^N; 0 for N < 0."""
    b_found = b_u * 0.0
    if N >= 0:
        b_found += 1.0
        for _ in tl.static_range(N):
            b_found *= b_u
    return b_found


@triton.jit
def monomial(b_u0, b_u1, b_u2, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    return power(b_u0, N0) * power(b_u1, N1) * power(b_u2, N2)


@triton.jit
def monomial_slopes(b_u0, b_u1, b_u2, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Its derivatives, and the monomial."""
    b_slope0 = N0 * monomial(b_u0, b_u1, b_u2, N0 - 1, N1, N2)
    b_slope1 = N1 * monomial(b_u0, b_u1, b_u2, N0, N1 - 1, N2)
    b_slope2 = N2 * monomial(b_u0, b_u1, b_u2, N0, N1, N2 - 1)
    return b_slope0, b_slope1, b_slope2, monomial(b_u0, b_u1, b_u2, N0, N1, N2)


@triton.jit
def store_rows(p_rows, o_row, m_edge, b_values, N: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr,
               BE: tl.constexpr):  # fmt: skip
    """N vectors of edges as the first columns of rows of so many numbers, N <= 2^BITS. Joined to a block they are one
    store, of whole sectors; stores of single columns also take the compiler a time that grows with their square."""
    parts = b_values
    for _k in tl.static_range(N, 2**BITS):
        parts = parts + (b_values[0] * 0.0,)  # noqa: RUF005
    for level in tl.static_range(BITS):
        pairs = ()
        for k in tl.static_range(2 ** (BITS - 1 - level)):
            pairs = pairs + (tl.join(parts[k], parts[k + 2 ** (BITS - 1 - level)]),)  # noqa: RUF005
        parts = pairs
    o_column = tl.arange(0, 2**BITS)
    m_block = m_edge[:, None] & (o_column < N)[None, :]
    tl.store(p_rows + o_row[:, None] * STRIDE + o_column[None, :], tl.reshape(parts[0], (BE, 2**BITS)), m_block)


@triton.jit
def store_harmonics(p_q, o_row, m_edge, b_x0, b_x1, b_x2, b_radius, HARMONICS: tl.constexpr, POWERS: tl.constexpr,
                    NM: tl.constexpr, NQ: tl.constexpr, BITS: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """q = r Y(x / r) (E, NQ)."""
    b_u0, b_u1, b_u2 = b_x0 / b_radius, b_x1 / b_radius, b_x2 / b_radius
    b_q = ()
    for j in tl.static_range(NQ):
        b_y = b_radius * 0.0
        for m in tl.static_range(NM):
            if HARMONICS[m * NQ + j] != 0.0:
                b_y += HARMONICS[m * NQ + j] * monomial(b_u0, b_u1, b_u2, POWERS[m], POWERS[NM + m], POWERS[2 * NM + m])
        b_q = b_q + (b_y * b_radius,)  # noqa: RUF005
    store_rows(p_q, o_row, m_edge, b_q, NQ, NQ, BITS, BE)


@triton.jit
def first_linear(p_attr, o_edge, m_edge, b_radius, p_weights, NI: tl.constexpr, NW: tl.constexpr, NC: tl.constexpr):
    """z of the first layer."""
    b_attr = ()
    for i in tl.static_range(NI):
        b_attr = b_attr + (tl.load(p_attr + o_edge * NI + i, m_edge, 0.0),)  # noqa: RUF005
    b_z = ()
    for u in tl.static_range(NW):
        b_sum = b_radius * 0.0 + tl.load(p_weights + NI * NW + u)
        for i in tl.static_range(NI):
            b_sum += b_attr[i] * tl.load(p_weights + i * NW + u)
        b_z = b_z + (b_sum,)  # noqa: RUF005
        for c in tl.static_range(1, NC):
            b_z = b_z + (b_radius * 0.0 + tl.load(p_weights + (NI + c) * NW + u),)  # noqa: RUF005
    return b_z


@triton.jit
def linear(b_y, p_weights, NW: tl.constexpr, NC: tl.constexpr):
    """z of a later layer."""
    b_z = ()
    for u in tl.static_range(NW):
        for c in tl.static_range(NC):
            b_sum = b_y[c] * tl.load(p_weights + c * NW * NW + u)
            for v in tl.static_range(1, NW):
                b_sum += b_y[v * NC + c] * tl.load(p_weights + (c * NW + v) * NW + u)
            if c == 0:
                b_sum += tl.load(p_weights + NC * NW * NW + u)
            b_z = b_z + (b_sum,)  # noqa: RUF005
    return b_z


@triton.jit
def row_of(p_row, N: tl.constexpr):
    """N numbers side by side, as scalars."""
    found = ()
    for n in tl.static_range(N):
        found = found + (tl.load(p_row + n),)  # noqa: RUF005
    return found


@triton.jit
def sample(b_z, a, w: tl.constexpr, NC: tl.constexpr):
    """u₀ and w of channel w, at the sample whose row A[s] is ``a``."""
    b_w = a[1] * b_z[w * NC + 1]
    for c in tl.static_range(2, NC):
        b_w += a[c] * b_z[w * NC + c]
    return a[0] * b_z[w * NC], b_w


@triton.jit
def sample_values(b_z, a, b_radius, any_near, NW: tl.constexpr, NC: tl.constexpr, FN: tl.constexpr, NEAR: tl.constexpr,
                  SMALL: tl.constexpr):  # fmt: skip
    """Of every channel φ(u₀ + r w) and what stands for it in the coefficients of order >= 1, which are divided by r."""
    b_p = ()
    for w in tl.static_range(NW):
        b_u0, b_w = sample(b_z, a, w, NC)
        b_p = b_p + (activations.value(b_u0 + b_radius * b_w, FN),)  # noqa: RUF005
    b_d = b_p
    if any_near:
        b_near = ()
        for w in tl.static_range(NW):
            b_u0, b_w = sample(b_z, a, w, NC)
            b_k = b_radius * b_w
            b_quotient = b_k * activations.quotient(b_u0, b_k, FN, SMALL)
            b_near = b_near + (tl.where(b_radius < NEAR, b_quotient, b_p[w]),)  # noqa: RUF005
        b_d = b_near
    return b_p, b_d


@triton.jit
def activate(b_z, b_radius, any_near, p_sample_rows, NW: tl.constexpr, NC: tl.constexpr, NS: tl.constexpr,
             FN: tl.constexpr, NEAR: tl.constexpr, SMALL: tl.constexpr):  # fmt: skip
    """A layer's outputs y from its z."""
    b_sums = ()
    for _i in tl.static_range(NW * NC):
        b_sums = b_sums + (b_radius * 0.0,)  # noqa: RUF005
    for i_s in tl.range(0, NS):
        a = row_of(p_sample_rows + i_s * 2 * NC, 2 * NC)
        b_p, b_d = sample_values(b_z, a, b_radius, any_near, NW, NC, FN, NEAR, SMALL)
        added = ()
        for w in tl.static_range(NW):
            added = added + (b_sums[w * NC] + a[NC] * b_p[w],)  # noqa: RUF005
            for c in tl.static_range(1, NC):
                added = added + (b_sums[w * NC + c] + a[NC + c] * b_d[w],)  # noqa: RUF005
        b_sums = added
    b_y = ()
    b_over_radius = 1.0 / b_radius
    for w in tl.static_range(NW):
        b_y = b_y + (b_sums[w * NC],)  # noqa: RUF005
        for c in tl.static_range(1, NC):
            b_y = b_y + (b_sums[w * NC + c] * b_over_radius,)  # noqa: RUF005
    return b_y


@triton.jit(do_not_specialize=["n_edges"])
def edges_forward(
    p_delta, p_attr, p_order, p_shell, p_scalars, p_weights, p_sample_rows, p_r, p_q, n_edges,
    HARMONICS: tl.constexpr, POWERS: tl.constexpr, NM: tl.constexpr, NQ: tl.constexpr, NI: tl.constexpr,
    NW: tl.constexpr, NC: tl.constexpr, NS: tl.constexpr, NL: tl.constexpr, NR: tl.constexpr, SCALED: tl.constexpr,
    CUTOFF: tl.constexpr, FN: tl.constexpr, NEAR: tl.constexpr, SMALL: tl.constexpr, SOFT: tl.constexpr,
    ZERO: tl.constexpr, BITS: tl.constexpr, BITS_Q: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """delta (E, 3), attr (E, NI), shell: σ (1,) → q (E, NQ), and of the last layer r = factor · (y, 1) (E, NR) or,
    without SCALED, all of y (E, NR); rows sorted by target."""
    o_row = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_edge = o_row < n_edges
    o_edge = tl.load(p_order + o_row, m_edge, 0).to(tl.int64)
    b_x0, b_x1, b_x2, b_squared = frame.positions(p_delta, o_edge, m_edge, 3)
    b_radius = tl.sqrt(b_squared + SOFT)
    store_harmonics(p_q, o_row, m_edge, b_x0, b_x1, b_x2, b_radius, HARMONICS, POWERS, NM, NQ, BITS_Q, BE)
    any_near = tl.min(tl.where(m_edge, b_radius, 1.0), 0) < NEAR
    b_z = first_linear(p_attr, o_edge, m_edge, b_radius, p_weights, NI, NW, NC)
    b_y = activate(b_z, b_radius, any_near, p_sample_rows, NW, NC, NS, FN, NEAR, SMALL)
    for n in tl.static_range(1, NL):
        b_z = linear(b_y, p_weights + (NI + NC) * NW + (n - 1) * (NC * NW + 1) * NW, NW, NC)
        b_y = activate(b_z, b_radius, any_near, p_sample_rows + n * NS * 2 * NC, NW, NC, NS, FN, NEAR, SMALL)
    b_factor = frame.radial_factor(b_squared, p_shell, p_scalars, CUTOFF, ZERO)
    b_r = ()  # column c NW + w
    for k in tl.static_range(NR - SCALED):
        b_r = b_r + ((b_y[k % NW * NC + k // NW] * b_factor if SCALED else b_y[k % NW * NC + k // NW]),)  # noqa: RUF005
    if SCALED:
        b_r = b_r + (b_factor,)  # noqa: RUF005
    store_rows(p_r, o_row, m_edge, b_r, NR, NR, BITS, BE)


@triton.jit
def harmonics_backward(p_d_q, o_row, m_edge, b_x0, b_x1, b_x2, b_radius, b_d_radius, HARMONICS: tl.constexpr,
                       POWERS: tl.constexpr, NM: tl.constexpr, NQ: tl.constexpr):  # fmt: skip
    """Gradients of x from those of q = r Y(x / r) and of the radius."""
    b_u0, b_u1, b_u2 = b_x0 / b_radius, b_x1 / b_radius, b_x2 / b_radius
    b_d_q = ()
    for j in tl.static_range(NQ):
        b_d_q = b_d_q + (tl.load(p_d_q + o_row * NQ + j, m_edge, 0.0),)  # noqa: RUF005
    b_d_u0, b_d_u1, b_d_u2 = b_radius * 0.0, b_radius * 0.0, b_radius * 0.0  # divided by r, the factor of q
    for m in tl.static_range(NM):
        b_d_m = b_radius * 0.0
        for j in tl.static_range(NQ):
            if HARMONICS[m * NQ + j] != 0.0:
                b_d_m += HARMONICS[m * NQ + j] * b_d_q[j]
        b_more0, b_more1, b_more2, b_value = monomial_slopes(b_u0, b_u1, b_u2, POWERS[m], POWERS[NM + m],
                                                             POWERS[2 * NM + m])  # fmt: skip
        b_d_u0 += b_d_m * b_more0
        b_d_u1 += b_d_m * b_more1
        b_d_u2 += b_d_m * b_more2
        b_d_radius += b_d_m * b_value
    b_d_radius -= b_d_u0 * b_u0 + b_d_u1 * b_u1 + b_d_u2 * b_u2
    return b_d_u0 + b_d_radius * b_u0, b_d_u1 + b_d_radius * b_u1, b_d_u2 + b_d_radius * b_u2


@triton.jit
def sample_gradients(b_z, b_g, a, b_radius, any_near, NW: tl.constexpr, NC: tl.constexpr, FN: tl.constexpr,
                     NEAR: tl.constexpr, SMALL: tl.constexpr):  # fmt: skip
    """Of one sample, for g the gradients of y, those of order >= 1 divided by r: per channel the gradient of u₀, and
    that of w over r; summed over the channels, r times the gradient of r, and this sample's part of ⟨g, y⟩."""
    b_d_u0, b_d_w, b_d_radius, b_product = (), (), b_radius * 0.0, b_radius * 0.0
    for w in tl.static_range(NW):
        b_u0, b_w = sample(b_z, a, w, NC)
        b_k = b_radius * b_w
        b_p, b_slope = activations.value(b_u0 + b_k, FN), activations.slope(b_u0 + b_k, FN)
        b_of_p, b_of_d = a[NC] * b_g[w * NC], a[NC + 1] * b_g[w * NC + 1]
        for c in tl.static_range(2, NC):
            b_of_d += a[NC + c] * b_g[w * NC + c]
        b_t = (b_of_p + b_of_d) * b_slope
        b_d_w = b_d_w + (b_t,)  # noqa: RUF005
        b_r, b_y = b_t * b_k - b_of_d * b_p, (b_of_p + b_of_d) * b_p
        if any_near:
            b_quotient = activations.quotient(b_u0, b_k, FN, SMALL)
            b_of_b, b_of_k = activations.quotient_slopes(b_u0, b_k, b_quotient, FN, SMALL)
            m_near = b_radius < NEAR
            b_t = tl.where(m_near, b_of_p * b_slope + b_of_d * b_k * b_of_b, b_t)
            b_r = tl.where(m_near, b_of_p * b_slope * b_k + b_of_d * b_k * b_k * b_of_k, b_r)
            b_y = tl.where(m_near, b_of_p * b_p + b_of_d * b_k * b_quotient, b_y)
        b_d_u0 = b_d_u0 + (b_t,)  # noqa: RUF005
        b_d_radius += b_r
        b_product += b_y
    return b_d_u0, b_d_w, b_d_radius, b_product


@triton.jit
def activate_backward(b_z, b_g, b_radius, any_near, p_sample_rows, NW: tl.constexpr, NC: tl.constexpr, NS: tl.constexpr,
                      FN: tl.constexpr, NEAR: tl.constexpr, SMALL: tl.constexpr):  # fmt: skip
    """From the gradients g of a layer's outputs those of z and of the radius, and ⟨g, y⟩."""
    b_d_radius, b_product, b_over_radius = b_radius * 0.0, b_radius * 0.0, 1.0 / b_radius
    b_scaled, b_d_z = (), ()
    for w in tl.static_range(NW):
        b_scaled, b_d_z = b_scaled + (b_g[w * NC],), b_d_z + (b_d_radius,)  # noqa: RUF005
        for c in tl.static_range(1, NC):
            b_scaled = b_scaled + (b_g[w * NC + c] * b_over_radius,)  # noqa: RUF005
            b_d_z = b_d_z + (b_d_radius,)  # noqa: RUF005
    for i_s in tl.range(0, NS):
        a = row_of(p_sample_rows + i_s * 2 * NC, 2 * NC)
        b_d_u0, b_d_w, b_more, b_part = sample_gradients(b_z, b_scaled, a, b_radius, any_near, NW, NC, FN, NEAR, SMALL)
        b_d_radius += b_more
        b_product += b_part
        added = ()
        for w in tl.static_range(NW):
            added = added + (b_d_z[w * NC] + a[0] * b_d_u0[w],)  # noqa: RUF005
            for c in tl.static_range(1, NC):
                added = added + (b_d_z[w * NC + c] + a[c] * b_d_w[w],)  # noqa: RUF005
        b_d_z = added
    b_found = ()
    for w in tl.static_range(NW):
        b_found = b_found + (b_d_z[w * NC],)  # noqa: RUF005
        for c in tl.static_range(1, NC):
            b_found = b_found + (b_d_z[w * NC + c] * b_radius,)  # noqa: RUF005
    return b_found, b_d_radius * b_over_radius, b_product


@triton.jit
def linear_backward(b_d_z, p_weights, NW: tl.constexpr, NC: tl.constexpr):
    """The gradients of a later layer's inputs from those of z."""
    b_d_y = ()
    for v in tl.static_range(NW):
        for c in tl.static_range(NC):
            b_sum = b_d_z[c] * tl.load(p_weights + (c * NW + v) * NW)
            for u in tl.static_range(1, NW):
                b_sum += b_d_z[u * NC + c] * tl.load(p_weights + (c * NW + v) * NW + u)
            b_d_y = b_d_y + (b_sum,)  # noqa: RUF005
    return b_d_y


@triton.jit
def attributes_backward(p_attr, p_weights, p_d_attr, p_y, o_edge, o_column, m_edge, b_d_z, b_one, NI: tl.constexpr,
                        NW: tl.constexpr, NC: tl.constexpr, NY: tl.constexpr, STORE_FACTORS: tl.constexpr,
                        BITS_I: tl.constexpr, BE: tl.constexpr):  # fmt: skip
    """The gradients of the attributes, from those of the first layer's z, and what STORE_FACTORS stores of its inputs,
    are written."""
    b_inputs, b_d_attr = (), ()
    for i in tl.static_range(NI):
        b_d_a = b_d_z[0] * tl.load(p_weights + i * NW)
        for u in tl.static_range(1, NW):
            b_d_a += b_d_z[u * NC] * tl.load(p_weights + i * NW + u)
        b_d_attr = b_d_attr + (b_d_a,)  # noqa: RUF005
        b_inputs = b_inputs + (tl.load(p_attr + o_edge * NI + i, m_edge, 0.0),)  # noqa: RUF005
    if NI > 0:
        store_rows(p_d_attr, o_edge, m_edge, b_d_attr, NI, NI, BITS_I, BE)
    if STORE_FACTORS:
        store_rows(p_y, o_column, m_edge, b_inputs + (b_one,), NI + 1, NY, BITS_I, BE)  # noqa: RUF005


@triton.jit(do_not_specialize=["first", "n_edges"])
def edges_backward(
    p_delta, p_attr, p_order, p_shell, p_scalars, p_weights, p_sample_rows, p_d_r, p_d_q, p_d_delta, p_d_attr,
    p_d_shell, p_y, p_d_z, first, n_edges,
    HARMONICS: tl.constexpr, POWERS: tl.constexpr, NM: tl.constexpr, NQ: tl.constexpr, NI: tl.constexpr,
    NW: tl.constexpr, NC: tl.constexpr, NS: tl.constexpr, NL: tl.constexpr, NR: tl.constexpr, NY: tl.constexpr,
    STORE_FACTORS: tl.constexpr, CUTOFF: tl.constexpr, FN: tl.constexpr, NEAR: tl.constexpr, SMALL: tl.constexpr,
    SOFT: tl.constexpr, ZERO: tl.constexpr, BITS: tl.constexpr, BITS_I: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + n_edges − 1 of d_r (E, NR) and d_q (E, NQ) → d_delta (E, 3) and d_attr (E, NI) in the
    edges' own order, and d_shell (programs,), the parts of that of σ. The gradients of the weights are sums over edges
    of products; STORE_FACTORS stores what is multiplied: y (NL, n_edges, NY), every layer's inputs and behind them 1,
    and d_z (NL, n_edges, NW NC)."""
    o_column = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_edge, o_row = o_column < n_edges, first + o_column
    o_edge = tl.load(p_order + o_row, m_edge, 0).to(tl.int64)
    b_x0, b_x1, b_x2, b_squared = frame.positions(p_delta, o_edge, m_edge, 3)
    b_radius = tl.sqrt(b_squared + SOFT)
    any_near = tl.min(tl.where(m_edge, b_radius, 1.0), 0) < NEAR
    b_one = b_radius * 0.0 + 1.0

    b_zs = ()  # of all layers but the first, whose z is made again: fewer registers
    b_z = first_linear(p_attr, o_edge, m_edge, b_radius, p_weights, NI, NW, NC)
    for n in tl.static_range(1, NL):
        b_y = activate(b_z, b_radius, any_near, p_sample_rows + (n - 1) * NS * 2 * NC, NW, NC, NS, FN, NEAR, SMALL)
        if STORE_FACTORS:
            store_rows(p_y + n * n_edges * NY, o_column, m_edge, b_y, NW * NC, NY, BITS, BE)
            tl.store(p_y + (n * n_edges + o_column) * NY + NW * NC, b_one, m_edge)
        b_z = linear(b_y, p_weights + (NI + NC) * NW + (n - 1) * (NC * NW + 1) * NW, NW, NC)
        b_zs = b_zs + b_z

    b_g = ()
    for w in tl.static_range(NW):
        for c in tl.static_range(NC):
            if c * NW + w < NR - 1:
                b_g = b_g + (tl.load(p_d_r + o_row * NR + c * NW + w, m_edge, 0.0),)  # noqa: RUF005
            else:
                b_g = b_g + (b_radius * 0.0,)  # noqa: RUF005
    b_factor = frame.radial_factor(b_squared, p_shell, p_scalars, CUTOFF, ZERO)
    b_d_factor, b_d_radius = tl.load(p_d_r + o_row * NR + NR - 1, m_edge, 0.0), b_radius * 0.0
    for n in tl.static_range(NL - 1, -1, -1):
        if n == 0:
            b_z = first_linear(p_attr, o_edge, m_edge, b_radius, p_weights, NI, NW, NC)
        else:
            b_z = ()
            for i in tl.static_range(NW * NC):
                b_z = b_z + (b_zs[(n - 1) * NW * NC + i],)  # noqa: RUF005
        p_layer = p_sample_rows + n * NS * 2 * NC
        b_d_z, b_more, b_product = activate_backward(b_z, b_g, b_radius, any_near, p_layer, NW, NC, NS, FN, NEAR, SMALL)
        if n == NL - 1:  # g is the gradient of r, not of y
            b_d_factor += b_product
            b_more *= b_factor
            b_scaled = ()
            for i in tl.static_range(NW * NC):
                b_scaled = b_scaled + (b_d_z[i] * b_factor,)  # noqa: RUF005
            b_d_z = b_scaled
        b_d_radius += b_more
        if STORE_FACTORS:
            store_rows(p_d_z + n * n_edges * (NW * NC), o_column, m_edge, b_d_z, NW * NC, NW * NC, BITS, BE)
        if n > 0:
            b_g = linear_backward(b_d_z, p_weights + (NI + NC) * NW + (n - 1) * (NC * NW + 1) * NW, NW, NC)

    # read again: held through the layers they would spill
    o_edge = tl.load(p_order + o_row, m_edge, 0).to(tl.int64)
    b_x0, b_x1, b_x2, b_squared = frame.positions(p_delta, o_edge, m_edge, 3)
    attributes_backward(p_attr, p_weights, p_d_attr, p_y, o_edge, o_column, m_edge, b_d_z, b_one, NI, NW, NC, NY,
                        STORE_FACTORS, BITS_I, BE)  # fmt: skip
    b_slope, b_d_sigma = frame.radial_factor_backward(b_squared, b_d_factor, p_shell, p_scalars, CUTOFF, ZERO)
    tl.store(p_d_shell + tl.program_id(0), tl.sum(b_d_sigma, 0))
    b_d_x0, b_d_x1, b_d_x2 = harmonics_backward(p_d_q, o_row, m_edge, b_x0, b_x1, b_x2, b_radius, b_d_radius, HARMONICS,
                                                POWERS, NM, NQ)  # fmt: skip
    tl.store(p_d_delta + o_edge * 3, b_d_x0 + b_slope * b_x0, m_edge)
    tl.store(p_d_delta + o_edge * 3 + 1, b_d_x1 + b_slope * b_x1, m_edge)
    tl.store(p_d_delta + o_edge * 3 + 2, b_d_x2 + b_slope * b_x2, m_edge)
