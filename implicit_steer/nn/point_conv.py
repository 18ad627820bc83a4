"""Steerable convolution on point clouds and graphs with an implicit kernel."""

from __future__ import annotations

import torch
from escnn.group import GroupElement
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import fail, require
from ..graph import Graph
from ..graph.neighbours import knn_graph
from ..layers.fields import check_tensor
from ..layers.point_conv import PointConvBase, check_chosen, number_of_targets
from ..ops import select
from .building import built_by_escnn
from .equivariant import Errors, Steerable, check_shape, compare, like, transform
from .kernel import CheckedBias, ImplicitKernel, check_type, trivial_bias


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
        edge_attr_type: fields of the edge attributes, or None.
        n_layers, n_channels, init_scheme: the kernel's MLP.
        sampling, norm, activation, cutoff: see :class:`ImplicitKernel`.
        aggr: ``"sum"`` (``"add"``) or ``"mean"`` over the edges of a node (0 at isolated nodes).
        width: of the shell s(r) = exp(−½ (r / σ)²): σ at first, in the unit of the positions, about the length of an
            edge. The first call warns where no edge, or every one, is within its reach.
        bias: whether a learned constant is added to the invariants of the output.
        backend: ``"auto"`` or one of ``implicit_steer.info().backends``; a backend asked for by name runs or raises.

    Raises:
        ValueError, TypeError: wrong argument, naming it, what was expected and what came.

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
        )
        self.implicit_kernel.adopt_bias(self)
        self.backend = backend
        width = self.implicit_kernel.shell_width
        select.check(backend, self.implicit_kernel.plan, width.device, width.dtype)

    def forward(
        self,
        x: GeometricTensor | tuple,
        edge_index: Tensor | Graph | None = None,
        edge_delta: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> GeometricTensor:
        """Convolve; ``edge_index`` and ``edge_delta`` are needed.

        Args:
            x: features of ``in_type``, (N, C_in); or a pair (source features, targets) for a graph between two sets:
                the targets' features, of which only number and coordinates count, or their number, or None where
                ``edge_index`` is a Graph, which knows it. Features without positions: ``in_type(x, coords)`` with any
                coords, NaN for instance; escnn insists on them, the layer reads ``edge_delta`` alone.
            edge_index: (2, E) integers, row 0 = source j, row 1 = target i, in any order; or a :class:`Graph`, sorted
                once and shared by every layer.
            edge_delta: (E, dim), position of the target minus that of the source.
            edge_attr: (E, A), plain or a GeometricTensor; None if the layer has no attribute type.

        Returns:
            (N_target, C_out) of ``out_type``, at the targets' coordinates (NaN where they are not known).
        """
        kernel = self.implicit_kernel
        source, coords, n_target = self._nodes(kernel, x, edge_index)
        graph = self._graph(edge_index, source.shape[0], n_target)
        return self._convolve(kernel, source, graph, edge_delta, edge_attr, coords)

    def _nodes(self, kernel: ImplicitKernel, x, edge_index) -> tuple[Tensor, Tensor, int]:
        """The sources' features; coordinates and number of the targets."""
        target = x
        if isinstance(x, tuple):
            require(len(x) == 2, "x", "a GeometricTensor or a pair (source, target)", f"{len(x)} entries")
            x, target = x
        dim = self.in_type.gspace.dimensionality
        if not (isinstance(x, GeometricTensor) and (x.type is self.in_type or x.type == self.in_type)):
            got = x.type if isinstance(x, GeometricTensor) else type(x).__name__
            remedy = f"Wrap it: {_points_of(dim)}"
            fail("x", f"a GeometricTensor of type {self.in_type}", got, remedy, TypeError)
        width = kernel.shell_width
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
        """(N, C_in) → (n_target, C_out), as many targets as sources where None."""
        n, _ = check_shape(input_shape, self.in_type)
        return n if n_target is None else n_target, self.out_type.size

    def _check(self, atol: float, rtol: float) -> Errors:
        """On a random cloud, its graph, random features and attributes."""
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
            actual = run(transform(x, self.in_type, g), transform(points, kernel.mlp.in_type, g))
            return actual, transform(expected, self.out_type, g)

        return compare(self.in_type.gspace, pair, atol, rtol)

    def _convolve(
        self, kernel: ImplicitKernel, source: Tensor, graph: Graph, edge_delta, edge_attr, coords
    ) -> GeometricTensor:
        if isinstance(edge_attr, GeometricTensor):
            expected = f"a tensor or a GeometricTensor of type {self.edge_attr_type}"
            require(edge_attr.type == self.edge_attr_type, "edge_attr", expected, edge_attr.type, kind=TypeError)
            edge_attr = edge_attr.tensor
        return GeometricTensor(self._evaluate(kernel, source, graph, edge_delta, edge_attr), self.out_type, coords)

    def extra_repr(self) -> str:
        """What distinguishes this layer."""
        return f"{self.in_type} -> {self.out_type}, backend={self.backend!r}"


class ImplicitPointConvWithDownsampling(ImplicitPointConv):
    """:class:`ImplicitPointConv` whose output lives on a subset of the nodes."""

    def forward(
        self,
        x: GeometricTensor,
        edge_index: Tensor | Graph | None = None,
        edge_delta: Tensor | None = None,
        edge_attr: Tensor | None = None,
        idx_downsampled: Tensor | None = None,
    ) -> GeometricTensor:
        """Convolve onto the nodes ``idx_downsampled``.

        Args:
            x: features of all nodes, (N, C_in); a pair (source, target) only without ``idx_downsampled``.
            edge_delta, edge_attr: as in :class:`ImplicitPointConv`.
            edge_index: (2, E); row 0 indexes all nodes, row 1 the chosen ones (0 … M − 1); or a Graph of (N, M) nodes.
            idx_downsampled: (M,) integers: which nodes are kept; None keeps all.

        Returns:
            (M, C_out), with the chosen nodes' coordinates (NaN where they are not known).
        """
        if idx_downsampled is None:
            return super().forward(x, edge_index, edge_delta, edge_attr)
        kernel = self.implicit_kernel
        source, coords, n = self._nodes(kernel, x, edge_index)
        check_chosen(x, idx_downsampled, n)
        graph = self._graph(edge_index, n, len(idx_downsampled))
        return self._convolve(
            kernel, source, graph, edge_delta, edge_attr, coords.index_select(0, idx_downsampled.long())
        )
