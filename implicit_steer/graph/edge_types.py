"""Types of edges: distinct rows of attributes, and which of them each edge has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class EdgeTypes:
    """index (E,), rows (T, A): edge e has the attributes rows[index[e]]."""

    index: Tensor
    rows: Tensor

    @classmethod
    def from_rows(cls, edge_attr: Tensor) -> EdgeTypes:
        """The distinct rows of edge_attr (E, A)."""
        rows, index = torch.unique(edge_attr, dim=0, return_inverse=True)
        return cls(index, rows)

    def attributes(self) -> Tensor:
        """(E, A)."""
        return self.rows.index_select(0, self.index)
