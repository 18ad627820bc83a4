"""Backend `cpu` is `reference`, to rounding: every case, dtype, instruction set, thread count and kind of graph."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import torch
from helpers import (
    CONFIGURATIONS,
    SAMPLED,
    assert_close,
    deviations,
    layer,
    machine_sets,
    outcome,
    random_edges,
    unchanged,
    with_edges,
)

from implicit_steer import Graph
from implicit_steer.ops.native.instruction_set import INSTRUCTION_SETS
from implicit_steer.ops.select import BACKENDS
from implicit_steer.plan import FUNCTIONS
from implicit_steer.plan.activations import phi
from implicit_steer.plan.moments import MEASURED
from implicit_steer.testing.cases import SMALL, Case

# Largest deviation over SAMPLED x CONFIGURATIONS, gradients included: 6.2e-14; 1.7e-5 for the shell width, a single
# number in which most digits cancel (3.8e-5 in the worst case), 3.5e-6 for everything else.
BOUND = {torch.float32: 2e-5, torch.float64: 1e-11}
SHELL_WIDTH = "grad implicit_kernel.shell_width"


def assert_is_reference(conv, problem, bound=None):
    bound = bound or BOUND[conv.implicit_kernel.shell_width.dtype]
    ours, expected = outcome(conv, problem, "cpu"), outcome(conv, problem, "reference")
    assert expected["out"].isfinite().all()
    if conv.implicit_kernel.shell_width.dtype == torch.float32:
        single = {SHELL_WIDTH: ours.pop(SHELL_WIDTH)}, {SHELL_WIDTH: expected.pop(SHELL_WIDTH)}
        floor = 1e-2 * max(float(v.norm()) for k, v in expected.items() if k.startswith("grad"))
        assert abs(float(single[0][SHELL_WIDTH] - single[1][SHELL_WIDTH])) <= 1e-4 * max(
            floor, float(single[1][SHELL_WIDTH].abs())
        )
    assert_close(ours, expected, bound)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_is_reference(name, sampling, configuration, dtype):
    conv = layer(SMALL[name], configuration, dtype, sampling=sampling)
    assert_is_reference(conv, SMALL[name].inputs(conv))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("isa", machine_sets())
@pytest.mark.parametrize("name", ["o3", "o3-l2", "o3-mixed", "o3-vector-attr", "o2", "so2", "full-cylinder-r3", "d4"])
def test_every_instruction_set(name, isa, dtype, use_isa):
    use_isa(isa)
    conv = layer(SMALL[name], "train", dtype)
    assert_is_reference(conv, SMALL[name].inputs(conv))


def test_an_unknown_instruction_set_is_an_error(use_isa):
    conv = layer(SMALL["o3"], backend="cpu")
    use_isa("mmx")
    with pytest.raises(ValueError, match="IMPLICIT_STEER_ISA"):
        SMALL["o3"].inputs(conv).run(conv)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["o3", "o2", "so2", "c4"])
def test_activations(name, function, dtype):
    conv = layer(SMALL[name], "train", dtype, activation=function)
    assert_is_reference(conv, SMALL[name].inputs(conv))


@pytest.mark.parametrize("options", [{"aggr": "mean"}, {"cutoff": 1.5}, {"aggr": "mean", "cutoff": 0.7}], ids=str)
@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3"])
def test_options(name, options):
    conv = layer(SMALL[name], "train", **options)
    assert_is_reference(conv, SMALL[name].inputs(conv))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("radius", [0.0, 1e-6, 1e-3, 0.00999, 0.01001])
@pytest.mark.parametrize("name", ["o3", "o3-l2", "o2", "so2", "so2-r3", "full-cylinder-r3", "o3-vector-attr"])
def test_near_the_origin(name, radius, function):
    conv = layer(SMALL[name], "no norm", activation=function)
    problem = SMALL[name].inputs(conv)
    problem.delta = problem.delta / problem.delta.norm(dim=1, keepdim=True).clamp(min=1e-3)
    problem.delta[::3] *= radius  # tiles with edges of both kinds
    # frames that are not regular divide by the radius: both backends are right to eps / radius
    regular = conv.implicit_kernel.plan.frame.regular
    assert_is_reference(conv, problem, None if regular or radius != 1e-6 else 1e-8)


# ---- kinds of graph


@pytest.mark.parametrize("name", ["o3", "so2-mixed", "c4"])
def test_no_edges(name):
    conv = layer(SMALL[name])
    assert_is_reference(conv, with_edges(SMALL[name].inputs(conv), slice(0)))


def of_graph(conv, edges, sizes, seed=0):
    """A problem of the o3 case on these edges."""
    problem, generator = SMALL["o3"].inputs(conv), torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(problem.x)

    e = edges.shape[1]
    x = normal(sizes[0], problem.x.shape[1])
    return replace(problem, x=x, pos=x[:, :3], graph=Graph(edges, sizes), delta=normal(e, 3), attributes=normal(e, 1))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_hub(count, threads):
    threads(count)
    conv = layer(SMALL["o3"])
    edges = random_edges(5000, 12, 12)
    edges[1] = 3
    assert_is_reference(conv, of_graph(conv, edges, (12, 12)))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_isolated_nodes(index, count, threads):
    threads(count)
    conv = layer(SMALL["o3"])
    edges = random_edges(2000, 1500, 1500, dtype=index)
    assert_is_reference(conv, of_graph(conv, edges, (1500, 1500)))


def bipartite(problem, conv):
    """The layer's output where sources and targets are different sets."""
    x = conv.in_type(problem.x, problem.pos), problem.graph.num_dst
    return conv(x, problem.graph, problem.delta, problem.attributes).tensor


