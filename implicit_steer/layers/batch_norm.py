"""Batch norm of node features on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _native
from .._check import require
from .._transforms import recorder, refuse_derivatives
from ..ops.autocast import without_autocast
from ..plan.moments import Pool, moments, move_towards
from ..plan.packing import cached, is_traced
from ._modules import NoTorchScript
from .exact import ExactBuffers
from .fields import Fields, check_dtype, check_features


class FieldKind(NamedTuple):
    """What a batch norm learns and keeps for the fields of one representation, of size d. Without trivial irreps bias,
    mean, average and basis are None."""

    size: int
    weight: Tensor | None  # (fields, 1)
    bias: Tensor | None  # (fields, n_trivial)
    mean: Tensor | None  # (fields, d) running
    var: Tensor  # (fields, 1) running
    average: Tensor | None  # (d, d) projection on the trivial irreps
    basis: Tensor | None  # (d, n_trivial) of the space that the trivial irreps span


_Statistics = tuple[Tensor | None, Tensor]  # a kind's mean (fields, d), None without trivial irreps; var (fields, 1)


class NormBase(NoTorchScript, torch.nn.Module):
    """y = w · (x − mean) / sqrt(var + eps) + b for every field, on tensors: escnn's ``IIDBatchNorm1d``, to rounding.

    Per field, mean (d,) is the part of the mean over all points that lies in trivial irreps, b (d,) lies there too, var
    is the unbiased variance averaged over the d coordinates, w a scalar. As in escnn, no gradient flows through the
    statistics.

    A subclass sets ``in_type``, ``eps``, ``momentum`` and ``track_running_stats``, has a buffer
    ``num_batches_tracked``, calls :meth:`_set_channels` and implements :meth:`_kinds`.
    """

    in_type: Any
    eps: float
    momentum: float | None
    track_running_stats: bool
    pool: Pool | None = None  # adds other processes' points to the batch's statistics
    num_batches_tracked: Tensor
    _by_kind: Tensor | None
    _in_place: Tensor | None
    _kinds: Callable[[], list[FieldKind]]

    def _set_channels(self, channels: Tensor | None) -> None:
        """``channels`` (C,): the channels, sorted by kind of field; None where they already are in this order."""
        self.register_buffer("_by_kind", channels, persistent=False)
        self.register_buffer("_in_place", None if channels is None else channels.argsort(), persistent=False)

    def _evaluate(self, x: Tensor) -> Tensor:
        """Normalise: in training mode with the batch's statistics, which update the running ones, else with these."""
        with without_autocast(x):
            return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        kinds = self._kinds()
        check_dtype("x", x, kinds[0].var.dtype)
        dtype = torch.promote_types(x.dtype, kinds[0].var.dtype)
        wide = x if x.dtype == dtype else x.to(dtype)
        if self.training or not self.track_running_stats:
            statistics = self._batch_statistics(wide, kinds)
        else:
            statistics = [(kind.mean, kind.var) for kind in kinds]
        if self.training:
            self._update_running(statistics, kinds)
        if self._is_native(wide, kinds):
            learned = [(kind.weight, kind.bias) for kind in kinds]
            columns = (*zip(*statistics, strict=True), *zip(*learned, strict=True))
            tensors = (_some(t, dtype) for column in columns for t in column)
            y = _recorded(self, kinds, wide.contiguous(), *tensors)
        else:
            y = self._normalised(wide, kinds, statistics)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def _is_native(x: Tensor, kinds: list[FieldKind]) -> bool:
        right = not is_traced() and x.is_cpu and x.dim() == 2 and x.dtype == kinds[0].var.dtype
        return right and x.dtype in (torch.float32, torch.float64) and _native.found()

    def _normalised(self, x: Tensor, kinds: list[FieldKind], statistics: list[_Statistics]) -> Tensor:
        affine = [self._affine(kind, *s) for kind, s in zip(kinds, statistics, strict=True)]
        mean, scale, shift = (_on_channels(self._joined(parts), x) for parts in zip(*affine, strict=True))
        return torch.addcmul(shift, x - mean, scale)

    @torch.no_grad()
    def _batch_statistics(self, x: Tensor, kinds: list[FieldKind]) -> list[_Statistics]:
        """For each kind of field: mean (fields, d), or None without trivial irreps, and variance (fields, 1)."""
        count, alone = x.numel() // self.in_type.size, self.pool is None
        remedy = "Call .eval(), or use larger batches."
        require(count > 1 or not alone, "x", "at least 2 points in training mode", count, remedy)
        if alone and self._is_native(x, kinds):
            averages = [_some(kind.average, x.dtype) for kind in kinds]
            found = torch.ops.implicit_steer.field_statistics(x.contiguous(), *self._fields(kinds), averages)
            return [(mean if len(mean) else None, var) for mean, var in zip(*found, strict=True)]
        count, mean, squares = moments(x.movedim(1, -1).flatten(0, -2), self.pool)
        if self._by_kind is not None:
            mean, squares = mean[self._by_kind], squares[self._by_kind]
        lengths = [len(kind.var) * kind.size for kind in kinds]
        statistics = []
        for kind, m, s in zip(kinds, mean.split(lengths), squares.split(lengths), strict=True):
            trivial = None if kind.average is None else m.view(-1, kind.size) @ kind.average.T
            statistics.append((trivial, s.view(-1, kind.size).mean(1, keepdim=True) / (count - 1)))
        return statistics

    def _fields(self, kinds: list[FieldKind]) -> tuple[Tensor, list[int], list[int]]:
        """What the native operators take: the channels sorted by kind; how many fields of each kind; their sizes."""
        return _some(self._by_kind, torch.int64), [kind.var.shape[0] for kind in kinds], [kind.size for kind in kinds]

    @torch.no_grad()
    def _update_running(self, statistics: list[_Statistics], kinds: list[FieldKind]) -> None:
        self.num_batches_tracked += 1
        if not self.track_running_stats:
            return
        factor = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        both = list(zip(kinds, statistics, strict=True))
        pairs = [(kind.var, var) for kind, (_, var) in both]
        pairs += [(kind.mean, mean) for kind, (mean, _) in both if kind.mean is not None and mean is not None]
        running, batch = zip(*pairs, strict=True)
        move_towards(running, batch, factor)

    def _affine(self, kind: FieldKind, mean: Tensor | None, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mean, scale and shift of a kind's channels, (fields, d) each."""
        scale = (var + self.eps).rsqrt()
        if kind.weight is not None:
            scale = kind.weight * scale
        zero = torch.zeros_like(scale).expand(-1, kind.size)
        shift = zero if kind.bias is None or kind.basis is None else kind.bias @ kind.basis.T
        return zero if mean is None else mean, scale.expand(-1, kind.size), shift

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        """(C,), in the order of the channels, from (fields, d) of each kind."""
        if self._in_place is None:
            return parts[0].reshape(-1)
        return torch.cat([part.reshape(-1) for part in parts])[self._in_place]


@cached
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


def _some(t: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A tensor for the native operators, contiguous; an empty one for None."""
    return _nothing(dtype) if t is None else t.contiguous()


def _on_channels(values: Tensor, x: Tensor) -> Tensor:
    """values (C,), in a shape that broadcasts to the channels of x (N, C, ...)."""
    return values.view(-1, *(1,) * (x.dim() - 2)) if x.dim() > 2 else values


class _Norm(torch.autograd.Function):
    """x, then the means, variances, weights and biases of all kinds → the normalised x, by the native operators."""

    @staticmethod
    def forward(ctx: Any, norm: NormBase, kinds: list[FieldKind], x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.of = norm, kinds
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.implicit_steer.field_norm(x, *_Norm.arguments(norm, kinds, tensors))

    @staticmethod
    def arguments(norm: NormBase, kinds: list[FieldKind], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        n = len(kinds)
        columns = [tensors[k : k + n] for k in range(0, 4 * n, n)]
        return *norm._fields(kinds), *columns, [_some(kind.basis, tensors[0].dtype) for kind in kinds], norm.eps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (norm, kinds), (x, *tensors) = ctx.of, ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            refuse_derivatives()  # forward mode is allowed: what follows is plain PyTorch
            return None, None, *_differentiable(norm, kinds, grad, x, tensors)
        refuse_derivatives(grad, x, *tensors)
        arguments = _Norm.arguments(norm, kinds, tensors)
        d_x, weights, biases = torch.ops.implicit_steer.field_norm_backward(grad.contiguous(), x, *arguments)
        return None, None, d_x, *[None] * (2 * len(kinds)), *weights, *biases


def _differentiable(
    norm: NormBase, kinds: list[FieldKind], grad: Tensor, x: Tensor, tensors: Sequence[Tensor]
) -> list[Any]:
    """The gradients of x and ``tensors`` by plain PyTorch."""
    n = len(kinds)
    given = [t if t.numel() else None for t in tensors]
    statistics = list(zip(given[:n], tensors[n : 2 * n], strict=True))
    learned = zip(given[2 * n : 3 * n], given[3 * n :], strict=True)
    y = norm._normalised(
        x, [k._replace(weight=w, bias=b) for k, (w, b) in zip(kinds, learned, strict=True)], statistics
    )
    wanted = [t.requires_grad for t in (x, *tensors)]
    found = iter(torch.autograd.grad(y, [t for t in (x, *tensors) if t.requires_grad], grad, create_graph=True))
    return [next(found) if want else None for want in wanted]


_recorded = recorder(_Norm)  # only where nothing is traced


class _KindState(ExactBuffers, torch.nn.Module):
    """The tensors of one :class:`FieldKind`."""

    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor
    average: Tensor | None
    basis: Tensor | None

    def __init__(self, fields: int, size: int, n_trivial: int, affine: bool) -> None:
        super().__init__()
        self.size = size
        self.register_parameter("weight", torch.nn.Parameter(torch.ones(fields, 1)) if affine else None)
        bias = torch.nn.Parameter(torch.zeros(fields, n_trivial)) if affine and n_trivial else None
        self.register_parameter("bias", bias)
        self.register_buffer("running_mean", torch.zeros(fields, size) if n_trivial else None)
        self.register_buffer("running_var", torch.ones(fields, 1))
        for name, width in (("average", size), ("basis", n_trivial)):
            self.register_buffer(name, None)
            if n_trivial:
                self.set_exact(name, torch.zeros(size, width))

    def kind(self) -> FieldKind:
        mean, var = self.running_mean, self.running_var
        return FieldKind(self.size, self.weight, self.bias, mean, var, self.average, self.basis)


class IIDBatchNorm1d(NormBase, torch.nn.Module):
    """y = w · (x − mean) / sqrt(var + eps) + b for every field, without escnn: (N, C, ...) → the same shape.

    Args:
        in_type: size and name of the features.
        sizes: for each representation: how many fields there are, their size, and how many trivial irreps each has.
        channels: (C,) the channels sorted by representation, or None where there is only one.
        eps, momentum, affine, track_running_stats: as in escnn's ``IIDBatchNorm1d``.
    """

    kinds: Any  # a ModuleList of _KindState

    def __init__(
        self,
        in_type: Fields,
        sizes: tuple[tuple[int, int, int], ...],
        channels: NDArray[Any] | None,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
    ) -> None:
        super().__init__()
        total = sum(fields * size for fields, size, _ in sizes)
        require(total == in_type.size, "sizes", f"fields of {in_type.size} channels in all", total)
        if channels is None:
            once = len(sizes) == 1
        else:
            once = channels.shape == (total,) and np.array_equal(np.sort(channels), np.arange(total))
        require(once, "channels", "every channel once", channels)
        self.in_type = self.out_type = in_type
        self.eps, self.momentum = eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.kinds = torch.nn.ModuleList(_KindState(*row, affine) for row in sizes)
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self._sizes = sizes
        self._set_channels(None if channels is None else torch.tensor(channels))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("in_type", "eps", "momentum", "affine", "track_running_stats")
        channels = None if self._by_kind is None else self._by_kind.cpu().numpy()
        return {name: getattr(self, name) for name in names} | {"sizes": self._sizes, "channels": channels}

    def _kinds(self) -> list[FieldKind]:
        return [state.kind() for state in self.kinds]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise: in training mode with the batch's statistics, which update the running ones, else with these."""
        check_features(x, self.in_type.size)
        return self._evaluate(x)

    def extra_repr(self) -> str:
        """What distinguishes this norm."""
        return f"{self.in_type}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"
