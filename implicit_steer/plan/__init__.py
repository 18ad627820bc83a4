"""What to compute: :class:`Plan`, its activation functions, the packing of parameters, moments for batch statistics."""

from .plan import FUNCTIONS, MAX_ORDER, Activation, Block, Coupling, Frame, FrozenArrays, Linear, Norm, Plan

__all__ = [
    "FUNCTIONS",
    "MAX_ORDER",
    "Activation",
    "Block",
    "Coupling",
    "Frame",
    "FrozenArrays",
    "Linear",
    "Norm",
    "Plan",
]
