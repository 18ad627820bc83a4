"""Frozen layers: splines in place of the kernel's MLP, with the layer's own numbers, for the rows that they know."""

import copy
import pickle

import pytest
import torch
from escnn import gspaces

import implicit_steer as ist
from implicit_steer import EdgeTypes, irreps, layers, nn

N = 20
ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.2]], dtype=torch.float64)


def on_irreps(dtype=torch.float64, **options):
    torch.manual_seed(0)
    conv = irreps.ImplicitPointConv("3x0e + 1x1o", "2x0e + 1x1o + 1x2e", **{"table": 64} | options)
    return with_statistics(conv.to(dtype))


def with_escnn(space, cls=nn.ImplicitPointConv, dtype=torch.float64, **options):
    torch.manual_seed(0)
    kind = space.type(*[space.trivial_repr] * 2, *[space.basespace_action] * 2)
    attributes = options.pop("edge_attr", 0)
    edges = space.type(*[space.trivial_repr] * attributes) if attributes else None
    return with_statistics(cls(kind, kind, edges, **{"table": 64} | options).to(dtype))


def with_statistics(conv):
    """Batch norms that have seen a batch, and a bias that is not 0."""
    with torch.no_grad():
        if conv.bias is not None:
            conv.bias.normal_()
        run(conv.train(), problem(conv))
    return conv.eval()


def problem(conv):
    """x, graph, edge vectors, and types of edges where the layer has attributes."""
    kernel, generator = conv.implicit_kernel, torch.Generator().manual_seed(1)
    dtype, dim = kernel.shell_width.dtype, kernel.plan.frame.dim
    pos, x = (torch.randn(N, n, generator=generator, dtype=dtype) for n in (dim, kernel.plan.in_size))
    graph = ist.Graph(ist.knn_graph(0.7 * pos, 5), N)
    types = torch.randint(3, (graph.num_edges,), generator=generator)
    edges = EdgeTypes(types, ROWS.to(dtype)) if kernel.n_attributes else None
    return x, graph, 0.7 * (pos[graph.dst] - pos[graph.src]), edges


def run(conv, given):
    x, *rest = given
    return layers.values(conv(conv.in_type(x, x.new_zeros(N, rest[1].shape[1])), *rest))


MADE = {
    "plain": on_irreps,
    "batch norm": lambda **o: on_irreps(norm="batch", **o),
    "cutoff": lambda **o: on_irreps(cutoff=2.0, **o),
    "depthwise": lambda **o: on_irreps(depthwise=True, **o),
    "mean": lambda **o: on_irreps(aggr="mean", **o),
    "types": lambda **o: on_irreps(edge_attr=2, norm="batch", **o),
    "radial": lambda **o: on_irreps(edge_attr=2, radial=irreps.Bessel(3, 2.0), **o),
    "eager": lambda **o: on_irreps(backend="eager", **o),
    "O(3)": lambda **o: with_escnn(gspaces.flipRot3dOnR3(), edge_attr=2, **o),
    "SO(2)": lambda **o: with_escnn(gspaces.rot2dOnR2(), edge_attr=2, **o),
    "downsampling": lambda **o: with_escnn(gspaces.rot3dOnR3(), nn.ImplicitPointConvWithDownsampling, **o),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MADE)
