"""The kernels as operators of torch: schemas, shapes (fake kernels) and derivatives.

``triton_conv`` is the whole convolution but for mean and bias, ``triton_conv_backward`` its gradient,
``triton_moments`` what batch norms measure, ``triton_knot_sums`` adds up the edges near each knot of a table. Further
derivatives are composed, in call.py, of PyTorch's own operators, ``triton_knot_sums`` and ``triton_contract``: T is
linear in x, r and Θ and affine in q, so the derivatives of its gradient are the same operators again, with a direction
in the place of one argument.

Operators take tensors and scalars only, so a plan goes by its digest, see ``handle.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._transforms import one_by_one
from ...plan.packing import unflatten
from . import convolution, launch_contract, launch_spline
from .convolution import Learned, Points, Saved
from .handle import plan_of
from .launch_contract import Edges, Factors
from .prepared import Prepared, prepare
from .sizes import Sizes
from .tables import tables

_NAMESPACE = "implicit_steer"


def _prepared(digest: str, like: Tensor) -> Prepared:
    return prepare(plan_of(digest), like.device, like.dtype)


def _sizes(digest: str) -> Sizes:
    return tables(plan_of(digest)).sizes


def _on_device(like: Tensor) -> Any:
    """Kernels are launched on the current device: make it the tensors'."""
    return torch.cuda.device_of(like)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


# ---- schemas and kernels

_GRAPH = "Tensor source, Tensor order, Tensor rowptr, Tensor by_source, Tensor colptr"
_LEARNED = "Tensor[] learned, Tensor[] statistics, bool measured"
_CONV = f"str plan, Tensor x, Tensor delta, Tensor attr, {_LEARNED}, {_GRAPH}"
_CONTRACT = f"str plan, Tensor x, Tensor q, Tensor r, Tensor theta, {_GRAPH}, bool has_one"
_SCHEMAS = {
    "triton_conv": f"({_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "triton_conv_backward": (
        f"({_CONV}, Tensor numbers, Tensor packed, Tensor q, Tensor r, Tensor gradient, bool[] needs)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "triton_knot_sums": "(str plan, Tensor values, Tensor weights, Tensor first) -> Tensor",
    "triton_moments": f"(str plan, Tensor delta, Tensor attr, {_LEARNED}, Tensor order, int n) -> Tensor",
    "triton_contract": f"({_CONTRACT}) -> Tensor",
    "triton_contract_backward": f"({_CONTRACT}, Tensor gradient, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
}


