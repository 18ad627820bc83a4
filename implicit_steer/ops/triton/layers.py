"""The hidden layers of a block of edges: y → A⁻ φ(A (W y + b)) per layer, A · W merged into one matrix P.

Samples u = y P + b are made a tile of BU at a time and never leave the chip. Regular frames carry coefficients of order
>= 1 divided by the radius r: with u₀ = y₀ P₀ + b and w = y₁ P₁ (of the first layer: w = b₁, from the position),

    u = u₀ + r w,   p = φ(u),   d = (p − φ(u₀)) / r,   y₀ ← p Q₀,   y₁ ← d Q₁,

Q = A⁻ᵀ. Q₁ annihilates φ(u₀), so p / r may stand for d but near the origin, where the difference quotient does.

Of one layer ``weights`` holds P₀ (BI, NU), P₁ (B1, NU; not of the first layer), b (NU,) and, where the frame is regular
and the layer the first, b₁ (NU,); all layers one after the other. ``inverse`` holds Q₀ (NU, B0) and Q₁ (NU, B1) per
layer. Padding is 0, and φ(0) = 0.

Prefixes and constants are those of the package's glossary. Coefficients have the suffixes 0 (order 0) and 1 (order >=
1) of the formulas; where the frame is not regular there are none of order >= 1, and what has the suffix 1 is not used.
BI: rows of the layer's P₀, which for all layers but the first are B0. ``i_weights`` and ``i_inverse``: where the
layer's part of ``weights`` and ``inverse`` begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations


@triton.jit
def samples(b_y0, b_y1, p_weights, i_weights, o_in0, o_1, o_u, FIRST: tl.constexpr, REGULAR: tl.constexpr,
            BI: tl.constexpr, B1: tl.constexpr, NU: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """u₀ and w (BE, BU) of the samples o_u, from a layer's inputs (BE, BI) and (BE, B1)."""
    b_u0 = activations.dot(b_y0, tl.load(p_weights + i_weights + o_in0[:, None] * NU + o_u[None, :]), PREC)
    if FIRST:
        b_u0 += tl.load(p_weights + i_weights + BI * NU + o_u)[None, :]
        b_w = b_u0
        if REGULAR:
            b_w = 0.0 * b_u0 + tl.load(p_weights + i_weights + (BI + 1) * NU + o_u)[None, :]
    else:
        b_w = b_u0
        if REGULAR:
            p_p1 = p_weights + (i_weights + BI * NU) + o_1[:, None] * NU + o_u[None, :]
            b_w = activations.dot(b_y1, tl.load(p_p1), PREC)
            b_u0 += tl.load(p_weights + i_weights + (BI + B1) * NU + o_u)[None, :]
        else:
            b_u0 += tl.load(p_weights + i_weights + BI * NU + o_u)[None, :]
    return b_u0, b_w


