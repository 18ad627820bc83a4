"""Kernels from tables: their error against the MLP of every edge, their derivatives, equivariance, batch statistics."""

import copy
import math

import pytest
import torch
from escnn import gspaces

import implicit_steer as ist
from implicit_steer import EdgeTypes, irreps, nn
from implicit_steer.ops import table as ops_table
from implicit_steer.ops import table_error
from implicit_steer.ops.kernel_mlp import table_sums
from implicit_steer.ops.native.bound import BoundKernel
from implicit_steer.ops.table import tabulation_of
from implicit_steer.plan import FUNCTIONS
from implicit_steer.plan.irreps import Irreps
from implicit_steer.plan.tabulated import tabulated

SMOOTH = ["silu", "gelu", "tanh"]
SPACES = {
    "O(3)": gspaces.flipRot3dOnR3,
    "SO(3)": gspaces.rot3dOnR3,
    "SO(2)": gspaces.rot2dOnR2,
    "O(2)": gspaces.flipRot2dOnR2,
}


def layer(name, table, dtype=torch.float64, attributes=0, **options):
    """Three scalars and two vectors to themselves."""
    torch.manual_seed(0)
    space = SPACES[name]()
    kind = space.type(*[space.trivial_repr] * 3, *[space.basespace_action] * 2)
    edges = space.type(*[space.trivial_repr] * attributes) if attributes else None
    options = {"norm": None, "activation": "silu", "bias": False} | options
    return nn.ImplicitPointConv(kind, kind, edges, table=table, **options).to(dtype)


def with_table(conv, table, **options):
    """A layer on irreps with the same weights and another table."""
    made = irreps.ImplicitPointConv(**conv.arguments() | {"table": table} | options).to(conv.bias.dtype)
    made.load_state_dict(conv.state_dict())
    return made.train(conv.training)


def on_irreps(table=None, dtype=torch.float64, scale=1.0, **options):
    torch.manual_seed(0)
    conv = irreps.ImplicitPointConv("2x0e + 1x1o", "1x0e + 1x1o + 1x2e", table=table, **options).to(dtype)
    with torch.no_grad():
        for p in conv.implicit_kernel.linears.parameters():
            p.mul_(scale)
    return conv


class Cloud:
    """Points with an isolated one, a self-loop, a repeated edge and edges of three types."""

    def __init__(self, dim, size, dtype=torch.float64, attributes=0, n=9, scale=0.7):
        generator = torch.Generator().manual_seed(1)

        def randn(*shape):
            return torch.randn(*shape, dtype=dtype, generator=generator)

        self.pos = scale * randn(n, dim)
        edges = ist.knn_graph(self.pos[:-1], 4)
        edges = torch.cat([edges, torch.tensor([[2, 5], [2, 4]]), edges[:, :1]], 1)
        self.graph = ist.Graph(edges, n)
        self.x, self.rows = randn(n, size), randn(3, attributes)
        self.types = torch.randint(3, (self.graph.num_edges,), generator=generator)

    def edge_attr(self, rows=None):
        rows = self.rows if rows is None else rows
        return EdgeTypes(self.types, rows) if rows.shape[1] else None

    def delta(self, pos=None):
        pos = self.pos if pos is None else pos
        return pos[self.graph.dst] - pos[self.graph.src]

    def run(self, conv, x=None, pos=None, rows=None):
        x, pos = self.x if x is None else x, self.pos if pos is None else pos
        if hasattr(conv.in_type, "gspace"):
            return conv(conv.in_type(x, pos), self.graph, self.delta(pos), self.edge_attr(rows)).tensor
        return conv(x, self.graph, self.delta(pos), self.edge_attr(rows))


def radial_errors(conv, table, reach=2.5):
    """Largest errors of K and of its derivatives along a ray from 0, relative to the largest of each."""
    direction = torch.nn.functional.normalize(torch.tensor([[1.0, 2.0, -2.0]], dtype=torch.float64), dim=1)
    radii = torch.cat([torch.logspace(-9, -2, 15), torch.linspace(0.01, reach, 700)]).double().requires_grad_()

    def derivatives(conv):
        k = conv.implicit_kernel(radii[:, None] * direction)
        chosen = [k[:, o, i] for o in range(k.shape[1]) for i in range(k.shape[2])][::7]
        first = [torch.autograd.grad(entry.sum(), radii, create_graph=True)[0] for entry in chosen]
        second = [torch.autograd.grad(d.sum(), radii, retain_graph=True)[0] for d in first]
        return k, torch.stack(first), torch.stack(second)

    exact, found = derivatives(conv), derivatives(with_table(conv, table))
    return [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(exact, found, strict=True)]


