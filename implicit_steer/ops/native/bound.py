"""A plan bound to what was learned for it: the tensors that the native operators take, on any device.

The parameters travel as one vector in the order of :func:`learned_tensors`; the native code packs it into the weights
that its loops and kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ...plan import Plan
from ...plan.moments import NormStatistics, Pool
from ...plan.packing import Parameters, cached, constant, learned_tensors, running, unflatten
from ..backend import refused_dtype
from .arrays import plan_arrays
from .instruction_set import instruction_set
from .packing_matrix import kernel_entries


def refusal(plan: Plan, dtype: torch.dtype) -> str | None:
    """Why native code cannot run the plan in this dtype, whatever the device; None where it can."""
    available, reason = _native.available()
    if not available:
        return f"the native extension is missing: {reason}"
    return refused_dtype(dtype) or _unsupported(plan)


@lru_cache(maxsize=256)
def _unsupported(plan: Plan) -> str | None:
    coefficients = len(plan.frame.order)
    if len({act.function for act in plan.activations}) > 1:
        return "one activation function in all layers"
    if any(act.samples.shape[1] != coefficients for act in plan.activations):
        return "one hidden representation in all layers"
    if not plan.activations and plan.table is None:
        return None if plan.frame.kind == "none" else "without hidden layers, frame 'none'"
    if plan.frame.kind == "zonal":
        d = plan.field_size
        if any((c.hidden_start % d).any() for c in plan.couplings if not plan.reads_one(c)):
            return "couplings that read whole hidden fields"
    return None


KernelEntries = tuple[Tensor, Tensor, Tensor]


class NativePlan:
    """A plan as the native operators take it, for parameters of these sizes; the last ``n_last`` are the last layer's.

    Attributes:
        arrays, matrix: by dtype, the plan's numbers; what packs the parameters.
        trivial, columns: per batch norm, its trivial coordinates; the same together, (n_layers, n_trivial).
        kernel: of every θ·B the position in the flat (C_out, C_in, H) kernel tensor, that of θ among the last layer's
            parameters, and B; None until it is asked for.
        statistics_shape: shape of the batch norms' statistics, (n_layers, W (n_trivial + 1)).
    """

    def __init__(self, plan: Plan, sizes: tuple[int, ...], n_last: int) -> None:
        self._recipe = plan, sizes, n_last
        arrays, dtypes = plan_arrays(plan, sizes), (torch.float32, torch.float64)
        self.arrays = {dtype: arrays.tensors(dtype) for dtype in dtypes}
        self.matrix = {dtype: arrays.matrix(dtype) for dtype in dtypes}
        self.kernel: KernelEntries | None = None
        norms = plan.norms
        self.trivial = [torch.tensor(norm.full_trivial, device="cpu") for norm in norms]
        self.columns = torch.tensor([n.full_trivial.tolist() for n in norms], dtype=torch.int64, device="cpu")
        self.statistics_shape = (len(norms), norms[0].channels * (1 + len(norms[0].trivial))) if norms else (0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return _native_plan, self._recipe

    def kernel_entries(self) -> KernelEntries:
        """``kernel``, made at the first call."""
        if self.kernel is None:
            plan, sizes, n_last = self._recipe
            with torch.inference_mode(False):  # kept for calls that autograd sees
                position, column, value = map(torch.from_numpy, kernel_entries(plan, sizes[-n_last]))
            self.kernel = position, column, value
        return self.kernel


@cached
def _native_plan(plan: Plan, sizes: tuple[int, ...], n_last: int) -> NativePlan:
    return NativePlan(plan, sizes, n_last)


def native_plan(plan: Plan, parameters: Parameters) -> NativePlan:
    """The plan with these parameters' sizes; cached."""
    sizes = tuple(t.numel() for t in learned_tensors(parameters))
    return _native_plan(plan, sizes, 2 - (parameters.linears[-1][1] is None))


