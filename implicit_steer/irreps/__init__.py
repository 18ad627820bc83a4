"""Modules between irreps of O(3) and SO(3), on plain tensors in e3nn's layout and basis. They need no escnn.

``"16x0e + 8x1o"`` is 16 scalars and 8 vectors, in that order: 40 components.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..plan import Bessel, Cosines, Distance
from ..plan.irreps import Irrep, Irreps
from .gate import Gate
from .interaction import Interaction, InteractionBlock
from .linear import Linear
from .norm import Norm
from .point_conv import ImplicitPointConv
from .product import TensorSquare

if TYPE_CHECKING:  # imported at the first use, since they need escnn
    from .escnn import from_escnn, to_escnn

__all__ = [
    "Bessel",
    "Cosines",
    "Distance",
    "Gate",
    "ImplicitPointConv",
    "Interaction",
    "InteractionBlock",
    "Irrep",
    "Irreps",
    "Linear",
    "Norm",
    "TensorSquare",
    "from_escnn",
    "to_escnn",
]


def __getattr__(name: str) -> Any:
    if name in ("from_escnn", "to_escnn"):
        return getattr(import_module(".escnn", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
