"""A classifier of point clouds for the eight groups that the paper compares."""

from __future__ import annotations

from typing import Any

import torch
from escnn import gspaces
from escnn.nn import FieldType

from ..._check import require
from ...deploy.convert import saved_as
from ...layers.clouds import CloudNet
from ...nn import FourierActivation, IIDBatchNorm1d, ImplicitPointConv, ImplicitPointConvWithDownsampling
from ...nn.activation import paper_function

# The paper's eight groups; rotations are about z, mirrors contain it, the axes of half turns cross it.
SPACES = {
    "m": gspaces.mirOnR3,
    "inv": gspaces.invOnR3,
    "so2-inv": gspaces.cylindricalOnR3,
    "so2": gspaces.rot2dOnR3,
    "so2-f": gspaces.dihedralOnR3,
    "so2-m": gspaces.conicalOnR3,
    "so3": gspaces.rot3dOnR3,
    "o3": gspaces.flipRot3dOnR3,
}


@saved_as(CloudNet)
class ModelNetNet(CloudNet):
    """Clouds of points (B, P, 3) → (B, classes): see :class:`~implicit_steer.layers.CloudNet`.

    - ``classes``: their number.
    - ``gspace``: an escnn ``GSpace`` of R³, such as those of :data:`SPACES`.
    - ``points``, ``neighbours``: P, and edges into every point.
    - ``levels``: convolutions, each onto half of the points.
    - ``width``: about how many coefficients a point has in a hidden layer: as many fields as come closest, or one.
    - ``max_frequency``: of the hidden fields, functions on the sphere (SO(3), O(3)) or on the group (the others).
    - ``invariants``: pooled scalars. ``dropout``: of the MLP behind them.
    - ``node_sampling``: of the hidden layers' activations, see :class:`~implicit_steer.nn.FourierActivation`.
    - ``kernel_layers``, ``kernel_channels``: size of the kernel MLPs; further keywords (``sampling``, ``norm``,
      ``backend``, ...) go to every convolution.

    Source: Zhdanov, Hoffmann, Cesa, *Implicit Convolutional Kernels for Steerable CNNs*, NeurIPS 2023, for groups and
    nonlinearities; sizes are ours.
    """

    def __init__(
        self,
        classes: int,
        gspace: gspaces.GSpace,
        *,
        points: int = 1024,
        neighbours: int = 16,
        levels: int = 3,
        width: int = 32,
        max_frequency: int = 1,
        invariants: int = 64,
        dropout: float = 0.5,
        node_sampling: str = "escnn",
        kernel_layers: int = 3,
        kernel_channels: int = 8,
        **convolution: Any,
    ):
        require(gspace.dimensionality == 3, "gspace", "a GSpace of R³", gspace)
        require(levels >= 1, "levels", "at least 1", levels)
        require(points >> levels >= 2, "points", f"at least {2 << levels} for {levels} levels", points)
        field = FourierActivation(gspace, 1, max_frequency, sampling="escnn").in_type
        channels = max(1, round(width / field.size))
        activation = FourierActivation(
            gspace, channels, max_frequency, paper_function(gspace.fibergroup), sampling=node_sampling
        )
        hidden, vector = activation.in_type, FieldType(gspace, [gspace.basespace_action])
        kernel = (None, kernel_layers, kernel_channels)
        super().__init__(
            vector,
            torch.nn.ModuleList(
                ImplicitPointConvWithDownsampling(hidden if level else vector, hidden, *kernel, **convolution)
                for level in range(levels)
            ),
            torch.nn.ModuleList(IIDBatchNorm1d(hidden) for _ in range(levels)),
            activation,
            ImplicitPointConv(hidden, gspace.type(*invariants * [gspace.trivial_repr]), *kernel, **convolution),
            torch.nn.Sequential(
                torch.nn.BatchNorm1d(invariants),
                torch.nn.ELU(),
                torch.nn.Linear(invariants, invariants),
                torch.nn.BatchNorm1d(invariants),
                torch.nn.ELU(),
                torch.nn.Dropout(dropout),
                torch.nn.Linear(invariants, classes),
            ),
            points,
            tuple(points >> level for level in range(1, levels + 1)),
            neighbours,
        )
