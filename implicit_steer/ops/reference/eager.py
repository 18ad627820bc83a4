"""Backend `eager`: factored plain PyTorch. Runs everywhere, differentiable to any order.

Per node M_i = Σ_e s_e f_j ⊗ h_e, then one matrix product M_i · W for a chunk of nodes; W (C_in · H, C_out) is the
last layer. Where couplings are depthwise, each coupling reads its part of M_i instead, channel by channel. Chunks are
bounded in size and recomputed in the backward pass, so neither E × C_out × C_in nor N × C_in × H exists.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._transforms import is_transformed
from ...graph import Graph
from ...plan import Coupling, Plan
from ...plan.moments import NormStatistics, StatisticsSource
from ...plan.packing import Parameters, Weights, cached, constant, dense_kernel
from ..backend import Backend
from ..kernel_mlp import hidden_features, radial_factor
from ..mean_and_bias import mean_and_bias

_WORKSPACE = 1 << 21  # values per chunk


def node_chunks(graph: Graph, per_edge: int, per_node: int) -> list[tuple[Tensor, int]]:
    """Chunks of nodes of similar degree: (nodes (n,), largest degree), each within the workspace. No isolated nodes.

    ``per_edge``, ``per_node``: values that a chunk holds for each (padded) edge and each node.
    """
    degree, nodes = torch.sort(graph.degree, stable=True)
    first = int(torch.searchsorted(degree, 1))
    degrees, chunks, start = degree.tolist(), [], first
    for end in range(first, len(degrees)):
        if end > start and (end - start + 1) * (degrees[end] * per_edge + per_node) > _WORKSPACE:
            chunks.append((nodes[start:end], degrees[end - 1]))
            start = end
    if start < len(degrees) or not chunks:  # without edges one empty chunk keeps the output differentiable
        chunks.append((nodes[start:], degrees[-1] if start < len(degrees) else 0))
    return chunks


def _chunk(
    plan: Plan, x: Tensor, h: Tensor, last: list[Tensor], sources: Tensor, edges: Tensor, inside: Tensor
) -> Tensor:
    """(n, C_out) of one chunk of nodes; ``last`` of :func:`_last_layer`; sources, edges, inside: (n, k), padded."""
    n, k = edges.shape
    f = x.index_select(0, sources.reshape(-1)).view(n, k, x.shape[1])
    h = h.index_select(0, edges.reshape(-1)).view(n, k, h.shape[1]) * inside[..., None]
    products = torch.bmm(f.transpose(1, 2), h)
    if not plan.is_depthwise:
        return products.flatten(1) @ last[0]
    total = x.new_zeros(n, plan.out_size)
    for coupling, theta in zip(plan.couplings, last, strict=True):
        out, into, hidden = _coupled(coupling, x.device)
        read = products.index_select(1, into).index_select(2, hidden).view(n, len(coupling.in_start), theta.shape[-1])
        if coupling.depthwise:
            part = torch.einsum("nuk,uok->nuo", read, theta.squeeze(1))
        else:
            part = torch.einsum("nvk,uvok->nuo", read, theta)
        total = total.index_add(1, out, part.flatten(1))
    return total


def _last_layer(plan: Plan, weights: Weights) -> list[Tensor]:
    """W (C_in · H, C_out) or, where couplings are depthwise, θ · B of each as (U, V, o, i · W · m), V = 1 of depthwise
    ones."""
    if not plan.is_depthwise:
        return [dense_kernel(plan, weights).permute(1, 2, 0).reshape(-1, plan.out_size)]
    found = []
    for coupling, theta in zip(plan.couplings, weights.theta, strict=True):
        basis = constant(coupling, "basis", theta)[..., _read_components(coupling)]
        found.append(torch.einsum("uvwb,boim->uvoiwm", theta, basis).flatten(3))
    return found


def _read_components(coupling: Coupling) -> list[int]:
    """The components of a hidden field that the coupling reads."""
    return np.flatnonzero(coupling.basis.any((0, 1, 2))).tolist()


@cached
def _coupled(coupling: Coupling, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The channels of the outputs, of the inputs, and the hidden features of a coupling."""
    _, o, i, _ = coupling.basis.shape
    parts = (
        (coupling.out_start, range(o)),
        (coupling.in_start, range(i)),
        (coupling.hidden_start, _read_components(coupling)),
    )
    out, into, hidden = (
        torch.tensor(np.add.outer(starts, components).reshape(-1), dtype=torch.int64, device=device)
        for starts, components in parts
    )
    return out, into, hidden


class Eager(Backend):
    """Factored plain PyTorch; for every plan, device and dtype."""

    name = "eager"

    def available(self) -> tuple[bool, str]:
        """It runs everywhere."""
        return True, "plain PyTorch; factored"

    def supports(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """It supports every plan, device and dtype."""
        return True, "factored plain PyTorch"

    def forward(
        self,
        plan: Plan,
        parameters: Parameters,
        statistics_from: StatisticsSource,
        graph: Graph,
        x: Tensor,
        delta: Tensor,
        attributes: Tensor,
    ) -> tuple[Tensor, list[NormStatistics]]:
        """out_i = bias + Σ_{e: j→i} K(x_e, a_e) f_j, shape (N_dst, C_out)."""
        h, weights, statistics = hidden_features(plan, parameters, statistics_from, delta, attributes)
        h = h * radial_factor(plan, weights.shell_width, delta)[:, None]
        last = _last_layer(plan, weights)
        outputs, indices = [], []
        for nodes, width in node_chunks(graph, plan.in_size + plan.hidden_size, plan.in_size * plan.hidden_size):
            position = graph.rowptr[nodes][:, None] + torch.arange(width, device=nodes.device)
            inside = position < graph.rowptr[nodes + 1][:, None]
            edges = graph.order[position.clamp(max=graph.num_edges - 1)]
            # NaN and Inf of a padded slot's edge must not leak: padding repeats the node's own first edge
            edges = torch.where(inside, edges, edges[:, :1])
            arguments = (plan, x, h, last, graph.src[edges], edges, inside.to(h.dtype))
            if is_transformed():  # torch.func does not take what checkpoint saves
                outputs.append(_chunk(*arguments))
            else:
                outputs.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
            indices.append(nodes)
        total = x.new_zeros(graph.num_dst, plan.out_size)
        total = total.index_copy(0, torch.cat(indices), torch.cat(outputs))
        return mean_and_bias(plan, parameters, graph, total), statistics
