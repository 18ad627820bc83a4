"""Graphs as the operators want them: validated once, with the edges sorted by node."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._check import require

_INT32_MAX = 2**31 - 1


def _is_native(tensor: Tensor) -> bool:
    return tensor.is_cpu and _native.available()[0]


def _sorts_natively(key: Tensor) -> bool:
    return _is_native(key) or (key.is_cuda and _native.cuda_usable(key.device)[0])


def sort_by_key(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Stable sort of ``key`` (E,), integers in 0 .. n-1.

    Returns ``order`` (E,), with ``key[order]`` ascending and equal keys in their given order, and ``offsets`` (n+1,):
    the positions of node k are ``order[offsets[k]:offsets[k + 1]]``. Both have the dtype and device of ``key``.
    """
    if _sorts_natively(key):
        return torch.ops.implicit_steer.sort_by_key(key, n)
    order = torch.argsort(key, stable=True)
    offsets = torch.searchsorted(key[order], torch.arange(n + 1, dtype=key.dtype, device=key.device))
    return order.to(key.dtype), offsets.to(key.dtype)


class Graph:
    """Directed edges j → i, checked once and sorted once, for every layer that works on them.

    Args:
        edge_index: (2, E) integers; row 0 holds the sources j, row 1 the targets i, as in PyG. Any order, any integer
            dtype (int32 and int64 are kept, others become int64), contiguous or not; it is copied. No edges, isolated
            nodes, self-loops and repeated edges are legal.
        num_nodes: the number of nodes, or ``(num_source, num_target)`` when the sources and the targets are different
            sets (a bipartite graph).

    Attributes (not to be written to; all tensors on ``device`` and of ``edge_index``'s dtype):
        num_edges, num_src, num_dst: E, the number of sources, the number of targets.
        edge_index (2, E), src (E,), dst (E,): the edges in the given order.
        order (E,), rowptr (num_dst + 1,): edges by target; the edges into i are ``order[rowptr[i]:rowptr[i + 1]]``,
            in their given order.
        order_by_source (E,), colptr (num_src + 1,): the same by source; sorted at the first use, on the CUDA stream
            that is current then (if several streams share the graph, read them once before the streams part).
        degree (num_dst,): how many edges go into each node.

    Raises:
        TypeError: ``edge_index`` is no tensor of integers, or ``num_nodes`` is no integer or pair of integers.
        ValueError: wrong shape, or an index (negative ones included) outside the nodes. On a GPU such an index is a
            failed assertion of the device, as in torch's own indexing: nothing here waits for the device.

    Example:
        >>> graph = Graph(torch.tensor([[0, 1, 2, 2], [1, 2, 1, 0]]), num_nodes=3)
        >>> graph.order, graph.rowptr
        (tensor([3, 0, 2, 1]), tensor([0, 1, 3, 4]))
    """

    edge_index: Tensor
    src: Tensor
    dst: Tensor
    num_src: int
    num_dst: int
    order: Tensor
    rowptr: Tensor
    _kept_by_source: tuple[Tensor, Tensor] | None = None

    def __init__(self, edge_index: Tensor, num_nodes: int | tuple[int, int]) -> None:
        self.num_src, self.num_dst = _node_counts(num_nodes)
        self.edge_index = _checked_edges(edge_index, self.num_src, self.num_dst)
        self.src, self.dst = self.edge_index.unbind(0)
        self.order, self.rowptr = sort_by_key(self.dst, self.num_dst)

    @classmethod
    def join(cls, graphs: Iterable[Graph]) -> Graph:
        """Several graphs (at least one) side by side as one: nodes and edges are numbered part after part. The sorted
        orders of the parts are put one behind the other; nothing is sorted again.

        The indices are int64, or int32 where the indices of all parts are int32 and the joined ones fit.

        Raises:
            TypeError: ``graphs`` is not a collection of Graphs.
            ValueError: it is empty, or its graphs are on several devices.

        Example:
            >>> pair = Graph(torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
            >>> Graph.join([pair, pair]).edge_index
            tensor([[0, 1, 2, 3],
                    [1, 0, 3, 2]])
        """
        parts = _checked_parts(graphs)
        src, dst, edges = (
            list(accumulate((getattr(part, name) for part in parts), initial=0))
            for name in ("num_src", "num_dst", "num_edges")
        )
        short = all(part.edge_index.dtype == torch.int32 for part in parts)
        short = short and max(src[-1], dst[-1], edges[-1]) <= _INT32_MAX
        dtype = torch.int32 if short else torch.int64
        rows = [_shifted([part.src for part in parts], src, dtype), _shifted([part.dst for part in parts], dst, dtype)]
        order, rowptr = _side_by_side([(part.order, part.rowptr) for part in parts], edges, dtype)
        state = {"edge_index": torch.stack(rows), "num_src": src[-1], "num_dst": dst[-1]}
        joined = object.__new__(cls)
        joined.__setstate__(state | {"order": order, "rowptr": rowptr})
        if all(part._kept_by_source for part in parts):
            joined._kept_by_source = _side_by_side([part._by_source for part in parts], edges, dtype)
        return joined

    @property
    def num_edges(self) -> int:
        """E, the number of edges."""
        return self.edge_index.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.edge_index.device

    @property
    def degree(self) -> Tensor:
        """(num_dst,): how many edges go into each node."""
        return self.rowptr.diff()

    @property
    def _by_source(self) -> tuple[Tensor, Tensor]:
        if self._kept_by_source is not None:
            return self._kept_by_source
        found = sort_by_key(self.src, self.num_src)
        if not torch.compiler.is_compiling():  # what it makes are stand-ins
            self._kept_by_source = found
        return found

    @property
    def order_by_source(self) -> Tensor:
        """(E,): the indices of the edges, sorted by source (stable)."""
        return self._by_source[0]

    @property
    def colptr(self) -> Tensor:
        """(num_src + 1,): the edges out of node j are ``order_by_source[colptr[j]:colptr[j + 1]]``."""
        return self._by_source[1]

    @cached_property
    def number(self) -> int:
        """The number under which the native extension has the graph, sorted by target."""
        return self._bound(self.rowptr[:0], self.rowptr[:0])

    @cached_property
    def number_by_source(self) -> int:
        """The number under which the native extension has the graph, sorted by target and by source."""
        return self._bound(*self._by_source)

    def _bound(self, order_by_source: Tensor, colptr: Tensor) -> int:
        operators = torch.ops.implicit_steer
        tensors = *(self.src, self.order, self.rowptr), order_by_source, colptr
        bound = _native.Number(operators.bind_graph(*tensors), operators.release_graph.default)
        vars(self).setdefault("_numbers", []).append(bound)
        return bound.number

    def to(self, device: torch.device | str | int) -> Graph:
        """The same graph on another device; itself when it is there already."""
        edge_index = self.edge_index.to(device)
        if edge_index is self.edge_index:
            return self
        moved = object.__new__(Graph)
        state = self.__getstate__()
        moved.__setstate__(state | {k: state[k].to(device) for k in ("order", "rowptr")} | {"edge_index": edge_index})
        return moved

    def __getstate__(self) -> dict[str, Any]:
        # Neither src and dst, views that pickle would store in full, nor what is derived at the first use.
        return {k: getattr(self, k) for k in ("edge_index", "num_src", "num_dst", "order", "rowptr")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.src, self.dst = self.edge_index.unbind(0)

    def __repr__(self) -> str:
        nodes = f"{self.num_src}" if self.num_src == self.num_dst else f"({self.num_src}, {self.num_dst})"
        dtype = str(self.edge_index.dtype).removeprefix("torch.")
        return f"Graph(num_nodes={nodes}, num_edges={self.num_edges}, dtype={dtype}, device={self.device})"


def _checked_parts(graphs: Any) -> list[Graph]:
    expected = "a collection of Graphs"
    several = isinstance(graphs, Iterable) and not isinstance(graphs, Tensor)
    require(several, "graphs", expected, type(graphs).__name__, kind=TypeError)
    parts = list(graphs)
    require(len(parts) > 0, "graphs", "at least one graph", "none")
    for number, part in enumerate(parts):
        require(isinstance(part, Graph), f"graphs[{number}]", "a Graph", type(part).__name__, kind=TypeError)
    devices = sorted({str(part.device) for part in parts})
    require(len(devices) == 1, "graphs", "all on one device", " and ".join(devices), "Move them with .to().")
    return parts


def _shifted(parts: Sequence[Tensor], starts: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) + start for part, start in zip(parts, starts, strict=False)])


