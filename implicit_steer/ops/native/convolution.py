"""The native operators as one differentiable function of inputs and parameters, for CPU and CUDA tensors.

A call has two levels. :class:`NativeBackend` binds plan, parameters and graph to a *call*, a :class:`Convolution` or
:class:`HiddenFeatures`, which knows its operator and the operators of its gradients. :func:`run` finds the weights at
the right batch statistics and evaluates the call: the operator at once where nothing is to be differentiated, else by
way of ``torch.autograd.Function``, which records it. The operators' shapes and second derivatives: operators.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..._native import Number
from ..._transforms import in_forward_mode, recorder, refuse_derivatives, refuse_tangents, refuse_transforms
from ...graph import Graph
from ...plan import Plan
from ...plan.moments import NormStatistics, StatisticsSource
from ...plan.packing import Parameters, is_traced
from ..backend import Backend
from .bound import BoundKernel, JointStatistics, bind
from .instruction_set import instruction_set
from .operators import of_bias_backward, of_sums_backward


class NativeBackend(Backend):
    """What `cpu` and `cuda` share: they differ in ``bound``, how weights get to the native code, and in what they
    support."""

    bound: type[BoundKernel]

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
        traced = is_traced()
        bound = bind(plan, parameters, self.bound, traced)
        inputs = x.contiguous(), delta.contiguous(), attributes.contiguous()
        if statistics_from.pool is None and not traced and (layer := bound.number()) is not None:
            return run_bound(bound, layer, graph, statistics_from.measured, inputs)
        return run(Convolution(bound, graph), statistics_from, (*inputs, bound.bias))

    def kernel(
        self,
        plan: Plan,
        parameters: Parameters,
        statistics_from: StatisticsSource,
        delta: Tensor,
        attributes: Tensor,
    ) -> tuple[Tensor, Sequence[NormStatistics]]:
        """K(x, a) (P, C_out, C_in): hidden features from the native code, the last layer one matrix product."""
        bound = bind(plan, parameters, self.bound, is_traced())
        h, statistics = run(HiddenFeatures(bound), statistics_from, (delta.contiguous(), attributes.contiguous()))
        k = h @ bound.dense_kernel().flatten(0, 1).T
        return k.view(h.shape[0], plan.out_size, plan.in_size), statistics

    def hidden(
        self,
        plan: Plan,
        parameters: Parameters,
        statistics_from: StatisticsSource,
        delta: Tensor,
        attributes: Tensor,
    ) -> tuple[Tensor, Sequence[NormStatistics]]:
        """γ s(|x|) h(x, a), (P, H). The statistics of a table's knots are taken in plain PyTorch."""
        if statistics_from.weighted is not None:
            return super().hidden(plan, parameters, statistics_from, delta, attributes)
        bound = bind(plan, parameters, self.bound, is_traced())
        return run(HiddenFeatures(bound), statistics_from, (delta.contiguous(), attributes.contiguous()))


# ---- level 1: what is called


