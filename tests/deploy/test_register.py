"""Networks of users' own classes: saved where escnn's types build them, loaded without these and without __init__."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_edges
from torch import nn

import implicit_steer as ist
from implicit_steer.deploy import copy_state, kinds
from implicit_steer.layers import Fields, values
from implicit_steer.testing.cases import SPACES, fields

ROOT = Path(ist.__file__).parent.parent
O3 = SPACES["O(3)"]()
HIDDEN = fields(O3, "2 scalar+vector")
SCALARS = O3.type(*[O3.trivial_repr] * 3)


class Block(nn.Module):
    """x + conv(x)."""

    def __init__(self, conv, active=True):
        super().__init__()
        self.conv, self.active = conv, active

    def forward(self, x, *geometry):
        return values(x) + values(self.conv(x, *geometry)) if self.active else values(x)


class Network(nn.Module):
    """Everything that a class may hold."""

    built = 0

    def __init__(self):
        super().__init__()
        Network.built += 1
        conv = ist.nn.ImplicitPointConv(HIDDEN, HIDDEN, None, 2, 3)
        self.in_type, self.types = HIDDEN, [HIDDEN, (SCALARS,)]
        self.blocks = nn.ModuleList([Block(conv), Block(conv, active=False)])
        self.heads = nn.ModuleDict({"scalars": ist.nn.ImplicitPointConv(HIDDEN, SCALARS, None, 2, 3)})
        self.readout, self.nothing = nn.Linear(3, 2), None
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.options = {"inf": math.inf, 3: [1, (2.5, "x")], "deep": {"no": None}}
        self.table, self.number, self.dtype = np.arange(6).reshape(2, 3), np.float64(0.5), torch.float64
        self.register_parameter("bias", None)
        self.register_buffer("none", None)
        self.register_buffer("shift", torch.ones(2))
        self.register_buffer("order", torch.tensor([1, 0]), persistent=False)

    def forward(self, x, pos, edges):
        delta = pos[edges[1]] - pos[edges[0]]
        x = self.in_type(x, pos)
        for block in self.blocks:
            x = self.in_type(block(x, edges, delta), pos)
        y = values(self.heads["scalars"](x, edges, delta))
        return self.scale * self.readout(y)[:, self.order] + self.shift


@pytest.fixture(autouse=True)
def _registered(registrations):
    ist.register(Network)
    ist.register(Block, name="block of a test")


@pytest.fixture
def path(tmp_path):
    """Where to save."""
    return tmp_path / "net.safetensors"


def problem(dtype=torch.float32):
    """Features, positions, edges."""
    return torch.randn(9, 8, dtype=dtype), torch.randn(9, 3, dtype=dtype), random_edges(40, 9, 9)


def outcome(net, *arguments):
    """Output, and gradients of the input and of some parameters."""
    x = arguments[0].clone().requires_grad_()
    out = net(x, *arguments[1:])
    wanted = [x, net.scale, net.readout.weight, net.blocks[0].conv.bias]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [True, False])
def test_the_same_numbers_without_init(mode, dtype, path):
    original, arguments = Network().to(dtype).train(mode), problem(dtype)
    ist.save(original, path)
    Network.built = 0
    loaded = ist.load(path)
    assert type(loaded) is Network
    assert Network.built == 0
    assert isinstance(loaded.blocks[0].conv, ist.layers.ImplicitPointConv)
    for actual, expected in zip(outcome(loaded, *arguments), outcome(original, *arguments), strict=True):
        assert actual.dtype == expected.dtype == dtype
        assert torch.equal(actual, expected)


def test_what_a_module_holds_comes_back(path):
    original = Network().train()
    original.blocks[1].eval()
    original.scale.requires_grad_(False)
    ist.save(original, path)
    loaded = ist.load(path)
    assert loaded.options == original.options
    assert list(loaded.options) == ["inf", 3, "deep"]
    assert type(loaded.options[3]) is list
    assert np.array_equal(loaded.table, original.table)
    assert loaded.table.dtype == original.table.dtype
    assert (loaded.number, loaded.dtype, loaded.nothing) == (0.5, torch.float64, None)
    assert isinstance(loaded.types[0], Fields)
    assert loaded.types[1][0].size == 3
    assert loaded.blocks[0].conv is loaded.blocks[1].conv
    assert (loaded.bias, loaded.none) == (None, None)
    assert "order" not in loaded.state_dict()
    assert loaded.state_dict().keys() >= {"shift", "scale", "readout.weight"}
    assert not loaded.scale.requires_grad
    assert (loaded.training, loaded.blocks[0].training, loaded.blocks[1].training) == (True, True, False)
    assert isinstance(original.blocks[0].conv, ist.nn.ImplicitPointConv)  # the original keeps its parts


def test_saved_again_and_copied_back(path, tmp_path):
    original = Network()
    ist.save(original, path)
    loaded = ist.load(path)
    ist.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    other, arguments = Network().eval(), problem()
    copy_state(loaded, other)
    assert torch.equal(other(*arguments), original.eval()(*arguments))
    assert torch.equal(copy.deepcopy(loaded.eval())(*arguments), loaded(*arguments))


def test_inside_other_modules(path):
    original = nn.ModuleDict({"net": nn.Sequential(Network()), "again": nn.Identity()}).eval()
    ist.save(original, path)
    arguments = problem()
    assert torch.equal(ist.load(path)["net"][0](*arguments), original["net"][0](*arguments))


def test_the_parts_alone_need_no_class(path):
    original, (x, pos, edges) = Block(ist.nn.ImplicitPointConv(HIDDEN, HIDDEN, None, 2, 3)).eval(), problem()
    ist.save(nn.ModuleDict(dict(original.named_children())), path)
    delta = pos[edges[1]] - pos[edges[0]]
    conv = ist.load(path)["conv"]
    assert torch.equal(Block(conv)(x, edges, delta), original(HIDDEN(x, pos), edges, delta))


# ---- registering


def test_not_registered_here(path):
    ist.save(Network(), path)
    del kinds.REGISTERED["Network"]
    with pytest.raises(RuntimeError) as error:
        ist.load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: expected registered classes 'Network' (test_register.Network)")
    assert "Import the module that registers them" in text


def test_two_classes_under_one_name():
    with pytest.raises(ValueError, match=r"name: expected another one than 'Network', which is test_register\.Network"):
        ist.register(Block, name="Network")
    assert kinds.REGISTERED["Network"].build.args == (Network,)


def test_a_class_defined_anew_replaces_the_one_before(path):
    def define(answer):
        @ist.register
        class Answer(nn.Module):
            def forward(self, x):
                return x + answer

        return Answer

    first, second = define(1), define(2)
    ist.save(first(), path)
    assert type(ist.load(path)) is second
    assert ist.load(path)(3) == 5


@pytest.mark.parametrize("cls", [3, int, nn.Module, nn.Linear, ist.layers.Gate, Network(), ist.nn.ImplicitPointConv])
def test_what_is_no_class_of_ones_own(cls):
    with pytest.raises(TypeError, match=r"cls: expected a class of your own, derived from torch\.nn\.Module, got"):
        ist.register(cls)


# ---- what cannot be saved


def changed(change):
    net = nn.Sequential(Network())
    change(net[0])
    return net


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: setattr(net, "gspace", O3), "Make it a local variable of __init__.* 0.gspace: expected numbers"),
        (lambda net: setattr(net, "act", torch.relu), "Make it a local variable.* 0.act: expected .* got builtin_fun"),
        (lambda net: setattr(net, "x", [torch.ones(2)]), "Make it a buffer .* 0.x: expected .*, got a tensor"),
        (lambda net: setattr(net, "convs", [net.readout]), "Hold modules as attributes .* 0.convs: .* got Linear"),
        (lambda net: setattr(net, "seen", {1, 2}), "Make it a local variable .* 0.seen: expected .*, got set"),
        (lambda net: setattr(net, "words", np.array(["a"])), "Make it a local variable .* 0.words: .* got ndarray"),
        (lambda net: net.blocks[0].register_forward_hook(print), "Forward hooks .* 0.blocks.0: expected no forward h"),
        (lambda net: setattr(net, "pool", nn.Bilinear(2, 2, 2)), "Replace this part.* 0.pool: expected one of"),
        (lambda net: setattr(net.readout, "weight", net.heads["scalars"].bias), "Give each module tensors of its own"),
    ],
)
def test_refusals_begin_with_what_to_do(change, message, path):
    with pytest.raises(TypeError, match=f"^{message}"):
        ist.save(changed(change), path)
    assert not path.exists()


def test_an_unknown_class_is_told_how_to_become_known(path):
    class Mine(nn.Module):
        pass

    with pytest.raises(TypeError, match=r"^Decorate the class with @implicit_steer\.register, .* 0: expected one of"):
        ist.save(nn.Sequential(Mine()), path)


# ---- without escnn

MODULE = """
import torch
import implicit_steer as ist


