"""escnn kernel MLP → :class:`~implicit_steer.plan.Plan`. Together with ``sampling`` the only place that knows escnn's
insides: how it lays out weights, which basis it expands them in, what its names mean."""

from __future__ import annotations

from . import _require_escnn  # noqa: F401

# isort: split
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import escnn.nn
import numpy as np
import torch
from escnn.group import O3, SO3, Representation
from scipy.linalg import block_diag

from .._check import fail, parse_sampling, require
from ..plan import Activation, Block, Coupling, Frame, Linear, Norm, Plan
from .intertwiners import intertwiners
from .sampling import (
    HiddenSpace,
    escnn_matrices,
    group_matrices,
    hidden_space,
    invariants,
    lebedev_matrices,
    merge_samples,
    planar_frame,
    trivial_coordinates,
    zonal_frame,
)


@dataclass(frozen=True)
class _Sampled:
    """A frame with what the layers need of it: Z maps frame coordinates to escnn's."""

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


_MOST_POLISHED = 256
_POLISHED: dict[tuple, np.ndarray] = {}


def _polished(rep_in: Representation, rep_out: Representation, sampled: np.ndarray) -> np.ndarray:
    """escnn's sampled basis (n_b, o, i), float32 there, as exact intertwiners in float64; read-only."""
    key = rep_in, rep_out, sampled.shape, hashlib.sha256(sampled.reshape(-1).view(np.uint8)).digest()
    if key not in _POLISHED:
        if len(_POLISHED) == _MOST_POLISHED:
            del _POLISHED[next(iter(_POLISHED))]
        _POLISHED[key] = _without_rounding(intertwiners(rep_in, rep_out, sampled))
        _POLISHED[key].flags.writeable = False
    exact = _POLISHED[key]
    error = max((np.abs(e - s).max(initial=0) for e, s in zip(exact, sampled, strict=True)), default=0)
    error /= max(sampled.max(initial=1), -sampled.min(initial=-1))
    remedy = "Do two different representations share a name? escnn tells them apart by it."
    pair = f"intertwiners from {rep_in.name} to {rep_out.name}"
    require(error < 1e-4, "escnn basis", pair, f"a deviation of {error:.1e}", remedy, RuntimeError)
    return exact


def _without_rounding(basis: np.ndarray) -> np.ndarray:
    """The basis after setting to 0, in place, what is only rounding, so that zeros are seen to be structural."""
    bound = 1e-12 * max(basis.max(initial=0), -basis.min(initial=0))
    for element in basis:
        element[np.abs(element) < bound] = 0
    return basis


@dataclass(frozen=True)
class _Pair:
    """One (input representation, output representation) of an escnn Linear: where fields start, weights and basis."""

    rep_in: Representation
    rep_out: Representation
    in_fields: list[int]  # positions in the list of input fields
    out_fields: list[int]
    offset: int
    basis: np.ndarray  # (n_b, o, i)


def polished_blocks(expansion: torch.nn.Module, stored=lambda key: None) -> dict[tuple[str, str], np.ndarray]:
    """Exact basis (n_b, o, i) of each (input, output) pair of representation names of a ``BlocksBasisExpansion``.

    ``stored``: maps the name of a buffer to a tensor that stands in for it (a checkpoint's), or to None.

    Raises:
        RuntimeError: a basis that does not consist of intertwiners.
    """
    by_name = [{r.name: r for r in reprs} for reprs in (expansion._in_reprs, expansion._out_reprs)]
    blocks = {}
    for pair in expansion._representations_pairs:
        name = f"block_expansion_{expansion._escape_pair(pair)}"
        sampled = stored(f"_basisexpansion.{name}.sampled_basis")
        sampled = getattr(expansion, name).sampled_basis if sampled is None else sampled
        sampled = np.ascontiguousarray(sampled.detach().cpu().float().numpy()[..., 0])
        blocks[pair] = _polished(by_name[0][pair[0]], by_name[1][pair[1]], sampled)
    return blocks


def _pairs(linear: escnn.nn.Linear) -> list[_Pair]:
    expansion = linear.basisexpansion
    by_name = [defaultdict(list), defaultdict(list)]
    for fields, reprs in zip(by_name, (linear.in_type.representations, linear.out_type.representations), strict=True):
        for n, r in enumerate(reprs):
            fields[r.name].append(n)
    pairs = []
    for pair, basis in polished_blocks(expansion).items():
        ins, outs = by_name[0][pair[0]], by_name[1][pair[1]]
        rep_in, rep_out = linear.in_type.representations[ins[0]], linear.out_type.representations[outs[0]]
        pairs.append(_Pair(rep_in, rep_out, ins, outs, expansion._weights_ranges[pair][0], basis))
    return pairs


