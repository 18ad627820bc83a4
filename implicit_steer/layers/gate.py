"""The gated nonlinearity on plain tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import require
from ..plan import FUNCTIONS
from ..plan.activations import phi
from ..plan.packing import Constants
from ._modules import NoTorchScript
from .fields import Fields, check_features

GATES = ("sigmoid", *FUNCTIONS)


def apply(name: str, u: Tensor) -> Tensor:
    """The function ``name``, one of ``GATES``, of u."""
    return torch.sigmoid(u) if name == "sigmoid" else phi(name, u)


class GateBase(NoTorchScript, torch.nn.Module):
    """y = φ(s) for invariant scalars s, y_n = σ(g_n) · x_n for every other field x_n, on tensors. A subclass calls
    :meth:`_set_fields`."""

    function: str
    gate: str

    def _set_fields(self, function: str, gate: str, fields: tuple[tuple[int, bool], ...]) -> None:
        """Set φ, σ, and for every field of the output its size and whether a gate multiplies it."""
        require(function in GATES, "function", f"one of {GATES}", repr(function))
        require(gate in GATES, "gate", f"one of {GATES}", repr(gate))
        self.function, self.gate, self._fields = function, gate, fields
        sizes, gated = (np.array([field[k] for field in fields], dtype=np.int64) for k in (0, 1))
        channels = np.repeat(gated, sizes)  # 1 where a channel is gated
        order = np.argsort(channels, kind="stable")  # invariant scalars first
        gates = sizes.sum() + np.repeat(np.arange(gated.sum()), sizes[gated == 1])
        n = len(channels) - channels.sum()
        self._places = Constants(order[:n], order[n:], gates, np.argsort(order, kind="stable"))

    def _evaluate(self, x: Tensor) -> Tensor:
        scalars, fields, gates, order = self._places.like(x)
        invariant = apply(self.function, x.index_select(1, scalars))
        if not len(fields):
            return invariant
        gated = x.index_select(1, fields) * apply(self.gate, x.index_select(1, gates))
        return torch.cat([invariant, gated], 1).index_select(1, order)

    def extra_repr(self) -> str:
        """What distinguishes this gate."""
        gated = sum(is_gated for _, is_gated in self._fields)
        return f"{self.out_type}, function={self.function!r}, gate={self.gate!r}, {gated} gated fields"


class GatedFields(GateBase):
    """:class:`implicit_steer.nn.Gate` without escnn: (N, C_out + gates, ...) → (N, C_out, ...), plain tensors.

    Args:
        in_type, out_type: sizes and names of the features; the gates are the last ones of ``in_type``.
        function, gate: φ and σ, two of ``GATES``.
        fields: for every field of ``out_type``, its size and whether a gate multiplies it.
    """

    def __init__(
        self, in_type: Fields, out_type: Fields, function: str, gate: str, fields: tuple[tuple[int, bool], ...]
    ) -> None:
        super().__init__()
        size, gates = sum(size for size, _ in fields), sum(gated for _, gated in fields)
        require(size == out_type.size, "fields", f"fields of {out_type.size} channels in all", size)
        require(in_type.size == size + gates, "in_type", f"{size} channels and {gates} gates", in_type.size)
        self.in_type, self.out_type = in_type, out_type
        self._set_fields(function, gate, tuple((size, bool(gated)) for size, gated in fields))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        given = {name: getattr(self, name) for name in ("in_type", "out_type", "function", "gate")}
        return given | {"fields": self._fields}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the functions and the gates."""
        check_features(x, self.in_type.size)
        return self._evaluate(x)
