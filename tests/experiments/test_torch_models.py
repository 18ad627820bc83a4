"""Whole networks as citizens of PyTorch: torch.compile with forces and training, torch.export, DDP, checkpoints."""

import copy
import io
import socket
from dataclasses import fields

import pytest
import torch
from ase.build import molecule
from deployed import molecules, particles
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import implicit_steer as ist
from implicit_steer.experiments.data import Batch
from implicit_steer.experiments.models import ModelNetNet, NBodyNet, QM9Net
from implicit_steer.experiments.models.modelnet import SPACES
from implicit_steer.graph.structures import Structures
from implicit_steer.ops import fourier
from implicit_steer.potentials import Potential

MOLECULES = ["CH3CH2OH", "CH3OH", "H2O", "C6H6"]  # 9, 6, 3, 12 atoms
# Measured: the same bits, but for exported programs, 2e-16 of each tensor's largest number.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # forces are derivatives inside the compiled function
        yield
    torch._dynamo.reset()


def small_potential():
    torch.manual_seed(0)
    potential = Potential([1, 6, 8], 3.0, channels=2, radial=2, kernel_channels=4).double()
    potential.scale.fill_(10.0)
    return potential


@pytest.fixture
def potential():
    """A small one in float64."""
    return small_potential()


def structure(name, dtype=torch.float64):
    """A molecule off its equilibrium, in a large box."""
    atoms = molecule(name)
    atoms.rattle(0.05, seed=1)
    pos, cell = torch.tensor(atoms.positions, dtype=dtype), 20.0 * torch.eye(3, dtype=dtype)
    return Structures.single(torch.tensor(atoms.numbers), pos, 3.0, cell, True)


def compiled(function):
    """The function compiled without a break, and what counts its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def assert_once_for_all_sizes(counter, call):
    """The first size compiles, the second compiles for all."""
    counts = []
    for name in MOLECULES:
        call(name)
        counts.append(counter.frame_count)
    assert counts[0] < counts[1] == counts[2] == counts[3]


# ---- torch.compile


def test_energy_forces_and_stress(potential):
    run, counter = compiled(potential.predict)

    def compare(name):
        structures = structure(name)
        expected = potential.predict(structures, stress=True)
        for a, b in zip(run(structures, stress=True), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    assert_once_for_all_sizes(counter, compare)


def loss_of(potential, structures):
    """A training loss on energies and forces; the positions require gradients, as compiled forces with a graph need."""
    predicted = potential.predict(structures, create_graph=True)
    return predicted.energy.square().sum() + predicted.forces.square().mean()


def with_gradient(structures):
    return structures.moved(structures.pos.clone().requires_grad_())


def test_training_step_with_forces(potential):
    run, counter = compiled(lambda structures: loss_of(potential, structures))

    def compare(name):
        structures = with_gradient(structure(name))
        leaves = [*potential.parameters(), structures.pos]
        found, expected = (
            torch.autograd.grad(loss, leaves, materialize_grads=True)
            for loss in (run(structures), loss_of(potential, structures))
        )
        assert any(g.any() for g in expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    assert_once_for_all_sizes(counter, compare)


def test_inductor(potential):
    potential.float()
    structures = with_gradient(structure("CH3OH", torch.float32))
    leaves, step = [*potential.parameters(), structures.pos], lambda s: loss_of(potential, s)
    found, expected = (
        torch.autograd.grad(run(structures), leaves, materialize_grads=True)
        for run in (torch.compile(step, fullgraph=True), step)
    )
    for a, b in zip(found, expected, strict=True):
        # float32 through two derivatives. Measured: 5e-7 of the largest number.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_errors_inside_a_compiled_potential(potential):
    run, _ = compiled(potential.predict)
    with pytest.raises(RuntimeError, match=r"numbers: expected atomic numbers among \[1, 6, 8\], got others"):
        run(structure("NH3"))
    flat = structure("H2O")
    flat.cell.zero_()
    with pytest.raises(RuntimeError, match="stress: expected cells with three lattice vectors"):
        run(flat, stress=True)


MOLECULE_NET = {"edge_attr": "bonds", "blocks": 1, "channels": 2, "invariants": 4, "kernel_channels": 2}
NETWORKS = {
    "numbers": (lambda: QM9Net(**MOLECULE_NET), molecules),
    "matrices": (lambda: QM9Net(**MOLECULE_NET, tensors=2), molecules),
    "vectors": (lambda: NBodyNet(blocks=1, channels=2), particles),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("without_escnn", [False, True])
@pytest.mark.parametrize("predicts", NETWORKS)
def test_network(predicts, without_escnn, training, tmp_path):
    """Linear maps, Fourier activations of nodes, products, batch norms: the loss, its gradients, the new statistics."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[predicts]
    net, batch = build().double().train(training), inputs(torch.float64)
    if without_escnn:
        ist.save(net, tmp_path / "net.safetensors")
        net = ist.load(tmp_path / "net.safetensors")
    before = copy.deepcopy(net.state_dict())
    run, _ = compiled(net)

    def results(call):
        net.load_state_dict(before)
        out = call(batch)
        return [out, *torch.autograd.grad(out.square().sum(), list(net.parameters())), *map(torch.clone, net.buffers())]

    for a, b in zip(results(run), results(net), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_network_that_builds_its_graphs():
    """In two parts, or an error that says why."""
    torch.manual_seed(0)
    net = ModelNetNet(3, SPACES["so2"](), points=32, neighbours=4, levels=2, width=12, kernel_channels=4).double()
    pos = torch.rand(2, 32, 3, dtype=torch.float64)
    net(pos)
    net.eval()
    torch.testing.assert_close(torch.compile(net, backend="aot_eager")(pos), net(pos), **CLOSE)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="build graphs outside of the compiled function"):
        compiled(net)[0](pos)


