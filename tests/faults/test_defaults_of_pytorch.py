"""Layers follow PyTorch's default dtype and device, whatever was built before; what is refused leaves no trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = """
import torch, escnn, implicit_steer as ist
from implicit_steer.experiments.models import NBodyNet, QM9Net
from implicit_steer.potentials import Potential
from implicit_steer.nn import FourierActivation, IIDBatchNorm1d, ImplicitConv, ImplicitKernel, ImplicitPointConv
gs = escnn.gspaces.flipRot3dOnR3()
t = gs.type(*[gs.trivial_repr] * 2, *[gs.irrep(1, 1)] * 2)
def conv():
    return ImplicitPointConv(t, t, None, n_layers=3, n_channels=4)
def kinds(module):
    return {(x.dtype, x.device.type) for x in (*module.parameters(), *module.buffers()) if x.is_floating_point()}
def run(conv, dtype):
    pos = torch.randn(30, 3, dtype=dtype)
    edges = ist.knn_graph(pos, k=4)
    x = t(torch.randn(30, t.size, dtype=dtype), pos)
    y = conv(x, edges, pos[edges[1]] - pos[edges[0]]).tensor
    y.square().sum().backward()
    assert y.dtype == dtype and all(p.grad is not None for p in conv.parameters())
ALL = [conv, lambda: ImplicitKernel(t, t), lambda: ImplicitConv(t, t, None, 3, 2, 2), lambda: IIDBatchNorm1d(t),
       lambda: FourierActivation(gs, 2, 2), lambda: Potential([1, 8], cutoff=4.0), QM9Net, NBodyNet]
"""


def failure(code):
    """What ``code`` ends with in a process of its own, since escnn keeps what it has built: the error, or None."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", START + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.stderr[-2000:] if done.returncode else None


@pytest.mark.parametrize("before", ["", "run(conv(), torch.float32); QM9Net()\n"], ids=["first", "after float32"])
def test_float64_as_default(before):
    """Building ended in "Float did not match Double", after an earlier layer in float32 at its first call."""
    code = """
torch.set_default_dtype(torch.float64)
for make in ALL:
    assert kinds(make()) == {(torch.float64, "cpu")}, kinds(make())
run(conv(), torch.float64)
x = torch.randn(9, t.size)
assert IIDBatchNorm1d(t)(t(x, torch.zeros(9, 3))).tensor.dtype == torch.float64
assert ImplicitConv(t, t, None, 3, 2, 2)(t(torch.randn(1, t.size, 5, 5, 5))).tensor.dtype == torch.float64
state, other = conv().state_dict(), conv()
other.load_state_dict(state)
torch.set_default_dtype(torch.float32)
other = conv()
other.load_state_dict(state)
assert kinds(other) == {(torch.float32, "cpu")}
run(other, torch.float32)
"""
    assert failure(before + code) is None


def test_a_potential_trains_in_float64():
    code = """
from implicit_steer.graph.structures import Structures
torch.set_default_dtype(torch.float64)
potential = Potential([1, 8], cutoff=4.0, channels=2, kernel_channels=2)
water = Structures.single(torch.tensor([8, 1, 1]), torch.tensor([[0, 0, 0], [0.96, 0, 0], [0, 0.96, 0]]), 4.0)
forces = potential.predict(water, create_graph=True).forces
forces.square().sum().backward()
assert forces.dtype == torch.float64
network = QM9Net()
"""
    assert failure(code) is None


def test_device_meta():
    """Building failed there, and so did every later one, on any device."""
    code = """
with torch.device("meta"):
    made = [make() for make in ALL]
    layer = conv()
for module in made:
    assert {device for _, device in kinds(module)} == {"meta"}, kinds(module)
real = conv()
run(real, torch.float32)
layer.load_state_dict(real.state_dict(), assign=True)
pos = torch.randn(10, 3)
edges = ist.knn_graph(pos, 3)
x, delta = t(torch.randn(10, t.size), pos), pos[edges[1]] - pos[edges[0]]
assert torch.equal(layer.eval()(x, edges, delta).tensor, real.eval()(x, edges, delta).tensor)
run(layer, torch.float32)
"""
    assert failure(code) is None


def test_fake_tensors():
    """So it was under FakeTensorMode, which has no numbers to lower: it is refused by name."""
    code = """
from torch._subclasses.fake_tensor import FakeTensorMode
for make in ALL:
    try:
        with FakeTensorMode():
            make()
    except RuntimeError as error:
        assert "expected real tensors, got fake ones. Build it outside of FakeTensorMode" in str(error), error
    else:
        raise AssertionError(make)
run(conv(), torch.float32)
"""
    assert failure(code) is None