@ist.register
class Network(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        from escnn import gspaces
        gs = gspaces.flipRot3dOnR3()
        vectors = gs.type(*[gs.irrep(1, 1)] * channels)
        self.conv = ist.nn.ImplicitPointConv(vectors, gs.type(gs.trivial_repr), None, 2, 3)

    def forward(self, x, pos, edges):
        x = self.conv.in_type(x, pos)
        return ist.layers.values(self.conv(x, edges, pos[edges[1]] - pos[edges[0]]))
"""
BUILD = """
import torch, mine, implicit_steer as ist
net, x, pos, edges = mine.Network(2).eval(), torch.randn(7, 6), torch.randn(7, 3), torch.randint(7, (2, 20))
ist.save(net, "net.safetensors")
torch.save([x, pos, edges, net(x, pos, edges).detach()], "case.pt")
"""
RUN = """
import sys
sys.modules["escnn"] = None  # as if it were not installed
import torch, implicit_steer as ist
try:
    ist.load("net.safetensors")
except RuntimeError as error:
    print(error)
import mine
*arguments, expected = torch.load("case.pt")
assert torch.equal(ist.load("net.safetensors")(*arguments), expected)
"""


def test_in_a_process_without_escnn(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for code in (BUILD, RUN):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    assert "net.safetensors: expected registered classes 'Network' (mine.Network), got none of that name" in done.stdout
