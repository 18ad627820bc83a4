"""Backend `cpu`: one native pass per tile of edges (``csrc/cpu``): MLP, coupling, sum per node; backward likewise.

Nothing is stored per edge but one gradient of the gathered features, E × C_in. The hidden values are recomputed in the
backward pass. Derivatives to second order. The operators themselves and their derivatives: operators.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import zip_longest

import torch
from torch import Tensor

from ... import _native
from ..._check import fail, require
from ..._transforms import have_tangents, is_differentiated, refuse_derivatives
from ...graph import Graph
from ...plan import Plan
from ...plan.moments import Pool
from ...plan.packing import Parameters, cached, constant, is_traced, is_transformed, running
from ..kernel_mlp import Statistics
from .arrays import prepare
from .operators import of_bias_backward, of_sums_backward, unflatten
from .packing_matrix import kernel_entries
from .terms import hidden_field_size, reads_one

INSTRUCTION_SETS = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3}


def instruction_set() -> int:
    """Number of the instruction set to run, from the environment variable ``IMPLICIT_STEER_ISA`` as it is at the first
    call; 0: the widest."""
    return _instruction_set()


# torch.compiler.assume_constant_result does just this, but imports the compiler first, and that triton.
instruction_set._dynamo_marked_constant = True


@cache
def _instruction_set() -> int:
    name = os.environ.get("IMPLICIT_STEER_ISA", "auto")
    require(name in INSTRUCTION_SETS, "IMPLICIT_STEER_ISA", f"one of {tuple(INSTRUCTION_SETS)}", repr(name))
    return INSTRUCTION_SETS[name]


def supports(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """CPU tensors in float32 or float64, with the native extension; every plan that the lowering makes."""
    available, reason = _native.available()
    if not available:
        return False, f"the native extension is missing: {reason}"
    if device.type != "cpu":
        return False, f"runs on CPU tensors, these are on {device}"
    if dtype not in (torch.float32, torch.float64):
        return False, f"computes in float32 or float64, not {dtype}"
    reason = _unsupported(plan)
    return reason is None, reason or "native, fused, one SIMD lane per edge"


@lru_cache(maxsize=256)
def _unsupported(plan: Plan) -> str | None:
    coefficients = len(plan.frame.order)
    if plan.frame.dim not in (1, 2, 3):
        return f"positions in 1 to 3 dimensions, not {plan.frame.dim}"
    if len({act.function for act in plan.activations}) > 1:
        return "one activation function in all layers"
    if any(act.samples.shape[1] != coefficients for act in plan.activations):
        return "one hidden representation in all layers"
    if not plan.activations:
        return None if plan.frame.kind == "none" else "without hidden layers, frame 'none'"
    if plan.frame.kind == "zonal":
        d = hidden_field_size(plan)
        if any((c.hidden_start % d).any() for c in plan.couplings if not reads_one(plan, c)):
            return "couplings that read whole hidden fields"
    return None


# ---- a layer's parameters


class NativePlan:
    """A plan as the native operators take it, for parameters of these sizes; the last ``n_last`` are the last layer's.

    Attributes:
        arrays, matrix: by dtype, the plan's numbers; what packs the parameters.
        trivial: per batch norm, its trivial coordinates.
        kernel: what :meth:`with_kernel` makes, or None.
        statistics: shape of the batch norms' statistics, (n_layers, W (n_trivial + 1)).
    """

    def __init__(self, plan: Plan, sizes: tuple[int, ...], n_last: int):
        self._recipe = plan, sizes, n_last
        prepared, dtypes = prepare(plan, sizes), (torch.float32, torch.float64)
        self.arrays = {dtype: prepared.tensors(dtype) for dtype in dtypes}
        self.matrix = {dtype: prepared.matrix(dtype) for dtype in dtypes}
        self.kernel: tuple[Tensor, Tensor, Tensor] | None = None
        norms = plan.norms
        self.trivial = [torch.tensor(norm.full_trivial) for norm in norms]
        self.statistics = (len(norms), norms[0].channels * (1 + len(norms[0].trivial))) if norms else (0, 0)

    def __reduce__(self):
        return _native_plan, self._recipe

    @torch.inference_mode(False)
    def with_kernel(self) -> NativePlan:
        """Self, after making ``kernel``: of every θ·B the position in the flat (C_out, C_in, H) kernel tensor, that of
        θ among the last layer's parameters, and B."""
        if self.kernel is None:
            plan, sizes, n_last = self._recipe
            position, column, value = kernel_entries(plan, sizes[-n_last])
            self.kernel = torch.from_numpy(position), torch.from_numpy(column), torch.from_numpy(value)
        return self


