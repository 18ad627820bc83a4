"""A classifier of point clouds as a composition of its parts, which may come with or without escnn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .._check import require
from ..graph import Graph
from ..graph.neighbours import knn_graph
from .fields import values


class CloudNet(Module):
    """Positions as a vector field → (convolution onto fewer points, norm, φ) per level → convolution to invariants →
    mean over each cloud → MLP → one logit per class.

    The points of a cloud come in random order, so the first n of them are a random choice: level l keeps the first
    ``sizes[l]``. An edge leads from each of the ``neighbours`` nearest points of the level above to each point kept;
    its vector is divided by :func:`reach`, so that kernels see lengths about 1 on every level.

    Args:
        vector_type: wraps the positions as features: a field type, or :class:`Fields` without escnn.
        convolutions, norms: one of each per level.
        activation: φ.
        to_invariants: the last convolution, on the points of the last level.
        head: the MLP, (B, C) → (B, classes).
        points: P, how many points every cloud has.
        sizes: how many points each level keeps.
        neighbours: how many edges lead into every point (fewer where there are not so many others).
    """

    def __init__(
        self,
        vector_type: Callable[[Tensor, Tensor], Any],
        convolutions: torch.nn.ModuleList,
        norms: torch.nn.ModuleList,
        activation: Module,
        to_invariants: Module,
        head: Module,
        points: int,
        sizes: tuple[int, ...],
        neighbours: int,
    ) -> None:
        super().__init__()
        self.vector_type, self.activation = vector_type, activation
        self.convolutions, self.norms = convolutions, norms
        self.to_invariants, self.head = to_invariants, head
        self.points, self.sizes, self.neighbours = points, sizes, neighbours

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("vector_type", "convolutions", "norms", "activation", "to_invariants", "head")
        return {name: getattr(self, name) for name in (*names, "points", "sizes", "neighbours")}

    def forward(self, pos: Tensor) -> Tensor:
        """Positions (B, P, 3) → one logit per cloud and class, (B, classes)."""
        shape = f"(B, {self.points}, 3)"
        require(pos.dim() == 3 and pos.shape[1:] == (self.points, 3), "pos", f"shape {shape}", tuple(pos.shape))
        x = self.vector_type(pos.flatten(0, 1), pos.flatten(0, 1))
        for conv, norm, size in zip(self.convolutions, self.norms, self.sizes, strict=True):
            x = self.activation(norm(self._convolve(conv, x, pos, size)))
            pos = pos[:, :size]
        nodes = values(self._convolve(self.to_invariants, x, pos, pos.shape[1]))
        return self.head(nodes.unflatten(0, pos.shape[:2]).mean(1))

    def _convolve(self, conv: Module, x: Any, pos: Tensor, size: int) -> Any:
        """Convolve from all points of ``pos`` (B, P', 3) onto the first ``size`` of each cloud."""
        clouds, points = pos.shape[:2]
        flat = pos.flatten(0, 1)
        number = torch.arange(clouds * points, device=pos.device).view(clouds, points)
        edges = knn_graph(flat, self.neighbours, torch.arange(clouds, device=pos.device).repeat_interleave(points))
        kept = edges[:, edges[1] % points < size]
        edge_delta = (flat[kept[1]] - flat[kept[0]]) / reach(points, self.neighbours)
        if size == points:
            return conv(x, Graph(kept, clouds * points), edge_delta)
        target = kept[1] // points * size + kept[1] % points
        graph = Graph(torch.stack([kept[0], target]), (clouds * points, clouds * size))
        return conv(x, graph, edge_delta, idx_downsampled=number[:, :size].flatten())


def reach(points: int, neighbours: int) -> float:
    """Radius of a disc with ``neighbours`` of ``points`` points that are spread evenly over an area of 4, about that of
    an object in the unit ball."""
    return math.sqrt(4 * neighbours / (math.pi * points))
