"""Irreps of O(3) or SO(3) → :class:`~implicit_steer.plan.Plan`, without a group object and without solving for a basis.

The kernel's MLP is evaluated in the edge's own frame (``Frame`` of kind "zonal"). A hidden field is a function on the
sphere: in this frame it has one coefficient per degree l = 0 … L, elsewhere (L + 1)² components, of parity (−1)^l. So

- a hidden linear layer is one W × W matrix per degree,
- the last layer is made of Clebsch-Gordan coefficients: for every *path*, a degree l of the hidden field that couples
  an irrep of the input to one of the output, ``B[o, i, m] = √(2 l_out + 1) C(l_in, l, l_out)[i, m, o]``.

L is l_in + l_out + 1 for the highest degrees of input and output: the authors' rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._check import fail
from ..plan import Activation, Block, Coupling, Frame, Linear, Norm, Plan, Radial
from ..plan.irreps import Irrep, Irreps, Term, check_same_group
from . import so3

_NORM_EPS, _NORM_MOMENTUM = 1e-5, 0.1  # torch's defaults


class Path(NamedTuple):
    """How an irrep of the input reaches one of the output: through the hidden fields' components of this degree."""

    irrep_in: Irrep
    degree: int
    irrep_out: Irrep


class KernelOptions(NamedTuple):
    """What defines a kernel beside its irreps: see :class:`implicit_steer.irreps.ImplicitPointConv`."""

    n_attributes: int  # radial inputs included
    n_layers: int
    n_channels: int
    activation: str
    norm: str | None
    cutoff: float | None
    aggr: str
    radial: Radial | None


class _HiddenFields(NamedTuple):
    """Fields that the last layer reads: where they start in h, and the degrees of their components."""

    starts: NDArray[Any]  # (W,)
    degrees: NDArray[Any]  # (m,)


def paths(irreps_in: Irreps, irreps_out: Irreps, highest: int) -> list[Path]:
    """All paths through degrees up to ``highest``, by output irrep, then input irrep, then degree.

    Raises:
        ValueError: there is none.
    """
    found = [
        Path(irrep_in, degree, irrep_out)
        for irrep_out in irreps_out.fields
        for irrep_in in irreps_in.fields
        for degree in range(abs(irrep_in.degree - irrep_out.degree), irrep_in.degree + irrep_out.degree + 1)
        if degree <= highest and irrep_out.parity == irrep_in.parity * (-1) ** degree
    ]
    if not found:
        remedy = (
            "A kernel of positions and scalars couples l_in to l_out by harmonics of degree |l_in − l_out| … "
            "l_in + l_out and parity (−1)^degree: scalars 0e reach 0e, 1o, 2e, 3o, … and never 1e or 0o."
        )
        fail("irreps_out", f"irreps that {str(irreps_in)!r} can reach", repr(str(irreps_out)), remedy)
    return found


def highest_degree(irreps_in: Irreps, irreps_out: Irreps, n_layers: int) -> int:
    """L of the fields that the last layer reads; of a single layer these are the position and the attributes."""
    return irreps_in.highest_degree + irreps_out.highest_degree + 1 if n_layers > 1 else 1


def depthwise_irreps(irreps_in: Irreps, irreps_out: Irreps, n_layers: int) -> Irreps:
    """What a kernel that acts channel by channel gives: for every path to an irrep of ``irreps_out``, as many copies of
    it as the input has of the irrep where the path starts."""
    found = paths(irreps_in, irreps_out, highest_degree(irreps_in, irreps_out, n_layers))
    return Irreps(tuple(Term(irreps_in.count(path.irrep_in), path.irrep_out) for path in found))