def test_the_layers_own_numbers(name, dtype):
    conv = MADE[name](dtype=dtype)
    given = problem(conv)
    expected, frozen = run(conv, given), conv.freeze_table()
    assert type(frozen).__module__ == "implicit_steer.layers.point_conv"
    assert isinstance(frozen, layers.ImplicitPointConvWithDownsampling) == (name == "downsampling")
    found = run(frozen, given)
    if name == "eager":  # the splines' coefficients are those of the backend cpu
        torch.testing.assert_close(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert 0 < frozen.implicit_kernel.table_error() == conv.implicit_kernel.table_error() < 1e-2
    assert f"error {frozen.implicit_kernel.table_error():.1e}" in frozen.explain()
    x, graph, delta, types = given
    if types is not None:
        assert torch.equal(run(frozen, (x, graph, delta, types.attributes())), found)
        other = EdgeTypes(2 - types.index, types.rows.flip(0))  # the same in another order
        assert torch.equal(run(frozen, (x, graph, delta, other)), found)
        few = frozen.implicit_kernel(delta[:5], types.attributes()[:5])
        torch.testing.assert_close(few, conv.implicit_kernel(delta[:5], types.attributes()[:5]))


def test_knots_of_a_layer_without_a_table():
    conv = on_irreps(table=None)
    given = problem(conv)
    coarse, fine = (conv.freeze_table(knots=knots) for knots in (32, 1024))
    chosen = conv.freeze_table(knots="auto").implicit_kernel
    assert chosen.plan.table.error < 1e-6
    assert chosen.table == chosen.plan.table.knots
    assert conv.implicit_kernel.table is None
    errors = [(run(frozen, given) - run(conv, given)).abs().max().item() for frozen in (coarse, fine)]
    assert errors[1] < 1e-8 < errors[0]


def test_auto_keeps_the_knots_that_it_chose():
    conv = on_irreps(table="auto")
    frozen = conv.freeze_table().implicit_kernel
    assert frozen.table == conv.implicit_kernel.plan.table.knots
    assert frozen.plan.table.error < 1e-6


@pytest.mark.parametrize("name", ["plain", "types", "SO(2)"])
def test_derivatives(name):
    frozen = MADE[name]().freeze_table(ROWS[:2] if name != "plain" else None, knots=6)
    x, graph, delta, types = problem(frozen)
    few = slice(0, 6)
    graph = ist.Graph(graph.edge_index[:, few], N)
    edges = None if types is None else EdgeTypes(types.index[few] % 2, types.rows[:2])
    kernel = frozen.implicit_kernel
    splines, width = kernel.linears[0].weights, kernel.shell_width

    def call(x, delta, coefficients, sigma):
        state = {"implicit_kernel.linears.0.weights": coefficients, "implicit_kernel.shell_width": sigma}
        return torch.func.functional_call(frozen, state, (x, graph, delta, edges))

    leaves = [t.detach().clone().requires_grad_() for t in (x, delta[few], splines, width)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_fine_tuning_of_a_copy():
    conv = on_irreps()
    before, given = copy.deepcopy(conv.state_dict()), problem(conv)
    frozen = conv.freeze_table()
    target = run(conv, given).detach() + 0.1
    optimizer = torch.optim.Adam(frozen.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (run(frozen, given) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(p.grad is not None for p in frozen.parameters())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())


def test_what_was_frozen_stays_frozen():
    conv = on_irreps()
    conv.implicit_kernel.shell_width.requires_grad_(False)
    frozen = conv.train().freeze_table()
    assert frozen.training
    assert not frozen.implicit_kernel.shell_width.requires_grad
    assert frozen.implicit_kernel.linears[0].weights.requires_grad


def test_one_row():
    conv = on_irreps(edge_attr=2)
    x, graph, delta, types = problem(conv)
    given = x, graph, delta, EdgeTypes(types.index * 0, ROWS[2:])
    expected, frozen = run(conv, given), conv.freeze_table()
    assert torch.equal(run(frozen, given), expected)
    with pytest.raises(ValueError, match="edge_attr: expected rows among the 1 that the layer was frozen with, got 2"):
        run(frozen, (x, graph, delta, types))


def test_no_edges():
    for conv in (on_irreps(), on_irreps(edge_attr=2)):
        frozen = conv.freeze_table()
        x = problem(conv)[0]
        none = torch.zeros(2, 0, dtype=torch.long)
        edges = [EdgeTypes(none[0], ROWS[:k]) for k in (0, 2)] if frozen.implicit_kernel.n_attributes else [None]
        for attributes in edges:
            y = frozen(x, none, x.new_zeros(0, 3), attributes)
            torch.testing.assert_close(y, frozen.expand_bias().expand(N, -1))


def test_rows_of_another_dtype():
    frozen = on_irreps(edge_attr=2).freeze_table().float()
    x, graph, delta, types = problem(frozen)
    assert types.rows.dtype == torch.float32  # 0.1 is another number in float64
    run(frozen, (x, graph, delta, types))
    halves = on_irreps(torch.float32, edge_attr=2).freeze_table(ROWS.bfloat16())
    run(halves, (x, graph, delta, EdgeTypes(types.index, ROWS.bfloat16())))


def test_rows_that_change_in_place():
    frozen = on_irreps(edge_attr=2).freeze_table()
    x, graph, delta, types = problem(frozen)
    rows = types.rows.clone()
    first = run(frozen, (x, graph, delta, EdgeTypes(types.index, rows)))
    rows.copy_(rows.flip(0).clone())
    swapped = run(frozen, (x, graph, delta, EdgeTypes(2 - types.index, rows)))
    assert torch.equal(first, swapped)
    rows[0, 0] = 7
    with pytest.raises(ValueError, match=r"got 1 others, the first \[7\.0"):
        run(frozen, (x, graph, delta, EdgeTypes(types.index, rows)))


def test_copies_and_state_dict():
    frozen = on_irreps(edge_attr=2, norm="batch").freeze_table()
    given = problem(frozen)
    expected = run(frozen, given)
    for made in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(run(made, given), expected)
    kernel = layers.FrozenKernel(**frozen.implicit_kernel.arguments()).double()
    kernel.load_state_dict(frozen.implicit_kernel.state_dict())
    assert torch.equal(kernel(given[2], given[3]), frozen.implicit_kernel(given[2], given[3]))


def test_compiled():
    frozen = on_irreps(torch.float32, edge_attr=2).freeze_table()
    x, graph, delta, types = problem(frozen)
    compiled = torch.compile(lambda delta: frozen(x, graph, delta, types), fullgraph=True)
    torch.testing.assert_close(compiled(delta), frozen(x, graph, delta, types))


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda: on_irreps(table=None), {}, "table: expected a layer with a table, got None. Build the layer with"),
        (lambda: on_irreps(), {"knots": 3}, "table: expected an integer >= 4, got 3"),
        (lambda: on_irreps(n_layers=1, table=None), {"knots": 9}, "a kernel of one layer is linear"),
        (lambda: on_irreps().freeze_table(), {}, "table: expected a layer with an MLP, got a frozen one"),
        (lambda: irreps.ImplicitPointConv("1x0e", "1x0e", 2, table=8), {}, "rows: expected the rows .* got None. Call"),
        (lambda: on_irreps(edge_attr=2), {"rows": ROWS[:, :1]}, r"rows: expected shape \(T, 2\)"),
        (
            lambda: on_irreps(edge_attr=2),
            {"rows": ROWS[:0]},
            r"shape \(T, 2\), T at least 1, got \(0, 2\)",
        ),
        (lambda: on_irreps(), {"rows": ROWS}, r"rows: expected shape \(T, 0\)"),
    ],
)
def test_errors_of_freezing(make, arguments, words):
    with pytest.raises(ValueError, match=words):
        make().freeze_table(**arguments)


