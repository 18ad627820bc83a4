"""Backend `reference`: the definition. K is materialised for every edge, E × C_out × C_in. The oracle of all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...graph import Graph
from ...plan import Plan
from ...plan.moments import NormStatistics, StatisticsSource
from ...plan.packing import Parameters
from ..backend import Backend
from ..mean_and_bias import mean_and_bias


class Reference(Backend):
    """Plain PyTorch on the kernel of every edge; for every plan, device and dtype."""

    name, takes_tables = "reference", False

    def available(self) -> tuple[bool, str]:
        """It runs everywhere."""
        return True, "plain PyTorch; materialises the kernel of every edge (the oracle)"

    def supports(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """It supports every plan, device and dtype."""
        return True, "plain PyTorch, materialises the kernel of every edge"

    def forward(
        self,
        plan: Plan,
        parameters: Parameters,
        statistics_from: StatisticsSource,
        graph: Graph,
        x: Tensor,
        delta: Tensor,
        attributes: Tensor,
    ) -> tuple[Tensor, Sequence[NormStatistics]]:
        """out_i = bias + Σ_{e: j→i} K(x_e, a_e) f_j, shape (N_dst, C_out)."""
        k, statistics = self.kernel(plan, parameters, statistics_from, delta, attributes)
        messages = torch.einsum("eoi,ei->eo", k, x.index_select(0, graph.src))
        total = x.new_zeros(graph.num_dst, plan.out_size).index_add(0, graph.dst, messages)
        return mean_and_bias(plan, parameters, graph, total), statistics
