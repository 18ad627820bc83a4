"""What follows a node's sum over its edges: the mean, where that is asked for, and the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph import Graph
from ..packing import Parameters, is_traced
from ..plan import Plan


def finish(plan: Plan, parameters: Parameters, graph: Graph, total: Tensor) -> Tensor:
    """bias + total_i, of aggr "mean" over the number of node i's edges. ``total`` (N, C_out) may be written to."""
    total = divide(plan, graph, total)
    if parameters.bias is None:
        return total
    values, expansion = parameters.bias
    bias = torch.mv(expansion, values)
    return total + bias if torch.is_grad_enabled() or is_traced() else total.add_(bias)


def divide(plan: Plan, graph: Graph, total: Tensor) -> Tensor:
    """total_i, of aggr "mean" over the number of node i's edges."""
    return total / graph.degree.clamp(min=1).to(total.dtype)[:, None] if plan.aggr == "mean" else total


def bias_gradient(parameters: Parameters, grad: Tensor) -> Tensor:
    """Of the bias's values, from that of the output."""
    return torch.mv(parameters.bias[1].T, grad.sum(0))
