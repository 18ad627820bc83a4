"""The contraction per target node: T on chip, and its reverse.

Tables, and the words slot, accumulator, term, slice, chunk and window, are those of ``contract_tables.py``; prefixes
and constants are those of the package's glossary. Node n of a batch is ``node + n`` of the graph; its edges are rows
``rowptr[node + n] .. rowptr[node + n + 1] − 1`` of q and r, which are sorted by target: row e is edge ``order[e]``. T
of the batch is (nodes, NT); rows (s, v) of an accumulator are numbered s V + v."""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations


@triton.jit
def sources(p_source, p_order, o_edge, m_edge):
    """The source nodes of rows."""
    o_order = tl.load(p_order + o_edge, m_edge, 0).to(tl.int64)
    return tl.load(p_source + o_order, m_edge, 0).to(tl.int64)


@triton.jit
def features(p_x, o_source, m_edge, o_start, i, n_i, C_IN: tl.constexpr):
    """f[v, i] of the edges' sources (BE, V); 0 where the fields have no component i."""
    m_field = m_edge[:, None] & ((o_start >= 0) & (i < n_i))[None, :]
    return tl.load(p_x + o_source[:, None] * C_IN + (o_start + i)[None, :], m_field, 0.0)


@triton.jit
def harmonics_of(p_q, o_edge, m_edge, NQ: tl.constexpr, BQ: tl.constexpr, p_like):
    """q of the edges (BE, BQ), padded with 0, in the type of ``p_like``."""
    o_q = tl.arange(0, BQ)
    if NQ > 0:
        return tl.load(p_q + o_edge[:, None] * NQ + o_q[None, :], m_edge[:, None] & (o_q < NQ)[None, :], 0.0)
    else:
        dtype = p_like.dtype.element_ty
        return 0.0 * o_edge[:, None].to(dtype) + 0.0 * o_q[None, :].to(dtype)


