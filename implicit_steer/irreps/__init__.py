"""Modules between irreps of O(3) and SO(3), on plain tensors in e3nn's layout and basis; without escnn.

``"16x0e + 8x1o"`` is 16 scalars and 8 vectors, in that order: 40 components.
"""

from ..plan.irreps import Irrep, Irreps
from .gate import Gate
from .interaction import InteractionBlock
from .linear import Linear
from .norm import Norm
from .point_conv import ImplicitPointConv

__all__ = [
    "Gate",
    "ImplicitPointConv",
    "InteractionBlock",
    "Irrep",
    "Irreps",
    "Linear",
    "Norm",
]
