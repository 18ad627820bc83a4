"""Replacements for functions of escnn, which have the same results and take less time or memory."""

from __future__ import annotations

from ..lowering import _require_escnn  # noqa: F401

# isort: split
import numpy as np
import torch
from escnn.group import Group, GroupElement, _numerical
from escnn.group.groups import ico, octa
from escnn.nn.modules.basismanager import basisexpansion_singleblock


def apply() -> None:
    """Replace the functions, for this process."""
    _numerical.randomized_svd = None  # scikit-learn's, where installed, refuses escnn's matrices; scipy's takes them
    basisexpansion_singleblock.normalize_basis = normalize_basis
    for module in (ico, octa):
        module.generate_irrep_matrices_from_generators = matrices_from_generators


_theirs = basisexpansion_singleblock.normalize_basis
_MOST_PRODUCTS = 2**26


def normalize_basis(basis: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Divide basis elements B (n_b, o, i, ...), in place, by √(‖B‖² / size), unless they vanish.

    escnn takes ‖B‖² as the trace of B Bᵀ, with all n_b o² products in memory: 4 GB for fields of size 32. Where these
    are few, escnn's function is called, so that files and layers keep every bit.
    """
    if basis[:, :, 0].numel() * basis.shape[1] <= _MOST_PRODUCTS:
        return _theirs(basis, sizes)
    norms = torch.linalg.vector_norm(basis.flatten(1), dim=1, dtype=torch.float64).to(basis.dtype) / sizes.sqrt()
    norms[~(norms >= 1e-6)] = 1
    return basis.div_(norms.view(-1, *[1] * (basis.dim() - 1)))


def matrices_from_generators(
    group: Group, generators: list[tuple[GroupElement, np.ndarray]]
) -> dict[GroupElement, np.ndarray]:
    """ρ(g) of every element g, from the matrices of generators.

    escnn also multiplies all pairs of elements to see that ρ is a homomorphism: half a minute for the icosahedron.
    """
    matrices = {group.identity: np.eye(len(generators[0][1])), **dict(generators)}
    fresh = list(matrices)
    while fresh:
        products = {g @ e: rho @ matrices[e] for e in fresh for g, rho in generators}
        fresh = [e for e in products if e not in matrices]
        matrices |= {e: products[e] for e in fresh}
    return matrices
