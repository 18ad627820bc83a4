"""``torch.optim.swa_utils.update_bn`` passes over this package's norms without a word: there is one that does not."""

import copy

import escnn.nn
import pytest
import torch
from escnn.nn import GeometricTensor
from torch.optim.swa_utils import AveragedModel

import implicit_steer as ist
from implicit_steer import layers, nn
from implicit_steer.nn import IIDBatchNorm1d
from implicit_steer.testing.cases import SMALL, SPACES, fields

KIND = fields(SPACES["O(3)"](), "3 scalar, 2 vector")


def statistics(module):
    return {name: t.clone() for name, t in module.named_buffers() if "running_" in name or "tracked" in name}


def test_the_same_function_for_all():
    assert nn.update_bn is layers.update_bn


@pytest.mark.parametrize("make", [IIDBatchNorm1d, escnn.nn.IIDBatchNorm1d], ids=["ours", "escnn's"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_norms_of_features_take_the_average(make, momentum, tmp_path):
    """Of equal batches, twice: against the mean of what each batch alone gives."""
    norm = make(KIND, momentum=momentum)
    batches = [KIND(torch.randn(9, KIND.size) + n, torch.zeros(9, 3)) for n in range(3)]
    alone = []
    for batch in batches:
        one = make(KIND, momentum=1.0)
        one(batch)
        alone.append(statistics(one))
    norm(batches[0])  # statistics that have to go
    norm.eval()
    for _ in range(2):
        nn.update_bn(batches, norm)
    assert not norm.training
    assert norm.momentum == momentum
    for name, value in statistics(norm).items():
        expected = 3 if name.endswith("tracked") else sum(a[name] for a in alone) / 3
        torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
    if make is IIDBatchNorm1d:
        ist.save(norm, tmp_path / "norm.safetensors")
        loaded = ist.load(tmp_path / "norm.safetensors")
        nn.update_bn([(b.tensor + 1, "target") for b in batches], loaded)
        scalars = loaded.kinds[0].running_mean if loaded.kinds[0].size == 1 else loaded.kinds[1].running_mean
        torch.testing.assert_close(scalars[:, 0], torch.stack([b.tensor[:, :3].mean(0) + 1 for b in batches]).mean(0))


@pytest.mark.parametrize("plain", [False, True], ids=["nn", "plain"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_norms_inside_kernels(plain, backend, tmp_path):
    conv = SMALL["o3"].layer(backend=backend).double()
    problem = SMALL["o3"].inputs(conv)
    if plain:
        ist.save(conv, tmp_path / "conv.safetensors")
        conv = ist.load(tmp_path / "conv.safetensors")

    def forward(conv, scale):
        x = problem.x if plain else GeometricTensor(problem.x, conv.in_type, problem.pos)
        return conv(x, problem.graph, scale * problem.delta, problem.attributes)

    alone = []
    for scale in (1.0, 0.7, 1.4):
        one = copy.deepcopy(conv)
        nn.update_bn([scale], one, forward=forward)
        alone.append(statistics(one))
    averaged = AveragedModel(conv.eval())
    nn.update_bn([1.0, 0.7, 1.4], averaged, forward=lambda model, scale: forward(model.module, scale))
    found = statistics(averaged.module)
    assert found
    assert not averaged.module.implicit_kernel.training
    first = alone[0]
    assert max(float((alone[1][name] - first[name]).abs().max()) for name in first if "running_var" in name) > 1e-6
    for name, value in found.items():
        expected = 3 if name.endswith("tracked") else (first[name] + alone[1][name] + alone[2][name]) / 3
        torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-6, atol=1e-7)


def test_torchs_own_norms_and_modes():
    """As torch's function does it, but that every part is in its own mode afterwards."""
    mine = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    theirs = copy.deepcopy(mine)
    mine[1].eval()
    batches = [torch.randn(6, 4) + n for n in range(4)]
    nn.update_bn(batches, mine)
    torch.optim.swa_utils.update_bn(batches, theirs)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    assert [m.training for m in mine.modules()] == [True, True, False]


def test_linear_maps_of_escnn_stay_expanded():
    """In evaluation mode escnn computes with a matrix that its method ``eval`` makes."""
    space = escnn.gspaces.no_base_space(KIND.fibergroup)
    kind = space.type(*[space.trivial_repr] * 3)
    network = escnn.nn.SequentialModule(escnn.nn.Linear(kind, kind), IIDBatchNorm1d(kind)).eval()
    network.float()  # escnn's layers share their bases with those that other tests cast
    nn.update_bn([kind(torch.randn(9, 3))], network)
    assert network(kind(torch.randn(9, 3))).tensor.isfinite().all()


def test_without_batches_nothing_changes():
    norm = IIDBatchNorm1d(KIND)
    norm(KIND(torch.randn(9, KIND.size), torch.zeros(9, 3)))
    before = statistics(norm)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        nn.update_bn([], norm)
    torch.testing.assert_close(statistics(norm), before)
    nn.update_bn([], torch.nn.Linear(2, 2))  # no norms, nothing to do
