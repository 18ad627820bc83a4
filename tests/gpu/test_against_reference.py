"""The GPU backends are the same function as `reference`: values and every gradient, on every case."""

import pytest
import torch
from helpers import CONFIGURATIONS, assert_close, random_edges, relative, with_edges
from problems import DEVICE, INTERPRETED, expected, layer, outcome, small

from implicit_steer import Graph, irreps
from implicit_steer.nn import ImplicitPointConvWithDownsampling
from implicit_steer.plan import FUNCTIONS
from implicit_steer.testing.cases import SMALL, Case, equivariance_error

pytestmark = pytest.mark.gpu

# The largest deviation over all cases and gradients was 2e-6 and 3e-14.
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}


def check(conv, problem, backend, bound=None):
    """Both dtypes are compared with `reference` in float64."""
    assert_close(outcome(conv, problem, backend), expected(conv, problem), bound or BOUND[problem.x.dtype])


# The interpreter is slow: there each case has one of the configurations, and few are in float64.
_CHOSEN = {name: [CONFIGURATIONS[n % 3]] if INTERPRETED else CONFIGURATIONS for n, name in enumerate(SMALL)}
_ALL = [(name, configuration) for name, chosen in _CHOSEN.items() for configuration in chosen]
_DOUBLE = [("o3", "train"), ("so2", "train"), ("so2-r3", "eval"), ("c4", "train")] if INTERPRETED else _ALL


@pytest.mark.parametrize(("name", "configuration"), _ALL)
def test_every_case(name, configuration, backend):
    conv = layer(small(name), configuration, torch.float32)
    check(conv, small(name).inputs(conv), backend)


@pytest.mark.parametrize(("name", "configuration"), _DOUBLE)
def test_float64(name, configuration, backend):
    conv = layer(small(name), configuration)
    check(conv, small(name).inputs(conv), backend)


@pytest.mark.parametrize(("name", "sampling"), [("so3", "escnn"), ("o2", "escnn"), ("o3-vector-attr", "lebedev-26")])
def test_samplings(name, sampling, backend):
    conv = layer(small(name), "train", torch.float32, sampling=sampling)
    check(conv, small(name).inputs(conv), backend)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_near_the_origin(activation, backend):
    conv = layer(small("o3"), "eval", activation=activation)
    problem = small("o3").inputs(conv)
    length = torch.logspace(-9, 0, len(problem.delta), dtype=torch.float64, device=DEVICE)
    problem.delta = torch.nn.functional.normalize(problem.delta, dim=1) * length[:, None]
    problem.delta[::7] = 0
    check(conv, problem, backend, 1e-9)  # the quotient of `reference` itself is right to 1e-10


@pytest.mark.parametrize("name", ["so2", "so2-r3"])
def test_on_and_near_the_axis(name, backend):
    conv = layer(small(name), "eval")
    problem = small(name).inputs(conv)
    problem.delta[:3, :2] = 0
    problem.delta[3:6, :2] *= 1e-4
    check(conv, problem, backend, 1e-9)


@pytest.mark.parametrize("options", [{"cutoff": 1.5}, {"aggr": "mean", "cutoff": 0.7}], ids=str)
def test_options(options, backend):
    conv = layer(small("c4"), "eval", torch.float32, **options)
    check(conv, small("c4").inputs(conv), backend)


@torch.no_grad()
def test_changed_parameters_are_seen(backend):
    """Between calls without gradients: in place, by other memory, by memory that is not contiguous."""
    conv = layer(small("o3"), "eval")
    problem, weight = small("o3").inputs(conv), dict(conv.named_parameters())["implicit_kernel.mlp.mlp.3.weights"]
    changes = {
        "none": lambda: None,
        "in place": lambda: weight.mul_(1.5),
        "other memory": lambda: setattr(weight, "data", weight.flip(0)),
        "strided": lambda: setattr(weight, "data", torch.stack([weight, weight * 2], -1)[..., 1]),
        "in place, strided": lambda: weight.mul_(0.5),
    }
    for change, make in changes.items():
        make()
        found = []
        for conv.backend in ("reference", backend):
            found.append(problem.run(conv))
        assert relative(found[1], found[0]) < 1e-12, change