def _side_by_side(
    parts: Sequence[tuple[Tensor, Tensor]], edges: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Join the results of :func:`sort_by_key` for several parts; the edges of part p start at ``edges[p]``."""
    offsets = _shifted([offsets[1:] for _, offsets in parts], edges, dtype)
    return _shifted([order for order, _ in parts], edges, dtype), torch.cat([offsets.new_zeros(1), offsets])


def _node_counts(num_nodes: Any) -> tuple[int, int]:
    pair = num_nodes if isinstance(num_nodes, (tuple, list)) else (num_nodes, num_nodes)
    expected = "an integer >= 0 or a pair (num_source, num_target)"
    if torch.compiler.is_compiling():  # keep the sizes as they are: some may stand for any size
        return pair[0], pair[1]
    whole = all(hasattr(n, "__index__") and not isinstance(n, (bool, Tensor)) for n in pair)
    require(len(pair) == 2, "num_nodes", expected, f"{len(pair)} values")
    require(whole, "num_nodes", expected, repr(num_nodes), kind=TypeError)
    num_src, num_dst = map(operator.index, pair)
    require(num_src >= 0 and num_dst >= 0, "num_nodes", expected, num_nodes)
    return num_src, num_dst


def _checked_edges(given: Any, num_src: int, num_dst: int) -> Tensor:
    """A contiguous copy in int32 or int64, after every check that later code relies on. It is a copy so that writing
    to ``given`` does not change the graph; a copy of PyG's ``EdgeIndex`` is a plain tensor."""
    require_integers(given, "edge_index")
    expected = "a tensor of shape (2, E)"
    remedy = "Row 0 holds the sources, row 1 the targets; pass edge_index.t() if yours is (E, 2)."
    require(given.dim() == 2 and given.shape[0] == 2, "edge_index", expected, tuple(given.shape), remedy)
    num_edges = given.shape[1]
    dtype = torch.int32 if given.dtype == torch.int32 and num_edges <= _INT32_MAX else torch.int64
    edge_index = torch.empty_like(given, dtype=dtype, memory_format=torch.contiguous_format).copy_(given)
    # A compiled program cannot wait for the answer, nor can the stream of a GPU: they stop at a wrong index.
    if torch.compiler.is_compiling() or edge_index.is_cuda:
        right = (edge_index >= 0).all() & (edge_index[0] < num_src).all() & (edge_index[1] < num_dst).all()
        torch._assert_async(right, "edge_index: expected indices of nodes, in 0 .. num_nodes - 1, got others.")
        return edge_index
    if _is_native(edge_index) and torch.ops.implicit_steer.edges_in_range(edge_index, num_src, num_dst):
        return edge_index
    if num_edges:
        remedy = "Check num_nodes and the order of the rows: sources, then targets."
        require_range("edge_index[0]", edge_index[0], num_src, "sources", remedy)
        require_range("edge_index[1]", edge_index[1], num_dst, "targets", remedy)
    return edge_index


def require_range(name: str, index: Tensor, count: int, things: str, remedy: str) -> None:
    """Raise unless ``index`` (E,), which is not empty and holds one of ``count`` things for each edge, is in range."""
    low, high = torch.stack(torch.aminmax(index)).tolist()
    expected = f"{things} in 0 .. {count - 1}" if count else f"no edges, as there are no {things}"
    require(low >= 0 and high < count, name, expected, f"index {low if low < 0 else high}", remedy)


def require_integers(tensor: Any, name: str) -> None:
    """Raise unless ``tensor`` is a tensor of integers."""
    expected = "a torch.Tensor of integers"
    require(isinstance(tensor, Tensor), name, expected, type(tensor).__name__, kind=TypeError)
    dtype = tensor.dtype
    whole = dtype != torch.bool and not dtype.is_floating_point and not dtype.is_complex
    require(whole, name, expected, dtype, "Convert it, for example with .long().", kind=TypeError)
