"""How ``FourierActivation`` samples by default, how equivariant networks are then, and whose samples a state brings."""

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn.nn import GeometricTensor
from helpers import relative

import implicit_steer as ist
from implicit_steer.experiments.models import ModelNetNet, NBodyNet, QM9Net
from implicit_steer.nn import FourierActivation, IIDBatchNorm1d, ImplicitPointConv, KernelMLP
from implicit_steer.testing.cases import SPACES

O3 = SPACES["O(3)"]()


def activation(space="O(3)", max_frequency=1, function="elu", channels=8, **options):
    return FourierActivation(SPACES[space](), channels, max_frequency, function, **options)


def output(module, x):
    coords = x.new_zeros(len(x), module.in_type.gspace.dimensionality)
    return module(GeometricTensor(x, module.in_type, coords)).tensor


def features(module, n=40, dtype=torch.float64, seed=0):
    return torch.randn(n, module.in_type.size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("space", "function", "bounds"),
    [
        ("O(3)", "elu", (1e-14, 1e-5, 1e-5)),
        ("SO(3)", "elu", (1e-14, 1e-5, 1e-5)),
        ("O(3)", "tanh", (1e-14, 1e-6, 1e-6)),
        ("O(3)", "silu", (1e-14, 1e-8, 1e-7)),
        ("O(3)", "relu", (1e-14, 1e-4, 3e-4)),  # the largest Lebedev rule there is
        ("SO(2) on R2", "elu", (3e-6, 3e-6, 4e-6)),
        ("O(2) on R2", "relu", (4e-6, 4e-6, 5e-6)),
        ("SO(2) on R2", "tanh", (1e-6, 1e-6, 1e-6)),
        ("cylinder on R3", "gelu", (1e-6, 1e-6, 1e-6)),
        ("D4 on R2", "elu", (1e-14, 1e-14, 1e-14)),
    ],
)
def test_default_is_equivariant(space, function, bounds):
    """Relative, of features of unit variance, at L = 1, 2, 3."""
    for max_frequency, bound in enumerate(bounds, 1):
        module = activation(space, max_frequency, function).double()
        assert max(error for _, error in module.check_equivariance(atol=1, rtol=1)) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_frequency", [1, 2])
def test_whole_networks_are_equivariant(max_frequency, dtype):
    """Three convolutions with batch norms and ELUs between them, in training mode, at random elements of O(3)."""
    torch.manual_seed(0)
    act = activation(max_frequency=max_frequency)
    hidden, scalars = act.in_type, O3.type(*[O3.trivial_repr] * 4)
    out = O3.type(*[O3.trivial_repr] * 2, *[O3.irrep(1, 1)] * 2)
    convs = [ImplicitPointConv(*types, None, 3, 4) for types in ((scalars, hidden), (hidden, hidden), (hidden, out))]
    norms = [IIDBatchNorm1d(hidden) for _ in range(2)]
    network = torch.nn.ModuleList([*convs, *norms, act]).to(dtype)
    pos, x = torch.randn(40, 3, dtype=dtype), torch.randn(40, 4, dtype=dtype)
    graph = ist.Graph(ist.knn_graph(pos, k=8), 40)

    def run(pos):
        y, delta = scalars(x, pos), pos[graph.dst] - pos[graph.src]
        for conv, norm in zip(convs, norms, strict=False):
            y = act(norm(conv(y, graph, delta)))
        return convs[-1](y, graph, delta).tensor

    assert len(network) == 6
    expected = run(pos)
    for _ in range(5):
        g = O3.fibergroup.sample()
        turned = pos @ torch.tensor(O3.basespace_action(g), dtype=dtype).T
        rho = torch.tensor(out.representation(g), dtype=dtype)
        assert relative(run(turned), expected @ rho.T) <= (
            1e-5 if max_frequency > 1 else 2e-6 if dtype == torch.float32 else 1e-13
        )


# ---- nodes on a vector's axis


@pytest.mark.parametrize("space", ["O(3)", "SO(3)"])
@pytest.mark.parametrize("function", ["elu", "silu", "tanh"])
def test_gauss_nodes_are_the_limit_of_fine_grids(space, function):
    fine = activation(space, 1, function, sampling="lebedev-5810").double()
    x = features(fine)
    for nodes, bound in ((24, 2e-5), (96, 2e-6)):
        assert (
            relative(output(activation(space, 1, function, sampling=f"gauss-{nodes}").double(), x), output(fine, x))
            < bound
        )


@pytest.mark.parametrize("vector", [1.0, 1e-3, 1e-6, 0.0])
def test_gauss_nodes_have_derivatives_everywhere(vector):
    """Vectors of length 0 as well: those of isolated nodes."""
    module = activation(channels=1, function="tanh", sampling="gauss-12").double()
    scalar = torch.tensor([[0.3], [-0.7]], dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(2, 3, dtype=torch.float64)) * vector
    first = module.in_type.representations[0].irreps[0]
    parts = [scalar, direction] if O3.fibergroup.irrep(*first).size == 1 else [direction, scalar]
    x = torch.cat(parts, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: output(module, t), x)
    assert torch.autograd.gradgradcheck(lambda t: output(module, t), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gauss_nodes_in_other_dtypes_and_on_grids(dtype):
    module = activation()
    x = 20 * features(module)
    out = output(module, x.to(dtype))
    assert out.dtype == dtype
    assert relative(out, output(module, x)) < {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-6}[dtype]
    images = features(module, n=24).view(2, 3, 4, -1).movedim(-1, 1)[..., None]
    expected = output(module, features(module, n=24)).view(2, 3, 4, -1).movedim(-1, 1)[..., None]
    torch.testing.assert_close(module(module.in_type(images)).tensor, expected)


def test_gauss_nodes_compile_whole():
    module = activation().double()
    x = features(module)
    compiled = torch.compile(lambda t: output(module, t), fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), output(module, x)) <= 1e-14


