"""Backend `triton` is the same function as `reference`: values and every gradient, on every case."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import CONFIGURATIONS, assert_close, deviations, layer, outcome, random_edges, relative, with_edges

from implicit_steer import Graph
from implicit_steer.cases import SMALL, Case, equivariance_error
from implicit_steer.nn import ImplicitPointConvWithDownsampling
from implicit_steer.plan import FUNCTIONS
from implicit_steer.triton_kernels import configuration, launch

# The largest deviation over all cases and gradients was 2e-6 and 3e-14.
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}
_WIDE = ("o3-l2", "o3-mixed", "so3-mixed", "so2-mixed", "octa-r3", "cone-r3", "cylinder-r3", "full-cylinder-r3")


def small(name):
    """The case on a graph that the interpreter gets through in some seconds."""
    return replace(SMALL[name], nodes=2 if name in _WIDE else 4, degree=4)


def check(conv, problem, bound=None):
    """Both dtypes are compared with `reference` in float64."""
    exact = copy.copy(problem)
    for name in ("x", "delta", "attributes"):
        if getattr(problem, name) is not None:
            setattr(exact, name, getattr(problem, name).double())
    expected = outcome(copy.deepcopy(conv).double(), exact, "reference")
    expected = {k: v.to(problem.x.dtype) if v.is_floating_point() else v for k, v in expected.items()}
    assert_close(outcome(conv, problem, "triton"), expected, bound or BOUND[problem.x.dtype])


@pytest.mark.parametrize(("n", "name"), list(enumerate(SMALL)))
def test_every_case(n, name):
    conv = layer(small(name), CONFIGURATIONS[n % 3], torch.float32)
    check(conv, small(name).inputs(conv))


@pytest.mark.parametrize(
    ("name", "configuration"), [("o3", "train"), ("so2", "train"), ("so2-r3", "eval"), ("c4", "train")]
)
def test_float64(name, configuration):
    conv = layer(small(name), configuration)
    check(conv, small(name).inputs(conv))


@pytest.mark.parametrize(("name", "sampling"), [("so3", "escnn"), ("o2", "escnn"), ("o3-vector-attr", "lebedev-26")])
def test_samplings(name, sampling):
    conv = layer(small(name), "train", torch.float32, sampling=sampling)
    check(conv, small(name).inputs(conv))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_near_the_origin(activation):
    conv = layer(small("o3"), "eval", activation=activation)
    problem = small("o3").inputs(conv)
    length = torch.logspace(-9, 0, len(problem.delta), dtype=torch.float64)
    problem.delta = torch.nn.functional.normalize(problem.delta, dim=1) * length[:, None]
    problem.delta[::7] = 0
    check(conv, problem, 1e-9)  # the quotient of `reference` itself is right to 1e-10


@pytest.mark.parametrize("name", ["so2", "so2-r3"])
def test_on_and_near_the_axis(name):
    conv = layer(small(name), "eval")
    problem = small(name).inputs(conv)
    problem.delta[:3, :2] = 0
    problem.delta[3:6, :2] *= 1e-4
    check(conv, problem, 1e-9)


@pytest.mark.parametrize("options", [{"cutoff": 1.5}, {"aggr": "mean", "cutoff": 0.7}], ids=str)
def test_options(options):
    conv = layer(small("c4"), "eval", torch.float32, **options)
    check(conv, small("c4").inputs(conv))


# ---- graphs


@pytest.mark.parametrize("chosen", [[], [3], [7, 2, 7, 2, 11]], ids=["no edges", "one edge", "repeated edges"])
def test_few_edges(chosen):
    conv = layer(small("trivial-r3"), "eval", torch.float32)
    check(conv, with_edges(small("trivial-r3").inputs(conv), torch.tensor(chosen, dtype=torch.long)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_hub_and_isolated_nodes(dtype):
    conv = layer(small("c4"), "no norm", torch.float32)
    problem = small("c4").inputs(conv)
    edges = random_edges(70, 4, 4, dtype=dtype)
    edges[1, :] = 3  # more edges than a block takes
    delta = torch.randn(70, 2)
    check(conv, type(problem)(problem.x, problem.pos, Graph(edges, 4), delta, torch.randn(70, 2)))


def test_two_sets_of_nodes():
    case = small("trivial-r3")
    conv = layer(case, "eval", torch.float32)
    down = ImplicitPointConvWithDownsampling(conv.in_type, conv.out_type, None, 3, 4)
    down.load_state_dict(conv.state_dict())
    problem, index = case.inputs(conv), torch.tensor([3, 0])
    problem.graph = Graph(random_edges(11, 4, 2), (4, 2))
    problem.delta = torch.randn(11, 3)

    def run(backend):
        down.eval().backend = backend
        x = problem.x.clone().requires_grad_()
        out = down(conv.in_type(x, problem.pos), problem.graph, problem.delta, None, idx_downsampled=index).tensor
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    for ours, expected in zip(run("triton"), run("reference"), strict=True):
        assert relative(ours, expected) < 1e-5


def test_batches_of_nodes_and_edges(monkeypatch):
    """Workspaces of two nodes and eight edges give the same numbers; and the same bits each time."""
    conv = layer(small("so2"), "no norm")
    problem = small("so2").inputs(conv)
    whole = outcome(conv, problem, "triton")
    monkeypatch.setattr(launch, "_NODES", 2)
    monkeypatch.setattr(launch, "_EDGES", 8)
    parts, again = outcome(conv, problem, "triton"), outcome(conv, problem, "triton")
    assert_close(parts, whole, 1e-13)
    assert all(torch.equal(parts[name], again[name]) for name in parts)


def test_nan_stays_with_its_edge():
    conv = layer(small("o3"), "eval", torch.float32, backend="triton")
    problem = small("o3").inputs(conv)
    problem.delta[7, 1] = torch.nan
    with torch.no_grad():
        hit = problem.run(conv).isnan().any(1)
    assert hit.tolist() == [i == int(problem.graph.dst[7]) for i in range(4)]


# ---- derivatives


@pytest.mark.parametrize(
    ("name", "configuration"), [("o3", "train"), ("so2", "no norm"), ("so2-r3", "eval"), ("c4", "no norm")]
)
def test_derivatives_of_gradients(name, configuration):
    conv = layer(small(name), configuration, activation="silu")
    problem = small(name).inputs(conv)
    problem.delta = torch.randn(problem.delta.shape, dtype=torch.float64)  # no self-loops: both are inexact there

    def second(problem, conv):
        """The gradient of forces, of features' gradients and of a weight's gradient, all at once."""
        leaves = [problem.x, problem.delta, next(conv.parameters())]
        energy = problem.run(conv).square().sum()
        first = torch.autograd.grad(energy, leaves, create_graph=True)
        return sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in first)[None]

    expected = outcome(conv, problem, "reference", run=second)
    assert_close(outcome(conv, problem, "triton", run=second), expected, 1e-10)


def test_third_derivative():
    conv = layer(small("c4"), "no norm", activation="tanh", backend="triton")
    problem = small("c4").inputs(conv)
    _, delta, _ = problem.requires_grad()
    results = []
    for backend in ("triton", "reference"):
        conv.backend, value = backend, problem.run(conv).sum()
        for _ in range(3):
            value = torch.autograd.grad(value, delta, create_graph=True)[0].square().sum()
        results.append(value)
    assert relative(*results) < 1e-10


@pytest.mark.parametrize("name", ["o3", "c4"])
def test_directional_derivative(name):
    conv = layer(small(name), "no norm", activation="silu", backend="triton")
    problem = small(name).inputs(conv)
    leaves = [*problem.requires_grad(), *conv.parameters()]
    gradients = torch.autograd.grad(problem.run(conv).square().sum(), leaves)
    directions = [torch.randn_like(t) for t in leaves]
    expected, values = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)), []
    for step in (1e-5, -2e-5):  # to +h, from there to −h
        with torch.no_grad():
            for t, d in zip(leaves, directions, strict=True):
                t += step * d
            values.append(problem.run(conv).square().sum())
    assert relative((values[0] - values[1]) / 2e-5, expected) < 1e-7


@pytest.mark.parametrize("name", ["o3", "so2-r3", "d4"])
def test_equivariance(name):
    conv = layer(small(name), "eval", torch.float32, backend="triton")
    elements = [conv.in_type.fibergroup.sample() for _ in range(2)]
    assert equivariance_error(conv, small(name).inputs(conv), elements) < 2e-6


# ---- precision


def test_tf32_by_choice():
    """10 bits of mantissa: 1e-3 of the layer's output; the default is exact."""
    conv = layer(small("o3"), "eval", torch.float32, backend="triton")
    problem = small("o3").inputs(conv)
    with torch.no_grad():
        exact = problem.run(conv)
        torch.set_float32_matmul_precision("high")
        try:
            rounded = problem.run(conv)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert 1e-5 < relative(rounded, exact) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features(dtype):
    """Features of 16 bits, arithmetic in float32."""
    conv = layer(small("c4"), "eval", torch.float32, backend="triton")
    problem = small("c4").inputs(conv)
    problem.x = problem.x.to(dtype)
    with torch.no_grad():
        half = problem.run(conv)
        problem.x = problem.x.float()
        exact = problem.run(conv)
    assert half.dtype == dtype
    assert relative(half, exact) <= torch.finfo(dtype).eps


