"""A network for interacting particles: vectors and scalars in, one vector per particle out."""

from __future__ import annotations

from typing import Any

import torch
from escnn import gspaces

from ..._check import require
from ...deploy.convert import saved_as
from ...layers.molecules import ResidualBlock
from ...layers.particles import ParticleNet
from ...nn import FourierActivation, IIDBatchNorm1d, ImplicitPointConv
from ...nn.mlp import Linear, initialise

# By name; so2: rotations about z.
SPACES = {"o3": gspaces.flipRot3dOnR3, "so3": gspaces.rot3dOnR3, "so2": gspaces.rot2dOnR3}


@saved_as(ParticleNet)
class NBodyNet(ParticleNet):
    """Displacements of particles, equivariant for ``gspace``'s group.

    Kernels are functions of the relative position, of whether a spring connects the two or of the product of their
    charges, of their distance, of both velocities (vectors) and of both scalars (heights above the particles' planes,
    or charges). O(3) leaves scalars apart; with rotations about z they also mix with the z components of vectors.

    - ``gspace``: an escnn ``GSpace`` of R³; None: O(3), ``gspaces.flipRot3dOnR3()``.
    - ``blocks``, ``channels``, ``max_frequency``: depth, hidden fields (functions on the sphere, or on the circle),
      their frequency.
    - ``reach``: initial width of the kernels' shells, in the unit of the positions: particles are far apart.
    - ``kernel_layers``, ``kernel_channels``: size of the kernel MLPs; further keywords (``sampling``, ``norm``,
      ``backend``, ...) go to every :class:`~implicit_steer.nn.ImplicitPointConv`.

    Source: Zhdanov, Hoffmann, Cesa, NeurIPS 2023, section 5.2.
    """

    def __init__(
        self,
        gspace: gspaces.GSpace | None = None,
        *,
        blocks: int = 2,
        channels: int = 8,
        max_frequency: int = 1,
        reach: float = 4.0,
        kernel_layers: int = 3,
        kernel_channels: int = 8,
        **convolution: Any,
    ):
        gspace = gspaces.flipRot3dOnR3() if gspace is None else gspace
        require(gspace.dimensionality == 3, "gspace", "a GSpace of R³", gspace)
        vector, scalar = gspace.basespace_action, gspace.trivial_repr
        no_space = gspaces.no_base_space(gspace.fibergroup)
        attributes = no_space.type(scalar, scalar, vector, vector, scalar, scalar)
        activation = FourierActivation(gspace, channels, max_frequency, sampling="escnn")
        hidden, inputs, out = activation.in_type, gspace.type(vector, vector, scalar), gspace.type(vector)

        def conv():
            layer = ImplicitPointConv(hidden, hidden, attributes, kernel_layers, kernel_channels, **convolution)
            torch.nn.init.constant_(layer.implicit_kernel.shell_width, reach)
            return layer

        super().__init__(
            inputs,
            Linear(inputs, hidden, None),
            Linear(inputs, out, None),
            activation,
            torch.nn.ModuleList(
                ResidualBlock(activation, conv(), conv(), IIDBatchNorm1d(hidden), IIDBatchNorm1d(hidden))
                for _ in range(blocks)
            ),
            Linear(hidden, out, None),
        )
        for layer in (self.embedding, self.direct, self.readout):
            initialise(layer, "he")