class BoundKernel:
    """A plan with what was learned for it, and its weights as the native code reads them; on CPU tensors."""

    backend = "cpu"  # as errors name it
    joint_gradients = True  # whether the operator conv_gradients gives those of inputs and parameters at once

    def __init__(self, plan: Plan, native: NativePlan, parameters: Parameters) -> None:
        self.plan, self.native = plan, native
        self.parameters, self.learned = parameters, learned_tensors(parameters)
        self.dtype, self.device = parameters.shell_width.dtype, parameters.shell_width.device
        self.arrays, self.matrix = native.arrays[self.dtype], native.matrix[self.dtype]
        self._running = [t for norm in parameters.norms for t in (norm.mean, norm.var)]
        self._sources = [*self.learned, *self._running]
        nothing = parameters.shell_width.new_empty(0)
        self.bias, self.expansion = parameters.bias or (nothing, nothing.view(plan.out_size, 0))
        self._tensors = [*self._sources, self.expansion, self.bias]
        self.mean = plan.aggr == "mean"
        self.trivial = native.trivial
        self._cache: tuple[Tensor, Tensor, Tensor] | None = None  # bytes of the sources; statistics, packed weights
        self._bound: tuple[list[int], _native.Number | None] = [], None  # where all tensors lie; and for these

    def number(self) -> _native.Number | None:
        """Under which number the native extension has the layer. It is bound anew where a parameter, a running
        statistic or the bias lies elsewhere than at the last call. None where one of them is not contiguous."""
        places = list(map(Tensor.data_ptr, self._tensors))
        known, bound = self._bound
        if places != known:
            operators, bound = torch.ops.implicit_steer, None
            if all(t.is_contiguous() for t in self._tensors):
                plan, learned = (*self.arrays, *self.matrix, self.native.columns), (self.learned, self._running)
                others = self.expansion, self.bias, self.mean, instruction_set(), self.backend == "cuda"
                number = operators.bind_layer(*plan, *learned, *others)
                bound = _native.Number(number, operators.release_layer.default) if number else None
            self._bound = places, bound
        return bound

    def kernel_entries(self) -> KernelEntries:
        """As :meth:`NativePlan.kernel_entries`."""
        return self.native.kernel_entries()

    def dense_kernel(self) -> Tensor:
        """(C_out, C_in, H), as :func:`~implicit_steer.plan.packing.dense_kernel`, from the learned parameters; but from
        tensors that were made before, since torch.compile cannot trace the plan's arrays, and from nonzeros of B alone.
        """
        position, column, value = self.kernel_entries()
        last = torch.cat([t.reshape(-1) for t in self.parameters.linears[-1] if t is not None])
        plan, value = self.plan, value.to(last.dtype) * self.repeated(last, column)
        flat = value.new_zeros(plan.out_size * plan.in_size * plan.hidden_size).index_add(0, position, value)
        return flat.view(plan.out_size, plan.in_size, plan.hidden_size)

    @staticmethod
    def repeated(numbers: Tensor, index: Tensor) -> Tensor:
        """numbers[index]; the gradient, too, is the same to the last bit at every call."""
        return numbers.index_select(0, index)

    def pack(self, learned: Sequence[Tensor], statistics: Tensor) -> Tensor:
        """Packed weights of the parameters ``learned`` at these statistics of the batch norms; linear in them."""
        return torch.ops.implicit_steer.conv_pack(
            *self.arrays, *self.matrix, [t.contiguous() for t in learned], statistics
        )

    def unpack_gradient(self, grad: Tensor, learned: Sequence[Tensor], statistics: Tensor) -> list[Tensor]:
        """The gradients of ``learned`` from that of the packed weights."""
        arrays, size = (*self.arrays, *self.matrix, statistics), sum(t.numel() for t in learned)
        return unflatten(torch.ops.implicit_steer.conv_pack_backward(*arrays, grad, size), learned)

    def measured(self, delta: Tensor, attributes: Tensor, pool: Pool | None) -> tuple[Tensor, Tensor]:
        """The batch norms' statistics over these edges and those that ``pool`` adds, (n_layers, W (n_trivial + 1)), and
        packed weights at them."""
        if pool is not None:
            return self._pooled(delta, attributes, pool)
        arrays = *self.arrays, *self.matrix, [t.contiguous() for t in self.learned], delta, attributes
        return torch.ops.implicit_steer.conv_statistics(*arrays, *self.native.statistics_shape, instruction_set())

    def _pooled(self, delta: Tensor, attributes: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        # Norm by norm: the inputs of each depend on the statistics of those before it.
        plan = self.plan
        statistics = delta.new_ones(self.native.statistics_shape)
        packed = self.pack(self.learned, statistics)
        for n, norm in enumerate(plan.norms):
            shape = 2, norm.channels, plan.field_size
            tensors, size = (*self.arrays, packed, delta, attributes), shape[1] * shape[2]
            found = torch.ops.implicit_steer.conv_moments(*tensors, n, size, instruction_set())
            count, mean, squares = pool(len(delta), *found.view(shape))
            mean = mean.index_select(1, constant(norm, "measured", mean))
            statistics[n] = torch.cat([mean.reshape(-1), squares.mean(1) / (count - 1)])
            packed = self.pack(self.learned, statistics)
        return statistics, packed

    def running(self) -> Tensor:
        """The statistics that the batch norms keep, in the order of :meth:`measured`."""
        if not self.plan.norms:
            return self.parameters.shell_width.new_empty(0)
        pairs = zip(self.trivial, self.parameters.norms, strict=True)
        return torch.cat([t.reshape(-1) for trivial, p in pairs for t in running(p, trivial)])

    def packed(self) -> tuple[Tensor, Tensor]:
        """The batch norms' running statistics, and packed weights at them; packed again only if a parameter or a
        statistic holds other bytes than last time."""
        last = self._cache
        if last is None or not torch.ops.implicit_steer.same_values(self._sources, last[0]):
            # Cached tensors must not be those of torch.inference_mode: autograd would refuse them later.
            plain_tensors = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
            with plain_tensors, torch.no_grad():
                copy, statistics = torch.cat([t.reshape(-1) for t in self._sources]), self.running()
                self._cache = last = copy, statistics, self.pack(self.learned, statistics)
        return last[1:]


def bind(plan: Plan, parameters: Parameters, make: type[BoundKernel], traced: bool) -> BoundKernel:
    """The plan with these parameters: the object of the last call with these very tensors, or a new one; always that in
    a traced call."""
    cache, like = parameters.cache, parameters.shell_width
    if cache is None:
        return make(plan, native_plan(plan, parameters), parameters)
    if traced:
        return make(plan, cache.native, parameters)
    bound = cache.bound
    same = type(bound) is make and bound.plan is plan and bound.parameters is parameters
    if not same or bound.dtype != like.dtype or bound.device != like.device:  # .to() leaves the same objects
        bound = cache.bound = make(plan, native_plan(plan, parameters), parameters)
    return bound


class JointStatistics(Sequence[NormStatistics]):
    """The batch norms' statistics, ``together`` in one tensor (n_layers, W (n_trivial + 1))."""

    def __init__(self, plan: Plan, together: Tensor) -> None:
        self.together, self._channels = together, plan.norms[0].channels

    def __len__(self) -> int:
        return self.together.shape[0]

    def __getitem__(self, n: int) -> NormStatistics:  # type: ignore[override]  # no slices
        row, channels = self.together[n], self._channels
        return NormStatistics(row[:-channels].view(channels, -1), row[-channels:])
