"""Backend `cuda`: the kernels of ``csrc/cuda``, compiled ahead of time, for CUDA tensors.

One warp walks a range of edges in target order, a tile at a time: frame, MLP, products with the neighbours' features,
and the sum into the node's coefficients T; the channels are mixed once per node. Nothing is stored per edge but one
gradient of the features, E × C_in. No atomic operations on floating-point numbers: the same inputs give the same bits.
Derivatives to second order, as the operators of operators.py register them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ... import _native
from ...graph import Graph
from ...plan import Plan
from ...plan.moments import Pool
from ...plan.packing import Parameters, cached
from ..kernel_mlp import Statistics
from . import cpu
from .arrays import prepare


def available() -> tuple[bool, str]:
    """Whether the kernels are in this build and there is a device, and why or why not."""
    built, reason = _native.cuda_available()
    if built and not torch.cuda.is_available():
        return False, f"no CUDA device; {reason}"
    return built, reason


def supports(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """CUDA tensors in float32 or float64, with the kernels; every plan that fits into the device's shared memory."""
    if device.type != "cuda":
        return False, f"runs on CUDA tensors, these are on {device}"
    there, reason = available()
    if there:
        there, reason = _native.cuda_usable(device)
    if there:
        there, reason = cpu.supports(plan, torch.device("cpu"), dtype)  # the same plans and numbers
    if not there:
        return False, reason
    needed, found = shared_bytes(plan, dtype), torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if needed > found:
        return False, f"needs {needed} bytes of shared memory per block, {device} has {found}"
    return True, "compiled ahead of time, fused, a warp for each range of edges"


@lru_cache(maxsize=256)
def shared_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of shared memory that a block of one of the plan's kernels cannot do without."""
    return torch.ops.implicit_steer.cuda_shared_bytes(*prepare(plan, _parameter_sizes(plan)).tensors(dtype))


def _parameter_sizes(plan: Plan) -> tuple[int, ...]:
    """Of the parameters that the plan reads, in the order in which ops/native/cpu.py puts them into one vector."""
    sizes = []
    for layer in plan.linears:
        ends = (b.offset + len(b.out_start) * b.n_in * b.basis.shape[0] for b in layer.blocks)
        sizes += [max(ends, default=0), *filter(None, [layer.bias.shape[1]])]
    for norm in plan.norms:
        sizes += [norm.channels, *filter(None, [norm.channels * len(norm.trivial)])]
    sizes.append(1)  # the shell's width
    for parameter in ("weights", "bias"):
        couplings = (c for c in plan.couplings if c.parameter == parameter)
        ends = (int(c.row.max()) + len(c.hidden_start) * c.basis.shape[0] for c in couplings)
        sizes += filter(None, [max(ends, default=0)])
    return tuple(sizes)


@cached
def _trivial(plan: cpu.NativePlan, device: torch.device) -> list[Tensor]:
    """The norms' trivial coordinates, on the device."""
    return [t.to(device) for t in plan.trivial]


@cached
def _kernel_entries(plan: cpu.NativePlan, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in plan.with_kernel().kernel)


class _BoundKernel(cpu.BoundKernel):
    """Packs its weights at every call: to ask whether they still hold would be to wait for the device."""

    backend = "cuda"

    def __init__(self, plan: Plan, native: cpu.NativePlan, parameters: Parameters):
        super().__init__(plan, native, parameters)
        self.trivial = _trivial(native, self.device)

    @staticmethod
    def repeated(numbers: Tensor, index: Tensor) -> Tensor:
        """As that of `cpu`: on a GPU the gradient of index_select adds in any order, that of indexing sorts."""
        return numbers[index]

    @staticmethod
    def pieces(learned: Sequence[Tensor]) -> list[Tensor]:
        """One vector, made in one launch; of several the operators would copy each."""
        return [torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in learned])]

    def packed(self) -> tuple[Tensor, Tensor]:
        """The batch norms' running statistics, and packed weights at them."""
        statistics = self.running()
        return statistics, self.pack(self.learned, statistics)


class _Convolution(cpu.Convolution):
    def gradients(self, *arguments) -> list[Tensor]:
        """Of the inputs and the parameters."""
        return cpu.composed_gradients(self, *arguments)


def forward(
    plan: Plan,
    parameters: Parameters,
    batch_statistics: bool | Pool,
    graph: Graph,
    x: Tensor,
    delta: Tensor,
    attributes: Tensor,
) -> tuple[Tensor, Sequence[Statistics]]:
    """out_i = bias + Σ_{e: j→i} K(x_e, a_e) f_j, shape (N, C_out)."""
    return cpu.convolve(
        _Convolution(cpu.bind(plan, parameters, _BoundKernel), graph), batch_statistics, x, delta, attributes
    )


def kernel(
    plan: Plan, parameters: Parameters, batch_statistics: bool | Pool, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, Sequence[Statistics]]:
    """K(x, a) (P, C_out, C_in): hidden features from the kernels, the last layer one matrix product."""
    layer = cpu.bind(plan, parameters, _BoundKernel)
    layer.kernel_entries = _kernel_entries(layer.native, layer.device)
    return cpu.kernel_values(layer, batch_statistics, delta, attributes)
