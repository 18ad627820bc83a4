"""Backend `cuda`: the kernels of ``csrc/cuda``, compiled ahead of time, for CUDA tensors.

One warp walks a range of edges in target order, a tile at a time: frame, MLP, products with the neighbours' features,
and the sum into the node's coefficients T; the channels are mixed once per node. Nothing is stored per edge but one
gradient of the features, E × C_in. Of layers with many fields T is too large for that: there one kernel keeps what the
MLP gives for every edge, the next one writes T of a block of nodes, and torch's matrix product mixes it. No atomic
operations on floating-point numbers: the same inputs give the same bits. Derivatives to second order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ...plan import Plan
from ...plan.packing import Parameters, cached, parameter_sizes
from ...plan.tabulated import tabulated
from .arrays import plan_arrays
from .bound import BoundKernel, KernelEntries, NativePlan, refusal
from .convolution import NativeBackend


class CudaKernel(BoundKernel):
    """On CUDA tensors. Packs its weights at every call, in one launch: to ask whether they still hold would be to
    wait for the device."""

    backend = "cuda"
    joint_gradients = False

    def __init__(self, plan: Plan, native: NativePlan, parameters: Parameters) -> None:
        super().__init__(plan, native, parameters)
        self.trivial = _trivial(native, self.device)

    def number(self) -> _native.Number | None:
        """As :meth:`BoundKernel.number`; None also where the kernels cannot read from as many tensors as the layer has,
        and for CPU tensors that no kernels run on."""
        return super().number() if self.device.type == "cuda" or _native.ON_PROCESSOR else None

    def kernel_entries(self) -> KernelEntries:
        """As :meth:`NativePlan.kernel_entries`, on the device."""
        return _kernel_entries(self.native, self.device)

    @staticmethod
    def repeated(numbers: Tensor, index: Tensor) -> Tensor:
        """numbers[index]; on a GPU the gradient of index_select adds in any order, that of indexing sorts."""
        return numbers[index]

    def packed(self) -> tuple[Tensor, Tensor]:
        """The batch norms' running statistics, and packed weights at them."""
        statistics = self.running()
        return statistics, self.pack(self.learned, statistics)


@cached
def _trivial(plan: NativePlan, device: torch.device) -> list[Tensor]:
    """The norms' trivial coordinates, on the device."""
    return [t.to(device) for t in plan.trivial]


@cached
def _kernel_entries(plan: NativePlan, device: torch.device) -> KernelEntries:
    position, column, value = plan.kernel_entries()
    return position.to(device), column.to(device), value.to(device)


@lru_cache(maxsize=256)
def _as_called(plan: Plan) -> Plan:
    """The plan that the kernels get: without a table that chooses its knots, else with the table's splines."""
    if plan.table is None or plan.is_frozen:
        return plan
    return plan.per_edge if plan.table.automatic else tabulated(plan, 1 + (plan.n_attributes > 0))


@lru_cache(maxsize=256)
def shared_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of shared memory that a block of one of the plan's kernels cannot do without."""
    return torch.ops.implicit_steer.cuda_shared_bytes(*plan_arrays(plan, parameter_sizes(plan)).tensors(dtype))


@lru_cache(maxsize=256)
def kernels_of(plan: Plan, dtype: torch.dtype) -> str:
    """Which kind of kernels serves the plan forward, backward and for second derivatives, and what keeps it from a
    faster one."""
    arrays = plan_arrays(plan, parameter_sizes(plan)).tensors(dtype)
    kinds = [torch.ops.implicit_steer.cuda_kernel_kind(*arrays, n).split("\n") for n in range(3)]
    forward, backward, _ = (f"{name} kernels{reason and f' because of {reason}'}" for name, reason in kinds)
    first = forward if forward == backward else f"forward {forward}, backward {backward}"
    return first if kinds[2][0] == kinds[1][0] else f"{first}, second derivatives {kinds[2][0]} kernels"


class Cuda(NativeBackend):
    """The CUDA kernels, a warp for each range of edges."""

    name, bound = "cuda", CudaKernel

    def available(self) -> tuple[bool, str]:
        """Whether the kernels are in this build and there is a device, and why or why not."""
        built, reason = _native.cuda_available()
        if built and not torch.cuda.is_available() and not _native.ON_PROCESSOR:
            return False, f"no CUDA device; {reason}"
        return built, reason

    def supports(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """CUDA tensors in float32 or float64, with the kernels; every plan that fits into the device's shared
        memory."""
        on_gpu = not _native.ON_PROCESSOR
        plan = _as_called(plan)
        if device.type != ("cuda" if on_gpu else "cpu"):
            return False, f"runs on {'CUDA' if on_gpu else 'CPU'} tensors, these are on {device}"
        there, reason = self.available()
        if there and on_gpu:
            there, reason = _native.cuda_usable(device)
        if there and (refused := refusal(plan, dtype)):
            there, reason = False, refused
        if not there:
            return there, reason
        if on_gpu:
            needed = shared_bytes(plan, dtype)
            properties: Any = torch.cuda.get_device_properties(device)  # whose type lacks this attribute
            found = properties.shared_memory_per_block_optin
            if needed > found:
                return False, f"needs {needed} bytes of shared memory per block, {device} has {found}"
        return True, f"{kernels_of(plan, dtype)}; compiled ahead of time, a warp for each range of edges"