def lower_kernel(irreps_in: Irreps, irreps_out: Irreps, options: KernelOptions, depthwise: bool) -> Plan:
    """The plan of a kernel that maps ``irreps_in`` to ``irreps_out`` or, where ``depthwise``, to
    :func:`depthwise_irreps`.

    Raises:
        ValueError: irreps of different groups; irreps between which there is no path.
    """
    check_same_group(irreps_in=irreps_in, irreps_out=irreps_out)
    highest, n = highest_degree(irreps_in, irreps_out, options.n_layers), options.n_attributes
    if options.n_layers > 1:
        frame, linears, activations, norms = _hidden_layers(highest, options)
        size = (highest + 1) ** 2
        hidden = [_HiddenFields(size * np.arange(options.n_channels), so3.degrees(highest))]
        hidden_size, sampling = size * options.n_channels + 1, f"exact-{len(activations[0].samples)}"
    else:  # the last layer reads x and a themselves
        frame = Frame(kind="none", dim=3, attribute=np.eye(n), order=np.zeros(0, dtype=int))
        linears, activations, norms = (), (), ()
        hidden = [_HiddenFields(np.array([0]), np.ones(3, int)), _HiddenFields(3 + np.arange(n), np.zeros(1, int))]
        hidden_size, sampling = 3 + n + 1, "exact"
    builder = _Couplings(irreps_in, hidden, hidden_size, has_norms=bool(norms))
    found = paths(irreps_in, irreps_out, highest)
    if depthwise:
        irreps_out = depthwise_irreps(irreps_in, irreps_out, options.n_layers)
        for path, start in zip(found, irreps_out.starts, strict=True):
            starts = start + path.irrep_out.size * np.arange(irreps_in.count(path.irrep_in))
            builder.add([path], starts, depthwise=True)
    else:
        for same_irreps in _by_irreps(found):
            builder.add(same_irreps, np.array(irreps_out.fields[same_irreps[0].irrep_out]), depthwise=False)
    return Plan(
        group=f"{'O(3)' if irreps_in.has_parity else 'SO(3)'} on R^3",
        sampling=sampling,
        frame=frame,
        linears=linears,
        activations=activations,
        norms=norms,
        couplings=tuple(builder.couplings),
        out_size=irreps_out.size,
        in_size=irreps_in.size,
        hidden_size=hidden_size,
        gamma=1.0,
        cutoff=options.cutoff,
        aggr=options.aggr,
        radial=options.radial,
    )


def _by_irreps(found: list[Path]) -> Iterator[list[Path]]:
    """The paths between each pair of irreps."""
    groups: dict[tuple[Irrep, Irrep], list[Path]] = {}
    for path in found:
        groups.setdefault((path.irrep_in, path.irrep_out), []).append(path)
    yield from groups.values()


# ---- the hidden layers


def _hidden_layers(
    highest: int, options: KernelOptions
) -> tuple[Frame, tuple[Linear, ...], tuple[Activation, ...], tuple[Norm, ...]]:
    coefficients, channels, n = highest + 1, options.n_channels, options.n_attributes
    powers, harmonics = so3.solid_harmonics(highest)
    frame = Frame(
        kind="zonal",
        dim=3,
        attribute=np.eye(n),
        order=np.arange(coefficients),
        regular=True,
        coefficient=so3.degrees(highest),
        powers=powers,
        harmonics=harmonics,
    )
    first = coefficients * np.arange(channels)  # where each channel begins
    bias = np.kron(np.eye(channels), np.eye(coefficients)[:, :1])  # on degree 0
    unit = np.eye(coefficients)[:, :, None]
    inputs = (
        Block(0, 1, np.array([0]), first, np.array([0]), unit[1:2]),  # the position, of degree 1
        Block(channels, n, np.arange(n), first, 1 + np.arange(n), unit[:1]),  # the attributes, of degree 0
    )
    per_degree = unit * np.eye(coefficients)[:, None, :]  # (L + 1, c, c): one element for each degree
    within = (Block(0, channels, np.arange(channels), first, first, per_degree),)
    size = channels * coefficients
    linears = [Linear(1 + n, size, inputs, bias), *[Linear(size, size, within, bias)] * (options.n_layers - 2)]
    samples, inverse = sphere_samples(highest)
    act = Activation(channels, options.activation, samples, inverse, np.arange(len(samples)))
    scalar = np.array([0])
    norms = (Norm(channels, scalar, scalar, scalar, _NORM_EPS, _NORM_MOMENTUM),) if options.norm else ()
    return frame, tuple(linears), (act,) * len(linears), norms * len(linears)


