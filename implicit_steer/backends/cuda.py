"""Backend `cuda`: the kernels of ``csrc/cuda``, compiled ahead of time, for CUDA tensors.

One warp walks a range of edges in target order, a tile at a time: frame, MLP, products with the neighbours' features, and
the sum into the node's coefficients T; the channels are mixed once per node. Nothing is stored per edge but one gradient
of the gathered features, E × C_in. No atomic operations on floating-point numbers: the same inputs give the same bits.
Derivatives to second order, as the operators of cpu_ops.py register them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import native
from ..graph import Graph
from ..packing import Parameters, running
from ..plan import Plan
from . import cpu
from .cpu import Layer, NativePlan, native_plan
from .cpu_plan import prepare
from .hidden import Statistics


def availability() -> tuple[bool, str]:
    """Whether the kernels are in this build and there is a device, and why or why not."""
    built, reason = native.cuda_available()
    if built and not torch.cuda.is_available():
        return False, f"torch finds no CUDA device; {reason}"
    return built, reason


def supports(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """CUDA tensors in float32 or float64, with the kernels; every plan that fits into the device's shared memory."""
    if device.type != "cuda":
        return False, f"runs on CUDA tensors, these are on {device}"
    there, reason = availability()
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
    """Of the parameters that the plan reads, in the order in which backends/cpu.py puts them into one vector."""
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


def _statistics(layer: Layer, batch: bool, delta: Tensor, attributes: Tensor) -> Tensor:
    """Of the batch norms, (n_layers, W (n_trivial + 1)): over these edges, or those that they keep."""
    if not layer.plan.norms:
        return delta.new_empty(0)
    if batch:
        learned = [t.contiguous() for t in layer.learned]
        arrays = *layer.arrays, *layer.native.matrix[layer.dtype], learned, delta, attributes
        return torch.ops.implicit_steer.conv_statistics_cuda(*arrays, *layer.native.statistics)
    pairs = zip(_on_device(layer.native, delta.device)[0], layer.parameters.norms, strict=True)
    return torch.stack([torch.cat([t.reshape(-1) for t in running(p, trivial)]) for trivial, p in pairs])


@lru_cache(maxsize=256)
def _on_device(plan: NativePlan, device: torch.device) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The norms' trivial coordinates and the kernel's entries, on the device."""
    return [t.to(device) for t in plan.trivial], tuple(t.to(device) for t in plan.with_kernel().kernel)


def _packed(layer: Layer, batch: bool, delta: Tensor, attributes: Tensor) -> tuple[Tensor, list[Statistics]]:
    """Packed weights, made anew at every call: to ask whether they still hold would be to wait for the device."""
    with torch.no_grad():
        statistics = _statistics(layer, batch, delta.detach(), attributes.detach())
    packed = layer.pack(layer.learned, statistics)
    if not batch:
        return packed, []
    channels = layer.plan.norms[0].channels
    return packed, [Statistics(row[:-channels].view(channels, -1), row[-channels:]) for row in statistics.unbind()]


def forward(
    plan: Plan,
    parameters: Parameters,
    batch_statistics: bool,
    graph: Graph,
    x: Tensor,
    delta: Tensor,
    attributes: Tensor,
) -> tuple[Tensor, list[Statistics]]:
    """out_i = Σ_{e: j→i} K(x_e, a_e) f_j, shape (N, C_out)."""
    layer = Layer(plan, native_plan(plan, parameters), parameters)
    x, delta, attributes = (t.contiguous() for t in (x, delta, attributes))
    packed, statistics = _packed(layer, batch_statistics, delta, attributes)
    tensors = *layer.arrays, packed, x, delta, attributes, graph.src, graph.order, graph.rowptr
    return torch.ops.implicit_steer.conv_forward(*tensors, plan.out_size, 0), statistics


def kernel(
    plan: Plan, parameters: Parameters, batch_statistics: bool, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, list[Statistics]]:
    """K(x, a) (P, C_out, C_in): hidden features from the native code, the last layer one matrix product."""
    layer = Layer(plan, native_plan(plan, parameters), parameters)
    delta, attributes = delta.contiguous(), attributes.contiguous()
    packed, statistics = _packed(layer, batch_statistics, delta, attributes)
    h = torch.ops.implicit_steer.conv_hidden(*layer.arrays, packed, delta, attributes, plan.hidden_size, 0)
    position, column, value = _on_device(layer.native, delta.device)[1]
    last = torch.cat([t.reshape(-1) for t in parameters.linears[-1] if t is not None])
    value = value.to(last.dtype) * last.index_select(0, column)
    flat = value.new_zeros(plan.out_size * plan.in_size * plan.hidden_size).index_add(0, position, value)
    return (h @ flat.view(-1, plan.hidden_size).T).view(h.shape[0], plan.out_size, plan.in_size), statistics


if native.available()[0]:

    @torch.library.register_fake("implicit_steer::conv_statistics_cuda")
    def _(ints, reals, rowptr, column, value, parameters, delta, attr, n_layers, size):
        return delta.new_empty(n_layers, size)
