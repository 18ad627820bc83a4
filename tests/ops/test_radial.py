"""Radial inputs: the functions and their derivatives, and layers with them against the same numbers as attributes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import BACKENDS, with_edges
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import implicit_steer as ist
from implicit_steer.deploy.encoding import encode
from implicit_steer.irreps import Bessel, Cosines, Distance, ImplicitPointConv, InteractionBlock, from_escnn, to_escnn
from implicit_steer.nn import ImplicitKernel
from implicit_steer.nn import ImplicitPointConv as EscnnConv
from implicit_steer.ops.radial import radial_values
from implicit_steer.testing.cases import SMALL, Case, equivariance_error, fields

RADIALS = [Distance(), Cosines(3, 2.0), Bessel(4, 2.5)]
EVEN = RADIALS[1:]


def formula(radial, r):
    """(E, size), as the definitions say, for r > 0 (E,)."""
    if isinstance(radial, Distance):
        return r[:, None]
    z = np.pi * np.arange(1, radial.n + 1) * r[:, None] / radial.cutoff
    if isinstance(radial, Cosines):
        return np.sqrt(2) * np.cos(z)
    return np.sqrt(2 / radial.cutoff) * np.sin(z) / r[:, None]


def derivatives(radial, delta):
    """(E, size) values, and the first and second derivatives along a direction."""
    direction = torch.linspace(0.5, 1.5, delta.shape[1], dtype=delta.dtype)

    def along(t):
        return radial_values(radial, delta + t * direction)

    first = torch.func.jvp(along, (torch.zeros((), dtype=delta.dtype),), (torch.ones((), dtype=delta.dtype),))[1]
    second = torch.func.jacfwd(torch.func.jacfwd(along))(torch.zeros((), dtype=delta.dtype))
    return radial_values(radial, delta), first, second


# ---- the functions


radials = st.one_of(
    st.just(Distance()),
    st.builds(Cosines, st.integers(1, 12), st.floats(0.1, 20)),
    st.builds(Bessel, st.integers(1, 12), st.floats(0.1, 20)),
)


@settings(max_examples=100, deadline=None)
@given(radial=radials, dim=st.sampled_from([2, 3]), exponent=st.integers(-9, 1), seed=st.integers(0, 99))
def test_values_are_the_formulas(radial, dim, exponent, seed):
    delta = np.random.default_rng(seed).normal(size=(20, dim)) * 10.0**exponent
    expected = formula(radial, np.linalg.norm(delta, axis=1))
    scale = np.abs(formula(radial, np.array([1e-6]))).max() if radial.even else np.abs(expected).max()
    reach = 1 + np.abs(delta).max() / getattr(radial, "cutoff", 1.0)  # periods whose rounding adds up
    for dtype, rounding in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        found = radial_values(radial, torch.from_numpy(delta).to(dtype))
        assert found.dtype == dtype
        assert found.shape == (20, radial.size)
        assert np.abs(found.double().numpy() - expected).max() <= rounding * reach * scale


@pytest.mark.parametrize("radial", EVEN, ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-12, 1e-7, 1e-5, 1e-3, 0.1, 1.0])
def test_float32_keeps_the_digits_of_both_derivatives(radial, length):
    """Down to r = 0, where float64 is right by the checks of gradients below."""
    delta = length * torch.nn.functional.normalize(torch.arange(1.0, 13).view(4, 3), dim=1)
    for found, expected in zip(derivatives(radial, delta), derivatives(radial, delta.double()), strict=True):
        assert (found - expected).abs().max() <= 3e-6 * expected.abs().max() + 1e-5


@pytest.mark.parametrize("radial", RADIALS, ids=str)
@pytest.mark.parametrize("dim", [2, 3])
def test_checks_of_gradients(radial, dim):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(6, dim, dtype=torch.float64, generator=generator)
    if radial.even:
        delta = delta * torch.tensor([0.0, 1e-12, 1e-9, 1e-3, 0.3, 1.0], dtype=torch.float64)[:, None]
    delta.requires_grad_()
    assert gradcheck(lambda delta: radial_values(radial, delta), delta)
    assert gradgradcheck(lambda delta: radial_values(radial, delta), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_at_the_origin(dtype):
    delta = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    value = radial_values(Distance(), delta)
    (first,) = torch.autograd.grad(value, delta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), delta)
    assert value.item() == 0
    assert not first.any()
    assert not second.any()


@pytest.mark.parametrize("radial", RADIALS, ids=str)
def test_nan_and_no_edges(radial):
    assert radial_values(radial, torch.full((2, 3), torch.nan)).isnan().all()
    assert radial_values(radial, torch.zeros(0, 3)).shape == (0, radial.size)


def test_values_of_a_radial():
    for one in RADIALS:
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert one == other
            assert hash(one) == hash(other)
    assert Cosines(4, 5) == Cosines(4, 5.0) != Bessel(4, 5.0)
    assert Cosines(np.int64(4), np.float64(5)) == Cosines(4, 5.0)
    assert len(set(RADIALS)) == 3
    assert [str(radial) for radial in RADIALS] == ["Distance()", "Cosines(n=3, cutoff=2.0)", "Bessel(n=4, cutoff=2.5)"]
    assert [radial.even for radial in RADIALS] == [False, True, True]


@pytest.mark.parametrize("kind", [Cosines, Bessel])
@pytest.mark.parametrize(
    ("n", "cutoff", "message"),
    [
        (0, 1.0, "n: expected an integer >= 1, got 0"),
        (2.5, 1.0, "n: expected an integer >= 1, got 2.5"),
        (True, 1.0, "n: expected an integer >= 1, got True"),
        (3, 0.0, "cutoff: expected a positive radius, got 0.0"),
        (3, -1, "cutoff: expected a positive radius, got -1"),
        (3, float("inf"), "cutoff: expected a finite number"),
        (3, None, "cutoff: expected a finite number, got None"),
    ],
)
def test_wrong_radials(kind, n, cutoff, message):
    with pytest.raises(ValueError, match=message):
        kind(n, cutoff)


@pytest.mark.parametrize("build", [ImplicitPointConv, InteractionBlock])
def test_radial_of_another_kind(build):
    with pytest.raises(TypeError, match=r"radial: expected Distance\(\), Cosines\(n, cutoff\), .* or None, got 6"):
        build("2x0e", "2x0e", radial=6)


# ---- layers with escnn's types, in every kind of frame

CASES = {
    "zonal": SMALL["o3"],
    "zonal, no attributes": SMALL["so3-mixed"],
    "planar": SMALL["so2-r3"],
    "planar in the plane": SMALL["o2"],
    "no frame": SMALL["o3-vector-attr"],
    "finite": SMALL["c4"],
    "linear": SMALL["o3-linear"],
}


def escnn_layers(case, radial, **options):
    """A layer with radial inputs, and one with as many scalars before the attributes and the same parameters."""
    gspace = case.gspace
    into, out, given = (fields(gspace, names) for names in (case.into, case.out, case.attributes))
    more = [gspace.trivial_repr] * radial.size + ([] if given is None else list(given.representations))
    size = {"n_layers": case.n_layers, "n_channels": case.n_channels, **options}
    torch.manual_seed(0)
    conv = EscnnConv(into, out, given, radial=radial, **size).double()
    plain = EscnnConv(into, out, gspace.type(*more), **size).double()
    plain.load_state_dict(conv.state_dict())
    return conv, plain


def outcome(run, conv, *inputs):
    """The output, its gradients, and those of a penalty on them, in the inputs and the parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = run(conv, *leaves)
    variables = [*leaves, *conv.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(out.square().sum(), variables, create_graph=True, **options)
    second = torch.autograd.grad(sum(g.square().sum() for g in first[: len(leaves)]), variables, **options)
    return [out, *first, *second]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-11 * (1 + b.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radial", RADIALS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_layers_with_escnns_types(name, radial, backend):
    conv, plain = escnn_layers(CASES[name], radial, backend=backend, activation="silu", norm=None)
    problem = CASES[name].inputs(conv)
    delta = torch.where(problem.delta.norm(dim=1, keepdim=True) > 0, problem.delta, 0.1)

    def ours(conv, x, delta, *attributes):
        return conv(conv.in_type(x, problem.pos), problem.graph, delta, *attributes).tensor

    def theirs(conv, x, delta, *attributes):
        values = torch.cat([radial_values(radial, delta), *attributes], 1)
        return conv(conv.in_type(x, problem.pos), problem.graph, delta, values).tensor

    inputs = [problem.x, delta] + ([] if problem.attributes is None else [problem.attributes])
    assert conv.implicit_kernel.n_attributes == sum(t.shape[1] for t in inputs[2:])
    with torch.no_grad():
        assert torch.equal(ours(conv, *inputs), theirs(plain, *inputs))
    assert_same(outcome(ours, conv, *inputs), outcome(theirs, plain, *inputs))
    values = torch.cat([radial_values(radial, delta), *inputs[2:]], 1)
    assert torch.equal(conv.implicit_kernel(delta, *inputs[2:]), plain.implicit_kernel(delta, values))


@pytest.mark.parametrize("radial", RADIALS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equivariance(name, radial):
    conv, _ = escnn_layers(CASES[name], radial, sampling="auto")
    exact = CASES[name] is not SMALL["o3-vector-attr"]
    if exact:
        conv.eval().check_equivariance(atol=1e-11, rtol=1e-11)
        conv.implicit_kernel.check_equivariance(atol=1e-11, rtol=1e-11)
        group = conv.in_type.gspace.fibergroup
        problem = CASES[name].inputs(conv)
        assert equivariance_error(conv, problem, [group.sample() for _ in range(5)]) < 1e-12
    else:  # the authors' grid
        conv.eval().check_equivariance(atol=0.1, rtol=0.1)


def test_batch_norms_measure_the_same():
    conv, plain = escnn_layers(CASES["zonal"], Cosines(3, 2.0))
    problem = CASES["zonal"].inputs(conv)
    values = torch.cat([radial_values(Cosines(3, 2.0), problem.delta), problem.attributes], 1)
    found = problem.run(conv.train())
    problem.attributes = values
    assert torch.equal(found, problem.run(plain.train()))
    for ours, theirs in zip(conv.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:edge_delta. the kernel's shell")
@pytest.mark.parametrize("radius", [0.0, 1e-3])
@pytest.mark.parametrize("radial", EVEN, ids=str)
@pytest.mark.parametrize("name", ["zonal", "planar"])
def test_both_orders_at_the_origin(name, radial, radius):
    spaces = {"zonal": "O(3)", "planar": "O(2) on R2"}
    case = Case("", spaces[name], "1 scalar+vector", "1 scalar, 1 vector", "1 scalar", 2, 2, nodes=3, degree=2)
    conv, _ = escnn_layers(case, radial, activation="silu", norm=None)
    problem = with_edges(case.inputs(conv), slice(3))
    direction = torch.randn(problem.delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(x, delta, attributes):
        return conv(conv.in_type(x, problem.pos), problem.graph, delta, attributes).tensor

    leaves = [t.requires_grad_() for t in (problem.x, radius * direction, problem.attributes)]
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


def test_kernel_alone():
    scalar, vector = (fields(SMALL["o3"].gspace, names) for names in ("1 scalar", "1 vector"))
    kernel = ImplicitKernel(scalar, vector, radial=Cosines(3, 2.0), norm=None)
    assert kernel.n_attributes == 0
    assert kernel(torch.randn(5, 3)).shape == (5, 3, 1)
    assert "3 attributes, 3 of them Cosines(n=3, cutoff=2.0)" in kernel.explain()


# ---- layers on irreps


def cloud(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(20, 3, dtype=dtype, generator=generator)
    graph = ist.Graph(ist.knn_graph(pos, k=4), 20)
    attributes = torch.randn(graph.num_edges, 2, dtype=dtype, generator=generator)
    return torch.randn(20, 8, dtype=dtype, generator=generator), graph, pos[graph.dst] - pos[graph.src], attributes


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("attributes", [0, 2])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("radial", RADIALS, ids=str)
def test_layers_on_irreps(radial, depthwise, attributes, layers, tmp_path):
    x, graph, delta, given = cloud()
    given = given[:, :attributes]
    options = {"depthwise": depthwise, "n_layers": layers}
    for build in (ImplicitPointConv, InteractionBlock):
        torch.manual_seed(0)
        module = build("2x0e+2x1o", "3x0e+2x1o", attributes, radial=radial, **options).double()
        torch.manual_seed(0)
        plain = build("2x0e+2x1o", "3x0e+2x1o", attributes + radial.size, **options).double()
        assert module.state_dict().keys() == plain.state_dict().keys()
        values = torch.cat([radial_values(radial, delta), given], 1)
        given_attributes = given if attributes else None
        expected = plain(x, graph, delta, values)
        assert torch.equal(module(x, graph, delta, given_attributes), expected)
        ist.save(module, tmp_path / "module.safetensors")
        loaded = ist.load(tmp_path / "module.safetensors")
        assert loaded.arguments() == module.arguments()
        assert torch.equal(loaded(x, graph, delta, given_attributes), expected)
        types = ist.EdgeTypes.from_rows(given)
        assert torch.equal(module(x, graph, delta, types), expected)


def test_compiled_and_exported():
    x, graph, delta, attributes = cloud()
    for radial in RADIALS:
        conv = ImplicitPointConv("2x0e+2x1o", "1x1o", 2, radial=radial).double()
        expected = conv(x, graph, delta, attributes)
        compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
        program = torch.export.export(conv, (x, graph.edge_index, delta, attributes)).module()
        for found in (compiled(x, graph, delta, attributes), program(x, graph.edge_index, delta, attributes)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_autocast():
    x, graph, delta, attributes = cloud(torch.float32)
    conv = ImplicitPointConv("2x0e+2x1o", "1x1o", 2, radial=Bessel(4, 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(x, graph, delta, attributes)
    assert torch.equal(found, conv(x, graph, delta, attributes))


def test_attributes_that_the_layer_has_not():
    x, graph, delta, attributes = cloud()
    conv = ImplicitPointConv("2x0e+2x1o", "1x1o", radial=Bessel(4, 2.0)).double()
    with pytest.raises(ValueError, match="edge_attr: expected None, got Tensor of shape"):
        conv(x, graph, delta, attributes)
    conv = ImplicitPointConv("2x0e+2x1o", "1x1o", 3, radial=Bessel(4, 2.0)).double()
    with pytest.raises(ValueError, match=r"edge_attr: expected shape \(80, 3\), got \(80, 2\)"):
        conv(x, graph, delta, attributes)


# ---- conversions and files


def test_between_escnns_types_and_irreps():
    conv, _ = escnn_layers(CASES["zonal"], Bessel(4, 2.5), activation="silu", norm=None)
    problem = CASES["zonal"].inputs(conv)
    x, *rest = problem.arguments(conv)
    expected, ours = from_escnn(conv(x, *rest)), from_escnn(conv)
    back = to_escnn(ours)
    assert ours.radial == back.radial == conv.radial == Bessel(4, 2.5)
    again = from_escnn(back(to_escnn(from_escnn(x), back.in_type), *rest))
    for found in (ours(from_escnn(x), *rest), again):
        assert (found - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.parametrize("radial", RADIALS, ids=str)
def test_saved_with_escnns_types(radial, tmp_path):
    conv, _ = escnn_layers(CASES["planar"], radial)
    problem = CASES["planar"].inputs(conv.eval())
    ist.save(conv, tmp_path / "conv.safetensors")
    loaded = ist.load(tmp_path / "conv.safetensors")
    assert loaded.radial == radial
    assert torch.equal(loaded(*problem.arguments(loaded)), problem.run(conv))


def test_files_of_layers_without_radial_inputs_do_not_mention_them():
    for module in (ImplicitPointConv("2x0e", "2x0e"), InteractionBlock("2x0e", "2x0e")):
        objects, _ = encode(module)
        assert "radial" not in str(objects)


def test_radial_as_an_attribute_of_a_registered_class(tmp_path):
    @ist.register(name="test_radial.Network")
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.radial = Cosines(3, 2.0)

    ist.save(Network(), tmp_path / "network.safetensors")
    assert ist.load(tmp_path / "network.safetensors").radial == Cosines(3, 2.0)
