"""The native operators of ``csrc/bindings`` for torch: their shapes (fake kernels) and derivatives to second order.

Everything differentiable is packed weights, features x, edge_delta and attributes. The derivative of a gradient is the
product of a Hessian with a vector, which the native code takes as the backward pass's derivative along that direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ... import _native
from ..._transforms import one_by_one, recorder, refuse_derivatives
from ...plan.packing import unflatten
from ..by_name import by_name, differentiable, positional

_NAMESPACE = "implicit_steer"


def _no_third_derivatives(*_: Any) -> NoReturn:
    raise RuntimeError(
        "backend: expected one with third derivatives, got 'cpu' or 'cuda', which have first and second ones. "
        "Use backend='eager'."
    )


def _wanted(like: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a gradient operator gives: a tensor of these shapes each, without rows where it is not needed."""
    return tuple(t.new_empty(t.shape if need else (0, *t.shape[1:])) for t, need in zip(like, needs, strict=True))


def _directions(cotangents: Sequence[Tensor], like: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Directions of these tensors; 0 for those whose gradients were not asked for."""
    return [v.contiguous() if need else torch.zeros_like(t) for v, t, need in zip(cotangents, like, needs, strict=True)]


def _masked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def _by_source(src: Tensor, n: int, need: bool, order: Tensor, rowptr: Tensor) -> tuple[Tensor, Tensor]:
    """Edges by source; anything where they are not needed."""
    return torch.ops.implicit_steer.sort_by_key.default(src, n) if need else (order, rowptr)


# ---- Of every operator below: a fake kernel, which gets its arguments `a` by the names that its schema gives them
# (csrc/bindings); and a gradient, which gets `a`, likewise by name which of them need a gradient, and the gradients of
# what the operator gave. It returns, by name, the gradients that it found.


def _edges(a: Any) -> tuple[Tensor, ...]:
    """What the operators that sum over edges have in common."""
    return a.plan_ints, a.plan_reals, a.weights, a.x, a.delta, a.attr, a.src, a.order, a.rowptr


def _points(a: Any) -> tuple[Tensor, ...]:
    """What the operators of the hidden features have in common."""
    return a.plan_ints, a.plan_reals, a.weights, a.delta, a.attr


def _packing(a: Any) -> tuple[Tensor, ...]:
    """What the operators that pack parameters have in common."""
    return a.plan_ints, a.plan_reals, a.pack_rowptr, a.pack_column, a.pack_value


# ---- sums over edges


def _conv_forward_fake(a: Any) -> Any:
    return a.x.new_empty(a.rowptr.shape[0] - 1, a.out_size)


def _conv_forward_gradient(a: Any, needs: Any, grad: Tensor) -> dict[str, Tensor | None]:
    names = "x", "delta", "attr", "weights"
    needed = needs.x, needs.delta, needs.attr, needs.weights
    of_sums = of_sums_backward(a.rowptr, a.mean, grad).contiguous()
    of_bias = of_bias_backward(a.expansion, grad) if needs.bias else None
    by_source = _by_source(a.src, a.x.shape[0], needs.x, a.order, a.rowptr)
    found = torch.ops.implicit_steer.conv_backward.default(*_edges(a), of_sums, *by_source, *needed, a.isa)
    return dict(zip(names, _masked(found, needed), strict=True), bias=of_bias)


def of_sums_backward(rowptr: Tensor, mean: bool, grad: Tensor) -> Tensor:
    """The gradient of the sums over each node's edges from that of the output."""
    return grad / rowptr.diff().clamp(min=1).to(grad.dtype)[:, None] if mean else grad


def of_bias_backward(expansion: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the bias from that of the output."""
    return torch.mv(expansion.T, grad.sum(0))


def _conv_backward_fake(a: Any) -> Any:
    return _wanted((a.x, a.delta, a.attr, a.weights), (a.need_x, a.need_delta, a.need_attr, a.need_weights))


def _conv_backward_gradient(a: Any, needs: Any, *cotangents: Tensor) -> dict[str, Tensor | None]:
    given = a.need_x, a.need_delta, a.need_attr, a.need_weights
    v_x, v_delta, v_attr, v_weights = _directions(cotangents, (a.x, a.delta, a.attr, a.weights), given)
    names = "grad_out", "x", "delta", "attr", "weights"
    needed = needs.grad_out, needs.x, needs.delta, needs.attr, needs.weights
    by_source = _by_source(a.src, a.x.shape[0], needs.x, a.order, a.rowptr)
    tensors = *_edges(a), a.grad_out, *by_source, v_weights, v_x, v_delta, v_attr
    found = torch.ops.implicit_steer.conv_double_backward(*tensors, *needed, a.isa)
    return dict(zip(names, _masked(found, needed), strict=True))


def _conv_double_backward_fake(a: Any) -> Any:
    needed = a.need_out, a.need_x, a.need_delta, a.need_attr, a.need_weights
    return _wanted((a.grad_out, a.x, a.delta, a.attr, a.weights), needed)


# ---- hidden features at points


def _conv_hidden_fake(a: Any) -> Any:
    return a.delta.new_empty(a.delta.shape[0], a.hidden)


def _conv_hidden_gradient(a: Any, needs: Any, grad: Tensor) -> dict[str, Tensor | None]:
    found = torch.ops.implicit_steer.conv_hidden_backward(*_points(a), grad.contiguous(), a.isa)
    return dict(zip(("delta", "attr", "weights"), found, strict=True))


def _conv_hidden_backward_fake(a: Any) -> Any:
    return _wanted((a.delta, a.attr, a.weights), (True,) * 3)


def _conv_hidden_backward_gradient(
    a: Any, needs: Any, v_delta: Tensor, v_attr: Tensor, v_weights: Tensor
) -> dict[str, Tensor | None]:
    directions = (v.contiguous() for v in (v_weights, v_delta, v_attr))
    found = torch.ops.implicit_steer.conv_hidden_double_backward(*_points(a), a.grad_out, *directions, a.isa)
    return dict(zip(("grad_out", "delta", "attr", "weights"), found, strict=True))


def _conv_hidden_double_backward_fake(a: Any) -> Any:
    return _wanted((a.grad_out, a.delta, a.attr, a.weights), (True,) * 4)


# ---- parameters → packed weights, a linear map at given statistics


def _conv_pack_fake(a: Any) -> Any:
    return a.statistics.new_empty(a.pack_rowptr.shape[0] - 1)


def _save_pack(ctx: Any, a: Any, output: Any) -> None:
    *packing, parameters, statistics = a
    ctx.save_for_backward(*packing, statistics, *parameters)


def _conv_pack_gradient(ctx: Any, needs: Any, grad: Tensor) -> dict[str, list[Tensor]]:
    # asked for once: torch.utils.checkpoint insists
    plan_ints, plan_reals, pack_rowptr, pack_column, pack_value, statistics, *parameters = ctx.saved_tensors
    packing, n = (plan_ints, plan_reals, pack_rowptr, pack_column, pack_value), sum(t.numel() for t in parameters)
    flat = torch.ops.implicit_steer.conv_pack_backward(*packing, statistics, grad.contiguous(), n)
    return {"parameters": unflatten(flat, parameters)}


def _conv_pack_backward_fake(a: Any) -> Any:
    return a.grad_packed.new_empty(a.n_parameters)


def _conv_pack_backward_gradient(a: Any, needs: Any, v: Tensor) -> dict[str, Tensor | None]:
    return {"grad_packed": torch.ops.implicit_steer.conv_pack(*_packing(a), [v.contiguous()], a.statistics)}


# ---- a layer, and its table


def _conv_gradients_fake(a: Any) -> Any:
    of_parameters = [t.new_empty(t.shape) for t in a.parameters] if a.need_parameters else []
    of_inputs = _wanted((a.x, a.delta, a.attr), (a.need_x, a.need_delta, a.need_attr))
    return *of_inputs, a.expansion.new_empty(a.expansion.shape[1]), of_parameters


def _conv_statistics_fake(a: Any) -> Any:
    return a.delta.new_empty(a.n_layers, a.size), a.delta.new_empty(a.pack_rowptr.shape[0] - 1)


def _conv_moments_fake(a: Any) -> Any:
    return a.delta.new_empty(2, a.size)


def _table_sums_fake(a: Any) -> Any:
    return a.delta.new_empty(a.size, a.width)


def _table_sizes(a: Any) -> tuple[int, int]:
    """Knots of a table, and how many coefficients its splines of one row of attributes have."""
    knots, c = a.scale.shape
    return knots, (knots + a.left.shape[0] + 1 - a.series.shape[0]) * a.channels * c


def _table_splines_fake(a: Any) -> Any:
    knots, size = _table_sizes(a)
    return a.hidden.new_empty(a.hidden.shape[0] // knots * size)


def _table_splines_gradient(a: Any, needs: Any, grad: Tensor) -> dict[str, Tensor | None]:
    constants = a.coefficients, a.scale, a.left, a.series, a.channels
    of_hidden = torch.ops.implicit_steer.table_splines_backward(grad.contiguous(), *constants, a.hidden.shape[1])
    return {"hidden": of_hidden}


def _table_splines_backward_fake(a: Any) -> Any:
    knots, size = _table_sizes(a)
    return a.grad.new_empty(a.grad.shape[0] // size * knots, a.size)


def _table_splines_backward_gradient(a: Any, needs: Any, v: Tensor) -> dict[str, Tensor | None]:
    constants = a.coefficients, a.scale, a.left, a.series, a.channels
    return {"grad": torch.ops.implicit_steer.table_splines(v.contiguous(), *constants)}


def _same_values_fake(a: Any) -> Any:
    return a.copy.new_empty((), dtype=torch.bool)


_FAKES: dict[str, Callable[[Any], Any]] = {
    "conv_forward": _conv_forward_fake,
    "conv_backward": _conv_backward_fake,
    "conv_double_backward": _conv_double_backward_fake,
    "conv_hidden": _conv_hidden_fake,
    "conv_hidden_backward": _conv_hidden_backward_fake,
    "conv_hidden_double_backward": _conv_hidden_double_backward_fake,
    "conv_pack": _conv_pack_fake,
    "conv_pack_backward": _conv_pack_backward_fake,
    "conv_statistics": _conv_statistics_fake,
    "conv_moments": _conv_moments_fake,
    "conv_gradients": _conv_gradients_fake,
    "table_sums": _table_sums_fake,
    "table_splines": _table_splines_fake,
    "table_splines_backward": _table_splines_backward_fake,
    "same_values": _same_values_fake,
}
_GRADIENTS: dict[str, Callable[..., Any]] = {
    "conv_forward": _conv_forward_gradient,
    "conv_backward": _conv_backward_gradient,
    "conv_double_backward": _no_third_derivatives,
    "conv_hidden": _conv_hidden_gradient,
    "conv_hidden_backward": _conv_hidden_backward_gradient,
    "conv_hidden_double_backward": _no_third_derivatives,
    "conv_pack_backward": _conv_pack_backward_gradient,
    "table_splines": _table_splines_gradient,
    "table_splines_backward": _table_splines_backward_gradient,
}


def _differentiable(name: str, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """The operator as autograd sees it: what ``torch.library.register_autograd`` makes, at a quarter of its cost.

    No transform of torch.func is looking on by then, which :func:`~implicit_steer._transforms.recorder` asks for: the
    dispatcher has dealt with those before it calls a kernel for autograd.
    """
    operator, arguments_of = getattr(torch.ops.implicit_steer, name).default, by_name(name)
    n_tensors = sum(str(a.type) == "Tensor" for a in operator._schema.arguments)  # the first ones

    def call(arguments: Any, keys: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys, *arguments)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
            ctx.save_for_backward(*arguments[:n_tensors])
            ctx.numbers = arguments[n_tensors:]
            return call(arguments, keys)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            refuse_derivatives(*grads)
            given = arguments_of(*ctx.saved_tensors, *ctx.numbers)
            needs = arguments_of(*ctx.needs_input_grad[1:])
            if torch.is_grad_enabled():  # create_graph=True
                return None, *arguments_of(**gradient(given, needs, *grads))
            with torch._C._AutoDispatchBelowAutograd():
                return None, *arguments_of(**gradient(given, needs, *grads))

    apply = recorder(Operator)

    def kernel(keys: Any, *arguments: Any) -> Any:
        keys = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return apply(keys, *arguments)
        return call(arguments, keys)

    return kernel


def _register_pack() -> None:
    """``conv_pack`` takes a list of tensors, which torch.library alone differentiates."""
    save, gradient = differentiable("conv_pack", _conv_pack_gradient, _save_pack)
    torch.library.register_autograd(f"{_NAMESPACE}::conv_pack", gradient, setup_context=save)


if _native.available()[0]:
    _LIBRARY = torch.library.Library(_NAMESPACE, "IMPL")  # what it registers lives as long as it does
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{_NAMESPACE}::{name}", positional(name, fake))
        one_by_one(name)
    one_by_one("layer_backward")
    for name, gradient in _GRADIENTS.items():
        _LIBRARY.impl(name, _differentiable(name, gradient), "Autograd", with_keyset=True)
    _register_pack()
