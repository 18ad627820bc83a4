"""Fourier activations y = A⁻ φ(A x) of fields: native on CPU tensors, otherwise plain PyTorch.

The native operators keep no samples in memory: the backward pass evaluates A x again. Their derivatives, to any order,
are here too; those of the backward pass and in forward mode are plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from ._autocast import own_precision
from .backends.cpu import instruction_set
from .functions import phi, phi_prime, phi_second
from .packing import is_transformed
from .plan import FUNCTIONS


def fourier(function: str, x: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    """y = A⁻ φ(A x) of every field.

    Args:
        function: φ, one of ``FUNCTIONS``.
        x: (N, C · d, ...), floating point: C fields of d coefficients at every point of any trailing dimensions.
        samples, inverse_t: A and the transposed A⁻, (S, d) each, contiguous, of x's dtype and device; constants.

    Returns:
        y, in the shape of x.
    """
    if not has_kernel(x) or is_transformed():
        return _plain(function, x, samples, inverse_t)
    operator = torch.ops.implicit_steer.fourier_forward if torch.compiler.is_compiling() else _apply
    return operator(x.contiguous(), samples, inverse_t, FUNCTIONS.index(function), instruction_set())


def has_kernel(x: Tensor) -> bool:
    """Whether the native operators take it."""
    return x.is_cpu and x.dtype in (torch.float32, torch.float64) and native.available()[0]


def _fields(x: Tensor, d: int) -> Tensor:
    """(N, C · d, ...) → (N, C, ..., d)."""
    return x.unflatten(1, (-1, d)).movedim(2, -1)


def _through(x: Tensor, into: Tensor, change, out: Tensor) -> Tensor:
    """``out``ᵀ change(``into`` x) of every field; into, out (S, d); ``change`` keeps the shape (N, C, ..., S)."""
    y = change(_fields(x, into.shape[1]) @ into.T) @ out
    return y.movedim(-1, 2).reshape(x.shape)


def _plain(function: str, x: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    return _through(x, samples, lambda u: phi(function, u), inverse_t)


def _differential(function: str, x: Tensor, v: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    """A⁻ (φ′(A x) · A v): the derivative of y along v."""
    slopes = phi_prime(function, _fields(x, samples.shape[1]) @ samples.T)
    return _through(v, samples, lambda u: slopes * u, inverse_t)


# ---- derivatives of the operators

_IGNORED = (None,) * 4  # samples, inverse_t, number of φ, instruction set


def _save(ctx, inputs, output) -> None:
    *tensors, number, ctx.isa = inputs
    ctx.function = FUNCTIONS[number]
    ctx.save_for_backward(*tensors)


def _forward_gradient(ctx, grad: Tensor):
    tensors = grad.contiguous(), *ctx.saved_tensors
    grad_x = torch.ops.implicit_steer.fourier_backward(*tensors, FUNCTIONS.index(ctx.function), ctx.isa)
    return grad_x, *_IGNORED


def _backward_gradient(ctx, v: Tensor):
    """Of grad_x = Aᵀ (φ′(A x) · A⁻ᵀ grad) by grad and x, along v."""
    grad, x, samples, inverse_t = ctx.saved_tensors
    return *_second_order(ctx.function, x, v, grad, samples, inverse_t), *_IGNORED


@own_precision
def _second_order(function: str, x: Tensor, v: Tensor, grad: Tensor, samples: Tensor, inverse_t: Tensor):
    d = samples.shape[1]
    bends = phi_second(function, _fields(x, d) @ samples.T) * (_fields(grad, d) @ inverse_t.T)
    d_x = _through(v, samples, lambda u: bends * u, samples)
    return _differential(function, x, v, samples, inverse_t), d_x


class _Fourier(torch.autograd.Function):
    """The operator with less overhead outside of compiled programs, and with forward-mode derivatives."""

    @staticmethod
    def forward(x: Tensor, samples: Tensor, inverse_t: Tensor, number: int, isa: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.implicit_steer.fourier_forward(x, samples, inverse_t, number, isa)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return _forward_gradient(ctx, grad)
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_gradient(ctx, grad)

    @staticmethod
    def jvp(ctx, v: Tensor, *_) -> Tensor:
        x, samples, inverse_t = ctx.saved_tensors
        return _differential(ctx.function, x, v, samples, inverse_t)


_apply = super(torch.autograd.Function, _Fourier).apply  # without the detour for torch.func

if native.available()[0]:
    for name, gradient in (("fourier_forward", _forward_gradient), ("fourier_backward", _backward_gradient)):
        torch.library.register_autograd(f"implicit_steer::{name}", gradient, setup_context=_save)
