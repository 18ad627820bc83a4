"""Backend `reference`: the definition. K is materialised for every edge, E × C_out × C_in. The oracle of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph import Graph
from ...plan import Plan
from ...plan.moments import Pool
from ...plan.packing import Parameters, dense_kernel
from ..kernel_mlp import Statistics, hidden_features, radial_factor
from ..mean_and_bias import mean_and_bias


def supports(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Every plan, device and dtype."""
    return True, "plain PyTorch, materialises the kernel of every edge"


def kernel(
    plan: Plan, parameters: Parameters, batch_statistics: bool | Pool, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, list[Statistics]]:
    """K(x, a) = γ s(|x|) · mat(MLP(x ⊕ a)), shape (E, C_out, C_in); every sample evaluated, none merged."""
    h, weights, statistics = hidden_features(plan, parameters, batch_statistics, delta, attributes, merged=False)
    k = (h @ dense_kernel(plan, weights).flatten(0, 1).T).view(len(h), plan.out_size, plan.in_size)
    return k * radial_factor(plan, weights.shell_width, delta)[:, None, None], statistics


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
    k, statistics = kernel(plan, parameters, batch_statistics, delta, attributes)
    messages = torch.einsum("eoi,ei->eo", k, x.index_select(0, graph.src))
    out = x.new_zeros(graph.num_dst, plan.out_size).index_add(0, graph.dst, messages)
    return mean_and_bias(plan, parameters, graph, out), statistics
