"""Steerable convolution on point clouds and graphs with an implicit kernel."""

from __future__ import annotations

from typing import Any

import torch
from escnn.group import GroupElement
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import fail, require
from ..graph import Graph
from ..graph.neighbours import knn_graph
from ..layers.fields import check_tensor
from ..layers.point_conv import DownsamplingBase, PointConvBase, number_of_targets, source_and_target
from ..ops import select
from ..plan import Radial
from .building import built_by_escnn
from .equivariant import Errors, Steerable, check_shape, check_type, compare, like, transform
from .kernel import CheckedBias, ImplicitKernel, trivial_bias


def _points_of(dim: int) -> str:
    remedy = f"in_type(tensor, coords) with coords (N, {dim}): escnn asks for them, layers do not read them"
    return f"{remedy}; where there are none, torch.full((N, {dim}), torch.nan) will do."


def _check_points(x: GeometricTensor, dim: int) -> None:
    if x.tensor.dim() != 2:
        remedy = f"Grids go to ImplicitConv; points are {_points_of(dim)}"
        fail("x", "features of points, (N, C)", f"a grid {tuple(x.tensor.shape)}", remedy)


class ImplicitPointConv(CheckedBias, PointConvBase, Steerable):
    """out_i = bias + Σ_{e: j→i} γ s(|x_e|) K(x_e, a_e) f_j, equivariant for the group of ``in_type``.

    Args:
        in_type, out_type: field types on one gspace (R² or R³), uniform or not.
        edge_attr_type: fields of the edge attributes, without the radial ones, or None.
        n_layers, n_channels, init_scheme: the kernel's MLP.
        sampling, norm, activation, cutoff, table, radial: as in :class:`ImplicitKernel`.
        aggr: ``"sum"`` (``"add"``) or ``"mean"`` over the edges of a node (0 at isolated nodes).
        width: initial σ of the shell s(r) = exp(−½ (r / σ)²), in the unit of the positions: about the length of an
            edge. The first call warns where no edge, or every one, is within its reach.
        bias: whether a learned constant is added to the invariants of the output.
        backend: ``"auto"`` or one of ``implicit_steer.info().backends``; a backend asked for by name runs or raises.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it, what was expected and what came.

    Example:
        >>> gs = escnn.gspaces.flipRot3dOnR3()
        >>> t = gs.type(*[gs.trivial_repr] * 4, *[gs.irrep(1, 1)] * 4)
        >>> conv = ImplicitPointConv(t, t, width=0.5)
        >>> pos = torch.randn(100, 3)
        >>> edges = implicit_steer.knn_graph(pos, k=8)
        >>> x = t(torch.randn(100, t.size), pos)
        >>> conv(x, edges, pos[edges[1]] - pos[edges[0]]).shape
        torch.Size([100, 16])

    Source: Zhdanov, Hoffmann, Cesa, NeurIPS 2023, section 3.4.
    """

    @built_by_escnn
    def __init__(
        self,
        in_type: FieldType,
        out_type: FieldType,
        edge_attr_type: FieldType | None = None,
        n_layers: int = 3,
        n_channels: int = 8,
        init_scheme: str = "he",
        *,
        sampling: str = "auto",
        norm: str | None = "batch",
        activation: str = "elu",
        cutoff: float | None = None,
        aggr: str = "sum",
        width: float = 0.5,
        table: int | str | None = None,
        radial: Radial | None = None,
        bias: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        check_type("in_type", in_type)
        check_type("out_type", out_type, in_type.gspace)
        require(in_type.gspace == out_type.gspace, "out_type", f"fields on {in_type.gspace}", out_type.gspace)
        if edge_attr_type is not None:
            check_type("edge_attr_type", edge_attr_type, in_type.gspace)
        self.in_type, self.out_type, self.edge_attr_type = in_type, out_type, edge_attr_type
        self._set_bias(trivial_bias(out_type, bias))
        self.implicit_kernel = ImplicitKernel(
            in_type,
            out_type,
            edge_attr_type,
            n_layers,
            n_channels,
            init_scheme,
            sampling=sampling,
            norm=norm,
            activation=activation,
            cutoff=cutoff,
            aggr=aggr,
            width=width,
            table=table,
            radial=radial,
        )
        self.implicit_kernel.adopt_bias(self)
        self.backend = backend
        width = self.implicit_kernel.shell_width
        select.check(backend, self.implicit_kernel.plan, width.device, width.dtype)

    def _nodes(self, x: Any, edge_index: Any) -> tuple[Tensor, Tensor, int]:
        x, target = source_and_target(x, "a GeometricTensor")
        dim = self.in_type.gspace.dimensionality
        if not (isinstance(x, GeometricTensor) and (x.type is self.in_type or x.type == self.in_type)):
            got = x.type if isinstance(x, GeometricTensor) else type(x).__name__
            remedy = f"Wrap it: {_points_of(dim)}"
            fail("x", f"a GeometricTensor of type {self.in_type}", got, remedy, TypeError)
        width = self.implicit_kernel.shell_width
        _check_points(x, dim)
        check_tensor("x", x.tensor, (None, self.in_type.size), width.dtype, width.device)
        if isinstance(target, GeometricTensor):
            _check_points(target, dim)
            coords, n_target = target.coords, target.tensor.shape[0]
        else:
            coords, n_target = None, number_of_targets(target, edge_index, "a GeometricTensor")
        if coords is None:
            coords = x.tensor.new_full((n_target, dim), float("nan"))
        return x.tensor, coords, n_target

    def evaluate_output_shape(self, input_shape: tuple, n_target: int | None = None) -> tuple:
        """(N, C_in) → (n_target, C_out), or (N, C_out) where ``n_target`` is None."""
        n, _ = check_shape(input_shape, self.in_type)
        return n if n_target is None else n_target, self.out_type.size

    def _check(self, atol: float, rtol: float) -> Errors:
        """Compare on the graph of a random cloud, with random features and attributes."""
        kernel, n = self.implicit_kernel, 20
        x = torch.randn(n, self.in_type.size, **like(self))
        graph = knn_graph(torch.randn(n, kernel.plan.frame.dim), k=6).to(x.device)
        points = kernel.random_points(graph.shape[1])

        def run(x: Tensor, points: Tensor) -> Tensor:
            delta, attributes = points.split([kernel.plan.frame.dim, kernel.n_attributes], 1)
            coords = x.new_zeros(n, delta.shape[1])
            given = [graph, delta.contiguous(), attributes.contiguous() if kernel.n_attributes else None]
            return self(GeometricTensor(x, self.in_type, coords), *given).tensor

        expected = run(x, points)

        def pair(g: GroupElement) -> tuple[Tensor, Tensor]:
            actual = run(transform(x, self.in_type, g), transform(points, kernel.point_type, g))
            return actual, transform(expected, self.out_type, g)

        return compare(self.in_type.gspace, pair, atol, rtol)

    def _output(self, source: Tensor, graph: Graph, edge_delta: Any, edge_attr: Any, coords: Tensor) -> GeometricTensor:
        if isinstance(edge_attr, GeometricTensor):
            expected = f"a tensor or a GeometricTensor of type {self.edge_attr_type}"
            require(edge_attr.type == self.edge_attr_type, "edge_attr", expected, edge_attr.type, kind=TypeError)
            edge_attr = edge_attr.tensor
        return GeometricTensor(self._evaluate(source, graph, edge_delta, edge_attr), self.out_type, coords)

    def extra_repr(self) -> str:
        """What distinguishes this layer."""
        return f"{self.in_type} -> {self.out_type}, backend={self.backend!r}"


class ImplicitPointConvWithDownsampling(DownsamplingBase, ImplicitPointConv):
    """:class:`ImplicitPointConv` whose output lives on the nodes ``idx_downsampled``."""
