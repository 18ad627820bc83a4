"""Backend `cpu`: one native pass per tile of edges (``csrc/cpu``): MLP, coupling, sum per node; backward likewise.

Nothing is stored per edge but one gradient of the gathered features, E × C_in. The hidden values are recomputed in the
backward pass. First derivatives only: asked for by name, differentiating a gradient raises; under "auto", gradients
that are to be differentiated again come from `eager`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from .._check import require
from ..graph import Graph
from ..packing import NormParameters, Parameters, Weights, dense_kernel, mixing_weights, running
from ..plan import Plan
from . import eager
from .cpu_plan import Prepared, hidden_field_size, prepare, reads_one
from .hidden import Statistics

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


class _Call(NamedTuple):
    """What one call of the operator has besides tensors that are differentiated."""

    plan: Plan
    prepared: Prepared
    graph: Graph
    isa: int
    n_last: int  # tensors of the last layer: with or without a bias
    eager_second_order: bool

    def forward(self, packed: Tensor, x: Tensor, delta: Tensor, attributes: Tensor) -> Tensor:
        edges = self.graph.src, self.graph.order, self.graph.rowptr
        plan = self.prepared.tensors(packed.dtype)
        return torch.ops.implicit_steer.conv_forward(*plan, packed, x, delta, attributes, *edges, self.isa)

    def gradients(self, needs: Sequence[bool], grad: Tensor, packed: Tensor, statistics: Tensor, *tensors: Tensor):
        """Of x, delta, attributes and the parameters; None where not needed."""
        x, delta, attributes, *parameters = tensors
        graph, need_weights = self.graph, any(needs[3:])
        by_source = (graph.order_by_source, graph.colptr) if needs[0] else (graph.order, graph.rowptr)
        plan, operator = self.prepared.tensors(x.dtype), torch.ops.implicit_steer
        *grads, grad_packed = operator.conv_backward(
            *plan,
            packed,
            x,
            delta,
            attributes,
            *(graph.src, graph.order, graph.rowptr),
            grad.contiguous(),
            *by_source,
            *(*needs[:3], need_weights),
            self.isa,
        )
        if need_weights:
            matrix = self.prepared.matrix(x.dtype)
            of_packed = operator.conv_pack_backward(*plan, *matrix, statistics, grad_packed[0])
            grads += _split_gradient(self.plan, of_packed, parameters, self.n_last)
        else:
            grads += [None] * len(parameters)
        return [g if need else None for g, need in zip(grads, needs, strict=True)]

    def eager_gradients(self, needs: Sequence[bool], grad: Tensor, statistics: Tensor, *tensors: Tensor) -> list:
        """The same from `eager`: they can be differentiated again."""
        x, delta, attributes, *rest = tensors
        with torch.enable_grad():
            parameters = _parameters(self.plan, rest, statistics)
            out, _ = eager.forward(self.plan, parameters, False, self.graph, x, delta, attributes)
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, materialize_grads=True))
        return [next(found) if need else None for need in needs]


class _Gradients(torch.autograd.Function):
    """The gradients, as a node of the graph of their own, so that differentiating them raises."""

    @staticmethod
    def forward(ctx, call, needs, grad, *tensors):
        return tuple(call.gradients(needs, grad, *tensors))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_NO_SECOND_DERIVATIVES)


class _Conv(torch.autograd.Function):
    """``packed`` is a function of the parameters; their gradients are returned, not its."""

    @staticmethod
    def forward(ctx, call, packed, statistics, x, delta, attributes, *parameters):
        ctx.save_for_backward(packed, statistics, x, delta, attributes, *parameters)
        ctx.call = call
        return call.forward(packed, x, delta, attributes)

    @staticmethod
    def backward(ctx, grad):
        call, needs, (packed, *tensors) = ctx.call, ctx.needs_input_grad[3:], ctx.saved_tensors
        if not torch.is_grad_enabled():
            gradients = call.gradients(needs, grad, packed, *tensors)
        elif call.eager_second_order:  # create_graph=True
            gradients = call.eager_gradients(needs, grad, *tensors)
        else:
            gradients = _Gradients.apply(call, needs, grad, packed, *tensors)
        return None, None, None, *gradients


class _Packed(NamedTuple):
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
    tensors, n_last, isa = _tensors(plan, parameters), _n_last(parameters), instruction_set()
    x, delta, attributes = x.contiguous(), delta.contiguous(), attributes.contiguous()
    with torch.no_grad():
        if batch_statistics:
            packed = _pack(plan, parameters, tensors, n_last, (delta, attributes, isa))
        else:
            packed = _kept_or_packed(plan, parameters, tensors, n_last)
    call = _Call(plan, packed.prepared, graph, isa, n_last, eager_second_order)
    measured = _split_statistics(plan, packed.statistics) if batch_statistics else []
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, delta, attributes, *tensors)):
        return _Conv.apply(call, packed.weights, packed.statistics, x, delta, attributes, *tensors), measured
    return call.forward(packed.weights, x, delta, attributes), measured
