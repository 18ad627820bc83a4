"""Backend `cpu`: one native pass per tile of edges (``csrc/cpu``): MLP, coupling, sum per node; backward likewise.

Nothing is stored per edge but one gradient of the gathered features, E × C_in. The hidden values are recomputed in the
backward pass. First derivatives only: asked for by name, differentiating a gradient raises; under "auto", gradients
that are to be differentiated again come from `eager`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from .._check import require
from ..graph import Graph
from ..packing import (
    NormParameters,
    Parameters,
    Weights,
    constant,
    dense_kernel,
    mixing_weights,
    norm_affine,
    running,
)
from ..plan import Plan
from . import eager
from .cpu_plan import Prepared, hidden_field_size, prepare, reads_one
from .hidden import Statistics, hidden_features, radial_factor

INSTRUCTION_SETS = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3}
_NO_SECOND_DERIVATIVES = (
    "backend: expected one with second derivatives, got 'cpu', whose gradients cannot be differentiated again. "
    "Use backend='eager'."
)


@cache
def instruction_set() -> int:
    """Number of the instruction set to run, from the environment variable ``IMPLICIT_STEER_ISA`` as it is at the first
    call; 0: the widest."""
    name = os.environ.get("IMPLICIT_STEER_ISA", "auto")
    require(name in INSTRUCTION_SETS, "IMPLICIT_STEER_ISA", f"one of {tuple(INSTRUCTION_SETS)}", repr(name))
    return INSTRUCTION_SETS[name]


def supports(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """CPU tensors in float32 or float64, with the native extension; every plan that the lowering makes."""
    available, reason = native.available()
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


# ---- the parameters as the native code takes them: one vector


def _tensors(plan: Plan, parameters: Parameters) -> list[Tensor]:
    """What is learned: hidden layers, batch norms, shell width, and last the last layer."""
    tensors = []
    for layer, (weights, bias) in zip(plan.linears, parameters.linears[:-1], strict=True):
        tensors += [weights, bias] if layer.bias.shape[1] else [weights]
    for norm, learned in zip(plan.norms, parameters.norms, strict=True):
        tensors += [learned.weight, learned.bias] if len(norm.trivial) else [learned.weight]
    return [*tensors, parameters.shell_width, *(t for t in parameters.linears[-1] if t is not None)]


def _parameters(plan: Plan, tensors: Sequence[Tensor], statistics: Tensor) -> Parameters:
    """The inverse of :func:`_tensors`; the batch norms have these statistics."""
    rest, norms = iter(tensors), []
    linears = [(next(rest), next(rest) if layer.bias.shape[1] else None) for layer in plan.linears]
    for norm, (mean, var) in zip(plan.norms, _split_statistics(plan, statistics), strict=True):
        full = mean.new_zeros(norm.channels, int(norm.full_trivial.max(initial=0)) + 1)
        full[:, norm.full_trivial.tolist()] = mean
        norms.append(NormParameters(next(rest), next(rest) if len(norm.trivial) else mean, full, var))
    shell_width = next(rest)
    return Parameters((*linears, (next(rest), next(rest, None))), tuple(norms), shell_width)


def _kernel(plan: Plan, shell_width: Tensor, last: Sequence[Tensor]) -> Tensor:
    """(C_out, C_in, H), of a dense coupling."""
    weights, bias = last[0], last[1] if len(last) > 1 else None
    theta = [mixing_weights(c, weights, bias) for c in plan.couplings]
    return dense_kernel(plan, Weights([], theta, shell_width))


def _n_last(parameters: Parameters) -> int:
    return 2 - (parameters.linears[-1][1] is None)


def _learned(plan: Plan, tensors: Sequence[Tensor], n_last: int) -> list[Tensor]:
    """The tensors that are packed; a dense coupling has its kernel for the last layer."""
    if plan.dense_coupling:
        kernel = _kernel(plan, tensors[-n_last - 1], tensors[-n_last:])
        tensors = [*tensors[:-n_last], kernel]
    return [t.contiguous() for t in tensors]


def _sizes(plan: Plan, tensors: Sequence[Tensor], n_last: int) -> tuple[int, ...]:
    if plan.dense_coupling:
        return (*(t.numel() for t in tensors[:-n_last]), plan.out_size * plan.in_size * plan.hidden_size)
    return tuple(t.numel() for t in tensors)


def _split_gradient(plan: Plan, grad: Tensor, tensors: Sequence[Tensor], n_last: int) -> list[Tensor]:
    """The gradients of the tensors from that of what is packed, one vector."""
    parts = grad.split(_sizes(plan, tensors, n_last))
    if not plan.dense_coupling:
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    with torch.enable_grad():
        last = [t.detach().requires_grad_() for t in tensors[-n_last:]]
        kernel = _kernel(plan, tensors[-n_last - 1].detach(), last)
    of_last = torch.autograd.grad(kernel, last, parts[-1].view(kernel.shape), materialize_grads=True)
    return [*(part.view(t.shape) for part, t in zip(parts[:-1], tensors[:-n_last], strict=True)), *of_last]


# ---- batch norms


def _running(plan: Plan, parameters: Parameters) -> Tensor:
    """The statistics that the batch norms keep, (n_layers, W (n_trivial + 1)), as the native code takes them."""
    if not plan.norms:
        return parameters.shell_width.new_empty(0)
    found = [running(norm, p) for norm, p in zip(plan.norms, parameters.norms, strict=True)]
    return torch.cat([t.reshape(-1) for pair in found for t in pair])


def _split_statistics(plan: Plan, statistics: Tensor) -> list[Statistics]:
    if not plan.norms:
        return []
    channels = plan.norms[0].channels
    rows = statistics.view(len(plan.norms), -1)
    return [Statistics(row[:-channels].view(channels, -1), row[-channels:]) for row in rows]


# ---- the operator


@dataclass
class _Call:
    """What one call of an operator has besides tensors that are differentiated, and how it is evaluated."""

    plan: Plan
    prepared: Prepared
    isa: int
    n_last: int  # tensors of the last layer: with or without a bias
    eager_second_order: bool

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.prepared.tensors(like.dtype)

    def parameter_gradients(self, of_packed: Tensor, statistics: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        matrix = self.prepared.matrix(of_packed.dtype)
        grad = torch.ops.implicit_steer.conv_pack_backward(*self.tensors(of_packed), *matrix, statistics, of_packed)
        return _split_gradient(self.plan, grad, parameters, self.n_last)


@dataclass
class _Convolution(_Call):
    """Inputs x, delta, attributes; the output (N, C_out)."""

    graph: Graph
    n_inputs = 3

    def forward(self, packed: Tensor, x: Tensor, delta: Tensor, attributes: Tensor) -> Tensor:
        edges = self.graph.src, self.graph.order, self.graph.rowptr
        return torch.ops.implicit_steer.conv_forward(*self.tensors(x), packed, x, delta, attributes, *edges, self.isa)

    def backward(self, needs: Sequence[bool], grad: Tensor, packed: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        """The gradients of the inputs and of ``packed``, the sum over threads first; empty where not needed."""
        graph = self.graph
        by_source = (graph.order_by_source, graph.colptr) if needs[0] else (graph.order, graph.rowptr)
        edges = graph.src, graph.order, graph.rowptr
        wanted = (*needs[:3], any(needs[3:]))
        arguments = *self.tensors(grad), packed, *inputs, *edges, grad.contiguous(), *by_source, *wanted, self.isa
        return torch.ops.implicit_steer.conv_backward(*arguments)

    def eager(self, parameters: Parameters, *inputs: Tensor) -> Tensor:
        return eager.forward(self.plan, parameters, False, self.graph, *inputs)[0]


@dataclass
class _HiddenFeatures(_Call):
    """Inputs delta, attributes; the output h (P, H), times γ s(|x|)."""

    n_inputs = 2

    def forward(self, packed: Tensor, delta: Tensor, attributes: Tensor) -> Tensor:
        return torch.ops.implicit_steer.conv_hidden(*self.tensors(delta), packed, delta, attributes, self.isa)

    def backward(self, needs: Sequence[bool], grad: Tensor, packed: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        arguments = *self.tensors(grad), packed, *inputs, grad.contiguous(), self.isa
        return torch.ops.implicit_steer.conv_hidden_backward(*arguments)

    def eager(self, parameters: Parameters, *inputs: Tensor) -> Tensor:
        h, _, _ = hidden_features(self.plan, parameters, False, *inputs)
        if self.plan.norms:  # which hidden_features leaves to the mixing weights
            norm, learned = self.plan.norms[-1], parameters.norms[-1]
            scale, shift = norm_affine(norm, learned, *running(norm, learned))
            fields = h[:, :-1].unflatten(1, (norm.channels, -1)) * scale[:, None]
            fields = fields.index_add(2, constant(norm, "measured", h), shift.expand(len(h), -1, -1))
            h = torch.cat([fields.flatten(1), h[:, -1:]], 1)
        return h * radial_factor(self.plan, parameters.shell_width, inputs[0])[:, None]


def _gradients(call: _Call, needs: Sequence[bool], grad: Tensor, packed: Tensor, statistics: Tensor, *tensors: Tensor):
    """Of the inputs and the parameters; None where not needed."""
    inputs, parameters = tensors[: call.n_inputs], tensors[call.n_inputs :]
    *found, of_packed = call.backward(needs, grad, packed, *inputs)
    if any(needs[call.n_inputs :]):
        found += call.parameter_gradients(of_packed[0], statistics, parameters)
    return [g if need else None for g, need in zip_longest(found, needs)]


def _eager_gradients(call: _Call, needs: Sequence[bool], grad: Tensor, statistics: Tensor, *tensors: Tensor) -> list:
    """The same from `eager`: they can be differentiated again."""
    inputs, rest = tensors[: call.n_inputs], tensors[call.n_inputs :]
    with torch.enable_grad():
        out = call.eager(_parameters(call.plan, rest, statistics), *inputs)
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


class _Gradients(torch.autograd.Function):
    """The gradients, as a node of the graph of their own, so that differentiating them raises."""

    @staticmethod
    def forward(ctx, call, needs, grad, *tensors):
        return tuple(_gradients(call, needs, grad, *tensors))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_NO_SECOND_DERIVATIVES)


class _Operator(torch.autograd.Function):
    """``packed`` is a function of the parameters; their gradients are returned, not its."""

    @staticmethod
    def forward(ctx, call, packed, statistics, *tensors):
        ctx.save_for_backward(packed, statistics, *tensors)
        ctx.call = call
        return call.forward(packed, *tensors[: call.n_inputs])

    @staticmethod
    def backward(ctx, grad):
        call, needs, (packed, *tensors) = ctx.call, ctx.needs_input_grad[3:], ctx.saved_tensors
        if not torch.is_grad_enabled():
            gradients = _gradients(call, needs, grad, packed, *tensors)
        elif call.eager_second_order:  # create_graph=True
            gradients = _eager_gradients(call, needs, grad, *tensors)
        else:
            gradients = _Gradients.apply(call, needs, grad, packed, *tensors)
        return None, None, None, *gradients


class _Packed(NamedTuple):
    """A layer's parameters as the native code reads them."""

    prepared: Prepared
    weights: Tensor
    statistics: Tensor  # of the batch norms, see _running