@pytest.mark.parametrize("sampling", ["auto", "lebedev-50", "escnn"])
def test_comes_back_from_a_file(sampling, tmp_path):
    module = activation(sampling=sampling)
    ist.save(module, tmp_path / "activation.safetensors")
    loaded, x = ist.load(tmp_path / "activation.safetensors"), features(module, dtype=torch.float32)
    assert torch.equal(loaded(x), output(module, x))
    ist.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "activation.safetensors").read_bytes()


def test_wrong_samplings():
    for space, max_frequency in (("O(3)", 2), ("SO(2) on R2", 1), ("D4 on R2", 1)):
        with pytest.raises(ValueError, match="sampling: expected a function on the sphere of band limit 1"):
            activation(space, max_frequency, sampling="gauss-12")
    with pytest.raises(ValueError, match="sampling: expected enough samples for 2 coefficients, got 'gauss-1'"):
        activation(sampling="gauss-1")


# ---- states


@pytest.mark.parametrize(
    ("space", "max_frequency", "samplings"),
    [
        ("O(3)", 1, ["escnn", "lebedev-50", "gauss-12", "auto"]),
        ("O(3)", 2, ["escnn", "lebedev-50", "auto"]),
        ("SO(2) on R2", 2, ["escnn", "circle-16", "auto"]),
        ("O(2) on R2", 1, ["escnn", "circle-16", "auto"]),
        ("D4 on R2", 0, ["escnn", "auto"]),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_takes_over_the_samples(space, max_frequency, samplings, assign):
    """Of whatever sampling, to the last bit of float64, and saved again."""
    for saved in samplings:
        module = activation(space, max_frequency, sampling=saved)
        for own in samplings:
            other = activation(space, max_frequency, sampling=own)
            keys = other.load_state_dict(module.state_dict(), assign=assign)
            assert not keys.missing_keys + keys.unexpected_keys
            assert other.sampling == module.sampling
            x = features(other)
            assert torch.equal(output(other.double(), x), output(module.double(), x))
            module.float()
            torch.testing.assert_close(other.float().state_dict(), module.state_dict(), rtol=0, atol=0)


def test_loading_takes_over_unknown_samples():
    """Such as escnn's modules with other grids, or of another orientation."""
    module = activation(sampling="lebedev-50")
    g = O3.fibergroup.sample()
    rho = torch.tensor(module.in_type.representations[0](g), dtype=torch.float32)
    state = {"A": module.A @ rho, "Ainv": rho.T @ module.Ainv}
    for own in ("auto", "lebedev-50"):
        other = activation(sampling=own)
        other.load_state_dict(state)
        assert other.sampling == "state"
        torch.testing.assert_close(other.state_dict(), state)
        x = features(module, dtype=torch.float32)
        fields = x.view(len(x), -1, 4) @ state["A"].T
        expected = (torch.nn.functional.elu(fields) @ state["Ainv"].T).view(len(x), -1)
        assert relative(output(other, x), expected) < 1e-6
        again = activation()
        again.load_state_dict(other.state_dict())
        assert torch.equal(output(again, x), output(other, x))


def test_states_of_other_fields_are_refused():
    module = activation(max_frequency=1)
    for other in (activation(max_frequency=2), activation("SO(2) on R2")):
        with pytest.raises(RuntimeError, match="size mismatch for A"):
            module.load_state_dict(other.state_dict())
    assert module.sampling == "gauss-24"


def test_networks_that_exist_keep_the_authors_grid():
    """Their checkpoints, files and figures were made on it."""
    networks = [
        QM9Net(channels=2, blocks=1),
        NBodyNet(channels=2, blocks=1),
        ModelNetNet(3, gspaces.rot3dOnR3(), levels=1),
    ]
    fiber = gspaces.no_base_space(O3.fibergroup)
    networks.append(KernelMLP(fiber.type(O3.irrep(1, 1)), fiber.type(O3.irrep(1, 1)), 3, 2))
    for network in networks:
        found = [m.sampling for m in network.modules() if isinstance(m, FourierActivation)]
        assert found
        assert set(found) == {"escnn"}


def test_copy_state_does_not_mix_samplings(tmp_path):
    """Files hold the samples, states of files do not: the numbers would be others without a word."""
    old, new = (torch.nn.Sequential(IIDBatchNorm1d(m.in_type), m) for m in (activation(sampling="escnn"), activation()))
    ist.save(old, tmp_path / "old.safetensors")
    saved = ist.load(tmp_path / "old.safetensors")
    with pytest.raises(
        ValueError, match=r"1: expected FourierActivation.*24 samples.*30 samples.*function and sampling"
    ):
        ist.deploy.copy_state(saved, new)
    ist.deploy.copy_state(saved, old)
    relu = torch.nn.Sequential(IIDBatchNorm1d(old[1].in_type), activation(function="relu", sampling="escnn"))
    with pytest.raises(ValueError, match="function='relu'"):
        ist.deploy.copy_state(saved, relu)


def test_default_takes_no_more_time_at_max_frequency_one():
    """Evaluations of φ per field, which the time is proportional to."""
    assert len(activation()._merged.exact[0]) == 24 < len(activation(sampling="escnn")._merged.exact[0])
    assert np.isfinite(activation()._merged.exact[0].numpy()).all()
