"""EdgeTypes against the rows that they stand for: the class itself, and layers that take it as edge_attr."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from deployed import molecules
from helpers import BACKENDS, layer
from hypothesis import given, settings
from hypothesis import strategies as st

import implicit_steer as ist
from implicit_steer import EdgeTypes
from implicit_steer.experiments.models import QM9Net
from implicit_steer.irreps import ImplicitPointConv, InteractionBlock
from implicit_steer.layers.blocks import convolve_in_blocks
from implicit_steer.testing.cases import SMALL

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def types_of(edges, types=5, attributes=3, dtype=torch.float64, seed=0):
    """Random types of edges with random rows, some of which no edge may have."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(types, attributes, dtype=dtype, generator=generator)
    return EdgeTypes(torch.randint(types, (edges,), generator=generator), rows)


def cloud(nodes=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(nodes, 3, dtype=dtype, generator=generator)
    graph = ist.Graph(ist.knn_graph(pos, k=4), nodes)
    return torch.randn(nodes, 8, dtype=dtype, generator=generator), graph, pos[graph.dst] - pos[graph.src]


# ---- the class


@pytest.mark.parametrize("dtype", INTEGERS)
def test_attributes_are_the_rows_of_the_edges(dtype):
    types = types_of(50)
    found = EdgeTypes(types.index.to(dtype), types.rows)
    assert found.index.dtype == (torch.int32 if dtype == torch.int32 else torch.int64)
    assert torch.equal(found.attributes(), types.rows[types.index])
    assert len(found) == 50
    assert repr(found) == "EdgeTypes(num_edges=50, num_types=5, num_attributes=3, dtype=float64, device=cpu)"


@settings(max_examples=50, deadline=None)
@given(
    edges=st.integers(0, 40),
    types=st.integers(1, 6),
    attributes=st.integers(0, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_types_of_given_rows(edges, types, attributes, dtype, seed):
    rows = types_of(edges, types, attributes, dtype, seed).attributes()
    found = EdgeTypes.from_rows(rows)
    assert torch.equal(found.attributes(), rows)
    assert len(found.rows) == len({tuple(row) for row in rows.tolist()})


def test_gradients_of_the_rows_add_up():
    types = types_of(300)
    rows = types.rows.requires_grad_()
    g = torch.randn(300, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad(EdgeTypes(types.index, rows).attributes(), rows, g)
    assert torch.equal(found, torch.zeros_like(rows).index_add(0, types.index, g))
    assert torch.autograd.gradgradcheck(lambda rows: EdgeTypes(types.index, rows).attributes().square(), rows)


def test_the_index_is_a_copy():
    index = torch.tensor([0, 1])
    types = EdgeTypes(index, torch.zeros(2, 1))
    index.fill_(7)
    assert types.index.tolist() == [0, 1]


def test_moved_and_copied():
    types = types_of(9)
    assert types.to("cpu") is types
    single = types.to(torch.float32)
    assert single.rows.dtype == torch.float32
    assert single.index.dtype == torch.int64
    assert types.to("meta").attributes().device.type == "meta"
    for other in (copy.deepcopy(types), pickle.loads(pickle.dumps(types))):
        assert torch.equal(other.attributes(), types.attributes())


ROWS = torch.zeros(3, 2)
WRONG = [
    (lambda: EdgeTypes([0, 1], ROWS), TypeError, "index: expected a torch.Tensor of integers, got list"),
    (lambda: EdgeTypes(torch.zeros(4), ROWS), TypeError, "index: expected a torch.Tensor of integers, got torch.float"),
    (lambda: EdgeTypes(torch.zeros(4, dtype=torch.bool), ROWS), TypeError, "index: .*got torch.bool. Convert it"),
    (
        lambda: EdgeTypes(torch.zeros(4, 1, dtype=torch.int64), ROWS),
        ValueError,
        r"index: expected .*\(E,\), got \(4, 1",
    ),
    (
        lambda: EdgeTypes(torch.tensor([0, 3]), ROWS),
        ValueError,
        r"index: expected types in 0 .. 2, got index 3. It holds",
    ),
    (lambda: EdgeTypes(torch.tensor([0, -1]), ROWS), ValueError, "index: expected types in 0 .. 2, got index -1"),
    (lambda: EdgeTypes(torch.tensor([0]), ROWS[:0]), ValueError, "index: expected no edges, as there are no types"),
    (lambda: EdgeTypes(torch.tensor([0], device="meta"), ROWS), ValueError, "index: expected device cpu, as rows, got"),
    (
        lambda: EdgeTypes(torch.tensor([0]), ROWS.long()),
        TypeError,
        r"rows: .*floating point .*\(T, A\), got torch.int64",
    ),
    (lambda: EdgeTypes(torch.tensor([0]), [1.0]), TypeError, "rows: expected a floating point tensor .*, got list"),
    (lambda: EdgeTypes(torch.tensor([0]), ROWS[0]), ValueError, r"rows: .*\(T, A\), got \(2,\)"),
    (lambda: EdgeTypes.from_rows(ROWS[0]), ValueError, r"edge_attr: .*\(E, A\), got \(2,\)"),
    (lambda: EdgeTypes.from_rows(ROWS.long()), TypeError, "edge_attr: .*got torch.int64"),
    (
        lambda: EdgeTypes.from_rows(torch.zeros(3, 2, requires_grad=True)),
        ValueError,
        r"edge_attr: expected a tensor that requires no gradient, got one that does. Pass EdgeTypes\(index, rows\)",
    ),
]


@pytest.mark.parametrize(("build", "kind", "message"), WRONG)
def test_wrong_arguments(build, kind, message):
    with pytest.raises(kind, match=message):
        build()


def test_types_without_edges():
    assert EdgeTypes(torch.zeros(0, dtype=torch.int64), ROWS[:0]).attributes().shape == (0, 2)


# ---- in layers


def outcome(run, rows, *inputs):
    """The output, and its gradients with respect to the rows and the inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in (rows, *inputs)]
    out = run(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def assert_same(run, types, *inputs):
    """``run(attributes, *inputs)`` gives the same bits with types as with their rows."""
    found = outcome(lambda rows, *inputs: run(EdgeTypes(types.index, rows), *inputs), types.rows, *inputs)
    expected = outcome(lambda rows, *inputs: run(rows.index_select(0, types.index), *inputs), types.rows, *inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3", "c4"])
def test_layers_with_types(name, backend):
    conv = layer(SMALL[name], "train", backend=backend)
    problem = SMALL[name].inputs(conv)
    types = types_of(problem.graph.num_edges, attributes=problem.attributes.shape[1])
    given = conv.in_type(problem.x, problem.pos)
    assert_same(lambda attributes, delta: conv(given, problem.graph, delta, attributes).tensor, types, problem.delta)
    assert_same(lambda attributes, delta: conv.implicit_kernel(delta, attributes), types, problem.delta)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_layers_on_irreps_with_types(norm, depthwise):
    x, graph, delta = cloud()
    conv = ImplicitPointConv("2x0e+2x1o", "3x0e+2x1o", 3, norm=norm, depthwise=depthwise).double()
    block = InteractionBlock("2x0e+2x1o", "3x0e+2x1o", 3, norm=norm, depthwise=depthwise).double()
    for module in (conv, block):
        assert_same(lambda a, x, delta, module=module: module(x, graph, delta, a), types_of(graph.num_edges), x, delta)


def test_autocast_no_grad_and_16_bit_rows():
    x, graph, delta = cloud(dtype=torch.float32)
    conv, types = ImplicitPointConv("2x0e+2x1o", "1x1o", 3), types_of(graph.num_edges, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(conv(x, graph, delta, types), conv(x, graph, delta, types.attributes()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x, graph, delta, types), conv(x, graph, delta, types.attributes()))
    half = types.to(torch.bfloat16)
    assert torch.equal(conv(x, graph, delta, half), conv(x, graph, delta, half.attributes()))


def test_saved_and_loaded(tmp_path):
    x, graph, delta = cloud()
    conv, types = ImplicitPointConv("2x0e+2x1o", "1x1o", 3).double(), types_of(graph.num_edges)
    ist.save(conv, tmp_path / "conv.safetensors")
    loaded = ist.load(tmp_path / "conv.safetensors")
    assert torch.equal(loaded(x, graph, delta, types), conv(x, graph, delta, types.attributes()))


def test_network_for_molecules(tmp_path):
    net, batch = QM9Net(edge_attr="bonds", blocks=1).double(), molecules(torch.float64)
    types = types_of(batch.edge_index.shape[1], attributes=4)
    expected = net(replace(batch, edge_attr=types.attributes()))
    assert torch.equal(net(replace(batch, edge_attr=types)), expected)
    ist.save(net, tmp_path / "net.safetensors")
    assert torch.equal(ist.load(tmp_path / "net.safetensors")(replace(batch, edge_attr=types)), expected)


def test_region_by_region():
    pos = torch.rand(200, 3, dtype=torch.float64)
    conv, x = ImplicitPointConv("2x0e+2x1o", "1x1o", 3).double(), torch.randn(200, 8, dtype=torch.float64)
    rows = types_of(0).rows

    def types(region):
        """By the parities of both ends: the same on the whole cloud."""
        source, target = region.nodes[region.graph.src], region.own[region.graph.dst]
        return EdgeTypes(source % 2 + 2 * (target % 2), rows)

    found = convolve_in_blocks(conv, x, pos, 0.3, 60, edge_attr=types)
    edges = ist.radius_graph(pos, 0.3)
    whole = EdgeTypes(edges[0] % 2 + 2 * (edges[1] % 2), rows)
    torch.testing.assert_close(found, conv(x, edges, pos[edges[1]] - pos[edges[0]], whole), rtol=1e-12, atol=1e-12)


def test_compiled_and_exported():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ImplicitPointConv("2x0e+2x1o", "1x1o", 3).double()

        def forward(self, x, edges, delta, index, rows):
            return self.conv(x, edges, delta, EdgeTypes(index, rows))

    x, graph, delta = cloud()
    types, network = types_of(graph.num_edges), Network()
    given = x, graph.edge_index, delta, types.index, types.rows
    expected = network.conv(x, graph, delta, types.attributes())
    program = torch.export.export(network, given).module()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    whole = torch.compile(network.conv, fullgraph=True, backend="aot_eager")
    for found in (program(*given), compiled(*given), whole(x, graph, delta, types)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="index: expected types of edges"):
        compiled(*given[:3], types.index + 1, types.rows)


def test_wrong_types_for_a_layer():
    x, graph, delta = cloud()
    conv, types = ImplicitPointConv("2x0e+2x1o", "1x1o", 3).double(), types_of(graph.num_edges)
    edges = graph.num_edges
    wrong = [
        (EdgeTypes(types.index[1:], types.rows), ValueError, rf"edge_attr.index: expected shape \({edges},\), got"),
        (
            EdgeTypes(types.index, types.rows[:, 1:]),
            ValueError,
            r"edge_attr.rows: expected shape \(\*, 3\), got \(5, 2\)",
        ),
        (types.to(torch.float32), TypeError, "edge_attr.rows: expected dtype torch.float64"),
        (types.to("meta"), ValueError, "edge_attr.rows: expected device cpu"),
    ]
    for given_types, kind, message in wrong:
        with pytest.raises(kind, match=message):
            conv(x, graph, delta, given_types)
    with pytest.raises(ValueError, match=r"edge_attr: expected None, got EdgeTypes of shape \(5, 3\)"):
        ImplicitPointConv("2x0e+2x1o", "1x1o").double()(x, graph, delta, types)