def sphere_samples(highest: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """A (S, L + 1) and A⁻ (L + 1, S) for the S = 2 L + 4 Gauss-Legendre nodes: A c are the values there of the function
    Σ_l c_l P_l(t) / √(L + 1) of the polar angle's cosine t, and A⁻ returns c from them.

    Components of unit variance give values of unit variance, as in layers with escnn's types.
    """
    t, weights = np.polynomial.legendre.leggauss(2 * highest + 4)
    values = np.polynomial.legendre.legvander(t, highest) / np.sqrt(highest + 1)
    weighted = values.T * (weights / 2)
    return values, np.linalg.solve(weighted @ values, weighted)


# ---- the last layer


class _Couplings:
    """Collects couplings, whose weights and biases follow each other in the last layer's parameters."""

    def __init__(self, irreps_in: Irreps, hidden: list[_HiddenFields], hidden_size: int, has_norms: bool) -> None:
        self.irreps_in, self.hidden, self.hidden_size, self.has_norms = irreps_in, hidden, hidden_size, has_norms
        self.couplings: list[Coupling] = []
        self.n_weights = self.n_bias = 0

    def add(self, same_irreps: list[Path], out_start: NDArray[Any], depthwise: bool) -> None:
        """Add the paths between one irrep of the input and the fields of one irrep at ``out_start``."""
        irrep_in, _, irrep_out = same_irreps[0]
        in_start = np.array(self.irreps_in.fields[irrep_in])
        fields = len(out_start), 1 if depthwise else len(in_start)
        where = {"out_start": out_start, "in_start": in_start, "depthwise": depthwise}
        bias_at = -1
        if irrep_in == irrep_out:
            bias_at = len(self.couplings)
            one, identity = np.array([self.hidden_size - 1]), np.eye(irrep_in.size)[None, :, :, None]
            row = self.n_bias + np.arange(np.prod(fields)).reshape(fields)
            no_fold = {"fold": np.zeros((1, 0, 0)), "fold_into": -1}
            self.couplings.append(Coupling("bias", row, hidden_start=one, basis=identity, **no_fold, **where))
            self.n_bias += row.size
        for hidden in self.hidden:
            through = [path for path in same_irreps if path.degree in hidden.degrees]
            if not through or not len(hidden.starts):
                continue
            basis = np.stack([_intertwiner(path, hidden.degrees) for path in through])
            fold_into, fold = -1, np.zeros((len(basis), 0, 0))
            if self.has_norms:
                shift = basis[..., 0]  # what a constant shift of the scalar, component 0, adds: a multiple of 1
                fold_into, multiple = bias_at, np.trace(shift, axis1=1, axis2=2) / irrep_in.size
                fold = multiple[:, None, None] if bias_at >= 0 else np.zeros((len(basis), 1, 0))
            per_pair = len(hidden.starts) * len(basis)
            row = self.n_weights + per_pair * np.arange(np.prod(fields)).reshape(fields)
            given = {"hidden_start": hidden.starts, "basis": basis, "fold": fold, "fold_into": fold_into}
            self.couplings.append(Coupling("weights", row, **given, **where))
            self.n_weights += per_pair * row.size


def _intertwiner(path: Path, degrees: NDArray[Any]) -> NDArray[Any]:
    """B (o, i, m) of a path, for hidden components of ``degrees`` (m,): 0 but for those of the path's degree."""
    tensor = so3.clebsch_gordan(path.irrep_in.degree, path.degree, path.irrep_out.degree)
    basis = np.zeros((path.irrep_out.size, path.irrep_in.size, len(degrees)))
    basis[:, :, degrees == path.degree] = np.sqrt(path.irrep_out.size) * tensor.transpose(2, 0, 1)
    return basis