@pytest.mark.parametrize("sizes", [(7, 40), (40, 7), (40, 3000)])
def test_bipartite(sizes):
    conv = layer(SMALL["o3"])
    problem = of_graph(conv, random_edges(900, *sizes), sizes)
    expected = outcome(conv, problem, "reference", run=bipartite)
    assert_close(outcome(conv, problem, "cpu", run=bipartite), expected, BOUND[torch.float64])


def test_one_edge_has_no_variance():
    """ImplicitPointConv rejects it before."""
    conv = layer(SMALL["o3"], "train")
    kernel, problem = conv.implicit_kernel, with_edges(SMALL["o3"].inputs(conv), slice(1))
    inputs = problem.graph, problem.x, problem.delta, problem.attributes
    with pytest.raises(RuntimeError, match="at least 2 edges"):
        BACKENDS["cpu"].forward(kernel.plan, kernel.parameters_for_op(), MEASURED, *inputs)


# ---- reproducibility, derivatives


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_same_bits(configuration, count, threads):
    threads(count)
    conv = layer(SMALL["o3"], configuration, torch.float32, backend="cpu")
    problem = of_graph(conv, random_edges(4000, 100, 100), (100, 100))
    first = outcome(conv, problem)
    for _ in range(3):
        again = outcome(conv, problem)
        assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_the_order_of_edges_only_rounds():
    conv = layer(SMALL["o3"], "train", backend="cpu")
    problem = of_graph(conv, random_edges(700, 30, 30), (30, 30))
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    ours, permuted = outcome(conv, problem), outcome(conv, with_edges(problem, order))
    for name in ("grad delta", "grad attributes"):
        ours[name] = ours[name][order]
    assert_close(permuted, ours, 1e-12)


