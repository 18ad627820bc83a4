"""escnn group → hidden representation, its grids of samples, and the exact frames: the arrays of ``Plan.frame``.

Groups have the hidden representations and grids of the authors' code (Zhdanov, Hoffmann, Cesa, NeurIPS 2023). A group
that it does not know is sampled on all its elements if it is finite, else on an equispaced grid along its one
continuous rotation.
"""

from __future__ import annotations

from . import _require_escnn  # noqa: F401

# isort: split
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import numpy as np
from escnn.group import O2, O3, SO2, SO3, DirectProductGroup, Group, GroupElement, Representation, directsum

from .._check import fail, require
from ..plan import Frame

_R = TypeVar("_R")


def identity_cache(function: Callable[..., _R]) -> Callable[..., _R]:
    """Cache by the identity of the arguments (escnn's groups cannot be hashed; each exists once) or, for plain values,
    by equality. The arguments are kept alive with the result."""
    cache: dict[tuple[Any, ...], tuple[_R, tuple[Any, ...]]] = {}

    @wraps(function)
    def cached(*args: Any) -> _R:
        key = tuple(a if isinstance(a, int | str | bytes | tuple) else id(a) for a in args)
        if key not in cache:
            cache[key] = (function(*args), args)
        return cache[key][0]

    return cached


_SPHERE_STABILISER = {"SO3": (False, -1), "O3": (False, False, -1)}  # rotations about z, as the authors choose it


@dataclass(frozen=True, eq=False)
class HiddenSpace:
    """One hidden field: ``rho`` acts on coefficients of functions on the group or the sphere; ``dirac`` (d,) is the
    unit vector whose orbit ``rho(g) dirac`` gives the rows of the sampling matrix A."""

    group: Group
    rho: Representation
    dirac: np.ndarray
    max_frequency: int


@lru_cache(maxsize=1024)
def trivial_coordinates(rep: Representation) -> np.ndarray:
    """(n,) coordinates, in irrep order, of the trivial irreps."""
    irreps = [rep.group.irrep(*ident) for ident in rep.irreps]
    starts = np.cumsum([0, *(irrep.size for irrep in irreps)])
    return np.array([s for s, irrep in zip(starts, irreps, strict=False) if irrep.is_trivial()], dtype=int)


def invariants(rep: Representation) -> np.ndarray:
    """(d, n): the vectors that no group element moves, one column per trivial irrep."""
    return rep.change_of_basis[:, trivial_coordinates(rep)]


def is_orthogonal(rep: Representation) -> bool:
    """Whether its irreps are put together by an orthogonal matrix, so that all its matrices are orthogonal."""
    return np.allclose(rep.change_of_basis.T, rep.change_of_basis_inv, rtol=0, atol=1e-9)


def frequency(group: Group, irrep: tuple) -> int:
    """Rotation frequency of an irrep; -1 for finite groups."""
    if isinstance(group, O2 | O3):
        return irrep[1]
    if isinstance(group, SO2 | SO3):
        return irrep[0]
    if isinstance(group, DirectProductGroup):
        return max(frequency(group.G1, irrep[0]), frequency(group.G2, irrep[1]))
    return -1


def distinct(reprs: Iterable[Representation]) -> list[Representation]:
    """Each representation once, in the order in which they first occur; fast for many fields of a few, since escnn
    compares and hashes representations slowly."""
    return list(dict.fromkeys({id(r): r for r in reprs}.values()))


def max_frequency(reprs: Iterable[Representation]) -> int:
    """Highest rotation frequency among the irreps; -1 for finite groups, whose irreps are all used anyway."""
    return max((frequency(r.group, i) for r in distinct(reprs) for i in r.irreps), default=-1)


def rotations(group: Group, angle: float) -> GroupElement | None:
    """The group's rotation by ``angle`` in its one continuous plane; None if it has no such unique plane."""
    if isinstance(group, SO2):
        return group.element(angle, "radians")
    if isinstance(group, O2):
        return group.element((0, angle), "radians")
    if isinstance(group, DirectProductGroup) and isinstance(group.G2, SO2 | O2) and not group.G1.continuous:
        return group.pair_elements(group.G1.identity, rotations(group.G2, angle))
    return None


