"""Fourier activation on node features and inside the kernel MLP, every distinct sample evaluated once."""

from __future__ import annotations

import re

import torch
from escnn.group import Group
from escnn.gspaces import GSpace
from escnn.nn import EquivariantModule, FieldType, GeometricTensor

from .. import sampling as sp
from .._check import fail, require, require_integer
from ..layers.activation import FourierBase
from ..plan import FUNCTIONS
from .building import built_by_escnn


def paper_function(group: Group) -> str:
    """φ as the paper chooses it: ELU, but ReLU on groups of order 1 and 2."""
    return "relu" if not group.continuous and group.order() <= 2 else "elu"


class FourierActivation(FourierBase, EquivariantModule):
    """y = A⁻ φ(A x) per field: sample a band-limited function on the group or the sphere, apply φ, transform back.

    The same function as escnn's ``QuotientFourierELU`` / ``FourierELU`` on the authors' grids, but samples that
    coincide are evaluated once (30 of the 120 icosahedral ones for O(3)).

    Args:
        gspace: its fibre group chooses the representation: functions on the sphere for SO(3) and O(3), else on the
            group.
        channels: number of fields.
        max_frequency: band limit L (without effect for finite groups, which keep every irrep).
        function: ``"elu" | "relu" | "silu" | "gelu" | "tanh"``.
        sampling: ``"escnn"`` (the authors' grid; exact for finite groups), ``"lebedev-N"`` (SO(3), O(3)), or
            ``"circle-N"`` (N equispaced rotations: SO(2), O(2) and their extensions; the authors take 125).

    Shape: x and y (N, channels · d, ...) as GeometricTensor of ``in_type == out_type``.

    Raises:
        ValueError: unknown function or sampling, or a continuous group without a known grid.
        TypeError: input that is no GeometricTensor of ``in_type``.

    Source: escnn's Fourier activations; Zhdanov, Hoffmann, Cesa, NeurIPS 2023 for the choice of grids.
    """

    @built_by_escnn
    def __init__(
        self, gspace: GSpace, channels: int, max_frequency: int, function: str = "elu", sampling: str = "escnn"
    ):
        super().__init__()
        require(isinstance(gspace, GSpace), "gspace", "an escnn GSpace", type(gspace).__name__, kind=TypeError)
        require_integer("max_frequency", max_frequency, 0)
        require(function in FUNCTIONS, "function", f"one of {FUNCTIONS}", repr(function))
        require_integer("channels", channels, 1)
        match = re.fullmatch(r"(escnn)|(lebedev|circle)-([1-9]\d*)", sampling) if isinstance(sampling, str) else None
        require(match is not None, "sampling", "'escnn', 'lebedev-N' or 'circle-N'", repr(sampling))
        space = sp.hidden_space(gspace.fibergroup, max_frequency)
        if match[1]:
            a, inverse = sp.escnn_matrices(space)
        elif match[2] == "lebedev":
            a, inverse = sp.lebedev_matrices(space, int(match[3]))
        else:
            a, inverse = sp.rotation_matrices(space, int(match[3]), sampling)
        self.sampling, self.band_limit = sampling, max_frequency
        self.in_type = self.out_type = FieldType(gspace, [space.rho] * channels)
        # the authors' buffers, kept for checkpoints; the merged matrices below are what is evaluated
        self.register_buffer("A", torch.tensor(a, dtype=torch.get_default_dtype()))
        self.register_buffer("Ainv", torch.tensor(inverse, dtype=torch.get_default_dtype()))
        merged, merged_inverse, _ = sp.merge_samples(a, inverse)
        self._set_samples(function, merged, merged_inverse)

    def forward(self, x: GeometricTensor) -> GeometricTensor:
        """Apply the activation to every field."""
        if not isinstance(x, GeometricTensor) or (x.type is not self.in_type and x.type != self.in_type):
            fail("x", f"a GeometricTensor of {self.in_type}", getattr(x, "type", type(x)), kind=TypeError)
        return GeometricTensor(self._evaluate(x.tensor), self.out_type, x.coords)

    def evaluate_output_shape(self, input_shape: tuple) -> tuple:
        """The input's shape."""
        return tuple(input_shape)

    def extra_repr(self) -> str:
        """What distinguishes this activation."""
        samples, _ = self._merged.exact
        return f"{self.in_type}, function={self.function!r}, sampling={self.sampling!r}, {len(samples)} samples"
