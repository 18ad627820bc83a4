"""The equivariant linear map between irreps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import fail, require
from ..layers._modules import NoTorchScript
from ..layers.fields import check_dtype, check_features, fields_of
from ..plan.frozen import components
from ..plan.irreps import Irreps, check_same_group
from ..plan.packing import Constants
from .initialisation import draw


class Linear(NoTorchScript, torch.nn.Module):
    """y_l[u] = Σ_v W_l[u, v] x_l[v] + b[u]: the copies of each irrep are mixed by a matrix W_l; b is added to scalars.

    Args:
        irreps_in, irreps_out: the irreps of x and y, as ``"16x0e + 8x1o"``, in any order. An irrep of y that x lacks
            gets b alone, or 0.
        bias: whether there is a b, which starts as 0.

    Attributes:
        weights: (n,) the matrices W_l (U, V) one after the other, in the order in which the irreps occur in
            ``irreps_out``; drawn with standard deviation 1/√V, which keeps unit variance.
        bias: (n,) b of all scalars of ``irreps_out``, or None.

    Shape: x (N, irreps_in.size), y (N, irreps_out.size); 16-bit features are computed in the dtype of the weights.

    Raises:
        ValueError: a term that is no irrep; irreps of different groups; no irrep in common.

    Example:
        >>> Linear("16x0e + 8x1o", "4x1o + 2x0e")(torch.randn(10, 40)).shape
        torch.Size([10, 14])
    """

    bias: torch.nn.Parameter | None

    def __init__(self, irreps_in: Any, irreps_out: Any, bias: bool = True) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = Irreps.of(irreps_in, "irreps_in"), Irreps.of(irreps_out, "irreps_out")
        check_same_group(irreps_in=self.irreps_in, irreps_out=self.irreps_out)
        require(isinstance(bias, bool), "bias", "True or False", repr(bias), kind=TypeError)
        self.in_type = fields_of(self.irreps_in)
        self.out_type = fields_of(self.irreps_out)
        into, out = self.irreps_in.fields, self.irreps_out.fields
        self._common = [irrep for irrep in out if irrep in into]
        if not self._common:
            fail("irreps_out", f"an irrep of irreps_in = {str(self.irreps_in)!r}", repr(str(self.irreps_out)))
        self._shapes = [(len(out[irrep]), len(into[irrep]), irrep.size) for irrep in self._common]
        self.weights = torch.nn.Parameter(torch.empty(sum(u * v for u, v, _ in self._shapes)))
        draw(self.weights, np.concatenate([np.full(u * v, 1 / np.sqrt(v)) for u, v, _ in self._shapes]))
        scalars = self.irreps_out.scalars
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(len(scalars))) if bias and scalars else None)
        read = np.concatenate([components(np.array(into[irrep]), irrep.size) for irrep in self._common])
        written = np.concatenate([components(np.array(out[irrep]), irrep.size) for irrep in self._common])
        self._places = Constants(read, written, np.array(scalars, dtype=int))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        given = {"irreps_in": str(self.irreps_in), "irreps_out": str(self.irreps_out)}
        return given | {"bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        """(N, irreps_in.size) → (N, irreps_out.size)."""
        check_features(x, self.irreps_in.size)
        check_dtype("x", x, self.weights.dtype)
        given, x = x.dtype, x.to(self.weights.dtype)
        read, written, scalars = self._places.like(x)
        of_irreps = x.index_select(1, read).split([v * size for _, v, size in self._shapes], 1)
        matrices = self.weights.split([u * v for u, v, _ in self._shapes])
        mixed = [
            torch.einsum("uv,nvm->num", matrix.view(u, v), part.unflatten(1, (v, size))).flatten(1)
            for matrix, part, (u, v, size) in zip(matrices, of_irreps, self._shapes, strict=True)
        ]
        # x.shape[0]: torch.export takes len(x) for a constant
        y = x.new_zeros(x.shape[0], self.irreps_out.size).index_copy(1, written, torch.cat(mixed, 1))
        if self.bias is not None:
            y = y.index_add(1, scalars, self.bias.expand(x.shape[0], -1))
        return y.to(given)

    def extra_repr(self) -> str:
        """What distinguishes this map."""
        return f"{self.irreps_in} -> {self.irreps_out}, bias={self.bias is not None}"
