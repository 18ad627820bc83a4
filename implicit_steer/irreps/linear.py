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
        common = [irrep for irrep in out if irrep in into]
        if not common:
            fail("irreps_out", f"an irrep of irreps_in = {str(self.irreps_in)!r}", repr(str(self.irreps_out)))
        self._shapes = [(len(out[irrep]), len(into[irrep]), irrep.size) for irrep in common]
        self.weights = torch.nn.Parameter(torch.empty(sum(u * v for u, v, _ in self._shapes)))
        draw(self.weights, np.concatenate([np.full(u * v, 1 / np.sqrt(v)) for u, v, _ in self._shapes]))
        scalars = self.irreps_out.scalars
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(len(scalars))) if bias and scalars else None)
        self._biased = [self.bias is not None and out[irrep] == scalars for irrep in common]
        read, written = ([components(np.array(side[irrep]), irrep.size) for irrep in common] for side in (into, out))
        self._lone_bias = self.bias is not None and not any(self._biased)  # of scalars that x lacks
        if self._lone_bias:
            written.append(np.array(scalars))
        self._starts = [int(places[0]) if np.all(np.diff(places) == 1) else None for places in read]
        self._in_order = np.array_equal(np.concatenate(written), np.arange(self.irreps_out.size))
        self._places = Constants(np.concatenate(written), *read)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        given = {"irreps_in": str(self.irreps_in), "irreps_out": str(self.irreps_out)}
        return given | {"bias": self.bias is not None}

    def forward(self, x: Tensor) -> Tensor:
        """(N, irreps_in.size) → (N, irreps_out.size)."""
        check_features(x, self.irreps_in.size)
        check_dtype("x", x, self.weights.dtype)
        given, x = x.dtype, x.to(self.weights.dtype)
        written, *read = self._places.like(x)
        matrices = self.weights.split([u * v for u, v, _ in self._shapes])
        mixed = []
        for n, (u, v, size) in enumerate(self._shapes):
            start = self._starts[n]
            part = x.index_select(1, read[n]) if start is None else x.narrow(1, start, v * size)
            mixed.append(_mix(matrices[n].view(u, v), self.bias if self._biased[n] else None, part, size))
        if self.bias is not None and self._lone_bias:
            mixed.append(self.bias.expand(x.shape[0], -1))  # torch.export takes len(x) for a constant
        y = torch.cat(mixed, 1)
        if not self._in_order:
            y = x.new_zeros(x.shape[0], self.irreps_out.size).index_copy(1, written, y)
        return y.to(given)

    def extra_repr(self) -> str:
        """What distinguishes this map."""
        return f"{self.irreps_in} -> {self.irreps_out}, bias={self.bias is not None}"


def _mix(matrix: Tensor, bias: Tensor | None, x: Tensor, size: int) -> Tensor:
    """Σ_v W[u, v] x[v] + b[u] of fields of one size: (N, V · size) → (N, U · size)."""
    if size > 1:  # one product of matrices for all components, which stand in rows of their own
        u, v = matrix.shape
        rows = x.unflatten(1, (v, size)).transpose(1, 2).reshape(-1, v)
        return (rows @ matrix.t()).view(-1, size, u).transpose(1, 2).flatten(1)
    return x @ matrix.t() if bias is None else torch.addmm(bias, x, matrix.t())
