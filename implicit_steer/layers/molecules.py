"""The paper's network for molecules as a composition of its parts, which may come with or without escnn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from ..graph import EdgeTypes, Graph
from ..plan.packing import Constants
from .fields import values, with_values

TYPICAL_SIZE = 18.0  # atoms of a molecule: sums over atoms are divided by it, so that they are of order 1


class MoleculeBatch(Protocol):
    """Molecules side by side: x (N, S) one-hot elements, pos (N, 3), edge_index (2, E), edge_attr (E, A), EdgeTypes
    or None; batch (N,) the molecule of each atom."""

    x: Tensor
    pos: Tensor
    edge_index: Tensor
    edge_attr: Tensor | EdgeTypes | None
    batch: Tensor
    num_graphs: int


class ResidualBlock(Module):
    """``φ(x + norm2(conv2(φ(norm1(conv1(x))))))``, φ the ``activation``."""

    def __init__(self, activation: Module, conv1: Module, conv2: Module, norm1: Module, norm2: Module) -> None:
        super().__init__()
        self.activation = activation
        self.conv1, self.conv2 = conv1, conv2
        self.norm1, self.norm2 = norm1, norm2

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in ("activation", "conv1", "conv2", "norm1", "norm2")}

    def forward(self, x: Any, graph: Graph, edge_delta: Tensor, edge_attr: Tensor | EdgeTypes | None) -> Any:
        """x (N, C) on ``graph`` → (N, C) of the same type."""
        y = self.activation(self.norm1(self.conv1(x, graph, edge_delta, edge_attr)))
        y = self.norm2(self.conv2(y, graph, edge_delta, edge_attr))
        return self.activation(with_values(x, values(x) + values(y)))


class TensorReadout(Module):
    """Symmetric matrices α = m₀(s) 1 + Σ_t m_t(s) T_t from invariants s and symmetric traceless T_t of each molecule.

    Args:
        fields: wraps s and T as features: a field type, or :class:`Fields` without escnn.
        norm: a batch norm of these features.
        basis: (9, 5): maps the coordinates of an l = 2 field to the entries of its matrix, row by row.
        mlp: m, from the invariants (G, I) to (G, 1 + T).
        invariants: I, how many invariants there are.
    """

    def __init__(
        self, fields: Callable[..., Any], norm: Module, basis: NDArray[Any], mlp: Module, invariants: int
    ) -> None:
        super().__init__()
        self.fields, self.norm, self.mlp, self.invariants = fields, norm, mlp, invariants
        self.basis = np.asarray(basis, dtype=np.float64)
        self._basis = Constants(self.basis)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in ("fields", "norm", "basis", "mlp", "invariants")}

    def forward(self, pooled: Tensor) -> Tensor:
        """(G, I + 5 T) → (G, 3, 3), for G molecules, I invariants and T fields T_t each."""
        pooled = values(self.norm(self.fields(pooled)))
        scalars, tensors = pooled[:, : self.invariants], pooled[:, self.invariants :].unflatten(1, (-1, 5))
        weights = self.mlp(scalars)
        (basis,) = self._basis.like(pooled)
        traceless = torch.einsum("gt,gtc,kc->gk", weights[:, 1:], tensors, basis).unflatten(1, (3, 3))
        one = torch.eye(3, dtype=pooled.dtype, device=pooled.device)
        return weights[:, :1, None] * one + traceless


class MoleculeNet(Module):
    """embedding → residual blocks → convolution to invariants → mean over each molecule → MLP → one value.

    Args:
        scalar_type: wraps the embedded elements as features: a field type, or :class:`Fields` without escnn.
        linear, product, activation: the embedding: one-hot elements → scalars → their products → φ.
        blocks: :class:`ResidualBlock` modules.
        to_invariants: the last convolution.
        head: the MLP, (num_graphs, C) → (num_graphs, 1); or a :class:`TensorReadout`, which reads sums over atoms.
    """

    def __init__(
        self,
        scalar_type: Callable[[Tensor, Tensor], Any],
        linear: Module,
        product: Module,
        activation: Module,
        blocks: torch.nn.ModuleList,
        to_invariants: Module,
        head: Module,
    ) -> None:
        super().__init__()
        self.scalar_type = scalar_type
        self.linear, self.product, self.activation = linear, product, activation
        self.blocks, self.to_invariants, self.head = blocks, to_invariants, head

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("scalar_type", "linear", "product", "activation", "blocks", "to_invariants", "head")
        return {name: getattr(self, name) for name in names}

    def forward(self, batch: MoleculeBatch) -> Tensor:
        """One value per molecule, (num_graphs,), or one matrix, (num_graphs, 3, 3)."""
        graph = Graph(batch.edge_index, batch.pos.shape[0])
        source, target = batch.edge_index
        edge_delta = batch.pos[target] - batch.pos[source]
        x = self.scalar_type(self.linear(batch.x), batch.pos)
        x = self.activation(self.product(x))
        for block in self.blocks:
            x = block(x, graph, edge_delta, batch.edge_attr)
        nodes = values(self.to_invariants(x, graph, edge_delta, batch.edge_attr))
        total = nodes.new_zeros(batch.num_graphs, nodes.shape[1]).index_add(0, batch.batch, nodes)
        if isinstance(self.head, TensorReadout):  # an extensive quantity
            return self.head(total / TYPICAL_SIZE)
        return self.head(total / torch.bincount(batch.batch, minlength=batch.num_graphs).unsqueeze(1)).squeeze(1)