@triton.jit
def layer(b_y0, b_y1, b_radius, any_near, p_weights, i_weights, p_inverse, i_inverse, o_in0, o_0, o_1,
          FIRST: tl.constexpr, REGULAR: tl.constexpr, BI: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
          NU: tl.constexpr, BU: tl.constexpr, FN: tl.constexpr, NEAR: tl.constexpr, SMALL: tl.constexpr,
          BE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """A layer's outputs (BE, B0), (BE, B1) from its inputs (BE, BI), (BE, B1)."""
    b_out0, b_out1 = tl.zeros((BE, B0), b_y0.dtype), tl.zeros((BE, B1), b_y0.dtype)
    for i_tile in tl.range(0, NU, BU):
        o_u = i_tile + tl.arange(0, BU)
        b_u0, b_w = samples(b_y0, b_y1, p_weights, i_weights, o_in0, o_1, o_u, FIRST, REGULAR, BI, B1, NU, PREC)
        if REGULAR:
            b_p = activations.value(b_u0 + b_radius[:, None] * b_w, FN)
            b_d = b_p / b_radius[:, None]
            if any_near:
                b_quotient = b_w * activations.quotient(b_u0, b_radius[:, None] * b_w, FN, SMALL)
                b_d = tl.where((b_radius < NEAR)[:, None], b_quotient, b_d)
            b_q1 = tl.load(p_inverse + i_inverse + NU * B0 + o_u[:, None] * B1 + o_1[None, :])
            b_out1 = activations.add_dot(b_out1, b_d, b_q1, PREC)
        else:
            b_p = activations.value(b_u0, FN)
        b_q0 = tl.load(p_inverse + i_inverse + o_u[:, None] * B0 + o_0[None, :])
        b_out0 = activations.add_dot(b_out0, b_p, b_q0, PREC)
    return b_out0, b_out1


@triton.jit
def near_origin(b_radius, NEAR: tl.constexpr):
    """Whether any edge of the block is so near the origin that it needs the difference quotient."""
    return tl.min(b_radius, 0) < NEAR


@triton.jit(do_not_specialize=["first", "end", "n_edges"])
def layers_forward(
    p_inputs, p_radius, p_factor, p_weights, p_inverse, p_r, p_y, first, end, n_edges,
    NL: tl.constexpr, REGULAR: tl.constexpr, NI: tl.constexpr, BI: tl.constexpr, N0: tl.constexpr, B0: tl.constexpr,
    N1: tl.constexpr, B1: tl.constexpr, NR: tl.constexpr, NU: tl.constexpr, BU: tl.constexpr, FN: tl.constexpr,
    NEAR: tl.constexpr, SMALL: tl.constexpr, STORE_R: tl.constexpr, STORE_Y: tl.constexpr, BE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Edges first .. end − 1: inputs (E, NI), radius and factor (E,) → with STORE_R r = factor · (y, 1) (E, NR) of the
    last layer, with STORE_Y every layer's y (NL, n_edges, N0 + N1), edge ``first`` in row 0."""
    o_0, o_1, o_i = tl.arange(0, B0), tl.arange(0, B1), tl.arange(0, BI)
    for i_block in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(end - first, BE), tl.num_programs(0)):
        o_row = i_block * BE + tl.arange(0, BE)
        o_edge = first + o_row
        m_edge = o_edge < end
        b_y0 = tl.load(p_inputs + o_edge[:, None] * NI + o_i[None, :], m_edge[:, None] & (o_i < NI)[None, :], 0.0)
        b_y1 = b_y0
        b_radius = tl.load(p_factor + o_edge, m_edge, 0.0)
        any_near = False
        if REGULAR:
            b_radius = tl.load(p_radius + o_edge, m_edge, 1.0)
            any_near = near_origin(b_radius, NEAR)
        i_weights, i_inverse = 0, 0
        for n in tl.static_range(NL):
            if n == 0:
                b_y0, b_y1 = layer(b_y0, b_y1, b_radius, any_near, p_weights, i_weights, p_inverse, i_inverse, o_i,
                                   o_0, o_1, True, REGULAR, BI, B0, B1, NU, BU, FN, NEAR, SMALL, BE, PREC)  # fmt: skip
                i_weights += (BI + 1 + REGULAR) * NU
            else:
                b_y0, b_y1 = layer(b_y0, b_y1, b_radius, any_near, p_weights, i_weights, p_inverse, i_inverse, o_0,
                                   o_0, o_1, False, REGULAR, B0, B0, B1, NU, BU, FN, NEAR, SMALL, BE, PREC)  # fmt: skip
                i_weights += (B0 + B1 * REGULAR + 1) * NU
            i_inverse += NU * (B0 + B1 * REGULAR)
            if STORE_Y:
                p_row = p_y + (n * n_edges + o_row) * (N0 + N1)
                tl.store(p_row[:, None] + o_0[None, :], b_y0, m_edge[:, None] & (o_0 < N0)[None, :])
                if REGULAR:
                    tl.store(p_row[:, None] + N0 + o_1[None, :], b_y1, m_edge[:, None] & (o_1 < N1)[None, :])
        if STORE_R:
            b_factor = tl.load(p_factor + o_edge, m_edge, 0.0)
            p_row = p_r + o_edge * NR
            used0, used1 = min(N0, NR - 1), NR - 1 - N0  # columns of r
            tl.store(p_row[:, None] + o_0[None, :], b_y0 * b_factor[:, None], m_edge[:, None] & (o_0 < used0)[None, :])
            if REGULAR:
                p_r1 = p_row[:, None] + N0 + o_1[None, :]
                tl.store(p_r1, b_y1 * b_factor[:, None], m_edge[:, None] & (o_1 < used1)[None, :])
            tl.store(p_row + NR - 1, b_factor, m_edge)


@triton.jit
def sample_gradients(b_y0, b_y1, b_g0, b_g1, b_radius, any_near, p_weights, i_weights, p_inverse, i_inverse, o_in0,
                     o_0, o_1, o_u, FIRST: tl.constexpr, REGULAR: tl.constexpr, BI: tl.constexpr, B0: tl.constexpr,
                     B1: tl.constexpr, NU: tl.constexpr, FN: tl.constexpr, NEAR: tl.constexpr, SMALL: tl.constexpr,
                     PREC: tl.constexpr):  # fmt: skip
    """From the gradients g of a layer's outputs those of u₀, w (BE, BU) and r (BE,), of the samples o_u."""
    b_u0, b_w = samples(b_y0, b_y1, p_weights, i_weights, o_in0, o_1, o_u, FIRST, REGULAR, BI, B1, NU, PREC)
    b_d_p = activations.dot(b_g0, tl.load(p_inverse + i_inverse + o_u[None, :] * B0 + o_0[:, None]), PREC)
    if REGULAR:
        b_q1 = tl.load(p_inverse + i_inverse + NU * B0 + o_u[None, :] * B1 + o_1[:, None])
        b_d_d = activations.dot(b_g1, b_q1, PREC)
        b_r = b_radius[:, None]
        b_u = b_u0 + b_r * b_w
        b_slope = activations.slope(b_u, FN)
        b_d_u0 = (b_d_p + b_d_d / b_r) * b_slope
        b_d_w = (b_r * b_d_p + b_d_d) * b_slope  # d's derivative with respect to w is φ′(u) everywhere
        b_d_r = b_d_u0 * b_w - b_d_d * activations.value(b_u, FN) / (b_r * b_r)
        if any_near:
            m_near = (b_radius < NEAR)[:, None]
            b_quotient = activations.quotient(b_u0, b_r * b_w, FN, SMALL)
            b_of_b, b_of_k = activations.quotient_slopes(b_u0, b_r * b_w, b_quotient, FN, SMALL)
            b_d_u0 = tl.where(m_near, b_d_p * b_slope + b_d_d * b_w * b_of_b, b_d_u0)
            b_d_r = tl.where(m_near, b_d_p * b_slope * b_w + b_d_d * b_w * b_w * b_of_k, b_d_r)
        return b_d_u0, b_d_w, tl.sum(b_d_r, 1)
    else:
        b_d_u0 = b_d_p * activations.slope(b_u0, FN)
        return b_d_u0, b_d_u0, b_radius


@triton.jit
def load_layer(p_y, p_d_y, p_inputs, p_radius, o_row, o_edge, m_edge, o_in0, o_0, o_1, FIRST: tl.constexpr,
               REGULAR: tl.constexpr, NI: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr):  # fmt: skip
    """A layer's inputs y₀, y₁, the gradients of its outputs g₀, g₁, and r; o_row: rows of y and d_y."""
    width = N0 + N1
    if FIRST:
        p_in = p_inputs + o_edge[:, None] * NI + o_in0[None, :]
        b_y0 = tl.load(p_in, m_edge[:, None] & (o_in0 < NI)[None, :], 0.0)
    else:
        p_in = p_y + o_row[:, None] * width + o_in0[None, :]
        b_y0 = tl.load(p_in, m_edge[:, None] & (o_in0 < N0)[None, :], 0.0)
    b_g0 = tl.load(p_d_y + o_row[:, None] * width + o_0[None, :], m_edge[:, None] & (o_0 < N0)[None, :], 0.0)
    b_y1, b_g1, b_radius = b_y0, b_g0, tl.sum(b_g0, 1) * 0.0
    if REGULAR:
        b_radius = tl.load(p_radius + o_edge, m_edge, 1.0)
        p_g1 = p_d_y + o_row[:, None] * width + N0 + o_1[None, :]
        b_g1 = tl.load(p_g1, m_edge[:, None] & (o_1 < N1)[None, :], 0.0)
        if not FIRST:
            p_y1 = p_y + o_row[:, None] * width + N0 + o_1[None, :]
            b_y1 = tl.load(p_y1, m_edge[:, None] & (o_1 < N1)[None, :], 0.0)
    return b_y0, b_y1, b_g0, b_g1, b_radius


@triton.jit(do_not_specialize=["first", "end", "i_weights", "i_inverse"])
def layers_backward_inputs(
    p_inputs, p_radius, p_y, p_d_y, p_weights, p_inverse, p_d_in, p_d_radius, first, end, i_weights, i_inverse,
    FIRST: tl.constexpr, REGULAR: tl.constexpr, NI: tl.constexpr, BI: tl.constexpr, N0: tl.constexpr,
    B0: tl.constexpr, N1: tl.constexpr, B1: tl.constexpr, NU: tl.constexpr, BU: tl.constexpr, FN: tl.constexpr,
    NEAR: tl.constexpr, SMALL: tl.constexpr, ADD: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One layer, edges first .. end − 1, which are rows 0 and following of y and d_y: its inputs, y (edges, N0 + N1)
    or, of the FIRST, inputs (E, NI), and the gradient d_y (edges, N0 + N1) of its outputs → that of its inputs, d_in,
    of their shape; and its part of d_radius (E,), with ADD added to what is there."""
    o_0, o_1, o_in0 = tl.arange(0, B0), tl.arange(0, B1), tl.arange(0, BI)
    for i_block in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(end - first, BE), tl.num_programs(0)):
        o_row = i_block * BE + tl.arange(0, BE)
        o_edge = first + o_row
        m_edge = o_edge < end
        b_y0, b_y1, b_g0, b_g1, b_radius = load_layer(p_y, p_d_y, p_inputs, p_radius, o_row, o_edge, m_edge, o_in0, o_0,
                                                      o_1, FIRST, REGULAR, NI, N0, N1)  # fmt: skip
        any_near = False
        if REGULAR:
            any_near = near_origin(b_radius, NEAR)
        b_d_y0, b_d_y1 = tl.zeros((BE, BI), b_y0.dtype), tl.zeros((BE, B1), b_y0.dtype)
        b_d_radius = tl.zeros((BE,), b_y0.dtype)
        for i_tile in tl.range(0, NU, BU):
            o_u = i_tile + tl.arange(0, BU)
            b_d_u0, b_d_w, b_more = sample_gradients(b_y0, b_y1, b_g0, b_g1, b_radius, any_near, p_weights, i_weights,
                                                     p_inverse, i_inverse, o_in0, o_0, o_1, o_u, FIRST, REGULAR, BI, B0,
                                                     B1, NU, FN, NEAR, SMALL, PREC)  # fmt: skip
            b_d_radius += b_more
            b_p0 = tl.load(p_weights + i_weights + o_in0[None, :] * NU + o_u[:, None])
            b_d_y0 = activations.add_dot(b_d_y0, b_d_u0, b_p0, PREC)
            if REGULAR and not FIRST:
                b_p1 = tl.load(p_weights + i_weights + BI * NU + o_1[None, :] * NU + o_u[:, None])
                b_d_y1 = activations.add_dot(b_d_y1, b_d_w, b_p1, PREC)
        if FIRST:
            p_in = p_d_in + o_edge[:, None] * NI + o_in0[None, :]
            tl.store(p_in, b_d_y0, m_edge[:, None] & (o_in0 < NI)[None, :])
        else:
            p_row = p_d_in + o_row[:, None] * (N0 + N1)
            tl.store(p_row + o_in0[None, :], b_d_y0, m_edge[:, None] & (o_in0 < N0)[None, :])
            if REGULAR:
                tl.store(p_row + N0 + o_1[None, :], b_d_y1, m_edge[:, None] & (o_1 < N1)[None, :])
        if REGULAR:
            if ADD:
                b_d_radius += tl.load(p_d_radius + o_edge, m_edge, 0.0)
            tl.store(p_d_radius + o_edge, b_d_radius, m_edge)


@triton.jit
def opaque_zero(i_block):
    """0, which the compiler cannot know since it depends on the block. Added to the addresses of the weights it keeps
    their loads in the loop over blocks; otherwise they are held in registers all through the loop."""
    return tl.minimum(i_block, 0)


@triton.jit(do_not_specialize=["first", "end", "i_weights", "i_inverse", "n_weights"])
def layers_backward_weights(
    p_inputs, p_radius, p_y, p_d_y, p_weights, p_inverse, p_d_weights, first, end, i_weights, i_inverse, n_weights,
    FIRST: tl.constexpr, REGULAR: tl.constexpr, NI: tl.constexpr, BI: tl.constexpr, N0: tl.constexpr,
    B0: tl.constexpr, N1: tl.constexpr, B1: tl.constexpr, NU: tl.constexpr, BU: tl.constexpr, FN: tl.constexpr,
    NEAR: tl.constexpr, SMALL: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One layer and the tile program_id(1) of samples, arguments as of layers_backward_inputs: the gradient of its
    weights, summed over every num_programs(0)-th block of edges, in row program_id(0) of d_weights (programs,
    n_weights)."""
    o_0, o_1, o_in0 = tl.arange(0, B0), tl.arange(0, B1), tl.arange(0, BI)
    o_u = tl.program_id(1) * BU + tl.arange(0, BU)
    # samples first: sm_100 would use its fifth-generation tensor cores, with their trap, where 64 rows come first
    b_d_p0 = tl.zeros((BU, BI), p_weights.dtype.element_ty)
    b_d_p1 = tl.zeros((BU, B1), p_weights.dtype.element_ty)
    b_d_b0, b_d_b1 = tl.zeros((BU,), p_weights.dtype.element_ty), tl.zeros((BU,), p_weights.dtype.element_ty)
    for i_block in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(end - first, BE), tl.num_programs(0)):
        o_row = i_block * BE + tl.arange(0, BE)
        o_edge = first + o_row
        m_edge = o_edge < end
        b_y0, b_y1, b_g0, b_g1, b_radius = load_layer(p_y, p_d_y, p_inputs, p_radius, o_row, o_edge, m_edge, o_in0, o_0,
                                                      o_1, FIRST, REGULAR, NI, N0, N1)  # fmt: skip
        any_near = False
        if REGULAR:
            any_near = near_origin(b_radius, NEAR)
        zero = opaque_zero(i_block)
        b_d_u0, b_d_w, _ = sample_gradients(b_y0, b_y1, b_g0, b_g1, b_radius, any_near, p_weights, i_weights + zero,
                                            p_inverse, i_inverse + zero, o_in0, o_0, o_1, o_u, FIRST, REGULAR, BI, B0,
                                            B1, NU, FN, NEAR, SMALL, PREC)  # fmt: skip
        b_d_p0 = activations.add_dot(b_d_p0, tl.trans(b_d_u0), b_y0, PREC)
        b_d_b0 += tl.sum(b_d_u0, 0)
        if REGULAR:
            if FIRST:
                b_d_b1 += tl.sum(b_d_w, 0)
            else:
                b_d_p1 = activations.add_dot(b_d_p1, tl.trans(b_d_w), b_y1, PREC)
    p_row = p_d_weights + tl.program_id(0).to(tl.int64) * n_weights
    tl.store(p_row + o_in0[None, :] * NU + o_u[:, None], b_d_p0)
    biases = BI  # rows before them
    if REGULAR and not FIRST:
        tl.store(p_row + (BI + o_1[None, :]) * NU + o_u[:, None], b_d_p1)
        biases = BI + B1
    tl.store(p_row + biases * NU + o_u, b_d_b0)
    if REGULAR and FIRST:
        tl.store(p_row + (biases + 1) * NU + o_u, b_d_b1)
