"""In PyTorch Geometric: its data, loaders, edge indices and Sequential, against a MessagePassing that forms every K."""

import copy

import pytest
import torch
from escnn import gspaces
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader, RandomNodeLoader
from torch_geometric.nn import MessagePassing, Sequential, global_mean_pool
from torch_geometric.utils import k_hop_subgraph, to_undirected

import implicit_steer as ist
from implicit_steer import nn
from implicit_steer.deploy.convert import convert
from implicit_steer.irreps import Gate, ImplicitPointConv, InteractionBlock, Irreps, Linear

INTO, OUT = "3x0e+2x1o", "2x0e+2x1o+1x2e"
FORMS = [False, True]  # depthwise


class Materialised(MessagePassing):
    """A layer on irreps as PyG writes it: one matrix K(x, a) for each edge."""

    def __init__(self, conv):
        super().__init__(aggr="mean" if conv.implicit_kernel.aggr == "mean" else "add")
        self.conv = conv

    def forward(self, x, edge_index, edge_vec, edge_attr=None, size=None):
        """(N, C_in) or a pair → (N_target, C_out)."""
        kernels = self.conv.implicit_kernel(edge_vec, edge_attr)
        out = self.propagate(edge_index, x=x, kernels=kernels, size=size)
        if self.conv.linear is not None:
            return self.conv.linear(out)
        return out if self.conv.bias is None else out + self.conv.expand_bias()

    def message(self, x_j, kernels):
        """K f."""
        return torch.einsum("eoi,ei->eo", kernels, x_j)


def conv_of(depthwise=False, attributes=1, **options):
    conv = ImplicitPointConv(INTO, OUT, attributes, depthwise=depthwise, width=1.0, n_channels=4, **options).double()
    for name, parameter in conv.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return conv


def data_of(nodes, attributes=1):
    """A point cloud with its edges, target − source as their vectors, and attributes."""
    pos = torch.randn(nodes, 3, dtype=torch.float64)
    edges = ist.knn_graph(pos, k=min(4, nodes - 1))
    x = torch.randn(nodes, Irreps.of(INTO).size, dtype=torch.float64)
    edge_attr = torch.randn(edges.shape[1], attributes, dtype=torch.float64)
    return Data(x=x, pos=pos, edge_index=edges, edge_vec=pos[edges[1]] - pos[edges[0]], edge_attr=edge_attr)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("aggr", ["sum", "mean"])
@pytest.mark.parametrize("depthwise", FORMS)
def test_data_and_batch(depthwise, aggr):
    conv, parts = conv_of(depthwise, aggr=aggr), [data_of(n) for n in (7, 2, 12)]
    batch = Batch.from_data_list(parts)

    def derivatives(layer):
        x, edge_vec = (t.clone().requires_grad_() for t in (batch.x, batch.edge_vec))
        y = layer(x, batch.edge_index, edge_vec, batch.edge_attr)
        first = torch.autograd.grad(y.square().sum(), [x, edge_vec, *conv.parameters()], create_graph=True)
        return y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, edge_vec])

    found = derivatives(conv)
    for ours, theirs in zip(found, derivatives(Materialised(conv)), strict=True):
        assert_close(ours, theirs)
    assert_close(found[0], torch.cat([conv(p.x, p.edge_index, p.edge_vec, p.edge_attr) for p in parts]))
    assert_close(global_mean_pool(found[0], batch.batch)[1], found[0][7:9].mean(0))


@pytest.mark.parametrize("depthwise", FORMS)
def test_pairs(depthwise):
    """As PyG's (x_src, x_dst) and size; x_dst None where a Graph knows how many targets there are."""
    conv, source, target = conv_of(depthwise, attributes=0), torch.randn(9, 3).double(), torch.randn(4, 3).double()
    edges = ist.knn(source, target[:3], k=3).flip(0)  # nothing reaches the last target
    edge_vec = target[edges[1]] - source[edges[0]]
    x, size = torch.randn(9, conv.irreps_in.size).double(), (9, 4)
    expected = Materialised(conv)((x, None), edges, edge_vec, size=size)
    into = torch.randn(4, 7).double()  # of which only the number counts
    for pair, edge_index in (
        ((x, into), edges),
        ((x, 4), EdgeIndex(edges.contiguous(), sparse_size=size)),
        ((x, None), ist.Graph(edges, size)),
        ((x, None), ist.Graph(EdgeIndex(edges.contiguous(), sparse_size=size), size)),
    ):
        assert_close(conv(pair, edge_index, edge_vec), expected)


def edge_indices():
    """(name, edges as a plain tensor, the same as an EdgeIndex): unsorted, sorted either way, undirected, int32."""
    torch.manual_seed(0)
    edges = torch.randint(10, (2, 60))
    by_row, by_col = (edges[:, torch.argsort(edges[row], stable=True)] for row in (0, 1))
    both = to_undirected(edges)
    kinds = {
        "unsorted": (edges, {}),
        "with a size": (edges, {"sparse_size": (10, 10)}),
        "by row": (by_row, {"sort_order": "row"}),
        "by column": (by_col, {"sort_order": "col", "sparse_size": (10, 10)}),
        "undirected": (both, {"sort_order": "row", "is_undirected": True}),
        "int32": (by_col.int(), {"sort_order": "col"}),
        "empty": (edges[:, :0], {"sparse_size": (10, 10)}),
    }
    return [(name, plain, EdgeIndex(plain.contiguous(), **options)) for name, (plain, options) in kinds.items()]


