"""The network for interacting particles as a composition of its parts, which may come with or without escnn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from ..graph import Graph
from ..ops.kernel_mlp import safe_norm
from .fields import values


class ParticleBatch(Protocol):
    """Simulations side by side: pos, vel (N, 3) and scalar (N, 1) of every particle; edge_index (2, E) and pair (E, 1)
    of every pair."""

    pos: Tensor
    vel: Tensor
    scalar: Tensor
    edge_index: Tensor
    pair: Tensor


class ParticleNet(Module):
    """Displacements direct(u) + readout(blocks(φ(embedding(u)))), u = position, velocity and scalar of a particle.

    Args:
        in_type: wraps u (N, 7) as features: a field type, or :class:`Fields` without escnn.
        embedding, direct, readout: equivariant linear maps: u → hidden, u → vector, hidden → vector.
        activation: φ.
        blocks: :class:`ResidualBlock` modules.
    """

    def __init__(
        self,
        in_type: Callable[[Tensor, Tensor], Any],
        embedding: Module,
        direct: Module,
        activation: Module,
        blocks: torch.nn.ModuleList,
        readout: Module,
    ) -> None:
        super().__init__()
        self.in_type = in_type
        self.embedding, self.direct, self.activation = embedding, direct, activation
        self.blocks, self.readout = blocks, readout

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("in_type", "embedding", "direct", "activation", "blocks", "readout")
        return {name: getattr(self, name) for name in names}

    def forward(self, batch: ParticleBatch) -> Tensor:
        """The displacement of every particle, (N, 3)."""
        graph = Graph(batch.edge_index, batch.pos.shape[0])
        delta, attributes = edge_features(batch)
        u = self.in_type(torch.cat([batch.pos, batch.vel, batch.scalar], 1), batch.pos)
        x = self.activation(self.embedding(u))
        for block in self.blocks:
            x = block(x, graph, delta, attributes)
        return values(self.direct(u)) + values(self.readout(x))


def edge_features(batch: ParticleBatch) -> tuple[Tensor, Tensor]:
    """x_i − x_j (E, 3), and (E, 10) for every pair j → i: its spring or charges, its distance, v_j, v_i, and the
    scalars of j and i."""
    source, target = batch.edge_index
    delta = batch.pos[target] - batch.pos[source]
    ends = [values[end] for values in (batch.vel, batch.scalar) for end in (source, target)]
    return delta, torch.cat([batch.pair, safe_norm(delta)[:, None], *ends], 1)