def _canonical_flip(group: Group) -> GroupElement | None:
    """The reflection of an O(2) factor under which ``O2.grid`` is closed; None without one."""
    if isinstance(group, O2):
        return group.element((1, 0.0), "radians")
    if isinstance(group, DirectProductGroup) and isinstance(group.G2, O2):
        return group.pair_elements(group.G1.identity, _canonical_flip(group.G2))
    return None


def _regular(group: Group, irreps: list[tuple]) -> tuple[Representation, np.ndarray]:
    """Band-limited regular representation (each irrep as often as its size) and its Dirac vector at the identity."""
    parts, dirac = [], []
    for ident in irreps:
        irrep = group.irrep(*ident)
        copies = irrep.size // irrep.sum_of_squares_constituents
        parts += [irrep] * copies
        dirac.append(np.eye(irrep.size)[:, :copies].T.reshape(-1) * np.sqrt(irrep.size))
    name = "regular_[" + "|".join(str(i) for i in irreps) + "]"
    rho = group.representations.get(name)  # escnn's own Fourier activations leave it there, under the same name
    if rho is None or rho.irreps != [i.id for i in parts] or not np.allclose(rho.change_of_basis, np.eye(rho.size)):
        rho = directsum(parts, name=name)
    dirac = np.concatenate(dirac)
    return rho, dirac / np.linalg.norm(dirac)


@identity_cache
def hidden_space(group: Group, max_frequency: int) -> HiddenSpace:
    """The hidden field of the kernel MLP for ``group``, of frequencies up to ``max_frequency``, which finite groups
    ignore.

    Raises:
        ValueError: for a continuous group that is none of SO(2), O(2), SO(3), O(3), or C2 x one of the first two.
    """
    if isinstance(group, SO3 | O3):
        stabiliser = _SPHERE_STABILISER[type(group).__name__]
        irreps = list(set(group.bl_sphere_representation(L=max_frequency).irreps))
        homspace = group.homspace(stabiliser)
        dirac = np.concatenate(
            [homspace._dirac_kernel_ft(i, homspace.H.trivial_representation.id).T.reshape(-1) for i in irreps]
        )
        rho = group.spectral_quotient_representation(stabiliser, *irreps, name=None)
        return HiddenSpace(group, rho, dirac / np.linalg.norm(dirac), max_frequency)
    if not group.continuous:
        return HiddenSpace(group, *_regular(group, [i.id for i in group.irreps()]), 0)
    if rotations(group, 0.0) is None:
        fail("group", "SO(2), O(2), SO(3), O(3), a cylinder group or a finite group", group, kind=ValueError)
    if isinstance(group, DirectProductGroup):
        inner = group.G2.bl_regular_representation(L=max_frequency).irreps
        irreps = [(f.id, i, 0) for f in group.G1.irreps() for i in dict.fromkeys(inner)]
    else:
        irreps = list(set(group.bl_regular_representation(L=max_frequency).irreps))
    return HiddenSpace(group, *_regular(group, irreps), max_frequency)


def equispaced(group: Group, n: int) -> list[GroupElement]:
    """n rotations x the discrete part of the group."""
    if isinstance(group, DirectProductGroup):
        return [group.pair_elements(g1, g2) for g1 in group.G1.elements for g2 in group.G2.grid(n)]
    return group.grid(n)


def _inverse(a: np.ndarray, weights: np.ndarray | float = 1.0, eps: float = 0.0, name: str = "escnn") -> np.ndarray:
    """A⁻ = (Aᵀ diag(weights) A + eps)⁻¹ Aᵀ diag(weights), (d, S), of samples A (S, d).

    Raises:
        ValueError: fewer samples than coefficients, unless eps helps (as on the authors' grids of high degree).
    """
    size = a.shape[1]
    enough = eps > 0 or np.linalg.matrix_rank(a) == size
    require(enough, "sampling", f"enough samples for {size} coefficients", repr(name))
    weighted = a.T * weights
    return np.linalg.inv(weighted @ a + eps * np.eye(size)) @ weighted


