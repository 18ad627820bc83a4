"""The paper's network for molecules: scalars in, one invariant number per molecule out."""

from __future__ import annotations

from typing import Any

import torch
from escnn import gspaces
from escnn import nn as enn

from .._check import require
from ..data.qm9 import EDGE_ATTRIBUTES
from ..deploy.convert import converts, saved_as
from ..layers.linear import project_squares
from ..layers.molecules import MoleculeNet, ResidualBlock
from ..nn import FourierActivation, IIDBatchNorm1d, ImplicitPointConv
from ..nn.mlp import own_basis
from ..nn.plain import tensor_product

ATOM_FEATURES = 5  # one-hot of H, C, N, O, F


class TensorProduct(enn.TensorProductModule):
    """escnn's product of every field with itself, without its expanded matrix, which escnn builds at ``.eval()``, so
    that weights loaded afterwards have no effect; and with a basis of its own."""

    def __init__(self, in_type: enn.FieldType, out_type: enn.FieldType):
        super().__init__(in_type, out_type, initialize=False)
        del self.matrix
        own_basis(self.basisexpansion)
        enn.init.deltaorthonormal_init(self.weights.data, self.basisexpansion)

    def forward(self, x: enn.GeometricTensor) -> enn.GeometricTensor:
        """x (N, C_in) → (N, C_out): per field ``W vec(x xᵀ)``."""
        y = project_squares(x.tensor, self.expand_parameters(), len(self.in_type))
        return enn.GeometricTensor(y, self.out_type, x.coords)

    def train(self, mode: bool = True):
        """Set the mode; nothing is expanded or dropped."""
        return torch.nn.Module.train(self, mode)


converts(TensorProduct)(tensor_product)


@saved_as(MoleculeNet)
class QM9Net(MoleculeNet):
    """embedding → residual blocks → convolution to invariants → mean over each molecule → MLP → one number.

    The embedding is a linear map of the one-hot elements to ``channels`` scalars, their tensor product with themselves
    into the hidden type, and a Fourier ELU; the hidden type is ``channels`` fields of functions on the sphere (or on
    the circle, or the group) with frequencies up to ``max_frequency``.

    - ``gspace``: an escnn ``GSpace`` of R³; None: O(3), ``gspaces.flipRot3dOnR3()``.
    - ``edge_attr``: "none", "bonds" or "bonds+atoms", as the data set's.
    - ``blocks``, ``channels``, ``max_frequency``, ``invariants``: depth, hidden fields, their frequency, pooled ones.
    - ``kernel_layers``, ``kernel_channels``: size of the kernel MLPs; further keywords (``sampling``, ``norm``,
      ``backend``, ``cutoff``, ...) go to every :class:`~implicit_steer.nn.ImplicitPointConv`.

    Source: Zhdanov, Hoffmann, Cesa, *Implicit Convolutional Kernels for Steerable CNNs*, NeurIPS 2023.
    """

    def __init__(
        self,
        gspace: gspaces.GSpace | None = None,
        *,
        edge_attr: str = "bonds+atoms",
        blocks: int = 4,
        channels: int = 8,
        max_frequency: int = 1,
        invariants: int = 32,
        kernel_layers: int = 3,
        kernel_channels: int = 8,
        **convolution: Any,
    ):
        require(edge_attr in EDGE_ATTRIBUTES, "edge_attr", f"one of {list(EDGE_ATTRIBUTES)}", repr(edge_attr))
        gspace = gspaces.flipRot3dOnR3() if gspace is None else gspace
        require(gspace.dimensionality == 3, "gspace", "a GSpace of R³", gspace)
        attributes = EDGE_ATTRIBUTES[edge_attr]
        no_space = gspaces.no_base_space(gspace.fibergroup)
        attr_type = no_space.type(*attributes * [no_space.trivial_repr]) if attributes else None

        def conv(in_type, out_type):
            return ImplicitPointConv(in_type, out_type, attr_type, kernel_layers, kernel_channels, **convolution)

        activation = FourierActivation(gspace, channels, max_frequency)
        hidden, scalars = activation.in_type, gspace.type(*channels * [gspace.trivial_repr])

        def block():
            convolutions = conv(hidden, hidden), conv(hidden, hidden)
            return ResidualBlock(activation, *convolutions, IIDBatchNorm1d(hidden), IIDBatchNorm1d(hidden))

        super().__init__(
            scalars,
            torch.nn.Linear(ATOM_FEATURES, channels),
            TensorProduct(scalars, hidden),
            activation,
            torch.nn.ModuleList(block() for _ in range(blocks)),
            conv(hidden, gspace.type(*invariants * [gspace.trivial_repr])),
            torch.nn.Sequential(
                torch.nn.BatchNorm1d(invariants),
                torch.nn.ELU(),
                torch.nn.Linear(invariants, invariants),
                torch.nn.BatchNorm1d(invariants),
                torch.nn.ELU(),
                torch.nn.Linear(invariants, 1),
            ),
        )
