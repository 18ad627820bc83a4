"""Backend `cpu`: one native pass per tile of edges (``csrc/cpu``): MLP, coupling, sum per node; backward likewise.

Nothing is stored per edge but one gradient of the gathered features, E × C_in. The hidden values are recomputed in the
backward pass. Derivatives to second order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ... import _native
from ...plan import Plan, Table
from .bound import BoundKernel, refusal
from .convolution import NativeBackend
from .instruction_set import instruction_set


class Cpu(NativeBackend):
    """The native loops, one SIMD lane per edge."""

    name, bound = "cpu", BoundKernel

    def available(self) -> tuple[bool, str]:
        """Whether the native extension is loaded, and from where or why not."""
        return _native.available()

    def supports(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """CPU tensors in float32 or float64, with the native extension; every plan that the lowering makes."""
        if device.type != "cpu":
            return False, f"runs on CPU tensors, these are on {device}"
        reason = refusal(plan, dtype)
        return reason is None, reason or "native, fused, one SIMD lane per edge"

    def table_sums(self, plan: Plan, native: Any, delta: Tensor, attributes: Tensor) -> Tensor:
        """As in the protocol, in one native pass over the edges."""
        table, planar = cast(Table, plan.table), plan.frame.kind == "planar"
        width = plan.field_size * (1 + planar) + 4 * len(plan.frame.order)
        tensors = *native.arrays[delta.dtype], delta.contiguous(), attributes.contiguous()
        size = table.types * table.n_coefficients
        return torch.ops.implicit_steer.table_sums(*tensors, size, width, instruction_set())