def test_graphs_inside_a_compiled_function():
    def run(pos, batch):
        edges = [ist.knn_graph(2 * pos, 3, batch), ist.radius_graph(pos, 0.5, batch)]
        periodic, shift = ist.periodic_radius_graph(pos, 0.5, 2 * torch.eye(3), batch=batch)
        return [*(pos[i] - pos[j] for j, i in (*edges, periodic)), shift]

    call = torch.compile(run, backend="aot_eager")
    for n in (10, 12, 15):
        pos, batch = torch.rand(n, 3, requires_grad=True), torch.arange(n) % 2
        for a, b in zip(call(pos, batch), run(pos, batch), strict=True):
            assert torch.equal(a, b)


def test_forces_through_fourier_activations():
    """Second derivatives of every part of the network, compiled and not, against plain PyTorch everywhere."""
    torch.manual_seed(0)
    net = QM9Net(**MOLECULE_NET, activation="silu").double().eval()
    plain = QM9Net(**MOLECULE_NET, activation="silu", backend="reference").double().eval()
    plain.load_state_dict(net.state_dict())
    batch = molecules(torch.float64)
    batch.pos.requires_grad_()

    def loss(network):
        forces = torch.autograd.grad(network(batch).sum(), batch.pos, create_graph=True)[0]
        return forces.square().sum()

    run, _ = compiled(lambda: loss(net))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fourier, "is_native", lambda x: False)
        expected = torch.autograd.grad(loss(plain), [batch.pos, *plain.parameters()], materialize_grads=True)
    for found in (loss(net), run()):
        found = torch.autograd.grad(found, [batch.pos, *net.parameters()], materialize_grads=True)
        for a, b in zip(found, expected, strict=True):
            # Measured: 3e-14 of the largest number.
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * b.abs().max().item())


# ---- torch.export


TENSORS = ("numbers", "pos", "cell", "edge_index", "shift", "batch")


class Energy(torch.nn.Module):
    """A potential on plain tensors, for one structure."""

    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def forward(self, *tensors):
        return self.potential(Structures(*tensors, num_graphs=1))


def tensors_of(structures):
    return tuple(getattr(structures, name) for name in TENSORS)