def _samples(space: HiddenSpace, grid: list[GroupElement]) -> np.ndarray:
    """A (S, d) over the elements of ``grid``."""
    return np.stack([space.rho(g) @ space.dirac for g in grid])


@identity_cache
def escnn_matrices(space: HiddenSpace) -> tuple[np.ndarray, np.ndarray]:
    """A and A⁻ of the authors' grid: "ico" for SO(3) and O(3), equispaced for planar rotations, all elements of a
    finite group; regularised by 1e-8, as in escnn's ``FourierPointwise``."""
    if isinstance(space.group, SO3 | O3):
        grid = space.group.grid(type="ico")
    elif space.group.continuous:
        grid = equispaced(space.group, 40 if space.max_frequency == 3 else 125)
    else:
        return _group_samples(space), _inverse(_group_samples(space), eps=1e-8)
    a = _samples(space, grid)
    return a, _inverse(a, eps=1e-8)


@identity_cache
def _group_samples(space: HiddenSpace) -> np.ndarray:
    """A over all elements of a finite group."""
    return _samples(space, list(space.group.elements))


@identity_cache
def group_matrices(space: HiddenSpace) -> tuple[np.ndarray, np.ndarray]:
    """A and A⁻ over all elements of a finite group."""
    a = _group_samples(space)
    return a, _inverse(a)