def test_depthwise(backend):
    """Values, first and second derivatives."""
    text, generator = "2x0e + 2x1o", torch.Generator().manual_seed(0)
    conv = irreps.ImplicitPointConv(text, text, n_layers=2, n_channels=2, width=1.0, norm="batch", depthwise=True)
    conv = conv.double().to(DEVICE)
    edges = torch.randint(0, 3, (2, 9), generator=generator).to(DEVICE)
    x, delta = (torch.randn(n, generator=generator, dtype=torch.float64).to(DEVICE) for n in ((3, 8), (9, 3)))

    def run(name):
        conv.backend = name
        leaves = [x.clone().requires_grad_(), delta.clone().requires_grad_(), *conv.parameters()]
        out = conv(leaves[0], edges, leaves[1])
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)]

    known = run("reference")
    scale = max(float(t.detach().norm()) for t in known)
    for ours, theirs in zip(run(backend), known, strict=True):
        assert relative(ours, theirs) < 1e-12 or float((ours - theirs).detach().norm()) < 1e-14 * scale


# ---- graphs


@pytest.mark.parametrize("chosen", [[], [3], [7, 2, 7, 2, 11]], ids=["no edges", "one edge", "repeated edges"])
def test_few_edges(chosen, backend):
    conv = layer(small("trivial-r3"), "eval", torch.float32)
    check(conv, with_edges(small("trivial-r3").inputs(conv), torch.tensor(chosen, dtype=torch.long)), backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_hub_and_isolated_nodes(dtype, backend):
    conv = layer(small("c4"), "no norm", torch.float32)
    problem = small("c4").inputs(conv)
    n, count = len(problem.x), 70 if INTERPRETED else 5000  # more edges than a block takes
    edges = random_edges(count, n, n, dtype=dtype).to(DEVICE)
    edges[1, :] = 3
    delta, attributes = torch.randn(2, count, 2, device=DEVICE)
    check(conv, type(problem)(problem.x, problem.pos, Graph(edges, n), delta, attributes), backend)


def test_two_sets_of_nodes(backend):
    case = small("trivial-r3")
    conv = layer(case, "eval", torch.float32)
    down = ImplicitPointConvWithDownsampling(conv.in_type, conv.out_type, None, 3, 4).to(DEVICE)
    down.load_state_dict(conv.state_dict())
    problem, index = case.inputs(conv), torch.tensor([3, 0], device=DEVICE)
    problem.graph = Graph(random_edges(11, len(problem.x), 2).to(DEVICE), (len(problem.x), 2))
    problem.delta = torch.randn(11, 3, device=DEVICE)

    def run(backend):
        down.eval().backend = backend
        x = problem.x.clone().requires_grad_()
        out = down(conv.in_type(x, problem.pos), problem.graph, problem.delta, None, idx_downsampled=index).tensor
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    for ours, theirs in zip(run(backend), run("reference"), strict=True):
        assert relative(ours, theirs) < 1e-5


def test_nan_stays_with_its_edge(backend):
    conv = layer(small("o3"), "eval", torch.float32, backend=backend)
    problem = small("o3").inputs(conv)
    problem.delta[7, 1] = torch.nan
    with torch.no_grad():
        hit = problem.run(conv).isnan().any(1)
    assert hit.tolist() == [i == int(problem.graph.dst[7]) for i in range(len(hit))]


@pytest.mark.parametrize("name", ["o3", "so2-r3", "d4"])
def test_equivariance(name, backend):
    conv = layer(small(name), "eval", torch.float32, backend=backend)
    elements = [conv.in_type.fibergroup.sample() for _ in range(2)]
    assert equivariance_error(conv, small(name).inputs(conv), elements) < 2e-6


# ---- precision


def test_tf32_by_choice():
    """In Triton's kernels. 10 bits of mantissa: 1e-3 of the output, 3.2e-3 on an H100; the default is exact."""
    conv = layer(small("o3"), "eval", torch.float32, backend="triton")
    problem = small("o3").inputs(conv)
    with torch.no_grad():
        exact = problem.run(conv)
        torch.set_float32_matmul_precision("high")
        try:
            rounded = problem.run(conv)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert 1e-5 < relative(rounded, exact) < (2e-3 if INTERPRETED else 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features(dtype, backend):
    """Features of 16 bits, arithmetic in float32."""
    conv = layer(small("c4"), "eval", torch.float32, backend=backend)
    problem = small("c4").inputs(conv)
    problem.x = problem.x.to(dtype)
    with torch.no_grad():
        half = problem.run(conv)
        problem.x = problem.x.float()
        exact = problem.run(conv)
    assert half.dtype == dtype
    assert relative(half, exact) <= torch.finfo(dtype).eps


def test_case_without_couplings(backend):
    case = Case("", "SO(2) on R2", "1 vector", "1 scalar", None, 1, 2, nodes=3, degree=3)
    conv = layer(case, "eval", torch.float32)
    check(conv, case.inputs(conv), backend)