@cached
def _native_plan(plan: Plan, sizes: tuple[int, ...], n_last: int) -> NativePlan:
    return NativePlan(plan, sizes, n_last)


def native_plan(plan: Plan, parameters: Parameters) -> NativePlan:
    """The plan with these parameters' sizes; cached."""
    sizes = tuple(t.numel() for t in _learned(parameters))
    return _native_plan(plan, sizes, 2 - (parameters.linears[-1][1] is None))


class BoundKernel:
    """A plan with what was learned for it, and its weights as the native code reads them."""

    backend = "cpu"  # as errors name it

    def __init__(self, plan: Plan, native: NativePlan, parameters: Parameters):
        self.plan, self.native = plan, native
        self.parameters, self.learned = parameters, _learned(parameters)
        self.dtype, self.device = parameters.shell_width.dtype, parameters.shell_width.device
        self.arrays, self.matrix = native.arrays[self.dtype], native.matrix[self.dtype]
        self._sources = [*self.learned, *(t for norm in parameters.norms for t in (norm.mean, norm.var))]
        nothing = parameters.shell_width.new_empty(0)
        self.bias, self.expansion = parameters.bias or (nothing, nothing.view(plan.out_size, 0))
        self.mean = plan.aggr == "mean"
        self.trivial, self.kernel_entries = native.trivial, native.kernel
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None  # bytes of the sources; statistics, packed weights

    def kernel_matrix(self) -> Tensor:
        """(C_out · C_in, H) of the last layer."""
        position, column, value = self.kernel_entries
        last = torch.cat([t.reshape(-1) for t in self.parameters.linears[-1] if t is not None])
        plan, value = self.plan, value.to(last.dtype) * self.repeated(last, column)
        flat = value.new_zeros(plan.out_size * plan.in_size * plan.hidden_size).index_add(0, position, value)
        return flat.view(-1, plan.hidden_size)

    @staticmethod
    def repeated(numbers: Tensor, index: Tensor) -> Tensor:
        """numbers[index]; the gradient, too, is the same to the last bit at every call."""
        return numbers.index_select(0, index)

    @staticmethod
    def pieces(learned: Sequence[Tensor]) -> list[Tensor]:
        """The parameters as operators take them."""
        return [t.contiguous() for t in learned]

    def pack(self, learned: Sequence[Tensor], statistics: Tensor) -> Tensor:
        """Packed weights of the parameters ``learned`` at these statistics of the batch norms; linear in them."""
        return torch.ops.implicit_steer.conv_pack(*self.arrays, *self.matrix, self.pieces(learned), statistics)

    def unpack_gradient(self, grad: Tensor, learned: Sequence[Tensor], statistics: Tensor) -> list[Tensor]:
        """The gradients of ``learned`` from that of the packed weights."""
        arrays, size = (*self.arrays, *self.matrix, statistics), sum(t.numel() for t in learned)
        return unflatten(torch.ops.implicit_steer.conv_pack_backward(*arrays, grad, size), learned)

    def measured(self, delta: Tensor, attributes: Tensor, pool: Pool | bool) -> tuple[Tensor, Tensor]:
        """The batch norms' statistics over these edges and those that ``pool`` adds, (n_layers, W (n_trivial + 1)), and
        packed weights at them."""
        if callable(pool):
            return self._pooled(delta, attributes, pool)
        arrays = *self.arrays, *self.matrix, self.pieces(self.learned), delta, attributes
        return torch.ops.implicit_steer.conv_statistics(*arrays, *self.native.statistics, instruction_set())

    def _pooled(self, delta: Tensor, attributes: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        # Norm by norm: the inputs of each depend on the statistics of those before it.
        plan = self.plan
        statistics = delta.new_ones(self.native.statistics)
        packed = self.pack(self.learned, statistics)
        for n, norm in enumerate(plan.norms):
            shape = 2, norm.channels, hidden_field_size(plan)
            tensors, size = (*self.arrays, packed, delta, attributes), shape[1] * shape[2]
            found = torch.ops.implicit_steer.conv_moments(*tensors, n, size, instruction_set())
            count, mean, squares = pool(len(delta), *found.view(shape))
            mean = mean.index_select(1, constant(norm, "measured", mean))
            statistics[n] = torch.cat([mean.reshape(-1), squares.mean(1) / (count - 1)])
            packed = self.pack(self.learned, statistics)
        return statistics, packed

    def running(self) -> Tensor:
        """The statistics that the batch norms keep, in the same order."""
        if not self.plan.norms:
            return self.parameters.shell_width.new_empty(0)
        pairs = zip(self.trivial, self.parameters.norms, strict=True)
        return torch.cat([t.reshape(-1) for trivial, p in pairs for t in running(p, trivial)])

    def packed(self) -> tuple[Tensor, Tensor]:
        """The batch norms' running statistics, and packed weights at them; packed again only if a parameter or a
        statistic holds other bytes than last time."""
        kept = self._kept
        if kept is None or not torch.ops.implicit_steer.same_values(self._sources, kept[0]):
            # Kept tensors must not be those of torch.inference_mode: autograd would refuse them later.
            kept_for_all = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
            with kept_for_all, torch.no_grad():
                copy, statistics = torch.cat([t.reshape(-1) for t in self._sources]), self.running()
                self._kept = kept = copy, statistics, self.pack(self.learned, statistics)
        return kept[1:]


def bind(plan: Plan, parameters: Parameters, make: type[BoundKernel] = BoundKernel) -> BoundKernel:
    """The layer of the last call with these very tensors, or a new one."""
    cache, like = parameters.cache, parameters.shell_width
    if cache is None:
        return make(plan, native_plan(plan, parameters), parameters)
    if is_traced():
        return make(plan, cache.native, parameters)
    layer = cache.layer
    same = type(layer) is make and layer.plan is plan and layer.parameters is parameters
    if not same or layer.dtype != like.dtype or layer.device != like.device:  # .to() leaves the same objects
        layer = cache.layer = make(plan, native_plan(plan, parameters), parameters)
    return layer


def _learned(parameters: Parameters) -> list[Tensor]:
    """Hidden layers, batch norms, shell width, and last the last layer."""
    tensors = []
    for weights, bias in parameters.linears[:-1]:
        tensors += [weights] if bias is None or bias.numel() == 0 else [weights, bias]
    for norm in parameters.norms:
        tensors += [norm.weight, norm.bias] if norm.bias.numel() else [norm.weight]
    return [*tensors, parameters.shell_width, *(t for t in parameters.linears[-1] if t is not None)]


class BatchStatistics(Sequence[Statistics]):
    """The batch norms' statistics, ``together`` in one tensor (n_layers, W (n_trivial + 1))."""

    def __init__(self, plan: Plan, together: Tensor):
        self.together, self._channels = together, plan.norms[0].channels

    def __len__(self) -> int:
        return self.together.shape[0]

    def __getitem__(self, n) -> Statistics:
        row, channels = self.together[n], self._channels
        return Statistics(row[:-channels].view(channels, -1), row[-channels:])


# ---- the operator


@dataclass(eq=False)
class Convolution:
    """Inputs x, delta, attributes, bias; the output (N, C_out)."""

    layer: BoundKernel
    graph: Graph
    n_inputs = 4

    def forward(self, packed: Tensor, *inputs: Tensor) -> Tensor:
        layer, graph, (*inputs, bias) = self.layer, self.graph, inputs
        finish = layer.expansion.contiguous(), bias.contiguous(), layer.mean
        tensors = *layer.arrays, packed, *inputs, graph.src, graph.order, graph.rowptr, *finish
        return torch.ops.implicit_steer.conv_forward(*tensors, layer.plan.out_size, instruction_set())

    def backward(self, needs: Sequence[bool], grad: Tensor, packed: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        """The gradients of the inputs and of ``packed``; empty where not needed, but for the bias."""
        layer, needs = self.layer, (*needs[:3], needs[4])
        of_sums = of_sums_backward(self.graph.rowptr, layer.mean, grad)
        of_bias = of_bias_backward(layer.expansion, grad)
        tensors = *layer.arrays, packed, *inputs[:3], *self._edges(needs[0], of_sums)
        *found, of_packed = torch.ops.implicit_steer.conv_backward(*tensors, *needs, instruction_set())
        return *found, of_bias, of_packed

    def gradients(self, needs, grad, packed, statistics, inputs, learned) -> list[Tensor]:
        """Of the inputs and the parameters, at once; not differentiable."""
        layer = self.layer
        tensors = *layer.arrays, *layer.matrix, learned, statistics, packed, *inputs[:3], *self._edges(needs[0], grad)
        arguments = *tensors, layer.expansion.contiguous(), layer.mean, *needs[:3], needs[4], instruction_set()
        *found, of_learned = torch.ops.implicit_steer.conv_gradients(*arguments)
        return [*found, *of_learned]

    def _edges(self, by_source: bool, grad: Tensor) -> tuple[Tensor, ...]:
        graph = self.graph
        order = (graph.order_by_source, graph.colptr) if by_source else (graph.order, graph.rowptr)
        return graph.src, graph.order, graph.rowptr, grad.contiguous(), *order


@dataclass(eq=False)
class _HiddenFeatures:
    """Inputs delta, attributes; the output h (P, H), times γ s(|x|)."""

    layer: BoundKernel
    n_inputs = 2

    def forward(self, packed: Tensor, *inputs: Tensor) -> Tensor:
        layer = self.layer
        arguments = *layer.arrays, packed, *inputs, layer.plan.hidden_size, instruction_set()
        return torch.ops.implicit_steer.conv_hidden(*arguments)

    def backward(self, needs: Sequence[bool], grad: Tensor, packed: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        """As that of a convolution, but all of them."""
        arguments = *self.layer.arrays, packed, *inputs, grad.contiguous(), instruction_set()
        return torch.ops.implicit_steer.conv_hidden_backward(*arguments)

    def gradients(self, *arguments) -> list[Tensor]:
        """As those of a convolution."""
        return composed_gradients(self, *arguments)


def composed_gradients(call, needs, grad, packed, statistics, inputs, learned) -> list[Tensor]:
    """The gradients of the inputs and the parameters by operators that know their derivatives."""
    *found, of_packed = call.backward(needs, grad, packed, *inputs)
    return [*found, *call.layer.unpack_gradient(of_packed, learned, statistics)] if needs[-1] else found


class _Operator(torch.autograd.Function):
    """Parameters and inputs → output, with the packed weights of an earlier call where they still hold.

    Its gradients, asked for with ``create_graph=True``, are made of the native operators, which know their derivatives.
    """

    @staticmethod
    def forward(ctx, call, packed, statistics, *tensors):
        ctx.save_for_backward(packed, statistics, *tensors)
        ctx.call = call
        with torch._C._AutoDispatchBelowAutograd():
            return call.forward(packed, *tensors[: call.n_inputs])

    @staticmethod
    def backward(ctx, grad):
        call, needs, (packed, statistics, *tensors) = ctx.call, ctx.needs_input_grad[3:], ctx.saved_tensors
        refuse_derivatives(grad, *tensors)
        n = call.n_inputs
        inputs, learned, needed = tensors[:n], tensors[n:], (*needs[:n], any(needs[n:]))
        if torch.is_grad_enabled():  # create_graph=True
            packed = call.layer.pack(learned, statistics)
            found = composed_gradients(call, needed, grad, packed, statistics, inputs, learned)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                found = call.gradients(needed, grad, packed, statistics, inputs, learned)
        return None, None, None, *(g if need else None for g, need in zip_longest(found, needs))


_apply = super(torch.autograd.Function, _Operator).apply  # without the detour for torch.func, which is not looking on


def _refuse_transforms(backend: str) -> None:
    """Raise where torch.func would differentiate past the operators, or give 0."""
    if torch.compiler.is_compiling():
        wrong, expected = is_transformed(), "one that torch.func can transform inside torch.compile"
        remedy = "Use torch.func outside of compiled functions, or backend='reference'."
    else:
        wrong = is_differentiated()
        expected = "one that torch.func.grad, vjp, jvp, jacrev, jacfwd and hessian can transform"
        remedy = "Use torch.autograd.grad, also inside torch.func.vmap's ensembles, or backend='reference'."
    if wrong:
        fail("backend", expected, repr(backend), remedy, RuntimeError)


def _refuse_tangents(backend: str, tensors: Sequence[Tensor]) -> None:
    if have_tangents(tensors):
        remedy = "Use torch.autograd.grad, or backend='reference'."
        fail("backend", "one with forward-mode derivatives", repr(backend), remedy, RuntimeError)


def _run(
    call, batch_statistics: bool | Pool, delta: Tensor, attributes: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Statistics]]:
    """The output and the batch statistics; tensors contiguous."""
    layer = call.layer
    if is_traced():
        _refuse_transforms(layer.backend)
        with torch.no_grad():
            statistics = layer.measured(delta, attributes, batch_statistics)[0] if batch_statistics else layer.running()
        out = call.forward(layer.pack(layer.learned, statistics), *inputs)
        measured = BatchStatistics(layer.plan, statistics) if batch_statistics else []
        return out, [measured[n] for n in range(len(measured))]
    _refuse_tangents(layer.backend, [*layer.learned, *inputs])
    with torch._C._AutoDispatchBelowAutograd():
        statistics, packed = layer.measured(delta, attributes, batch_statistics) if batch_statistics else layer.packed()
        measured = BatchStatistics(layer.plan, statistics) if batch_statistics else []
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs, *layer.learned)):
            return call.forward(packed, *inputs), measured
    return _apply(call, packed, statistics, *inputs, *layer.learned), measured


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
    return convolve(Convolution(bind(plan, parameters), graph), batch_statistics, x, delta, attributes)


