"""The contraction per target node: T on chip, and its reverse; tables and notation of ``tables.py``.

Node n of a batch is ``node + n`` of the graph; its edges are rows ``rowptr[node + n] .. rowptr[node + n + 1] − 1`` of
q, r and ``source``, which are sorted by target. T of the batch is (nodes, n_t)."""

from __future__ import annotations

import triton
import triton.language as tl

from . import activations


@triton.jit
def features(x, j, ok, start, i, ni, C_IN: tl.constexpr):
    """f[v, i] of the edges' sources j (BE, V); 0 where the fields have no component i."""
    inside = ok[:, None] & ((start >= 0) & (i < ni))[None, :]
    return tl.load(x + j[:, None] * C_IN + (start + i)[None, :], inside, 0.0)


@triton.jit
def harmonics_of(q, n, ok, NQ: tl.constexpr, NQP: tl.constexpr, like):
    """q of the edges (BE, NQP), padded with 0."""
    k = tl.arange(0, NQP)
    if NQ > 0:
        return tl.load(q + n[:, None] * NQ + k[None, :], ok[:, None] & (k < NQ)[None, :], 0.0)
    else:
        return 0.0 * n[:, None].to(like.dtype.element_ty) + 0.0 * k[None, :].to(like.dtype.element_ty)