@pytest.mark.parametrize(
    ("n_layers", "scale", "cutoff"),
    [(2, 1, None), (2, 2, 2.0), (3, 1, 2.0), (3, 2, 2.0), (4, 1, None), (5, 1, None), (5, 1, 2.0)],
)
@pytest.mark.parametrize("activation", SMOOTH)
def test_order_of_convergence(activation, n_layers, scale, cutoff):
    """Cubic splines of smooth functions: errors like h⁴ of values, h³ and h² of their derivatives."""
    conv = on_irreps(activation=activation, n_layers=n_layers, scale=scale, cutoff=cutoff, width=1.0)
    coarse, fine = (radial_errors(conv, knots) for knots in (512, 1024))
    orders = [math.log2(a / b) for a, b in zip(coarse, fine, strict=True)]
    print(activation, n_layers, scale, cutoff, "errors", coarse, fine, "orders", orders)
    # measured: 3.8 … 4.6, 2.9 … 3.7, 1.3 … 2.3; the second derivative is rounded to 2e-7
    for order, expected, error, rounding in zip(orders, (4, 3, 2), fine, (1e-13, 1e-10, 1e-6), strict=True):
        assert abs(order - expected) < 1 or error < rounding


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("n_layers", [2, 5])
@pytest.mark.parametrize("activation", [f for f in FUNCTIONS if f != "relu"])
def test_auto_keeps_its_tolerance(activation, n_layers, scale):
    conv = on_irreps("auto", activation=activation, n_layers=n_layers, scale=scale)
    kernel = conv.implicit_kernel
    few = torch.randn(40, 3, dtype=torch.float64)
    exact = with_table(conv, None).implicit_kernel
    torch.testing.assert_close(kernel(few), exact(few), rtol=0, atol=0)  # too few points for a table
    table = kernel.plan.table
    assert table.error < table_error.TOLERANCE
    assert conv.implicit_kernel.table == "auto"
    points = 3 * torch.rand(2 * table.knots + 1000, 3, dtype=torch.float64)
    with torch.no_grad():
        expected, found = exact(points), kernel(points)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert 0 < error < table_error.TOLERANCE
    assert f"error {table.error:.1e}" in conv.explain()


def test_auto_without_a_table_that_is_good_enough(monkeypatch):
    """A kink in the value takes more knots than there are."""
    monkeypatch.setattr(table_error, "_MOST_KNOTS", 1 << 10)
    conv = on_irreps("auto", activation="relu")
    points = torch.randn(300, 3, dtype=torch.float64)
    found = conv.implicit_kernel(points)
    assert conv.implicit_kernel.plan.table.error > table_error.TOLERANCE
    torch.testing.assert_close(found, with_table(conv, None).implicit_kernel(points), rtol=0, atol=0)


def test_auto_chooses_again_after_a_checkpoint():
    conv, other = on_irreps("auto"), on_irreps("auto", scale=3)
    points = torch.randn(10, 3, dtype=torch.float64)
    for made in (conv, other):
        made.implicit_kernel(points)
    before = conv.implicit_kernel.plan.table
    conv.load_state_dict(other.state_dict())
    conv.implicit_kernel(points)
    assert conv.implicit_kernel.plan.table == other.implicit_kernel.plan.table != before


@pytest.mark.parametrize("knots", [4, 64])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("name", SPACES)
def test_equivariance_for_any_number_of_knots(name, norm, dtype, bound, backend, knots):
    conv = layer(name, knots, dtype, attributes=2, backend=backend, norm=norm)
    space, size = conv.in_type.gspace, conv.in_type.size
    cloud = Cloud(space.dimensionality, size, dtype, attributes=2, n=20)
    expected = cloud.run(conv)
    scale = expected.abs().max()
    if norm and knots == 4:  # of splines that far off a norm's variance is rounded to more: 8e-7 and 4e-15 measured
        bound *= 4
    for _ in range(5):
        g = space.fibergroup.sample()
        # Rounded once: matrices of float32 are not orthogonal, and change lengths by 1e-7.
        rotation, matrix = map(torch.from_numpy, (space.basespace_action(g), conv.in_type.representation(g)))
        x, pos = (cloud.x.double() @ matrix.T).to(dtype), (cloud.pos.double() @ rotation.T).to(dtype)
        assert (cloud.run(conv, x, pos) - expected.double() @ matrix.T).abs().max() / scale < bound