EDGE_INDICES = pytest.mark.parametrize(("plain", "edge_index"), [pytest.param(*e, id=n) for n, *e in edge_indices()])
GRAPH_TENSORS = ("edge_index", "src", "dst", "order", "rowptr", "order_by_source", "colptr", "degree")


@EDGE_INDICES
def test_the_graph_of_an_edge_index_holds_plain_tensors(plain, edge_index):
    graph, expected = ist.Graph(edge_index, num_nodes=10), ist.Graph(plain, num_nodes=10)
    joined = ist.Graph.join([graph, copy.deepcopy(graph)])
    for name in GRAPH_TENSORS:
        assert type(getattr(graph, name)) is type(getattr(joined, name)) is torch.Tensor
        assert torch.equal(getattr(graph, name), getattr(expected, name))
    assert graph.edge_index.dtype == plain.dtype
    assert graph.edge_index.data_ptr() != edge_index.as_tensor().data_ptr() or not plain.numel()


def test_a_wrong_edge_index_is_refused():
    wrong = EdgeIndex(torch.tensor([[0, 1], [1, 9]]))
    with pytest.raises(ValueError, match=r"edge_index\[1\]: expected targets in 0 .. 4, got index 9"):
        ist.Graph(wrong, num_nodes=5)


@pytest.fixture(scope="module")
def layers_and_features():
    """Point convolutions of every package, and features of 10 nodes for each."""
    gs = gspaces.flipRot3dOnR3()
    fields = gs.type(*[gs.trivial_repr] * 3, *[gs.irrep(1, 1)] * 2)
    with_types = nn.ImplicitPointConv(fields, fields, n_layers=2, n_channels=4).eval()
    x = torch.randn(10, 9)
    return [
        (ImplicitPointConv(INTO, OUT), x),
        (ImplicitPointConv(INTO, OUT, depthwise=True), x),
        (InteractionBlock(INTO, OUT), x),
        (with_types, fields(x, torch.randn(10, 3))),
        (convert(with_types), x),
    ]


@EDGE_INDICES
def test_layers_take_an_edge_index(plain, edge_index, layers_and_features):
    edge_vec = torch.randn(plain.shape[1], 3)
    for layer, x in layers_and_features:
        found, expected = layer(x, edge_index, edge_vec), layer(x, plain, edge_vec)
        if not isinstance(found, torch.Tensor):
            found, expected = found.tensor, expected.tensor
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)


def test_data_with_an_edge_index():
    """Also of a Batch, whose edge vectors are made from its rows."""
    conv, data = conv_of(attributes=0), data_of(8)
    expected = conv(data.x, data.edge_index, data.edge_vec)
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(8, 8), sort_order="col")
    batch = Batch.from_data_list([data, data])
    edge_vec = batch.pos[batch.edge_index[1]] - batch.pos[batch.edge_index[0]]
    found = conv(batch.x, batch.edge_index, edge_vec)
    assert type(edge_vec) is type(found) is torch.Tensor
    assert_close(found, torch.cat([expected, expected]))


def test_loaders():
    conv, parts = conv_of(), [data_of(n) for n in (5, 9, 6, 3)]
    for batch, pair in zip(DataLoader(parts, batch_size=2), (parts[:2], parts[2:]), strict=True):
        expected = torch.cat([conv(p.x, p.edge_index, p.edge_vec, p.edge_attr) for p in pair])
        assert_close(conv(batch.x, batch.edge_index, batch.edge_vec, batch.edge_attr), expected)
    for part in RandomNodeLoader(data_of(30), num_parts=3):
        arguments = part.x, part.edge_index, part.edge_vec, part.edge_attr
        assert_close(conv(*arguments), Materialised(conv)(*arguments))


def test_the_neighbourhood_of_a_few_nodes_is_enough_for_them():
    """What a neighbour sampler gives, of all neighbours: two layers and two hops."""
    data, seeds = data_of(40), torch.tensor([3, 17])
    options = {"edge_attr": 1, "width": 1.0, "n_channels": 4, "degree": 4}
    blocks = [InteractionBlock(*irreps, **options).double() for irreps in ((INTO, OUT), (OUT, INTO))]

    def network(x, *geometry):
        for block in blocks:
            x = block(x, *geometry)
        return x

    nodes, edges, where, kept = k_hop_subgraph(seeds, 2, data.edge_index, relabel_nodes=True)
    assert len(nodes) < 40
    found = network(data.x[nodes], edges, data.edge_vec[kept], data.edge_attr[kept])
    assert_close(found[where], network(data.x, data.edge_index, data.edge_vec, data.edge_attr)[seeds])


def test_sequential():
    gate, head = Gate(OUT), Linear(OUT, "1x0e").double()
    first = ImplicitPointConv(INTO, gate.irreps_in, 1, width=1.0, n_channels=4).double()
    block = InteractionBlock(OUT, OUT, 1, width=1.0, n_channels=4).double()
    call = "x, edge_index, edge_vec, edge_attr"
    network = Sequential(
        f"{call}, batch",
        [
            (first, f"{call} -> x"),
            gate,
            (block, f"{call} -> x"),
            head,
            (global_mean_pool, "x, batch -> x"),
        ],
    )
    batch = Batch.from_data_list([data_of(6), data_of(4)])
    geometry = batch.edge_index, batch.edge_vec, batch.edge_attr
    expected = global_mean_pool(head(block(gate(Materialised(first)(batch.x, *geometry)), *geometry)), batch.batch)
    found = network(batch.x, *geometry, batch.batch)
    assert found.shape == (2, 1)
    assert_close(found, expected)
