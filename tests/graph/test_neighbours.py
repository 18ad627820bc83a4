"""Edges from positions, against brute force: radius_graph, knn_graph, radius, knn."""

import escnn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implicit_steer import Graph, knn, knn_graph, radius, radius_graph
from implicit_steer.nn import ImplicitPointConv

INDEX_TYPES = [torch.int32, torch.int64]
INF = float("inf")


def distances(pos, batch, others=None, batch_others=None):
    """(N, M) distances in float64 to the others, the points themselves by default; infinite between segments."""
    if others is None:
        others, batch_others = pos, batch
    far = torch.cdist(pos.detach().double(), others.detach().double(), compute_mode="donot_use_mm_for_euclid_dist")
    return far if batch is None else far.masked_fill(batch[:, None] != batch_others[None, :], INF)


def nearest_of(near, far, most):
    """Of the pairs ``near`` (centre, neighbour) each centre's ``most`` of the smallest ``far``, then lowest number."""
    kept = torch.zeros_like(near)
    for centre, row in enumerate(near):
        ranked = sorted(row.nonzero().flatten().tolist(), key=lambda j: (float(far[centre, j]), j))
        kept[centre, ranked[:most]] = True
    return kept


def brute_radius(pos, r, batch, loop, most=None):
    far = distances(pos, batch)
    near = (far <= r) & (far < INF)
    far.fill_diagonal_(-1.0)  # itself comes first, or not at all
    near.fill_diagonal_(loop)
    centre, neighbour = (near if most is None else nearest_of(near, far, most)).nonzero().t()
    return torch.stack([neighbour, centre])


def check_knn(edge_index, pos, k, batch, loop):
    """Right number, no doubles, right centre order and the brute-force distances in ascending order."""
    far = distances(pos, batch)
    far.fill_diagonal_(-1.0 if loop else float("inf"))  # itself: always first, or never
    expected = far.sort(dim=1).values[:, :k]
    expected = expected[expected.isfinite()]
    neighbour, centre = edge_index
    assert torch.equal(centre, centre.sort().values)
    assert len(edge_index.unique(dim=1).t()) == edge_index.shape[1]
    torch.testing.assert_close(far[centre, neighbour], expected, rtol=0, atol=0)


@st.composite
def clouds(draw):
    """Points on a coarse lattice (many duplicates and ties), any number of dimensions, batched in any order."""
    num_points, dim = draw(st.integers(0, 14)), draw(st.integers(1, 4))
    coordinates = st.integers(-2, 2)
    values = draw(st.lists(coordinates, min_size=num_points * dim, max_size=num_points * dim))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    pos = torch.tensor(values, dtype=dtype).reshape(num_points, dim) / 2
    label = st.integers(-3, 3)
    labels = draw(st.none() | st.lists(label, min_size=num_points, max_size=num_points))
    batch = None if labels is None else torch.tensor(labels, dtype=draw(st.sampled_from(INDEX_TYPES)))
    return pos, batch, draw(st.booleans())


@settings(deadline=None)
@given(clouds(), st.sampled_from([0.25, 0.5, 1.0, 1.2, float("inf")]))
def test_radius_graph_is_brute_force(cloud, r):
    pos, batch, loop = cloud
    edge_index = radius_graph(pos, r, batch, loop)
    assert edge_index.dtype == torch.int64
    assert torch.equal(edge_index, brute_radius(pos, r, batch, loop))


@settings(deadline=None)
@given(clouds(), st.sampled_from([0.5, 1.0, INF]), st.integers(1, 6))
def test_a_limited_radius_graph_keeps_the_nearest(cloud, r, most):
    pos, batch, loop = cloud
    edge_index = radius_graph(pos, r, batch, loop, max_num_neighbors=most)
    assert edge_index.dtype == torch.int64
    assert torch.equal(edge_index, brute_radius(pos, r, batch, loop, most))


@settings(deadline=None)
@given(clouds(), st.integers(1, 5))
def test_flow_exchanges_the_rows(cloud, k):
    pos, batch, loop = cloud
    for build in (
        lambda **o: knn_graph(pos, k, batch, loop, **o),
        lambda **o: radius_graph(pos, 1.0, batch, loop, **o),
    ):
        given = build(flow="source_to_target")
        assert torch.equal(build(), given)
        assert torch.equal(build(flow="target_to_source"), given.flip(0))


