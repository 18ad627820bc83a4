"""Projection of matrices onto intertwiners, in little memory where these are sparse."""

from __future__ import annotations

from . import _require_escnn  # noqa: F401

# isort: split
import numpy as np
from escnn.group import Representation


def intertwiners(rep_in: Representation, rep_out: Representation, nearly: np.ndarray) -> np.ndarray:
    """Exact intertwiners (n_b, o, i), in float64, from ``nearly``, which differs from them by rounding.

    In irrep coordinates, Q_out⁻¹ B Q_in, an intertwiner is a combination of endomorphisms between equal irreps; the
    rest is rounding. One irrep of the input is projected at a time, and only its elements and coordinates that are not
    0, so that this takes little more memory than the result.
    """
    exact, all_rows = np.zeros(nearly.shape), _coordinates(rep_out)
    q, q_inverse = rep_in.change_of_basis, rep_in.change_of_basis_inv
    for ident, copies in _coordinates(rep_in).items():
        if ident not in all_rows:
            continue
        rows, basis = all_rows[ident], rep_in.group.irrep(*ident).endomorphism_basis()
        dual = basis / np.sum(basis**2, axis=(1, 2), keepdims=True)
        into, back = rep_out.change_of_basis_inv[rows.reshape(-1)], rep_out.change_of_basis[:, rows.reshape(-1)]
        for columns in copies:
            read, written = q[:, columns].any(1).nonzero()[0], q_inverse[columns].any(0).nonzero()[0]
            elements = nearly[:, :, read].any((1, 2)).nonzero()[0]
            part = into @ (nearly[elements][:, :, read] @ q[np.ix_(read, columns)])
            share = np.einsum("bkoi,eoi->bke", part.reshape(-1, *rows.shape, len(columns)), dual)
            part = np.einsum("bke,eoi->bkoi", share, basis).reshape(part.shape)
            exact[np.ix_(elements, range(rep_out.size), written)] += back @ (part @ q_inverse[np.ix_(columns, written)])
    return exact


def _coordinates(rep: Representation) -> dict[tuple, np.ndarray]:
    """(copies, size) for each irrep: the coordinates of its copies."""
    found: dict[tuple, list[np.ndarray]] = {}
    start = 0
    for ident in rep.irreps:
        size = rep.group.irrep(*ident).size
        found.setdefault(ident, []).append(np.arange(start, start + size))
        start += size
    return {ident: np.stack(copies) for ident, copies in found.items()}
