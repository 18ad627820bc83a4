"""Edges from positions: within a radius or the nearest, in one cloud or between two, and across periodic boundaries."""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .._check import fail, require
from .graph import require_integers, sort_by_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

_P = ParamSpec("_P")
_R = TypeVar("_R")
_FLOWS = ("source_to_target", "target_to_source")


def _untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make torch.compile run ``function`` uncompiled, since it looks for neighbours in NumPy arrays. The compiled code
    around it is split in two; ``fullgraph=True`` is an error with this reason."""

    @wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        # torch.compiler.disable imports the compiler; where it is not there, there is nothing to disable.
        run = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
        return run(*args, **options)

    reason = "build graphs outside of the compiled function and pass their edges"
    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
    return call


@_untraced
def radius_graph(
    pos: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int | None = None,
    flow: str = "source_to_target",
    **unknown: Any,
) -> Tensor:
    """All pairs of points at most ``r`` apart: edges j → i with |pos_j − pos_i| ≤ r, as in PyG. In a periodic box:
    :func:`periodic_radius_graph`.

    Args:
        pos: (N, D) positions, floating point, finite. Detached: no gradient flows through the choice of edges.
            Distances are computed in float64.
        r: the radius, > 0, in the units of ``pos``; ``inf`` connects all points.
        batch: (N,) integers; only points with equal entries are connected. In any order.
        loop: whether each point is connected to itself. Other points at distance 0 always count.
        max_num_neighbors: a point with more neighbours keeps the nearest, and of equally distant ones those of lower
            index; with ``loop`` it counts itself, first. None: no limit. PyG's default is 32, and it keeps arbitrary
            ones. With a limit, j → i no longer means that there is i → j.
        flow: PyG's. ``"target_to_source"`` exchanges the rows, for code that sums into row 0; layers here sum into
            row 1.

    Returns:
        ``edge_index`` (2, E), int64, on the device of ``pos``; row 0 = neighbour j, row 1 = centre i; sorted by centre,
        then by neighbour.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> radius_graph(torch.tensor([[0.0], [1.0], [3.0]]), r=2.5)
        tensor([[1, 0, 2, 1],
                [0, 1, 1, 2]])
        >>> radius_graph(torch.tensor([[0.0], [1.0], [3.0]]), r=2.5, max_num_neighbors=1)
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    for name in unknown:
        remedy = "Neighbours in a periodic box: periodic_radius_graph(pos, r, cell, pbc)."
        fail(name, "no argument of this name", "one", remedy, TypeError)
    points, segments = _points("pos", pos, "batch", batch)
    _check_radius(r)
    _check_loop(loop)
    most = None if max_num_neighbors is None else _count("max_num_neighbors", max_num_neighbors, " or None")
    _check_flow(flow)

    def within(chosen: NDArray[Any], _: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        import numpy as np
        from scipy.spatial import cKDTree

        here = points[chosen]
        low, high = cKDTree(here).query_pairs(r, output_type="ndarray").T
        itself = np.arange(len(here) if loop else 0)
        neighbour, centre = np.concatenate([low, high, itself]), np.concatenate([high, low, itself])
        if most is None:
            return neighbour, centre
        apart = np.linalg.norm(here[low] - here[high], axis=1)
        return _nearest(neighbour, centre, np.concatenate([apart, apart, np.full(len(itself), -1.0)]), most)

    edge_index = _sorted_by_both(_edges(_paired(segments, segments), within), len(points), len(points))
    return _directed(edge_index, flow).to(pos.device)


@_untraced
def periodic_radius_graph(
    pos: Tensor, r: float, cell: Tensor, pbc: Any = None, batch: Tensor | None = None, loop: bool = False
) -> tuple[Tensor, Tensor]:
    """All pairs of points at most ``r`` apart in a periodic box, one edge for each image of a point: edges j → i with
    |pos_i − pos_j + shift · cell| ≤ r.

    Args:
        pos, r, batch, loop: as :func:`radius_graph` takes them. Points may lie outside the box; a point's own images in
            other cells are neighbours with and without ``loop``.
        cell: (D, D), rows = lattice vectors, or (B, D, D), one for each value 0 .. B−1 of ``batch``. Any shape, also
            one smaller than ``r``: all images in reach count.
        pbc: which lattice vectors repeat: a bool, or D of them; None: all. The other rows of ``cell`` are not used.

    Returns:
        ``(edge_index, shift)``: (2, E), int64, row 0 = neighbour j, row 1 = centre i; (E, D), whole numbers in the
        dtype of ``pos``; both on its device, sorted by centre, then by neighbour, then by shift. The vector of an edge,
        through which gradients flow to ``pos`` and ``cell``, is ``pos[i] - pos[j] + shift @ cell``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> periodic_radius_graph(torch.tensor([[0.0], [1.0], [3.0]]), r=1.5, cell=torch.tensor([[4.0]]))
        (tensor([[1, 2, 0, 0],
                [0, 0, 1, 2]]), tensor([[ 0.],
                [ 1.],
                [ 0.],
                [-1.]]))
    """
    import numpy as np

    from .periodic import checked_cell, periodic_pairs

    points, segments = _points("pos", pos, "batch", batch)
    _check_radius(r)
    _check_loop(loop)
    cells, periodic = checked_cell(cell, pbc, points.shape[1])
    if cells.ndim == 3:
        require(batch is not None, "batch", "the cell of each point, as there are several", None)
        labels = [label for label in segments if label is not None]
        fits = all(0 <= label < len(cells) for label in labels)
        require(fits, "batch", f"labels in 0 .. {len(cells) - 1}, one for each cell", labels)
        own = list(cells[labels])
    else:
        own = [cells] * len(segments)
    edges, shifts = [np.empty((2, 0), np.int64)], [np.empty((0, points.shape[1]))]
    for segment, vectors in zip(segments.values(), own, strict=True):
        neighbour, centre, shift = periodic_pairs(points[segment], float(r), vectors, periodic, loop)
        edges.append(segment[np.stack([neighbour, centre])])
        shifts.append(shift)
    edge_index = torch.from_numpy(np.concatenate(edges, axis=1))
    order, _ = sort_by_key(edge_index[1], len(points))
    all_shifts = torch.from_numpy(np.concatenate(shifts)).to(pos.dtype)
    return edge_index[:, order].to(pos.device), all_shifts[order].to(pos.device)


@_untraced
def knn_graph(
    pos: Tensor, k: int, batch: Tensor | None = None, loop: bool = False, flow: str = "source_to_target"
) -> Tensor:
    """The ``k`` nearest neighbours of every point: edges j → i, as in PyG.

    Args:
        pos: (N, D) positions, floating point, finite. Detached: no gradient flows through the choice of edges.
            Distances are computed in float64.
        k: neighbours per point, ≥ 1; a point with fewer others gets all there are.
        batch: (N,) integers; only points with equal entries are connected. In any order.
        loop: whether a point is its own neighbour and counts among the ``k``. Other points at distance 0 always count.
        flow: as in :func:`radius_graph`.

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
    points, segments = _points("pos", pos, "batch", batch)
    _check_loop(loop)
    others = _count("k", k) - loop  # a point's place among its own neighbours does not depend on its copies
    _check_flow(flow)

    def nearest_others(chosen: NDArray[Any], _: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Neighbours and centres (E,), as indices into ``chosen``: the nearest other points of each, by distance; with
        ``loop`` each point comes first among its own."""
        import numpy as np
        from scipy.spatial import cKDTree

        n = len(chosen)
        centre = np.arange(n)[:, None]
        here = points[chosen]
        _, nearest = cKDTree(here).query(here, k=range(1, min(others + 1, n) + 1))  # [n, m], by distance
        keep = nearest != centre
        keep[keep.all(axis=1), -1] = False  # too many copies of a point: it is not among its own nearest
        nearest = nearest[keep].reshape(n, -1)
        if loop:
            nearest = np.hstack([centre, nearest])
        return nearest.ravel(), np.broadcast_to(centre, nearest.shape).ravel()

    edge_index = _sorted_by_centre(_edges(_paired(segments, segments), nearest_others), len(points))
    return _directed(edge_index, flow).to(pos.device)


@_untraced
def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int | None = None,
) -> Tensor:
    """For every point of ``y`` all points of ``x`` at most ``r`` away, as in PyG.

    As in PyG, **row 0 holds points of y (the centres), row 1 points of x (their neighbours)**: the reverse of an
    ``edge_index``. ``radius(x, y, r).flip(0)`` is the ``edge_index`` of a convolution from x to y.

    Args:
        x, y: (N, D) and (M, D) positions, floating point, finite, on one device. Detached: no gradient flows through
            the choice of pairs. Distances are computed in float64.
        r: the radius, > 0, in the units of the positions; ``inf`` connects all points.
        batch_x, batch_y: (N,) and (M,) integers, both or neither; only points with equal entries are paired. In any
            order.
        max_num_neighbors: a point of ``y`` with more neighbours keeps the nearest, and of equally distant ones those of
            lower index. None: no limit. PyG's default is 32, and it keeps arbitrary ones.

    Returns:
        (2, E), int64, on the device of ``x``; sorted by the point of ``y``, then by the point of ``x``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> atoms, probes = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.8], [2.2]])
        >>> radius(atoms, probes, r=1.0)
        tensor([[0, 0, 1],
                [0, 1, 2]])
        >>> edge_index = radius(atoms, probes, r=1.0).flip(0)  # from atoms to probes
        >>> edge_delta = probes[edge_index[1]] - atoms[edge_index[0]]
        >>> y = conv((x_of_atoms, len(probes)), edge_index, edge_delta)
    """
    points_x, points_y, segments = _two_clouds(x, y, batch_x, batch_y)
    _check_radius(r)
    most = None if max_num_neighbors is None else _count("max_num_neighbors", max_num_neighbors, " or None")

    def within(of_x: NDArray[Any], of_y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        from scipy.spatial import cKDTree

        centres, others = cKDTree(points_y[of_y]), cKDTree(points_x[of_x])
        found = centres.sparse_distance_matrix(others, r, output_type="ndarray")
        neighbour, centre = found["j"], found["i"]
        return (neighbour, centre) if most is None else _nearest(neighbour, centre, found["v"], most)

    return _sorted_by_both(_edges(segments, within), len(points_x), len(points_y)).flip(0).to(x.device)


@_untraced
def knn(x: Tensor, y: Tensor, k: int, batch_x: Tensor | None = None, batch_y: Tensor | None = None) -> Tensor:
    """For every point of ``y`` the ``k`` nearest points of ``x``, as in PyG.

    As in PyG, **row 0 holds points of y (the centres), row 1 points of x (their neighbours)**: the reverse of an
    ``edge_index``. ``knn(x, y, k).flip(0)`` is the ``edge_index`` of a convolution from x to y.

    Args:
        x, y, batch_x, batch_y: as :func:`radius` takes them.
        k: neighbours per point of ``y``, ≥ 1; where ``x`` has fewer points (of that entry of the batch), all of them.

    Returns:
        (2, E), int64, on the device of ``x``; sorted by the point of ``y``, then by distance. Which of several
        neighbours at the same distance come first is arbitrary, but the same in every run.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> atoms, probes = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.8], [2.2]])
        >>> knn(atoms, probes, k=2)
        tensor([[0, 0, 1, 1],
                [1, 0, 2, 1]])
        >>> edge_index = knn(atoms, probes, k=2).flip(0)  # from atoms to probes
        >>> edge_delta = probes[edge_index[1]] - atoms[edge_index[0]]
        >>> y = conv((x_of_atoms, len(probes)), edge_index, edge_delta)
    """
    points_x, points_y, segments = _two_clouds(x, y, batch_x, batch_y)
    count = _count("k", k)

    def nearest(of_x: NDArray[Any], of_y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        import numpy as np
        from scipy.spatial import cKDTree

        ranks = range(1, min(count, len(of_x)) + 1)
        _, found = cKDTree(points_x[of_x]).query(points_y[of_y], k=ranks)  # [m, ranks], by distance
        return found.ravel(), np.arange(len(of_y)).repeat(len(ranks))

    return _sorted_by_centre(_edges(segments, nearest), len(points_y)).flip(0).to(x.device)


_Segments = dict[int | None, "NDArray[Any]"]  # label → the indices of its points, at least one


def _points(name: str, pos: Any, batch_name: str, batch: Any) -> tuple[NDArray[Any], _Segments]:
    """Positions (N, D) in float64, and which of them belong together; without a batch all do."""
    import numpy as np

    expected = "a floating point tensor of shape (N, D), D >= 1"
    require(isinstance(pos, Tensor), name, expected, type(pos).__name__, kind=TypeError)
    remedy = "Convert it, for example with .float()."
    require(pos.is_floating_point(), name, expected, pos.dtype, remedy, kind=TypeError)
    require(pos.dim() == 2 and pos.shape[1] >= 1, name, expected, tuple(pos.shape))
    require(not pos.is_meta, name, "positions", "a tensor without values, on device meta")
    points = pos.detach().to("cpu", torch.float64).numpy()
    finite = np.isfinite(points).all(axis=1)
    require(finite.all(), name, "finite positions", f"NaN or Inf in {np.count_nonzero(~finite)} of {len(points)} rows")
    if batch is None:
        return points, {None: np.arange(len(points))} if len(points) else {}
    require_integers(batch, batch_name)
    shape = f"shape ({len(points)},), one per row of {name}"
    require(batch.shape == pos.shape[:1], batch_name, shape, tuple(batch.shape))
    labels, inverse = torch.unique(batch.cpu(), return_inverse=True)
    order, offsets = sort_by_key(inverse, len(labels))
    return points, dict(zip(labels.tolist(), np.split(order.numpy(), offsets[1:-1].numpy()), strict=False))


def _two_clouds(
    x: Any, y: Any, batch_x: Any, batch_y: Any
) -> tuple[NDArray[Any], NDArray[Any], list[tuple[NDArray[Any], NDArray[Any]]]]:
    """Positions of two clouds, and for each label that both have, the indices of its points in either."""
    points_x, of_x = _points("x", x, "batch_x", batch_x)
    points_y, of_y = _points("y", y, "batch_y", batch_y)
    require(x.shape[1] == y.shape[1], "y", f"shape (M, {x.shape[1]}), as x has it", tuple(y.shape))
    require(x.device == y.device, "y", f"device {x.device}, that of x", y.device, "Move it with .to().")
    for name, batch, other, given in (("batch_x", batch_x, "y", batch_y), ("batch_y", batch_y, "x", batch_x)):
        require(batch is not None or given is None, name, f"labels, as batch_{other} has them", None)
    return points_x, points_y, _paired(of_x, of_y)


def _paired(of_x: _Segments, of_y: _Segments) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    return [(of_x[label], of_y[label]) for label in of_x if label in of_y]


def _check_radius(r: Any) -> None:
    real = isinstance(r, numbers.Real) and not isinstance(r, bool)
    require(real, "r", "a number > 0", repr(r), kind=TypeError)
    require(r > 0, "r", "a number > 0", r)


def _count(name: str, value: Any, other: str = "") -> int:
    whole = hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
    require(whole, name, f"an integer >= 1{other}", repr(value), kind=TypeError)
    require(value >= 1, name, f"an integer >= 1{other}", value)
    return operator.index(value)


def _check_loop(loop: Any) -> None:
    require(isinstance(loop, bool), "loop", "True or False", repr(loop), kind=TypeError)


def _check_flow(flow: Any) -> None:
    expected = " or ".join(map(repr, _FLOWS))
    require(isinstance(flow, str), "flow", expected, repr(flow), kind=TypeError)
    require(flow in _FLOWS, "flow", expected, repr(flow))


_Search = Callable[["NDArray[Any]", "NDArray[Any]"], tuple["NDArray[Any]", "NDArray[Any]"]]


def _edges(segments: Iterable[tuple[NDArray[Any], NDArray[Any]]], search: _Search) -> Tensor:
    """(2, E), row 0 = neighbour, row 1 = centre: what ``search(indices of possible neighbours, indices of centres)``
    finds, each in its segment, for all segments together."""
    import numpy as np

    edges = [np.empty((2, 0), np.int64)]
    for others, centres in segments:
        neighbour, centre = search(others, centres)
        edges.append(np.stack([others[neighbour], centres[centre]]))
    return torch.from_numpy(np.concatenate(edges, axis=1))


def _nearest(
    neighbour: NDArray[Any], centre: NDArray[Any], distance: NDArray[Any], most: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keep the ``most`` nearest of the pairs (E,) of every centre, of equally distant ones those of lowest index."""
    import numpy as np

    order = np.lexsort((neighbour, distance, centre))
    neighbour, centre = neighbour[order], centre[order]
    rank = np.arange(len(centre)) - np.searchsorted(centre, centre)
    return neighbour[rank < most], centre[rank < most]


def _sorted_by_centre(edge_index: Tensor, num_centres: int) -> Tensor:
    return edge_index[:, sort_by_key(edge_index[1], num_centres)[0]]


def _sorted_by_both(edge_index: Tensor, num_neighbours: int, num_centres: int) -> Tensor:
    # A stable sort by neighbour followed by one by centre sorts by both.
    return _sorted_by_centre(edge_index[:, sort_by_key(edge_index[0], num_neighbours)[0]], num_centres)


def _directed(edge_index: Tensor, flow: str) -> Tensor:
    return edge_index if flow == "source_to_target" else edge_index.flip(0)
