"""Transforms that a backend of opaque operators cannot be part of: refused, where they would give derivatives of 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._check import fail
from ..packing import is_transformed


def refuse(backend: str, *tensors: Sequence[Tensor]) -> None:
    """Raise ``RuntimeError`` where torch.func looks on inside torch.compile, and where one of ``tensors`` has a
    tangent of forward-mode differentiation."""
    if torch.compiler.is_compiling():
        if is_transformed():
            expected = "one that torch.func can transform inside torch.compile"
            remedy = "Use torch.func outside of compiled functions, or backend='reference'."
            fail("backend", expected, repr(backend), remedy, RuntimeError)
    elif forward_ad._current_level >= 0 and not is_transformed() and _has_tangent(tensors):
        remedy = "Use torch.autograd.grad, or backend='reference'."
        fail("backend", "one with forward-mode derivatives", repr(backend), remedy, RuntimeError)


def _has_tangent(tensors: Sequence[Sequence[Tensor]]) -> bool:
    return any(forward_ad.unpack_dual(t).tangent is not None for group in tensors for t in group)
