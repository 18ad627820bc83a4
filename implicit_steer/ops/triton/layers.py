"""The hidden layers of a block of edges: y → A⁻ φ(A (W y + b)) per layer, A · W merged into one matrix P.

Samples u = y P + b are made a tile of TH at a time and never leave the chip. Regular frames carry coefficients of order
>= 1 divided by the radius r: with u₀ = y₀ P₀ + b and w = y₁ P₁ (of the first layer: w = b₁, from the position),

    u = u₀ + r w,   p = φ(u),   d = (p − φ(u₀)) / r,   y₀ ← p Q₀,   y₁ ← d Q₁,

Q = A⁻ᵀ. Q₁ annihilates φ(u₀), so p / r may stand for d but near the origin, where the difference quotient does.

Of one layer ``weights`` holds P₀ (K0, HP), P₁ (K1, HP; not of the first layer), b (HP,) and, where the frame is regular
and the layer the first, b₁ (HP,); all layers one after the other. ``inverse`` holds Q₀ (HP, K0) and Q₁ (HP, K1) per
layer. Padding is 0, and φ(0) = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations


@triton.jit
def tile_weights(weights, base, k, h, K: tl.constexpr, HP: tl.constexpr):
    """P[k, h], of the K rows at ``base``."""
    return tl.load(weights + base + k[:, None] * HP + h[None, :])


@triton.jit
def samples(y0, y1, weights, base, k0, k1, h, FIRST: tl.constexpr, REGULAR: tl.constexpr, K0: tl.constexpr,
            K1: tl.constexpr, HP: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """u₀ and w (BE, TH) of the columns h; K0: rows of this layer's P₀."""
    u0 = activations.dot(y0, tile_weights(weights, base, k0, h, K0, HP), PREC)
    if FIRST:
        u0 += tl.load(weights + base + K0 * HP + h)[None, :]
        w = u0
        if REGULAR:
            w = 0.0 * u0 + tl.load(weights + base + (K0 + 1) * HP + h)[None, :]
    else:
        w = u0
        if REGULAR:
            w = activations.dot(y1, tile_weights(weights, base + K0 * HP, k1, h, K1, HP), PREC)
            u0 += tl.load(weights + base + (K0 + K1) * HP + h)[None, :]
        else:
            u0 += tl.load(weights + base + K0 * HP + h)[None, :]
    return u0, w


