"""Neighbours across periodic boundaries: the images of the points that matter, and one tree over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._check import fail, require

_MAX_IMAGES = 10**8  # points in one tree; where there are more, the radius and the cell are in different units


def checked_cell(cell: Any, pbc: Any, dim: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """``cell`` as (dim, dim) or (B, dim, dim) float64 with rows = lattice vectors, and ``pbc`` as (dim,) bool.

    Raises:
        TypeError, ValueError: naming the argument; also for periodic directions that are linearly dependent.
    """
    expected = f"a floating point tensor of shape ({dim}, {dim}) or (B, {dim}, {dim})"
    ok = isinstance(cell, Tensor) and cell.is_floating_point()
    require(ok, "cell", expected, getattr(cell, "dtype", type(cell).__name__), kind=TypeError)
    require(cell.dim() in (2, 3) and cell.shape[-2:] == (dim, dim), "cell", expected, tuple(cell.shape))
    vectors = cell.detach().to("cpu", torch.float64).numpy()
    require(np.isfinite(vectors).all(), "cell", "finite lattice vectors", "NaN or Inf")
    periodic = checked_pbc(pbc, dim)
    lattice = vectors.reshape(-1, dim, dim)[:, periodic]
    lengths = np.linalg.norm(lattice, axis=-1, keepdims=True)
    singular = (lengths == 0).any()
    if periodic.any() and not singular:
        singular = np.linalg.svd(lattice / lengths, compute_uv=False).min() < 1e-6
    remedy = "Give the directions without periodicity as False in pbc."
    require(not singular, "cell", "linearly independent lattice vectors in periodic directions", cell.tolist(), remedy)
    return vectors, periodic


def checked_pbc(pbc: Any, dim: int) -> NDArray[Any]:
    """``pbc`` as (dim,) bool; None means all directions."""
    expected = f"True, False, or one of them for each of {dim} directions"
    if isinstance(pbc, Tensor):
        pbc = pbc.tolist()
    if pbc is None or isinstance(pbc, bool | np.bool_):
        return np.full(dim, pbc is None or bool(pbc))
    if not isinstance(pbc, Sequence | np.ndarray) or isinstance(pbc, str):
        fail("pbc", expected, repr(pbc), kind=TypeError)
    flags = np.asarray(pbc)
    require(flags.shape == (dim,) and flags.dtype == bool, "pbc", expected, repr(pbc))
    return flags


def periodic_pairs(
    points: NDArray[Any], r: float, cell: NDArray[Any], pbc: NDArray[Any], loop: bool
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """All pairs with |points[i] − points[j] + shift · cell| ≤ r.

    points (N, D); cell (D, D), rows = lattice vectors; pbc (D,), which of them repeat. Returns neighbour j (E,),
    centre i (E,), shift (E, D) in whole numbers, sorted by i, then j, then shift. ``loop`` keeps the pairs i = j of
    shift 0; a point's images under other shifts are neighbours in either case.
    """
    from scipy.linalg import null_space
    from scipy.spatial import cKDTree

    dim = points.shape[1]
    if not len(points):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, dim))
    # Rows of directions without periodicity are not used: vectors orthogonal to the lattice take their places.
    basis = cell.copy()
    basis[~pbc] = null_space(cell[pbc]).T if pbc.any() else np.eye(dim)
    inverse = np.linalg.inv(basis)
    fraction = points @ inverse
    home = np.where(pbc, np.floor(fraction), 0.0)  # the cell each point is in
    wrapped, fraction = points - home @ basis, fraction - home
    reach = r * np.linalg.norm(inverse, axis=0)  # |Δ| ≤ r changes fractional coordinates by at most this
    reach[~pbc] = 0
    repeats = np.ceil(reach)
    images = len(points) * np.prod(2 * repeats + 1)
    if not images <= _MAX_IMAGES:
        fail("r", f"a radius with fewer than {_MAX_IMAGES:.0e} periodic images", f"{r} with the cell {cell.tolist()}")
    shifts = np.array(list(itertools.product(*(np.arange(-n, n + 1) for n in repeats))))
    low = np.where(pbc, fraction.min(0) - reach, -np.inf) - 1e-6
    high = np.where(pbc, fraction.max(0) + reach, np.inf) + 1e-6
    # Image s of point j sits at wrapped[j] − s · basis; keep those near the home cell.
    at = fraction[None] - shifts[:, None]
    image, source = np.nonzero(((at >= low) & (at <= high)).all(-1))
    ghosts = wrapped[source] - shifts[image] @ basis
    found = cKDTree(wrapped).sparse_distance_matrix(cKDTree(ghosts), r, output_type="ndarray")
    centre, neighbour, step = found["i"], source[found["j"]], shifts[image[found["j"]]]
    # Undo the wrapping: wrapped_i − wrapped_j + s = x_i − x_j + (s − home_i + home_j), in units of the basis.
    if not loop:
        keep = (centre != neighbour) | step.any(-1)
        centre, neighbour, step = centre[keep], neighbour[keep], step[keep]
    shift = step - home[centre] + home[neighbour] + 0.0  # no negative zeros
    order = np.lexsort((*shift.T[::-1], neighbour, centre))
    return neighbour[order], centre[order], shift[order]
