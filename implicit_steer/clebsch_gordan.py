"""Products of irreps of planar rotation groups with reflections or inversions, in place of escnn's numerical search.

escnn knows closed forms for SO(2), SO(3), O(3) and C_N. For other groups it solves a linear system per triple of
irreps, with signs that differ between installations, and only among irreps that happen to have been made before: at the
frequencies of a kernel between hidden layers it fails or takes minutes. Here invariant tensors are columns of a Haar
average.
"""

from __future__ import annotations

from . import _require_escnn  # noqa: F401

# isort: split
from functools import partial

import numpy as np
from escnn.group import O2, SO2, DirectProductGroup, Group

from . import sampling as sp

_BLOCK = 32  # rotations in a grid are a multiple of this: few different grids, each with its own stacks of matrices


def install(group: Group) -> None:
    """Let this group object decompose products of irreps as this module does, where it is one of those meant."""
    planar = isinstance(group, O2) or (isinstance(group, DirectProductGroup) and sp.rotations(group, 0.0) is not None)
    if planar:
        group._clebsh_gordan_coeff = partial(coefficients, group)
        group._tensor_product_irreps = partial(product, group)


def coefficients(group: Group, m: tuple, n: tuple, j: tuple) -> np.ndarray:
    """(d_m, d_n, s, d_j): per copy of ψ_j in ψ_m ⊗ ψ_n the coordinates of an orthonormal basis; s is their number.

    The orthogonal projection onto invariant tensors of ψ_j ⊗ ψ_m ⊗ ψ_n is an average over the group, exact on a grid of
    more rotations than the sum of the frequencies; its columns, in order, are orthogonalised, up to endomorphisms of
    ψ_j. So signs are the same everywhere.
    """
    j, m, n = (group.get_irrep_id(i) for i in (j, m, n))
    size = -(-(1 + sum(sp.frequency(group, i) for i in (j, m, n))) // _BLOCK) * _BLOCK
    stacks = [_matrices(group, i, size) for i in (j, m, n)]
    dims = [stack.shape[1] for stack in stacks]
    characters = np.prod([np.trace(stack, axis1=1, axis2=2) for stack in stacks], axis=0)
    found: list[np.ndarray] = []
    if characters.mean() > 0.5:  # the number of invariant tensors
        average = np.einsum("gai,gbj,gck->abcijk", *stacks, optimize=True) / len(stacks[0])
        found = _independent(average.reshape(np.prod(dims), -1), group.irrep(*j).endomorphism_basis())
    tensors = np.array(found).reshape(-1, *dims) * np.sqrt(dims[0])
    return tensors.transpose(2, 3, 0, 1)


def product(group: Group, m: tuple, n: tuple) -> list[tuple[tuple, int]]:
    """(id, multiplicity) of the irreps in ψ_m ⊗ ψ_n, by frequency."""
    m, n = group.get_irrep_id(m), group.get_irrep_id(n)
    candidates = _irreps(group, sp.frequency(group, m) + sp.frequency(group, n))
    multiplicities = [(j, coefficients(group, m, n, j).shape[2]) for j in candidates]
    return [(j, count) for j, count in multiplicities if count]


def _independent(columns: np.ndarray, endomorphisms: np.ndarray) -> list[np.ndarray]:
    """Orthonormal combinations of the columns, one for each orbit under the endomorphisms of the first factor."""
    span, found = np.zeros((len(columns), 0)), []
    for column in columns.T:
        rest = column - span @ (span.T @ column)
        if (length := np.linalg.norm(rest)) > 1e-6:
            found.append(rest / length)
            images = [(e @ found[-1].reshape(len(e), -1)).reshape(-1, 1) for e in endomorphisms]
            span = np.linalg.qr(np.hstack([span, *images]))[0]
    return found


@sp.identity_cache
def _matrices(group: Group, ident: tuple, size: int) -> np.ndarray:
    """(G, d, d) of an irrep on the grid of ``size`` rotations and the discrete part of the group."""
    irrep = group.irrep(*ident)
    return np.stack([irrep(g) for g in sp.equispaced(group, size)])


@sp.identity_cache
def _irreps(group: Group, highest: int) -> list[tuple]:
    """The irreps of frequency 0 … ``highest``, made if they did not exist."""
    if isinstance(group, DirectProductGroup):
        outer, inner = [i.id for i in group.G1.irreps()], _irreps(group.G2, highest)
        return [group.irrep(first, second).id for second in inner for first in outer]
    if isinstance(group, SO2):
        return [group.irrep(k).id for k in range(highest + 1)]
    return [group.irrep(*ident).id for ident in [(0, 0), *((1, k) for k in range(highest + 1))]]