@st.composite
def two_clouds(draw):
    (x, batch_x, _), (y, batch_y, _) = draw(clouds()), draw(clouds())
    y = torch.cat([y, y, y, y], 1)[:, : x.shape[1]]
    if batch_x is None or batch_y is None:
        batch_x = batch_y = None
    return x, y, batch_x, batch_y


@settings(deadline=None)
@given(two_clouds(), st.sampled_from([0.25, 0.5, 1.0, 1.2, INF]), st.none() | st.integers(1, 6))
def test_radius_is_brute_force(case, r, most):
    x, y, batch_x, batch_y = case
    pairs = radius(x, y, r, batch_x, batch_y, most)
    far = distances(y, batch_y, x, batch_x)
    near = (far <= r) & (far < INF)
    assert pairs.dtype == torch.int64
    assert torch.equal(pairs, (near if most is None else nearest_of(near, far, most)).nonzero().t())


@settings(deadline=None)
@given(two_clouds(), st.integers(1, 20))
def test_knn_is_brute_force(case, k):
    x, y, batch_x, batch_y = case
    pairs = knn(x, y, k, batch_x, batch_y)
    far = distances(y, batch_y, x, batch_x)
    expected = far.sort(dim=1).values[:, :k]
    assert pairs.dtype == torch.int64
    assert torch.equal(pairs[0], pairs[0].sort().values)
    assert len(pairs.unique(dim=1).t()) == pairs.shape[1]
    torch.testing.assert_close(far[pairs[0], pairs[1]], expected[expected < INF], rtol=0, atol=0)


@settings(deadline=None)
@given(clouds(), st.integers(1, 20))
def test_knn_graph_is_brute_force(cloud, k):
    pos, batch, loop = cloud
    edge_index = knn_graph(pos, k, batch, loop)
    assert edge_index.dtype == torch.int64
    check_knn(edge_index, pos, k, batch, loop)


@pytest.mark.usefixtures("any_sort")
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("loop", [False, True])
def test_graphs_of_many_random_points(batched, loop):
    generator = torch.Generator().manual_seed(1)
    pos = torch.randn(200, 3, generator=generator, requires_grad=True)
    batch = torch.randint(3, (200,), generator=generator) if batched else None
    assert torch.equal(radius_graph(pos, 0.9, batch, loop), brute_radius(pos, 0.9, batch, loop))
    check_knn(knn_graph(pos, 7, batch, loop), pos, 7, batch, loop)


@pytest.mark.usefixtures("any_sort")
def test_two_clouds_of_many_random_points():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 3, generator=generator, requires_grad=True) for n in (200, 90))
    batch_x, batch_y = (torch.randint(3, (n,), generator=generator) for n in (200, 90))
    far = distances(y, batch_y, x, batch_x)
    assert torch.equal(radius(x, y, 0.9, batch_x, batch_y), (far <= 0.9).nonzero().t())
    nearest = torch.stack([torch.arange(90).repeat_interleave(7), far.sort(dim=1).indices[:, :7].flatten()])
    assert torch.equal(knn(x, y, 7, batch_x, batch_y), nearest)


