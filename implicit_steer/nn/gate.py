"""The gated nonlinearity, exactly equivariant for every group; it takes one more scalar for each field."""

from __future__ import annotations

from escnn.nn import FieldType, GeometricTensor

from .._check import require
from ..layers.gate import GateBase
from .equivariant import Steerable, check_input, check_type


class Gate(GateBase, Steerable):
    """y = φ(s) for the invariant fields s of ``out_type``, y_n = σ(g_n) · x_n for every other field x_n, g_n a scalar.

    Equivariant to rounding for every group and every field, since whole fields are multiplied by invariant scalars; a
    field counts as invariant if all its irreps are trivial.

    Args:
        out_type: the fields that come out.
        function: φ, one of ``"silu" | "elu" | "relu" | "gelu" | "tanh" | "sigmoid"``.
        gate: σ, one of the same functions.

    Attributes:
        in_type: what goes in: the fields of ``out_type``, then one trivial field g_n for every field that is not
            invariant, in their order. Layers before it map to ``gate.in_type``.

    Shape: x (N, C_out + gates, ...), y (N, C_out, ...), GeometricTensors.

    Raises:
        TypeError: ``out_type`` is no FieldType, or the input is no GeometricTensor of ``in_type``.
        ValueError: unknown function.

    Example:
        >>> gs = escnn.gspaces.flipRot3dOnR3()
        >>> gate = Gate(gs.type(*[gs.trivial_repr] * 8, *[gs.irrep(1, 1)] * 8))  # 8 scalars, 8 vectors
        >>> conv = ImplicitPointConv(gate.out_type, gate.in_type, None, n_layers=3, n_channels=8)
        >>> gate.in_type.size, gate.out_type.size
        (40, 32)

    Source: Weiler et al., *3D Steerable CNNs*, NeurIPS 2018.
    """

    def __init__(self, out_type: FieldType, function: str = "silu", gate: str = "sigmoid"):
        super().__init__()
        check_type("out_type", out_type)
        fields = tuple((field.size, not _is_invariant(field)) for field in out_type.representations)
        self._set_fields(function, gate, fields)
        gates = [out_type.gspace.trivial_repr] * sum(gated for _, gated in fields)
        self.in_type, self.out_type = FieldType(out_type.gspace, [*out_type.representations, *gates]), out_type

    def forward(self, x: GeometricTensor) -> GeometricTensor:
        """Apply the functions and the gates."""
        check_input(x, self.in_type)
        require(x.tensor.is_floating_point(), "x", "a floating point tensor", x.tensor.dtype, kind=TypeError)
        return GeometricTensor(self._evaluate(x.tensor), self.out_type, x.coords)


def _is_invariant(field) -> bool:
    return all(field.group.irrep(*ident).is_trivial() for ident in field.irreps)
