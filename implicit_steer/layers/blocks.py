"""Clouds larger than memory: a layer runs on one region of nodes after the other, each with a halo of the nodes that
its edges come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .._check import require
from ..graph import EdgeTypes, Graph
from ..graph.neighbours import radius_graph
from .fields import values


@dataclass(frozen=True)
class Region:
    """Nodes whose results are computed together, and all that they depend on.

    own (M,): their indices, ascending; nodes (M + H,): ``own``, then the indices of the halo; pos (M + H, D): the
    positions of ``nodes``; graph: all edges that end at ``own``, from M + H to M nodes; edge_delta (E, D).
    """

    own: Tensor
    nodes: Tensor
    pos: Tensor
    graph: Graph
    edge_delta: Tensor


def node_regions(pos: Tensor, radius: float, size: int) -> Iterator[Region]:
    """Regions of at most ``size`` nodes, every node in one of them, with the edges of ``radius_graph(pos, radius)``.

    The cloud is halved along its longest side until the parts are small enough; a part's halo is all nodes within
    ``radius`` of its bounding box. For ``own`` a layer computes what it computes on the whole cloud, up to the order of
    its sums.

    Args:
        pos: (N, D) positions, floating point, finite, in memory: the edges and the features need not be.
        radius: radius of the neighbourhoods, > 0.
        size: the most nodes of a region, ≥ 1. A region of M nodes with d neighbours each takes about 50 M d bytes
            beside its features.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    expected = "a floating point tensor of shape (N, D), D >= 1"
    tensor = isinstance(pos, Tensor) and pos.is_floating_point()
    require(tensor, "pos", expected, getattr(pos, "dtype", type(pos).__name__), kind=TypeError)
    require(pos.dim() == 2 and pos.shape[1] >= 1, "pos", expected, tuple(pos.shape))
    require(bool(pos.isfinite().all()), "pos", "finite positions", "NaN or Inf")
    require(radius > 0, "radius", "a number > 0", radius)
    require(isinstance(size, int) and size >= 1, "size", "an integer >= 1", repr(size))
    if len(pos):
        yield from _halved(pos, torch.arange(len(pos)), torch.arange(0), radius, size)


def _halved(pos: Tensor, own: Tensor, around: Tensor, radius: float, size: int) -> Iterator[Region]:
    """Regions of the nodes ``own``; every other node within ``radius`` of their bounding box is in ``around``."""
    inside = pos[own]
    low, high = inside.amin(0), inside.amax(0)
    outside = pos[around]
    gap = torch.maximum(low - outside, outside - high).clamp(min=0)
    around = around[gap.norm(dim=1) <= radius * (1 + 1e-5)]  # no edge is lost to rounding in float32
    if len(own) <= size:
        yield _region(pos, own.sort().values, around, radius)
        return
    along = inside[:, int((high - low).argmax())]
    first = torch.zeros(len(own), dtype=torch.bool)
    first[along.argsort(stable=True)[: len(own) // 2]] = True
    one, other = own[first], own[~first]
    yield from _halved(pos, one, torch.cat([around, other]), radius, size)
    yield from _halved(pos, other, torch.cat([around, one]), radius, size)


def _region(pos: Tensor, own: Tensor, halo: Tensor, radius: float) -> Region:
    nodes = torch.cat([own, halo])
    where = pos[nodes]
    edges = radius_graph(where, radius)
    edges = edges[:, edges[1] < len(own)]
    return Region(own, nodes, where, Graph(edges, (len(nodes), len(own))), where[edges[1]] - where[edges[0]])


def convolve_in_blocks(
    conv: Any,
    x: Tensor | NDArray[Any],
    pos: Tensor,
    radius: float,
    size: int,
    *,
    edge_attr: Callable[[Region], Tensor | EdgeTypes] | None = None,
    out: Tensor | NDArray[Any] | None = None,
) -> Any:
    """Apply ``conv`` to the edges of ``radius_graph(pos, radius)``, region by region and without gradients.

    Args:
        conv: an :class:`~implicit_steer.nn.ImplicitPointConv`, or a loaded one, in evaluation mode if it has batch
            norms, since their statistics would be a region's.
        x: (N, C_in) features in memory or on disk (``np.memmap``), in the dtype of the layer.
        pos, radius, size: see :func:`node_regions`.
        edge_attr: a region → its edges' attributes (E, A), or their types; None for a layer without attributes.
        out: (N, C_out), where the results are written, in memory or on disk; None makes a new tensor. It must not be
            ``x``, where later regions read their halos.

    Returns:
        ``out``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> x = np.lib.format.open_memmap("x.npy", mode="r")
        >>> y = np.lib.format.open_memmap("y.npy", mode="w+", dtype="float32", shape=(len(x), conv.out_type.size))
        >>> convolve_in_blocks(conv.eval(), x, pos, radius=0.1, size=50_000, out=y)
    """
    live = conv.training and bool(conv.implicit_kernel.plan.norms)
    require(not live, "conv", "a layer in evaluation mode", "one in training mode", "Call .eval().")
    require(len(x) == len(pos), "x", f"{len(pos)} rows, one per node", len(x))
    if out is None:
        out = torch.empty(len(pos), conv.out_type.size, dtype=torch.as_tensor(x[:0]).dtype)
    require(len(out) == len(pos), "out", f"{len(pos)} rows, one per node", len(out))
    require(out is not x, "out", "another array than x", "x itself")
    with torch.no_grad():
        for region in node_regions(pos, radius, size):
            features = conv.in_type(torch.as_tensor(x[region.nodes]), region.pos)
            attributes = None if edge_attr is None else edge_attr(region)
            y = values(conv((features, len(region.own)), region.graph, region.edge_delta, attributes))
            if isinstance(out, Tensor):
                out[region.own] = y
            else:
                out[region.own] = y.numpy()
    return out
