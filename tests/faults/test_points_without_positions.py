"""Layers between two sets of nodes, and features whose positions are not known."""

import escnn
import pytest
import torch
from escnn.nn import GeometricTensor

import implicit_steer as ist
from implicit_steer import Graph
from implicit_steer.nn import ImplicitPointConv, ImplicitPointConvWithDownsampling

GSPACE = escnn.gspaces.flipRot3dOnR3()
FIELDS = GSPACE.type(GSPACE.trivial_repr, GSPACE.irrep(1, 1))
EDGES = torch.tensor([[0, 1, 2, 3, 4, 4], [0, 1, 2, 0, 1, 1]])
GRAPH = Graph(EDGES, (5, 4))  # nothing ends at the last target


@pytest.fixture(scope="module", params=["escnn", "loaded"])
def layer(request, tmp_path_factory):
    """A layer with escnn's types and the same one loaded without them, and what wraps features for it."""
    torch.manual_seed(0)
    conv = ImplicitPointConvWithDownsampling(FIELDS, FIELDS, None, 2, 3, norm=None)
    if request.param == "escnn":
        return conv
    path = tmp_path_factory.mktemp("layer") / "conv.safetensors"
    ist.save(conv, path)
    return ist.load(path)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*shape, generator=generator) for shape in ((5, 4), (5, 3), (6, 3)))


def values(y):
    return y.tensor if isinstance(y, GeometricTensor) else y


def test_unknown_targets_are_counted_by_the_graph(layer):
    """(x, None), as PyG has it, was refused."""
    x, pos, delta = inputs()
    wrapped = layer.in_type(x, pos)
    out, expected = (layer((wrapped, target), GRAPH, delta) for target in (None, 4))
    assert torch.equal(values(out), values(expected))
    assert values(out).shape == (4, 4)
    if isinstance(out, GeometricTensor):
        assert out.coords.isnan().all()
        assert out.coords.shape == (4, 3)


def test_unknown_targets_of_plain_edges_say_what_to_pass(layer):
    """The message was "got NoneType", without a remedy."""
    x, pos, delta = inputs()
    with pytest.raises(
        TypeError, match=r"x: expected .* None with a Graph, got None. Pass \(x, num_target\), or Graph"
    ):
        layer((layer.in_type(x, pos), None), EDGES, delta)


def test_a_pair_does_not_go_with_a_choice_of_nodes(layer):
    """The targets' number was taken for the sources': reads from beyond the features, and random numbers as results."""
    x, pos, delta = inputs()
    many = layer.in_type(torch.zeros(900, 4), torch.zeros(900, 3))
    far, chosen = torch.tensor([[800], [0]]), torch.tensor([0])
    for target in (many, 900):
        with pytest.raises(ValueError, match=r"x: expected the features .*, got a pair\. idx_downsampled says"):
            layer((layer.in_type(x, pos), target), far, delta[:1], idx_downsampled=chosen)
    with pytest.raises(ValueError, match="x: expected the features of all nodes, got a pair"):
        layer((layer.in_type(x, pos), None), GRAPH, delta, idx_downsampled=chosen)


def nowhere(x):
    """Features of points whose coordinates were taken away."""
    points = FIELDS(x, torch.zeros(len(x), 3))
    points.coords = None
    return points


def test_features_without_coordinates():
    """An assertion of escnn, or an AttributeError; the layer does not need them."""
    conv = ImplicitPointConvWithDownsampling(FIELDS, FIELDS, None, 2, 3, norm=None)
    x, pos, delta = inputs()
    wrapped, chosen = FIELDS(x, pos), torch.tensor([4, 0, 1, 1])
    for run in (
        lambda x: conv(x, EDGES, delta),
        lambda x: conv((wrapped, x), EDGES, delta),
        lambda x: conv((x, 4), EDGES, delta),
        lambda x: conv((x, None), GRAPH, delta),
        lambda x: conv(x, EDGES, delta, idx_downsampled=chosen),
    ):
        out, expected = run(nowhere(x)), run(wrapped)
        assert torch.equal(out.tensor, expected.tensor)
        assert out.coords.isnan().all()
        assert out.coords.shape == expected.coords.shape


@pytest.mark.parametrize("dim", [2, 3])
def test_messages_say_how_to_wrap_features_without_positions(dim):
    """They named in_type(tensor, coords), but not what to pass where there are no coordinates."""
    gspace = escnn.gspaces.flipRot3dOnR3() if dim == 3 else escnn.gspaces.rot2dOnR2(4)
    fields = gspace.type(gspace.trivial_repr)
    conv = ImplicitPointConv(fields, fields, None, 2, 3, norm=None)
    x, delta, edges = torch.randn(5, 1), torch.randn(6, dim), EDGES
    grid = fields(torch.randn(5, 1, *dim * [2]))
    remedy = rf"in_type\(tensor, coords\) with coords \(N, {dim}\).* torch.full\(\(N, {dim}\), torch.nan\)"
    with pytest.raises(TypeError, match=remedy):
        conv(x, edges, delta)
    with pytest.raises(ValueError, match=r"x: expected features of points, .* got a grid.* ImplicitConv.* " + remedy):
        conv(grid, edges, delta)
    with pytest.raises(ValueError, match=remedy):
        conv((fields(x, torch.zeros(5, dim)), grid), edges, delta)
    as_told = fields(x, torch.full((5, dim), torch.nan))
    assert torch.equal(conv(as_told, edges, delta).tensor, conv(fields(x, torch.zeros(5, dim)), edges, delta).tensor)
