"""Products of irreps, decomposed without escnn's numerical search: for finite groups, and for planar rotation groups
with reflections or inversions.

escnn knows closed forms for SO(2), SO(3), O(3) and C_N. For other groups it solves a linear system per triple of
irreps, with signs that differ between installations, and only among irreps that happen to have been made before: it
takes minutes, and fails at the frequencies of a kernel between hidden layers. Here D_N has a closed form, too, and
elsewhere invariant tensors are columns of an average over the group.
"""

from __future__ import annotations

from . import _require_escnn  # noqa: F401

# isort: split
from functools import partial

import numpy as np
from escnn.group import O2, SO2, CyclicGroup, DihedralGroup, DirectProductGroup, Group

from .sampling import equispaced, frequency, identity_cache, rotations

_BLOCK = 32  # a grid has a multiple of so many rotations: few different grids, each with its stacks of matrices


def install(group: Group) -> None:
    """Let this group object decompose products of irreps as this module does, where escnn has no closed form."""
    planar = isinstance(group, O2) or (isinstance(group, DirectProductGroup) and rotations(group, 0.0) is not None)
    finite = not group.continuous and not isinstance(group, CyclicGroup)
    if planar or finite:
        find = _dihedral if isinstance(group, DihedralGroup) else coefficients
        group._clebsh_gordan_coeff = partial(find, group)
        group._tensor_product_irreps = partial(product, group)


def coefficients(group: Group, m: tuple, n: tuple, j: tuple) -> np.ndarray:
    """(d_m, d_n, s, d_j): the coordinates of an orthonormal basis of each of the s copies of ψ_j in ψ_m ⊗ ψ_n.

    The orthogonal projection onto the invariant tensors of ψ_j ⊗ ψ_m ⊗ ψ_n is an average over the group. It is exact
    over all elements of a finite group, and over a grid of more rotations than the sum of the frequencies. Its columns
    are orthogonalised in their order, up to endomorphisms of ψ_j. So signs are the same on every machine.
    """
    j, m, n = (group.get_irrep_id(i) for i in (j, m, n))
    size = _grid_size(group, (j, m, n))
    stacks = [_matrices(group, i, size) for i in (j, m, n)]
    dims = [stack.shape[1] for stack in stacks]
    invariants = np.mean(np.prod([_character(group, i, size) for i in (j, m, n)], axis=0))
    found: list[np.ndarray] = []
    if invariants > 0.5:
        average = np.einsum("gai,gbj,gck->abcijk", *stacks, optimize=True) / len(stacks[0])
        found = _independent(average.reshape(np.prod(dims), -1), group.irrep(*j).endomorphism_basis())
    tensors = np.array(found).reshape(-1, *dims) * np.sqrt(dims[0])
    return tensors.transpose(2, 3, 0, 1)


def product(group: Group, m: tuple, n: tuple) -> list[tuple[tuple, int]]:
    """(id, multiplicity) of the irreps in ψ_m ⊗ ψ_n: by frequency, or in the order of a finite group's own list."""
    m, n = group.get_irrep_id(m), group.get_irrep_id(n)
    candidates = _irreps(group, frequency(group, m) + frequency(group, n))
    size = _grid_size(group, (m, n, candidates[-1]))
    both = _character(group, m, size) * _character(group, n, size)
    invariants = np.stack([_character(group, j, size) for j in candidates]) @ both / len(both)
    counts = [
        round(found) // group.irrep(*j).sum_of_squares_constituents
        for j, found in zip(candidates, invariants, strict=True)
    ]
    return [(j, count) for j, count in zip(candidates, counts, strict=True) if count]


def _dihedral(group: DihedralGroup, m: tuple, n: tuple, j: tuple) -> np.ndarray:
    """:func:`coefficients` of D_N in closed form.

    ψ_{1,k} acts on z = x + iy: a rotation by φ multiplies it by exp(ikφ), the reflection conjugates it; where the
    frequency k is 0 or N/2, ψ_{0,k} is the real part and ψ_{1,k} the imaginary one. So z_m z_n and z_m z̄_n are the
    fields of frequency k_m ± k_n, and a frequency above N/2 is one below it, conjugated.
    """
    order, ids = group.rotation_order, [group.get_irrep_id(i) for i in (m, n, j)]
    parts = [slice(0, 2) if group.irrep(*i).size == 2 else slice(i[0], i[0] + 1) for i in ids]
    for sign in (-1, 1):
        k = (ids[0][1] + sign * ids[1][1]) % order
        conjugate = -1 if 2 * k > order else 1
        if min(k, order - k) != ids[2][1]:
            continue
        tensor = np.zeros((2, 2, 2))
        tensor[0, 0, 0], tensor[1, 1, 0] = 1, -sign
        tensor[1, 0, 1], tensor[0, 1, 1] = conjugate, conjugate * sign
        tensor = tensor[tuple(parts)]
        if tensor.any():
            return (tensor / np.linalg.norm(tensor) * np.sqrt(tensor.shape[2]))[:, :, None]
    return np.zeros((*(group.irrep(*i).size for i in ids[:2]), 0, group.irrep(*ids[2]).size))


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


def _grid_size(group: Group, idents: tuple) -> int:
    """How many rotations average products of these irreps exactly; 0 for a finite group: all its elements are used."""
    return -(-(1 + sum(frequency(group, i) for i in idents)) // _BLOCK) * _BLOCK if group.continuous else 0


@identity_cache
def _matrices(group: Group, ident: tuple, size: int) -> np.ndarray:
    """(G, d, d) of an irrep on all elements, or on ``size`` rotations x the discrete part of the group."""
    irrep = group.irrep(*ident)
    return np.stack([irrep(g) for g in (equispaced(group, size) if size else group.elements)])


@identity_cache
def _character(group: Group, ident: tuple, size: int) -> np.ndarray:
    """(G,) the traces of :func:`_matrices`."""
    return np.trace(_matrices(group, ident, size), axis1=1, axis2=2)


@identity_cache
def _irreps(group: Group, highest: int) -> list[tuple]:
    """All irreps of a finite group; of a continuous one those of frequency 0 … ``highest``, made where missing."""
    if not group.continuous:
        return [i.id for i in group.irreps()]
    if isinstance(group, DirectProductGroup):
        outer, inner = [i.id for i in group.G1.irreps()], _irreps(group.G2, highest)
        return [group.irrep(first, second).id for second in inner for first in outer]
    if isinstance(group, SO2):
        return [group.irrep(k).id for k in range(highest + 1)]
    return [group.irrep(*ident).id for ident in [(0, 0), *((1, k) for k in range(highest + 1))]]