def test_pairs_have_the_rows_that_pyg_gives_them():
    # The example of PyG's documentation, and what torch_cluster answers.
    x = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    y = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    zeros_x, zeros_y = torch.zeros(4, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    expected = {(0, 0), (0, 1), (1, 2), (1, 3)}
    for pairs in (knn(x, y, 2, zeros_x, zeros_y), radius(x, y, 1.5, zeros_x, zeros_y), radius(x, y, 1.5)):
        assert set(map(tuple, pairs.t().tolist())) == expected


def test_a_convolution_between_two_clouds():
    """The flipped pairs are edges from x to y: each point of y gets the sum over its neighbours in x."""
    gspace = escnn.gspaces.flipRot3dOnR3()
    fields = gspace.type(*2 * [gspace.trivial_repr])
    conv = ImplicitPointConv(fields, fields, None, 2, 4, norm=None)
    x, y, values = torch.randn(9, 3), torch.randn(4, 3), torch.randn(9, 2)
    for edge_index in (knn(x, y, 3).flip(0), radius(x, y, 1.5).flip(0)):
        delta = y[edge_index[1]] - x[edge_index[0]]
        with torch.no_grad():
            out = conv((fields(values, x), fields(torch.zeros(4, 2), y)), edge_index, delta)
            messages = conv.implicit_kernel(delta) @ values[edge_index[0], :, None]
            expected = torch.zeros(4, 2).index_add(0, edge_index[1], messages[..., 0])
        torch.testing.assert_close(out.tensor, expected)
        assert torch.equal(out.coords, y)


def test_a_limited_graph_counts_itself_first_among_copies():
    pos = torch.zeros(4, 2)
    assert torch.equal(radius_graph(pos, 1.0, loop=True, max_num_neighbors=1), torch.arange(4).expand(2, 4))
    assert radius_graph(pos, 1.0, max_num_neighbors=2).tolist() == [[1, 2, 0, 2, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3]]


def test_copies_of_one_point_exclude_only_the_point_itself():
    pos = torch.zeros(6, 2)
    everyone = ~torch.eye(6, dtype=torch.bool)
    assert torch.equal(radius_graph(pos, 0.1), everyone.nonzero().t().flip(0))
    neighbour, centre = knn_graph(pos, 2)
    assert (neighbour != centre).all()
    assert centre.tolist() == [i for i in range(6) for _ in range(2)]
    assert torch.equal(knn_graph(pos, 1, loop=True), torch.arange(6).expand(2, 6))


@pytest.mark.parametrize("build", [lambda *a, **k: radius_graph(*a, 1.0, **k), lambda *a, **k: knn_graph(*a, 3, **k)])
@pytest.mark.parametrize("num_points", [0, 1])
def test_no_point_and_one_point(build, num_points):
    pos = torch.zeros(num_points, 3)
    batch = torch.zeros(num_points, dtype=torch.uint8)
    assert build(pos).shape == build(pos, batch=batch).shape == (2, 0)
    assert build(pos, loop=True).shape == (2, num_points)
    assert Graph(build(pos, loop=True), num_points).num_edges == num_points


@pytest.mark.parametrize("build", [lambda *a: radius(*a[:2], 1.0, *a[2:]), lambda *a: knn(*a[:2], 3, *a[2:])])
@pytest.mark.parametrize(("num_x", "num_y", "expected"), [(0, 0, 0), (0, 2, 0), (2, 0, 0), (1, 1, 1)])
def test_two_clouds_of_no_point_and_one_point(build, num_x, num_y, expected):
    x, y = torch.zeros(num_x, 3), torch.zeros(num_y, 3)
    assert build(x, y).shape == (2, expected)
    assert build(x, y, torch.zeros(num_x, dtype=torch.uint8), torch.zeros(num_y).long()).shape == (2, expected)
    assert build(x, y, torch.zeros(num_x).long(), torch.ones(num_y).long()).shape == (2, 0)


POS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
NAN = torch.tensor([[0.0, float("nan")], [float("inf"), 0.0], [0.0, 0.0]])
BAD_POINTS = {
    "list": ([[0.0]], {}, TypeError, "pos: expected a floating point tensor .* got list"),
    "integers": (POS.long(), {}, TypeError, "pos: .* got torch.int64"),
    "complex": (POS.to(torch.complex64), {}, TypeError, "pos: .* got torch.complex64"),
    "rank": (POS[0], {}, ValueError, r"pos: expected .* \(N, D\), D >= 1, got \(2,\)"),
    "no dimension": (POS[:, :0], {}, ValueError, r"got \(3, 0\)"),
    "not finite": (NAN, {}, ValueError, "pos: expected finite positions, got NaN or Inf in 2 of 3 rows"),
    "short batch": (POS, {"batch": torch.zeros(2).long()}, ValueError, r"batch: expected shape \(3,\).* got \(2,\)"),
    "batch rank": (POS, {"batch": torch.zeros(3, 1).long()}, ValueError, r"batch: .* got \(3, 1\)"),
    "float batch": (POS, {"batch": torch.zeros(3)}, TypeError, "batch: expected a torch.Tensor of integers"),
    "list batch": (POS, {"batch": [0, 0, 0]}, TypeError, "batch: .* got list"),
    "no values": (
        POS.to("meta"),
        {},
        ValueError,
        "pos: expected positions, got a tensor without",
    ),
    "loop text": (POS, {"loop": "yes"}, TypeError, "loop: expected True or False, got 'yes'"),
    "loop tensor": (POS, {"loop": torch.tensor([True, False])}, TypeError, "loop: expected True or False, got tensor"),
    "flow": (POS, {"flow": "upstream"}, ValueError, "flow: expected 'source_to_target' or 'target_.* got 'upstream'"),
    "flow none": (POS, {"flow": None}, TypeError, "flow: expected .* got None"),
}
BAD_SIZES = {
    "k 0": (knn_graph, 0, ValueError, "k: expected an integer >= 1, got 0"),
    "k negative": (knn_graph, -2, ValueError, "k: .* got -2"),
    "k float": (knn_graph, 2.0, TypeError, "k: .* got 2.0"),
    "k bool": (knn_graph, True, TypeError, "k: .* got True"),
    "k none": (knn_graph, None, TypeError, "k: .* got None"),
    "r 0": (radius_graph, 0, ValueError, "r: expected a number > 0, got 0"),
    "r negative": (radius_graph, -1.0, ValueError, "r: .* got -1.0"),
    "r nan": (radius_graph, float("nan"), ValueError, "r: .* got nan"),
    "r text": (radius_graph, "1", TypeError, "r: expected a number > 0, got '1'"),
    "r none": (radius_graph, None, TypeError, "r: .* got None"),
}


@pytest.mark.parametrize("build", [knn_graph, radius_graph])
@pytest.mark.parametrize("case", BAD_POINTS)
def test_points_are_refused(build, case):
    pos, options, error, message = BAD_POINTS[case]
    with pytest.raises(error, match=message):
        build(pos, 1, **options)


@pytest.mark.parametrize("case", BAD_SIZES)
def test_sizes_are_refused(case):
    build, size, error, message = BAD_SIZES[case]
    with pytest.raises(error, match=message):
        build(POS, size)
    between = {knn_graph: knn, radius_graph: radius}[build]
    with pytest.raises(error, match=message):
        between(POS, POS, size)


@pytest.mark.parametrize("build", [radius_graph, lambda pos, r, **options: radius(pos, pos, r, **options)])
@pytest.mark.parametrize(
    ("most", "error", "message"),
    [
        (0, ValueError, "max_num_neighbors: expected an integer >= 1 or None, got 0"),
        (-3, ValueError, "max_num_neighbors: .* got -3"),
        (2.0, TypeError, "max_num_neighbors: .* got 2.0"),
        (True, TypeError, "max_num_neighbors: .* got True"),
        ("32", TypeError, "max_num_neighbors: .* got '32'"),
        (torch.eye(2), TypeError, "max_num_neighbors: .* got tensor"),
    ],
)
def test_limits_are_refused(build, most, error, message):
    with pytest.raises(error, match=message):
        build(POS, 1.0, max_num_neighbors=most)


LABELS = torch.zeros(3).long()
BAD_PAIRS = {
    "x list": ([[0.0]], POS, {}, TypeError, "x: expected a floating point tensor .* got list"),
    "y list": (POS, [[0.0]], {}, TypeError, "y: expected a floating point tensor .* got list"),
    "x integers": (POS.long(), POS, {}, TypeError, "x: .* got torch.int64"),
    "y rank": (POS, POS[0], {}, ValueError, r"y: .* got \(2,\)"),
    "x not finite": (NAN, POS, {}, ValueError, "x: expected finite positions, got NaN or Inf in 2 of 3 rows"),
    "y not finite": (POS, NAN, {}, ValueError, "y: expected finite positions"),
    "dimensions": (POS, POS[:, :1], {}, ValueError, r"y: expected shape \(M, 2\), as x has it, got \(3, 1\)"),
    "no values": (POS, POS.to("meta"), {}, ValueError, "y: expected positions, got a tensor without values"),
    "no batch_y": (
        POS,
        POS,
        {"batch_x": LABELS},
        ValueError,
        "batch_y: expected labels, as batch_x has them",
    ),
    "no batch_x": (
        POS,
        POS,
        {"batch_y": LABELS},
        ValueError,
        "batch_x: expected labels, as batch_y has them",
    ),
    "short batch_x": (POS, POS, {"batch_x": LABELS[1:], "batch_y": LABELS}, ValueError, r"batch_x: .* got \(2,\)"),
    "float batch_y": (POS, POS, {"batch_x": LABELS, "batch_y": LABELS / 2}, TypeError, "batch_y: expected .* integers"),
}


@pytest.mark.parametrize("build", [knn, radius])
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_pairs_are_refused(build, case):
    x, y, options, error, message = BAD_PAIRS[case]
    with pytest.raises(error, match=message):
        build(x, y, 1, **options)