@pytest.mark.parametrize("attributes", [0, 2])
@pytest.mark.parametrize("cutoff", [None, 1.5])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("name", SPACES)
def test_backends_agree_to_second_order(name, norm, cutoff, attributes):
    """The native code against plain PyTorch; and both against the MLP of every edge, which `reference` evaluates."""
    results = {}
    for backend in ("reference", "eager", "cpu"):
        conv = layer(name, 128, attributes=attributes, norm=norm, cutoff=cutoff, backend=backend, aggr="mean")
        cloud = Cloud(conv.in_type.gspace.dimensionality, conv.in_type.size, attributes=attributes)
        inputs = [t.clone().requires_grad_() for t in (cloud.x, cloud.pos, cloud.rows)][: 3 if attributes else 2]
        out = cloud.run(conv, *inputs)
        learned = [*inputs, *conv.parameters()]
        first = torch.autograd.grad(out.sin().sum(), learned, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(first[1].square().sum(), learned, allow_unused=True)
        buffers = [b.clone() for key, b in conv.named_buffers() if "running" in key]
        results[backend] = [out, *buffers, *(t for t in first if t is not None)], [t for t in second if t is not None]
    # measured: 4e-14 and, with the self-loop, 1e-7 of second derivatives; against the MLP 1e-5 and 2e-3
    for pair, bounds in ((("cpu", "eager"), (1e-12, 1e-5)), (("cpu", "reference"), (1e-4, 2e-2))):
        for order, bound in enumerate(bounds):
            for found, expected in zip(*(results[backend][order] for backend in pair), strict=True):
                assert (found - expected).abs().max() <= bound * expected.abs().max().clamp(min=1e-6)


RADIAL = {"bessel": irreps.Bessel(3, 2.0), "cosines": irreps.Cosines(3, 2.0), "distance": irreps.Distance()}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", RADIAL)
def test_radial_inputs(name, backend):
    """They are computed at the knots. A distance is odd in the radius: its splines are not mirrored at 0."""
    cloud, results = Cloud(3, 5, attributes=1), []
    for table in (None, 512):
        conv = on_irreps(table, edge_attr=1, radial=RADIAL[name], cutoff=2.0, backend=backend)
        pos = cloud.pos.clone().requires_grad_()
        out = cloud.run(conv, pos=pos)
        results.append([out, *torch.autograd.grad(out.square().sum(), [pos, *conv.parameters()])])
    assert conv.implicit_kernel.plan.table.even == (name != "distance")
    for exact, found in zip(*results, strict=True):  # measured: 7e-8
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("radial", [None, irreps.Distance()])
@pytest.mark.parametrize("name", SPACES)
def test_splines_of_the_operator_are_those_of_pytorch(name, radial, monkeypatch):
    """Of two rows of attributes; values and gradients of hidden features at the knots."""
    kernel = layer(name, 9, **({} if radial is None else {"attributes": 1, "radial": radial})).implicit_kernel
    table = tabulation_of(kernel.plan, kernel.parameters_for_op())
    knots, channels = table.knots(kernel.shell_width), (kernel.plan.hidden_size - 1) // kernel.plan.field_size
    h = torch.randn(2 * len(knots.positions), kernel.plan.hidden_size, dtype=torch.float64, requires_grad=True)
    found = knots.splines(h, channels)
    assert found.shape == (2, 9 + 3, channels, len(kernel.plan.frame.order))
    grad = torch.randn_like(found)
    (of_found,) = torch.autograd.grad(found, h, grad)
    monkeypatch.setattr(ops_table, "is_native", lambda x: False)
    expected = knots.splines(h, channels)
    (of_expected,) = torch.autograd.grad(expected, h, grad)
    for a, b in ((found, expected), (of_found, of_expected)):
        assert (a - b).abs().max() <= 1e-14 * b.abs().max()  # measured: 3e-16
    assert kernel.plan.table.even == (radial is None)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_gradcheck(norm, backend):
    conv = on_irreps(12, edge_attr=1, cutoff=2.0, norm=norm, backend=backend, n_layers=2, n_channels=2).eval()
    cloud = Cloud(3, conv.irreps_in.size, attributes=1, n=6)
    inputs = [t.clone().requires_grad_() for t in (cloud.x, cloud.pos + 0.1 * torch.arange(6)[:, None], cloud.rows)]
    names = [name for name, p in conv.named_parameters() if p.requires_grad]

    def run(x, pos, rows, *parameters):
        pos = pos * (1 + 1e-3)  # no edge on a knot, where the second derivative is continuous but not the third
        return torch.func.functional_call(_Runs(conv, cloud), dict(zip(names, parameters, strict=True)), (x, pos, rows))

    parameters = [p.detach().clone().requires_grad_() for p in conv.parameters()]
    keep = cloud.graph.src != cloud.graph.dst
    cloud.graph = ist.Graph(torch.stack([cloud.graph.src, cloud.graph.dst])[:, keep], 6)
    cloud.types = cloud.types[keep]
    assert torch.autograd.gradcheck(run, (*inputs, *parameters))
    assert torch.autograd.gradgradcheck(run, (*inputs, *parameters), fast_mode=backend == "eager")


class _Runs(torch.nn.Module):
    def __init__(self, conv, cloud):
        super().__init__()
        self._parameters.update(conv._parameters)
        for name, module in conv.named_children():
            self.add_module(name, module)
        self.conv, self.cloud = [conv], cloud

    def forward(self, x, pos, rows):
        return self.cloud.run(self.conv[0], x, pos, rows)


def test_training_with_batch_norms_follows_that_of_every_edge():
    curves = []
    for table in (None, 256):
        torch.manual_seed(0)
        conv = on_irreps(table, norm="batch")
        cloud = Cloud(3, conv.irreps_in.size, n=30)
        target = torch.randn(30, conv.irreps_out.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        optimiser = torch.optim.Adam(conv.parameters(), 1e-2)
        losses = []
        for _ in range(50):
            optimiser.zero_grad()
            loss = (cloud.run(conv) - target).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=0)  # measured: 3e-7


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_the_same_bits_twice(backend):
    def gradients():
        conv = on_irreps(32, torch.float32, edge_attr=2, norm="batch", backend=backend)
        cloud = Cloud(3, conv.irreps_in.size, torch.float32, attributes=2, n=200)
        out = cloud.run(conv)
        return [out, *torch.autograd.grad(out.square().sum(), conv.parameters())]

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


def test_sums_over_the_edges_have_a_fixed_order():
    """Also on several threads."""
    plan = tabulated(on_irreps(32, torch.float32, norm="batch").implicit_kernel.plan, 1)
    delta, before = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        first, *others = (table_sums(plan, delta, delta.new_zeros(4000, 0)) for _ in range(20))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first, other) for other in others)


