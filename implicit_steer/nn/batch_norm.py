"""Batch norm of node features: escnn's module, computed in few tensor operations on all channels together."""

from __future__ import annotations

import escnn.nn
import torch
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import require
from ..layers.batch_norm import FieldKind, NormBase
from ..layers.exact import ExactBuffers, is_exact
from ..lowering.sampling import invariants, is_orthogonal
from .building import built_by_escnn
from .equivariant import Steerable, check_input


class IIDBatchNorm1d(ExactBuffers, NormBase, Steerable, escnn.nn.IIDBatchNorm1d):
    """y = w · (x − mean) / sqrt(var + eps) + b for every field: escnn's ``IIDBatchNorm1d``, to rounding.

    Per field, mean (d,) is the part of the mean over all points that lies in trivial irreps, b (d,) lies there too, var
    is the unbiased variance averaged over the d coordinates, w a scalar. As in escnn, no gradient flows through the
    statistics. Arguments, parameters, buffers and running statistics are escnn's. ``torch.optim.swa_utils.update_bn``
    ignores it: use :func:`implicit_steer.nn.update_bn`.

    Shape: x and y (N, C, ...) as GeometricTensor of ``in_type == out_type``.

    Raises ``TypeError`` for input that is no GeometricTensor of ``in_type``, ``ValueError`` for statistics of
    fewer than 2 points, and for fields that do not transform by orthogonal matrices: a variance averaged over their
    coordinates is not invariant.
    """

    @built_by_escnn
    def __init__(self, in_type: FieldType, *args, **options):
        for rep in set(in_type.representations):
            remedy = "Normalise before a Linear to such fields."
            require(is_orthogonal(rep), "in_type", "fields with orthogonal matrices", rep.name, remedy)
        super().__init__(in_type, *args, **options)
        for rep in set(in_type.representations):
            basis, name = torch.from_numpy(invariants(rep)), self._escape_name(rep.name)
            if basis.shape[1]:
                self.set_exact(f"{name}_avg", basis @ basis.T)
                self.set_exact(f"{name}_change_of_basis", basis)
        self._set_channels(channels_by_kind(self))

    def _kinds(self) -> list[FieldKind]:
        return field_kinds(self)

    def forward(self, x: GeometricTensor) -> GeometricTensor:
        """Normalise: in training mode with the batch's statistics, which update the running ones, else with these."""
        check_input(x, self.in_type)
        return GeometricTensor(self._evaluate(x.tensor), self.out_type, x.coords)

    def export(self) -> torch.nn.BatchNorm1d:
        """The same function of plain tensors (N, C), in evaluation mode. Training it further breaks its equivariance.

        Raises ``RuntimeError`` without running statistics.
        """
        kept, remedy = self.track_running_stats, "The statistics of a batch are not symmetric."
        require(kept, "export", "a norm with track_running_stats", "one without", remedy, RuntimeError)
        columns = []
        for kind in self._kinds():
            mean, _, shift = self._affine(kind, kind.mean, kind.var)
            weight = torch.ones_like(kind.var) if kind.weight is None else kind.weight
            columns.append([mean, kind.var.expand_as(mean), weight.expand_as(mean), shift])
        place = {"dtype": columns[0][1].dtype, "device": columns[0][1].device}
        plain = torch.nn.BatchNorm1d(self.in_type.size, self.eps, self.momentum, **place)
        names = ("running_mean", "running_var", "weight", "bias")
        plain.load_state_dict(
            dict(zip(names, map(self._joined, zip(*columns, strict=True)), strict=True)), strict=False
        )
        return plain.eval()


def field_kinds(norm: escnn.nn.IIDBatchNorm1d) -> list[FieldKind]:
    """The tensors of one of escnn's batch norms, per representation."""

    parameters, buffers = norm._parameters, norm._buffers  # without the detour over Module.__getattr__

    def of(key: str) -> Tensor | None:
        found = parameters.get(key, buffers.get(key))
        return getattr(norm, key, None) if found is None else found

    names = ("weight", "bias", "running_mean", "running_var", "avg", "change_of_basis")
    return [FieldKind(size, *[of(f"{norm._escape_name(name)}_{what}") for what in names]) for name, size in norm._sizes]


def constants_by_kind(norm: escnn.nn.IIDBatchNorm1d) -> list[tuple[Tensor | None, Tensor | None]]:
    """average and basis of every :class:`FieldKind`, in float64 where the norm holds them exactly."""
    if not isinstance(norm, ExactBuffers):
        return [(kind.average, kind.basis) for kind in field_kinds(norm)]
    names = [[f"{norm._escape_name(name)}_{what}" for what in ("avg", "change_of_basis")] for name, _ in norm._sizes]
    return [tuple(norm.exact(name) if is_exact(norm, name) else None for name in pair) for pair in names]


def channels_by_kind(norm: escnn.nn.IIDBatchNorm1d) -> Tensor | None:
    """(C,) the channels of ``norm``, sorted by representation; None where there is only one representation."""
    if len(norm._sizes) == 1:
        return None
    channels = [getattr(norm, f"{norm._escape_name(name)}_indices") for name, _ in norm._sizes]
    return torch.cat([torch.arange(*c) if isinstance(c, list) else c for c in channels])