def forward(p: Prepared, inputs: Sequence[Tensor], learned: Learned, graph: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``triton_conv`` itself, of x, delta and attr, and of the graph's tensors."""
    x, delta, attr = _contiguous(*inputs)
    edges = Edges(*_contiguous(*graph))
    with _on_device(x):
        total, saved = convolution.forward(p, x, Points(delta, attr, edges.order), edges, learned)
    return total, *saved


def gradients(
    p: Prepared,
    inputs: Sequence[Tensor],
    learned: Learned,
    graph: Sequence[Tensor],
    saved: Saved,
    gradient: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``triton_conv_backward`` itself."""
    x, delta, attr = _contiguous(*inputs)
    edges = Edges(*_contiguous(*graph))
    points = Points(delta, attr, edges.order)
    with _on_device(gradient):
        return convolution.gradients(p, gradient.contiguous(), x, points, edges, learned, saved, needs)


def _conv(plan: str, *arguments: Any) -> Any:
    *inputs, learned, statistics, measured = arguments[:6]
    return forward(_prepared(plan, inputs[1]), inputs, Learned(learned, statistics, measured), arguments[6:])


def _conv_backward(plan: str, *arguments: Any) -> Any:
    *inputs, learned, statistics, measured = arguments[:6]
    graph, kept, (gradient, needs) = arguments[6:11], Kept(*arguments[11:15]), arguments[15:]
    of_call = inputs, Learned(learned, statistics, measured), graph
    return gradients(_prepared(plan, gradient), *of_call, kept, gradient, needs)


def _moments(plan: str, delta: Tensor, attr: Tensor, *arguments: Any) -> Tensor:
    *learned, order, n = arguments
    with _on_device(delta):
        points = Points(*_contiguous(delta, attr, order))
        return convolution.moments(_prepared(plan, delta), points, Learned(*learned), n)


def _knot_sums(plan: str, values: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    with _on_device(values):
        return launch_spline.knot_sums(_prepared(plan, values), *_contiguous(values, weights, first))


def _factors_and_edges(arguments: Sequence[Any]) -> tuple[Factors, Edges]:
    """Of ``triton_contract``, behind the plan."""
    *tensors, has_one = arguments
    return Factors(has_one, *_contiguous(*tensors[:4])), Edges(*_contiguous(*tensors[4:]))


def _contract(plan: str, *arguments: Any) -> Any:
    factors, edges = _factors_and_edges(arguments)
    with _on_device(factors.x):
        return launch_contract.contract_forward(_prepared(plan, factors.r), factors, edges)


def _contract_backward(plan: str, *arguments: Any) -> Any:
    *inputs, gradient, needs = arguments
    factors, edges = _factors_and_edges(inputs)
    *of_factors, need_theta = needs
    d_theta = torch.zeros_like(factors.theta) if need_theta else None
    with _on_device(factors.x):
        prepared = _prepared(plan, factors.r)
        found = launch_contract.contract_backward(prepared, gradient.contiguous(), factors, edges, of_factors, d_theta)
    return *found, factors.theta.new_empty(0) if d_theta is None else d_theta


# ---- shapes


def _wanted(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of these tensors; empty where not needed."""
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True))


def _conv_fake(plan: str, *arguments: Any) -> Any:
    x, _, _, learned, statistics, _, source, _, rowptr, *_ = arguments
    s, n_edges = _sizes(plan), source.shape[0]
    n_numbers = sum(t.numel() for t in (*learned, *statistics))
    n_packed = s.n_weights + s.n_t * s.out_size
    kept = (n_numbers,), (n_packed,), (n_edges, s.n_harmonics), (n_edges, s.n_columns)
    return tuple(x.new_empty(shape) for shape in ((rowptr.shape[0] - 1, s.out_size), *kept))


def _conv_backward_fake(plan: str, *arguments: Any) -> Any:
    x, delta, attr, learned, *_, needs = arguments
    geometry, n_learned = any(needs[1:]), sum(t.numel() for t in learned) if needs[3] else 0
    return *_wanted((x, delta, attr), (needs[0], geometry, geometry)), x.new_empty(n_learned)


def _moments_fake(plan: str, delta: Tensor, *_: Any) -> Tensor:
    return delta.new_empty(2, plan_of(plan).field_size, _sizes(plan).channels)


def _knot_sums_fake(plan: str, values: Tensor, *_: Tensor) -> Tensor:
    return values.new_empty(_sizes(plan).n_rows, values.shape[1])


def _contract_fake(plan: str, *arguments: Any) -> Any:
    factors, edges = _factors_and_edges(arguments)
    return factors.x.new_empty(edges.rowptr.shape[0] - 1, factors.theta.shape[1])


def _contract_backward_fake(plan: str, *arguments: Any) -> Any:
    *inputs, _, needs = arguments
    return _wanted(inputs[:4], needs)


# ---- derivatives


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))
    ctx.plan, ctx.others = inputs[0], [v for v in inputs[1:] if not isinstance(v, Tensor)]


def _save_conv(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.plan, x, delta, attr, learned, statistics, ctx.measured, *graph = inputs
    ctx.n_learned, ctx.n_statistics, kept = len(learned), len(statistics), output[1:]
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, delta, attr, *learned, *statistics, *graph, *kept)