def test_parameters_and_state_dict_are_those_without_a_table():
    for make in (lambda table: on_irreps(table, norm="batch"), lambda table: layer("O(3)", table, norm="batch")):
        plain, conv = make(None), make(32)
        state = plain.state_dict()
        assert state.keys() == conv.state_dict().keys()
        conv.load_state_dict(state, strict=True)
        assert all(torch.equal(conv.state_dict()[key], value) for key, value in state.items())


def test_rows_of_attributes_are_found():
    """Plain attributes give what their types give; those that require gradients are refused."""
    conv = on_irreps(32, edge_attr=2)
    cloud = Cloud(3, conv.irreps_in.size, attributes=2)
    attributes = cloud.rows[cloud.types]
    found = conv(cloud.x, cloud.graph, cloud.delta(), attributes)
    torch.testing.assert_close(found, cloud.run(conv), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="edge_attr: expected a tensor that requires no gradient"):
        conv(cloud.x, cloud.graph, cloud.delta(), attributes.requires_grad_())


def test_weights_changed_in_place_are_noticed():
    conv = on_irreps(32).eval()
    points = torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        before = conv.implicit_kernel(points)
        conv.implicit_kernel.linears[1].weights.data.mul_(1.1)
        after = conv.implicit_kernel(points)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, with_table(conv, 32).implicit_kernel(points), rtol=0, atol=0)


