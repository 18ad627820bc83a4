"""escnn's kernel MLP → :class:`~implicit_steer.plan.Plan`, piece by piece, by :func:`lower`:

================================  ==================================================================================
sampling, group, attributes       ``Frame``: where the MLP is evaluated; Z, A, A⁻ of the hidden fields in it
hidden ``Linear``                 ``Linear``: Zᵀ B Z for each intertwiner B, Zᵀ b for the bias
Fourier activation                ``Activation``: A Z with equal samples merged, and A⁻
``IIDBatchNorm1d``                ``Norm``
last ``Linear``                   ``Coupling``: the intertwiners from a hidden field to ρ_out ⊗ ρ_in*
================================  ==================================================================================
"""

from __future__ import annotations

from . import _require_escnn  # noqa: F401

# isort: split
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise, product

import escnn.nn
import numpy as np
from escnn.group import O3, SO3, Representation

from .._check import fail, parse_sampling, require
from ..plan import Activation, Block, Coupling, Frame, Linear, Norm, Plan, Radial
from .linear import bias_basis, fields_by_name, pairs_of, starts_of, without_rounding
from .sampling import (
    HiddenSpace,
    escnn_matrices,
    group_matrices,
    hidden_space,
    lebedev_matrices,
    merge_samples,
    planar_frame,
    trivial_coordinates,
    zonal_frame,
)


@dataclass(frozen=True)
class _Sampled:
    """A frame and the matrices that layers in it need. Z maps frame coordinates to escnn's."""

    name: str
    frame: Frame
    hidden: np.ndarray  # Z (d, c) of a hidden field
    samples: np.ndarray  # A (S, c)
    inverse: np.ndarray  # A⁻ (c, S)


def exact_obstacle(space: HiddenSpace, attributes: list[Representation]) -> str | None:
    """Why there is no exact sampling for this group and these attributes; None if there is."""
    if isinstance(space.group, SO3 | O3):
        trivial = all(r.group.irrep(*i).is_trivial() for r in attributes for i in r.irreps)
        return None if trivial else f"steerable edge attributes leave {space.group} no canonical frame"
    return None


def _plain(name: str, position: Representation, attributes: list[Representation], space, a, inverse) -> _Sampled:
    size = space.rho.size
    n = sum(r.size for r in attributes)
    frame = Frame(kind="none", dim=position.size, attribute=np.eye(n), order=np.zeros(size, dtype=int))
    return _Sampled(name, frame, np.eye(size), a, inverse)


def _sampled(space: HiddenSpace, position: Representation, attributes: list[Representation], name: str) -> _Sampled:
    kind, n = parse_sampling(name)
    if kind == "lebedev":
        return _plain(name, position, attributes, space, *lebedev_matrices(space, n))
    if kind != "escnn":
        obstacle = exact_obstacle(space, attributes)
        if obstacle is None:
            return _exact(space, position, attributes, n)
        if kind == "exact":
            fail("sampling", "a case that has an exact frame", obstacle, "Use 'auto', 'escnn' or 'lebedev-N'.")
    return _plain("escnn", position, attributes, space, *escnn_matrices(space))


def _exact(space: HiddenSpace, position, attributes: list[Representation], n: int | None) -> _Sampled:
    if not space.group.continuous:  # the grid is the whole group
        order = space.group.order()
        require(n is None or n == order, "sampling", f"'exact' or 'exact-{order}'", f"'exact-{n}'")
        return _plain(f"exact-{order}", position, attributes, space, *group_matrices(space))
    nodes = 2 * space.max_frequency + 4
    if isinstance(space.group, SO3 | O3):
        n = n or nodes
        return _Sampled(f"exact-{n}", *zonal_frame(space, sum(r.size for r in attributes), n))
    n = n or 4 * nodes
    return _Sampled(f"exact-{n}", *planar_frame(space, position, attributes, n))


