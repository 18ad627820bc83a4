"""What follows a node's sum over its edges: the mean, where that is asked for, and the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph import Graph
from ..plan import Plan
from ..plan.packing import Parameters


def mean_and_bias(plan: Plan, parameters: Parameters, graph: Graph, total: Tensor) -> Tensor:
    """bias + total_i; with aggr "mean", total_i is divided by the number of node i's edges. total: (N, C_out)."""
    if plan.aggr == "mean":
        total = total / graph.degree.clamp(min=1).to(total.dtype)[:, None]
    if parameters.bias is None:
        return total
    values, expansion = parameters.bias
    return total + torch.mv(expansion, values)
