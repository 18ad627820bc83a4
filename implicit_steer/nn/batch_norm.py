"""Batch norm of node features: escnn's module in few tensor operations on all channels together."""

from __future__ import annotations

import escnn.nn
import torch
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import fail, require


class IIDBatchNorm1d(escnn.nn.IIDBatchNorm1d):
    """y = w · (x − mean) / sqrt(var + eps) + b of every field: escnn's ``IIDBatchNorm1d``, to rounding.

    Per field, mean (d,) is the part of the mean over all points that lies in trivial irreps, b (d,) lies there too, var
    is the unbiased variance averaged over the d coordinates, w a number. As in escnn, no gradient flows through the
    statistics. Arguments, parameters, buffers and running statistics are escnn's.

    Shape: x and y (N, C, ...) as GeometricTensor of ``in_type == out_type``.

    Raises ``TypeError`` for input that is no GeometricTensor of ``in_type``, ``ValueError`` for statistics of
    fewer than 2 points.
    """

    def __init__(self, in_type: FieldType, *args, **options):
        super().__init__(in_type, *args, **options)
        channels = [getattr(self, f"{self._escape_name(name)}_indices") for name, _ in self._sizes]
        channels = torch.cat([torch.arange(*c) if isinstance(c, list) else c for c in channels])
        # channels sorted by kind of field, and back; None where they are
        mixed = len(self._sizes) > 1
        self.register_buffer("_by_kind", channels if mixed else None, persistent=False)
        self.register_buffer("_in_place", channels.argsort() if mixed else None, persistent=False)

    def forward(self, x: GeometricTensor) -> GeometricTensor:
        """Normalise with the batch's statistics in training mode, which also move the running ones, else with those."""
        if not isinstance(x, GeometricTensor) or x.type != self.in_type:
            fail("x", f"a GeometricTensor of {self.in_type}", getattr(x, "type", type(x)), kind=TypeError)
        tensor = x.tensor.to(torch.promote_types(x.tensor.dtype, self._get_running_stats(self._sizes[0][0])[1].dtype))
        if self.training or not self.track_running_stats:
            statistics = self._batch_statistics(tensor)
        else:
            statistics = [self._get_running_stats(name) for name, _ in self._sizes]
        if self.training:
            self._update_running(statistics)
        kinds = [self._affine(name, size, *s) for (name, size), s in zip(self._sizes, statistics, strict=True)]
        mean, scale, shift = (_on_channels(self._joined(parts), tensor) for parts in zip(*kinds, strict=True))
        y = torch.addcmul(shift, tensor - mean, scale)
        return GeometricTensor(y.to(x.tensor.dtype), self.out_type, x.coords)

    @torch.no_grad()
    def _batch_statistics(self, x: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """Per kind of field: mean (fields, d), or None without trivial irreps, and variance (fields, 1)."""
        points, count = (0, *range(2, x.dim())), x.numel() // self.in_type.size
        require(count > 1, "x", "at least 2 points in training mode", count, "Call .eval(), or use larger batches.")
        mean = x.mean(points)
        squares = (x - _on_channels(mean, x)).square_().sum(points)
        if self._by_kind is not None:
            mean, squares = mean[self._by_kind], squares[self._by_kind]
        lengths = [self._nfields[name] * size for name, size in self._sizes]
        statistics = []
        for (name, size), m, s in zip(self._sizes, mean.split(lengths), squares.split(lengths), strict=True):
            trivial = m.view(-1, size) @ self._of(name, "avg").T if self._has_trivial[name] else None
            statistics.append((trivial, s.view(-1, size).mean(1, keepdim=True) / (count - 1)))
        return statistics

    @torch.no_grad()
    def _update_running(self, statistics: list[tuple[Tensor | None, Tensor]]) -> None:
        self.num_batches_tracked += 1
        if not self.track_running_stats:
            return
        factor = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        for (name, _), batch in zip(self._sizes, statistics, strict=True):
            for running, value in zip(self._get_running_stats(name), batch, strict=True):
                if value is not None:
                    running.lerp_(value, factor)

    def _affine(self, name: str, size: int, mean: Tensor | None, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mean, scale and shift of a kind's channels, (fields, d) each."""
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = self._of(name, "weight") * scale
        if self.affine and self._has_trivial[name]:
            shift = self._of(name, "bias") @ self._of(name, "change_of_basis").T
        else:
            shift = torch.zeros_like(scale).expand(-1, size)
        if mean is None:
            mean = torch.zeros_like(scale).expand(-1, size)
        return mean, scale.expand(-1, size), shift

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """(C,) from the kinds' (fields, d), in the order of the channels."""
        if self._in_place is None:
            return parts[0].reshape(-1)
        return torch.cat([part.reshape(-1) for part in parts])[self._in_place]

    def _of(self, name: str, what: str) -> Tensor:
        return getattr(self, f"{self._escape_name(name)}_{what}")


def _on_channels(values: Tensor, x: Tensor) -> Tensor:
    """values (C,), in a shape that broadcasts to the channels of x (N, C, ...)."""
    return values.view(-1, *(1,) * (x.dim() - 2)) if x.dim() > 2 else values
