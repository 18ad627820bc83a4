"""Steerable convolution on point clouds and graphs with an implicit kernel, between irreps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._check import require, require_integer
from ..layers import ImplicitKernel
from ..layers._modules import refuse_fake_tensors
from ..layers.fields import fields_of
from ..layers.point_conv import PlainPointConv
from ..lowering.irreps import KernelOptions, depthwise_irreps, lower_kernel
from ..ops import select
from ..plan import FUNCTIONS, Radial
from ..plan.frozen import require_number
from ..plan.irreps import Irreps
from ..plan.radial import size_of
from ..plan.tabulated import with_table
from .initialisation import draw_weights
from .linear import Linear


class ImplicitPointConv(PlainPointConv):
    """out_i = bias + Σ_{e: j→i} s(|x_e|) K(x_e, a_e) f_j, equivariant for rotations, and for inversion where irreps
    have parities. It takes plain tensors in e3nn's layout and basis and needs no escnn.

    ``vec K = MLP(x ⊕ radial(|x|) ⊕ a)`` with an equivariant MLP, and ``s(r) = exp(−½ (r / σ)²)``, which a ``cutoff``
    multiplies by a smooth envelope.

    Args:
        irreps_in, irreps_out: the irreps of features and result: a string, an :class:`Irreps` or ``e3nn.o3.Irreps``.
            ``"16x0e + 8x1o"`` is 16 scalars and 8 vectors, in that order, 40 components.
        edge_attr: how many invariant attributes an edge has, without the radial ones.
        n_layers, n_channels: the kernel's MLP: linear layers (1: a kernel linear in x and a) and hidden fields.
        activation: the MLP's φ, ``"silu" | "gelu" | "tanh" | "elu" | "relu"``; for forces one of the first three, which
            are smooth.
        norm: None, or ``"batch"``: batch norms in the MLP, over the edges.
        cutoff: radius beyond which the kernel is 0, with two continuous derivatives, in the unit of the positions.
        width: initial σ, in the unit of the positions: about the length of an edge.
        aggr: ``"sum"`` (``"add"``) or ``"mean"`` over the edges of a node.
        depthwise: whether K acts channel by channel (e3nn's "uvu"), with one output per channel and path, all of which
            one :class:`Linear` mixes. It has far fewer weights, and trains faster at widths of 64 and more.
        table: None, or how many knots: the MLP is evaluated at so many radii and interpolated by splines for the edges,
            so that its depth and width cost next to nothing on large graphs; parameters and equivariance stay. With 256
            knots, smooth activations and weights as drawn the error is below float32's rounding; ``explain()`` measures
            it for the present weights. ``"auto"`` chooses the fewest for an error of 1e-6.
            Distinct rows of attributes have knots of their own: pass :class:`~implicit_steer.EdgeTypes`.
        radial: further invariants that the layer computes from an edge's length: :class:`Distance`, :class:`Cosines`,
            :class:`Bessel`, or None.
        bias: whether a learned constant is added to the scalars of the result.
        backend: ``"auto"`` or one of ``implicit_steer.info().backends``; a backend asked for by name runs or raises.

    Weights are drawn so that an edge of length ``width`` carries a message of unit variance, without shell and cutoff.
    With ``aggr="sum"`` a node adds up its edges: divide by the root of their mean number, as :class:`InteractionBlock`
    does.

    Attributes:
        implicit_kernel: K, callable on positions (P, 3) and attributes; ``implicit_kernel.shell_width`` is σ.
        linear: the mixing :class:`Linear` of a ``depthwise`` layer, else None.

    Raises:
        ValueError, TypeError: a wrong argument, or irreps that no kernel of positions and scalars can connect; the
            message names the argument, what was expected and what came.

    Example:
        >>> conv = ImplicitPointConv("16x0e + 8x1o", "16x0e + 8x1o")
        >>> pos, x = torch.randn(100, 3), torch.randn(100, 40)
        >>> edges = implicit_steer.knn_graph(pos, k=8)
        >>> conv(x, edges, pos[edges[1]] - pos[edges[0]]).shape
        torch.Size([100, 40])

    Source: Zhdanov, Hoffmann, Cesa, *Implicit Convolutional Kernels for Steerable CNNs*, NeurIPS 2023.
    """

    def __init__(
        self,
        irreps_in: Any,
        irreps_out: Any,
        edge_attr: int = 0,
        *,
        n_layers: int = 3,
        n_channels: int = 8,
        activation: str = "silu",
        norm: str | None = None,
        cutoff: float | None = None,
        width: float = 0.5,
        aggr: str = "sum",
        depthwise: bool = False,
        table: int | str | None = None,
        radial: Radial | None = None,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        refuse_fake_tensors(self)
        self.irreps_in, self.irreps_out = Irreps.of(irreps_in, "irreps_in"), Irreps.of(irreps_out, "irreps_out")
        options = _checked_options(edge_attr, n_layers, n_channels, activation, norm, cutoff, aggr, radial)
        for name, flag in (("depthwise", depthwise), ("bias", bias)):
            require(isinstance(flag, bool), name, "True or False", repr(flag), kind=TypeError)
        require_number("width", width)
        require(width > 0, "width", "a positive length", width)
        require(backend in select.NAMES, "backend", f"one of {select.NAMES}", repr(backend))
        self.depthwise, self.backend = depthwise, backend
        self.in_type = fields_of(self.irreps_in)
        self.out_type = fields_of(self.irreps_out)
        self._arguments = {
            "n_layers": n_layers,
            "n_channels": n_channels,
            "activation": activation,
            "width": width,
        }
        plan = lower_kernel(self.irreps_in, self.irreps_out, options, depthwise)
        self.implicit_kernel = ImplicitKernel(with_table(plan, table, width))
        self.linear = None
        if depthwise:
            self.linear = Linear(depthwise_irreps(self.irreps_in, self.irreps_out, n_layers), self.irreps_out, bias)
        self._set_bias(_on_scalars(self.irreps_out, bias and not depthwise))
        self.implicit_kernel.adopt_bias(self)
        torch.nn.init.constant_(self.implicit_kernel.shell_width, width)
        draw_weights(self.implicit_kernel, width)
        shell = self.implicit_kernel.shell_width
        if not shell.is_meta:
            select.check(backend, self.implicit_kernel.plan, shell.device, shell.dtype)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        kernel = self.implicit_kernel
        has_bias = (self.bias if self.linear is None else self.linear.bias) is not None
        return {
            "irreps_in": str(self.irreps_in),
            "irreps_out": str(self.irreps_out),
            "edge_attr": kernel.n_attributes,
            **self._arguments,
            **{name: getattr(kernel, name) for name in ("norm", "cutoff", "aggr", "table", "radial")},
            "depthwise": self.depthwise,
            "bias": has_bias,
            "backend": self.backend,
        }


def _checked_options(
    edge_attr: int,
    n_layers: int,
    n_channels: int,
    activation: str,
    norm: str | None,
    cutoff: Any,
    aggr: str,
    radial: Radial | None,
) -> KernelOptions:
    require_integer("edge_attr", edge_attr, 0)
    require_integer("n_layers", n_layers, 1)
    require_integer("n_channels", n_channels, 1)
    require(activation in FUNCTIONS, "activation", f"one of {FUNCTIONS}", repr(activation))
    require(norm in ("batch", None), "norm", "'batch' or None", repr(norm))
    if cutoff is not None:
        require_number("cutoff", cutoff)
        cutoff = float(cutoff)
    aggr = "sum" if aggr == "add" else aggr
    require(aggr in ("sum", "mean"), "aggr", "'sum', 'add' or 'mean'", repr(aggr))
    n_attributes = size_of(radial) + edge_attr
    return KernelOptions(n_attributes, n_layers, n_channels, activation, norm, cutoff, aggr, radial)


def _on_scalars(irreps: Irreps, bias: bool) -> Tensor:
    """(C, n), float64: a column for each scalar; none without ``bias``."""
    return torch.eye(irreps.size, dtype=torch.float64)[:, irreps.scalars if bias else []]