def _input_fields(sampled: _Sampled, in_reprs: list[Representation]) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Z of every input field (position first), where each starts in frame coordinates, and their total size."""
    frame = sampled.frame
    if frame.kind == "zonal":
        position = np.eye(3)[:, 2:]
    elif frame.kind == "planar":
        position = np.concatenate([frame.plane[:, : 2 - frame.regular], frame.axis], axis=1)
    else:
        position = np.eye(frame.dim)
    starts, attributes = starts_of(in_reprs[1:]), np.linalg.inv(frame.attribute).T  # a = attributes · a'
    z = [position] + [attributes[a:b, a:b] for a, b in pairwise(starts)]
    return z, np.concatenate([[0], position.shape[1] + starts[:-1]]), position.shape[1] + int(starts[-1])


def _lower_linear(linear: escnn.nn.Linear, sampled: _Sampled, first: bool) -> Linear:
    """One hidden linear layer in frame coordinates."""
    in_reprs, out_reprs = linear.in_type.representations, linear.out_type.representations
    coefficients = sampled.hidden.shape[1]
    if first:
        z_in, in_start, in_size = _input_fields(sampled, in_reprs)
    else:
        z_in, in_size = [sampled.hidden] * len(in_reprs), coefficients * len(in_reprs)
        in_start = coefficients * np.arange(len(in_reprs))
    blocks = []
    for pair in pairs_of(linear):
        groups = defaultdict(list)  # input fields of one representation and one Z (the position has its own)
        for column, n in enumerate(pair.in_fields):
            groups[first and n == 0].append((column, n))
        for members in groups.values():
            basis = without_rounding(sampled.hidden.T @ pair.basis @ z_in[members[0][1]])
            blocks.append(
                Block(
                    offset=pair.offset,
                    n_in=len(pair.in_fields),
                    columns=np.array([c for c, _ in members]),
                    out_start=coefficients * pair.out_fields,
                    in_start=np.array([in_start[n] for _, n in members]),
                    basis=basis,
                )
            )
    out_size = coefficients * len(out_reprs)
    bias = np.zeros((out_size, 0))
    if linear.bias is not None:
        bias = np.kron(np.eye(len(out_reprs)), sampled.hidden.T @ bias_basis(linear, out_reprs[0]))
    return Linear(in_size, out_size, tuple(blocks), bias)


def _lower_activation(activation, sampled: _Sampled) -> Activation:
    samples, inverse, index = merge_samples(sampled.samples, sampled.inverse)
    return Activation(len(activation.in_type), activation.function, samples, inverse, index)


def _frame_trivial(sampled: _Sampled, rho: Representation) -> np.ndarray:
    """The trivial coordinates of a hidden field among its coefficients in frame coordinates."""
    rows = np.abs(sampled.hidden[trivial_coordinates(rho)]) > 0.5
    return np.array([int(np.flatnonzero(row)[0]) for row in rows], dtype=int)


def _lower_norm(norm: escnn.nn.IIDBatchNorm1d, sampled: _Sampled, rho: Representation, measured: np.ndarray) -> Norm:
    trivial = _frame_trivial(sampled, rho), trivial_coordinates(rho), measured
    return Norm(len(norm.in_type), *trivial, float(norm.eps), float(norm.momentum))


@dataclass(frozen=True)
class KernelShape:
    """The fields between which the kernel maps, and what surrounds it."""

    out_reprs: list[Representation]
    in_reprs: list[Representation]
    cutoff: float | None = None
    aggr: str = "sum"
    radial: Radial | None = None


def _read_through(basis: np.ndarray, z: np.ndarray) -> np.ndarray:
    """B Z; B itself, which may be large, where Z is the identity."""
    return basis if np.array_equal(z, np.eye(len(z))) else without_rounding(basis @ z)


def _fold(columns: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """(n_b, n_trivial, n_constant): what a shift of trivial hidden coordinates adds to the kernel, ``columns`` (n_b, o,
    i, n_trivial), as combinations of the invariant matrices ``constant`` (n_constant, o, i, 1), which the bias adds."""
    n_b, *_, n_trivial = columns.shape
    if not n_trivial or not len(constant):
        return np.zeros((n_b, n_trivial, len(constant)))
    target = constant.reshape(len(constant), -1).T
    found, *_ = np.linalg.lstsq(target, columns.transpose(1, 2, 0, 3).reshape(len(target), -1), rcond=None)
    return found.T.reshape(n_b, n_trivial, -1)


def _lower_last(
    linear, shape: KernelShape, hidden: list[np.ndarray], hidden_start: np.ndarray, trivial: np.ndarray
) -> tuple[Coupling, ...]:
    """The last layer as couplings. ``hidden``: Z (m_full, m) of every field it reads; ``hidden_start``: where these
    fields begin, and last where the constant one is."""
    out_start, in_start = starts_of(shape.out_reprs), starts_of(shape.in_reprs)
    out_fields, in_fields = fields_by_name(shape.out_reprs).values(), fields_by_name(shape.in_reprs).values()
    tensor_reprs, n_in = linear.out_type.representations, len(shape.in_reprs)
    pairs, couplings = pairs_of(linear), []
    for us, vs in product(out_fields, in_fields):
        field = us[:, None] * n_in + vs
        rep = tensor_reprs[field[0, 0]]
        sizes = shape.out_reprs[us[0]].size, shape.in_reprs[vs[0]].size
        where = {"out_start": out_start[us], "in_start": in_start[vs]}
        constant = bias_basis(linear, rep).T.reshape(-1, *sizes, 1)
        bias_at = -1
        if len(constant):
            bias_at = len(couplings)
            row, one = linear.expand_bias.starts[field], hidden_start[-1:]
            empty = np.zeros((len(constant), 0, 0))
            couplings.append(Coupling("bias", row, **where, hidden_start=one, basis=constant, fold=empty, fold_into=-1))
        for pair in pairs:
            if pair.rep_out.name != rep.name:
                continue
            n_w, n_b = len(pair.in_fields), len(pair.basis)
            row = pair.offset + np.searchsorted(pair.out_fields, field) * n_w * n_b
            basis = _read_through(pair.basis, hidden[pair.in_fields[0]]).reshape(n_b, *sizes, -1)
            couplings.append(
                Coupling(
                    "weights",
                    row,
                    **where,
                    hidden_start=hidden_start[pair.in_fields],
                    basis=basis,
                    fold=_fold(basis[..., trivial], constant),
                    fold_into=bias_at if len(trivial) else -1,
                )
            )
    return tuple(couplings)


def lower(mlp, shape: KernelShape, sampling: str) -> Plan:
    """The plan of a kernel MLP.

    Args:
        mlp: a :class:`~implicit_steer.nn.KernelMLP`: escnn Linear, Fourier activation (and batch norm) in turn, a last
            Linear to the fields ``out_u ⊗ in_v``, u slowest.
        shape: fields, cutoff, aggregation and radial inputs of the convolution.
        sampling: ``"auto" | "exact" | "exact-N" | "escnn" | "lebedev-N"``.

    Raises:
        ValueError: unknown sampling, or one that does not exist for this group and these attributes.
    """
    modules = list(mlp.mlp)
    linears = [m for m in modules if isinstance(m, escnn.nn.Linear)]
    activations = [m for m in modules if hasattr(m, "Ainv")]
    norms = [m for m in modules if isinstance(m, escnn.nn.IIDBatchNorm1d)]
    position, *attributes = mlp.in_type.representations
    parse_sampling(sampling)
    if activations:
        space = hidden_space(mlp.in_type.fibergroup, activations[0].max_frequency)
        sampled = _sampled(space, position, attributes, sampling)
        zonal = sampled.frame.kind == "zonal"
        full = [np.eye(space.rho.size) if zonal else sampled.hidden] * mlp.n_channels
        trivial = trivial_coordinates(space.rho) if zonal else _frame_trivial(sampled, space.rho)
    else:  # a linear kernel: the last layer reads x ⊕ a itself, exactly equivariant without any sample
        n = sum(r.size for r in attributes)
        frame = Frame(kind="none", dim=position.size, attribute=np.eye(n), order=np.zeros(0, dtype=int))
        sampled = _Sampled("exact", frame, np.eye(0), np.zeros((0, 0)), np.zeros((0, 0)))
        full, trivial = [np.eye(r.size) for r in mlp.in_type.representations], np.zeros(0, dtype=int)
    hidden_start = np.concatenate([[0], np.cumsum([len(z) for z in full])]).astype(int)
    return Plan(
        group=f"{mlp.in_type.fibergroup} on R^{position.size}",
        sampling=sampled.name,
        frame=sampled.frame,
        linears=tuple(_lower_linear(layer, sampled, n == 0) for n, layer in enumerate(linears[:-1])),
        activations=tuple(_lower_activation(a, sampled) for a in activations),
        norms=tuple(_lower_norm(m, sampled, space.rho, trivial) for m in norms),
        couplings=_lower_last(linears[-1], shape, full, hidden_start, trivial if norms else trivial[:0]),
        out_size=sum(r.size for r in shape.out_reprs),
        in_size=sum(r.size for r in shape.in_reprs),
        hidden_size=int(hidden_start[-1]) + 1,
        gamma=1 / np.sqrt(len(shape.out_reprs)),
        cutoff=None if shape.cutoff is None else float(shape.cutoff),
        aggr=shape.aggr,
        radial=shape.radial,
    )
