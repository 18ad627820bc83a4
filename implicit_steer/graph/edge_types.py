"""Attributes of edges that take few different values: the distinct rows, and which of them each edge has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import require
from .graph import require_integers, require_range


class EdgeTypes:
    """Attributes a_e = rows[index[e]] of E edges, which have T distinct rows between them.

    A layer takes it in place of ``edge_attr`` and computes the same, bit for bit. Derivatives go to ``rows``.

    Args:
        index: (E,) integers in 0 .. T-1, the type of each edge, on the device of ``rows``; any integer dtype (int32 and
            int64 are kept, others become int64). It is copied.
        rows: (T, A) floating point, the attributes of each type. T is at least 1 where there are edges.

    Attributes (not to be written to):
        index (E,), rows (T, A).

    Raises:
        TypeError: ``index`` is no tensor of integers, or ``rows`` no floating point tensor.
        ValueError: wrong shapes, tensors on two devices, or an index (negative ones included) outside the rows. On a
            GPU such an index is a failed assertion of the device: nothing here waits for the device.

    Example:
        >>> bonds = EdgeTypes(torch.tensor([0, 2, 0]), torch.eye(4))  # one-hot bond types
        >>> bonds.attributes().shape
        torch.Size([3, 4])
    """

    index: Tensor
    rows: Tensor

    def __init__(self, index: Tensor, rows: Tensor) -> None:
        _require_rows("rows", rows, "(T, A)")
        self.index, self.rows = _checked_index(index, rows), rows

    @classmethod
    def from_rows(cls, edge_attr: Tensor) -> EdgeTypes:
        """The types of the rows of ``edge_attr`` (E, A); rows that are equal are one type.

        Raises:
            TypeError, ValueError: ``edge_attr`` is no floating point tensor of this shape, or requires a gradient,
                which has no meaning for rows that many edges share.

        Example:
            >>> EdgeTypes.from_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
            EdgeTypes(num_edges=3, num_types=2, num_attributes=2, dtype=float32, device=cpu)
        """
        _require_rows("edge_attr", edge_attr, "(E, A)")
        remedy = "Pass EdgeTypes(index, rows) with rows that require one, or edge_attr.detach()."
        differentiated = edge_attr.requires_grad and torch.is_grad_enabled()
        require(not differentiated, "edge_attr", "a tensor that requires no gradient", "one that does", remedy)
        if edge_attr.shape[1] == 0:  # torch.unique takes no empty rows
            return cls(edge_attr.new_zeros(len(edge_attr), dtype=torch.int64), edge_attr[:1])
        rows, index = torch.unique(edge_attr, dim=0, return_inverse=True)
        return cls(index, rows)

    def attributes(self) -> Tensor:
        """(E, A): the attributes of every edge, differentiable in ``rows``."""
        return self.rows.index_select(0, self.index)

    def to(self, *args: Any, **kwargs: Any) -> EdgeTypes:
        """The same types with ``rows.to(...)``, and the index on its device; itself where nothing changes."""
        rows = self.rows.to(*args, **kwargs)
        if rows is self.rows:
            return self
        moved = object.__new__(EdgeTypes)
        moved.index, moved.rows = self.index.to(rows.device), rows
        return moved

    def __len__(self) -> int:
        return self.index.shape[0]

    def __repr__(self) -> str:
        types, attributes = self.rows.shape
        dtype = str(self.rows.dtype).removeprefix("torch.")
        return (
            f"EdgeTypes(num_edges={len(self)}, num_types={types}, num_attributes={attributes}, dtype={dtype}, "
            f"device={self.rows.device})"
        )


def _require_rows(name: str, given: Any, shape: str) -> None:
    expected = f"a floating point tensor of shape {shape}"
    ok = isinstance(given, Tensor) and given.is_floating_point()
    require(ok, name, expected, getattr(given, "dtype", type(given).__name__), kind=TypeError)
    require(given.dim() == 2, name, expected, tuple(given.shape))


def _checked_index(given: Any, rows: Tensor) -> Tensor:
    """A contiguous copy in int32 or int64, so that writing to ``given`` cannot take it out of range."""
    require_integers(given, "index")
    require(given.dim() == 1, "index", "a tensor of shape (E,)", tuple(given.shape))
    require(given.device == rows.device, "index", f"device {rows.device}, as rows", given.device, "Move it with .to().")
    dtype = torch.int32 if given.dtype == torch.int32 else torch.int64
    index = torch.empty_like(given, dtype=dtype, memory_format=torch.contiguous_format).copy_(given)
    count = rows.shape[0]
    # A compiled program cannot wait for the answer, nor can the stream of a GPU: they stop at a wrong index.
    if torch.compiler.is_compiling() or index.is_cuda:
        right = ((index >= 0) & (index < count)).all()
        torch._assert_async(right, "index: expected types of edges, in 0 .. len(rows) - 1, got others.")
    elif len(index):
        require_range("index", index, count, "types", "It holds for each edge the number of its row in rows.")
    return index
