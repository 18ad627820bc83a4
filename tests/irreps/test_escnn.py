"""Layers and features between escnn's types and irreps: the same function, the same derivatives."""

import copy

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn.group import directsum

import implicit_steer as ist
import implicit_steer.nn as snn
from implicit_steer.irreps import ImplicitPointConv, from_escnn, to_escnn

SPACES = {"O(3)": gspaces.flipRot3dOnR3(), "SO(3)": gspaces.rot3dOnR3()}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # measured: 2e-6 and 1e-14


def irrep(space, degree, parity=None):
    """escnn's irrep of this degree; on O(3) with the parity of vectors by default."""
    if space == "SO(3)":
        return SPACES[space].irrep(degree)
    return SPACES[space].irrep(degree % 2 if parity is None else parity, degree)


def fields(space, degrees, copies=2):
    return SPACES[space].type(*[irrep(space, degree) for degree in degrees for _ in range(copies)])


def layer(into, out, dtype, attributes=1, **options):
    torch.manual_seed(0)
    given = into.gspace.type(*[into.gspace.trivial_repr] * attributes) if attributes else None
    options = {"n_layers": 3, "n_channels": 4, "norm": None, "activation": "silu", "cutoff": 3.0} | options
    conv = snn.ImplicitPointConv(into, out, given, **options).to(dtype)
    for name, parameter in conv.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return conv


def with_vector_attributes():
    """A layer that cannot be converted: its frame is none."""
    kind = fields("O(3)", [0])
    return snn.ImplicitPointConv(kind, kind, fields("O(3)", [1], 1), n_layers=2, n_channels=4)


def inputs(conv, dtype):
    """Features in escnn's basis, edges, edge vectors, attributes."""
    pos, size = torch.randn(12, 3, dtype=dtype), conv.implicit_kernel.n_attributes
    edges = ist.knn_graph(pos, k=4)
    attributes = torch.randn(edges.shape[1], size, dtype=dtype) if size else None
    x = conv.in_type(torch.randn(12, conv.in_type.size, dtype=dtype), pos)
    return x, edges, pos[edges[1]] - pos[edges[0]], attributes


def same(a, b, tolerance):
    return float((a - b).detach().norm()) <= tolerance * float(b.detach().norm())


def assert_same_function(conv, dtype):
    """There and back; with gradients in features, edge vectors, attributes and along a direction of the parameters."""
    tolerance, ours = TOLERANCE[dtype], from_escnn(conv)
    x, edges, vectors, attributes = inputs(conv, dtype)
    leaves = [t.clone().requires_grad_() for t in (x.tensor, vectors, attributes) if t is not None]
    out = from_escnn(conv(conv.in_type(leaves[0], x.coords), edges, *leaves[1:]))
    found = ours(from_escnn(conv.in_type(leaves[0], x.coords)), edges, *leaves[1:])
    assert same(found, out, tolerance)
    seed = torch.randn_like(out)
    expected = torch.autograd.grad((out * seed).sum(), [*leaves, *conv.parameters()], retain_graph=True)
    actual = torch.autograd.grad((found * seed).sum(), [*leaves, *ours.parameters()])
    for a, b in zip(actual[: len(leaves)], expected[: len(leaves)], strict=True):
        assert same(a, b, 10 * tolerance)
    moved = copy.deepcopy(conv)
    with torch.no_grad():
        steps = [0.1 * torch.randn_like(p) for p in moved.parameters()]
        for parameter, step in zip(moved.parameters(), steps, strict=True):
            parameter += step
    there = [b - a for a, b in zip(ours.parameters(), from_escnn(moved).parameters(), strict=True)]
    by_step = sum((g * s).sum() for g, s in zip(expected[len(leaves) :], steps, strict=True))
    assert same(sum((g * s).sum() for g, s in zip(actual[len(leaves) :], there, strict=True)), by_step, 100 * tolerance)
    back = to_escnn(ours)
    again = back(to_escnn(from_escnn(x), back.in_type), edges, vectors, attributes)
    assert same(from_escnn(again), out, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("out", range(4))
@pytest.mark.parametrize("into", range(4))
def test_every_pair_of_degrees(into, out, space, dtype):
    assert_same_function(layer(fields(space, [into]), fields(space, [out]), dtype), dtype)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("space", SPACES)
def test_mixed_fields_in_any_order_and_basis(space, norm):
    rotated = directsum([irrep(space, n) for n in (0, 1, 3)], name=f"mixed of {space}")
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((rotated.size, rotated.size)))[0]
    rotated = directsum([irrep(space, n) for n in (0, 1, 3)], change_of_basis=turn, name=f"turned of {space}")
    odd = [irrep(space, 1, 0), irrep(space, 0, 1)]
    kind = SPACES[space].type(irrep(space, 1), *odd, rotated, irrep(space, 2), rotated, irrep(space, 1))
    conv = layer(kind, kind, torch.float64, norm=norm)
    for mode in (False, True):
        assert_same_function(conv.train(mode), torch.float64)


