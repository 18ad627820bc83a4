"""The native operators of ``csrc/bindings/conv_ops.cpp`` for torch: their shapes (fake kernels) and derivatives to second order.

Everything differentiable is packed weights, features x, edge_delta and attributes. The derivative of a gradient is the
product of a Hessian with a vector, which the native code takes as the backward pass's derivative along that direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ... import _native
from ..._transforms import one_by_one, refuse_derivatives

_NAMESPACE = "implicit_steer"


def _no_third_derivatives(ctx, *_) -> NoReturn:
    raise RuntimeError(
        "backend: expected one with third derivatives, got 'cpu' or 'cuda', which have first and second ones. "
        "Use backend='eager'."
    )


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vector in pieces of these tensors' shapes, views of it."""
    return [piece.view(t.shape) for piece, t in zip(flat.split([t.numel() for t in like]), like, strict=True)]


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


# ---- conv_forward(plan_ints, plan_reals, weights, x, delta, attr, src, order, rowptr, expansion, bias, mean, out_size,
# isa)


def _conv_forward_fake(ints, reals, weights, x, delta, attr, src, order, rowptr, *rest):
    return x.new_empty(rowptr.shape[0] - 1, rest[-2])


def _conv_forward_gradient(ctx, grad):
    ints, reals, weights, x, delta, attr, src, order, rowptr, expansion, _ = ctx.saved_tensors
    mean, _, isa = ctx.numbers
    of_weights, *of_inputs = ctx.needs_input_grad[3:7]
    needs = (*of_inputs, of_weights)
    of_sums = of_sums_backward(rowptr, mean, grad).contiguous()
    of_bias = of_bias_backward(expansion, grad) if ctx.needs_input_grad[11] else None
    by_source = _by_source(src, x.shape[0], needs[0], order, rowptr)
    tensors = ints, reals, weights, x, delta, attr, src, order, rowptr, of_sums, *by_source
    found = torch.ops.implicit_steer.conv_backward.default(*tensors, *needs, isa)
    *found, d_weights = _masked(found, needs)
    return None, None, d_weights, *found, *[None] * 4, of_bias, *[None] * 3


def of_sums_backward(rowptr: Tensor, mean: bool, grad: Tensor) -> Tensor:
    """The gradient of the sums over each node's edges from that of the output."""
    return grad / rowptr.diff().clamp(min=1).to(grad.dtype)[:, None] if mean else grad


