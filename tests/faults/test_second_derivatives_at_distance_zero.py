"""Hessians of atoms in one place are finite and right: the cosines of the distance are smooth there."""

import pytest
import torch

from implicit_steer.experiments.data.nbody import ParticleBatch
from implicit_steer.graph.structures import Structures
from implicit_steer.layers.particles import edge_features
from implicit_steer.ops.radial import radial_values
from implicit_steer.plan import Cosines
from implicit_steer.potentials import Potential

DIRECTION = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("length", [0.0, 1e-12, 1e-8, 1e-6, 1e-3, 0.3, 1.0])
def test_cosines(length):
    """Gradient and Hessian against the series of cos(a √s), s = |x|²."""
    delta = (length * DIRECTION / DIRECTION.norm())[None].requires_grad_()
    for n in range(1, 7):
        a, s = torch.pi * n, length**2
        if length < 0.1:  # derivatives by s
            first, second = -(a**2) / 2 * (1 - a**2 * s / 6), a**4 / 12 * (1 - a**2 * s / 10)
        else:
            cos, sin = (f(torch.tensor(a * length, dtype=torch.float64)).item() for f in (torch.cos, torch.sin))
            first, second = -a * sin / (2 * length), (a * sin / length - a**2 * cos) / (4 * s)
        x = delta.detach()[0]
        gradient = 2**0.5 * 2 * first * x
        hessian = 2**0.5 * (2 * first * torch.eye(3).double() + 4 * second * torch.outer(x, x))
        (found,) = torch.autograd.grad(radial_values(Cosines(6, 1.0), delta)[0, n - 1], delta, create_graph=True)
        rows = torch.stack([torch.autograd.grad(g, delta, retain_graph=True)[0][0] for g in found[0]])
        # Of the series: (a² s)² at most, 1e-7 at 1e-3.
        bound = 1e-6 if length == 1e-3 else 1e-12
        torch.testing.assert_close(found[0], gradient, rtol=0, atol=bound * a**2 * max(length, 1e-12))
        torch.testing.assert_close(rows, hessian, rtol=0, atol=bound * a**2)


def test_gradgradcheck_of_cosines():
    delta = torch.stack([length * DIRECTION for length in (0.0, 1e-6, 1e-3, 0.1)]).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: radial_values(Cosines(3, 1.0), x), delta)


def test_cosines_themselves_are_as_before():
    for dtype in (torch.float32, torch.float64):
        delta = torch.rand(100, 3, dtype=dtype) ** 8
        n = torch.arange(1, 21, dtype=dtype)
        expected = 2**0.5 * torch.cos(torch.pi * n * delta.norm(dim=1, keepdim=True))
        # a rounding of n π |x| ≤ 110
        torch.testing.assert_close(
            radial_values(Cosines(20, 1.0), delta), expected, rtol=0, atol=500 * torch.finfo(dtype).eps
        )


def hessian(potential, numbers, pos):
    pos = pos.clone().requires_grad_()
    structures = Structures.single(numbers, pos, potential.cutoff)
    forces = potential.predict(structures, create_graph=True).forces
    return -torch.stack([torch.autograd.grad(f, pos, retain_graph=True)[0].flatten() for f in forces.flatten()])


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hessian_of_a_potential(dtype, backend):
    """Two of three atoms in one place: symmetric, and the limit of small distances."""
    torch.manual_seed(0)
    potential = Potential([1, 8], 3.0, channels=2, blocks=1, backend=backend).to(dtype)
    potential.scale.fill_(10.0)
    numbers = torch.tensor([8, 1, 1])
    pos = torch.tensor([[0.3, 0, 0], [1.1, 0.4, -0.2], [1.1, 0.4, -0.2]], dtype=dtype)
    found = hessian(potential, numbers, pos)
    assert found.isfinite().all()
    scale = found.abs().max().item()
    exact = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(found, found.T, rtol=0, atol=exact * scale)
    for length in (1e-6, 1e-3):
        close = pos.clone()
        close[2] += length * DIRECTION.to(dtype)
        # The kernel is smooth: a step changes the Hessian by about as much, relative to the cutoff.
        torch.testing.assert_close(
            hessian(potential, numbers, close), found, rtol=0, atol=(20 * length + exact) * scale
        )


def test_particles_in_one_place():
    """The distance is an attribute as it is; where two particles meet, both its derivatives are 0, not NaN."""
    pos = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 2, 2]], dtype=torch.float64, requires_grad=True)
    edges = torch.tensor([[0, 1, 2], [1, 0, 0]])
    zeros = torch.zeros(3, 3).double()
    batch = ParticleBatch(pos, zeros, zeros[:, :1], edges, zeros[:, :1], zeros, 1)
    distance = edge_features(batch)[1][:, 1]
    assert distance.tolist() == [0, 0, 3]
    (gradient,) = torch.autograd.grad(distance.sum(), pos, create_graph=True)
    assert gradient.isfinite().all()
    (second,) = torch.autograd.grad(gradient.square().sum(), pos)
    assert second.isfinite().all()
