"""Packed weights from the parameters, and the parameters' gradients from theirs: the sums of ``packing.Entries``.

Prefixes are those of the package's glossary; ``p_numbers`` are the parameters, and behind them the statistics of the
batch norms."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_factor(p_numbers, p_factors, o_factor, EPS: tl.constexpr):
    """The factors with these numbers: a, or bias − mean · a, with a = weight / sqrt(variance + eps)."""
    o_weight, o_var = tl.load(p_factors + 4 * o_factor), tl.load(p_factors + 4 * o_factor + 1)
    o_bias, o_mean = tl.load(p_factors + 4 * o_factor + 2), tl.load(p_factors + 4 * o_factor + 3)
    b_a = tl.load(p_numbers + o_weight, o_weight >= 0, 1.0)
    b_a = tl.where(o_var >= 0, b_a / tl.sqrt(tl.load(p_numbers + o_var, o_var >= 0, 1.0) + EPS), b_a)
    b_shift = tl.load(p_numbers + o_bias, o_bias >= 0, 0.0) - tl.load(p_numbers + o_mean, o_mean >= 0, 0.0) * b_a
    return tl.where(o_mean >= 0, b_shift, b_a)


@triton.jit(do_not_specialize=["n_rows"])
def pack(
    p_numbers, p_factors, p_rowptr, p_column, p_factor, p_value, p_source, p_gradient, p_out, n_rows,
    EPS: tl.constexpr, NORMS: tl.constexpr, BACKWARD: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out (n_rows,): BE products per program at a time, BN of a row. BACKWARD: entries are times the gradient of the
    packed weight ``source``. Without NORMS all factors are 1."""
    ROWS: tl.constexpr = (BE + BN - 1) // BN
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n_rows
    o_first, o_end = tl.load(p_rowptr + o_row, m_row, 0), tl.load(p_rowptr + o_row + 1, m_row, 0)
    b_out = tl.zeros((ROWS, BN), p_out.dtype.element_ty)
    for i_entry in tl.range(0, tl.max(o_end - o_first, 0), BN):
        o_entry = (o_first + i_entry)[:, None] + tl.arange(0, BN)[None, :]
        m_entry = o_entry < o_end[:, None]
        o_column = tl.load(p_column + o_entry, m_entry, -1)
        b_term = tl.load(p_value + o_entry, m_entry, 0.0) * tl.load(p_numbers + o_column, o_column >= 0, 1.0)
        if NORMS:
            b_term *= norm_factor(p_numbers, p_factors, tl.load(p_factor + o_entry, m_entry, 0), EPS)
        if BACKWARD:
            b_term *= tl.load(p_gradient + tl.load(p_source + o_entry, m_entry, 0), m_entry, 0.0)
        b_out += b_term
    tl.store(p_out + o_row, tl.sum(b_out, 1), m_row)
