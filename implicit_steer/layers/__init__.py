"""The modules on plain tensors, without escnn, which :func:`implicit_steer.load` returns.

Each holds its plan or its matrices, and its parameters. It shares attributes and arithmetic with its counterpart in
``nn``, by a base class of this package. ``in_type`` and ``out_type`` are :class:`Fields`.
"""

from .activation import FourierActivation
from .batch_norm import IIDBatchNorm1d
from .clouds import CloudNet
from .fields import Fields, values, with_values
from .frozen import FrozenKernel
from .gate import GatedFields
from .grid_conv import ImplicitConv
from .kernel import ImplicitKernel
from .linear import Linear, TensorProduct
from .molecules import MoleculeNet, ResidualBlock, TensorReadout
from .particles import ParticleNet
from .point_conv import ImplicitPointConv, ImplicitPointConvWithDownsampling
from .pooling import Blur, FieldPool, NormMaxPool
from .potential import Gate, PotentialNet, Prediction
from .statistics import update_bn
from .zbl import ZBL

__all__ = [
    "ZBL",
    "Blur",
    "CloudNet",
    "FieldPool",
    "Fields",
    "FourierActivation",
    "FrozenKernel",
    "Gate",
    "GatedFields",
    "IIDBatchNorm1d",
    "ImplicitConv",
    "ImplicitKernel",
    "ImplicitPointConv",
    "ImplicitPointConvWithDownsampling",
    "Linear",
    "MoleculeNet",
    "NormMaxPool",
    "ParticleNet",
    "PotentialNet",
    "Prediction",
    "ResidualBlock",
    "TensorProduct",
    "TensorReadout",
    "update_bn",
    "values",
    "with_values",
]