def convolve(
    call: Convolution, batch_statistics: bool | Pool, x: Tensor, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, Sequence[Statistics]]:
    """The convolution, and the batch norms' statistics over its edges, if asked for."""
    x, delta, attributes = x.contiguous(), delta.contiguous(), attributes.contiguous()
    return _run(call, batch_statistics, delta, attributes, (x, delta, attributes, call.layer.bias))


def kernel(
    plan: Plan, parameters: Parameters, batch_statistics: bool | Pool, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, Sequence[Statistics]]:
    """K(x, a) (P, C_out, C_in): hidden features from the native code, the last layer one matrix product."""
    layer = bind(plan, parameters)
    if layer.kernel_entries is None:
        layer.kernel_entries = layer.native.with_kernel().kernel
    return kernel_values(layer, batch_statistics, delta, attributes)


def kernel_values(
    layer: BoundKernel, batch_statistics: bool | Pool, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, Sequence[Statistics]]:
    """K(x, a) (P, C_out, C_in) of a layer whose kernel entries are ready."""
    plan, points = layer.plan, (delta.contiguous(), attributes.contiguous())
    h, statistics = _run(_HiddenFeatures(layer), batch_statistics, *points, points)
    return (h @ layer.kernel_matrix().T).view(h.shape[0], plan.out_size, plan.in_size), statistics
