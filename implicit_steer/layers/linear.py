"""Equivariant linear maps and products on plain tensors: weights times escnn's basis, expanded at every call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import plan
from .._check import require
from ..plan.packing import Expansion
from .fields import Fields, check_features
from .kernel import BasisFingerprint, LinearParameters


class Linear(BasisFingerprint, LinearParameters):
    """y = W x + b with an intertwiner W and an invariant b, without escnn: (N, C_in) → (N, C_out), plain tensors.

    Args:
        in_type, out_type: sizes and names of the features.
        layer: how W and b are made of the learned ``weights`` and ``bias``, so that training keeps W equivariant.
        has_bias: whether there is a b.
    """

    def __init__(self, in_type: Fields, out_type: Fields, layer: plan.Linear, has_bias: bool) -> None:
        super().__init__(layer.n_weights, layer.bias.shape[1] if has_bias else 0)
        sizes = in_type.size, out_type.size
        require((layer.in_size, layer.out_size) == sizes, "layer", f"sizes {sizes}", (layer.in_size, layer.out_size))
        self.in_type, self.out_type, self.layer = in_type, out_type, layer
        self._expansion = Expansion(layer)
        self._stamp(layer.fingerprint)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("in_type", "out_type", "layer")
        return {name: getattr(self, name) for name in names} | {"has_bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        check_features(x, self.in_type.size)
        matrix, shift = self._expansion(self.weights, self.bias)
        return F.linear(x, matrix, None if self.bias is None else shift)

    def extra_repr(self) -> str:
        """What distinguishes this map."""
        return f"{self.in_type} -> {self.out_type}, bias={self.bias is not None}"


def project_squares(x: Tensor, matrix: Tensor, fields: int) -> Tensor:
    """x (N, fields · i) → (N, fields · o): W vec(x xᵀ) of each field, W its o rows of ``matrix`` (fields · o, i²)."""
    x_field = x.view(x.shape[0], fields, -1)
    product = torch.einsum("nfi,nfj->nfij", x_field, x_field).flatten(2)
    return torch.einsum("foh,nfh->nfo", matrix.view(fields, -1, product.shape[2]), product).flatten(1)


class TensorProduct(BasisFingerprint, LinearParameters):
    """y = W vec(x xᵀ) for every field, without escnn: (N, fields · i) → (N, fields · o), plain tensors.

    Args:
        in_type, out_type: sizes and names of the features.
        layer: how the matrices W of all fields, (fields · o, i²), are made of the learned ``weights``.
        fields: how many fields x has.
    """

    def __init__(self, in_type: Fields, out_type: Fields, layer: plan.Linear, fields: int) -> None:
        super().__init__(layer.n_weights, 0)
        sizes = (in_type.size // fields) ** 2, out_type.size
        require((layer.in_size, layer.out_size) == sizes, "layer", f"sizes {sizes}", (layer.in_size, layer.out_size))
        self.in_type, self.out_type, self.layer, self.fields = in_type, out_type, layer, fields
        self._expansion = Expansion(layer)
        self._stamp(layer.fingerprint)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in ("in_type", "out_type", "layer", "fields")}

    def forward(self, x: Tensor) -> Tensor:
        """W vec(x xᵀ) of every field."""
        check_features(x, self.in_type.size)
        return project_squares(x, self._expansion(self.weights, None)[0], self.fields)

    def extra_repr(self) -> str:
        """What distinguishes this product."""
        return f"{self.in_type} -> {self.out_type}"
