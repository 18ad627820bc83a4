"""On a GPU alone: sorts, equal bits, streams, captured and compiled calls, networks; opcheck of the CUDA kernels."""

import copy
import subprocess
import sys
from dataclasses import replace

import fake_cuda
import pytest
import torch
from helpers import arguments_of, assert_close, function_of, relative
from operators import operator_arguments
from problems import DEVICE, layer, outcome, small
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from implicit_steer.experiments.data.nbody import ParticleBatch
from implicit_steer.experiments.models import NBodyNet
from implicit_steer.graph.graph import sort_by_key
from implicit_steer.graph.structures import Structures
from implicit_steer.ops import select
from implicit_steer.potentials import Potential
from implicit_steer.testing.cases import LARGE

pytestmark = pytest.mark.gpu

# ---- graphs


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("size", "keys"), [(0, 3), (1, 1), (777, 5), (100_000, 300), (1_000_000, 70_000)])
def test_sort(size, keys, dtype):
    key = torch.randint(0, keys, (size,), dtype=dtype)
    for found, known in zip(sort_by_key(key.to(DEVICE), keys), sort_by_key(key, keys), strict=True):
        assert torch.equal(found.cpu(), known)


def test_edges_out_of_range_stop_the_device():
    """In a process of its own: afterwards a device refuses all calls."""
    program = "import torch, implicit_steer as i; i.Graph(torch.tensor([[0], [3]]).cuda(), 3); torch.cuda.synchronize()"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "device-side assert" in ran.stderr


# ---- calls


@pytest.mark.parametrize("name", ["cloud", "cloud-so2"])
def test_same_bits(name, backend):
    conv = layer(LARGE[name], "train", torch.float32)
    problem = LARGE[name].inputs(conv)
    first, again = outcome(conv, problem, backend), outcome(conv, problem, backend)
    assert [n for n in first if not torch.equal(first[n], again[n])] == []


@pytest.mark.parametrize("name", ["cloud", "cloud-16", "cloud-l2", "cloud-so2", "molecules"])
def test_a_million_products(name, backend):
    """Enough edges for all multiprocessors, against `eager` in float64 on the device."""
    conv = layer(LARGE[name], "train", torch.float32)
    problem = LARGE[name].inputs(conv)
    found, exact = outcome(conv, problem, backend), copy.copy(problem)
    exact.x, exact.delta, exact.attributes = (t.double() for t in (problem.x, problem.delta, problem.attributes))
    known = outcome(copy.deepcopy(conv).double(), exact, "eager")
    assert_close(found, {n: t.to(found[n].dtype) for n, t in known.items()}, 1e-5)


def test_auto_takes_one_of_both():
    plan = layer(small("o3")).implicit_kernel.plan
    assert select.choose("auto", plan, DEVICE, torch.float32)[0].name in ("cuda", "triton")


def test_another_stream(backend):
    conv = layer(LARGE["cloud"], "eval", torch.float32, backend=backend)
    problem = LARGE["cloud"].inputs(conv)
    with torch.no_grad():
        expected, stream = problem.run(conv), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [problem.run(conv) for _ in range(3)]
        torch.cuda.synchronize()
    assert all(torch.equal(f, expected) for f in found)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_captured(training, backend):
    """A CUDA graph of a call, replayed on other inputs."""
    conv = layer(LARGE["molecules"], "no norm", torch.float32, backend=backend)
    problem = LARGE["molecules"].inputs(conv)
    x, delta, _ = problem.requires_grad()
    leaves = [x, delta, *conv.parameters()]

    def run():
        out = problem.run(conv)
        return [out.detach(), *(torch.autograd.grad(out.square().sum(), leaves) if training else ())]

    with torch.set_grad_enabled(training):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = run()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            delta.copy_(torch.randn_like(delta))
        captured.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


