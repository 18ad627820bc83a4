"""The poolings of escnn's that torch does not have, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .._check import require
from ..plan.packing import Constants
from .fields import Fields, check_features

_CONVOLUTIONS = {2: F.conv2d, 3: F.conv3d}


class Blur(torch.nn.Module):
    """y(p) = Σ_t w(t) x(stride · p + t) of every channel, without escnn: (B, C, X_1, …) → (B, C, Y_1, …).

    Args:
        in_type: size and name of the features.
        kernel_size: points of w along each of 2 or 3 axes.
        stride, padding: one for each axis; beyond the border x is 0.

    Buffer: filter (C, 1, *kernel_size), w of every channel.
    """

    def __init__(
        self, in_type: Fields, kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> None:
        super().__init__()
        require(len(kernel_size) in _CONVOLUTIONS, "kernel_size", "2 or 3 sizes", kernel_size)
        self.in_type = self.out_type = in_type
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.filter: Tensor
        self.register_buffer("filter", torch.zeros(in_type.size, 1, *kernel_size))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in ("in_type", "kernel_size", "stride", "padding")}

    def forward(self, x: Tensor) -> Tensor:
        """Blur x."""
        check_features(x, self.in_type.size)
        convolve = _CONVOLUTIONS[len(self.kernel_size)]
        return convolve(x, self.filter, stride=self.stride, padding=self.padding, groups=self.in_type.size)

    def extra_repr(self) -> str:
        """What distinguishes this pooling."""
        return f"{self.in_type}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class _ByField(torch.nn.Module):
    """A pooling that treats all fields of one kind together.

    ``field`` (C,): the index of every channel's field; ``parts`` (fields,): the size of every field's subfields.
    """

    def __init__(self, in_type: Fields, field: NDArray[Any], parts: NDArray[Any]) -> None:
        super().__init__()
        right = field.shape == (in_type.size,) and field.dtype.kind == "i"
        right = right and bool(np.isin(np.diff(field, prepend=-1), (0, 1)).all()) and field[:1].tolist() in ([], [0])
        require(right, "field", f"the fields 0, 1, … of {in_type.size} channels, in order", field)
        sizes = np.bincount(field)
        self.in_type, self.field = in_type, field
        kinds = list(zip(sizes.tolist(), parts.tolist(), strict=True))
        require(all(part > 0 and size % part == 0 for size, part in kinds), "parts", "divisors of the sizes", kinds)
        starts, self._groups, channels, fields = np.cumsum(sizes) - sizes, [], [], []
        for kind in dict.fromkeys(kinds):
            members = [n for n, other in enumerate(kinds) if other == kind]
            self._groups.append((*kind, len(members)))
            channels.append((starts[members][:, None] + np.arange(kind[0])).reshape(-1))
            fields += members
        # Channels sorted by kind, and where each field, and each channel, is in this order.
        by_kind = np.concatenate([*channels, np.zeros(0, dtype=np.int64)])
        self._index = Constants(by_kind, np.argsort(fields), np.argsort(by_kind))

    def _pooled(self, x: Tensor, pool: Callable[[Tensor, int], Tensor], per_field: bool) -> Tensor:
        """``pool``: fields of one kind (B, fields, size, …) and the size of their subfields → (B, n, …)."""
        check_features(x, self.in_type.size)
        channels, fields, back = self._index.like(x)
        by_kind = x[:, channels].split([size * count for size, _, count in self._groups], 1)
        done = [
            pool(x_kind.unflatten(1, (count, size)), part)
            for x_kind, (size, part, count) in zip(by_kind, self._groups, strict=True)
        ]
        return torch.cat(done, 1)[:, fields if per_field else back]


class FieldPool(_ByField):
    """The largest component of every field or, with ``norm``, the largest norm of its subfields, without escnn:
    (B, C, …) → (B, fields, …).

    Args:
        in_type, out_type: sizes and names of the features.
        field: (C,) the index of every channel's field.
        parts: (fields,) the size of every field's subfields.
        norm: whether norms are taken.
    """

    def __init__(self, in_type: Fields, out_type: Fields, field: NDArray[Any], parts: NDArray[Any], norm: bool) -> None:
        super().__init__(in_type, field, parts)
        require(len(parts) == out_type.size, "out_type", f"size {len(parts)}", out_type.size)
        self.out_type, self.parts, self.norm = out_type, parts, norm

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in ("in_type", "out_type", "field", "parts", "norm")}

    def forward(self, x: Tensor) -> Tensor:
        """Pool every field."""

        def pool(fields: Tensor, part: int) -> Tensor:
            return (fields.unflatten(2, (-1, part)).norm(dim=3) if self.norm else fields).max(2).values

        return self._pooled(x, pool, per_field=True)

    def extra_repr(self) -> str:
        """What distinguishes this pooling."""
        return f"{self.in_type} -> {self.out_type}, norm={self.norm}"


class NormMaxPool(_ByField):
    """Every field where its norm is largest in a window, without escnn: (B, C, X, Y) → (B, C, X', Y').

    Args:
        in_type: size and name of the features.
        field: (C,) the index of every channel's field.
        kernel_size, stride, padding, dilation, ceil_mode: the windows, as in ``torch.nn.MaxPool2d``.
    """

    def __init__(
        self,
        in_type: Fields,
        field: NDArray[Any],
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> None:
        super().__init__(in_type, field, np.ones(len(np.unique(field)), dtype=np.int64))
        self.out_type = in_type
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("in_type", "field", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        """Pool every field."""
        windows = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode

        def pool(fields: Tensor, part: int) -> Tensor:
            norms = fields.square().sum(2).sqrt()
            place: Tensor
            _, place = F.max_pool2d(norms, *windows, return_indices=True)
            index = place.flatten(2)[:, :, None].expand(-1, -1, fields.shape[2], -1)
            return fields.flatten(3).gather(3, index).flatten(1, 2).unflatten(2, place.shape[2:])

        return self._pooled(x, pool, per_field=False)

    def extra_repr(self) -> str:
        """What distinguishes this pooling."""
        return f"{self.in_type}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