@triton.jit
def factor(harmonics, coupling, constant, entry, NQ: tl.constexpr, NQP: tl.constexpr, S: tl.constexpr,
           HAS_ONE: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Σ_j C[i, j, s] q_j (BE, S), or (1, S) where there are no harmonics; ``entry``: the term's number times D_all + i.
    Without HAS_ONE the constant q₀ is 0."""
    s, k = tl.arange(0, S), tl.arange(0, NQP)
    found = tl.load(constant + entry * S + s)[None, :]
    if not HAS_ONE:
        found = found * 0.0
    if NQ > 0:
        table = tl.load(coupling + (entry * NQ + k[:, None]) * S + s[None, :], (k < NQ)[:, None], 0.0)
        found += activations.dot(harmonics, table, PREC)
    return found


@triton.jit
def left(side, t, chunk, harmonics, ok, j, start, ni, x, coupling, constant, C_IN: tl.constexpr, NQ: tl.constexpr,
         NQP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DALL: tl.constexpr, HAS_ONE: tl.constexpr,
         PREC: tl.constexpr):  # fmt: skip
    """``side`` (BE, S, V) plus what D components of the input fields, from ``chunk`` · D on, add to L of term t."""
    for i in tl.static_range(D):
        f = features(x, j, ok, start, chunk * D + i, ni, C_IN)
        c = factor(harmonics, coupling, constant, t * DALL + chunk * D + i, NQ, NQP, S, HAS_ONE, PREC)
        side += c[:, :, None] * f[:, None, :]
    return side


@triton.jit
def t_offset(b, block_offset, block_extent, sv, V: tl.constexpr):
    """Where T of block b starts for each (s, v) (S · V,), how many columns it has, and which (s, v) there are."""
    ns, nv = tl.load(block_extent + 4 * b), tl.load(block_extent + 4 * b + 1)
    nw = tl.load(block_extent + 4 * b + 2)
    s, v = sv // V, sv % V
    return tl.load(block_offset + b) + (s * nv + v) * nw, nw, (s < ns) & (v < nv)


@triton.jit
def contract_forward(
    x, q, r, source, rowptr, coupling, constant, block_terms, block_start, block_extent, block_offset, term_column,
    term_chunks, t_out, node,
    C_IN: tl.constexpr, NQ: tl.constexpr, NQP: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DALL: tl.constexpr, HAS_ONE: tl.constexpr, BE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """T of node program_id(0) of the batch and block program_id(1). Sums are added one block of edges after the
    other."""
    b, v, w, sv = tl.program_id(1), tl.arange(0, V), tl.arange(0, W), tl.arange(0, S * V)
    low = tl.load(rowptr + node + tl.program_id(0)).to(tl.int64)
    high = tl.load(rowptr + node + tl.program_id(0) + 1).to(tl.int64)
    start, ni = tl.load(block_start + b * V + v), tl.load(block_extent + 4 * b + 3)
    t0, t1 = tl.load(block_terms + b), tl.load(block_terms + b + 1)
    acc = tl.zeros((S * V, W), r.dtype.element_ty)
    for at in tl.range(low, high, BE):
        n = at + tl.arange(0, BE)
        ok = n < high
        j = tl.load(source + n, ok, 0).to(tl.int64)
        harmonics = harmonics_of(q, n, ok, NQ, NQP, r)
        for t in tl.range(t0, t1):
            side = tl.zeros((BE, S, V), r.dtype.element_ty)
            for chunk in tl.range(tl.load(term_chunks + 2 * t), tl.load(term_chunks + 2 * t + 1)):
                side = left(side, t, chunk, harmonics, ok, j, start, ni, x, coupling, constant, C_IN, NQ, NQP, S, D,
                            DALL, HAS_ONE, PREC)  # fmt: skip
            column = tl.load(term_column + t * W + w)
            right = tl.load(r + n[:, None] * NR + column[None, :], ok[:, None] & (column >= 0)[None, :], 0.0)
            acc = activations.add_dot(acc, tl.trans(tl.reshape(side, (BE, S * V))), right, PREC)
    to, nw, inside = t_offset(b, block_offset, block_extent, sv, V)
    row = t_out + tl.program_id(0).to(tl.int64) * NT
    tl.store(row + to[:, None] + w[None, :], acc, inside[:, None] & (w[None, :] < nw))


@triton.jit
def contract_backward_inputs(
    x, q, r, source, rowptr, order, coupling, constant, block_extent, block_offset, term_block, term_column,
    group_terms, group_term, group_chunk, group_start, group_components, d_t, d_x, d_q, node, total,
    C_IN: tl.constexpr, NQ: tl.constexpr, NQP: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DALL: tl.constexpr, HAS_ONE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_Q: tl.constexpr, BE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Node program_id(0), group of components program_id(1): the gradient of the gathered features, d_x (E, C_IN) in
    the
    edges' own order, and this group's part of that of q, d_q (groups, total, NQ)."""
    g, v, w, sv = tl.program_id(1), tl.arange(0, V), tl.arange(0, W), tl.arange(0, S * V)
    k, s = tl.arange(0, NQP), tl.arange(0, S)
    low = tl.load(rowptr + node + tl.program_id(0)).to(tl.int64)
    high = tl.load(rowptr + node + tl.program_id(0) + 1).to(tl.int64)
    start, chunk = tl.load(group_start + g * V + v), tl.load(group_chunk + g)
    ni = tl.load(group_components + g)
    t0, t1 = tl.load(group_terms + g), tl.load(group_terms + g + 1)
    row = d_t + tl.program_id(0).to(tl.int64) * NT
    for at in tl.range(low, high, BE):
        n = at + tl.arange(0, BE)
        ok = n < high
        j = tl.load(source + n, ok, 0).to(tl.int64)
        harmonics = harmonics_of(q, n, ok, NQ, NQP, r)
        of_f = ()
        for _i in tl.static_range(D):
            of_f = of_f + (tl.zeros((BE, V), r.dtype.element_ty),)  # noqa: RUF005
        of_q = tl.zeros((BE, NQP), r.dtype.element_ty)
        for member in tl.range(t0, t1):
            t = tl.load(group_term + member)
            b = tl.load(term_block + t)
            to, nw, inside = t_offset(b, block_offset, block_extent, sv, V)
            of_t = tl.load(row + to[None, :] + w[:, None], inside[None, :] & (w[:, None] < nw), 0.0)  # (W, S V)
            column = tl.load(term_column + t * W + w)
            right = tl.load(r + n[:, None] * NR + column[None, :], ok[:, None] & (column >= 0)[None, :], 0.0)
            of_left = tl.reshape(activations.dot(right, of_t, PREC), (BE, S, V))
            added = ()
            for i in tl.static_range(D):
                if NEED_X:
                    c = factor(harmonics, coupling, constant, t * DALL + chunk * D + i, NQ, NQP, S, HAS_ONE, PREC)
                    added = added + (of_f[i] + tl.sum(of_left * c[:, :, None], 1),)  # noqa: RUF005
                else:
                    added = added + (of_f[i],)  # noqa: RUF005
                if NEED_Q:
                    f = features(x, j, ok, start, chunk * D + i, ni, C_IN)
                    of_c = tl.sum(of_left * f[:, None, :], 2)  # (BE, S)
                    table = coupling + ((t * DALL + chunk * D + i) * NQ + k[:, None]) * S + s[None, :]
                    table = tl.load(table, (k < NQ)[:, None], 0.0)
                    of_q += tl.sum(of_c[:, None, :] * table[None, :, :], 2)
            of_f = added
        if NEED_X:
            e = tl.load(order + n, ok, 0).to(tl.int64)
            for i in tl.static_range(D):
                inside_row = ok[:, None] & ((start >= 0) & (chunk * D + i < ni))[None, :]
                tl.store(d_x + e[:, None] * C_IN + (start + chunk * D + i)[None, :], of_f[i], inside_row)
        if NEED_Q:
            tl.store(d_q + (g * total + n[:, None]) * NQ + k[None, :], of_q, ok[:, None] & (k < NQ)[None, :])


@triton.jit
def contract_backward_hidden(
    x, q, source, rowptr, coupling, constant, block_start, block_extent, block_offset, term_block, term_chunks,
    column_terms, column_term, column_where, d_t, d_r, node,
    C_IN: tl.constexpr, NQ: tl.constexpr, NQP: tl.constexpr, NR: tl.constexpr, NT: tl.constexpr, S: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, D: tl.constexpr, DALL: tl.constexpr, HAS_ONE: tl.constexpr, BE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Node program_id(0), columns W · program_id(1) and following: the gradient of r, d_r (E, NR)."""
    g, v, w, sv = tl.program_id(1), tl.arange(0, V), tl.arange(0, W), tl.arange(0, S * V)
    low = tl.load(rowptr + node + tl.program_id(0)).to(tl.int64)
    high = tl.load(rowptr + node + tl.program_id(0) + 1).to(tl.int64)
    t0, t1 = tl.load(column_terms + g), tl.load(column_terms + g + 1)
    row = d_t + tl.program_id(0).to(tl.int64) * NT
    for at in tl.range(low, high, BE):
        n = at + tl.arange(0, BE)
        ok = n < high
        j = tl.load(source + n, ok, 0).to(tl.int64)
        harmonics = harmonics_of(q, n, ok, NQ, NQP, d_r)
        acc = tl.zeros((BE, W), d_r.dtype.element_ty)
        for member in tl.range(t0, t1):
            t = tl.load(column_term + member)
            b = tl.load(term_block + t)
            start, ni = tl.load(block_start + b * V + v), tl.load(block_extent + 4 * b + 3)
            side = tl.zeros((BE, S, V), d_r.dtype.element_ty)
            for chunk in tl.range(tl.load(term_chunks + 2 * t), tl.load(term_chunks + 2 * t + 1)):
                side = left(side, t, chunk, harmonics, ok, j, start, ni, x, coupling, constant, C_IN, NQ, NQP, S, D,
                            DALL, HAS_ONE, PREC)  # fmt: skip
            to, _, inside = t_offset(b, block_offset, block_extent, sv, V)
            where = tl.load(column_where + member * W + w)
            of_t = tl.load(row + to[:, None] + where[None, :], inside[:, None] & (where >= 0)[None, :], 0.0)
            acc = activations.add_dot(acc, tl.reshape(side, (BE, S * V)), of_t, PREC)
        column = g * W + w
        tl.store(d_r + n[:, None] * NR + column[None, :], acc, ok[:, None] & (column < NR)[None, :])


@triton.jit
def sum_by_source(rows, order, colptr, out, C: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr):
    """out[j] = Σ rows[order[n]] over n = colptr[j] .. colptr[j + 1] − 1; rows (E, C), BC columns per program."""
    j = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    low, high = tl.load(colptr + j).to(tl.int64), tl.load(colptr + j + 1).to(tl.int64)
    acc = tl.zeros((BC,), out.dtype.element_ty)
    for at in tl.range(low, high, BE):
        n = at + tl.arange(0, BE)
        e = tl.load(order + n, n < high, 0).to(tl.int64)
        acc += tl.sum(tl.load(rows + e[:, None] * C + c[None, :], (n < high)[:, None] & (c < C)[None, :], 0.0), 0)
    tl.store(out + j * C + c, acc, c < C)
