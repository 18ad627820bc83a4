"""Backend `cpu` gives the same bits on any number of threads, to which it hands out a fixed partition of the work."""

from dataclasses import replace

import pytest
import torch
from helpers import CONFIGURATIONS, SAMPLED, layer, outcome

from implicit_steer.ops.native.bound import BoundKernel
from implicit_steer.ops.native.instruction_set import instruction_set
from implicit_steer.testing.cases import SMALL

COUNTS = [1, 2, 3, 5]


def problem_of(conv, name, nodes=120, degree=30):
    """3,600 edges, several blocks; some edges are at the origin or near it."""
    problem = replace(SMALL[name], nodes=nodes, degree=degree, knn=False).inputs(conv)
    problem.delta[::50] = 0
    problem.delta[7::50] *= 1e-6
    return problem


def assert_same_bits(threads, run):
    """``run()`` gives a dict of tensors, the same on every number of threads."""
    results = []
    for count in COUNTS:
        threads(count)
        results.append(run())
    for count, result in zip(COUNTS[1:], results[1:], strict=True):
        assert not [name for name, value in result.items() if not torch.equal(value, results[0][name])], count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_first_derivatives(name, sampling, configuration, dtype, threads):
    """The output, all gradients and the batch norms' statistics, in every frame."""
    conv = layer(SMALL[name], configuration, dtype, sampling=sampling, backend="cpu")
    problem = problem_of(conv, name)
    assert_same_bits(threads, lambda: outcome(conv, problem))


@pytest.mark.parametrize("nodes", [20, 2000])
def test_few_and_many_nodes(nodes, threads):
    """The gradient of the features is summed for each block by source, or written edge by edge and then summed."""
    conv = layer(SMALL["o3"], "train", torch.float32, backend="cpu")
    problem = problem_of(conv, "o3", nodes, 8000 // nodes)
    assert_same_bits(threads, lambda: outcome(conv, problem))


@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_second_derivatives(name, sampling, threads):
    conv = layer(SMALL[name], "eval", torch.float32, sampling=sampling, backend="cpu", activation="silu")
    problem = problem_of(conv, name)
    leaves = [*problem.requires_grad(), *conv.parameters()]

    def run():
        first = torch.autograd.grad(problem.run(conv).square().sum(), leaves[:2], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
        return {f"second {n}": g for n, g in enumerate(second) if g is not None}

    assert_same_bits(threads, run)


@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_hidden_features(name, sampling, threads):
    """What the kernel's values are made of, and its gradients."""
    conv = layer(SMALL[name], "eval", torch.float32, sampling=sampling, backend="cpu")
    problem, kernel = problem_of(conv, name), conv.implicit_kernel
    parameters = kernel.parameters_for_op()
    bound = BoundKernel(kernel.plan, parameters.cache.native, parameters)
    attributes = problem.delta.new_empty(len(problem.delta), 0) if problem.attributes is None else problem.attributes
    leaves = [t.detach().requires_grad_() for t in (bound.packed()[1], problem.delta, attributes)]

    def run():
        h = torch.ops.implicit_steer.conv_hidden(*bound.arrays, *leaves, kernel.plan.hidden_size, instruction_set())
        gradients = torch.autograd.grad(h.square().sum(), leaves)
        return dict(zip(("h", "weights", "delta", "attributes"), (h.detach(), *gradients), strict=True))

    assert_same_bits(threads, run)
