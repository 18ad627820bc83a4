"""Layer normalisation of irreps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import require
from ..layers._modules import NoTorchScript
from ..layers.fields import check_features, fields_of
from ..plan.frozen import require_number
from ..plan.irreps import Irreps
from ..plan.packing import Constants


class Norm(NoTorchScript, torch.nn.Module):
    """Layer normalisation, irrep by irrep: y_l[u] = w[u] x_l[u] / √(⟨x_l²⟩ + ε), and for scalars
    y_0[u] = w[u] (x_0[u] − ⟨x_0⟩) / √(⟨(x_0 − ⟨x_0⟩)²⟩ + ε) + b[u].

    ⟨⟩ is the mean over all components of all copies of one irrep at one node. So the norm is equivariant to rounding,
    and the same in training and in evaluation mode.

    Args:
        irreps: the irreps of x and y, as ``"16x0e + 8x1o"``.
        eps: ε, > 0.

    Attributes:
        weight: (n,) w of every field, which starts as 1.
        bias: (n,) b of every scalar, which starts as 0.

    Shape: x, y (N, irreps.size).

    Raises:
        ValueError: a term that is no irrep; ε ≤ 0.

    Example:
        >>> Norm("16x0e + 8x1o")(torch.randn(10, 40)).shape
        torch.Size([10, 40])
    """

    def __init__(self, irreps: Any, eps: float = 1e-5) -> None:
        super().__init__()
        self.irreps, self.eps = Irreps.of(irreps), eps
        require(len(self.irreps) > 0, "irreps", "at least one irrep", "none")
        require_number("eps", eps)
        require(eps > 0, "eps", "a number > 0", eps)
        self.in_type = self.out_type = fields_of(self.irreps)
        fields = self.irreps.fields
        irrep_of, field_of, n_fields = np.zeros(self.irreps.size, int), np.zeros(self.irreps.size, int), 0
        for n, (irrep, starts) in enumerate(fields.items()):
            for start in starts:
                irrep_of[start : start + irrep.size], field_of[start : start + irrep.size] = n, n_fields
                n_fields += 1
        sizes = np.array([len(starts) * irrep.size for irrep, starts in fields.items()])
        average = np.eye(len(fields))[irrep_of] / sizes  # [components, irreps]
        trivial = np.array([irrep.is_trivial for irrep in fields])
        scalars = np.flatnonzero(trivial[irrep_of])
        self._constants = Constants(average, average * trivial, irrep_of, field_of, scalars)
        self.weight = torch.nn.Parameter(torch.ones(n_fields))
        self.bias = torch.nn.Parameter(torch.zeros(len(scalars)))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"irreps": str(self.irreps), "eps": self.eps}

    def forward(self, x: Tensor) -> Tensor:
        """(N, irreps.size) → the same shape."""
        check_features(x, self.irreps.size)
        average, average_of_scalars, irrep_of, field_of, scalars = self._constants.like(x)
        centred = x - (x @ average_of_scalars).index_select(1, irrep_of)
        scale = (centred.square() @ average + self.eps).rsqrt().index_select(1, irrep_of)
        y = centred * scale * self.weight.index_select(0, field_of)
        return y.index_add(1, scalars, self.bias.expand(x.shape[0], -1))

    def extra_repr(self) -> str:
        """What distinguishes this norm."""
        return f"{self.irreps}, eps={self.eps}"