@triton.jit
def layer(y0, y1, r, close, weights, base, inverse, at, k0, n0, n1, FIRST: tl.constexpr, REGULAR: tl.constexpr,
          KI: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, HP: tl.constexpr, TH: tl.constexpr, FN: tl.constexpr,
          NEAR: tl.constexpr, SMALL: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """The layer's outputs (BE, K0), (BE, K1). KI, k0: rows of its P₀ and their numbers; ``close``: any edge near 0."""
    out0, out1 = tl.zeros((BE, K0), y0.dtype), tl.zeros((BE, K1), y0.dtype)
    for tile in tl.range(0, HP, TH):
        h = tile + tl.arange(0, TH)
        u0, w = samples(y0, y1, weights, base, k0, n1, h, FIRST, REGULAR, KI, K1, HP, PREC)
        if REGULAR:
            p = activations.value(u0 + r[:, None] * w, FN)
            d = p / r[:, None]
            if close:
                quotient = w * activations.quotient(u0, r[:, None] * w, FN, SMALL)
                d = tl.where((r < NEAR)[:, None], quotient, d)
            back = tl.load(inverse + at + HP * K0 + h[:, None] * K1 + n1[None, :])
            out1 = activations.add_dot(out1, d, back, PREC)
        else:
            p = activations.value(u0, FN)
        out0 = activations.add_dot(out0, p, tl.load(inverse + at + h[:, None] * K0 + n0[None, :]), PREC)
    return out0, out1


@triton.jit
def is_close(r, NEAR: tl.constexpr):
    return tl.min(r, 0) < NEAR


@triton.jit
def layers_forward(
    inputs, radius, factor, weights, inverse, r_out, y_out, begin, end, total,
    NL: tl.constexpr, REGULAR: tl.constexpr, NI: tl.constexpr, KI: tl.constexpr, N0: tl.constexpr, K0: tl.constexpr,
    N1: tl.constexpr, K1: tl.constexpr, NR: tl.constexpr, HP: tl.constexpr, TH: tl.constexpr, FN: tl.constexpr,
    NEAR: tl.constexpr, SMALL: tl.constexpr, STORE_R: tl.constexpr, STORE_Y: tl.constexpr, BE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Edges begin .. end−1: inputs (E, NI), radius and factor (E,) → r = factor · (y, 1) (E, NR) of the last layer, and
    with STORE_Y every layer's y (NL, total, N0 + N1), edge ``begin`` in row 0."""
    n0, n1, ki = tl.arange(0, K0), tl.arange(0, K1), tl.arange(0, KI)
    for block in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(end - begin, BE), tl.num_programs(0)):
        row = block * BE + tl.arange(0, BE)
        e = begin + row
        ok = e < end
        y0 = tl.load(inputs + e[:, None] * NI + ki[None, :], ok[:, None] & (ki < NI)[None, :], 0.0)
        y1 = y0
        r = tl.load(factor + e, ok, 0.0)
        close = False
        if REGULAR:
            r = tl.load(radius + e, ok, 1.0)
            close = is_close(r, NEAR)
        base, at = 0, 0
        for n in tl.static_range(NL):
            if n == 0:
                y0, y1 = layer(y0, y1, r, close, weights, base, inverse, at, ki, n0, n1, True, REGULAR, KI, K0, K1, HP,
                               TH, FN, NEAR, SMALL, BE, PREC)  # fmt: skip
                base += (KI + 1 + REGULAR) * HP
            else:
                y0, y1 = layer(y0, y1, r, close, weights, base, inverse, at, n0, n0, n1, False, REGULAR, K0, K0, K1,
                               HP, TH, FN, NEAR, SMALL, BE, PREC)  # fmt: skip
                base += (K0 + K1 * REGULAR + 1) * HP
            at += HP * (K0 + K1 * REGULAR)
            if STORE_Y:
                to = y_out + (n * total + row) * (N0 + N1)
                tl.store(to[:, None] + n0[None, :], y0, ok[:, None] & (n0 < N0)[None, :])
                if REGULAR:
                    tl.store(to[:, None] + N0 + n1[None, :], y1, ok[:, None] & (n1 < N1)[None, :])
        if STORE_R:
            s = tl.load(factor + e, ok, 0.0)
            to = r_out + e * NR
            tl.store(to[:, None] + n0[None, :], y0 * s[:, None], ok[:, None] & (n0 < min(N0, NR - 1))[None, :])
            if REGULAR:
                tl.store(to[:, None] + N0 + n1[None, :], y1 * s[:, None], ok[:, None] & (n1 < NR - 1 - N0)[None, :])
            tl.store(to + NR - 1, s, ok)


@triton.jit
def sample_gradients(y0, y1, g0, g1, r, close, weights, base, inverse, at, k0, n0, n1, h, FIRST: tl.constexpr,
                     REGULAR: tl.constexpr, KI: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, HP: tl.constexpr,
                     FN: tl.constexpr, NEAR: tl.constexpr, SMALL: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """From the gradients g of the layer's outputs those of u₀, w (BE, TH) and r (BE,), of the columns h."""
    u0, w = samples(y0, y1, weights, base, k0, n1, h, FIRST, REGULAR, KI, K1, HP, PREC)
    dp = activations.dot(g0, tl.load(inverse + at + h[None, :] * K0 + n0[:, None]), PREC)
    if REGULAR:
        dd = activations.dot(g1, tl.load(inverse + at + HP * K0 + h[None, :] * K1 + n1[:, None]), PREC)
        rr = r[:, None]
        u = u0 + rr * w
        prime = activations.slope(u, FN)
        du0 = (dp + dd / rr) * prime
        dw = (rr * dp + dd) * prime  # d's derivative with respect to w is φ′(u) everywhere
        dr = du0 * w - dd * activations.value(u, FN) / (rr * rr)
        if close:
            near = (r < NEAR)[:, None]
            quotient = activations.quotient(u0, rr * w, FN, SMALL)
            of_b, of_k = activations.quotient_slopes(u0, rr * w, quotient, FN, SMALL)
            du0 = tl.where(near, dp * prime + dd * w * of_b, du0)
            dr = tl.where(near, dp * prime * w + dd * w * w * of_k, dr)
        return du0, dw, tl.sum(dr, 1)
    else:
        du0 = dp * activations.slope(u0, FN)
        return du0, du0, r


@triton.jit
def load_layer(y, d_y, inputs, radius, row, e, ok, k0, n0, n1, FIRST: tl.constexpr, REGULAR: tl.constexpr,
               NI: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr):  # fmt: skip
    """A layer's inputs y₀, y₁, the gradients of its outputs g₀, g₁, and r. Rows of y and d_y: the edge − begin."""
    width = N0 + N1
    if FIRST:
        y0 = tl.load(inputs + e[:, None] * NI + k0[None, :], ok[:, None] & (k0 < NI)[None, :], 0.0)
    else:
        y0 = tl.load(y + row[:, None] * width + k0[None, :], ok[:, None] & (k0 < N0)[None, :], 0.0)
    g0 = tl.load(d_y + row[:, None] * width + n0[None, :], ok[:, None] & (n0 < N0)[None, :], 0.0)
    y1, g1, r = y0, g0, tl.sum(g0, 1) * 0.0
    if REGULAR:
        r = tl.load(radius + e, ok, 1.0)
        g1 = tl.load(d_y + row[:, None] * width + N0 + n1[None, :], ok[:, None] & (n1 < N1)[None, :], 0.0)
        if not FIRST:
            y1 = tl.load(y + row[:, None] * width + N0 + n1[None, :], ok[:, None] & (n1 < N1)[None, :], 0.0)
    return y0, y1, g0, g1, r


@triton.jit
def layers_backward_inputs(
    inputs, radius, y, d_y, weights, inverse, d_in, d_radius, begin, end, base, at,
    FIRST: tl.constexpr, REGULAR: tl.constexpr, NI: tl.constexpr, KI: tl.constexpr, N0: tl.constexpr,
    K0: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr, HP: tl.constexpr, TH: tl.constexpr, FN: tl.constexpr,
    NEAR: tl.constexpr, SMALL: tl.constexpr, ADD: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One layer: y and d_y (edges, N0 + N1), its inputs and the gradient of its outputs → that of its inputs, d_in, of
    the same shape, or (E, NI) if it is the first; and its part of d_radius, added to what is there with ADD. KI: rows
    of its P₀; base, at: where its weights and inverse start."""
    n0, n1, k0 = tl.arange(0, K0), tl.arange(0, K1), tl.arange(0, KI)
    for block in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(end - begin, BE), tl.num_programs(0)):
        row = block * BE + tl.arange(0, BE)
        e = begin + row
        ok = e < end
        y0, y1, g0, g1, r = load_layer(y, d_y, inputs, radius, row, e, ok, k0, n0, n1, FIRST, REGULAR, NI, N0, N1)
        close = False
        if REGULAR:
            close = is_close(r, NEAR)
        dy0, dy1, dr = tl.zeros((BE, KI), y0.dtype), tl.zeros((BE, K1), y0.dtype), tl.zeros((BE,), y0.dtype)
        for tile in tl.range(0, HP, TH):
            h = tile + tl.arange(0, TH)
            du0, dw, more = sample_gradients(y0, y1, g0, g1, r, close, weights, base, inverse, at, k0, n0, n1, h, FIRST,
                                             REGULAR, KI, K0, K1, HP, FN, NEAR, SMALL, PREC)  # fmt: skip
            dr += more
            p0 = tl.load(weights + base + k0[None, :] * HP + h[:, None])
            dy0 = activations.add_dot(dy0, du0, p0, PREC)
            if REGULAR and not FIRST:
                p1 = tl.load(weights + base + KI * HP + n1[None, :] * HP + h[:, None])
                dy1 = activations.add_dot(dy1, dw, p1, PREC)
        if FIRST:
            tl.store(d_in + e[:, None] * NI + k0[None, :], dy0, ok[:, None] & (k0 < NI)[None, :])
        else:
            to = d_in + row[:, None] * (N0 + N1)
            tl.store(to + k0[None, :], dy0, ok[:, None] & (k0 < N0)[None, :])
            if REGULAR:
                tl.store(to + N0 + n1[None, :], dy1, ok[:, None] & (n1 < N1)[None, :])
        if REGULAR:
            if ADD:
                dr += tl.load(d_radius + e, ok, 0.0)
            tl.store(d_radius + e, dr, ok)


@triton.jit
def layers_backward_weights(
    inputs, radius, y, d_y, weights, inverse, d_weights, begin, end, base, at, part,
    FIRST: tl.constexpr, REGULAR: tl.constexpr, NI: tl.constexpr, KI: tl.constexpr, N0: tl.constexpr,
    K0: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr, HP: tl.constexpr, TH: tl.constexpr, FN: tl.constexpr,
    NEAR: tl.constexpr, SMALL: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One layer and one tile of samples per program_id(1): the gradient of its weights, summed over every
    num_programs(0)-th block of edges, at ``d_weights + program_id(0) · part``."""
    n0, n1, k0 = tl.arange(0, K0), tl.arange(0, K1), tl.arange(0, KI)
    h = tl.program_id(1) * TH + tl.arange(0, TH)
    # samples first: sm_100 would use its fifth-generation tensor cores, with their trap, where 64 rows come first
    dp0, dp1 = tl.zeros((TH, KI), weights.dtype.element_ty), tl.zeros((TH, K1), weights.dtype.element_ty)
    db0, db1 = tl.zeros((TH,), weights.dtype.element_ty), tl.zeros((TH,), weights.dtype.element_ty)
    for block in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(end - begin, BE), tl.num_programs(0)):
        row = block * BE + tl.arange(0, BE)
        e = begin + row
        ok = e < end
        y0, y1, g0, g1, r = load_layer(y, d_y, inputs, radius, row, e, ok, k0, n0, n1, FIRST, REGULAR, NI, N0, N1)
        close = False
        if REGULAR:
            close = is_close(r, NEAR)
        opaque = tl.minimum(block, 0)  # 0: keeps the weights from being held in registers over the loop
        du0, dw, _ = sample_gradients(y0, y1, g0, g1, r, close, weights, base + opaque, inverse, at + opaque, k0, n0,
                                      n1, h, FIRST, REGULAR, KI, K0, K1, HP, FN, NEAR, SMALL, PREC)  # fmt: skip
        dp0 = activations.add_dot(dp0, tl.trans(du0), y0, PREC)
        db0 += tl.sum(du0, 0)
        if REGULAR:
            if FIRST:
                db1 += tl.sum(dw, 0)
            else:
                dp1 = activations.add_dot(dp1, tl.trans(dw), y1, PREC)
    to = d_weights + tl.program_id(0).to(tl.int64) * part
    tl.store(to + k0[None, :] * HP + h[:, None], dp0)
    after = KI
    if REGULAR and not FIRST:
        tl.store(to + (KI + n1[None, :]) * HP + h[:, None], dp1)
        after = KI + K1
    tl.store(to + after * HP + h, db0)
    if REGULAR and FIRST:
        tl.store(to + (after + 1) * HP + h, db1)
