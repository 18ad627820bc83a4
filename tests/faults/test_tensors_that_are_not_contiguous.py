"""A bias that is not contiguous ended in "expected a contiguous tensor of another dtype"; so did what norms hold."""

import pytest
import torch
from helpers import BACKENDS, relative

import implicit_steer as ist
from implicit_steer.nn import IIDBatchNorm1d, ImplicitConv
from implicit_steer.testing.cases import SMALL, SPACES, fields


def strided(tensor):
    """Equal values, every second one of a larger tensor."""
    wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor.detach()
    return wide[..., ::2]


def scatter(module):
    """Every parameter and buffer of ``module`` not contiguous."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.dim() and tensor.is_floating_point() and tensor.numel() > 1:
                    table[name] = torch.nn.Parameter(strided(tensor)) if table is owner._parameters else strided(tensor)
    return module


def assert_same(make, run):
    """A module that is not contiguous gives what a contiguous one gives: outputs in training and evaluation, gradients,
    and the running statistics after training."""
    torch.manual_seed(0)
    plain = make()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    other = make()
    other.load_state_dict(plain.state_dict())
    scatter(other)
    assert any(not t.is_contiguous() for t in other.parameters())
    for mode in (True, False):
        for module in (plain, other):
            module.train(mode).zero_grad()
        outputs = [run(module) for module in (plain, other)]
        assert relative(outputs[1], outputs[0]) <= 1e-6
        if outputs[0].requires_grad:
            for out in outputs:
                out.square().sum().backward()
            for p, q in zip(plain.parameters(), other.parameters(), strict=True):
                if p.grad is not None:
                    torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(plain.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias(backend):
    """The bias alone is not contiguous."""
    conv = SMALL["o3"].layer(backend=backend).eval()
    problem = SMALL["o3"].inputs(conv)
    torch.nn.init.normal_(conv.bias)
    expected = problem.run(conv)
    conv.bias = torch.nn.Parameter(strided(conv.bias))
    torch.testing.assert_close(problem.run(conv), expected)
    conv.bias.data = strided(conv.bias.data + 1)
    assert not torch.allclose(problem.run(conv), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plain", [False, True], ids=["nn", "plain"])
def test_point_convolution(backend, plain, tmp_path):
    problem = SMALL["o3"].inputs(SMALL["o3"].layer())
    if plain:
        ist.save(SMALL["o3"].layer(backend=backend), tmp_path / "conv.safetensors")
        make = lambda: ist.load(tmp_path / "conv.safetensors")  # noqa: E731
        run = lambda conv: conv(problem.x, problem.graph, problem.delta, problem.attributes)  # noqa: E731
        assert_same(make, run)
    else:
        assert_same(lambda: SMALL["o3"].layer(backend=backend), problem.run)


def modules():
    kind, flat = (
        fields(SPACES["O(3)"](), "4 scalar+vector, 2 vector, 3 scalar"),
        fields(SPACES["C4 on R2"](), "1 regular"),
    )
    return {
        "IIDBatchNorm1d": (lambda: IIDBatchNorm1d(kind), (6, kind.size)),
        "ImplicitConv": (lambda: ImplicitConv(flat, flat, None, 3, 2, 2), (2, 4, 5, 5)),
    }


@pytest.mark.parametrize("plain", [False, True], ids=["nn", "plain"])
@pytest.mark.parametrize("name", ["IIDBatchNorm1d", "ImplicitConv"])
def test_other_modules(name, plain, tmp_path):
    make, shape = modules()[name]
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).sin().view(shape)
    if plain:
        ist.save(make(), tmp_path / "module.safetensors")
        assert_same(lambda: ist.load(tmp_path / "module.safetensors"), lambda module: module(strided(x)))
        return
    coords = [torch.zeros(6, 3)] if len(shape) == 2 else []
    assert_same(make, lambda module: module(module.in_type(strided(x), *coords)).tensor)