def test_weights_that_stay_are_bound_once(monkeypatch):
    """The native code keeps what it packed from call to call; a changed weight is bound again."""
    bound, make = [], BoundKernel.__init__
    monkeypatch.setattr(BoundKernel, "__init__", lambda self, *a: (bound.append(self), make(self, *a))[1])
    conv = on_irreps(32).eval()
    cloud = Cloud(3, conv.irreps_in.size)
    with torch.no_grad():
        first = cloud.run(conv)
        n = len(bound)
        assert torch.equal(cloud.run(conv), first)
        assert len(bound) == n
        conv.implicit_kernel.linears[0].weights.mul_(2.0)
        assert not torch.equal(cloud.run(conv), first)
        assert len(bound) == n + 1


def test_copies_casts_and_empty_graphs():
    conv = on_irreps(32, torch.float32)
    cloud = Cloud(3, conv.irreps_in.size, torch.float32)
    expected = cloud.run(conv)
    assert torch.equal(cloud.run(copy.deepcopy(conv)), expected)
    double = Cloud(3, conv.irreps_in.size)
    exact = double.run(with_table(conv.double(), None))
    torch.testing.assert_close(double.run(conv), exact, atol=1e-2 * float(exact.detach().abs().max()), rtol=0)
    empty = torch.zeros(2, 0, dtype=torch.long)
    out = conv(double.x, empty, double.pos[:0])
    assert torch.equal(out, conv.expand_bias().expand_as(out))


@pytest.mark.parametrize("attributes", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_in_16_bits(dtype, attributes):
    """They are computed with in float32."""
    conv = on_irreps(256, dtype, edge_attr=attributes)
    cloud = Cloud(3, conv.irreps_in.size, dtype, attributes=attributes)
    exact = cloud.run(with_table(conv, None))
    assert (cloud.run(conv) - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_far_edges_and_nan():
    conv = on_irreps(16)
    points = torch.tensor([[1e3, 0, 0], [0, 1e6, 0], [float("nan"), 0, 0], [float("inf"), 0, 0]], dtype=torch.float64)
    values = conv.implicit_kernel(points)
    assert values[:2].abs().max() < 1e-290
    assert values[2].isnan().all()


def test_compiled():
    conv = on_irreps(32, torch.float32).eval()
    cloud = Cloud(3, conv.irreps_in.size, torch.float32)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    arguments = cloud.x, cloud.graph, cloud.delta()
    torch.testing.assert_close(compiled(*arguments), conv(*arguments), rtol=1e-6, atol=1e-6)


REFUSED = {
    "few": (3, "table: expected an integer >= 4, got 3"),
    "word": ("many", "table: expected None, a number of knots or 'auto', got 'many'"),
    "fraction": (2.5, "table: expected an integer >= 4, got 2.5"),
}


@pytest.mark.parametrize(("table", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_tables(table, message):
    with pytest.raises(ValueError, match=message):
        on_irreps(table)


def test_kernels_that_are_no_functions_of_the_radius():
    with pytest.raises(ValueError, match=r"table: expected None, got 8.*one layer is linear"):
        on_irreps(8, n_layers=1)
    for space in (gspaces.rot2dOnR2(8), gspaces.rot2dOnR3()):
        kind = space.type(space.trivial_repr)
        with pytest.raises(ValueError, match=r"table: expected None, got 8\. Of this layer there can be no table"):
            nn.ImplicitPointConv(kind, kind, table=8)
    space = gspaces.flipRot3dOnR3()
    kind, vector = space.type(space.trivial_repr), space.type(space.basespace_action)
    with pytest.raises(ValueError, match="evaluates the MLP at the edge's direction"):
        nn.ImplicitPointConv(kind, kind, vector, table=8)
    with pytest.raises(ValueError, match="sampling 'escnn'"):
        nn.ImplicitPointConv(kind, kind, sampling="escnn", table=8)


def test_explain_says_the_error():
    conv = on_irreps(64)
    text = conv.explain()
    assert "cubic splines, 64 knots" in text
    error = float(text.split("table      error ")[1].split()[0])
    assert error == pytest.approx(conv.implicit_kernel.table_error(), rel=0.1)
    assert "table" not in on_irreps(None).explain()


def test_irreps_of_a_layer_with_a_table_are_written_as_before():
    assert on_irreps(16).arguments()["table"] == 16
    assert Irreps.of(on_irreps("auto").arguments()["irreps_in"], "irreps_in").size == 5
