"""Graphs as the operators want them: validated once, with the edges sorted by node; and two ways to build edges."""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Callable
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from ._check import require

if TYPE_CHECKING:
    import numpy as np

_INT32_MAX = 2**31 - 1


def _is_native(tensor: Tensor) -> bool:
    return tensor.is_cpu and native.available()[0]


def _sorts_natively(key: Tensor) -> bool:
    return _is_native(key) or (key.is_cuda and native.cuda_usable(key.device)[0])


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
        num_edges, num_src, num_dst: E and the two numbers of nodes.
        edge_index (2, E), src (E,), dst (E,): the edges in the given order.
        order (E,), rowptr (num_dst + 1,): edges by target; those into node i are ``order[rowptr[i]:rowptr[i + 1]]``,
            in their given order.
        order_by_source (E,), colptr (num_src + 1,): the same by source; sorted at the first use, on the CUDA stream
            that is current then (a graph for several streams: ask for them once, before the streams part).
        degree (num_dst,): edges into each node.

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

    def __init__(self, edge_index: Tensor, num_nodes: int | tuple[int, int]) -> None:
        self.num_src, self.num_dst = _node_counts(num_nodes)
        self.edge_index = _checked_edges(edge_index, self.num_src, self.num_dst)
        self.src, self.dst = self.edge_index.unbind(0)
        self.order, self.rowptr = sort_by_key(self.dst, self.num_dst)

    @property
    def num_edges(self) -> int:
        """E."""
        return self.edge_index.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.edge_index.device

    @property
    def degree(self) -> Tensor:
        """(num_dst,): edges into each node."""
        return self.rowptr.diff()

    @cached_property
    def _by_source(self) -> tuple[Tensor, Tensor]:
        return sort_by_key(self.src, self.num_src)

    @property
    def order_by_source(self) -> Tensor:
        """(E,): edge numbers sorted by source, stable."""
        return self._by_source[0]

    @property
    def colptr(self) -> Tensor:
        """(num_src + 1,): the edges out of node j are ``order_by_source[colptr[j]:colptr[j + 1]]``."""
        return self._by_source[1]

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


def _node_counts(num_nodes: Any) -> tuple[int, int]:
    pair = num_nodes if isinstance(num_nodes, (tuple, list)) else (num_nodes, num_nodes)
    expected = "an integer >= 0 or a pair (num_source, num_target)"
    if torch.compiler.is_compiling():  # whole numbers as they are: some may stand for any size
        return pair
    whole = all(hasattr(n, "__index__") and not isinstance(n, (bool, Tensor)) for n in pair)
    require(len(pair) == 2, "num_nodes", expected, f"{len(pair)} numbers")
    require(whole, "num_nodes", expected, repr(num_nodes), kind=TypeError)
    num_src, num_dst = map(operator.index, pair)
    require(num_src >= 0 and num_dst >= 0, "num_nodes", expected, num_nodes)
    return num_src, num_dst


def _checked_edges(given: Any, num_src: int, num_dst: int) -> Tensor:
    """A copy, contiguous, int32 or int64, after every check that later code relies on: whoever writes to ``given``
    afterwards does not change the graph."""
    _require_integers(given, "edge_index")
    edge_index = given
    expected = "a tensor of shape (2, E)"
    remedy = "Row 0 holds the sources, row 1 the targets; pass edge_index.t() if yours is (E, 2)."
    require(edge_index.dim() == 2 and edge_index.shape[0] == 2, "edge_index", expected, tuple(edge_index.shape), remedy)
    num_edges = edge_index.shape[1]
    if edge_index.dtype != torch.int32 or num_edges > _INT32_MAX:
        edge_index = edge_index.to(torch.int64)
    edge_index = edge_index.contiguous()
    if edge_index is given:
        edge_index = given.clone()
    # Neither a compiled program nor a stream of a GPU's work can wait for the answer: they stop where it is wrong.
    if torch.compiler.is_compiling() or edge_index.is_cuda:
        right = (edge_index >= 0).all() & (edge_index[0] < num_src).all() & (edge_index[1] < num_dst).all()
        torch._assert_async(right, "edge_index: expected indices of nodes, in 0 .. num_nodes - 1, got others.")
        return edge_index
    if _is_native(edge_index) and torch.ops.implicit_steer.edges_in_range(edge_index, num_src, num_dst):
        return edge_index
    if num_edges:
        _require_range("edge_index[0]", edge_index[0], num_src, "sources")
        _require_range("edge_index[1]", edge_index[1], num_dst, "targets")
    return edge_index


def _require_range(name: str, index: Tensor, count: int, nodes: str) -> None:
    low, high = torch.stack(torch.aminmax(index)).tolist()
    expected = f"{nodes} in 0 .. {count - 1}" if count else f"no edges, as there are no {nodes}"
    remedy = "Check num_nodes and the order of the rows: sources, then targets."
    require(low >= 0 and high < count, name, expected, f"index {low if low < 0 else high}", remedy)


