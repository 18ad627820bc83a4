"""A call of the layer: the operators bound to plan and parameters, and recorded for autograd.

The gradients are one operator, too. Where they are to be differentiated themselves (``create_graph=True``), the call is
made again out of PyTorch's operators and ``triton_contract``, which have derivatives of every order; frame and layers
then keep E values per sample in memory (``ops/kernel_mlp.py`` and ``dense.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..._transforms import in_forward_mode, recorder, refuse_derivatives, refuse_tangents, refuse_transforms
from ...graph import Graph
from ...plan import Plan
from ...plan.moments import NormStatistics, StatisticsSource
from ...plan.packing import Parameters, fold_norm, is_traced, learned_tensors, pack, unflatten
from ..kernel_mlp import table_summands
from ..mean_and_bias import mean_and_bias
from . import dense, operators
from .convolution import Learned, Saved
from .handle import handle_of
from .prepared import Prepared, prepare

_NAME = "triton"


class Bound:
    """A plan with what was learned for it.

    Attributes:
        handle: of the plan, by which the operators find it.
        learned: ``learned_tensors(parameters)``.
        running: the statistics that the batch norms keep, mean and variance of each.
    """

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        self.plan, self.parameters, cache = plan, parameters, parameters.cache
        if cache is not None and torch.compiler.is_compiling():  # which cannot make a handle
            self.handle = cache.triton
        else:
            self.handle = handle_of(plan)
        self.learned = learned_tensors(parameters)
        self.running = [t for norm in parameters.norms for t in (norm.mean, norm.var)]
        self._prepared: Prepared | None = None
        self._flat: tuple[list[int], list[Tensor]] = [], []  # where learned and running tensors lie; each as (n,)

    def prepared(self, like: Tensor) -> Prepared:
        """The plan on the device and in the dtype of a tensor; that of the last call where they are the same."""
        found = self._prepared
        if found is None or found.dtype != like.dtype or found.position.device != like.device:
            self._prepared = found = prepare(self.plan, like.device, like.dtype)
        return found

    def numbers(self) -> Tensor | None:
        """``Learned.numbers`` of what was learned and the running statistics, but from views that are kept: to make 20
        of them takes longer than to join them. None where a tensor has no such view, since it is not contiguous."""
        tensors = [*self.learned, *self.running]
        places, (known, flat) = list(map(Tensor.data_ptr, tensors)), self._flat
        if places != known:
            if not all(t.is_contiguous() for t in tensors):
                return None
            flat = [t.detach().view(-1) for t in tensors]
            self._flat = places, flat
        return torch.cat(flat)


def bind(plan: Plan, parameters: Parameters, traced: bool) -> Bound:
    """The plan with these parameters: the object of the last call with these very tensors, or a new one; always that in
    a traced call."""
    cache = parameters.cache
    if cache is None or traced:
        return Bound(plan, parameters)
    if type(cache.bound) is not Bound or cache.bound.plan is not plan or cache.bound.parameters is not parameters:
        cache.bound = Bound(plan, parameters)
    return cache.bound


def _is_watched(tensor: Tensor) -> bool:
    """Whether torch.compile, a transform, a dispatch mode or the older vmap has to see the operators of a call."""
    return is_traced() or torch._C._len_torch_dispatch_stack() > 0 or is_legacy_batchedtensor(tensor)


@dataclass(eq=False)
class Call:
    """One call but for x, delta and attributes; ``statistics`` are measured ones, or those that the norms keep."""

    bound: Bound
    graph: Graph
    statistics: Sequence[Tensor]
    measured: bool

    def edges(self, by_source: bool) -> tuple[Tensor, ...]:
        """The graph as the operators take it; edges by source, where they are not needed, are those by target."""
        graph = self.graph
        sorted_ = (graph.order_by_source, graph.colptr) if by_source else (graph.order, graph.rowptr)
        return graph.src, graph.order, graph.rowptr, *sorted_

    def forward(self, inputs: Sequence[Tensor], learned: Sequence[Tensor], by_source: bool = False) -> Sequence[Tensor]:
        """The sums, and what their gradients need; by the operator where something watches. Otherwise the call spares
        the dispatcher, which takes longer than a launch."""
        edges, of_learned = self.edges(by_source), Learned(learned, self.statistics, self.measured)
        if _is_watched(inputs[0]):
            return torch.ops.implicit_steer.triton_conv(self.bound.handle.key, *inputs, *of_learned, *edges)
        bound = self.bound
        numbers = bound.numbers() if learned is bound.learned and not self.measured else None
        return operators.forward(bound.prepared(inputs[1]), inputs, of_learned, edges, numbers)

    def gradients(
        self,
        inputs: Sequence[Tensor],
        learned: Sequence[Tensor],
        saved: Sequence[Tensor],
        grad: Tensor,
        needs: Sequence[bool],
    ) -> Sequence[Tensor]:
        """As of ``triton_conv_backward``, likewise."""
        edges, of_learned = self.edges(needs[0]), Learned(learned, self.statistics, self.measured)
        if _is_watched(grad):
            arguments = self.bound.handle.key, *inputs, *of_learned, *edges, *saved, grad, needs
            return torch.ops.implicit_steer.triton_conv_backward(*arguments)
        return operators.gradients(self.bound.prepared(grad), inputs, of_learned, edges, Saved(*saved), grad, needs)

    def composed(self, x: Tensor, delta: Tensor, attr: Tensor, learned: Sequence[Tensor]) -> Tensor:
        """The sums (N, C_out) by operators that have derivatives of every order."""
        bound, graph = self.bound, self.graph
        replaced = {id(old): new for old, new in zip(bound.learned, learned, strict=True)}
        parameters = bound.parameters.changed(lambda t: replaced.get(id(t), t))
        weights = pack(bound.plan, parameters, fold=not self.measured)
        if self.measured:
            for n, norm in enumerate(parameters.norms):
                fold_norm(bound.plan, weights, n, norm, *self.statistics[2 * n : 2 * n + 2])
        p = bound.prepared(x)
        if bound.plan.is_frozen:
            points = delta, attr, graph.order
            q, r = dense.splines(p, *points, weights.shell_width, parameters.linears[0][0])
        else:
            inputs, radius, factor, q = dense.geometry(p.tables, delta, attr, graph.order, weights.shell_width)
            r = dense.layers(p, inputs, radius, factor, weights.linears)
        edges = graph.src, graph.order, graph.rowptr, graph.order_by_source, graph.colptr
        theta = dense.pack_theta(p, weights.theta)
        return torch.ops.implicit_steer.triton_contract(bound.handle.key, x, q, r, theta, *edges, True)


class _Recorded(torch.autograd.Function):
    """A call that autograd records: x, delta, attributes and learned tensors → the sums."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            total, *saved = call.forward(tensors[:3], tensors[3:])
        ctx.save_for_backward(*tensors, *saved)
        ctx.call = call
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, needs, tensors = ctx.call, ctx.needs_input_grad[1:], ctx.saved_tensors
        tensors, saved = tensors[: len(needs)], tensors[len(needs) :]
        refuse_derivatives(grad, *tensors)
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_differentiable_gradients(call, tensors, grad, needs)
        inputs, learned, needed = tensors[:3], tensors[3:], (*needs[:3], any(needs[3:]))
        with torch._C._AutoDispatchBelowAutograd():
            *found, flat = call.gradients(inputs, learned, saved, grad, needed)
            found += unflatten(flat, learned) if needed[3] else [None] * len(learned)
        return None, *(g if need else None for g, need in zip(found, needs, strict=True))