def of_bias_backward(expansion: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the bias from that of the output."""
    return torch.mv(expansion.T, grad.sum(0))


# ---- conv_backward(…, grad_out, order_by_source, colptr, need_x, need_delta, need_attr, need_weights, isa)


def _conv_backward_fake(ints, reals, weights, x, delta, attr, src, order, rowptr, grad, by_source, colptr, *rest):
    return _wanted((x, delta, attr, weights), rest[:4])


def _conv_backward_gradient(ctx, *cotangents):
    ints, reals, weights, x, delta, attr, src, order, rowptr, grad, _, _ = ctx.saved_tensors
    *given, isa = ctx.numbers
    v_x, v_delta, v_attr, v_weights = _directions(cotangents, (x, delta, attr, weights), given)
    of_weights, *of_inputs = ctx.needs_input_grad[3:7]
    needs = (ctx.needs_input_grad[10], *of_inputs, of_weights)
    by_source = _by_source(src, x.shape[0], needs[1], order, rowptr)
    tensors = ints, reals, weights, x, delta, attr, src, order, rowptr, grad, *by_source
    found = torch.ops.implicit_steer.conv_double_backward(*tensors, v_weights, v_x, v_delta, v_attr, *needs, isa)
    d_grad, *of_inputs, d_weights = _masked(found, needs)
    return None, None, d_weights, *of_inputs, None, None, None, d_grad, *[None] * 7


def _conv_double_backward_fake(
    ints, reals, weights, x, delta, attr, src, order, rowptr, grad, by_source, colptr, *rest
):
    return _wanted((grad, x, delta, attr, weights), rest[4:9])


# ---- conv_hidden(plan_ints, plan_reals, weights, delta, attr, hidden, isa) and its gradients


def _conv_hidden_fake(ints, reals, weights, delta, attr, hidden, isa):
    return delta.new_empty(delta.shape[0], hidden)


def _conv_hidden_gradient(ctx, grad):
    found = torch.ops.implicit_steer.conv_hidden_backward(*ctx.saved_tensors, grad.contiguous(), ctx.numbers[-1])
    d_delta, d_attr, d_weights = found
    return None, None, d_weights, d_delta, d_attr, None, None


def _conv_hidden_backward_fake(ints, reals, weights, delta, attr, grad, isa):
    return _wanted((delta, attr, weights), (True,) * 3)


def _conv_hidden_backward_gradient(ctx, v_delta, v_attr, v_weights):
    directions = (v.contiguous() for v in (v_weights, v_delta, v_attr))
    found = torch.ops.implicit_steer.conv_hidden_double_backward(*ctx.saved_tensors, *directions, *ctx.numbers)
    d_grad, d_delta, d_attr, d_weights = found
    return None, None, d_weights, d_delta, d_attr, d_grad, None


def _conv_hidden_double_backward_fake(ints, reals, weights, delta, attr, grad, *rest):
    return _wanted((grad, delta, attr, weights), (True,) * 4)


# ---- parameters → packed weights, a linear map at given statistics


def _conv_pack_fake(ints, reals, rowptr, column, value, parameters, statistics):
    return statistics.new_empty(rowptr.shape[0] - 1)


def _save_pack(ctx, inputs, output) -> None:
    *arrays, parameters, statistics = inputs
    ctx.save_for_backward(*arrays, statistics, *parameters)


def _conv_pack_gradient(ctx, grad):
    ints, reals, rowptr, column, value, statistics, *parameters = ctx.saved_tensors
    arrays = ints, reals, rowptr, column, value
    n = sum(t.numel() for t in parameters)
    flat = torch.ops.implicit_steer.conv_pack_backward(*arrays, statistics, grad.contiguous(), n)
    return *[None] * 5, unflatten(flat, parameters), None


def _conv_pack_backward_fake(ints, reals, rowptr, column, value, statistics, grad_packed, n_parameters):
    return grad_packed.new_empty(n_parameters)


def _conv_pack_backward_gradient(ctx, v):
    *arrays, statistics, _ = ctx.saved_tensors
    return *[None] * 6, torch.ops.implicit_steer.conv_pack(*arrays, [v.contiguous()], statistics), None


def _conv_gradients_fake(*arguments):
    parameters, (x, delta, attr), expansion, (*needs, need_parameters, _) = (
        arguments[5],
        arguments[8:11],
        arguments[17],
        arguments[19:],
    )
    of_parameters = [t.new_empty(t.shape) for t in parameters] if need_parameters else []
    return *_wanted((x, delta, attr), needs), expansion.new_empty(expansion.shape[1]), of_parameters


def _conv_statistics_fake(ints, reals, rowptr, column, value, parameters, delta, attr, n_layers, size, isa):
    return delta.new_empty(n_layers, size), delta.new_empty(rowptr.shape[0] - 1)


def _conv_moments_fake(ints, reals, weights, delta, attr, layer, size, isa):
    return delta.new_empty(2, size)


def _same_values_fake(tensors, copy):
    return copy.new_empty((), dtype=torch.bool)


_FAKES = {
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
    "same_values": _same_values_fake,
}
_GRADIENTS = {
    "conv_forward": _conv_forward_gradient,
    "conv_backward": _conv_backward_gradient,
    "conv_double_backward": _no_third_derivatives,
    "conv_hidden": _conv_hidden_gradient,
    "conv_hidden_backward": _conv_hidden_backward_gradient,
    "conv_hidden_double_backward": _no_third_derivatives,
    "conv_pack_backward": _conv_pack_backward_gradient,
}


def _differentiable(name: str, gradient: Callable):
    """The operator as autograd sees it: what ``torch.library.register_autograd`` makes, at a quarter of its cost.

    ``gradient(ctx, *grads)`` finds the operator's tensors in ``ctx.saved_tensors``, its other arguments in
    ``ctx.numbers``.
    """
    operator = getattr(torch.ops.implicit_steer, name).default
    n_tensors = sum(str(a.type) == "Tensor" for a in operator._schema.arguments)  # the first ones

    def call(arguments, keys):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys, *arguments)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keys, *arguments):
            ctx.save_for_backward(*arguments[:n_tensors])
            ctx.numbers = arguments[n_tensors:]
            return call(arguments, keys)

        @staticmethod
        def backward(ctx, *grads):
            refuse_derivatives(*grads)
            if torch.is_grad_enabled():  # create_graph=True
                return None, *gradient(ctx, *grads)
            with torch._C._AutoDispatchBelowAutograd():
                return None, *gradient(ctx, *grads)

    apply = super(
        torch.autograd.Function, Operator
    ).apply  # without the detour for torch.func: that has been dealt with

    def kernel(keys, *arguments):
        keys = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return apply(keys, *arguments)
        return call(arguments, keys)

    return kernel


if _native.available()[0]:
    _LIBRARY = torch.library.Library(_NAMESPACE, "IMPL")  # what it registers lives as long as it does
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{_NAMESPACE}::{name}")(fake)
        one_by_one(name)
    for name, gradient in _GRADIENTS.items():
        _LIBRARY.impl(name, _differentiable(name, gradient), "Autograd", with_keyset=True)
    # this one takes a list of tensors
    torch.library.register_autograd(f"{_NAMESPACE}::conv_pack", _conv_pack_gradient, setup_context=_save_pack)