@pytest.mark.parametrize(
    "options", [{"attributes": 0}, {"n_layers": 1}, {"aggr": "mean", "n_layers": 2}, {"bias": False}]
)
def test_options(options):
    conv = layer(fields("O(3)", [0, 1]), fields("O(3)", [0, 1, 2]), torch.float64, **options)
    ours = from_escnn(conv)
    assert (ours.cutoff, ours.aggr, ours.activation) == (conv.cutoff, conv.aggr, conv.activation)
    assert (ours.bias is None) == (conv.bias is None)
    assert_same_function(conv, torch.float64)


def test_files_of_both_give_the_same(tmp_path):
    conv = layer(fields("O(3)", [0, 1]), fields("O(3)", [0, 1]), torch.float64).eval()
    x, edges, vectors, attributes = inputs(conv, torch.float64)
    ist.save(conv, tmp_path / "escnn.safetensors")
    ist.save(from_escnn(conv), tmp_path / "irreps.safetensors")
    theirs = ist.load(tmp_path / "escnn.safetensors")(x.tensor, edges, vectors, attributes)
    ours = ist.load(tmp_path / "irreps.safetensors")(from_escnn(x), edges, vectors, attributes)
    assert same(ours, from_escnn(conv.out_type(theirs, x.coords)), 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("space", SPACES)
def test_linear_maps(space, dtype):
    """There and back, on irreps in any order and a field that is none; on SO(3) vectors and pseudovectors mix."""
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    turned = directsum([irrep(space, n) for n in (0, 1)], change_of_basis=turn, name=f"turned scalar of {space}")
    into = SPACES[space].type(irrep(space, 1), turned, irrep(space, 0), irrep(space, 2), irrep(space, 1, 0))
    out = SPACES[space].type(irrep(space, 0), irrep(space, 2), turned, irrep(space, 1, 0), irrep(space, 1))
    given = snn.Linear(into, out).to(dtype).eval()
    torch.nn.init.normal_(given.bias)
    ours = from_escnn(given)
    x = into(torch.randn(5, into.size, dtype=dtype), torch.zeros(5, 3, dtype=dtype))
    assert not ours.training
    assert same(ours(from_escnn(x)), from_escnn(given(x)), TOLERANCE[dtype])
    back = to_escnn(ours)
    again = back(to_escnn(from_escnn(x), back.in_type))
    assert same(from_escnn(again), from_escnn(given(x)), TOLERANCE[dtype])


def test_linear_maps_without_scalars():
    ours = from_escnn(snn.Linear(fields("O(3)", [1]), fields("O(3)", [1, 2])))
    assert ours.bias is None
    assert len(ours.weights) == 4
    assert to_escnn(ours).bias is None


def test_types_and_tensors():
    kind = SPACES["O(3)"].type(irrep("O(3)", 0), irrep("O(3)", 0), irrep("O(3)", 1), irrep("O(3)", 0))
    assert str(from_escnn(kind)) == "2x0e+1x1o+1x0e"
    assert to_escnn("2x0e+1x1o+1x0e") == kind
    assert str(from_escnn(to_escnn("3x0+2x1+1x2"))) == "3x0+2x1+1x2"
    x = kind(torch.randn(5, 6), torch.randn(5, 3))
    assert same(to_escnn(from_escnn(x), kind).tensor, x.tensor, 1e-6)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: from_escnn(torch.zeros(1)), TypeError, "got Tensor"),
        (lambda: from_escnn(fields("O(3)", [0]).gspace), TypeError, "x: expected"),
        (lambda: from_escnn(gspaces.rot2dOnR2(4).type(gspaces.rot2dOnR2(4).trivial_repr)), ValueError, "O(3) or SO(3)"),
        (lambda: from_escnn(snn.Gate(fields("O(3)", [0, 1]))), TypeError, "got Gate"),
        (lambda: from_escnn(with_vector_attributes()), ValueError, "invariant edge attributes"),
        (lambda: to_escnn(torch.zeros(1, 1)), TypeError, "kind: expected the FieldType"),
        (lambda: to_escnn(3), TypeError, "x: expected irreps, a tensor"),
        (lambda: to_escnn(""), ValueError, "at least one irrep"),
        (lambda: to_escnn(ImplicitPointConv("2x0e", "2x0e", depthwise=True)), ValueError, "not depthwise"),
        (
            lambda: from_escnn(layer(fields("O(3)", [0]), fields("O(3)", [0]), torch.float32, sampling="escnn")),
            ValueError,
            "sampling='exact'",
        ),
        (
            lambda: from_escnn(layer(fields("O(3)", [0]), fields("O(3)", [0]), torch.float32, sampling="exact-20")),
            ValueError,
            "sampling='exact-6'",
        ),
    ],
)
def test_refused(make, kind, words):
    with pytest.raises(kind) as error:
        make()
    assert words in str(error.value)
