"""Convolution on pixel and voxel grids: against explicit sums, and its equivariance."""

import itertools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from escnn.nn import R2Conv, R3Conv
from helpers import relative

from implicit_steer.nn import ImplicitConv
from implicit_steer.testing.cases import SPACES, fields

pytestmark = pytest.mark.filterwarnings("ignore:kernel_size.*even grid", "ignore:x. the samples of an axis")


def grid_layer(space, into, out, attributes, kernel_size=3, seed=0, **options):
    """A float64 layer in evaluation mode, its weights off their initial values."""
    torch.manual_seed(seed)
    gspace = SPACES[space]()
    types = (fields(gspace, t) for t in (into, out, attributes))
    conv = ImplicitConv(*types, kernel_size, 2, 3, **options).double().eval()
    with torch.no_grad():
        for p in conv.parameters():
            p += 0.2 * torch.randn_like(p)
    return conv


def features(conv, *size, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, conv.in_type.size, *size, dtype=torch.float64, generator=generator)


def rows(conv, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, conv.kernel_attr_type.size, dtype=torch.float64, generator=generator)


_PAD = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def explicit(conv, x, attr, kernel_size, padding, stride, dilation, mode):
    """out(p) = bias + Σ_t K(x_t, a) f(p + t), term by term, in NumPy."""
    dim, half = conv.dim, kernel_size // 2
    padded = np.pad(x.numpy(), [(0, 0)] * 2 + [(padding, padding)] * dim, mode=_PAD[mode])
    sizes = [(n - dilation * (kernel_size - 1) - 1) // stride + 1 for n in padded.shape[2:]]
    out = np.zeros((len(x), conv.out_type.size, *sizes))
    for t in itertools.product(range(kernel_size), repeat=dim):
        pos = (torch.tensor([t], dtype=torch.float64) - half) / max(half, 1)
        k = conv.implicit_kernel(pos.expand(len(x), -1), None if attr is None else attr.expand(len(x), -1))
        window = [
            slice(dilation * s, dilation * s + stride * (n - 1) + 1, stride) for s, n in zip(t, sizes, strict=True)
        ]
        out += np.einsum("boi,bi...->bo...", k.detach().numpy(), padded[(slice(None), slice(None), *window)])
    bias = conv.expand_bias().detach().numpy()
    return torch.tensor(out + bias.reshape(-1, *[1] * dim))


@pytest.mark.parametrize("mode", _PAD)
@pytest.mark.parametrize(("kernel_size", "padding", "stride", "dilation"), [(3, 1, 1, 1), (3, 2, 2, 2), (4, 1, 3, 1)])
@pytest.mark.parametrize(("space", "size"), [("SO(2) on R2", (7, 9)), ("C4 on R2", (8, 7)), ("O(3)", (6, 7, 8))])
def test_is_the_explicit_sum(space, size, kernel_size, padding, stride, dilation, mode):
    names = ("1 regular",) * 2 if space == "C4 on R2" else ("1 scalar+vector", "1 scalar+vector, 1 scalar")
    options = {"padding": padding, "stride": stride, "dilation": dilation, "padding_mode": mode}
    conv = grid_layer(space, *names, "1 scalar", kernel_size, **options)
    x, attr = features(conv, *size), rows(conv, 2)
    out = conv(conv.in_type(x), attr)
    assert out.type == conv.out_type
    assert relative(out.tensor, explicit(conv, x, attr, kernel_size, padding, stride, dilation, mode)) <= 1e-12


@pytest.mark.parametrize("kernel_size", [1, 2, 5])
def test_without_attributes(kernel_size):
    conv = grid_layer("SO(2) on R2", "1 scalar+vector", "2 scalar", None, kernel_size, norm=None)
    x = features(conv, 6, 7)
    assert relative(conv(conv.in_type(x)).tensor, explicit(conv, x, None, kernel_size, 0, 1, 1, "zeros")) <= 1e-12


@pytest.mark.parametrize(("space", "size"), [("SO(2) on R2", (5, 6)), ("O(3)", (4, 5, 4))])
def test_attributes_per_sample_are_calls_one_by_one(space, size):
    conv = grid_layer(space, "1 scalar+vector", "2 scalar, 1 vector", "2 scalar", padding=1)
    x, attr = features(conv, *size, batch=3), rows(conv, 3)
    together = conv(conv.in_type(x), attr).tensor
    for n in range(3):
        alone = conv(conv.in_type(x[n : n + 1]), attr[n : n + 1]).tensor
        assert relative(together[n : n + 1], alone) <= 1e-13
    shared = conv(conv.in_type(x), attr[:1]).tensor
    assert relative(shared, conv(conv.in_type(x), attr[:1].expand(3, -1)).tensor) <= 1e-13
    assert relative(shared, together) > 1e-3


def transform(x, matrix):
    """f′(p) = f(R⁻¹ p) on a centred cubic grid, R a signed permutation; coordinate n runs along spatial axis n."""
    source = [int(np.flatnonzero(row)[0]) for row in matrix]  # output axis m runs along input axis source[m]
    x = x.permute(0, 1, *(2 + n for n in source))
    return x.flip([2 + m for m, n in enumerate(source) if matrix[m, n] < 0])


def quarter_turns(conv):
    """(element, matrix) of the group's elements that map the grid to itself."""
    gspace = conv.in_type.gspace
    group, found = gspace.fibergroup, []
    if not group.continuous:
        candidates = list(group.elements)
    elif gspace.dimensionality == 2:
        candidates = [group.element(n * np.pi / 2, "radians") for n in range(4)]
    else:
        candidates = []
        for permutation in itertools.permutations(range(3)):
            for signs in itertools.product([1, -1], repeat=3):
                matrix = np.eye(3)[list(permutation)] * signs
                flip = round((1 - np.linalg.det(matrix)) / 2)
                rotation = matrix * (-1) ** flip
                candidates.append(group.element((flip, rotation), "MAT"))
    for g in candidates:
        matrix = gspace.basespace_action(g)
        if np.allclose(np.abs(matrix).round(6) % 1, 0):
            found.append((g, matrix.round()))
    return found


@pytest.mark.parametrize("sampling", ["exact", "escnn"])
@pytest.mark.parametrize(
    ("space", "names", "attributes", "turns"),
    [
        ("SO(2) on R2", ("1 scalar+vector", "1 scalar, 1 vector"), "1 vector", 4),
        ("D4 on R2", ("1 regular", "1 vector"), "1 vector", 8),
        ("O(3)", ("1 scalar+vector", "1 scalar, 1 vector"), "1 scalar", 48),
    ],
)
def test_quarter_turns(space, names, attributes, turns, sampling):
    conv = grid_layer(space, *names, attributes, 3, padding=1, sampling=sampling)
    x, attr = features(conv, *[5] * conv.dim), rows(conv, 2)
    expected, elements = conv(conv.in_type(x), attr).tensor.detach(), quarter_turns(conv)
    assert len(elements) == turns
    for g, matrix in elements:
        act = [torch.tensor(t.representation(g)) for t in (conv.in_type, conv.out_type, conv.kernel_attr_type)]
        turned = conv.in_type(torch.einsum("ij,bj...->bi...", act[0], transform(x, matrix)))
        out = conv(turned, attr @ act[2].T).tensor
        # The authors' planar grid of 40 and their icosahedral one of 30 points hold quarter turns to 1e-16 and 3e-2.
        bound = 0.1 if (space, sampling) == ("O(3)", "escnn") else 1e-10
        assert relative(out, torch.einsum("ij,bj...->bi...", act[1], transform(expected, matrix))) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_features(dtype):
    conv = grid_layer("SO(2) on R2", "1 scalar+vector", "2 scalar", "1 scalar", padding=1).float()
    x, attr = features(conv, 6, 6).to(dtype), rows(conv, 2).float()
    out = conv(conv.in_type(x), attr).tensor
    assert out.dtype == dtype
    assert relative(out, conv(conv.in_type(x.float()), attr).tensor) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("attributes", ["1 vector", None])
def test_gradients(attributes):
    # without attributes batch statistics are used in both modes; they are detached, so gradients are not derivatives
    norm = "batch" if attributes else None
    conv = grid_layer("SO(2) on R2", "1 scalar+vector", "1 vector, 1 scalar", attributes, activation="silu", norm=norm)
    inputs = [features(conv, 4, 4).requires_grad_()]
    if attributes:
        inputs.append(rows(conv, 2).requires_grad_())
    names = [name for name, _ in conv.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in conv.parameters()]

    def run(*arguments):
        x, *attr = arguments[: len(inputs)]
        parameters = dict(zip(names, arguments[len(inputs) :], strict=True))
        return torch.func.functional_call(conv, parameters, (conv.in_type(x), *attr)).tensor

    assert torch.autograd.gradcheck(run, (*inputs, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*inputs, *values), fast_mode=True)


def test_training_moves_the_statistics_and_evaluation_does_not():
    conv = grid_layer("SO(2) on R2", "1 scalar+vector", "2 scalar", "1 scalar")
    x, attr = conv.in_type(features(conv, 5, 5)), rows(conv, 2)
    key = next(k for k in conv.state_dict() if k.endswith("running_var"))
    before = conv.state_dict()[key].clone()
    conv(x, attr)
    assert torch.equal(conv.state_dict()[key], before)
    conv.train()(x, attr)
    assert not torch.equal(conv.state_dict()[key], before)


def test_an_even_grid_warns():
    """Its points are off centre: a layer of C4 turns with the image only if their number is odd."""
    gspace = SPACES["C4 on R2"]()
    scalar = gspace.type(gspace.trivial_repr)
    errors = {}
    for kernel_size in (2, 3, 4, 5):
        with pytest.warns(UserWarning, match="not equivariant") if kernel_size % 2 == 0 else nullcontext():
            conv = ImplicitConv(scalar, scalar, None, kernel_size, 2, 3, norm=None).double().eval()
        x = features(conv, 8, 8)
        turned = conv(scalar(x.rot90(1, (2, 3)))).tensor.rot90(-1, (2, 3))
        errors[kernel_size] = relative(turned, conv(scalar(x)).tensor)
    assert max(errors[3], errors[5]) <= 1e-12
    assert min(errors[2], errors[4]) > 1e-2


def test_explanation():
    conv = grid_layer("SO(2) on R2", "1 scalar", "1 vector", None)
    assert "SO(2)" in conv.explain()
    assert "backend    cpu: native" in conv.explain()


# ---- beside escnn's own convolutions


def _turned(network, x, turn, back):
    """How far turning before and after differ."""
    return relative(back(network(turn(x))), network(x))


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 4])
def test_mixes_with_r2conv(ours_first, kernel_size):
    """D4, scalar → vector → scalar: quarter turns, and both mirrors, which the other axes would confuse."""
    gspace = SPACES["D4 on R2"]()
    scalar, vector = gspace.type(gspace.trivial_repr), gspace.type(gspace.basespace_action)
    torch.manual_seed(0)

    def ours(into, out):
        return ImplicitConv(into, out, None, kernel_size, 2, 3, norm=None, axes="escnn").double()

    def theirs(into, out):
        return R2Conv(into, out, kernel_size=kernel_size).double()

    first, second = (ours, theirs) if ours_first else (theirs, ours)
    layers = first(scalar, vector), second(vector, scalar)

    def network(x):
        return layers[1](layers[0](scalar(x))).tensor

    x = torch.randn(1, 1, 11, 11, dtype=torch.float64)
    for turn, back in (
        (lambda t: t.rot90(1, (2, 3)), lambda t: t.rot90(-1, (2, 3))),
        (lambda t: t.flip(2), lambda t: t.flip(2)),
        (lambda t: t.transpose(2, 3), lambda t: t.transpose(2, 3)),
    ):
        assert _turned(network, x, turn, back) <= 1e-6  # R2Conv samples its basis in float32


def test_mixes_with_r3conv():
    gspace = SPACES["O(3)"]()
    scalar, vector = gspace.type(gspace.trivial_repr), gspace.type(gspace.irrep(1, 1))
    torch.manual_seed(0)
    ours = ImplicitConv(scalar, vector, None, 3, 2, 3, norm=None, axes="escnn").double()
    theirs = R3Conv(vector, scalar, kernel_size=3).double()
    x = torch.randn(1, 1, 7, 7, 7, dtype=torch.float64)
    for plane in ((2, 3), (3, 4), (2, 4)):
        error = _turned(
            lambda t: theirs(ours(scalar(t))).tensor,
            x,
            lambda t, plane=plane: t.rot90(1, plane),
            lambda t, plane=plane: t.rot90(-1, plane),
        )
        assert error <= 1e-6
