"""What a file may ask for: no more than its tensors account for. Anyone can write a large size into a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._check import require
from ..plan import FrozenArrays, Linear, Plan, Radial, Table
from ..plan.irreps import Irreps

# Values that a matrix of a plan may have per value of the file. Networks of the experiments have up to 4, wide layers
# of regular fields of large finite groups some hundreds.
_PER_NUMBER = 1000
_MOST_KNOTS = 10**6  # of a table, whatever the file holds: what is made of them takes some 100 bytes each
_CREATE = (torch.empty, torch.full, torch.ones, torch.zeros)


class Placeholders(TorchFunctionMode):
    """Within it parameters and buffers are made on device meta, where they take no memory: the file's tensors replace
    them. More values than the tensors of ``state`` have together are a ``ValueError``."""

    def __init__(self, state: Iterable[Tensor]) -> None:
        super().__init__()
        self._all = self._left = sum(tensor.numel() for tensor in state)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in _CREATE:
            return function(*args, **(kwargs or {}))
        made = function(*args, **(kwargs or {}) | {"device": "meta"})
        self._left -= made.numel()
        require(self._left >= 0, "sizes", f"parameters and buffers of {self._all} values, as in the file", "more")
        return made


def check_irreps(arguments: dict[str, Any], numbers: int) -> None:
    """Raise unless a file of ``numbers`` values accounts for a module that is built from irreps and sizes."""
    sizes = [Irreps.of(value, name).size for name, value in arguments.items() if name.startswith("irreps")]
    counts = [value for name, value in arguments.items() if isinstance(value, int) and name != "table"]
    counts += [value.size for value in arguments.values() if isinstance(value, Radial)]
    most = _PER_NUMBER * (_PER_NUMBER + numbers)
    largest = max([math.prod(sizes), *(count**2 for count in counts)])
    require(largest <= most, "sizes", f"irreps and sizes of at most {most} values", largest)
    _check_knots(arguments.get("table"))


def check_size(piece: FrozenArrays, numbers: int) -> None:
    """Raise unless a file of ``numbers`` values accounts for the matrices of a piece of a plan."""
    if isinstance(piece, Linear):
        size = piece.in_size * piece.out_size
        size += sum(len(block.out_start) * len(block.in_start) * block.basis.size for block in piece.blocks)
    elif isinstance(piece, Plan):
        size = piece.in_size + piece.out_size
    elif isinstance(piece, Table):
        _check_knots(piece.knots)
        return
    else:
        return
    most = _PER_NUMBER * (_PER_NUMBER + numbers)
    require(size <= most, "sizes", f"a {type(piece).__name__} of at most {most} values", size)


def _check_knots(knots: Any) -> None:
    require(not isinstance(knots, int) or knots <= _MOST_KNOTS, "table", f"at most {_MOST_KNOTS} knots", knots)
