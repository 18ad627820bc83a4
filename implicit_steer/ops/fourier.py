"""Fourier activations y = A⁻ φ(A x) of fields: native on CPU tensors, otherwise plain PyTorch.

The native operators keep no samples in memory: the backward pass evaluates A x again. The fake kernels of the operators
and their derivatives, to any order, are here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import is_native
from .._transforms import is_transformed, one_by_one, recorder, refuse_derivatives
from ..plan import FUNCTIONS
from ..plan.activations import phi, phi_prime, phi_second
from ..plan.packing import is_traced
from .autocast import without_autocast
from .native.instruction_set import instruction_set


def fourier(function: str, x: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    """y = A⁻ φ(A x) of every field.

    Args:
        function: φ, one of ``FUNCTIONS``.
        x: (N, C · d, ...), floating point: C fields of d coefficients at every point of any trailing dimensions.
        samples, inverse_t: A and the transposed A⁻, (S, d) each, contiguous, of x's dtype and device; constants.

    Returns:
        y, in the shape of x.
    """
    if not is_native(x) or is_transformed():
        return _plain(function, x, samples, inverse_t)
    arguments = x.contiguous(), samples, inverse_t, FUNCTIONS.index(function), instruction_set()
    if torch.compiler.is_compiling():
        return torch.ops.implicit_steer.fourier_forward(*arguments)
    apply: Callable[..., Tensor] = _Fourier.apply if is_traced() else _recorded
    return apply(*arguments)


def _fields(x: Tensor, d: int) -> Tensor:
    """(N, C · d, ...) → (N, C, ..., d)."""
    n, width, *rest = x.shape
    return x.view(n, width // d, d, *rest).movedim(2, -1)  # unflatten fails in batched gradients


def _through(x: Tensor, into: Tensor, change: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
    """``out``ᵀ change(``into`` x) of every field; into, out (S, d); ``change`` keeps the shape (N, C, ..., S)."""
    y = change(_fields(x, into.shape[1]) @ into.T) @ out
    return y.movedim(-1, 2).reshape(x.shape)


def _plain(function: str, x: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    return _through(x, samples, lambda u: phi(function, u), inverse_t)


def _differential(function: str, x: Tensor, v: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    """A⁻ (φ′(A x) · A v): the derivative of y along v."""
    slopes = phi_prime(function, _fields(x, samples.shape[1]) @ samples.T)
    return _through(v, samples, lambda u: slopes * u, inverse_t)


# ---- the operators: fake kernels and derivatives

_IGNORED = (None,) * 4  # samples, inverse_t, number of φ, instruction set


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, number, ctx.isa = inputs
    ctx.function = FUNCTIONS[number]
    ctx.save_for_backward(*tensors)


def _forward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _by_operator(ctx, grad.contiguous(), *ctx.saved_tensors)


def _by_operator(ctx: Any, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.implicit_steer.fourier_backward(*tensors, FUNCTIONS.index(ctx.function), ctx.isa)
    return grad_x, *_IGNORED


def _backward_gradient(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients in grad and x of ⟨v, grad_x⟩, grad_x = Aᵀ (φ′(A x) · A⁻ᵀ grad)."""
    grad, x, samples, inverse_t = ctx.saved_tensors
    d = samples.shape[1]
    with without_autocast(x):
        bends = phi_second(ctx.function, _fields(x, d) @ samples.T) * (_fields(grad, d) @ inverse_t.T)
        d_x = _through(v, samples, lambda u: bends * u, samples)
        return _differential(ctx.function, x, v, samples, inverse_t), d_x, *_IGNORED


class _Fourier(torch.autograd.Function):
    """The operator with less overhead outside of compiled programs, and with forward-mode derivatives."""

    @staticmethod
    def forward(x: Tensor, samples: Tensor, inverse_t: Tensor, number: int, isa: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.implicit_steer.fourier_forward(x, samples, inverse_t, number, isa)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = grad.contiguous(), *ctx.saved_tensors  # read once: torch.utils.checkpoint requires it
        refuse_derivatives(*tensors)
        if torch.is_grad_enabled():  # create_graph=True
            return _by_operator(ctx, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return _by_operator(ctx, *tensors)

    @staticmethod
    def jvp(ctx: Any, v: Tensor, *_: Any) -> Tensor:
        x, samples, inverse_t = ctx.saved_tensors
        return _differential(ctx.function, x, v, samples, inverse_t)


_recorded = recorder(_Fourier)


def _forward_fake(x: Tensor, samples: Tensor, inverse_t: Tensor, function: int, isa: int) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(grad: Tensor, x: Tensor, samples: Tensor, inverse_t: Tensor, function: int, isa: int) -> Tensor:
    return torch.empty_like(x)


if _native.available()[0]:
    for name, fake, gradient in [
        ("fourier_forward", _forward_fake, _forward_gradient),
        ("fourier_backward", _backward_fake, _backward_gradient),
    ]:
        torch.library.register_fake(f"implicit_steer::{name}")(fake)
        one_by_one(name)
        torch.library.register_autograd(f"implicit_steer::{name}", gradient, setup_context=_save)