def _masked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def _conv_gradient(ctx: Any, gradient: Tensor, *_: Any) -> Any:
    x, delta, attr, *rest = ctx.saved_tensors
    n, end = ctx.n_learned, ctx.n_learned + ctx.n_statistics
    learned, statistics, graph, kept = rest[:n], rest[n:end], rest[end:-4], rest[-4:]
    needs = *ctx.needs_input_grad[1:4], any(ctx.needs_input_grad[4])
    arguments = ctx.plan, x, delta, attr, learned, statistics, ctx.measured, *graph, *kept, gradient, needs
    *found, flat = torch.ops.implicit_steer.triton_conv_backward(*arguments)
    of_learned = unflatten(flat, learned) if needs[3] else [None] * n
    return None, *_masked(found, needs[:3]), of_learned, [None] * ctx.n_statistics, *[None] * 6


def _contract_gradient(ctx: Any, gradient: Tensor) -> Any:
    needs = ctx.needs_input_grad[1:5]
    arguments = ctx.plan, *ctx.saved_tensors, *ctx.others, gradient, needs
    found = torch.ops.implicit_steer.triton_contract_backward(*arguments)
    return None, *_masked(found, needs), *[None] * 6


def _contract_backward_gradient(ctx: Any, *directions: Tensor) -> Any:
    *inputs, source, order, rowptr, by_source, colptr, gradient = ctx.saved_tensors
    (has_one, given), graph = ctx.others, (source, order, rowptr, by_source, colptr)
    needs, of_gradient = ctx.needs_input_grad[1:5], ctx.needs_input_grad[11]
    totals: list[Tensor | None] = [None] * 5

    def add(n: int, more: Tensor) -> None:
        before = totals[n]
        totals[n] = more if before is None else before + more

    operators = torch.ops.implicit_steer
    for n, (direction, was_given) in enumerate(zip(directions, given, strict=True)):
        if direction is None or not was_given:
            continue
        # T is affine in q: along a direction of q its constant counts as 0
        moved = [direction if k == n else t for k, t in enumerate(inputs)]
        one = has_one and n != 1
        if of_gradient:
            add(4, operators.triton_contract(ctx.plan, *moved, *graph, one))
        others = [need and k != n for k, need in enumerate(needs)]
        if any(others):
            found = operators.triton_contract_backward(ctx.plan, *moved, *graph, one, gradient, others)
            for k in range(4):
                if others[k]:
                    add(k, found[k])
    return None, *totals[:4], *[None] * 6, totals[4], None


# ---- registration


class _Operator(NamedTuple):
    """Kernel, shapes, gradient and what it saves; operators without a gradient are not differentiable."""

    kernel: Callable[..., Any]
    fake: Callable[..., Any]
    gradient: Callable[..., Any] | None = None
    save: Callable[..., None] = _save


KERNELS = {
    "triton_conv": _Operator(_conv, _conv_fake, _conv_gradient, _save_conv),
    "triton_conv_backward": _Operator(_conv_backward, _conv_backward_fake),
    "triton_moments": _Operator(_moments, _moments_fake),
    "triton_knot_sums": _Operator(_knot_sums, _knot_sums_fake),
    "triton_contract": _Operator(_contract, _contract_fake, _contract_gradient),
    "triton_contract_backward": _Operator(_contract_backward, _contract_backward_fake, _contract_backward_gradient),
}

_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def _register() -> None:
    _native.available()  # the native extension defines the namespace first, where there is one
    for name, operator in KERNELS.items():
        _library.define(name + _SCHEMAS[name])
        for key in ("CPU", "CUDA"):
            _library.impl(name, operator.kernel, key)
        qualified = f"{_NAMESPACE}::{name}"
        torch.library.register_fake(qualified, operator.fake, lib=_library)
        one_by_one(name)
        if operator.gradient is not None:
            torch.library.register_autograd(qualified, operator.gradient, setup_context=operator.save, lib=_library)


_register()
