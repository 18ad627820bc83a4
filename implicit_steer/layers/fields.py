"""Features with and without escnn's types, and what a module asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._check import fail, require, require_integer
from ..plan import FrozenArrays
from ..plan.irreps import Irreps

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Fields(FrozenArrays):
    """What is left of a field type without escnn: its size, and its name for people to read.

    Called like a field type, on a tensor (N, size, ...) and, if need be, coordinates, it returns the tensor: code that
    wraps its features as ``module.in_type(features, positions)`` runs with a loaded module too.

    Example:
        >>> Fields(4, "one scalar, one vector")(torch.zeros(10, 4)).shape
        torch.Size([10, 4])
    """

    size: int
    name: str = ""

    def validate(self) -> None:
        require_integer("size", self.size, 0)

    def __call__(self, tensor: Tensor, coords: Tensor | None = None) -> Tensor:
        shape = tuple(getattr(tensor, "shape", ()))
        require(len(shape) > 1 and shape[1] == self.size, "tensor", f"shape (*, {self.size}, ...)", shape)
        return tensor

    def __str__(self) -> str:
        return self.name or f"{self.size} channels"


def fields_of(irreps: Irreps) -> Fields:
    """The size and the name of features that consist of irreps."""
    return Fields(irreps.size, str(irreps))


def values(x: Any) -> Tensor:
    """The values of features: a tensor itself, or what a GeometricTensor holds."""
    return x if isinstance(x, Tensor) else x.tensor


def with_values(x: Any, tensor: Tensor) -> Any:
    """Features like ``x`` (a GeometricTensor of its type and coordinates, or a plain tensor) with other values."""
    return tensor if isinstance(x, Tensor) else type(x)(tensor, x.type, x.coords)


def check_tensor(
    name: str, value: Any, shape: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless ``value`` is a tensor of ``shape`` (None: any), on ``device``, as :func:`check_dtype` asks."""
    if not isinstance(value, Tensor):
        fail(name, "a torch.Tensor", type(value).__name__, kind=TypeError)
    sizes = value.shape
    right = len(sizes) == len(shape)
    for expected, size in zip(shape, sizes, strict=False):
        right = right and (expected is None or expected == size)
    if not right:
        fail(name, f"shape ({', '.join('*' if s is None else str(s) for s in shape)})", tuple(sizes))
    check_dtype(name, value, dtype)
    if value.device != device:
        fail(name, f"device {device}", value.device, "Move it with .to().")


def check_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise unless a layer with parameters of ``dtype`` takes ``value``, whose dtype has to be a 16-bit float or
    ``dtype``; for parameters of 16 bits, whose arithmetic is in float32, also float32."""
    wide = torch.float32 if dtype in _HALVES else dtype
    if value.dtype != wide and value.dtype not in _HALVES:
        remedy = "Convert the input, or the layer with .float() / .double()."
        fail(name, f"dtype {wide} or a 16-bit float", value.dtype, remedy, TypeError)


def check_features(x: Any, size: int) -> None:
    """Raise unless ``x`` is a floating point tensor (N, size, ...)."""
    expected = f"a floating point tensor of shape (*, {size}, ...)"
    ok = isinstance(x, Tensor) and x.is_floating_point()
    require(ok, "x", expected, getattr(x, "dtype", type(x).__name__), kind=TypeError)
    require(x.dim() > 1 and x.shape[1] == size, "x", expected, tuple(x.shape))
