"""Backend `triton`: CUDA kernels without a compiler on the user's machine. The kernels are the other files of this
folder.

Neither E × C_out × C_in nor N × C_in × H exists; the reduced hidden coefficients, E × n_r, are written once. triton is
imported at the first use. Under ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...graph import Graph
from ...plan import Plan
from ...plan.moments import NormStatistics, StatisticsSource
from ...plan.packing import Parameters
from ...plan.tabulated import tabulated
from ..backend import Backend, refused_dtype
from .handle import Handle, handle_of
from .tables import unsupported


def interpreted() -> bool:
    """Whether triton interprets its kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=256)
def _unsupported(plan: Plan) -> str | None:
    """Why the kernels cannot do the plan with its table, if it has one, and where that is automatic also without."""
    table = plan.table
    if table is None or plan.is_frozen:
        return unsupported(plan)
    splines = unsupported(tabulated(plan, 1))
    return splines or (unsupported(plan.per_edge) if table.automatic else None)


def _missing() -> str | None:
    """What keeps the kernels from running on this machine; no device is initialised."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install implicit_steer[triton]"
    if interpreted() or torch.cuda.is_available():
        return None
    return "no CUDA device; TRITON_INTERPRET=1 interprets the kernels on CPU tensors"


def handle(plan: Plan) -> Handle | None:
    """What torch.compile needs to be there already; None where the kernels run on no device of this machine, or not
    for this plan; nor where PyTorch evaluates the MLP at the knots of a table, which cannot be traced."""
    table = plan.table
    evaluated_at_knots = table is not None and not table.automatic and not plan.is_frozen
    if _missing() or _unsupported(plan) or evaluated_at_knots:
        return None
    return handle_of(plan.per_edge if plan.activations else plan)


class Triton(Backend):
    """Triton kernels: MLP or the splines of a table, and contraction, edges sorted by target."""

    name = "triton"

    def available(self) -> tuple[bool, str]:
        """Whether it runs on this machine, and why or why not."""
        if missing := _missing():
            return False, missing
        if interpreted():
            return True, "interpreted on CPU tensors (TRITON_INTERPRET=1)"
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
        refused, hidden = refused_dtype(dtype) or _unsupported(plan), "MLP" if plan.table is None else "splines"
        return refused is None, refused or f"Triton kernels: {hidden} and contraction, edges sorted by target"

    def table_sums(self, plan: Plan, native: Any, delta: Tensor, attributes: Tensor) -> Tensor:
        """How much the splines of a plan count among the edges, summed in a fixed order."""
        from . import call

        return call.table_sums(plan, delta, attributes)

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
        from . import call  # which imports triton

        return call.run(plan, parameters, statistics_from, graph, x, delta, attributes)


BACKEND = Triton()
