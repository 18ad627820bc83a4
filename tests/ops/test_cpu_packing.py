"""What backend `cpu` keeps between calls, the pairs of samples, and kernels evaluated at points."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import CONFIGURATIONS, SAMPLED, assert_close, layer

from implicit_steer.ops.native.sample_pairs import sample_pairs
from implicit_steer.ops.select import BACKENDS
from implicit_steer.plan.moments import MEASURED, RUNNING
from implicit_steer.testing.cases import SMALL

# Largest deviation over SAMPLED x CONFIGURATIONS: 1.2e-12 in float64; 1.2e-6 in float32 for values, whose gradients
# near an axis are right to eps / radius only.
BOUND = 1e-11


# ---- packed weights


def step(conv):
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    for p in conv.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def edit(conv):
    with torch.no_grad():
        conv.implicit_kernel.mlp.linears[1].weights[0] += 1


def edit_data(conv):  # leaves no trace in the version of the tensor
    conv.implicit_kernel.mlp.linears[-1].weights.data.mul_(2)


def move_statistics(conv):
    next(b for n, b in conv.named_buffers() if n.endswith("running_var")).data.mul_(2)


def load(conv):
    conv.load_state_dict({k: 1.5 * v if k.endswith("weights") else v for k, v in conv.state_dict().items()})


def replace_parameter(conv):
    width = conv.implicit_kernel.shell_width
    conv.implicit_kernel.shell_width = torch.nn.Parameter(2 * width.detach())


def share(conv):
    conv.share_memory()
    edit_data(conv)


CHANGES = [step, edit, edit_data, move_statistics, load, replace_parameter, share]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["o3", "d4"])
def test_every_change_of_the_parameters_counts(name, change):
    conv = layer(SMALL[name])
    problem = SMALL[name].inputs(conv)
    with torch.no_grad():
        before = problem.run(conv)
        change(conv)
        after = problem.run(conv)
        conv.backend = "reference"
        expected = problem.run(conv)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(duplicate):
    conv = layer(SMALL["o3"])
    problem = SMALL["o3"].inputs(conv)
    with torch.no_grad():
        before = problem.run(conv)
        other = duplicate(conv)
        edit_data(other)
        changed = replace(problem).run(other)
        assert torch.equal(problem.run(conv), before)
        assert not torch.allclose(changed, before)


# ---- pairs of samples


@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_pairs_are_pairs(name, sampling):
    plan = SMALL[name].layer(sampling=sampling).implicit_kernel.plan
    pairs = sample_pairs(plan)
    if not plan.activations:
        return
    sign = 1 - 2.0 * pairs.odd
    act = plan.activations[0]
    for matrix in (act.samples, act.inverse.T):
        images = torch.tensor(matrix[pairs.first] * sign)
        if len(images):
            distance = torch.cdist(images, torch.tensor(matrix))
            assert distance.min(1).values.max() < 1e-7
    assert 2 * len(pairs.first) + len(pairs.single) == len(act.samples)


@pytest.mark.parametrize(("name", "sampling", "count"), [("o3", "exact", 5), ("o3", "escnn", 15), ("so2", "exact", 19)])
def test_symmetric_samples_are_paired(name, sampling, count):
    assert len(sample_pairs(SMALL[name].layer(sampling=sampling).implicit_kernel.plan).first) == count


# ---- kernels at points


def kernel_outcome(kernel, backend, delta, attributes, statistics_from):
    delta, attributes = delta.clone().requires_grad_(), attributes.clone().requires_grad_()
    k, statistics = BACKENDS[backend].kernel(
        kernel.plan, kernel.parameters_for_op(), statistics_from, delta, attributes
    )
    weight = torch.linspace(-1, 1, k.numel(), dtype=k.dtype).view_as(k)
    leaves = {"delta": delta, "attributes": attributes} | dict(kernel.named_parameters())
    grads = torch.autograd.grad((k * weight).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    result = {"out": k.detach()} | {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}
    return result | {f"{what} {n}": t for n, s in enumerate(statistics) for what, t in s._asdict().items()}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_kernel_is_reference(name, sampling, configuration):
    conv = layer(SMALL[name], configuration, sampling=sampling)
    problem, kernel = SMALL[name].inputs(conv), conv.implicit_kernel
    delta = problem.delta.clone()
    if kernel.plan.frame.regular:
        delta[::5] *= 1e-3
    attributes = problem.attributes if problem.attributes is not None else delta.new_zeros(len(delta), 0)
    statistics_from = MEASURED if configuration == "train" and kernel.plan.norms else RUNNING
    expected = kernel_outcome(kernel, "reference", delta, attributes, statistics_from)
    assert_close(kernel_outcome(kernel, "cpu", delta, attributes, statistics_from), expected, BOUND)


@pytest.mark.parametrize("name", ["o3", "so2-r3", "c4"])
@pytest.mark.parametrize("configuration", ["no norm", "eval"])
def test_kernel_twice_differentiable(name, configuration):
    case = replace(SMALL[name], into="1 scalar", out="1 scalar+vector", n_channels=2)
    conv = layer(case, configuration, activation="silu")
    generator = torch.Generator().manual_seed(0)
    plan = conv.implicit_kernel.plan
    shapes = (3, plan.frame.dim), (3, plan.frame.n_attributes)
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(conv.implicit_kernel, leaves)
    assert torch.autograd.gradgradcheck(conv.implicit_kernel, leaves)