def test_only_what_is_needed():
    conv = layer(SMALL["o3"], "no norm")
    problem = SMALL["o3"].inputs(conv)
    names = ["x", "delta", "attributes"]
    expected = outcome(conv, problem, "reference")
    conv.backend = "cpu"
    for name in names:
        p = copy.copy(problem)
        leaf = getattr(p, name).clone().requires_grad_()
        setattr(p, name, leaf)
        for parameter in conv.parameters():
            parameter.requires_grad_(False)
        out = p.run(conv)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (grad,) = torch.autograd.grad((out * weight).sum(), leaf)
        assert_close({"grad": grad}, {"grad": expected[f"grad {name}"]}, 1e-12)
    for parameter in conv.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        assert not problem.run(conv).requires_grad
    frozen = outcome(conv, problem, "cpu", run=lambda p, c: replace(p, delta=p.delta.detach(), x=p.x.detach()).run(c))
    for name in ("out", "grad attributes", *(f"grad {n}" for n, _ in conv.named_parameters())):
        assert deviations({"": frozen[name]}, {"": expected[name]})[""] <= 1e-12, name


def hessian_product(conv, problem, backend):
    """Gradients, in everything, of a random combination of all gradients of ½ |output|²."""
    leaves = [*problem.requires_grad(), *conv.parameters()]
    conv.backend = backend
    out = problem.run(conv)
    first = torch.autograd.grad(out, leaves, out, create_graph=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g) for g in first]
    product = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
    second = torch.autograd.grad(product, leaves, materialize_grads=True)
    names = ["x", "delta", "attributes"][: len(leaves) - len(list(conv.parameters()))]
    names += [name for name, _ in conv.named_parameters()]
    return {f"grad {name}": g for name, g in zip(names, second, strict=True)}


# Largest deviation over SAMPLED x CONFIGURATIONS: 2.5e-14 and 5.9e-6; with self-loops at the origin, where the softened
# radius costs the edges' derivatives digits in every backend, 1.4e-8 and 5.1e-4.
SECOND_ORDER = {torch.float64: 1e-12, torch.float32: 5e-5}
AT_ORIGIN = {torch.float64: 1e-7, torch.float32: 5e-3}


