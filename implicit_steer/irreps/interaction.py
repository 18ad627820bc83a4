"""One layer of a network in NequIP's form."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .._check import fail, require, require_integer
from ..graph import EdgeTypes, Graph
from ..layers.fields import check_tensor
from ..layers.point_conv import PlainPointConv
from ..plan import Radial
from ..plan.frozen import require_number
from ..plan.irreps import Irreps, Term
from .gate import Gate
from .linear import Linear
from .point_conv import ImplicitPointConv


class Interaction(torch.nn.Module):
    """y = Gate((conv(Linear x) / √degree + Linear(x ⊗ node_attr)) / √2), composed of its parts; an
    :class:`InteractionBlock` builds them.

    Args:
        linear: mixes the copies of each irrep of x.
        conv: the convolution, which may be frozen.
        self_connection: maps x, or x ⊗ node_attr.
        gate: maps to y.
        node_attr: how many invariant attributes a node has.
        degree: mean number of neighbours of a node, > 0.
    """

    def __init__(
        self,
        linear: Linear,
        conv: PlainPointConv,
        self_connection: Linear,
        gate: Gate,
        node_attr: int,
        degree: float,
    ) -> None:
        super().__init__()
        require_integer("node_attr", node_attr, 0)
        require_number("degree", degree)
        require(degree > 0, "degree", "a number > 0", degree)
        own = linear.irreps_out.size, gate.irreps_in.size
        sizes = conv.in_type.size, conv.out_type.size
        require(sizes == own, "conv", f"sizes {own}", sizes)
        own = linear.irreps_in.size * max(node_attr, 1), gate.irreps_in.size
        sizes = self_connection.irreps_in.size, self_connection.irreps_out.size
        require(sizes == own, "self_connection", f"sizes {own}", sizes)
        self.irreps_in, self.irreps_out = linear.irreps_in, gate.irreps_out
        self.node_attr, self.degree = node_attr, float(degree)
        self.in_type, self.out_type = linear.in_type, gate.out_type
        self.gate, self.linear, self.conv, self.self_connection = gate, linear, conv, self_connection

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("linear", "conv", "self_connection", "gate", "node_attr", "degree")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | Graph,
        edge_delta: Tensor,
        edge_attr: Tensor | EdgeTypes | None = None,
        node_attr: Tensor | None = None,
    ) -> Tensor:
        """(N, irreps_in.size) → (N, irreps_out.size); the edges are given as to :meth:`ImplicitPointConv.forward`."""
        message = self.conv(self.linear(x), edge_index, edge_delta, edge_attr) / math.sqrt(self.degree)
        return self.gate((message + self.self_connection(self._with_attributes(x, node_attr))) / math.sqrt(2))

    def _with_attributes(self, x: Tensor, node_attr: Tensor | None) -> Tensor:
        """x ⊗ node_attr: every copy of an irrep times each of the attributes, side by side."""
        if not self.node_attr:
            if node_attr is not None:
                remedy = "The block was built without node_attr: leave them out, or build it with their number."
                fail("node_attr", "None", tuple(node_attr.shape), remedy)
            return x
        if node_attr is None:
            fail("node_attr", f"a tensor (N, {self.node_attr})", None)
        check_tensor("node_attr", node_attr, (x.shape[0], self.node_attr), x.dtype, x.device)
        parts = []
        for (multiplicity, irrep), part in zip(
            self.irreps_in, x.split([t.size for t in self.irreps_in], 1), strict=True
        ):
            fields = part.view(-1, multiplicity, 1, irrep.size) * node_attr[:, None, :, None]
            parts.append(fields.flatten(1))
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        """What distinguishes this block."""
        return f"{self.irreps_in} -> {self.irreps_out}, node_attr={self.node_attr}, degree={self.degree:g}"


class InteractionBlock(Interaction):
    """y = Gate((conv(Linear x) / √degree + Linear(x ⊗ node_attr)) / √2): NequIP's layer with an implicit kernel.

    The first Linear mixes the copies of each irrep, the convolution reads the neighbours, the second Linear is the
    self-connection. With ``node_attr`` the latter has one matrix for each node attribute, so one for each species if
    these are one-hot species. The block is equivariant to rounding.

    Args:
        irreps_in, irreps_out: the irreps of x and y, as ``"16x0e + 8x1o"``.
        edge_attr: how many invariant attributes an edge has, without the radial ones.
        node_attr: how many invariant attributes a node has; 0 gives a plain self-connection.
        degree: mean number of neighbours of a node, > 0; the convolution is divided by its root.
        function, gate: as in :class:`Gate`.
        n_layers, n_channels, activation, norm, cutoff, width, depthwise, table, radial, backend: as in
            :class:`ImplicitPointConv`. The convolution has no bias, since the self-connection has one.

    Shape: x (N, irreps_in.size), edge_delta (E, 3), edge_attr (E, A) or :class:`~implicit_steer.EdgeTypes`, node_attr
    (N, B); y (N, irreps_out.size).

    Raises:
        ValueError, TypeError: a wrong argument; the message names it, what was expected and what came.

    Example:
        >>> block = InteractionBlock("16x0e", "16x0e + 8x1o", cutoff=2.0, width=1.0, degree=8)
        >>> pos, x = torch.randn(100, 3), torch.randn(100, 16)
        >>> edges = implicit_steer.knn_graph(pos, k=8)
        >>> block(x, edges, pos[edges[1]] - pos[edges[0]]).shape
        torch.Size([100, 40])

    Source: Batzner et al., *E(3)-equivariant graph neural networks for data-efficient and accurate interatomic
    potentials*, Nature Communications 2022, figure 1.
    """

    def __init__(
        self,
        irreps_in: Any,
        irreps_out: Any,
        edge_attr: int = 0,
        *,
        node_attr: int = 0,
        degree: float = 1.0,
        function: str = "silu",
        gate: str = "sigmoid",
        n_layers: int = 3,
        n_channels: int = 8,
        activation: str = "silu",
        norm: str | None = None,
        cutoff: float | None = None,
        width: float = 0.5,
        depthwise: bool = False,
        table: int | str | None = None,
        radial: Radial | None = None,
        backend: str = "auto",
    ) -> None:
        require_integer("node_attr", node_attr, 0)
        into, gated = Irreps.of(irreps_in, "irreps_in"), Gate(irreps_out, function, gate)
        linear = Linear(into, into, bias=False)
        conv = ImplicitPointConv(
            into,
            gated.irreps_in,
            edge_attr,
            n_layers=n_layers,
            n_channels=n_channels,
            activation=activation,
            norm=norm,
            cutoff=cutoff,
            width=width,
            depthwise=depthwise,
            table=table,
            radial=radial,
            bias=False,
            backend=backend,
        )
        repeated = Irreps(tuple(Term(multiplicity * max(node_attr, 1), irrep) for multiplicity, irrep in into))
        super().__init__(linear, conv, Linear(repeated, gated.irreps_in), gated, node_attr, degree)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        given = {
            **cast(ImplicitPointConv, self.conv).arguments(),
            "irreps_out": str(self.irreps_out),
            "node_attr": self.node_attr,
            "degree": self.degree,
            "function": self.gate.function,
            "gate": self.gate.gate,
        }
        return {name: value for name, value in given.items() if name not in ("aggr", "bias")}