def _bias_basis(linear: escnn.nn.Linear, field: int) -> np.ndarray:
    """(size, n) columns that the bias adds to one output field: invariant vectors, polished like the basis."""
    reprs = linear.out_type.representations
    counts = np.cumsum([0] + [len(trivial_coordinates(r)) for r in reprs])
    invariant = invariants(reprs[field])
    if invariant.shape[1] == 0:
        return invariant
    start = _starts(reprs)[field]
    here = np.s_[start : start + reprs[field].size, counts[field] : counts[field + 1]]
    columns = linear.bias_expansion.detach()[here].cpu().double().numpy()
    exact = invariant @ np.linalg.lstsq(invariant, columns, rcond=None)[0]
    error = np.abs(exact - columns).max() / np.abs(columns).max(initial=1)
    require(error < 1e-4, "bias_expansion", "invariant vectors", f"a deviation of {error:.1e}", kind=RuntimeError)
    return exact


def _starts(reprs) -> np.ndarray:
    """(n + 1,) first coordinate of every field."""
    return np.concatenate([[0], np.cumsum([r.size for r in reprs])]).astype(int)


def _input_fields(sampled: _Sampled, in_reprs: list[Representation]) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Z of every input field (position first), where each starts in frame coordinates, and their total size."""
    frame = sampled.frame
    if frame.kind == "zonal":
        position = np.eye(3)[:, 2:]
    elif frame.kind == "planar":
        position = np.concatenate([frame.plane[:, : 2 - frame.regular], frame.axis], axis=1)
    else:
        position = np.eye(frame.dim)
    starts, attributes = _starts(in_reprs[1:]), np.linalg.inv(frame.attribute).T  # a = attributes · a'
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
    for pair in _pairs(linear):
        groups = defaultdict(list)  # input fields of one representation and one Z (the position has its own)
        for column, n in enumerate(pair.in_fields):
            groups[first and n == 0].append((column, n))
        for members in groups.values():
            basis = _without_rounding(sampled.hidden.T @ pair.basis @ z_in[members[0][1]])
            blocks.append(
                Block(
                    offset=pair.offset,
                    n_in=len(pair.in_fields),
                    columns=np.array([c for c, _ in members]),
                    out_start=coefficients * np.array(pair.out_fields),
                    in_start=np.array([in_start[n] for _, n in members]),
                    basis=basis,
                )
            )
    out_size = coefficients * len(out_reprs)
    bias = np.zeros((out_size, 0))
    if linear.bias is not None:
        bias = np.kron(np.eye(len(out_reprs)), sampled.hidden.T @ _bias_basis(linear, 0))
    return Linear(in_size, out_size, tuple(blocks), bias)


def lower_map(linear: escnn.nn.Linear | escnn.nn.TensorProductModule) -> Linear:
    """An equivariant map in its own coordinates, with exact bases."""
    columns = None
    if getattr(linear, "bias", None) is not None:
        columns = block_diag(*(_bias_basis(linear, n) for n in range(len(linear.out_type))))
    return lower_expansion(linear.basisexpansion, polished_blocks(linear.basisexpansion), columns)


def sampled_blocks(expansion: torch.nn.Module) -> dict[tuple[str, str], np.ndarray]:
    """escnn's own basis of each pair, which it has in float32."""
    names = {pair: f"block_expansion_{expansion._escape_pair(pair)}" for pair in expansion._representations_pairs}
    basis = {pair: getattr(expansion, name).sampled_basis[..., 0] for pair, name in names.items()}
    return {pair: sampled.detach().cpu().double().numpy() for pair, sampled in basis.items()}