@identity_cache
def rotation_matrices(space: HiddenSpace, n: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A and A⁻ of n equispaced rotations x the discrete part of a group with one continuous rotation; ``name`` is what
    messages call this sampling."""
    known = rotations(space.group, 0.0) is not None
    require(known, "sampling", "a group with rotations in one plane for equispaced samples", space.group)
    a = _samples(space, equispaced(space.group, n))
    return a, _inverse(a, name=name)


def merge_samples(a: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge equal rows of A and add up the columns of A⁻ that belong to them, which leaves A⁻ φ(A c) as it is.

    Returns A, A⁻, and index (S,): the merged row of each sample.
    """
    _, first, index = np.unique(np.round(a, 9), axis=0, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # keep the order in which samples first occur
    first, index = np.sort(first), rank[index.reshape(-1)]
    merged = np.zeros((inverse.shape[0], len(first)))
    np.add.at(merged.T, index, inverse.T)
    return a[first], merged, index


def lebedev_matrices(space: HiddenSpace, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A (n, d) and A⁻ on the Lebedev rule of n points (``scipy.integrate.lebedev_rule``); SO(3) and O(3) only."""
    from scipy.integrate import lebedev_rule

    if not isinstance(space.group, SO3 | O3):
        fail("sampling", "a group that acts on the sphere for a Lebedev rule", space.group, "Use 'escnn' or 'exact'.")
    sizes = lebedev_degrees()
    require(n in sizes, "sampling", f"'lebedev-N' with N one of {sorted(sizes)}", f"'lebedev-{n}'")
    points, weights = lebedev_rule(sizes[n])
    powers, harmonics = solid_harmonics(space)
    norms = _irrep_norms(space)
    a = (_monomials(points.T, powers) @ harmonics.T) * np.repeat(norms, [s for s, _ in _irreps(space)])
    return a, _inverse(a, weights / weights.sum(), name=f"lebedev-{n}")


@lru_cache(maxsize=1)
def lebedev_degrees() -> dict[int, int]:
    """Number of points → degree up to which that Lebedev rule is exact, in ascending order."""
    from scipy.integrate import lebedev_rule

    return {lebedev_rule(degree)[0].shape[1]: degree for degree in [*range(3, 32, 2), *range(35, 132, 6)]}


def _irreps(space: HiddenSpace) -> list[tuple[int, tuple]]:
    """(size, id) of each irrep in the hidden field."""
    return [(space.group.irrep(*i).size, i) for i in space.rho.irreps]


def _irrep_norms(space: HiddenSpace) -> np.ndarray:
    """a_ψ: norm of each irrep's block of the Dirac vector (all rows of A share it)."""
    ends = np.cumsum([size for size, _ in _irreps(space)])
    return np.array([np.linalg.norm(part) for part in np.split(space.dirac, ends[:-1])])


def _monomials(points: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """(n, n_monomials) values of x^i y^j z^k."""
    return np.prod(points[:, None, :] ** powers[None], axis=-1)


@identity_cache
def solid_harmonics(space: HiddenSpace) -> tuple[np.ndarray, np.ndarray]:
    """Y_ψ(x̂) = ψ(g_x) z_ψ as homogeneous polynomials: (n_monomials, 3) powers, (d, n_monomials) coefficients.

    z_ψ is the unit vector of irrep ψ fixed by the rotations about z; the polynomials are fitted to escnn's own irreps
    on random elements (over-determined, residual ~1e-14), so signs and order are escnn's.
    """
    g, irreps = space.group, _irreps(space)
    axis_rep = g.standard_representation()
    state = np.random.get_state()  # escnn samples from numpy's global generator
    np.random.seed(0)
    elements = [g.sample() for _ in range(20 * (1 + max(size for size, _ in irreps)))]
    np.random.set_state(state)
    points = np.stack([axis_rep(e)[:, 2] for e in elements])
    degrees = [(size - 1) // 2 for size, _ in irreps]
    powers = np.array(
        [(i, j, n - i - j) for n in range(max(degrees) + 1) for i in range(n, -1, -1) for j in range(n - i, -1, -1)]
    )
    coefficients, start = np.zeros((space.rho.size, len(powers))), 0
    for (size, ident), degree in zip(irreps, degrees, strict=True):
        z = space.dirac[start : start + size]
        values = np.stack([g.irrep(*ident)(e) @ z for e in elements]) / np.linalg.norm(z)
        chosen = np.flatnonzero(powers.sum(1) == degree)
        fit, *_ = np.linalg.lstsq(_monomials(points, powers[chosen]), values, rcond=None)
        fit[np.abs(fit) < 1e-12] = 0
        coefficients[start : start + size, chosen] = fit.T
        start += size
    return powers, coefficients


def zonal_frame(space: HiddenSpace, n_attributes: int, n_nodes: int):
    """Frame, embedding Z (d, c), A_z (Q, c) and A⁻_z (c, Q) for O(3)/SO(3) with invariant attributes, Q Gauss nodes."""
    irreps, norms = _irreps(space), _irrep_norms(space)
    powers, harmonics = solid_harmonics(space)
    z, start = np.zeros((space.rho.size, len(irreps))), 0
    for n, (size, _) in enumerate(irreps):
        z[start : start + size, n] = space.dirac[start : start + size] / norms[n]
        start += size
    degree = np.array([(size - 1) // 2 for size, _ in irreps])
    first = np.argsort(degree, kind="stable")  # coefficients by degree
    z, order, norms = z[:, first], degree[first], norms[first]
    require(n_nodes > order.max(), "sampling", f"'exact-N' with N > {order.max()}", f"'exact-{n_nodes}'")
    t, w = np.polynomial.legendre.leggauss(n_nodes)
    a = norms * np.stack([np.polynomial.legendre.Legendre.basis(int(n))(t) for n in order], axis=1)
    frame = Frame(
        kind="zonal",
        dim=3,
        attribute=np.eye(n_attributes),
        order=order,
        regular=True,
        coefficient=np.repeat(np.argsort(first), [size for size, _ in irreps]),
        powers=powers,
        harmonics=harmonics,
    )
    return frame, z, a, _inverse(a, w / 2)


def rotation_basis(rep: Representation) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates in which the group's continuous rotation is a rotation of 2-planes.

    Returns V (n, n), order (n,), partner (n,), sign (n,): with v = V c, a rotation by φ maps
    ``c[m] → cos(kφ) c[m] + sign[m] sin(kφ) c[partner[m]]``, k = order[m]. No coordinate belongs to two irreps (whose
    size is 1 or 2), so that trivial ones stay apart. V is orthogonal where the representation is.
    """
    n, start = rep.size, 0
    v, order, partner, sign = np.eye(n), np.zeros(n, int), np.arange(n), np.zeros(n)
    for ident in rep.irreps:
        irrep, k = rep.group.irrep(*ident), frequency(rep.group, ident)
        if irrep.size == 2 and k > 0:
            there, back = (irrep(rotations(rep.group, angle)) for angle in (np.pi / (2 * k), -np.pi / (2 * k)))
            v[start : start + 2, start + 1] = (there - back)[:, 0] / 2  # of the plane's rotation by 90 degrees
            order[start : start + 2], partner[start : start + 2] = k, (start + 1, start)
            sign[start : start + 2] = (-1, 1)
        start += irrep.size
    return rep.change_of_basis @ v, order, partner, sign


def _block(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]):
    """Direct sum of several :func:`rotation_basis` results."""
    sizes = [len(p[1]) for p in parts]
    v, start = np.zeros((sum(sizes), sum(sizes))), np.cumsum([0, *sizes])
    for (basis, *_), s, n in zip(parts, start, sizes, strict=False):
        v[s : s + n, s : s + n] = basis
    order, partner, sign = (np.concatenate([np.zeros(0), *(p[i] for p in parts)]) for i in (1, 2, 3))
    partner += np.repeat(start[:-1], sizes)
    return v, order.astype(int), partner.astype(int), sign


@identity_cache
def gauss_matrices(space: HiddenSpace, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A (n, 2) and A⁻ (2, n) of functions s + |v| t on [−1, 1] at n Gauss nodes, in the scale of ``space``: what a
    function on the sphere of maximal frequency 1, a scalar s and a vector v, is along the vector's axis.

    Raises:
        ValueError: ``space`` is another one; n < 2.
    """
    sphere = isinstance(space.group, SO3 | O3) and space.max_frequency == 1
    require(sphere, "sampling", "a function on the sphere of band limit 1 for 'gauss-N'", space.rho)
    first = np.argsort([size for size, _ in _irreps(space)])
    t, w = np.polynomial.legendre.leggauss(n)
    a = _irrep_norms(space)[first] * np.stack([np.ones(n), t], axis=1)
    return a, _inverse(a, w / 2, name=f"gauss-{n}")


def planar_frame(space: HiddenSpace, position: Representation, attributes: list[Representation], n: int):
    """Frame, embedding Z (d, d), A (S, d) and A⁻ (d, S) for one continuous rotation, n equispaced samples along it."""
    group = space.group
    v, order, _, _ = rotation_basis(position)
    plane, axis = v[:, order == 1], v[:, order == 0]
    require(
        plane.shape[1] == 2,
        "position",
        "a plane that the group rotates",
        f"{plane.shape[1]} such directions in {position}",
    )
    flip = _canonical_flip(group)
    if flip is not None:  # azimuth 0 along the line that the flip fixes: the grid is closed under the edge's stabiliser
        _, vectors = np.linalg.eigh(plane.T @ position(flip) @ plane)
        first = vectors[:, 1]
        plane = plane @ np.array([[first[0], -first[1]], [first[1], first[0]]])
    plane[np.abs(plane) < 1e-12] = 0  # rounding there would look like a tiny azimuth to edges on the axis
    v, a_order, a_partner, a_sign = _block([rotation_basis(r) for r in attributes])
    z, h_order, h_partner, h_sign = rotation_basis(space.rho)
    first = np.argsort(h_order, kind="stable")  # coefficients by order
    z, h_order, h_partner, h_sign = z[:, first], h_order[first], np.argsort(first)[h_partner[first]], h_sign[first]
    frame = Frame(
        kind="planar",
        dim=position.size,
        attribute=np.linalg.inv(v).T,
        order=h_order,
        regular=not a_order.any(),
        plane=plane,
        axis=axis,
        partner=h_partner,
        sign=h_sign,
        attribute_order=a_order,
        attribute_partner=a_partner,
        attribute_sign=a_sign,
    )
    a, inverse = rotation_matrices(space, n, f"exact-{n}")
    return frame, z, a @ z, z.T @ inverse
