"""First and second derivatives with respect to features, positions, attributes and every parameter, in float64.

In training mode batch statistics are detached, as escnn's are: there the gradient is not the derivative, and golden
cases and `test_backends.py` say what it is.
"""

import pytest
import torch
from helpers import BACKENDS, layer, with_edges
from torch.autograd import gradcheck, gradgradcheck

from implicit_steer import irreps
from implicit_steer.plan import FUNCTIONS
from implicit_steer.testing.cases import Case

_SIZE = {"n_layers": 2, "n_channels": 2, "nodes": 3, "degree": 2}
CASES = {
    "zonal": Case("zonal", "O(3)", "1 scalar+vector", "1 scalar, 1 vector", "1 scalar", **_SIZE),
    "zonal, no attributes": Case("", "SO(3)", "1 scalar+vector", "1 scalar+vector", None, **_SIZE),
    "zonal, 3 layers": Case("", "O(3)", "1 scalar, 1 vector", "1 scalar+vector", "2 scalar", 3, 2, nodes=3, degree=2),
    "planar on R3": Case("", "SO(2) on R3", "1 scalar+vector", "1 scalar, 1 vector", "1 vector", **_SIZE),
    "planar on R2": Case("", "O(2) on R2", "1 scalar+vector", "2 scalar+vector", "1 scalar", **_SIZE),
    "sphere grid": Case("", "O(3)", "1 scalar+vector", "1 vector", "1 scalar+vector", **_SIZE),
    "finite": Case("", "C4 on R2", "1 regular", "1 regular", "1 vector", **_SIZE),
    "linear": Case("", "O(3)", "1 scalar+vector", "1 scalar+vector", "1 scalar", 1, 1, nodes=3, degree=2),
}
FRAMED = [name for name in CASES if name.startswith(("zonal", "planar"))]
SAMPLED = [(name, "auto") for name in CASES] + [(name, "escnn") for name in FRAMED]


def problem_of(name, conv):
    """Random inputs, positions apart from the origin and the axes even on self-loops."""
    problem = CASES[name].inputs(conv)
    problem.delta = torch.randn(problem.delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return problem


def differentiable(conv, problem):
    """The layer as a function of (x, delta, attributes, *parameters), and those."""
    inputs = problem.requires_grad()
    names = [name for name, _ in conv.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in conv.parameters()]

    def run(*arguments):
        x, delta, *rest = arguments[: len(inputs)]
        attributes = rest[0] if rest else None
        parameters = dict(zip(names, arguments[len(inputs) :], strict=True))
        arguments = (conv.in_type(x, problem.pos), problem.graph, delta, attributes)
        return torch.func.functional_call(conv, parameters, arguments).tensor

    return run, (*inputs, *values)


def assert_first_order(conv, problem, fast):
    run, arguments = differentiable(conv, problem)
    assert gradcheck(run, arguments, fast_mode=fast)


def assert_both_orders(conv, problem, fast):
    assert_first_order(conv, problem, fast)
    run, arguments = differentiable(conv, problem)
    assert gradgradcheck(run, arguments, fast_mode=fast)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("configuration", ["no norm", "eval"])
@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_both_orders(name, sampling, configuration, backend):
    conv = layer(CASES[name], configuration, sampling=sampling, activation="silu", backend=backend)
    assert_both_orders(conv, problem_of(name, conv), fast=True)


@pytest.mark.parametrize("configuration", ["no norm", "eval"])
@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_every_entry_of_both_orders(name, sampling, configuration):
    """Of the native code: every input and every weight, the shell's width and the norms' among them."""
    conv = layer(CASES[name], configuration, sampling=sampling, activation="silu", backend="cpu")
    assert_both_orders(conv, with_edges(problem_of(name, conv), slice(4)), fast=False)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(("name", "frame"), [("zonal", "zonal"), ("planar on R3", "planar"), ("sphere grid", "none")])
def test_every_entry_in_plain_torch(name, frame, backend):
    conv = layer(CASES[name], "no norm", activation="silu", backend=backend)
    assert conv.implicit_kernel.plan.frame.kind == frame
    assert_both_orders(conv, with_edges(problem_of(name, conv), slice(4)), fast=False)


@pytest.mark.parametrize("sampling", ["auto", "escnn"])
@pytest.mark.parametrize("name", ["zonal", "planar on R2"])
def test_third_order_through_eager(name, sampling):
    conv = layer(CASES[name], "no norm", sampling=sampling, activation="silu", backend="eager")
    run, arguments = differentiable(conv, with_edges(problem_of(name, conv), slice(4)))

    def gradients(*arguments):
        return torch.autograd.grad(run(*arguments).square().sum(), arguments, create_graph=True)

    assert gradgradcheck(gradients, arguments, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("activation", ["elu", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("name", ["zonal", "planar on R3", "finite"])
def test_activations(name, activation):
    conv = layer(CASES[name], "no norm", activation=activation)
    check = assert_both_orders if activation in ("gelu", "tanh") else assert_first_order  # the others have kinks
    check(conv, problem_of(name, conv), fast=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["zonal", "planar on R3", "sphere grid"])
@pytest.mark.parametrize("options", [{"aggr": "mean"}, {"cutoff": 1.8}], ids=str)
def test_options(name, options, backend):
    conv = layer(CASES[name], "no norm", activation="silu", backend=backend, **options)
    assert_both_orders(conv, problem_of(name, conv), fast=True)


@pytest.mark.parametrize("sampling", ["auto", "escnn"])
@pytest.mark.parametrize("radius", [0.0, 1e-3])
@pytest.mark.parametrize("name", ["zonal", "zonal, no attributes", "zonal, 3 layers", "planar on R2"])
def test_self_loops(name, radius, sampling):
    conv = layer(CASES[name], "no norm", sampling=sampling, activation="silu")
    problem = with_edges(problem_of(name, conv), slice(3))
    problem.delta = radius * problem.delta
    assert_both_orders(conv, problem, fast=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["elu", "silu"])
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_finite_at_the_origin(name, activation, backend):
    conv = layer(CASES[name], "no norm", activation=activation, backend=backend)
    problem = problem_of(name, conv)
    problem.delta[::2] = 0
    run, arguments = differentiable(conv, problem)
    first = torch.autograd.grad(run(*arguments).square().sum(), arguments, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), arguments, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in (*first, *second))
    assert first[1].any()
    assert second[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_second_derivatives_of_steep_kernels(activation, dtype):
    """Where e^-z of SiLU's sigmoid is about the largest number, and its derivative beyond it."""
    conv = irreps.ImplicitPointConv("1x0e", "1x0e", n_channels=2, activation=activation, width=50.0, backend="cpu")
    with torch.no_grad():
        for p in conv.to(dtype).implicit_kernel.linears.parameters():
            p.mul_(200)
    delta = torch.zeros(200, 3, dtype=dtype)
    delta[:, 0] = torch.linspace(0.5, 60, 200, dtype=dtype)
    values = conv.implicit_kernel(delta.requires_grad_())
    (first,) = torch.autograd.grad(values.sum(), delta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), delta)
    assert first.isfinite().all()
    assert second.isfinite().all()
