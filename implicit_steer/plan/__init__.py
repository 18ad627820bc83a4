"""What to compute: :class:`Plan` and its pieces, radial inputs, the activations φ, the packing of parameters, batch
statistics."""

from .frame import MAX_ORDER, Frame
from .frozen import FrozenArrays
from .layers import FUNCTIONS, Activation, Block, Linear, Norm
from .plan import Coupling, Plan
from .radial import Bessel, Cosines, Distance, Radial
from .table import Table

__all__ = [
    "FUNCTIONS",
    "MAX_ORDER",
    "Activation",
    "Bessel",
    "Block",
    "Cosines",
    "Coupling",
    "Distance",
    "Frame",
    "FrozenArrays",
    "Linear",
    "Norm",
    "Plan",
    "Radial",
    "Table",
]
