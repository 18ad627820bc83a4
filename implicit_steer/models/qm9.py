"""The paper's network for molecules: scalars in, one invariant number per molecule out."""

from __future__ import annotations

from typing import Any

import torch
from escnn import gspaces
from escnn import nn as enn

from .._check import require
from ..data.qm9 import EDGE_ATTRIBUTES, Batch
from ..graph import Graph
from ..nn import FourierActivation, IIDBatchNorm1d, ImplicitPointConv

ATOM_FEATURES = 5  # one-hot of H, C, N, O, F


class TensorProduct(enn.TensorProductModule):
    """escnn's product of every field with itself, without its expanded matrix: escnn builds that at ``.eval()``, so
    that weights loaded afterwards have no effect."""

    def __init__(self, in_type: enn.FieldType, out_type: enn.FieldType):
        super().__init__(in_type, out_type, initialize=False)
        del self.matrix
        enn.init.deltaorthonormal_init(self.weights.data, self.basisexpansion)

    def forward(self, x: enn.GeometricTensor) -> enn.GeometricTensor:
        """x (N, C_in) → (N, C_out): per field ``W vec(x xᵀ)``."""
        n, fields = len(x.tensor), len(self.in_type)
        x_field = x.tensor.view(n, fields, -1)
        product = torch.einsum("nfi,nfj->nfij", x_field, x_field).flatten(2)
        matrix = self.expand_parameters().view(fields, -1, product.shape[2])
        return enn.GeometricTensor(torch.einsum("foh,nfh->nfo", matrix, product).flatten(1), self.out_type, x.coords)

    def train(self, mode: bool = True):
        """Set the mode; nothing is expanded or dropped."""
        return torch.nn.Module.train(self, mode)


class ResidualBlock(torch.nn.Module):
    """``ELU(x + norm(conv(ELU(norm(conv(x))))))`` on fields of sphere functions.

    ``activation`` holds the field type; ``convolution(in_type, out_type)`` makes a layer.
    """

    def __init__(self, activation: FourierActivation, convolution):
        super().__init__()
        kind = activation.in_type
        self.activation = activation
        self.conv1, self.conv2 = convolution(kind, kind), convolution(kind, kind)
        self.norm1, self.norm2 = IIDBatchNorm1d(kind), IIDBatchNorm1d(kind)

    def forward(
        self, x: enn.GeometricTensor, graph: Graph, edge_delta: torch.Tensor, edge_attr: torch.Tensor | None
    ) -> enn.GeometricTensor:
        """x (N, C) on ``graph`` → (N, C) of the same type."""
        y = self.activation(self.norm1(self.conv1(x, graph, edge_delta, edge_attr)))
        y = self.norm2(self.conv2(y, graph, edge_delta, edge_attr))
        return self.activation(enn.GeometricTensor(x.tensor + y.tensor, x.type, x.coords))


class QM9Net(torch.nn.Module):
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
        super().__init__()
        require(edge_attr in EDGE_ATTRIBUTES, "edge_attr", f"one of {list(EDGE_ATTRIBUTES)}", repr(edge_attr))
        gspace = gspaces.flipRot3dOnR3() if gspace is None else gspace
        require(gspace.dimensionality == 3, "gspace", "a GSpace of R³", gspace)
        attributes = EDGE_ATTRIBUTES[edge_attr]
        no_space = gspaces.no_base_space(gspace.fibergroup)
        attr_type = no_space.type(*attributes * [no_space.trivial_repr]) if attributes else None

        def conv(in_type, out_type):
            return ImplicitPointConv(in_type, out_type, attr_type, kernel_layers, kernel_channels, **convolution)

        activation = FourierActivation(gspace, channels, max_frequency)
        self.scalar_type = gspace.type(*channels * [gspace.trivial_repr])
        self.linear = torch.nn.Linear(ATOM_FEATURES, channels)
        self.product = TensorProduct(self.scalar_type, activation.in_type)
        self.activation = activation
        self.blocks = torch.nn.ModuleList(ResidualBlock(activation, conv) for _ in range(blocks))
        self.to_invariants = conv(activation.out_type, gspace.type(*invariants * [gspace.trivial_repr]))
        self.head = torch.nn.Sequential(
            torch.nn.BatchNorm1d(invariants),
            torch.nn.ELU(),
            torch.nn.Linear(invariants, invariants),
            torch.nn.BatchNorm1d(invariants),
            torch.nn.ELU(),
            torch.nn.Linear(invariants, 1),
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """One number per molecule, (num_graphs,)."""
        graph = Graph(batch.edge_index, len(batch.pos))
        source, target = batch.edge_index
        edge_delta = batch.pos[target] - batch.pos[source]
        x = enn.GeometricTensor(self.linear(batch.x), self.scalar_type, batch.pos)
        x = self.activation(self.product(x))
        for block in self.blocks:
            x = block(x, graph, edge_delta, batch.edge_attr)
        nodes = self.to_invariants(x, graph, edge_delta, batch.edge_attr).tensor
        return self.head(_mean_pool(nodes, batch)).squeeze(1)


def _mean_pool(nodes: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(N, C) → (num_graphs, C): the mean over the atoms of each molecule."""
    total = nodes.new_zeros(batch.num_graphs, nodes.shape[1]).index_add(0, batch.batch, nodes)
    return total / torch.bincount(batch.batch, minlength=batch.num_graphs).unsqueeze(1)