# ---- configurations


def test_every_choice_gives_the_same_numbers():
    conv = layer(small("c4"), "no norm", torch.float32)
    problem = small("c4").inputs(conv)
    expected = outcome(conv, problem, "triton")
    for kernel in ("layers_forward", "layers_backward_weights", "contract_forward", "contract_backward_inputs"):
        with configuration.using(kernel, configuration.Choice(64, 8, 2)):
            found = deviations(outcome(conv, problem, "triton"), expected)
            assert max(found.values()) < 1e-5


def test_tuning_keeps_the_fastest(monkeypatch, tmp_path):
    monkeypatch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(configuration, "_tuned", {})
    conv = layer(small("c4"), "no norm", torch.float32, backend="triton")
    problem = small("c4").inputs(conv)
    sizes = launch.tables(conv.implicit_kernel.plan).sizes
    seen = []

    def measure(run, device):
        run()
        seen.append(dict(configuration._override))
        return 1.0 if configuration.Choice(16, 2) in seen[-1].values() else 2.0

    candidates = (configuration.Choice(16, 2), configuration.Choice(32, 8))
    device = torch.device("cpu")
    with torch.no_grad():
        found = configuration.tune(lambda: problem.run(conv), sizes, torch.float32, device, measure, candidates)
    assert set(found.values()) == {configuration.Choice(16, 2)}
    assert len(seen) == 3 * len(found)
    monkeypatch.setattr(configuration, "_tuned", {})
    assert configuration.load() == len(found)
    assert configuration.choose("contract_forward", sizes, torch.float32, device) == configuration.Choice(16, 2)
    other = configuration.choose("contract_forward", sizes, torch.float64, device)
    assert other == configuration._DOUBLE["contract"]


def test_case_without_couplings():
    case = Case("", "SO(2) on R2", "1 vector", "1 scalar", None, 1, 2, nodes=3, degree=3)
    conv = layer(case, "eval", torch.float32)
    check(conv, case.inputs(conv))
