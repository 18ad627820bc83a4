"""Graph, and the native sort behind it, against plain PyTorch."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_steer import Graph
from implicit_steer.graph.graph import sort_by_key

INDEX_TYPES = [torch.int32, torch.int64]


def torch_sort(key, n):
    """What sort_by_key promises, in plain PyTorch."""
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=n)
    return order.to(key.dtype), torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(key.dtype)


def random_edges(num_edges, num_src, num_dst, dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(n, (num_edges,), generator=generator) for n in (num_src, num_dst)]
    return torch.stack(rows).to(dtype)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- sorting


@pytest.mark.usefixtures("any_sort")
@pytest.mark.parametrize("dtype", INDEX_TYPES)
@pytest.mark.parametrize(("num_edges", "n"), [(0, 0), (0, 5), (1, 1), (7, 3), (7, 100), (1_001, 13), (300_007, 1_001)])
def test_sort_is_the_stable_sort(num_edges, n, dtype):
    key = random_edges(num_edges, max(n, 1), max(n, 1), dtype)[0]
    for got, expected in zip(sort_by_key(key, n), torch_sort(key, n), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", INDEX_TYPES)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_native_sort_is_the_same_for_every_thread_count(set_threads, threads, dtype):
    key = random_edges(400_003, 1_001, 1, dtype)[0]
    set_threads(threads)
    for got, expected in zip(torch.ops.implicit_steer.sort_by_key(key, 1_001), torch_sort(key, 1_001), strict=True):
        assert torch.equal(got, expected)


def test_native_sort_keeps_one_key_in_order(set_threads):
    set_threads(4)
    order, offsets = torch.ops.implicit_steer.sort_by_key(torch.full((300_000,), 2), 4)
    assert torch.equal(order, torch.arange(300_000))
    assert offsets.tolist() == [0, 0, 0, 300_000, 300_000]


def test_native_sort_takes_strided_keys():
    key = random_edges(101, 9, 9).t().contiguous().t()[1]
    assert not key.is_contiguous()
    assert torch.equal(torch.ops.implicit_steer.sort_by_key(key, 9)[0], torch_sort(key, 9)[0])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", INDEX_TYPES)
@pytest.mark.parametrize("bad", ["below", "above", "lowest", "highest"])
def test_native_operators_see_one_bad_index(set_threads, threads, dtype, bad):
    set_threads(threads)
    limits = torch.iinfo(dtype)
    edge_index = random_edges(200_001, 50, 50, dtype)
    assert torch.ops.implicit_steer.edges_in_range(edge_index, 50, 50)
    edge_index[1, 150_000] = {"below": -1, "above": 50, "lowest": limits.min, "highest": limits.max}[bad]
    assert not torch.ops.implicit_steer.edges_in_range(edge_index, 50, 50)
    with pytest.raises(RuntimeError, match=r"key: expected values from 0 to n - 1 with n = 50"):
        torch.ops.implicit_steer.sort_by_key(edge_index[1], 50)


@pytest.mark.parametrize(
    ("key", "n", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), 1, r"shape \(E,\), got rank 2"),
        (torch.zeros(2), 1, "int32 or int64"),
        (torch.zeros(2, dtype=torch.long), -1, "count >= 0, got -1"),
        (torch.zeros(2, dtype=torch.long), 0, "with n = 0"),
    ],
)
def test_native_sort_refuses(key, n, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.implicit_steer.sort_by_key(key, n)


def test_native_range_check_refuses_another_shape():
    with pytest.raises(RuntimeError, match=r"shape \(2, E\)"):
        torch.ops.implicit_steer.edges_in_range(torch.zeros(3, 2, dtype=torch.long), 1, 1)


def test_native_operators_pass_opcheck():
    edge_index = random_edges(20, 5, 5)
    torch.library.opcheck(torch.ops.implicit_steer.sort_by_key.default, (edge_index[0], 5))
    torch.library.opcheck(torch.ops.implicit_steer.edges_in_range.default, (edge_index, 5, 5))


# ---- Graph


@st.composite
def graphs(draw):
    num_src, num_dst = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    edges = draw(st.lists(st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1)), max_size=40))
    dtype = draw(st.sampled_from(INDEX_TYPES))
    return torch.tensor(edges, dtype=dtype).reshape(-1, 2).t(), num_src, num_dst


@settings(deadline=None)
@given(graphs())
def test_graph_of_random_edges(case):
    edge_index, num_src, num_dst = case
    graph = Graph(edge_index, (num_src, num_dst))
    assert (graph.num_edges, graph.num_src, graph.num_dst) == (edge_index.shape[1], num_src, num_dst)
    assert torch.equal(graph.edge_index, edge_index)
    assert torch.equal(torch.stack([graph.src, graph.dst]), edge_index)
    for pair, (key, n) in {
        (graph.order, graph.rowptr): (graph.dst, num_dst),
        (graph.order_by_source, graph.colptr): (graph.src, num_src),
    }.items():
        for got, expected in zip(pair, torch_sort(key, n), strict=True):
            assert got.dtype == edge_index.dtype
            assert torch.equal(got, expected)
    assert torch.equal(graph.degree, torch.bincount(graph.dst, minlength=num_dst).to(edge_index.dtype))


@pytest.mark.usefixtures("any_sort")
@pytest.mark.parametrize("num_nodes", [0, 1, 4, (0, 3), (3, 0)])
def test_graph_without_edges(num_nodes):
    graph = Graph(torch.empty(2, 0, dtype=torch.int32), num_nodes)
    num_src, num_dst = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
    assert graph.num_edges == 0
    assert graph.order.tolist() == graph.order_by_source.tolist() == []
    assert graph.rowptr.tolist() == [0] * (num_dst + 1)
    assert graph.colptr.tolist() == [0] * (num_src + 1)
    assert graph.degree.tolist() == [0] * num_dst


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_graph_takes_any_integer_type(dtype):
    graph = Graph(torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype), 2)
    assert graph.dst.dtype == graph.order.dtype == graph.rowptr.dtype == torch.int64
    assert graph.order.tolist() == [1, 0, 2]


def test_graph_takes_self_loops_repeats_and_numpy_counts():
    graph = Graph(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), np.int64(3))
    assert graph.order.tolist() == [2, 3, 0, 1]
    assert graph.degree.tolist() == [2, 2, 0]


def test_graph_of_a_transposed_tensor_is_contiguous():
    edge_index = random_edges(11, 4, 4).t().contiguous().t()
    graph = Graph(edge_index, 4)
    assert graph.edge_index.is_contiguous()
    assert torch.equal(graph.edge_index, edge_index)


def test_graph_pickles_small_and_whole():
    graph = Graph(random_edges(1_000, 30, 40), (30, 40))
    plain = len(pickle.dumps((graph.edge_index, graph.order, graph.rowptr)))
    assert graph.colptr.shape == (31,)
    data = pickle.dumps(graph)
    copy = pickle.loads(data)
    assert len(data) < plain + 1_000
    for name in ("edge_index", "src", "dst", "order", "rowptr", "degree", "order_by_source", "colptr"):
        assert torch.equal(getattr(copy, name), getattr(graph, name)), name
    assert repr(copy) == repr(graph)


def test_graph_moves():
    graph = Graph(random_edges(10, 3, 3), 3)
    assert graph.to("cpu") is graph
    moved = graph.to("meta")
    tensors = (moved.edge_index, moved.src, moved.dst, moved.order, moved.rowptr, moved.degree)
    assert {t.device.type for t in tensors} == {"meta"} == {moved.device.type}
    assert moved.num_edges == 10


def test_graph_prints():
    edge_index = torch.tensor([[0], [1]])
    assert repr(Graph(edge_index, 2)) == "Graph(num_nodes=2, num_edges=1, dtype=int64, device=cpu)"
    assert "num_nodes=(1, 2), num_edges=1, dtype=int32" in repr(Graph(edge_index.int(), (1, 2)))


EDGES = torch.tensor([[0, 1], [1, 2]])
BAD_GRAPHS = {
    "list": ([[0], [1]], 3, TypeError, "edge_index: expected a torch.Tensor of integers, got list"),
    "float": (EDGES.float(), 3, TypeError, r"edge_index: .* got torch.float32. Convert it"),
    "bool": (EDGES.bool(), 3, TypeError, "got torch.bool"),
    "rank": (EDGES[0], 3, ValueError, r"edge_index: expected a tensor of shape \(2, E\), got \(2,\)"),
    "rows": (torch.zeros(3, 2).long(), 3, ValueError, r"got \(3, 2\). Row 0 holds the sources"),
    "source too large": (EDGES.flip(0), 2, ValueError, r"edge_index\[0\]: expected sources in 0 .. 1, got index 2"),
    "target too large": (EDGES, 2, ValueError, r"edge_index\[1\]: expected targets in 0 .. 1, got index 2"),
    "negative source": (EDGES - 1, 3, ValueError, r"edge_index\[0\]: .* got index -1"),
    "negative target": (EDGES.flip(0) - 1, 3, ValueError, r"edge_index\[1\]: .* got index -1"),
    "wraps": (torch.tensor([[0], [2**63]], dtype=torch.uint64), 3, ValueError, r"edge_index\[1\]: .* got index -9223"),
    "bipartite swapped": (EDGES, (3, 2), ValueError, r"edge_index\[1\]: expected targets in 0 .. 1, got index 2"),
    "no nodes": (EDGES, 0, ValueError, "expected no edges, as there are no sources, got index 1"),
    "no targets": (EDGES, (2, 0), ValueError, "expected no edges, as there are no targets, got index 2"),
    "negative count": (EDGES, -1, ValueError, r"num_nodes: expected an integer >= 0 or a pair .* got -1"),
    "negative pair": (EDGES, (3, -1), ValueError, r"got \(3, -1\)"),
    "three counts": (EDGES, (3, 3, 3), ValueError, "got 3 values"),
    "float count": (EDGES, 3.0, TypeError, "num_nodes: .* got 3.0"),
    "bool count": (EDGES, True, TypeError, "got True"),
    "no count": (EDGES, None, TypeError, "got None"),
    "tensor count": (EDGES, torch.tensor(3), TypeError, r"got tensor\(3\)"),
}


@pytest.mark.usefixtures("any_sort")
@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_graph_refuses(case):
    edge_index, num_nodes, error, message = BAD_GRAPHS[case]
    with pytest.raises(error, match=message):
        Graph(edge_index, num_nodes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_writing_to_the_given_edges_leaves_the_graph_alone(dtype):
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=dtype)
    graph = Graph(edges, 3)
    edges += 1_000_000
    assert graph.edge_index.tolist() == [[0, 1, 2], [1, 2, 0]]
    assert graph.order_by_source.tolist() == [0, 1, 2]


# ---- several graphs as one


def assert_same_graph(one, other):
    assert (one.num_src, one.num_dst, one.edge_index.dtype) == (other.num_src, other.num_dst, other.edge_index.dtype)
    for name in ("edge_index", "src", "dst", "order", "rowptr", "degree", "order_by_source", "colptr"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@settings(deadline=None)
@given(st.lists(graphs(), min_size=1, max_size=4), st.booleans())
def test_graphs_side_by_side_are_one_graph(cases, sorted_by_source):
    parts = [Graph(edge_index, sizes) for edge_index, *sizes in cases]
    if sorted_by_source:
        assert all(part.colptr.dtype == part.edge_index.dtype for part in parts)
    edges, num_src, num_dst = [], 0, 0
    for part in parts:
        edges.append(part.edge_index + torch.tensor([[num_src], [num_dst]]))
        num_src, num_dst = num_src + part.num_src, num_dst + part.num_dst
    short = all(part.edge_index.dtype == torch.int32 for part in parts)
    dtype = torch.int32 if short else torch.int64
    assert_same_graph(Graph.join(parts), Graph(torch.cat(edges, 1).to(dtype), (num_src, num_dst)))


def test_joining_sorts_nothing(monkeypatch):
    parts = [Graph(random_edges(30, 5, 4, torch.int32, seed), (5, 4)) for seed in range(3)]
    assert [part.colptr[-1] for part in parts] == [30, 30, 30]
    expected = Graph.join(parts)
    monkeypatch.setattr("implicit_steer.graph.graph.sort_by_key", None)
    assert_same_graph(Graph.join(iter(parts)), expected)


def test_joined_graphs_do_not_share_tensors():
    edges = torch.tensor([[0, 1], [1, 0]])
    part = Graph(edges, 2)
    joined = Graph.join([part])
    part.edge_index.add_(7)
    assert torch.equal(joined.edge_index, edges)


def test_numbers_that_no_longer_fit_become_int64():
    part = Graph(torch.tensor([[2**31 - 2], [0]], dtype=torch.int32), (2**31 - 1, 1))
    joined = Graph.join([part, part])
    assert joined.src.tolist() == [2**31 - 2, 2**32 - 3]
    assert joined.rowptr.tolist() == [0, 1, 2]
    assert Graph.join([part]).edge_index.dtype == torch.int32


@pytest.mark.parametrize(
    ("graphs", "error", "message"),
    [
        ([], ValueError, "graphs: expected at least one graph, got none"),
        (None, TypeError, "graphs: expected a collection of Graphs, got NoneType"),
        (Graph(EDGES, 3), TypeError, "graphs: expected a collection of Graphs, got Graph"),
        (torch.tensor(3), TypeError, "graphs: expected a collection of Graphs, got Tensor"),
        ([Graph(EDGES, 3), EDGES], TypeError, r"graphs\[1\]: expected a Graph, got Tensor"),
        (
            [Graph(EDGES, 3), Graph(EDGES, 3).to("meta")],
            ValueError,
            "all on one device, got cpu and meta",
        ),
    ],
)
def test_join_refuses(graphs, error, message):
    with pytest.raises(error, match=message):
        Graph.join(graphs)