@pytest.mark.parametrize("without_escnn", [False, True])
def test_exported_potential(potential, without_escnn, tmp_path):
    """Through a file, to another number of atoms and edges; its derivatives are the forces."""
    assert [f.name for f in fields(Structures)][: len(TENSORS)] == list(TENSORS)
    original = potential
    if without_escnn:
        ist.save(potential, tmp_path / "potential.safetensors")
        potential = ist.load(tmp_path / "potential.safetensors")
    atoms, edges = torch.export.Dim("atoms", min=2), torch.export.Dim("edges", min=2)
    sizes = ({0: atoms}, {0: atoms}, None, {1: edges}, {0: edges}, {0: atoms})
    given = tensors_of(structure("CH3OH"))
    program = torch.export.export(Energy(potential).eval(), given, dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module, other = torch.export.load(file).module(), with_gradient(structure("C6H6"))
    expected = original.predict(other)
    energy = module(*tensors_of(other))
    torch.testing.assert_close(energy.detach(), expected.energy, **CLOSE)
    torch.testing.assert_close(-torch.autograd.grad(energy.sum(), other.pos)[0], expected.forces, **CLOSE)


class OnTensors(torch.nn.Module):
    """A network for molecules on plain tensors."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *tensors):
        return self.net(Batch(*tensors, num_graphs=2))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_before_it_was_called(strict, tmp_path):
    """Nothing of the tracer's is kept: afterwards the network itself gives what it gave."""
    torch.manual_seed(0)
    net, batch = QM9Net(**MOLECULE_NET).double().eval(), molecules(torch.float64)
    expected = net(batch)
    ist.save(net, tmp_path / "net.safetensors")
    loaded = ist.load(tmp_path / "net.safetensors")
    given = tuple(getattr(batch, f.name) for f in fields(Batch) if f.name != "num_graphs")
    program = torch.export.export(OnTensors(loaded), given, strict=strict)
    torch.testing.assert_close(program.module()(*given), expected, **CLOSE)
    torch.testing.assert_close(loaded(batch), expected, **CLOSE)


# ---- autocast


@pytest.mark.parametrize("training", [True, False])
def test_autocast_of_a_network(training):
    """Its linear layers run in bfloat16, its convolutions and norms do not; it trains."""
    torch.manual_seed(0)
    net, batch = QM9Net(edge_attr="bonds", blocks=1).train(training), molecules(torch.float32)
    expected = net(batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(batch)
    # Measured: 0.004 of numbers up to 0.6.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)
    gradients = torch.autograd.grad(found.float().square().sum(), list(net.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def test_autocast_of_forces(potential):
    """A training step inside: second derivatives too."""
    potential.float()
    structures = structure("CH3OH", torch.float32)
    leaves = list(potential.parameters())
    expected = torch.autograd.grad(loss_of(potential, structures), leaves, materialize_grads=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss_of(potential, structures), leaves, materialize_grads=True)
    total = [torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected)]
    # The linear layers' bfloat16. Measured: 0.005.
    assert (total[0] - total[1]).norm() < 0.03 * total[1].norm()


# ---- checkpointing, DDP


def test_checkpointed_training_step(potential):
    structures = with_gradient(structure("H2O"))
    leaves = [*potential.parameters(), structures.pos]
    losses = checkpoint(loss_of, potential, structures, use_reentrant=False), loss_of(potential, structures)
    found, expected = (torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in losses)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Loss(torch.nn.Module):
    """What DistributedDataParallel wraps: its forward pass takes the forces."""

    def __init__(self, potential):
        super().__init__()
        self.potential = potential

    def forward(self, structures):
        return loss_of(self.potential, structures)


def _gradients_of_share(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    parallel = DistributedDataParallel(Loss(small_potential()))
    parallel(structure(MOLECULES[rank])).backward()
    if rank == 0:
        results.put([p.grad.tolist() for p in parallel.parameters()])
    del parallel  # before the group that it uses; neither process leaves while the other needs it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_train_on_forces_as_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_gradients_of_share, (port, results), nprocs=2)
    parallel = [torch.tensor(g, dtype=torch.float64) for g in results.get()]
    potential = small_potential()
    loss = sum(loss_of(potential, structure(name)) for name in MOLECULES[:2]) / 2
    expected = torch.autograd.grad(loss, list(potential.parameters()), materialize_grads=True)
    for a, b in zip(parallel, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