def _pack(plan: Plan, parameters: Parameters, tensors: Sequence[Tensor], n_last: int, geometry=None) -> _Packed:
    """With ``geometry`` (delta, attributes, isa), the batch norms' statistics come from these edges."""
    prepared, operator = prepare(plan, _sizes(plan, tensors, n_last)), torch.ops.implicit_steer
    dtype = parameters.shell_width.dtype
    arguments = *prepared.tensors(dtype), *prepared.matrix(dtype), _learned(plan, tensors, n_last)
    statistics = _running(plan, parameters) if geometry is None else operator.conv_statistics(*arguments, *geometry)
    return _Packed(prepared, operator.conv_pack(*arguments, statistics), statistics)


def _kept_or_packed(plan: Plan, parameters: Parameters, tensors: list[Tensor], n_last: int) -> _Packed:
    """What was packed last time, if plan, parameters and running statistics are still the same."""
    kept = parameters.kept
    if kept is None:
        return _pack(plan, parameters, tensors, n_last)
    sources = [*tensors, *(t for norm in parameters.norms for t in (norm.mean, norm.var))]
    if kept.entry is not None:
        of_plan, copy, packed = kept.entry
        if of_plan is plan and torch.ops.implicit_steer.same_values(sources, copy):
            return packed
    packed = _pack(plan, parameters, tensors, n_last)
    kept.entry = plan, torch.cat([t.reshape(-1) for t in sources]), packed
    return packed


