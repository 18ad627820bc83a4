"""The convolution on graphs, on plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._check import fail, require
from ..graph import EdgeTypes, Graph
from ..ops import conv as op
from ..ops import select
from ..ops.autocast import without_autocast
from ..ops.backend import Backend
from .fields import Fields, check_tensor
from .frozen import copied, freeze
from .kernel import Biased, KernelBase


class PointConvBase(Biased):
    """out_i = bias + Σ_{e: j→i} γ s(|x_e|) K(x_e, a_e) f_j, on tensors.

    A subclass sets ``implicit_kernel``, which adopts the bias, and ``backend``; it reads its features in :meth:`_nodes`
    and makes its output in :meth:`_output`.
    """

    backend: str
    # _nodes: (x, edge_index) → the sources' features (N, C_in); the targets' coordinates, or None where features have
    # none; how many targets there are. _output: (source, graph, edge_delta, edge_attr, coords) → the targets' features.
    _nodes: Callable[[Any, Any], tuple[Tensor, Tensor | None, int]]
    _output: Callable[[Tensor, Graph, Any, Any, Tensor | None], Any]

    def forward(
        self,
        x: Any,
        edge_index: Tensor | Graph | None = None,
        edge_delta: Tensor | None = None,
        edge_attr: Any = None,
    ) -> Any:
        """Convolve; ``edge_index`` and ``edge_delta`` are required.

        Args:
            x: features of ``in_type``, (N, C_in): a GeometricTensor where fields have escnn's types, else a tensor. For
                a graph between two sets it is a pair (source features, targets), where the targets are features, of
                which only number and coordinates count, or their number, or None if ``edge_index`` is a Graph, which
                knows it. escnn insists on coordinates of points; the layer reads ``edge_delta`` alone, so NaN will do.
            edge_index: (2, E) integers, row 0 = source j, row 1 = target i, in any order; or a :class:`Graph`, sorted
                once and shared by every layer.
            edge_delta: (E, dim), the position of the target minus the position of the source.
            edge_attr: (E, A), plain or a GeometricTensor; or :class:`~implicit_steer.EdgeTypes`, where edges have few
                different attributes; None if the layer has no attributes.

        Returns:
            (N_target, C_out) of ``out_type``; a GeometricTensor has the targets' coordinates (NaN where they are not
            known).
        """
        source, coords, n_target = self._nodes(x, edge_index)
        graph = self._graph(edge_index, source.shape[0], n_target)
        return self._output(source, graph, edge_delta, edge_attr, coords)

    def _select(self) -> tuple[Backend, str]:
        width = self.implicit_kernel.shell_width
        return select.choose(self.backend, self.implicit_kernel.plan, width.device, width.dtype)

    def explain(self) -> str:
        """Group, sampling, frame, costs, and which backend runs and why."""
        return f"{self.implicit_kernel.describe()}\n  backend    {self._select()[1]}"

    def freeze_table(self, rows: Tensor | None = None, knots: int | str | None = None) -> ImplicitPointConv:
        """The layer of evaluation mode without its MLP: splines of the distance take the place of the hidden layers
        and batch norms. It is a layer on plain tensors, whose parameters are copies; the splines' coefficients are
        parameters, too.

        Args:
            rows: (T, A) the rows of attributes that edges can have, each of which gets splines of its own; None: those
                of the last call with :class:`~implicit_steer.EdgeTypes`. Other rows are refused afterwards.
            knots: how many knots, or ``"auto"``; None: as many as the layer's table has.

        Raises:
            ValueError: a layer without a table where ``knots`` is None; a kernel that is no function of the radius
                alone; a frozen layer; attributes whose rows are not known.

        Example:
            >>> conv = implicit_steer.irreps.ImplicitPointConv("8x0e", "8x0e + 8x1o", table=256)
            >>> conv.freeze_table().implicit_kernel.plan.table.error < 1e-5
            True
        """
        kernel = freeze(self.implicit_kernel, rows, knots)
        into, out = (Fields(t.size, str(t)) for t in (self.in_type, self.out_type))
        linear = copy.deepcopy(self.linear) if isinstance(self, PlainPointConv) else None
        made = ImplicitPointConvWithDownsampling if isinstance(self, DownsamplingBase) else ImplicitPointConv
        plain = made(into, out, kernel, self.backend, self.n_bias, linear)
        if self.bias is not None:
            plain.bias = copied(self.bias)
            plain.share_exact(self)
        return plain.train(self.training).to(self.implicit_kernel.shell_width.device)

    @staticmethod
    def _graph(edge_index: Any, n_source: int, n_target: int) -> Graph:
        if edge_index is None:
            remedy = (
                "A point convolution is called with its graph, conv(x, edge_index, edge_delta). A SequentialModule "
                "passes features alone: call the layers one by one."
            )
            fail("edge_index", "(2, E) integers or a Graph", None, remedy, TypeError)
        if not isinstance(edge_index, Graph):
            return Graph(edge_index, (n_source, n_target))
        sizes = (edge_index.num_src, edge_index.num_dst)
        if sizes != (n_source, n_target):
            expected = f"a graph on {n_source} source and {n_target} target nodes (the rows of x)"
            fail("edge_index", expected, f"one on {sizes[0]} and {sizes[1]}")
        return edge_index

    def _evaluate(
        self, source: Tensor, graph: Graph, edge_delta: Tensor, edge_attr: Tensor | EdgeTypes | None
    ) -> Tensor:
        """(N_target, C_out) from checked features and an unchecked geometry. The arithmetic has the parameters' dtype,
        also under torch.autocast."""
        kernel = self.implicit_kernel
        attributes = kernel.check_points("edge", edge_delta, edge_attr, graph.num_edges)
        if graph.device != source.device:
            fail("edge_index", f"device {source.device}", graph.device)
        kernel.check_reach(edge_delta)
        with without_autocast(source):
            kernel.choose_knots(attributes)
            out, statistics = op.implicit_conv(
                kernel.plan,
                kernel.parameters_for_op(),
                graph,
                source,
                edge_delta,
                attributes,
                statistics_from=kernel.statistics_source(graph.num_edges),
                backend=self.backend,
            )
            if len(statistics):
                kernel.update_running(statistics)
        if out.dtype != source.dtype:
            out = out.to(source.dtype)  # 16-bit features: rounded once, here
        return out


def source_and_target(x: Any, features: str) -> tuple[Any, Any]:
    """A pair (source, target), or ``x`` as both.

    Raises:
        ValueError: another number of entries; the message adds ``features``, which the caller takes as well.
    """
    if not isinstance(x, tuple):
        return x, x
    require(len(x) == 2, "x", f"{features} or a pair (source, target)", f"{len(x)} entries")
    return x


def number_of_targets(target: Any, edge_index: Any, features: str) -> int:
    """How many nodes ``target``, the second of a pair (source, target), stands for: itself, or None for the graph's.

    Raises:
        TypeError: ``target`` is neither; the message adds ``features``, which the caller takes as well.
    """
    if target is None and isinstance(edge_index, Graph):
        return edge_index.num_dst
    expected, remedy = f"{features} or a number of nodes as target", ""
    if target is None:
        expected += ", or None with a Graph"
        remedy = "Pass (x, num_target), or Graph(edge_index, (num_source, num_target)) as edge_index."
    whole = isinstance(target, int) and not isinstance(target, bool) and target >= 0
    got = target if isinstance(target, int) or target is None else type(target).__name__
    require(whole, "x", expected, got, remedy, kind=TypeError)
    return target


def check_chosen(x: Any, idx_downsampled: Any, n: int) -> None:
    """Raise unless ``x`` is one set of nodes and ``idx_downsampled`` holds (M,) integers in 0 .. n-1."""
    remedy = "idx_downsampled says which of the nodes are the targets; leave it out with a pair (source, target)."
    require(not isinstance(x, tuple), "x", "the features of all nodes", "a pair", remedy)
    ok = isinstance(idx_downsampled, Tensor) and idx_downsampled.dim() == 1
    ok = ok and not idx_downsampled.is_floating_point() and idx_downsampled.dtype not in (torch.bool, torch.complex64)
    got = getattr(idx_downsampled, "dtype", type(idx_downsampled).__name__)
    require(ok, "idx_downsampled", "a 1-D integer tensor", got, kind=TypeError)
    if len(idx_downsampled):
        low, high = int(idx_downsampled.min()), int(idx_downsampled.max())
        require(low >= 0 and high < n, "idx_downsampled", f"indices in 0..{n - 1}", f"{low}..{high}")


class DownsamplingBase(PointConvBase):
    """A point convolution onto a subset of the nodes."""

    def forward(
        self,
        x: Any,
        edge_index: Tensor | Graph | None = None,
        edge_delta: Tensor | None = None,
        edge_attr: Any = None,
        idx_downsampled: Tensor | None = None,
    ) -> Any:
        """Convolve onto the nodes ``idx_downsampled``.

        Args:
            x: features of all nodes, (N, C_in); a pair (source, target) only without ``idx_downsampled``.
            edge_index: (2, E); row 0 indexes all nodes, row 1 the chosen ones (0 … M − 1); or a Graph of (N, M) nodes.
            edge_delta, edge_attr: as in :class:`ImplicitPointConv`.
            idx_downsampled: (M,) integers: the nodes that are kept; None keeps all.

        Returns:
            (M, C_out); GeometricTensors have the chosen nodes' coordinates (NaN where they are not known).
        """
        if idx_downsampled is None:
            return super().forward(x, edge_index, edge_delta, edge_attr)
        source, coords, n = self._nodes(x, edge_index)
        check_chosen(x, idx_downsampled, n)
        graph = self._graph(edge_index, n, len(idx_downsampled))
        chosen = None if coords is None else coords.index_select(0, idx_downsampled.long())
        return self._output(source, graph, edge_delta, edge_attr, chosen)


class PlainPointConv(PointConvBase):
    """A point convolution between plain tensors. A subclass sets ``linear``, which mixes the output, or None."""

    linear: torch.nn.Module | None

    def _nodes(self, x: Any, edge_index: Any) -> tuple[Tensor, None, int]:
        x, target = source_and_target(x, "a tensor")
        kernel = self.implicit_kernel
        width = kernel.shell_width
        check_tensor("x", x, (None, kernel.plan.in_size), width.dtype, width.device)
        if isinstance(target, Tensor) and target.dim() > 0:
            return x, None, target.shape[0]
        return x, None, number_of_targets(target, edge_index, "a tensor")

    def _output(self, source: Tensor, graph: Graph, edge_delta: Any, edge_attr: Any, coords: Tensor | None) -> Tensor:
        y = self._evaluate(source, graph, edge_delta, edge_attr)
        return y if self.linear is None else self.linear(y)

    def explain(self) -> str:
        """Group, sampling, frame, costs, and which backend runs and why."""
        mixed = "" if self.linear is None else f"\n  then       Linear, {self.linear.extra_repr()}"
        return super().explain() + mixed

    def extra_repr(self) -> str:
        """What distinguishes this layer."""
        return f"{self.in_type} -> {self.out_type}, backend={self.backend!r}"


class ImplicitPointConv(PlainPointConv):
    """out_i = bias + Σ_{e: j→i} γ s(|x_e|) K(x_e, a_e) f_j, without escnn: plain tensors in, a plain tensor out.

    Args:
        in_type, out_type: sizes and names of the features.
        implicit_kernel: K.
        backend: as in :class:`implicit_steer.nn.ImplicitPointConv`; it has to be available when the module is called.
        n_bias: how many learned values the bias has.
        linear: a map that mixes the output, as depthwise layers on irreps have; or None.

    Example:
        >>> conv = implicit_steer.load("conv.safetensors")  # as saved in the example of implicit_steer.save
        >>> pos, x = torch.randn(100, 3), torch.randn(100, 16)
        >>> edges = implicit_steer.knn_graph(pos, k=8)
        >>> conv(x, edges, pos[edges[1]] - pos[edges[0]]).shape
        torch.Size([100, 16])
    """

    def __init__(
        self,
        in_type: Fields,
        out_type: Fields,
        implicit_kernel: KernelBase,
        backend: str,
        n_bias: int,
        linear: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        require(backend in select.NAMES, "backend", f"one of {select.NAMES}", repr(backend))
        self.in_type, self.out_type, self.backend, self.linear = in_type, out_type, backend, linear
        kernel_out: Any = out_type
        if linear is not None:
            mixed: Any = linear.out_type
            kernel_out = linear.in_type
            require(mixed.size == out_type.size, "linear", f"{out_type.size} outputs", mixed.size)
        self._set_bias(torch.zeros(out_type.size, n_bias))
        self.implicit_kernel = implicit_kernel
        implicit_kernel.adopt_bias(self)
        self._check_sizes(kernel_out)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("in_type", "out_type", "implicit_kernel", "backend", "n_bias", "linear")
        return {name: getattr(self, name) for name in names}


class ImplicitPointConvWithDownsampling(DownsamplingBase, ImplicitPointConv):
    """:class:`ImplicitPointConv` whose output lives on the nodes ``idx_downsampled``."""
