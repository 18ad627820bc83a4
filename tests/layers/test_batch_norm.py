"""Batch norm of node features: escnn's module, to rounding."""

import copy

import escnn.nn
import pytest
import torch
from escnn.nn import FieldType, GeometricTensor
from helpers import deviations

from implicit_steer.nn import FourierActivation, IIDBatchNorm1d
from implicit_steer.testing.cases import SPACES


def sphere(gspace):
    return FourierActivation(gspace, 8, 1).in_type


def mixed(gspace):
    sphere, scalar = FourierActivation(gspace, 1, 2).in_type.representations[0], gspace.trivial_repr
    return FieldType(gspace, [scalar, sphere, scalar, gspace.irrep(1, 1), sphere])


def irreps(gspace, *frequencies):
    return gspace.type(*(gspace.irrep(frequency % 2, frequency) for frequency in frequencies))


TYPES = {
    "functions on the sphere": lambda: sphere(SPACES["O(3)"]()),
    "kinds out of order": lambda: mixed(SPACES["O(3)"]()),
    "kinds in order": lambda: irreps(SPACES["O(3)"](), 0, 0, 1, 2, 2),
    "no trivial irreps": lambda: irreps(SPACES["O(3)"](), 1, 1, 1),
    "regular": lambda: SPACES["D4 on R2"]().type(*[SPACES["D4 on R2"]().regular_repr] * 2),
}


def pair(kind, **options):
    """escnn's module and ours, with the same random parameters and running statistics, in float64."""
    theirs = escnn.nn.IIDBatchNorm1d(TYPES[kind](), **options).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(0.5, 1.5)
    ours = IIDBatchNorm1d(theirs.in_type, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outcome(norm, x, weight):
    """Output, gradients, and the state after the call."""
    x = x.detach().requires_grad_()
    coords = torch.zeros(len(x), norm.in_type.gspace.dimensionality, dtype=x.dtype) if x.dim() == 2 else None
    out = norm(GeometricTensor(x, norm.in_type, coords)).tensor
    leaves = {"x": x, **dict(norm.named_parameters())}
    gradients = torch.autograd.grad(out, list(leaves.values()), weight)
    result = {"out": out.detach()} | {f"grad {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return result | {f"state {k}": v.clone() for k, v in norm.state_dict().items()}


OPTIONS = [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_is_escnns(kind, options):
    theirs, ours = pair(kind, **options)
    means = 3 * torch.randn(theirs.in_type.size, dtype=torch.float64)
    for mode in (True, True, False, True, False):
        x, weight = torch.randn(2, 29, theirs.in_type.size, dtype=torch.float64)
        expected, actual = (outcome(norm.train(mode), x + means, weight) for norm in (theirs, ours))
        wrong = {k: v for k, v in deviations(actual, expected).items() if not v <= 2e-7}  # escnn's P, Q: float32
        assert not wrong
        assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("mode", [True, False])
def test_far_from_zero(mode):
    theirs, ours = (norm.float().train(mode) for norm in pair("functions on the sphere"))
    x, weight = torch.randn(2, 500, theirs.in_type.size)
    expected, actual = (outcome(norm, x + 100, weight) for norm in (theirs, ours))
    # 1e-5: 100 is given to 1e-7 of itself
    assert not {k: v for k, v in deviations(actual, expected).items() if not v <= 1e-5}


def test_trailing_dimensions():
    theirs, ours = pair("regular")
    x, weight = torch.randn(2, 5, theirs.in_type.size, 4, 3, dtype=torch.float64)
    for mode in (True, False):
        expected, actual = (outcome(norm.train(mode), x + 2, weight) for norm in (theirs, ours))
        assert not {k: v for k, v in deviations(actual, expected).items() if not v <= 2e-7}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(dtype, mode):
    _, ours = pair("functions on the sphere")
    norm, x = ours.float().train(mode), torch.randn(40, 32).to(dtype)
    twin = copy.deepcopy(norm)
    out, expected = (n(GeometricTensor(t, n.in_type, torch.zeros(40, 3))) for n, t in ((norm, x), (twin, x.float())))
    assert torch.equal(out.tensor, expected.tensor.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("points", [0, 1])
def test_too_few_points(points):
    _, ours = pair("functions on the sphere")
    x = GeometricTensor(torch.randn(points, 32, dtype=torch.float64), ours.in_type, torch.zeros(points, 3))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=f"x: expected at least 2 points in training mode, got {points}"):
        ours(x)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    assert ours.eval()(x).tensor.shape == (points, 32)


def test_nan_spreads_over_its_channel():
    _, ours = pair("functions on the sphere")
    x = torch.randn(9, 32, dtype=torch.float64)
    x[4, 6] = float("nan")
    out = ours(GeometricTensor(x, ours.in_type, torch.zeros(9, 3))).tensor
    assert bool(out[:, 4:8].isnan().all())  # one variance for a field
    assert not out[:, [*range(4), *range(8, 32)]].isnan().any()


def test_other_type_is_refused():
    _, ours = pair("functions on the sphere")
    with pytest.raises(TypeError, match="x: expected a GeometricTensor of"):
        ours(torch.randn(3, 32))


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_twice_differentiable(kind, options):
    """At constant statistics: in evaluation mode."""
    _, norm = pair(kind, **options)
    names, values = zip(*norm.eval().named_parameters(), strict=True) if options == {} else ((), ())

    def run(x, *parameters):
        x = GeometricTensor(x, norm.in_type, torch.zeros(3, norm.in_type.gspace.dimensionality))
        return torch.func.functional_call(norm.eval(), dict(zip(names, parameters, strict=True)), (x,)).tensor

    leaves = torch.randn(3, norm.in_type.size, dtype=torch.float64, requires_grad=True), *values
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_threads(threads):
    """Any number gives the same bits."""
    _, norm = pair("kinds out of order")
    x, weight = torch.randn(2, 10_001, norm.in_type.size, dtype=torch.float64)
    results = []
    for number in (1, 2, 3, 5):
        threads(number)
        results.append(outcome(copy.deepcopy(norm), x, weight))
    assert all(torch.equal(value, other[k]) for other in results[1:] for k, value in results[0].items())
