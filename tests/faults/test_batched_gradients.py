"""Gradients along many directions at once, as ``torch.autograd.grad(is_grads_batched=True)``, vectorised Jacobians and
Hessians and ``torch.func.vmap`` ask for them: those of a loop over the directions, where native operators had no rule
for batches, took their lists of results for tensors, or warned that they are slow.
"""

from collections import Counter
from dataclasses import replace

import escnn
import pytest
import torch
from deployed import molecules, particles
from escnn.nn import GeometricTensor
from helpers import SAMPLED, layer
from torch.autograd.functional import hessian, jacobian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from implicit_steer.experiments.models import NBodyNet, QM9Net
from implicit_steer.graph.structures import Structures
from implicit_steer.nn import FourierActivation, IIDBatchNorm1d, ImplicitConv
from implicit_steer.potentials import Potential
from implicit_steer.testing.cases import SMALL

GROUPS = ["o3", "o3-no-attr", "so2-r3", "c4"]  # zonal, planar and dense kernels
CASES = [(name, sampling) for name, sampling in SAMPLED if name in GROUPS]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def looped(out, leaves, directions, **options):
    """The gradients of every leaf, one direction after the other."""
    options = {"retain_graph": True, "materialize_grads": True, **options}
    rows = [torch.autograd.grad(out, leaves, direction, **options) for direction in directions]
    return [torch.stack(row) for row in zip(*rows, strict=True)]


def batched(out, leaves, directions, **options):
    options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True, **options}
    found = torch.autograd.grad(out, leaves, directions, **options)
    pairs = zip(found, leaves, strict=True)
    return [leaf.new_zeros(len(directions), *leaf.shape) if g is None else g for g, leaf in pairs]


def mapped(out, leaves, directions, **options):
    options = {"retain_graph": True, "materialize_grads": True, **options}
    return torch.func.vmap(lambda direction: torch.autograd.grad(out, leaves, direction, **options))(directions)


def assert_same(found, expected):
    assert all(g.any() for g in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def assert_both_orders(run, out, leaves):
    """Gradients along three directions, and those of their squares along two."""
    torch.manual_seed(1)
    directions, second = torch.randn(3, *out.shape, dtype=out.dtype), torch.tensor([1.0, -0.5], dtype=out.dtype)
    assert_same(run(out, leaves, directions), looped(out, leaves, directions))
    found, expected = (f(out, leaves, directions, create_graph=True) for f in (run, looped))
    assert_same(found, expected)
    found, expected = (
        f(sum((k + 1) * g.square().sum() for k, g in enumerate(gradients)), leaves, second)
        for f, gradients in ((run, found), (looped, expected))
    )
    scale = max(g.abs().max() for g in expected)  # of biases before a norm nothing but rounding is left
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a / scale, b / scale, **CLOSE)


def points_of(name, sampling="auto", configuration="no norm", **options):
    """A layer, its problem, and all that gradients are taken by: features, edge_delta, edge_attr, every parameter."""
    conv = layer(SMALL[name], configuration, sampling=sampling, activation="silu", **options)
    problem = SMALL[name].inputs(conv)
    return conv, problem, [*problem.requires_grad(), *conv.parameters()]


@pytest.mark.parametrize("run", [batched, mapped])
@pytest.mark.parametrize("configuration", ["no norm", "eval"])
@pytest.mark.parametrize(("name", "sampling"), CASES)
def test_a_convolution_by_every_input_and_weight(name, sampling, configuration, run):
    conv, problem, leaves = points_of(name, sampling, configuration)
    assert_both_orders(run, problem.run(conv), leaves)


@pytest.mark.parametrize("run", [batched, mapped])
def test_a_convolution_by_one_input_alone(run):
    """The others' gradients are not needed, and come without rows."""
    conv, problem, leaves = points_of("o3", aggr="mean")
    out = problem.run(conv)
    directions = torch.randn(3, *out.shape, dtype=out.dtype)
    for leaf in leaves:
        expected = looped(out, [leaf], directions)
        for create_graph in (False, True):
            assert_same(run(out, [leaf], directions, create_graph=create_graph), expected)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_plain_backends(backend):
    conv, problem, leaves = points_of("o3", backend=backend)
    assert_both_orders(batched, problem.run(conv), leaves)


