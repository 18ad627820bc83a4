"""Constants of layers are known in float64: what a layer computes after ``.double()`` is right to its rounding."""

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn.group import Representation
from helpers import BACKENDS

import implicit_steer as ist
from implicit_steer.experiments.models.qm9 import TensorProduct
from implicit_steer.nn import IIDBatchNorm1d, ImplicitConv, ImplicitPointConv
from implicit_steer.nn.mlp import Linear

ROUNDING = 1e-15  # measured: at most 3e-16


def rotated_scalar():
    """A vector of O(3) and a scalar, mixed by a rotation of the four numbers."""
    gspace = gspaces.flipRot3dOnR3()
    basis = np.linalg.qr(np.random.RandomState(0).randn(4, 4))[0]
    return gspace.type(*[Representation(gspace.fibergroup, "rotated", [(0, 0), (1, 1)], basis)] * 2)


def invariant(kind):
    """(C, fields): per field the unit vector that no element moves."""
    column = kind.representations[0].change_of_basis[:, :1]
    return torch.tensor(np.kron(np.eye(len(kind)), column))


def reloaded(module, tmp_path):
    ist.save(module, tmp_path / "module.safetensors")
    return ist.load(tmp_path / "module.safetensors")


def kept(module, tmp_path):
    return module


def through_float32_state(module, tmp_path):
    """A float64 layer that has loaded what a float32 one has saved."""
    state = {name: t.float() if t.is_floating_point() else t for name, t in module.state_dict().items()}
    module.double().load_state_dict(state)
    return module


WAYS = [kept, reloaded, through_float32_state]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_point_layers(backend, way, tmp_path):
    """``bias_expansion`` had been rounded to float32."""
    kind = rotated_scalar()
    conv = way(ImplicitPointConv(kind, kind, None, 2, 2, backend=backend), tmp_path).double().eval()
    with torch.no_grad():
        conv.bias.copy_(torch.tensor([1.0, -2.0]))
    x, edges = torch.zeros(3, kind.size, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.int64)
    y = conv(conv.in_type(x, torch.zeros(3, 3).double()), edges, x.new_zeros(0, 3))
    expected = invariant(kind) @ torch.tensor([1.0, -2.0], dtype=torch.float64)
    y = y if isinstance(y, torch.Tensor) else y.tensor
    assert (y.detach() - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_grid_layers(way, tmp_path):
    """So had the bias of grid layers, and the points of their kernels, which steps of 1/3 do not hit."""
    kind = rotated_scalar()
    conv = way(ImplicitConv(kind, kind, None, 4, 2, 2, axes="escnn"), tmp_path).double().eval()
    with torch.no_grad():
        conv.bias.copy_(torch.tensor([1.0, -2.0]))
    expected = invariant(kind) @ torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert (conv.expand_bias() - expected).abs().max() < ROUNDING
    along = torch.linspace(-1, 1, 4, dtype=torch.float64)
    assert (conv.grid.double()[:, 0].unique() - along).abs().max() < ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_nodes(way, tmp_path):
    """And so had the projection on the invariants, whose mean a norm takes away, and what its bias adds to."""
    kind = rotated_scalar()
    norm = way(IIDBatchNorm1d(kind), tmp_path).double().train()
    x = torch.randn(20, kind.size, dtype=torch.float64)
    y = norm(norm.in_type(x, torch.zeros(20, 3)))
    y = y if isinstance(y, torch.Tensor) else y.tensor
    u = invariant(kind)
    centred = x - (x @ u).mean(0) @ u.T
    var = x.var(0).view(2, 4).mean(1).repeat_interleave(4)  # of every field, over its coordinates
    assert (y.detach() - centred / (var + norm.eps).sqrt()).abs().max() < 1e-14


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "bound"), [(Linear, 1e-14), (TensorProduct, 1e-13)])
def test_maps_of_nodes(make, bound, way, tmp_path):
    """escnn's basis, in float32, made W an intertwiner only to 3e-7."""
    kind = rotated_scalar()
    module = way(make(kind, kind), tmp_path).double()
    x, zero = torch.randn(5, kind.size, dtype=torch.float64), torch.zeros(5, 3)

    def run(x):
        y = module(module.in_type(x, zero))
        return (y if isinstance(y, torch.Tensor) else y.tensor).detach()

    matrix = torch.tensor(kind.representation(kind.fibergroup.sample()))
    assert (run(x @ matrix.T) - run(x) @ matrix.T).abs().max() < bound


@pytest.mark.parametrize(
    "make",
    [
        lambda kind: ImplicitPointConv(kind, kind, None, 2, 2),
        lambda kind: ImplicitConv(kind, kind, None, 3, 2, 2),
        lambda kind: IIDBatchNorm1d(kind),
    ],
)
def test_float32_and_back(make):
    """Casting loses nothing that a layer has not learned."""
    module = make(rotated_scalar()).double()
    before = {name: b.clone() for name, b in module.named_buffers() if "mlp" not in name}
    module.float().double()
    for name, buffer in module.named_buffers():
        if "mlp" not in name:
            assert torch.equal(buffer, before[name]), name


def test_constants_of_another_basis_in_a_checkpoint_are_taken_over():
    kind = rotated_scalar()
    norm, other = IIDBatchNorm1d(kind), IIDBatchNorm1d(kind)
    state = norm.state_dict()
    state["rotated_change_of_basis"] = -state["rotated_change_of_basis"]
    other.load_state_dict(state)
    assert torch.equal(other.double().state_dict()["rotated_change_of_basis"].float(), state["rotated_change_of_basis"])
