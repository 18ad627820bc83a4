"""Modules between escnn's field types, which users build networks of. They need the extra ``escnn``."""

from ..lowering import _require_escnn  # noqa: F401

# isort: split
from ..layers.statistics import update_bn
from ..plan import Bessel, Cosines, Distance
from . import _escnn_changes, _escnn_pickle
from .activation import FourierActivation
from .batch_norm import IIDBatchNorm1d
from .gate import Gate
from .grid_conv import ImplicitConv
from .kernel import ImplicitKernel
from .mlp import KernelMLP, Linear
from .point_conv import ImplicitPointConv, ImplicitPointConvWithDownsampling

_escnn_pickle.register()
_escnn_changes.apply()

__all__ = [
    "Bessel",
    "Cosines",
    "Distance",
    "FourierActivation",
    "Gate",
    "IIDBatchNorm1d",
    "ImplicitConv",
    "ImplicitKernel",
    "ImplicitPointConv",
    "ImplicitPointConvWithDownsampling",
    "KernelMLP",
    "Linear",
    "update_bn",
]
