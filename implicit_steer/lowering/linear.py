"""escnn's linear maps → their exact bases of intertwiners, and :class:`~implicit_steer.plan.Linear`.

How escnn lays out weights and names bases is known here alone.
"""

from __future__ import annotations

from . import _require_escnn  # noqa: F401

# isort: split
import hashlib
from collections import defaultdict
from dataclasses import dataclass

import escnn.nn
import numpy as np
import torch
from escnn.group import Representation
from scipy.linalg import block_diag

from .._check import require
from ..plan import Block, Linear
from .intertwiners import intertwiners
from .sampling import distinct, invariants

_MOST_POLISHED = 256
_POLISHED: dict[tuple, np.ndarray] = {}


def _polished(rep_in: Representation, rep_out: Representation, sampled: np.ndarray) -> np.ndarray:
    """escnn's sampled basis (n_b, o, i), float32 there, as exact intertwiners in float64; read-only."""
    key = rep_in, rep_out, sampled.shape, hashlib.sha256(sampled.reshape(-1).view(np.uint8)).digest()
    if key not in _POLISHED:
        if len(_POLISHED) == _MOST_POLISHED:
            del _POLISHED[next(iter(_POLISHED))]
        _POLISHED[key] = without_rounding(intertwiners(rep_in, rep_out, sampled))
        _POLISHED[key].flags.writeable = False
    exact = _POLISHED[key]
    error = max((np.abs(e - s).max(initial=0) for e, s in zip(exact, sampled, strict=True)), default=0)
    error /= max(sampled.max(initial=1), -sampled.min(initial=-1))
    remedy = "Do two different representations share a name? escnn tells them apart by it."
    pair = f"intertwiners from {rep_in.name} to {rep_out.name}"
    require(error < 1e-4, "escnn basis", pair, f"a deviation of {error:.1e}", remedy, RuntimeError)
    return exact


def without_rounding(basis: np.ndarray) -> np.ndarray:
    """The basis after setting to 0, in place, what is only rounding, so that its structural zeros are exact."""
    bound = 1e-12 * max(basis.max(initial=0), -basis.min(initial=0))
    for element in basis:
        element[np.abs(element) < bound] = 0
    return basis


@dataclass(frozen=True)
class Pair:
    """One (input representation, output representation) of an escnn Linear: its fields, weights and basis."""

    rep_out: Representation
    in_fields: np.ndarray  # positions in the list of input fields
    out_fields: np.ndarray
    offset: int  # of the pair's first weight
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


def fields_by_name(reprs) -> dict[str, np.ndarray]:
    """Name of each representation → positions of its fields. escnn tells representations apart by their names."""
    positions = defaultdict(list)
    for n, r in enumerate(reprs):
        positions[r.name].append(n)
    return {name: np.array(fields) for name, fields in positions.items()}


def pairs_of(linear: escnn.nn.Linear) -> list[Pair]:
    """The pairs of representations whose basis is not empty, in the order of their weights."""
    in_reprs, out_reprs = linear.in_type.representations, linear.out_type.representations
    in_fields, out_fields = fields_by_name(in_reprs), fields_by_name(out_reprs)
    pairs = []
    for pair, basis in polished_blocks(linear.basisexpansion).items():
        ins, outs = in_fields[pair[0]], out_fields[pair[1]]
        offset = linear.basisexpansion._weights_ranges[pair][0]
        pairs.append(Pair(out_reprs[outs[0]], ins, outs, offset, basis))
    return pairs


def bias_basis(linear, rep: Representation) -> np.ndarray:
    """(size, n) columns that the bias of a :class:`~implicit_steer.nn.Linear` or of a kernel's layer adds to every
    output field of this representation: invariant vectors, polished like the basis."""
    invariant = invariants(rep)
    if invariant.shape[1] == 0:
        return invariant
    columns = linear.expand_bias.blocks[rep.name].double().numpy()
    exact = invariant @ np.linalg.lstsq(invariant, columns, rcond=None)[0]
    error = np.abs(exact - columns).max() / np.abs(columns).max(initial=1)
    require(error < 1e-4, "bias_expansion", "invariant vectors", f"a deviation of {error:.1e}", kind=RuntimeError)
    return exact


def starts_of(reprs) -> np.ndarray:
    """(n + 1,) first coordinate of every field."""
    return np.concatenate([[0], np.cumsum([r.size for r in reprs])]).astype(int)


def lower_map(linear: escnn.nn.Linear | escnn.nn.TensorProductModule) -> Linear:
    """An equivariant map of escnn's, in escnn's coordinates, with exact bases."""
    columns = None
    if getattr(linear, "bias", None) is not None:
        of_name = {rep.name: bias_basis(linear, rep) for rep in distinct(linear.out_type.representations)}
        columns = block_diag(*(of_name[rep.name] for rep in linear.out_type.representations))
    return lower_expansion(linear.basisexpansion, polished_blocks(linear.basisexpansion), columns)


def sampled_blocks(expansion: torch.nn.Module) -> dict[tuple[str, str], np.ndarray]:
    """escnn's own basis (n_b, o, i) of each pair, rounded to float32 by escnn, in float64."""
    names = {pair: f"block_expansion_{expansion._escape_pair(pair)}" for pair in expansion._representations_pairs}
    basis = {pair: getattr(expansion, name).sampled_basis[..., 0] for pair, name in names.items()}
    return {pair: sampled.detach().cpu().double().numpy() for pair, sampled in basis.items()}


def lower_expansion(
    expansion: torch.nn.Module, basis: dict[tuple[str, str], np.ndarray], bias: np.ndarray | None = None
) -> Linear:
    """The map whose matrix escnn's ``BlocksBasisExpansion`` makes of weights, in escnn's coordinates. ``basis``: (n_b,
    o, i) of each pair; ``bias`` (out_size, n_bias): the columns that the biases multiply."""
    in_reprs, out_reprs = expansion._in_reprs, expansion._out_reprs
    in_start, out_start, blocks = starts_of(in_reprs), starts_of(out_reprs), []
    in_fields, out_fields = fields_by_name(in_reprs), fields_by_name(out_reprs)
    for pair in expansion._representations_pairs:
        ins, outs = in_fields[pair[0]], out_fields[pair[1]]
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
