"""Fourier activations y = A⁻ φ(A x) of fields: native on CPU tensors, otherwise plain PyTorch.

The native operators keep no samples in memory: the backward pass evaluates A x again. Gradients that are to be
differentiated again come from plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .backends.cpu import instruction_set
from .functions import phi, phi_prime
from .packing import is_traced
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
    if x.is_cpu and x.dtype in (torch.float32, torch.float64) and native.available()[0]:
        number, isa = FUNCTIONS.index(function), instruction_set()
        return (_Fourier.apply if is_traced() else _apply)(x.contiguous(), samples, inverse_t, number, isa)
    return _plain(function, x, samples, inverse_t)


def _plain(function: str, x: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    y = phi(function, _fields(x, samples) @ samples.T) @ inverse_t
    return y.movedim(-1, 2).reshape(x.shape)


def _plain_backward(function: str, grad: Tensor, x: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    slopes = phi_prime(function, _fields(x, samples) @ samples.T)
    grad_x = (slopes * (_fields(grad, samples) @ inverse_t.T)) @ samples
    return grad_x.movedim(-1, 2).reshape(x.shape)


def _fields(x: Tensor, samples: Tensor) -> Tensor:
    """(N, C · d, ...) → (N, C, ..., d)."""
    return x.unflatten(1, (-1, samples.shape[1])).movedim(2, -1)


class _Fourier(torch.autograd.Function):
    generate_vmap_rule = True  # for the transforms of torch.func

    @staticmethod
    def forward(x: Tensor, samples: Tensor, inverse_t: Tensor, number: int, isa: int) -> Tensor:
        return torch.ops.implicit_steer.fourier_forward(x, samples, inverse_t, number, isa)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.number, ctx.isa = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            grad_x = _plain_backward(FUNCTIONS[ctx.number], grad, *ctx.saved_tensors)
        else:
            tensors = (grad.contiguous(), *ctx.saved_tensors)
            grad_x = torch.ops.implicit_steer.fourier_backward(*tensors, ctx.number, ctx.isa)
        return grad_x, None, None, None, None


_apply = super(torch.autograd.Function, _Fourier).apply  # without the detour for torch.func