@triton.jit
def factor(b_q, p_coupling, p_constant, i_entry, NQ: tl.constexpr, BQ: tl.constexpr, S: tl.constexpr,
           HAS_ONE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Σ_j C[i, j, s] q_j (BE, S), or (1, S) where there are no harmonics; ``i_entry``: the term's number times D_ALL,
    plus i. Without HAS_ONE the constant q₀ is 0."""
    o_s, o_q = tl.arange(0, S), tl.arange(0, BQ)
    b_factor = tl.load(p_constant + i_entry * S + o_s)[None, :]
    if not HAS_ONE:
        b_factor = b_factor * 0.0
    if NQ > 0:
        b_c = tl.load(p_coupling + (i_entry * NQ + o_q[:, None]) * S + o_s[None, :], (o_q < NQ)[:, None], 0.0)
        b_factor += activations.dot(b_q, b_c, PREC)
    return b_factor


@triton.jit
def add_left(b_left, i_t, i_chunk, b_q, m_edge, o_source, o_start, n_i, p_x, p_coupling, p_constant,
             C_IN: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
             D_ALL: tl.constexpr, HAS_ONE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """``b_left`` (BE, S, V) plus what a chunk of components of the input fields adds to L of a term."""
    for i in tl.static_range(D):
        b_f = features(p_x, o_source, m_edge, o_start, i_chunk * D + i, n_i, C_IN)
        b_c = factor(b_q, p_coupling, p_constant, i_t * D_ALL + i_chunk * D + i, NQ, BQ, S, HAS_ONE, PREC)
        b_left += b_c[:, :, None] * b_f[:, None, :]
    return b_left


@triton.jit
def rows_of_t(i_acc, p_acc_offset, p_acc_extent, o_sv, V: tl.constexpr):
    """Of an accumulator: where each row (s, v) (S V,) begins in the node's T, how many columns it has, and which rows
    there are."""
    n_s, n_v = tl.load(p_acc_extent + 4 * i_acc), tl.load(p_acc_extent + 4 * i_acc + 1)
    n_w = tl.load(p_acc_extent + 4 * i_acc + 2)
    o_s, o_v = o_sv // V, o_sv % V
    return tl.load(p_acc_offset + i_acc) + (o_s * n_v + o_v) * n_w, n_w, (o_s < n_s) & (o_v < n_v)


@triton.jit(do_not_specialize=["node"])
def contract_forward(
    p_x, p_q, p_r, p_source, p_order, p_rowptr, p_coupling, p_constant, p_acc_term_begin, p_acc_start, p_acc_extent,
    p_acc_offset, p_term_column, p_term_chunks, p_t, node,
    C_IN: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, D: tl.constexpr, D_ALL: tl.constexpr, HAS_ONE: tl.constexpr, BE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """x (N, C_IN), q (E, NQ), r (E, NR) → t (nodes, NT): of node program_id(0) of the batch the accumulator
    program_id(1). Sums are added one block of edges after the other, in a fixed order."""
    i_acc, o_v, o_w, o_sv = tl.program_id(1), tl.arange(0, V), tl.arange(0, W), tl.arange(0, S * V)
    first = tl.load(p_rowptr + node + tl.program_id(0)).to(tl.int64)
    end = tl.load(p_rowptr + node + tl.program_id(0) + 1).to(tl.int64)
    o_start, n_i = tl.load(p_acc_start + i_acc * V + o_v), tl.load(p_acc_extent + 4 * i_acc + 3)
    first_term, end_term = tl.load(p_acc_term_begin + i_acc), tl.load(p_acc_term_begin + i_acc + 1)
    b_t = tl.zeros((S * V, W), p_r.dtype.element_ty)
    for i_edge in tl.range(first, end, BE):
        o_edge = i_edge + tl.arange(0, BE)
        m_edge = o_edge < end
        o_source = sources(p_source, p_order, o_edge, m_edge)
        b_q = harmonics_of(p_q, o_edge, m_edge, NQ, BQ, p_r)
        for i_t in tl.range(first_term, end_term):
            b_left = tl.zeros((BE, S, V), p_r.dtype.element_ty)
            for i_chunk in tl.range(tl.load(p_term_chunks + 2 * i_t), tl.load(p_term_chunks + 2 * i_t + 1)):
                b_left = add_left(b_left, i_t, i_chunk, b_q, m_edge, o_source, o_start, n_i, p_x, p_coupling,
                                  p_constant, C_IN, NQ, BQ, S, D, D_ALL, HAS_ONE, PREC)  # fmt: skip
            o_column = tl.load(p_term_column + i_t * W + o_w)
            b_r = tl.load(
                p_r + o_edge[:, None] * NR + o_column[None, :], m_edge[:, None] & (o_column >= 0)[None, :], 0.0
            )
            b_t = activations.add_dot(b_t, tl.trans(tl.reshape(b_left, (BE, S * V))), b_r, PREC)
    o_row, n_w, m_row = rows_of_t(i_acc, p_acc_offset, p_acc_extent, o_sv, V)
    p_row = p_t + tl.program_id(0).to(tl.int64) * NT
    tl.store(p_row + o_row[:, None] + o_w[None, :], b_t, m_row[:, None] & (o_w[None, :] < n_w))


@triton.jit(do_not_specialize=["node", "n_edges"])
def contract_backward_inputs(
    p_x, p_q, p_r, p_source, p_order, p_rowptr, p_coupling, p_constant, p_acc_extent, p_acc_offset, p_term_acc,
    p_term_column, p_slice_term_begin, p_slice_term, p_slice_chunk, p_slice_start, p_slice_components, p_d_t, p_d_x,
    p_d_q, node, n_edges,
    C_IN: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, D: tl.constexpr, D_ALL: tl.constexpr, HAS_ONE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_Q: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """d_t (nodes, NT) → of node program_id(0) and slice program_id(1) the gradient of the gathered features, d_x
    (E, C_IN) in the edges' own order, and this slice's part of that of q, d_q (slices, n_edges, NQ)."""
    i_slice, o_v, o_w, o_sv = tl.program_id(1), tl.arange(0, V), tl.arange(0, W), tl.arange(0, S * V)
    o_q, o_s = tl.arange(0, BQ), tl.arange(0, S)
    first = tl.load(p_rowptr + node + tl.program_id(0)).to(tl.int64)
    end = tl.load(p_rowptr + node + tl.program_id(0) + 1).to(tl.int64)
    o_start, i_chunk = tl.load(p_slice_start + i_slice * V + o_v), tl.load(p_slice_chunk + i_slice)
    n_i = tl.load(p_slice_components + i_slice)
    first_term, end_term = tl.load(p_slice_term_begin + i_slice), tl.load(p_slice_term_begin + i_slice + 1)
    p_row = p_d_t + tl.program_id(0).to(tl.int64) * NT
    for i_edge in tl.range(first, end, BE):
        o_edge = i_edge + tl.arange(0, BE)
        m_edge = o_edge < end
        o_source = sources(p_source, p_order, o_edge, m_edge)
        b_q = harmonics_of(p_q, o_edge, m_edge, NQ, BQ, p_r)
        b_d_f = ()  # (BE, V) per component of the chunk
        for _i in tl.static_range(D):
            b_d_f = b_d_f + (tl.zeros((BE, V), p_r.dtype.element_ty),)  # noqa: RUF005
        b_d_q = tl.zeros((BE, BQ), p_r.dtype.element_ty)
        for i_member in tl.range(first_term, end_term):
            i_t = tl.load(p_slice_term + i_member)
            i_acc = tl.load(p_term_acc + i_t)
            o_row, n_w, m_row = rows_of_t(i_acc, p_acc_offset, p_acc_extent, o_sv, V)
            b_d_t = tl.load(p_row + o_row[None, :] + o_w[:, None], m_row[None, :] & (o_w[:, None] < n_w), 0.0)
            o_column = tl.load(p_term_column + i_t * W + o_w)
            b_r = tl.load(
                p_r + o_edge[:, None] * NR + o_column[None, :], m_edge[:, None] & (o_column >= 0)[None, :], 0.0
            )
            b_d_left = tl.reshape(activations.dot(b_r, b_d_t, PREC), (BE, S, V))
            added = ()
            for i in tl.static_range(D):
                if NEED_X:
                    b_c = factor(b_q, p_coupling, p_constant, i_t * D_ALL + i_chunk * D + i, NQ, BQ, S, HAS_ONE, PREC)
                    added = added + (b_d_f[i] + tl.sum(b_d_left * b_c[:, :, None], 1),)  # noqa: RUF005
                else:
                    added = added + (b_d_f[i],)  # noqa: RUF005
                if NEED_Q:
                    b_f = features(p_x, o_source, m_edge, o_start, i_chunk * D + i, n_i, C_IN)
                    b_d_c = tl.sum(b_d_left * b_f[:, None, :], 2)  # (BE, S)
                    p_c = p_coupling + ((i_t * D_ALL + i_chunk * D + i) * NQ + o_q[:, None]) * S + o_s[None, :]
                    b_c_q = tl.load(p_c, (o_q < NQ)[:, None], 0.0)
                    b_d_q += tl.sum(b_d_c[:, None, :] * b_c_q[None, :, :], 2)
            b_d_f = added
        if NEED_X:
            o_order = tl.load(p_order + o_edge, m_edge, 0).to(tl.int64)
            for i in tl.static_range(D):
                m_field = m_edge[:, None] & ((o_start >= 0) & (i_chunk * D + i < n_i))[None, :]
                p_field = p_d_x + o_order[:, None] * C_IN + (o_start + i_chunk * D + i)[None, :]
                tl.store(p_field, b_d_f[i], m_field)
        if NEED_Q:
            p_d_q_edge = p_d_q + (i_slice * n_edges + o_edge[:, None]) * NQ
            tl.store(p_d_q_edge + o_q[None, :], b_d_q, m_edge[:, None] & (o_q < NQ)[None, :])


@triton.jit(do_not_specialize=["node"])
def contract_backward_hidden(
    p_x, p_q, p_source, p_order, p_rowptr, p_coupling, p_constant, p_acc_start, p_acc_extent, p_acc_offset, p_term_acc,
    p_term_chunks, p_window_term_begin, p_window_term, p_window_place, p_d_t, p_d_r, node,
    C_IN: tl.constexpr, NQ: tl.constexpr, BQ: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, D: tl.constexpr, D_ALL: tl.constexpr, HAS_ONE: tl.constexpr, BE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """d_t (nodes, NT) → of node program_id(0) and window program_id(1) the gradient of r, d_r (E, NR)."""
    i_window, o_v, o_w, o_sv = tl.program_id(1), tl.arange(0, V), tl.arange(0, W), tl.arange(0, S * V)
    first = tl.load(p_rowptr + node + tl.program_id(0)).to(tl.int64)
    end = tl.load(p_rowptr + node + tl.program_id(0) + 1).to(tl.int64)
    first_term, end_term = tl.load(p_window_term_begin + i_window), tl.load(p_window_term_begin + i_window + 1)
    p_row = p_d_t + tl.program_id(0).to(tl.int64) * NT
    for i_edge in tl.range(first, end, BE):
        o_edge = i_edge + tl.arange(0, BE)
        m_edge = o_edge < end
        o_source = sources(p_source, p_order, o_edge, m_edge)
        b_q = harmonics_of(p_q, o_edge, m_edge, NQ, BQ, p_d_r)
        b_d_r = tl.zeros((BE, W), p_d_r.dtype.element_ty)
        for i_member in tl.range(first_term, end_term):
            i_t = tl.load(p_window_term + i_member)
            i_acc = tl.load(p_term_acc + i_t)
            o_start, n_i = tl.load(p_acc_start + i_acc * V + o_v), tl.load(p_acc_extent + 4 * i_acc + 3)
            b_left = tl.zeros((BE, S, V), p_d_r.dtype.element_ty)
            for i_chunk in tl.range(tl.load(p_term_chunks + 2 * i_t), tl.load(p_term_chunks + 2 * i_t + 1)):
                b_left = add_left(b_left, i_t, i_chunk, b_q, m_edge, o_source, o_start, n_i, p_x, p_coupling,
                                  p_constant, C_IN, NQ, BQ, S, D, D_ALL, HAS_ONE, PREC)  # fmt: skip
            o_row, _, m_row = rows_of_t(i_acc, p_acc_offset, p_acc_extent, o_sv, V)
            o_place = tl.load(p_window_place + i_member * W + o_w)
            b_d_t = tl.load(p_row + o_row[:, None] + o_place[None, :], m_row[:, None] & (o_place >= 0)[None, :], 0.0)
            b_d_r = activations.add_dot(b_d_r, tl.reshape(b_left, (BE, S * V)), b_d_t, PREC)
        o_column = i_window * W + o_w
        tl.store(p_d_r + o_edge[:, None] * NR + o_column[None, :], b_d_r, m_edge[:, None] & (o_column < NR)[None, :])


@triton.jit
def sum_by_source(p_rows, p_by_source, p_colptr, p_out, C: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr):
    """out[j] = Σ rows[by_source[n]] over n = colptr[j] .. colptr[j + 1] − 1, of node j = program_id(0); rows (E, C), BC
    columns per program."""
    i_node = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    first, end = tl.load(p_colptr + i_node).to(tl.int64), tl.load(p_colptr + i_node + 1).to(tl.int64)
    b_out = tl.zeros((BC,), p_out.dtype.element_ty)
    for i_edge in tl.range(first, end, BE):
        o_n = i_edge + tl.arange(0, BE)
        o_edge = tl.load(p_by_source + o_n, o_n < end, 0).to(tl.int64)
        m_rows = (o_n < end)[:, None] & (o_c < C)[None, :]
        b_out += tl.sum(tl.load(p_rows + o_edge[:, None] * C + o_c[None, :], m_rows, 0.0), 0)
    tl.store(p_out + i_node * C + o_c, b_out, o_c < C)