def test_graphed_callables(backend):
    """Forward and backward of a layer as CUDA graphs, by torch.cuda.make_graphed_callables."""
    conv = layer(small("o3"), "no norm", torch.float32, backend=backend)
    problem = small("o3").inputs(conv)

    class OfTensors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x, delta):
            return replace(problem, x=x, delta=delta).run(self.conv)

    def outcome_of(module):
        leaves = [problem.x.detach().clone().requires_grad_(), problem.delta.detach().clone().requires_grad_()]
        out = module(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *conv.parameters()])]

    known = outcome_of(OfTensors())
    samples = problem.x.detach().clone().requires_grad_(), problem.delta.detach().clone().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(OfTensors(), samples)
    for ours, theirs in zip(outcome_of(graphed), known, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler, backend):
    torch._dynamo.reset()
    conv = layer(small("o3"), "no norm", torch.float32, backend=backend)
    problem = small("o3").inputs(conv)
    leaves = [*problem.requires_grad(), *conv.parameters()]
    function, results = function_of(conv), []
    for run in (torch.compile(function, fullgraph=True, backend=compiler), function):
        out = run(*arguments_of(problem))
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast(backend):
    """Layers keep their own precision."""
    conv = layer(small("o3"), "eval", torch.float32, backend=backend)
    problem = small("o3").inputs(conv)
    with torch.no_grad():
        expected = problem.run(conv)
        with torch.autocast("cuda"):
            assert torch.equal(problem.run(conv), expected)


# ---- networks


def test_forces_and_their_training(backend):
    """Energy, forces and the gradient of a loss on forces: as on the processor, in float64."""
    torch.manual_seed(0)
    potential = Potential([1, 6, 8], 3.0, channels=4, radial=4, kernel_channels=8).double()
    potential.scale.fill_(10.0)
    numbers, pos = torch.tensor([1, 6, 8] * 5), 3.0 * torch.rand(15, 3, dtype=torch.float64)
    structures = Structures.single(numbers, pos, 3.0)

    def run(potential, structures):
        found = potential.predict(structures, create_graph=True)
        (found.energy.square().sum() + found.forces.square().mean()).backward()
        return [found.energy, found.forces, *(p.grad for p in potential.parameters())]

    known = run(potential, structures)
    on_device = Potential([1, 6, 8], 3.0, channels=4, radial=4, kernel_channels=8, backend=backend).double()
    on_device.load_state_dict(potential.state_dict())
    for a, b in zip(run(on_device.to(DEVICE), structures.to(DEVICE)), known, strict=True):
        assert relative(a.cpu(), b) < 1e-10


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_network_of_particles(training, backend):
    """Also the norms and activations of the nodes."""
    n, edges = 5 * 7, torch.combinations(torch.arange(5)).T
    index = torch.cat([torch.cat([edges, edges.flip(0)], 1) + 5 * k for k in range(7)], 1)
    sizes = (n, 3), (n, 3), (n, 1), (index.shape[1], 1), (n, 3)
    pos, vel, scalar, pair, y = (torch.randn(size, dtype=torch.float64) for size in sizes)
    batch = ParticleBatch(pos, vel, scalar, index, pair, y, 7)

    def run(name, device):
        torch.manual_seed(0)
        network = NBodyNet(backend=name).double().to(device).train(training)
        out = network(batch.to(device))
        out.square().sum().backward()
        return [out, *(p.grad for p in network.parameters())]

    for a, b in zip(run(backend, DEVICE), run("cpu", "cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max()) + 1e-12)


# ---- opcheck


def _operator(name):
    return getattr(torch.ops.implicit_steer, name).default


def _on_device(tree):
    """The same with leaves on the device for all tensors, that require gradients where these do."""
    return tree_map_only(torch.Tensor, lambda t: t.detach().to(DEVICE).requires_grad_(t.requires_grad), tree)


@pytest.mark.parametrize("name", [n for n in operator_arguments() if fake_cuda.has_kernel(_operator(n), "CUDA")])
def test_opcheck(name):
    operator = _operator(name)
    arguments = fake_cuda.placed(operator, operator_arguments()[name], lambda tree: tree, _on_device)
    assert set(opcheck(operator, arguments).values()) == {"SUCCESS"}