def lower_expansion(
    expansion: torch.nn.Module, basis: dict[tuple[str, str], np.ndarray], bias: np.ndarray | None = None
) -> Linear:
    """The matrix that escnn's ``BlocksBasisExpansion`` makes of weights, in its own coordinates. ``basis``: of each
    pair; ``bias`` (out_size, n_bias): its ``bias_expansion``."""
    in_reprs, out_reprs = expansion._in_reprs, expansion._out_reprs
    in_start, out_start, blocks = _starts(in_reprs), _starts(out_reprs), []
    for pair in expansion._representations_pairs:
        ins = [n for n, r in enumerate(in_reprs) if r.name == pair[0]]
        outs = [n for n, r in enumerate(out_reprs) if r.name == pair[1]]
        blocks.append(
            Block(
                offset=expansion._weights_ranges[pair][0],
                n_in=len(ins),
                columns=np.arange(len(ins)),
                out_start=out_start[outs],
                in_start=in_start[ins],
                basis=basis[pair],
            )
        )
    out_size = int(out_start[-1])
    return Linear(int(in_start[-1]), out_size, tuple(blocks), np.zeros((out_size, 0)) if bias is None else bias)


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


def _read_through(basis: np.ndarray, z: np.ndarray) -> np.ndarray:
    """B Z; B itself, which may be large, where Z is the identity."""
    return basis if np.array_equal(z, np.eye(len(z))) else _without_rounding(basis @ z)


def _classes(reprs: list[Representation]) -> list[list[int]]:
    """Fields grouped by representation."""
    groups = defaultdict(list)
    for n, r in enumerate(reprs):
        groups[r.name].append(n)
    return list(groups.values())


def _lower_last(
    linear: escnn.nn.Linear, shape: KernelShape, hidden: list[np.ndarray], hidden_start: np.ndarray, trivial: np.ndarray
) -> tuple[Coupling, ...]:
    """The last layer as couplings. ``hidden``: Z (m_full, m) of every field it reads; ``hidden_start``: where they
    begin, the constant one last."""
    out_start, in_start = _starts(shape.out_reprs), _starts(shape.in_reprs)
    tensor_reprs, n_in = linear.out_type.representations, len(shape.in_reprs)
    bias_start = np.cumsum([0] + [len(trivial_coordinates(r)) for r in tensor_reprs])
    pairs, couplings = _pairs(linear), []
    for us in _classes(shape.out_reprs):
        for vs in _classes(shape.in_reprs):
            field = np.array([[u * n_in + v for v in vs] for u in us])
            rep = tensor_reprs[field[0, 0]]
            sizes = shape.out_reprs[us[0]].size, shape.in_reprs[vs[0]].size
            where = {"out_start": out_start[us], "in_start": in_start[vs]}
            bias_basis = _bias_basis(linear, field[0, 0]).T.reshape(-1, *sizes, 1)
            bias_at = -1
            if len(bias_basis):
                bias_at = len(couplings)
                one = hidden_start[-1:]
                empty = np.zeros((len(bias_basis), 0, 0))
                couplings.append(
                    Coupling(
                        "bias", bias_start[field], **where, hidden_start=one, basis=bias_basis, fold=empty, fold_into=-1
                    )
                )
            for pair in pairs:
                if pair.rep_out.name != rep.name:
                    continue
                index = {f: n for n, f in enumerate(pair.out_fields)}
                n_w, n_b = len(pair.in_fields), len(pair.basis)
                row = pair.offset + np.vectorize(index.__getitem__)(field) * n_w * n_b
                basis = _read_through(pair.basis, hidden[pair.in_fields[0]]).reshape(n_b, *sizes, -1)
                fold = np.zeros((n_b, len(trivial), len(bias_basis)))
                if bias_at >= 0 and len(trivial):
                    columns = basis[..., trivial].transpose(1, 2, 0, 3).reshape(-1, n_b * len(trivial))
                    target = bias_basis[..., 0].reshape(len(bias_basis), -1).T
                    fold = np.linalg.lstsq(target, columns, rcond=None)[0].T.reshape(n_b, len(trivial), -1)
                couplings.append(
                    Coupling(
                        "weights",
                        row,
                        **where,
                        hidden_start=hidden_start[pair.in_fields],
                        basis=basis,
                        fold=fold,
                        fold_into=bias_at if len(trivial) else -1,
                    )
                )
    return tuple(couplings)


def lower(mlp, shape: KernelShape, sampling: str) -> Plan:
    """The plan of a kernel MLP.

    Args:
        mlp: a :class:`~implicit_steer.nn.KernelMLP`: escnn Linear, Fourier activation (and batch norm) in turn, a last
            Linear to the fields ``out_u ⊗ in_v``, u slowest.
        shape: fields, cutoff and aggregation of the convolution.
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
    )
