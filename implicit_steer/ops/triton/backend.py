"""Backend `triton`: CUDA kernels without a compiler on the user's machine. The kernels are the other files of this
folder.

Neither E × C_out × C_in nor N × C_in × H exists; the reduced hidden coefficients, E × n_r, are written once. triton is
imported at the first use. Under ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from ..._transforms import refuse_tangents, refuse_transforms
from ...graph import Graph
from ...plan import Plan
from ...plan.moments import NormStatistics, StatisticsSource
from ...plan.packing import Parameters, fold_norm, pack
from ..backend import DEPTHWISE_ON_GPU, TABLES_ON_GPU, Backend
from ..mean_and_bias import mean_and_bias
from .tables import unsupported


def interpreted() -> bool:
    """Whether triton interprets its kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=256)
def _unsupported(plan: Plan) -> str | None:
    if plan.table is not None:
        return TABLES_ON_GPU
    return DEPTHWISE_ON_GPU if plan.is_depthwise else unsupported(plan)


class Triton(Backend):
    """Triton kernels: MLP and contraction, edges sorted by target."""

    name = "triton"

    def available(self) -> tuple[bool, str]:
        """Whether it runs on this machine, and why or why not."""
        if importlib.util.find_spec("triton") is None:
            return False, "the package triton is not installed: pip install implicit_steer[triton]"
        if interpreted():
            return True, "interpreted on CPU tensors (TRITON_INTERPRET=1)"
        if not torch.cuda.is_available():
            return False, "no CUDA device; TRITON_INTERPRET=1 interprets the kernels on CPU tensors"
        return True, f"Triton kernels on {torch.cuda.get_device_name()}"

    def supports(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """CUDA tensors (under TRITON_INTERPRET=1 CPU tensors) in float32 or float64; every plan of the lowering with
        up to ``MOST_COEFFICIENTS`` coefficients in a hidden layer."""
        expected = "cpu" if interpreted() else "cuda"
        if device.type != expected:
            hint = "" if interpreted() else "; TRITON_INTERPRET=1 interprets the kernels on CPU tensors"
            return False, f"runs on {expected} tensors, these are on {device}{hint}"
        ok, reason = self.available()
        if not ok:
            return False, reason
        if dtype not in (torch.float32, torch.float64):
            return False, f"computes in float32 or float64, not {dtype}"
        refused = _unsupported(plan)
        return refused is None, refused or "Triton kernels: MLP and contraction, edges sorted by target"

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
        from . import dense, operators
        from .prepared import prepare

        refuse_transforms(self.name)

        key, prepared = operators.register_plan(plan), prepare(plan, x.device, x.dtype)
        measured, statistics = statistics_from.measured, []
        weights = pack(plan, parameters, fold=not measured)
        learned = (*weights.theta, weights.shell_width, *(t for layer in weights.linears for t in layer))
        refuse_tangents(self.name, [x, delta, attributes, *learned])
        attributes = dense.attributes_in_frame(plan, attributes)
        ops, shell = torch.ops.implicit_steer, weights.shell_width
        inputs, radius, factor, q = ops.triton_frame(key, delta, attributes, graph.order, shell)
        for n, norm in enumerate(plan.norms if measured else ()):
            with torch.no_grad():
                packed = dense.pack_layers(prepared, weights.linears[: n + 1])
                y = ops.triton_hidden(key, inputs, radius, factor, packed, n + 1)
                statistics.append(dense.statistics(prepared, norm, y, q, statistics_from.pool))
            fold_norm(plan, weights, n, parameters.norms[n], *statistics[-1])
        if weights.linears:
            packed = dense.pack_layers(prepared, weights.linears)
            r = ops.triton_layers(key, inputs, radius, factor, packed)
        else:
            r = torch.cat([inputs * factor[:, None], factor[:, None]], 1)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        by_source = (graph.order_by_source, graph.colptr) if differentiable else (graph.order, graph.rowptr)
        source = graph.src.index_select(0, graph.order)
        mixed = dense.pack_theta(prepared, weights.theta)
        total = ops.triton_contract(key, x, q, r, mixed, source, graph.rowptr, graph.order, *by_source, True)
        return mean_and_bias(plan, parameters, graph, total), statistics
