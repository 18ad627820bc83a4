"""The paper's network for molecules: scalars in, one invariant per molecule out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from escnn import gspaces
from escnn import nn as enn
from escnn.group import IrreducibleRepresentation

from ..._check import fail, require, require_integer
from ...deploy.convert import converts, saved_as
from ...deploy.plain import tensor_product
from ...layers.linear import project_squares
from ...layers.molecules import MoleculeNet, ResidualBlock, TensorReadout
from ...nn import FourierActivation, IIDBatchNorm1d, ImplicitPointConv
from ...nn.building import built_by_escnn
from ...nn.expansion import own_basis
from ...nn.mlp import read_basis
from ..data.qm9 import EDGE_ATTRIBUTES

ATOM_FEATURES = 5  # one-hot of H, C, N, O, F


class TensorProduct(enn.TensorProductModule):
    """escnn's product of every field with itself, without its expanded matrix, which escnn builds at ``.eval()``, so
    that weights loaded afterwards have no effect; and with a basis of its own, exact in float64."""

    @built_by_escnn
    def __init__(self, in_type: enn.FieldType, out_type: enn.FieldType):
        super().__init__(in_type, out_type, initialize=False)
        del self.matrix
        own_basis(self.basisexpansion)
        enn.init.deltaorthonormal_init(self.weights.data, self.basisexpansion)
        read_basis(self)
        self.register_load_state_dict_post_hook(read_basis)

    def expand_parameters(self) -> torch.Tensor:
        """W, (C_out, (C_in / fields)²)."""
        return self._expansion(self.weights, None)[0]

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
    - ``tensors``: 0; else the network predicts a symmetric matrix per molecule, (num_graphs, 3, 3), from its invariants
      and that many fields l = 2 (:class:`~implicit_steer.layers.TensorReadout`); for O(3) and SO(3).
    - ``blocks``, ``channels``, ``max_frequency``, ``invariants``: depth, hidden fields, their frequency, pooled ones.
    - ``reach``: initial width of the kernels' shells, in the unit of the positions; the paper's is 0.5, 0.87 Å.
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
        tensors: int = 0,
        reach: float = 0.5,
        kernel_layers: int = 3,
        kernel_channels: int = 8,
        **convolution: Any,
    ):
        require(edge_attr in EDGE_ATTRIBUTES, "edge_attr", f"one of {list(EDGE_ATTRIBUTES)}", repr(edge_attr))
        for name, value, least in (("blocks", blocks, 0), ("invariants", invariants, 1), ("tensors", tensors, 0)):
            require_integer(name, value, least)
        require(reach > 0, "reach", "a positive width", reach)
        gspace = gspaces.flipRot3dOnR3() if gspace is None else gspace
        require(gspace.dimensionality == 3, "gspace", "a GSpace of R³", gspace)
        attributes = EDGE_ATTRIBUTES[edge_attr]
        no_space = gspaces.no_base_space(gspace.fibergroup)
        attr_type = no_space.type(*attributes * [no_space.trivial_repr]) if attributes else None

        def conv(in_type, out_type):
            layer = ImplicitPointConv(in_type, out_type, attr_type, kernel_layers, kernel_channels, **convolution)
            torch.nn.init.constant_(layer.implicit_kernel.shell_width, reach)
            return layer

        activation = FourierActivation(gspace, channels, max_frequency, sampling="escnn")
        hidden, scalars = activation.in_type, gspace.type(*channels * [gspace.trivial_repr])

        def block():
            convolutions = conv(hidden, hidden), conv(hidden, hidden)
            return ResidualBlock(activation, *convolutions, IIDBatchNorm1d(hidden), IIDBatchNorm1d(hidden))

        pooled = invariants * [gspace.trivial_repr]
        if tensors:
            irrep, basis = _traceless(gspace)
            pooled = pooled + tensors * [irrep]

        def head():
            mlp = torch.nn.Sequential(
                torch.nn.BatchNorm1d(invariants),
                torch.nn.ELU(),
                torch.nn.Linear(invariants, invariants),
                torch.nn.BatchNorm1d(invariants),
                torch.nn.ELU(),
                torch.nn.Linear(invariants, 1 + tensors),
            )
            fields = no_space.type(*pooled)
            return TensorReadout(fields, IIDBatchNorm1d(fields), basis, mlp, invariants) if tensors else mlp

        super().__init__(
            scalars,
            torch.nn.Linear(ATOM_FEATURES, channels),
            TensorProduct(scalars, hidden),
            activation,
            torch.nn.ModuleList(block() for _ in range(blocks)),
            conv(hidden, gspace.type(*pooled)),
            head(),
        )


def _traceless(gspace: gspaces.GSpace) -> tuple[IrreducibleRepresentation, np.ndarray]:
    """How symmetric traceless matrices transform, an irrep of size 5, and its basis (9, 5) of matrices."""
    product = gspace.basespace_action.tensor(gspace.basespace_action)
    start = 0
    for name in product.irreps:
        irrep = gspace.fibergroup.irrep(*name)
        if irrep.size == 5:
            return irrep, product.change_of_basis[:, start : start + 5]
        start += irrep.size
    fail("gspace", "one of O(3) or SO(3), for tensors", gspace)
