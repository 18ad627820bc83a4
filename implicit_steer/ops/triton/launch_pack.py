"""Launches of pack.py: parameters into packed weights, and gradients of packed weights into those of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...plan import Plan
from ...plan.packing import cached
from . import launch, pack
from .packing import Entries, Packing, packing
from .prepared import Prepared
from .sizes import cdiv, next_power_of_2
from .tables import tables

_MOST_ENTRIES = {False: 8, True: 128}  # of a row that are read at a time: forward, and of the transposed matrix


@dataclass(frozen=True, eq=False)
class PackingOnDevice:
    """What ``packing.packing`` found, on a device.

    Attributes:
        forward, transposed: factors, and the arrays of ``Entries``.
        n_rows, n_parameters: rows of the two matrices.
        layers_end, gradients_end: as in ``Packing``.
        shell: which of the learned tensors is the shell's width, and its position among the parameters.
        constants: of the kernel, forward and transposed.
    """

    forward: tuple[Tensor, ...]
    transposed: tuple[Tensor, ...]
    n_rows: int
    n_parameters: int
    layers_end: int
    gradients_end: int
    shell: tuple[int, int]
    constants: tuple[dict[str, Any], dict[str, Any]]


def _constants(found: Packing, backward: bool) -> dict[str, Any]:
    rowptr = (found.transposed if backward else found.forward).rowptr
    width = min(next_power_of_2(int(np.diff(rowptr).max(initial=1))), _MOST_ENTRIES[backward])
    return {"EPS": found.eps, "NORMS": len(found.factors) > 1, "BACKWARD": backward, "BN": width}


@cached
def prepare_packing(
    plan: Plan, sizes: tuple[int, ...], measured: bool, device: torch.device, dtype: torch.dtype
) -> PackingOnDevice:
    """The packing of tensors of these sizes, see ``packing.packing``; cached."""
    found = packing(tables(plan), sizes, measured)

    def tensors(entries: Entries) -> tuple[Tensor, ...]:
        kinds = {"value": dtype}
        arrays = {"factors": found.factors} | entries._asdict()
        return tuple(torch.tensor(a, dtype=kinds.get(n, torch.int32), device=device) for n, a in arrays.items())

    return PackingOnDevice(
        forward=tensors(found.forward),
        transposed=tensors(found.transposed),
        n_rows=len(found.forward.rowptr) - 1,
        n_parameters=sum(sizes),
        layers_end=found.layers_end,
        gradients_end=found.gradients_end,
        shell=(next(n for n in range(len(sizes)) if sum(sizes[:n]) == found.shell), found.shell),
        constants=(_constants(found, False), _constants(found, True)),
    )


def _of_variant(_: Prepared, packing: PackingOnDevice, backward: bool) -> dict[str, Any]:
    return packing.constants[backward]


def _grid(variant: launch.Variant, n_rows: int) -> tuple[int]:
    rows = cdiv(variant.edges, variant.constants["BN"])
    return (cdiv(n_rows, rows),)


def packed(p: Prepared, packing: PackingOnDevice, numbers: Tensor) -> Tensor:
    """The packed weights (n_rows,) from those of learned tensors and statistics."""
    out, variant = numbers.new_empty(packing.n_rows), p.variant(pack.pack, _of_variant, packing, False)
    grid = _grid(variant, packing.n_rows)
    launch.launch(variant, grid, (numbers, *packing.forward, numbers, out, packing.n_rows))
    return out


def parameter_gradients(p: Prepared, packing: PackingOnDevice, numbers: Tensor, gradient: Tensor) -> Tensor:
    """(n_parameters,) from the gradient of the packed weights."""
    out, variant = numbers.new_empty(packing.n_parameters), p.variant(pack.pack, _of_variant, packing, True)
    grid = _grid(variant, packing.n_parameters)
    launch.launch(variant, grid, (numbers, *packing.transposed, gradient, out, packing.n_parameters))
    return out