@pytest.mark.parametrize("dtype", SECOND_ORDER, ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_second_derivatives(name, sampling, configuration, dtype):
    conv = layer(SMALL[name], configuration, dtype, sampling=sampling, activation="silu")
    problem = SMALL[name].inputs(conv)
    loops = problem.delta.norm(dim=1) == 0
    for bound in (AT_ORIGIN, SECOND_ORDER):
        with unchanged(conv):
            expected = hessian_product(conv, problem, "eager")
            actual = hessian_product(conv, problem, "cpu")
        assert_close(actual, expected, bound[dtype])
        generator = torch.Generator().manual_seed(3)
        moved = torch.randn(problem.delta.shape, generator=generator, dtype=torch.float64).to(dtype)
        problem.delta = torch.where(loops[:, None], moved, problem.delta.detach())
    assert loops.any()


@pytest.mark.parametrize("isa", machine_sets())
@pytest.mark.parametrize("activation", ["elu", "relu", "silu", "gelu", "tanh"])
@pytest.mark.parametrize("name", ["o3", "so2-r3", "c4"])
def test_second_derivatives_of_instruction_sets(name, activation, isa, use_isa):
    conv = layer(SMALL[name], "no norm", activation=activation)
    problem = with_edges(SMALL[name].inputs(conv), slice(37))
    problem.delta = torch.randn_like(problem.delta)
    expected = hessian_product(conv, problem, "eager")
    use_isa(isa)
    assert_close(hessian_product(conv, problem, "cpu"), expected, SECOND_ORDER[torch.float64])


@pytest.mark.parametrize("edges", [slice(0), slice(1), slice(3, 60, 7)])
@pytest.mark.parametrize("configuration", ["eval", "no norm"])
@pytest.mark.parametrize("name", ["o3", "so2-r3", "c4"])
def test_second_derivatives_of_few_edges(name, configuration, edges):
    """No edges; one; isolated nodes."""
    conv = layer(SMALL[name], configuration, activation="silu")
    problem = with_edges(SMALL[name].inputs(conv), edges)
    problem.delta = torch.randn_like(problem.delta)
    expected = hessian_product(conv, problem, "eager")
    assert_close(hessian_product(conv, problem, "cpu"), expected, SECOND_ORDER[torch.float64])


@pytest.mark.parametrize("wanted", [{"x"}, {"delta"}, {"attributes"}, {"weights"}, {"delta", "weights"}])
def test_second_derivatives_of_some(wanted):
    """Each group of leaves alone: what is not asked for, and directions that are 0, change nothing."""
    conv = layer(SMALL["o3"], "no norm", activation="silu")
    problem = SMALL["o3"].inputs(conv)
    problem.delta = torch.randn_like(problem.delta)
    conv.requires_grad_("weights" in wanted)
    for name in wanted - {"weights"}:
        getattr(problem, name).requires_grad_()
    leaves = [*(getattr(problem, name) for name in sorted(wanted - {"weights"}))]
    leaves += [p for p in conv.parameters() if p.requires_grad]
    found = {}
    for conv.backend in ("cpu", "reference"):
        first = torch.autograd.grad(problem.run(conv).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        found[conv.backend] = {f"grad {n}": g for n, g in enumerate(second)}
    assert_close(found["cpu"], found["reference"], SECOND_ORDER[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_derivatives_of_short_features(dtype):
    """The features' own gradient is rounded to 16 bits between the two derivatives, as in `reference`."""
    conv = layer(SMALL["o3"], "no norm", torch.float32, activation="silu")
    problem = SMALL["o3"].inputs(conv)
    problem.x = problem.x.to(dtype)
    problem.delta = torch.randn_like(problem.delta)
    expected, found = (hessian_product(conv, problem, backend) for backend in ("reference", "cpu"))
    assert found["grad x"].dtype == dtype
    # Measured: 0, and 4e-7 of the others; an entry may round the other way.
    short = [{"grad x": gradients.pop("grad x")} for gradients in (found, expected)]
    assert_close(*short, torch.finfo(dtype).eps)
    assert_close(found, expected, SECOND_ORDER[torch.float32])


@pytest.mark.parametrize("name", ["x", "delta", "attributes"])
def test_third_derivatives_raise(name):
    conv = layer(SMALL["o3"], "no norm", backend="cpu", activation="silu")
    problem = SMALL["o3"].inputs(conv)
    leaves = problem.requires_grad()
    first = torch.autograd.grad(problem.run(conv).square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.autograd.grad(sum(g.square().sum() for g in second), getattr(problem, name))


@pytest.mark.parametrize("configuration", ["no norm", "eval"])
def test_gradcheck(configuration):
    case = Case("", "O(3)", "1 scalar+vector", "1 scalar, 1 vector", "1 scalar", 3, 2, nodes=3, degree=2)
    conv = layer(case, configuration, backend="cpu", activation="silu")
    problem = case.inputs(conv)
    problem.delta = torch.randn(problem.delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = problem.requires_grad()

    def run(x, delta, attributes):
        return replace(problem, x=x, delta=delta, attributes=attributes).run(conv)

    assert torch.autograd.gradcheck(run, leaves)


def test_strided_inputs():
    conv = layer(SMALL["o3"])
    problem = SMALL["o3"].inputs(conv)
    strided = copy.copy(problem)
    for name in ("x", "delta", "attributes"):
        tensor = getattr(problem, name)
        setattr(strided, name, torch.stack([tensor, tensor], -1)[..., 0])
    conv.backend = "cpu"
    with torch.no_grad():
        assert torch.equal(strided.run(conv), problem.run(conv))


def test_nan_stays_with_its_edge():
    conv = layer(SMALL["o3"], backend="cpu")
    problem = of_graph(conv, random_edges(200, 50, 50), (50, 50))
    problem.delta[17, 1] = float("nan")
    with torch.no_grad():
        out = problem.run(conv)
    hit = out.isnan().any(1)
    assert hit.tolist() == [i == int(problem.graph.dst[17]) for i in range(50)]


# ---- the functions on lanes


def ulps(actual, expected):
    """Largest distance in units of the last place of ``expected`` (float64 or wider), which is no subnormal."""
    dtype = actual.dtype.type
    spacing = np.spacing(np.abs(expected).astype(dtype)).astype(np.longdouble)
    return float((np.abs(actual.astype(np.longdouble) - expected) / spacing).max())


@pytest.mark.parametrize("isa", machine_sets())
@pytest.mark.parametrize(("dtype", "low", "high"), [(np.float32, -86.6, 88.2), (np.float64, -706, 708)])
def test_exp_to_two_ulp(dtype, low, high, isa):
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.uniform(low, high, 200_000), generator.normal(0, 1, 200_000), [0.0, low, high]])
    x = x.astype(dtype)
    ours = torch.ops.implicit_steer.lane_function(torch.from_numpy(x), 5, INSTRUCTION_SETS[isa]).numpy()
    assert ulps(ours, np.exp(x.astype(np.longdouble))) <= 2


@pytest.mark.parametrize("isa", machine_sets())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_erf(dtype, isa):
    """To 2 ulp of the true value; scipy's double may be off by one more."""
    generator = np.random.default_rng(0)
    x = [generator.uniform(-7, 7, 200_000), generator.normal(0, 0.5, 200_000), 10.0 ** generator.uniform(-30, 0, 2000)]
    x = np.concatenate(x).astype(dtype)
    ours = torch.ops.implicit_steer.lane_function(torch.from_numpy(x), 6, INSTRUCTION_SETS[isa]).numpy()
    assert ulps(ours, scipy.special.erf(x.astype(np.float64))) <= (2 if dtype is np.float32 else 3)
    limits = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan], dtype=torch.from_numpy(x).dtype)
    found = torch.ops.implicit_steer.lane_function(limits, 6, INSTRUCTION_SETS[isa])
    torch.testing.assert_close(found, torch.erf(limits), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", machine_sets())
def test_exp_beyond_its_range(isa):
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-1e30, -torch.inf, 1e30, torch.inf, torch.nan], dtype=dtype)
        y = torch.ops.implicit_steer.lane_function(x, 5, INSTRUCTION_SETS[isa])
        tiny = 2 * torch.finfo(dtype).tiny * 2**6
        assert (y[:2] >= 0).all()
        assert (y[:2] <= tiny).all()
        assert (y[2:4] > torch.finfo(dtype).max / 10).all()
        assert y[4].isnan()


@pytest.mark.parametrize("isa", machine_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", range(len(FUNCTIONS)))
def test_functions(which, dtype, isa):
    x = torch.cat([torch.linspace(-30, 30, 20_001), torch.logspace(-30, 1, 500), -torch.logspace(-30, 1, 500)]).to(
        dtype
    )
    function, isa = torch.ops.implicit_steer.lane_function, INSTRUCTION_SETS[isa]
    ours = function(x, which, isa)
    eps = torch.finfo(dtype).eps
    assert ((ours - phi(FUNCTIONS[which], x.double())).abs() <= 4 * eps * (1 + x.abs())).all()
    assert function(torch.tensor([torch.nan], dtype=dtype), which, isa).isnan().all()


@pytest.mark.parametrize("isa", machine_sets())
@pytest.mark.parametrize("count", [1, 2])
def test_subnormal_numbers_count_as_zero(isa, count, use_isa, threads):
    # Where a shell has faded to 1e-38, products with it took 2.7 times a training step's time.
    use_isa(isa)
    threads(count)
    case = replace(SMALL["o3"], nodes=2000)  # enough edges for two threads
    conv = layer(case, backend="cpu")
    problem = case.inputs(conv)
    torch.nn.init.zeros_(conv.bias)
    torch.nn.init.constant_(conv.implicit_kernel.shell_width, 1e-2)
    problem = replace(problem, delta=3 + problem.delta.abs(), x=1e-3 * problem.x)
    assert not problem.run(conv).any()
    assert float(torch.full((1,), 1e-20) * 1e-20) > 0  # the caller's arithmetic is as it was
