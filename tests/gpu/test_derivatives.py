"""The GPU backends: derivatives beyond the first; of Triton's kernels the third, workspaces and block sizes."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close, deviations, relative, spread
from problems import DEVICE, expected, layer, outcome, small

from implicit_steer import _files
from implicit_steer.ops.triton import configuration, launch_contract, launch_edges, launch_mlp
from implicit_steer.ops.triton.tables import tables

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("name", "configuration"), [("o3", "train"), ("so2", "no norm"), ("so2-r3", "eval"), ("c4", "no norm")]
)
def test_derivatives_of_gradients(name, configuration, backend):
    conv = layer(small(name), configuration, activation="silu")
    problem = small(name).inputs(conv)
    problem.delta = torch.randn_like(problem.delta)  # no self-loops: both are inexact there

    def second(problem, conv):
        """The gradient of forces, of features' gradients and of a weight's gradient, all at once."""
        leaves = [problem.x, problem.delta, next(conv.parameters())]
        energy = problem.run(conv).square().sum()
        first = torch.autograd.grad(energy, leaves, create_graph=True)
        return sum((g * spread(g)).sum() for g in first)[None]

    assert_close(outcome(conv, problem, backend, run=second), expected(conv, problem, run=second), 1e-10)


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
def test_directional_derivative(name, backend):
    conv = layer(small(name), "no norm", activation="silu", backend=backend)
    problem = small(name).inputs(conv)
    leaves = [*problem.requires_grad(), *conv.parameters()]
    gradients = torch.autograd.grad(problem.run(conv).square().sum(), leaves)
    directions = [torch.randn_like(t) for t in leaves]
    along, values = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)), []
    for step in (1e-5, -2e-5):  # to +h, from there to −h
        with torch.no_grad():
            for t, d in zip(leaves, directions, strict=True):
                t += step * d
            values.append(problem.run(conv).square().sum())
    assert relative((values[0] - values[1]) / 2e-5, along) < 1e-7


@pytest.mark.parametrize("name", ["so2", "o3"])
def test_batches_of_nodes_and_edges(name, monkeypatch):
    """Workspaces of two nodes and eight edges give the same numbers; and the same bits each time."""
    conv = layer(small(name), "no norm")
    problem = small(name).inputs(conv)
    whole = outcome(conv, problem, "triton")
    monkeypatch.setattr(launch_contract, "_NODES", 2)
    monkeypatch.setattr(launch_mlp, "_EDGES", 8)
    monkeypatch.setattr(launch_edges, "_EDGES", 8)
    with configuration.using("edges_backward", configuration.LaunchConfig(8, 1)):
        parts, again = outcome(conv, problem, "triton"), outcome(conv, problem, "triton")
    assert_close(parts, whole, 1e-13)
    assert all(torch.equal(parts[name], again[name]) for name in parts)


# ---- configurations


def test_every_configuration_gives_the_same_numbers():
    conv = layer(small("c4"), "no norm", torch.float32)
    problem = small("c4").inputs(conv)
    usual = outcome(conv, problem, "triton")
    for kernel in ("layers_forward", "layers_backward_weights", "contract_forward", "contract_backward_inputs"):
        with configuration.using(kernel, configuration.LaunchConfig(64, 8, 2)):
            found = deviations(outcome(conv, problem, "triton"), usual)
            assert max(found.values()) < 1e-5


def test_tuning_keeps_the_fastest(monkeypatch, tmp_path):
    monkeypatch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path))
    case = replace(small("c4"), n_layers=2, n_channels=1)
    conv = layer(case, "no norm", torch.float32, backend="triton")
    problem = case.inputs(conv)
    sizes = tables(conv.implicit_kernel.plan).sizes
    seen = []

    def measure(run, device):
        run()
        seen.append(dict(configuration._override))
        return 1.0 if configuration.LaunchConfig(16, 2) in seen[-1].values() else 2.0

    candidates = (configuration.LaunchConfig(16, 2), configuration.LaunchConfig(32, 8))
    with torch.no_grad():
        found = configuration.tune(lambda: problem.run(conv), sizes, torch.float32, DEVICE, measure, candidates)
    assert set(found.values()) == {configuration.LaunchConfig(16, 2)}
    assert len(seen) == 3 * len(found)
    _files.forget_tuning_cache()  # as in another process
    assert configuration.choose("contract_forward", sizes, torch.float32, DEVICE) == configuration.LaunchConfig(16, 2)
    other = configuration.choose("contract_forward", sizes, torch.float64, DEVICE)
    assert other == configuration._DOUBLE["contract"]


# ---- what would give 0


@pytest.mark.parametrize("name", ["x", "delta", "weights"])
def test_forward_mode_is_refused(name, backend):
    """It gave a result without a tangent."""
    conv = layer(small("c4"), "no norm", backend=backend).requires_grad_(False)
    problem, ad = small("c4").inputs(conv), torch.autograd.forward_ad
    with ad.dual_level():
        if name == "weights":
            weights = conv.implicit_kernel.mlp.mlp[0].weights
            values = {"implicit_kernel.mlp.mlp.0.weights": ad.make_dual(weights, weights)}
            call = lambda: torch.func.functional_call(conv, values, problem.arguments(conv))  # noqa: E731
        else:
            value = getattr(problem, name)
            call = lambda: replace(problem, **{name: ad.make_dual(value, value)}).run(conv)  # noqa: E731
        with pytest.raises(RuntimeError, match="backend: expected one with forward-mode derivatives"):
            call()


def test_torch_func_is_refused(backend):
    conv = layer(small("c4"), "no norm", backend=backend)
    problem = small("c4").inputs(conv)
    with pytest.raises(RuntimeError, match=r"Use torch\.autograd\.grad"):
        torch.func.grad(lambda x: replace(problem, x=x).run(conv).square().sum())(problem.x)
