"""Backend `eager`: factored plain PyTorch. Runs everywhere, differentiable to any order.

Per node M_i = Σ_e s_e f_j ⊗ h_e, then one matrix product M_i · W for a block of nodes; W (C_in · H, C_out) is the
last layer. Blocks are bounded in size and recomputed in the backward pass, so neither E × C_out × C_in nor N × C_in × H
exists.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...graph import Graph
from ...plan import Plan
from ...plan.moments import Pool
from ...plan.packing import Parameters, dense_kernel, is_transformed
from ..kernel_mlp import Statistics, hidden_features, radial_factor
from ..mean_and_bias import mean_and_bias

_WORKSPACE = 1 << 21  # numbers per block


def supports(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Every plan, device and dtype."""
    return True, "factored plain PyTorch"


def node_blocks(graph: Graph, per_edge: int, per_node: int) -> list[tuple[Tensor, int]]:
    """Blocks of nodes of similar degree: (nodes (n,), largest degree), each within the workspace. No isolated nodes.

    ``per_edge``, ``per_node``: numbers that a block holds for each (padded) edge and each node.
    """
    degree, nodes = torch.sort(graph.degree, stable=True)
    first = int(torch.searchsorted(degree, 1))
    degrees, blocks, start = degree.tolist(), [], first
    for end in range(first, len(degrees)):
        if end > start and (end - start + 1) * (degrees[end] * per_edge + per_node) > _WORKSPACE:
            blocks.append((nodes[start:end], degrees[end - 1]))
            start = end
    if start < len(degrees) or not blocks:  # without edges one empty block keeps the output differentiable
        blocks.append((nodes[start:], degrees[-1] if start < len(degrees) else 0))
    return blocks


def _block(x: Tensor, h: Tensor, kernel: Tensor, sources: Tensor, edges: Tensor, inside: Tensor) -> Tensor:
    """(n, C_out) of one block; sources, edges, inside: (n, k), padded."""
    n, k = edges.shape
    f = x.index_select(0, sources.reshape(-1)).view(n, k, x.shape[1])
    h = h.index_select(0, edges.reshape(-1)).view(n, k, h.shape[1]) * inside[..., None]
    return torch.bmm(f.transpose(1, 2), h).view(n, len(kernel)) @ kernel


def forward(
    plan: Plan,
    parameters: Parameters,
    batch_statistics: bool | Pool,
    graph: Graph,
    x: Tensor,
    delta: Tensor,
    attributes: Tensor,
) -> tuple[Tensor, list[Statistics]]:
    """out_i = bias + Σ_{e: j→i} K(x_e, a_e) f_j, shape (N, C_out)."""
    h, weights, statistics = hidden_features(plan, parameters, batch_statistics, delta, attributes)
    h = h * radial_factor(plan, weights.shell_width, delta)[:, None]
    kernel = dense_kernel(plan, weights).permute(1, 2, 0).reshape(-1, plan.out_size)
    outputs, indices = [], []
    for nodes, width in node_blocks(graph, plan.in_size + plan.hidden_size, plan.in_size * plan.hidden_size):
        position = graph.rowptr[nodes][:, None] + torch.arange(width, device=nodes.device)
        inside = position < graph.rowptr[nodes + 1][:, None]
        edges = graph.order[position.clamp(max=graph.num_edges - 1)]
        # NaN and Inf of a padded slot's edge must not leak: padding repeats the node's own first edge
        edges = torch.where(inside, edges, edges[:, :1])
        args = (x, h, kernel, graph.src[edges], edges, inside.to(h.dtype))
        if is_transformed():  # torch.func does not take what checkpoint saves
            outputs.append(_block(*args))
        else:
            outputs.append(checkpoint(_block, *args, use_reentrant=False, preserve_rng_state=False))
        indices.append(nodes)
    out = x.new_zeros(graph.num_dst, plan.out_size)
    out = out.index_copy(0, torch.cat(indices), torch.cat(outputs))
    return mean_and_bias(plan, parameters, graph, out), statistics