def _require_integers(tensor: Any, name: str) -> None:
    expected = "a torch.Tensor of integers"
    require(isinstance(tensor, Tensor), name, expected, type(tensor).__name__, kind=TypeError)
    dtype = tensor.dtype
    whole = dtype != torch.bool and not dtype.is_floating_point and not dtype.is_complex
    require(whole, name, expected, dtype, "Convert it, for example with .long().", kind=TypeError)


def _untraced(function: Callable) -> Callable:
    """The function, which torch.compile runs as it is: it looks for neighbours in NumPy's arrays. Compiled code around
    it is in two parts; ``fullgraph=True`` is an error with this reason."""

    @wraps(function)
    def call(*args, **options):
        # torch.compiler.disable imports the compiler; where it is not there, there is nothing to disable.
        run = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
        return run(*args, **options)

    call._torchdynamo_disable = True
    call._torchdynamo_disable_msg = "build graphs outside of the compiled function and pass their edges"
    return call


@_untraced
def radius_graph(
    pos: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    cell: Tensor | None = None,
    pbc: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """All pairs of points at most ``r`` apart: edges j → i with |pos_j − pos_i| ≤ r, as in PyG, without a limit on
    the number of neighbours. In a periodic box (``cell``) all pairs of images: |pos_i − pos_j + shift · cell| ≤ r.

    Args:
        pos: (N, D) positions, floating point, finite. Detached: no gradient flows through the choice of edges.
            Distances are computed in float64.
        r: the radius, > 0, in the units of ``pos``; ``inf`` connects all points.
        batch: (N,) integers; only points with equal entries are connected. In any order.
        loop: whether each point is connected to itself. Other points at distance 0 always count, and so do a point's
            own images in other cells.
        cell: (D, D), rows = lattice vectors, or (B, D, D), one for each value 0 .. B−1 of ``batch``; None: no box. Any
            shape, also one smaller than ``r``: all images in reach count. Points may lie outside the box.
        pbc: which lattice vectors repeat: a bool, or D of them; None: all. The other rows of ``cell`` are not used.

    Returns:
        Without ``cell``: ``edge_index`` (2, E), int64, on the device of ``pos``; row 0 = neighbour j, row 1 = centre i;
        sorted by centre, then by neighbour.

        With ``cell``: ``(edge_index, shift)``, shift (E, D) whole numbers in the dtype of ``pos``, sorted also by
        shift. The vector of an edge, through which gradients flow to ``pos`` and ``cell``, is
        ``pos[i] - pos[j] + shift @ cell``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> radius_graph(torch.tensor([[0.0], [1.0], [3.0]]), r=1.5)
        tensor([[1, 0],
                [0, 1]])
        >>> radius_graph(torch.tensor([[0.0], [1.0], [3.0]]), r=1.5, cell=torch.tensor([[4.0]]))
        (tensor([[1, 2, 0, 0],
                [0, 0, 1, 2]]), tensor([[ 0.],
                [ 1.],
                [ 0.],
                [-1.]]))
    """
    points, segments = _points(pos, batch)
    real = isinstance(r, numbers.Real) and not isinstance(r, bool)
    require(real, "r", "a number > 0", repr(r), kind=TypeError)
    require(r > 0, "r", "a number > 0", r)
    if cell is not None:
        return _periodic_graph(pos, points, segments, r, batch, loop, cell, pbc)
    require(pbc is None or not _any(pbc), "cell", "the lattice vectors of a periodic box", None)

    def neighbours(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np
        from scipy.spatial import cKDTree

        low, high = cKDTree(points).query_pairs(r, output_type="ndarray").T
        itself = np.arange(len(points) if loop else 0)
        return np.concatenate([low, high, itself]), np.concatenate([high, low, itself])

    edge_index = _edges_per_segment(points, segments, neighbours)
    # A stable sort by neighbour followed by one by centre sorts by both.
    edge_index = edge_index[:, sort_by_key(edge_index[0], len(points))[0]]
    return _sorted_by_centre(edge_index, len(points)).to(pos.device)


def _any(flags: Any) -> bool:
    return bool(flags) if isinstance(flags, bool) else any(flags)


def _periodic_graph(pos, points, segments, r, batch, loop, cell, pbc) -> tuple[Tensor, Tensor]:
    """:func:`radius_graph` with a cell; ``points``, ``segments`` of :func:`_points`."""
    import numpy as np

    from .periodic import checked_cell, periodic_pairs

    cells, periodic = checked_cell(cell, pbc, points.shape[1])
    if cells.ndim == 3:
        require(batch is not None, "batch", "the cell of each point, as there are several", None)
        labels = [int(batch[segment[0]]) for segment in segments]
        fits = all(0 <= label < len(cells) for label in labels)
        require(fits, "batch", f"labels in 0 .. {len(cells) - 1}, one for each cell", labels)
        cells = cells[labels]
    else:
        cells = [cells] * len(segments)
    edges, shifts = [np.empty((2, 0), np.int64)], [np.empty((0, points.shape[1]))]
    for segment, vectors in zip(segments, cells, strict=True):
        neighbour, centre, shift = periodic_pairs(points[segment], float(r), vectors, periodic, loop)
        edges.append(segment[np.stack([neighbour, centre])])
        shifts.append(shift)
    edge_index = torch.from_numpy(np.concatenate(edges, axis=1))
    order, _ = sort_by_key(edge_index[1], len(points))
    shift = torch.from_numpy(np.concatenate(shifts)).to(pos.dtype)
    return edge_index[:, order].to(pos.device), shift[order].to(pos.device)


@_untraced
def knn_graph(pos: Tensor, k: int, batch: Tensor | None = None, loop: bool = False) -> Tensor:
    """The ``k`` nearest neighbours of every point: edges j → i, as in PyG.

    Args:
        pos: (N, D) positions, floating point, finite. Detached: no gradient flows through the choice of edges.
            Distances are computed in float64.
        k: neighbours per point, ≥ 1; a point with fewer others gets all there are.
        batch: (N,) integers; only points with equal entries are connected. In any order.
        loop: whether a point is its own neighbour and counts among the ``k``. Other points at distance 0 always count.

    Returns:
        ``edge_index`` (2, E), int64, on the device of ``pos``; row 0 = neighbour j, row 1 = centre i; sorted by
        centre, then by distance. Which of several neighbours at the same distance come first is arbitrary, but the
        same in every run.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> knn_graph(torch.tensor([[0.0], [1.0], [3.0]]), k=1)
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    points, segments = _points(pos, batch)
    whole = hasattr(k, "__index__") and not isinstance(k, (bool, Tensor))
    require(whole, "k", "an integer >= 1", repr(k), kind=TypeError)
    require(k >= 1, "k", "an integer >= 1", k)

    others = operator.index(k) - bool(loop)  # a point's place among its own neighbours does not depend on its copies

    def neighbours(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np
        from scipy.spatial import cKDTree

        n = len(points)
        centre = np.arange(n)[:, None]
        _, nearest = cKDTree(points).query(points, k=range(1, min(others + 1, n) + 1))  # [n, m], by distance
        keep = nearest != centre
        keep[keep.all(axis=1), -1] = False  # too many copies of a point: it is not among its own nearest
        nearest = nearest[keep].reshape(n, -1)
        if loop:
            nearest = np.hstack([centre, nearest])
        return nearest.ravel(), np.broadcast_to(centre, nearest.shape).ravel()

    return _sorted_by_centre(_edges_per_segment(points, segments, neighbours), len(points)).to(pos.device)


def _points(pos: Any, batch: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Positions (N, D) in float64 and, per non-empty segment of the batch, the numbers of its points."""
    import numpy as np

    expected = "a floating point tensor of shape (N, D), D >= 1"
    require(isinstance(pos, Tensor), "pos", expected, type(pos).__name__, kind=TypeError)
    require(
        pos.is_floating_point(), "pos", expected, pos.dtype, "Convert it, for example with .float().", kind=TypeError
    )
    require(pos.dim() == 2 and pos.shape[1] >= 1, "pos", expected, tuple(pos.shape))
    points = pos.detach().to("cpu", torch.float64).numpy()
    finite = np.isfinite(points).all(axis=1)
    require(finite.all(), "pos", "finite positions", f"NaN or Inf in {np.count_nonzero(~finite)} of {len(points)} rows")
    if batch is None:
        return points, [np.arange(len(points))] if len(points) else []
    _require_integers(batch, "batch")
    require(batch.shape == pos.shape[:1], "batch", f"shape ({len(points)},), one per row of pos", tuple(batch.shape))
    labels, inverse = torch.unique(batch.cpu(), return_inverse=True)
    order, offsets = sort_by_key(inverse, len(labels))
    return points, np.split(order.numpy(), offsets[1:-1].numpy()) if len(labels) else []


_Neighbours = Callable[["np.ndarray"], tuple["np.ndarray", "np.ndarray"]]


def _edges_per_segment(points: np.ndarray, segments: list[np.ndarray], neighbours: _Neighbours) -> Tensor:
    """(2, E): ``neighbours(points of a segment)``, (neighbour, centre) within it, for all segments together."""
    import numpy as np

    edges = [segment[np.stack(neighbours(points[segment]))] for segment in segments]
    return torch.from_numpy(np.concatenate(edges, axis=1) if edges else np.empty((2, 0), dtype=np.int64))


def _sorted_by_centre(edge_index: Tensor, num_nodes: int) -> Tensor:
    return edge_index[:, sort_by_key(edge_index[1], num_nodes)[0]]