@dataclass(eq=False)
class Convolution:
    """Inputs x, delta, attributes, bias; the output (N_dst, C_out).

    Attributes:
        n_inputs, geometry: how many inputs there are, and which of them are delta and attributes.
    """

    bound: BoundKernel
    graph: Graph
    n_inputs, geometry = 4, slice(1, 3)

    def forward(self, packed: Tensor, *inputs: Tensor) -> Tensor:
        bound, graph, (x, delta, attributes, bias) = self.bound, self.graph, inputs
        mean_and_bias = bound.expansion.contiguous(), bias.contiguous(), bound.mean
        edges = graph.src, graph.order, graph.rowptr
        tensors = *bound.arrays, packed, x, delta, attributes, *edges, *mean_and_bias
        return torch.ops.implicit_steer.conv_forward(*tensors, bound.plan.out_size, instruction_set())

    def backward(self, needs: Sequence[bool], grad: Tensor, packed: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        """The gradients of the inputs and of ``packed``; empty where not needed, but for the bias."""
        bound, (need_x, need_delta, need_attributes, _, need_packed) = self.bound, needs
        of_sums = of_sums_backward(self.graph.rowptr, bound.mean, grad)
        of_bias = of_bias_backward(bound.expansion, grad)
        x, delta, attributes, _ = inputs
        tensors = *bound.arrays, packed, x, delta, attributes, *self._edges(need_x, of_sums)
        needed = need_x, need_delta, need_attributes, need_packed
        *found, of_packed = torch.ops.implicit_steer.conv_backward(*tensors, *needed, instruction_set())
        return *found, of_bias, of_packed

    def gradients(
        self,
        needs: Sequence[bool],
        grad: Tensor,
        packed: Tensor,
        statistics: Tensor,
        inputs: Sequence[Tensor],
        learned: Sequence[Tensor],
    ) -> list[Tensor]:
        """The gradients of the inputs and the parameters, not differentiable."""
        if not self.bound.joint_gradients:
            return composed_gradients(self, needs, grad, packed, statistics, inputs, learned)
        bound, (x, delta, attributes, _) = self.bound, inputs
        need_x, need_delta, need_attributes, _, need_learned = needs
        given = *bound.arrays, *bound.matrix, learned, statistics, packed, x, delta, attributes
        tensors = *given, *self._edges(need_x, grad), bound.expansion.contiguous()
        arguments = *tensors, bound.mean, need_x, need_delta, need_attributes, need_learned, instruction_set()
        *found, of_learned = torch.ops.implicit_steer.conv_gradients(*arguments)
        return [*found, *of_learned]

    def _edges(self, by_source: bool, grad: Tensor) -> tuple[Tensor, ...]:
        graph = self.graph
        order = (graph.order_by_source, graph.colptr) if by_source else (graph.order, graph.rowptr)
        return graph.src, graph.order, graph.rowptr, grad.contiguous(), *order


@dataclass(eq=False)
class HiddenFeatures:
    """Inputs delta, attributes; the output h (P, H), times γ s(|x|). Otherwise as :class:`Convolution`."""

    bound: BoundKernel
    n_inputs, geometry = 2, slice(0, 2)

    def forward(self, packed: Tensor, *inputs: Tensor) -> Tensor:
        bound = self.bound
        arguments = *bound.arrays, packed, *inputs, bound.plan.hidden_size, instruction_set()
        return torch.ops.implicit_steer.conv_hidden(*arguments)

    def backward(self, needs: Sequence[bool], grad: Tensor, packed: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        """The gradients of the inputs and of ``packed``, all of them."""
        arguments = *self.bound.arrays, packed, *inputs, grad.contiguous(), instruction_set()
        return torch.ops.implicit_steer.conv_hidden_backward(*arguments)

    def gradients(self, *arguments: Any) -> list[Tensor]:
        """The gradients of the inputs and the parameters."""
        return composed_gradients(self, *arguments)


def composed_gradients(
    call: Convolution | HiddenFeatures,
    needs: Sequence[bool],
    grad: Tensor,
    packed: Tensor,
    statistics: Tensor,
    inputs: Sequence[Tensor],
    learned: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients of the inputs and the parameters by operators that know their derivatives."""
    *_, need_learned = needs
    *found, of_packed = call.backward(needs, grad, packed, *inputs)
    return [*found, *call.bound.unpack_gradient(of_packed, learned, statistics)] if need_learned else found


# ---- level 2: how it is evaluated


class _Recorded(torch.autograd.Function):
    """A call that autograd records: inputs and parameters → output, with weights that are packed already.

    Its gradients, asked for with ``create_graph=True``, are made of the native operators, which know their derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Convolution | HiddenFeatures, packed: Tensor, statistics: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(packed, statistics, *tensors)
        ctx.call = call
        with torch._C._AutoDispatchBelowAutograd():
            return call.forward(packed, *tensors[: call.n_inputs])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, (packed, statistics, *tensors) = ctx.call, ctx.saved_tensors
        needs, n = ctx.needs_input_grad[-len(tensors) :], call.n_inputs
        refuse_derivatives(grad, *tensors)
        inputs, learned, needed = tensors[:n], tensors[n:], (*needs[:n], any(needs[n:]))
        if torch.is_grad_enabled():  # create_graph=True
            packed = call.bound.pack(learned, statistics)
            found = composed_gradients(call, needed, grad, packed, statistics, inputs, learned)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                found = call.gradients(needed, grad, packed, statistics, inputs, learned)
        return None, None, None, *(g if need else None for g, need in zip_longest(found, needs))


class _RecordedLayer(torch.autograd.Function):
    """A call of a bound layer that autograd records: inputs, bias and parameters → output.

    Its gradients are one operator, too; with ``create_graph=True`` those of :class:`_Recorded`.
    """

    @staticmethod
    def forward(
        ctx: Any, bound: BoundKernel, layer: Number, graph: Graph, measured: bool, found: list[Tensor], *tensors: Tensor
    ) -> Tensor:
        numbers, (x, delta, attributes, *_) = (layer.number, graph.number), tensors
        operator, needs = torch.ops.implicit_steer.layer_forward_recorded, ctx.needs_input_grad[-len(tensors) :]
        out, packed, statistics, sums = operator(*numbers, x, delta, attributes, measured, any(needs[4:]))
        ctx.save_for_backward(packed, statistics, sums, *tensors)
        ctx.bound, ctx.layer, ctx.graph = bound, layer, graph
        found.append(statistics)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bound, graph, (packed, statistics, sums, *tensors) = ctx.bound, ctx.graph, ctx.saved_tensors
        needs, (x, delta, attributes, bias, *learned) = ctx.needs_input_grad[-len(tensors) :], tensors
        refuse_derivatives(grad, *tensors)
        need_x, need_delta, need_attributes, need_bias, *need_each = needs
        need_learned = any(need_each)
        if torch.is_grad_enabled():  # create_graph=True
            call, packed = Convolution(bound, graph), bound.pack(learned, statistics)
            inputs = x, delta, attributes, bias
            needed = need_x, need_delta, need_attributes, need_bias, need_learned
            found = composed_gradients(call, needed, grad, packed, statistics, inputs, learned)
        else:
            numbers = ctx.layer.number, graph.number_by_source if need_x else graph.number
            given = x, delta, attributes, packed, statistics, sums, grad.contiguous()
            arguments = *numbers, *given, need_x, need_delta, need_attributes, need_learned
            *found, of_learned = torch.ops.implicit_steer.layer_backward(*arguments)
            found += of_learned
        return None, None, None, None, None, *(g if need else None for g, need in zip_longest(found, needs))


_recorded, _recorded_layer = map(recorder, (_Recorded, _RecordedLayer))  # run has ruled out that torch.func looks on


def run_bound(
    bound: BoundKernel, layer: Number, graph: Graph, measured: bool, inputs: Sequence[Tensor]
) -> tuple[Tensor, Sequence[NormStatistics]]:
    """What :func:`run` gives, of a layer that the native extension has under a number, on x, delta and attributes."""
    if in_forward_mode():
        refuse_tangents(bound.backend, [*bound.learned, bound.bias, *inputs])
    found: list[Tensor] = []
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs, bound.bias, *bound.learned):
        out = _recorded_layer(bound, layer, graph, measured, found, *inputs, bound.bias, *bound.learned)
    elif measured:
        operator = torch.ops.implicit_steer.layer_forward_recorded
        out, _, statistics, _ = operator(layer.number, graph.number, *inputs, True, False)
        found.append(statistics)
    else:
        return torch.ops.implicit_steer.layer_forward(layer.number, graph.number, *inputs), []
    return out, JointStatistics(bound.plan, found[0]) if measured else []


def run(
    call: Convolution | HiddenFeatures, statistics_from: StatisticsSource, inputs: Sequence[Tensor]
) -> tuple[Tensor, Sequence[NormStatistics]]:
    """The output of a call on contiguous inputs, and the batch norms' statistics if they are measured.

    Where torch.compile or torch.func is looking on, the parameters are packed anew, by an operator that these see.
    """
    bound, measured = call.bound, statistics_from.measured
    (delta, attributes), pool = inputs[call.geometry], statistics_from.pool
    if is_traced():
        refuse_transforms(bound.backend)
        with torch.no_grad():
            statistics = bound.measured(delta, attributes, pool)[0] if measured else bound.running()
        out = call.forward(bound.pack(bound.learned, statistics), *inputs)
        found = JointStatistics(bound.plan, statistics) if measured else []
        return out, [found[n] for n in range(len(found))]
    refuse_tangents(bound.backend, [*bound.learned, *inputs])
    with torch._C._AutoDispatchBelowAutograd():
        statistics, packed = bound.measured(delta, attributes, pool) if measured else bound.packed()
        found = JointStatistics(bound.plan, statistics) if measured else []
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs, *bound.learned)):
            return call.forward(packed, *inputs), found
    return _recorded(call, packed, statistics, *inputs, *bound.learned), found