def test_samplings_without_a_table():
    conv = with_escnn(gspaces.flipRot3dOnR3(), table=None, sampling="escnn")
    with pytest.raises(ValueError, match=r"sampling 'escnn' of .* evaluates the MLP at the edge's direction, too"):
        conv.freeze_table(knots=64)


def test_plain_attributes_say_nothing_of_other_edges():
    conv = irreps.ImplicitPointConv("1x0e", "1x0e", 2, table=8).double()
    x, graph, delta, types = problem(conv)
    run(conv, (x, graph, delta, types))
    run(conv, (x, graph, delta, types.attributes()))
    with pytest.raises(ValueError, match="rows: expected the rows"):
        conv.freeze_table()


def test_errors_of_a_frozen_layer():
    frozen = on_irreps(edge_attr=2).freeze_table()
    x, graph, delta, types = problem(frozen)
    rows = types.rows.clone().requires_grad_()
    for attributes, words in [
        (EdgeTypes(types.index, rows), "edge_attr.rows: expected rows that require no gradient"),
        (types.attributes() + 1, "edge_attr: expected rows among the 3 that .* got 3 others, the first .* Freeze the"),
        (types.attributes() * float("nan"), "got .* others, the first .nan"),
        (types.attributes()[:, :1], r"edge_attr: expected shape \(\d+, 2\)"),
        (None, "edge_attr: expected a tensor of 2 attributes each, got None"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(frozen, (x, graph, delta, attributes))
    with pytest.raises(ValueError, match="attrs: expected rows among the 3"):
        frozen.implicit_kernel(delta, types.attributes() + 1)


def test_kernels_with_an_mlp_take_no_splines():
    plan = on_irreps().freeze_table().implicit_kernel.plan
    with pytest.raises(ValueError, match="plan: expected one with an MLP"):
        layers.ImplicitKernel(plan)
    with pytest.raises(ValueError, match="plan: expected one with splines"):
        layers.FrozenKernel(on_irreps().implicit_kernel.plan, 0)
