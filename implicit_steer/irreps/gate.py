"""The gated nonlinearity on irreps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import require
from ..layers.fields import check_features, fields_of
from ..layers.gate import GateBase, apply
from ..plan.irreps import Irrep, Irreps, Term
from ..plan.packing import Constants


class Gate(GateBase):
    """y = c φ(s) for the scalars s of ``irreps_out``, y_n = c' σ(g_n) · x_n for every other field x_n, g_n a scalar.

    c and c' keep unit variance, as e3nn's do: E[(c φ(u))²] = E[(c' σ(u))²] = 1 for a standard normal u.

    Args:
        irreps_out: the irreps of y, as ``"16x0e + 8x1o"``.
        function: φ, one of ``"silu" | "elu" | "relu" | "gelu" | "tanh" | "sigmoid"``.
        gate: σ, one of the same functions.

    Attributes:
        irreps_in: the irreps of x: ``irreps_out``, then one scalar g_n for every field that is no scalar, in their
            order. Layers before it map to ``gate.irreps_in``.

    Shape: x (N, irreps_in.size), y (N, irreps_out.size).

    Raises:
        ValueError: a term that is no irrep; an unknown function.

    Example:
        >>> gate = Gate("16x0e + 8x1o")
        >>> str(gate.irreps_in), gate(torch.randn(10, gate.irreps_in.size)).shape
        ('16x0e+8x1o+8x0e', torch.Size([10, 40]))

    Source: Weiler et al., *3D Steerable CNNs*, NeurIPS 2018.
    """

    def __init__(self, irreps_out: Any, function: str = "silu", gate: str = "sigmoid") -> None:
        super().__init__()
        self.irreps_out = Irreps.of(irreps_out, "irreps_out")
        require(len(self.irreps_out) > 0, "irreps_out", "at least one irrep", "none")
        fields = [(term.irrep.size, not term.irrep.is_trivial) for term in self.irreps_out for _ in range(term[0])]
        n_gates = sum(is_gated for _, is_gated in fields)
        gates = (Term(n_gates, Irrep(0, int(bool(self.irreps_out.has_parity)))),) if n_gates else ()
        self.irreps_in = Irreps(self.irreps_out.terms + gates)
        self.in_type = fields_of(self.irreps_in)
        self.out_type = fields_of(self.irreps_out)
        self._set_fields(function, gate, tuple(fields))
        scales = _unit_variance(function), _unit_variance(gate)
        self._scale = Constants(np.repeat([scales[is_gated] for _, is_gated in fields], [size for size, _ in fields]))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"irreps_out": str(self.irreps_out), "function": self.function, "gate": self.gate}

    def forward(self, x: Tensor) -> Tensor:
        """(N, irreps_in.size) → (N, irreps_out.size)."""
        check_features(x, self.irreps_in.size)
        (scale,) = self._scale.like(x)
        return self._evaluate(x) * scale


def _unit_variance(function: str) -> float:
    """1 / √E[φ(u)²] for a standard normal u."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    return float((weights @ apply(function, torch.from_numpy(nodes)).numpy() ** 2 / weights.sum()) ** -0.5)