def _run(make: Callable[..., _Call], plan: Plan, parameters: Parameters, batch_statistics: bool, *inputs: Tensor):
    """The output of the operator that ``make`` makes, and the batch statistics. The last inputs: delta, attributes."""
    tensors, n_last, isa = _tensors(plan, parameters), _n_last(parameters), instruction_set()
    inputs = tuple(t.contiguous() for t in inputs)
    with torch.no_grad():
        if batch_statistics:
            packed = _pack(plan, parameters, tensors, n_last, (*inputs[-2:], isa))
        else:
            packed = _kept_or_packed(plan, parameters, tensors, n_last)
    call = make(plan=plan, prepared=packed.prepared, isa=isa, n_last=n_last)
    measured = _split_statistics(plan, packed.statistics) if batch_statistics else []
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *tensors)):
        return _Operator.apply(call, packed.weights, packed.statistics, *inputs, *tensors), measured
    return call.forward(packed.weights, *inputs), measured


def forward(
    plan: Plan,
    parameters: Parameters,
    batch_statistics: bool,
    graph: Graph,
    x: Tensor,
    delta: Tensor,
    attributes: Tensor,
    *,
    eager_second_order: bool = False,
) -> tuple[Tensor, list[Statistics]]:
    """out_i = Σ_{e: j→i} K(x_e, a_e) f_j, shape (N, C_out).

    With ``eager_second_order``, gradients asked for with ``create_graph=True`` are those of `eager`.
    """
    make = partial(_Convolution, graph=graph, eager_second_order=eager_second_order)
    return _run(make, plan, parameters, batch_statistics, x, delta, attributes)


def kernel(
    plan: Plan, parameters: Parameters, batch_statistics: bool, delta: Tensor, attributes: Tensor
) -> tuple[Tensor, list[Statistics]]:
    """K(x, a) (P, C_out, C_in): hidden features from the native code, the last layer one matrix product. Second
    derivatives by `eager`."""
    make = partial(_HiddenFeatures, eager_second_order=True)
    h, statistics = _run(make, plan, parameters, batch_statistics, delta, attributes)
    last = [t for t in parameters.linears[-1] if t is not None]
    matrix = _kernel(plan, parameters.shell_width, last).flatten(0, 1)
    return (h @ matrix.T).view(len(h), plan.out_size, plan.in_size), statistics