@pytest.mark.parametrize("run", [batched, mapped])
@pytest.mark.parametrize(("name", "sampling"), CASES)
def test_values_of_a_kernel(name, sampling, run):
    conv, problem, _ = points_of(name, sampling, "eval")
    leaves = [*problem.requires_grad()[1:], *conv.implicit_kernel.parameters()]
    assert_both_orders(run, conv.implicit_kernel(problem.delta, problem.attributes), leaves)


@pytest.mark.parametrize("create_graph", [False, True])
def test_directions_in_any_memory_layout(create_graph):
    conv, problem, leaves = points_of("o3")
    out = problem.run(conv)
    last = torch.randn(*out.shape, 3, dtype=out.dtype)
    same = torch.randn_like(out).expand(3, *out.shape)
    for directions in (last.permute(2, 0, 1), same):
        expected = looped(out, leaves, directions)
        assert_same(batched(out, leaves, directions, create_graph=create_graph), expected)

    def gradients(direction):
        return torch.autograd.grad(out, leaves, direction, retain_graph=True, create_graph=create_graph)

    expected = looped(out, leaves, last.permute(2, 0, 1))
    assert_same(torch.func.vmap(gradients, in_dims=2, chunk_size=2)(last), expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batches_of_batches(create_graph):
    conv, problem, (x, *_) = points_of("so2-r3")
    out = problem.run(conv)
    directions = torch.randn(2, 3, *out.shape, dtype=out.dtype)

    def gradient(direction):
        return torch.autograd.grad(out, x, direction, retain_graph=True, create_graph=create_graph)[0]

    expected = looped(out, [x], directions.flatten(0, 1))[0].view(2, 3, *x.shape)
    for vmap in (torch.func.vmap, torch._vmap_internals._vmap):  # the second is that of is_grads_batched
        torch.testing.assert_close(vmap(vmap(gradient))(directions), expected, **CLOSE)


class _Calls(TorchDispatchMode):
    """Counts the calls of native operators."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "implicit_steer":
            self.found[operator.name().split("::")[1]] += 1
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("run", [batched, mapped])
def test_one_call_for_each_direction(run):
    """And one alone of what no direction changes."""
    conv, problem, leaves = points_of("o3")
    out = problem.run(conv)
    directions = torch.randn(4, *out.shape, dtype=out.dtype)
    with _Calls() as calls:
        run(out, leaves, directions)
    assert calls.found.pop("sort_by_key", 0) <= 1
    assert calls.found.pop("bind_graph", 0) <= 1
    assert calls.found == {"layer_backward": 4}
    with _Calls() as calls:
        run(out, leaves, directions, create_graph=True)
    assert calls.found == {"conv_backward": 4, "conv_pack_backward": 4, "conv_pack": 1}


# ---- Jacobians and Hessians of torch.autograd.functional


@pytest.mark.parametrize(("name", "sampling"), CASES)
def test_jacobian_and_hessian_of_a_convolution(name, sampling):
    """By the vectors of its edges, in eval mode."""
    conv = layer(SMALL[name], sampling=sampling, activation="silu")
    problem = SMALL[name].inputs(conv)

    def run(delta):
        return replace(problem, delta=delta).run(conv)[:3]

    loops, vectorised = (jacobian(run, problem.delta, vectorize=v) for v in (False, True))
    assert_same([vectorised], [loops])
    loops, vectorised = (hessian(lambda d: run(d).square().sum(), problem.delta, vectorize=v) for v in (False, True))
    assert_same([vectorised], [loops])


def test_jacobian_and_hessian_of_a_kernel():
    conv = layer(SMALL["o3"], activation="silu")
    problem = SMALL["o3"].inputs(conv)

    def run(delta, attributes):
        return conv.implicit_kernel(delta, attributes)

    points = problem.delta[:3], problem.attributes[:3]
    loops, vectorised = (jacobian(run, points, vectorize=v) for v in (False, True))
    assert_same(vectorised, loops)
    loops, vectorised = (hessian(lambda *p: run(*p).square().sum(), points, vectorize=v) for v in (False, True))
    assert_same([b for row in vectorised for b in row], [b for row in loops for b in row])


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("stride", [1, 2])
def test_jacobian_and_hessian_on_a_grid(stride, norm):
    gspace = escnn.gspaces.rot2dOnR2(-1, maximum_frequency=2)
    fields = gspace.type(gspace.trivial_repr, gspace.irrep(1))
    options = {"kernel_size": 3, "stride": stride, "norm": norm, "activation": "silu"}
    conv = ImplicitConv(fields, fields, None, n_layers=2, n_channels=2, **options).double().eval()
    x = torch.randn(1, fields.size, 5, 5, dtype=torch.float64)
    weights = dict(conv.named_parameters())
    name = max(weights, key=lambda name: weights[name].numel())

    def run(x, value):
        return torch.func.functional_call(conv, {name: value}, GeometricTensor(x, fields)).tensor

    given = x, weights[name].detach()
    loops, vectorised = (jacobian(run, given, vectorize=v) for v in (False, True))
    assert_same(vectorised, loops)
    loops, vectorised = (hessian(lambda *g: run(*g).square().sum(), given, vectorize=v) for v in (False, True))
    assert_same([b for row in vectorised for b in row], [b for row in loops for b in row])


@pytest.mark.parametrize("run", [batched, mapped])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("module", [IIDBatchNorm1d, FourierActivation])
def test_norms_and_activations_of_nodes(module, training, run):
    if module is FourierActivation:
        module = FourierActivation(escnn.gspaces.flipRot3dOnR3(), 2, 1, function="silu")
    else:
        gspace = escnn.gspaces.flipRot3dOnR3()
        module = IIDBatchNorm1d(gspace.type(gspace.trivial_repr, gspace.irrep(1, 1), gspace.trivial_repr))
    module.double().train(training)
    x = torch.randn(5, module.in_type.size, dtype=torch.float64, requires_grad=True)
    out = module(GeometricTensor(x, module.in_type, torch.zeros(5, 3, dtype=torch.float64))).tensor
    assert_both_orders(run, out, [x, *module.parameters()])


# ---- whole networks


def potential_and_structure(backend="auto", atoms=4):
    torch.manual_seed(0)
    settings = {"channels": 2, "radial": 2, "kernel_layers": 2, "kernel_channels": 4, "backend": backend}
    potential = Potential([1, 8], 4.0, **settings).double().eval()
    grid = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)[:atoms]
    pos = 1.5 * grid + 0.2 * torch.randn(atoms, 3, dtype=torch.float64)
    cell = 5.0 * torch.eye(3, dtype=torch.float64)
    return potential, Structures.single(torch.tensor([8, 1] * (atoms // 2)), pos, 4.0, cell, True)


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
def test_hessian_of_an_energy(backend):
    """By positions and by the cell; minus the Jacobian of the forces."""
    potential, structures = potential_and_structure(backend)

    def energy(pos, cell):
        return potential(replace(structures, pos=pos, cell=cell)).sum()

    points = structures.pos, structures.cell
    loops, vectorised = (hessian(energy, points, vectorize=v) for v in (False, True))
    assert_same([b for row in vectorised for b in row], [b for row in loops for b in row])

    def forces(pos):
        return potential.predict(structures.moved(pos), create_graph=True).forces

    assert_same([-jacobian(forces, structures.pos, vectorize=True)], [loops[0][0]])


def test_gradients_of_all_forces_by_every_weight():
    potential, structures = potential_and_structure()
    structures.pos.requires_grad_()
    forces = potential.predict(structures, create_graph=True).forces
    leaves = [structures.pos, *potential.parameters()]
    directions = torch.eye(forces.numel(), dtype=forces.dtype).view(-1, *forces.shape)
    expected = looped(forces, leaves, directions)
    for run in (batched, mapped):
        for a, b in zip(run(forces, leaves, directions), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("run", [batched, mapped])
@pytest.mark.parametrize("name", ["particles", "molecules"])
def test_networks_in_evaluation(name, run):
    """Of linear maps, convolutions, Fourier activations, products, norms: by every weight and the positions."""
    torch.manual_seed(0)
    if name == "particles":
        net, batch = NBodyNet(blocks=1, channels=2), particles(torch.float64)
    else:
        sizes = {"blocks": 1, "channels": 2, "invariants": 4, "kernel_channels": 2}
        net, batch = QM9Net(edge_attr="bonds", **sizes), molecules(torch.float64)
    net.double().eval()
    batch.pos.requires_grad_()
    out, leaves = net(batch), [batch.pos, *net.parameters()]
    directions = torch.randn(3, *out.shape, dtype=out.dtype)
    for create_graph in (False, True):
        expected = looped(out, leaves, directions)
        for a, b in zip(run(out, leaves, directions, create_graph=create_graph), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


# ---- ensembles, and what stays an error


def test_an_ensemble_of_biases_in_another_layout():
    """Members along the last dimension: each operator gets its numbers in a row."""
    conv, problem, _ = points_of("o3")
    values = torch.randn(len(conv.bias), 3, dtype=torch.float64)

    def member(bias):
        return torch.func.functional_call(conv, {"bias": bias}, problem.arguments(conv)).tensor

    alone = torch.stack([member(bias.contiguous()) for bias in values.unbind(1)])
    assert torch.equal(torch.func.vmap(member, in_dims=1)(values), alone)


def test_batches_without_entries():
    conv, problem, (x, *_) = points_of("o3")
    out = problem.run(conv)
    with pytest.raises(RuntimeError, match="vmap: expected a batch of at least one entry, got none"):
        mapped(out, [x], out.new_zeros(0, *out.shape))


def test_third_derivatives_of_batches_name_the_backend():
    potential, structures = potential_and_structure()
    pos = structures.pos.requires_grad_()
    second = hessian(lambda pos: potential(structures.moved(pos)).sum(), pos, vectorize=True, create_graph=True)
    with pytest.raises(RuntimeError, match=r"third derivatives.* Use backend='eager'"):
        torch.autograd.grad(second.square().sum(), pos)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian, torch.func.grad])
def test_transforms_of_an_energy_name_the_backend(transform):
    potential, structures = potential_and_structure()

    def energy(pos):
        return potential(structures.moved(pos)).sum()

    with pytest.raises(RuntimeError, match=r"Use torch\.autograd\.grad.* or backend='reference'"):
        transform(energy)(structures.pos)
    with pytest.raises(RuntimeError, match=r"Use torch\.autograd\.grad.* or backend='reference'"):
        torch.func.vmap(transform(energy))(structures.pos[None])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("name", ["convolution", "gradient", "norm", "activation"])
def test_transforms_of_a_backward_pass_are_no_zeros(name, transform, create_graph):
    """What torch.func, or forward mode, makes of directions: once 0, or an assertion inside torch."""
    gspace = escnn.gspaces.flipRot3dOnR3()
    if name in ("convolution", "gradient"):
        conv, problem, (x, delta, *_) = points_of("o3")
        out = problem.run(conv)
        if name == "gradient":
            out = torch.autograd.grad(out.square().sum(), delta, create_graph=True)[0]
    else:
        module = (
            FourierActivation(gspace, 2, 1) if name == "activation" else IIDBatchNorm1d(gspace.type(gspace.irrep(1, 1)))
        )
        module.double().eval()
        x = torch.randn(3, module.in_type.size, dtype=torch.float64, requires_grad=True)
        out = module(GeometricTensor(x, module.in_type, torch.zeros(3, 3, dtype=torch.float64))).tensor

    def gradient(direction):
        return torch.autograd.grad(out, x, direction, retain_graph=True, create_graph=create_graph)[0]

    with pytest.raises(RuntimeError, match="grad_outputs: expected a backward pass"):
        transform(gradient)(torch.ones_like(out))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        if name == "norm" and create_graph:  # plain PyTorch
            assert torch.autograd.forward_ad.unpack_dual(gradient(dual)).tangent.any()
        else:
            with pytest.raises(RuntimeError, match="grad_outputs: expected a backward pass"):
                gradient(dual)


def test_forward_mode_over_the_gradient_of_an_activation():
    """Without create_graph, the tangent of the gradient once went missing."""
    module = FourierActivation(escnn.gspaces.flipRot3dOnR3(), 2, 1, function="silu").double()
    x = torch.randn(3, module.in_type.size, dtype=torch.float64, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = module(GeometricTensor(dual, module.in_type, torch.zeros(3, 3, dtype=torch.float64))).tensor
        with pytest.raises(RuntimeError, match="grad_outputs: expected a backward pass"):
            torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients_through_a_checkpoint(create_graph):
    """Whose saved tensors can be asked for once."""
    conv, problem, (x, delta, *_) = points_of("o3")
    activation = FourierActivation(escnn.gspaces.flipRot3dOnR3(), 2, 1, function="silu").double()
    coordinates = torch.zeros(len(x), 3, dtype=x.dtype)

    def run(x, delta):
        y = replace(problem, x=x, delta=delta).run(conv)[:, : activation.in_type.size]
        return activation(GeometricTensor(y, activation.in_type, coordinates)).tensor

    directions = torch.randn(3, len(x), activation.in_type.size, dtype=x.dtype)
    expected = looped(run(x, delta), [x, delta], directions)
    out = checkpoint(run, x, delta, use_reentrant=False)
    assert_same(batched(out, [x, delta], directions, create_graph=create_graph), expected)