def _differentiable_gradients(
    call: Call, tensors: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, delta, attributes and learned tensors as a graph of operators; None where not needed."""
    fresh = [t.view_as(t) if need else t for t, need in zip(tensors, needs, strict=True)]
    x, delta, attr, *learned = fresh
    wanted = [t for t, need in zip(fresh, needs, strict=True) if need]
    total = call.composed(x, delta, attr, learned)
    found = iter(torch.autograd.grad(total, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


_recorded = recorder(_Recorded)  # run has ruled out that torch.func looks on


def _measured(
    bound: Bound, statistics_from: StatisticsSource, graph: Graph, delta: Tensor, attr: Tensor
) -> list[NormStatistics]:
    """The batch norms' statistics over these edges and those that the pool adds, norm by norm: the inputs of each
    depend on the statistics of those before it."""
    handle, pool, found = bound.handle, statistics_from.pool, []
    statistics = [t for size in handle.norms for t in (delta.new_zeros(size), delta.new_ones(size[0]))]
    for n in range(len(handle.norms)):
        arguments = delta, attr, bound.learned, statistics, True, graph.order, n
        mean, squares = torch.ops.implicit_steer.triton_moments(handle.key, *arguments)
        count = len(delta)
        if pool is not None:
            count, mean, squares = pool(count, mean, squares)
        found.append(NormStatistics(handle.trivial(n, mean), (squares / (count - 1)).mean(0)))
        statistics[2 * n : 2 * n + 2] = found[-1]
    return found


def table_sums(plan: Plan, delta: Tensor, attributes: Tensor) -> Tensor:
    """``kernel_mlp.table_sums``, added up in a fixed order."""
    at, ways, powers, products = table_summands(plan, delta, attributes)
    key, first = handle_of(plan).key, at.first.int()
    terms = (ways, at.weights), *((powers, product) for product in products)
    return torch.cat([torch.ops.implicit_steer.triton_knot_sums(key, *term, first) for term in terms], 1)


def run(
    plan: Plan,
    parameters: Parameters,
    statistics_from: StatisticsSource,
    graph: Graph,
    x: Tensor,
    delta: Tensor,
    attributes: Tensor,
) -> tuple[Tensor, list[NormStatistics]]:
    """bias + Σ_{e: j→i} K(x_e, a_e) f_j (N_dst, C_out), and the batch norms' statistics if they are measured."""
    refuse_transforms(_NAME)
    traced = is_traced()
    bound = bind(plan, parameters, traced)
    if in_forward_mode():
        refuse_tangents(_NAME, [x, delta, attributes, *bound.learned])
    attr = bound.handle.attributes_in_frame(attributes)
    found: list[NormStatistics] = []
    if statistics_from.measured:
        with torch.no_grad():
            found = _measured(bound, statistics_from, graph, delta, attr)
    statistics = [t for pair in found for t in pair] if statistics_from.measured else bound.running
    call = Call(bound, graph, statistics, statistics_from.measured)
    if traced:
        total = call.forward((x, delta, attr), bound.learned, x.requires_grad)[0]
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(x, delta, attr, *bound.learned):
        total = _recorded(call, x, delta, attr, *bound.learned)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            total = call.forward((x, delta, attr), bound.learned)[0]
    return mean_and_bias(plan, parameters, graph, total), found
