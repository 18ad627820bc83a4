"""The gated nonlinearity: its formula, its equivariance to rounding, its file, its derivatives."""

import numpy as np
import pytest
import torch
from escnn.group import directsum
from escnn.nn import FieldType, GeometricTensor
from helpers import relative

import implicit_steer as ist
from implicit_steer.layers import Fields, GatedFields
from implicit_steer.nn import Gate, Linear
from implicit_steer.testing.cases import SPACES

GROUPS = ["SO(2) on R2", "O(2) on R2", "O(3)", "SO(3)", "D4 on R2", "icosahedral on R3", "cylinder on R3"]


def mixed(space):
    """Vectors, scalars, a scalar and a vector in one field, two scalars in one field; in no order."""
    gspace = SPACES[space]()
    vector, scalar = gspace.basespace_action, gspace.trivial_repr
    both, pair = directsum([scalar, vector], name="scalar and vector"), directsum([scalar, scalar], name="two scalars")
    return FieldType(gspace, [vector, scalar, both, pair, vector, scalar])


def features(kind, n=5, dtype=torch.float64, seed=0):
    x = torch.randn(n, kind.size, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return GeometricTensor(x, kind, x.new_zeros(n, kind.gspace.dimensionality))


@pytest.mark.parametrize(("function", "gate"), [("silu", "sigmoid"), ("tanh", "elu")])
def test_is_the_formula(function, gate):
    module = Gate(mixed("O(3)"), function, gate)
    x = features(module.in_type)
    vector, s, both, pair, other, t, *gates = x.tensor.split([3, 1, 4, 2, 3, 1, 1, 1, 1], 1)
    phi, sigma = (
        torch.sigmoid if name == "sigmoid" else getattr(torch.nn.functional, name) for name in (function, gate)
    )
    expected = [vector * sigma(gates[0]), phi(s), both * sigma(gates[1]), phi(pair), other * sigma(gates[2]), phi(t)]
    out = module(x)
    assert out.type == module.out_type
    torch.testing.assert_close(out.tensor, torch.cat(expected, 1), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("space", GROUPS)
def test_is_equivariant_to_rounding(space):
    errors = Gate(mixed(space), "tanh").check_equivariance(atol=1e-13, rtol=1e-13)
    assert len(errors) == 10
    assert max(error for _, error in errors) <= 1e-14


def test_fields_need_not_be_orthogonal():
    gspace = SPACES["C4 on R2"]()
    parts = [gspace.irrep(1), gspace.trivial_repr]
    stretched = directsum(parts, change_of_basis=np.diag([1.0, 2.0, 3.0]), name="stretched")
    Gate(gspace.type(stretched, stretched)).check_equivariance(atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("names", ["scalars", "vectors"])
def test_fields_of_one_kind(names):
    gspace = SPACES["O(3)"]()
    kind = gspace.type(*[gspace.trivial_repr if names == "scalars" else gspace.irrep(1, 1)] * 2)
    module = Gate(kind)
    x = features(module.in_type)
    assert module.in_type.size == {"scalars": 2, "vectors": 8}[names]
    if names == "scalars":
        expected = torch.nn.functional.silu(x.tensor)
    else:
        expected = (x.tensor[:, :6].view(5, 2, 3) * torch.sigmoid(x.tensor[:, 6:, None])).view(5, 6)
    torch.testing.assert_close(module(x).tensor, expected)


def test_on_grids():
    module = Gate(mixed("D4 on R2"))
    x = torch.randn(2, module.in_type.size, 3, 4)
    flat = module.in_type(x.movedim(1, -1).flatten(0, -2), torch.zeros(24, 2))
    expected = module(flat).tensor.view(2, 3, 4, -1).movedim(-1, 1)
    torch.testing.assert_close(module(module.in_type(x)).tensor, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_comes_back_from_a_file(dtype, tmp_path):
    module = Gate(mixed("O(3)"), "gelu", "tanh")
    ist.save(module, tmp_path / "gate.safetensors")
    loaded, x = ist.load(tmp_path / "gate.safetensors"), features(module.in_type, dtype=dtype)
    assert type(loaded) is GatedFields
    out = loaded(x.tensor)
    assert out.dtype == dtype
    assert torch.equal(out, module(x).tensor)
    ist.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "gate.safetensors").read_bytes()


def test_gates_of_potentials_are_read_as_before(tmp_path):
    """Another kind of gate has the name ``Gate`` in files."""
    gate = ist.layers.Gate(2, 1)
    ist.save(gate, tmp_path / "gate.safetensors")
    assert type(ist.load(tmp_path / "gate.safetensors")) is ist.layers.Gate


def test_derivatives():
    module = Gate(mixed("O(3)"))
    x = features(module.in_type, n=2)
    run = lambda t: module(GeometricTensor(t, module.in_type, x.coords)).tensor  # noqa: E731
    t = x.tensor.requires_grad_()
    assert torch.autograd.gradcheck(run, t, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, t)


def test_compiles_whole():
    module = Gate(mixed("O(3)"))
    x = features(module.in_type)
    run = torch.compile(
        lambda t: module(GeometricTensor(t, module.in_type, x.coords)).tensor, fullgraph=True, backend="aot_eager"
    )
    assert relative(run(x.tensor), module(x).tensor) <= 1e-14


def test_follows_a_layer():
    kind = mixed("SO(2) on R2")
    gate = Gate(kind)
    linear = Linear(kind, gate.in_type)
    x = features(kind, dtype=torch.float32)
    assert gate(linear(x)).type == kind


def test_wrong_arguments():
    kind = mixed("O(3)")
    with pytest.raises(TypeError, match="out_type: expected an escnn FieldType, got int"):
        Gate(3)
    for name in ("function", "gate"):
        with pytest.raises(ValueError, match=f"{name}: expected one of .*'sigmoid'.*, got 'swish'"):
            Gate(kind, **{name: "swish"})
    gate = Gate(kind)
    with pytest.raises(TypeError, match="x: expected a GeometricTensor"):
        gate(features(kind))
    with pytest.raises(TypeError, match="x: expected a floating point tensor"):
        gate(gate.in_type(torch.zeros(2, gate.in_type.size, dtype=torch.int64), torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="in_type: expected 5 channels and 1 gates, got 5"):
        GatedFields(Fields(5), Fields(5), "silu", "sigmoid", ((3, True), (2, False)))
    with pytest.raises(ValueError, match="fields: expected fields of 6 channels in all, got 5"):
        GatedFields(Fields(6), Fields(6), "silu", "sigmoid", ((3, True), (2, False)))
