"""Fourier activations y = A⁻ φ(A x) of fields: native on CPU tensors, otherwise plain PyTorch.

The native operators keep no samples in memory: the backward pass evaluates A x again. They have first derivatives;
gradients that are to be differentiated again come from plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .backends.cpu import instruction_set
from .functions import phi
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
        return torch.ops.implicit_steer.fourier_forward(x.contiguous(), samples, inverse_t, number, isa)
    return _plain(function, x, samples, inverse_t)


def _plain(function: str, x: Tensor, samples: Tensor, inverse_t: Tensor) -> Tensor:
    fields = x.unflatten(1, (-1, samples.shape[1])).movedim(2, -1)
    y = phi(function, fields @ samples.T) @ inverse_t
    return y.movedim(-1, 2).reshape(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, samples, inverse_t, ctx.number, ctx.isa = inputs
    ctx.save_for_backward(x, samples, inverse_t)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *matrices = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        y = _plain(FUNCTIONS[ctx.number], x, *matrices)
        (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
    else:
        grad_x = torch.ops.implicit_steer.fourier_backward(grad.contiguous(), x, *matrices, ctx.number, ctx.isa)
    return grad_x, None, None, None, None


if native.available()[0]:
    torch.library.register_autograd("implicit_steer::fourier_forward", _backward, setup_context=_setup_context)
