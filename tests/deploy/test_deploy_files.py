"""The files that save writes: their bytes, damage, foreign and newer ones, what cannot be saved, life without escnn."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import deployed
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import layer
from torch import nn

import implicit_steer as ist
from implicit_steer.deploy import kinds
from implicit_steer.deploy.convert import saved_as
from implicit_steer.deploy.file import KEY, _digest, _text
from implicit_steer.experiments.models import QM9Net
from implicit_steer.layers import values
from implicit_steer.nn import ImplicitPointConv
from implicit_steer.testing.cases import SMALL

ROOT = Path(ist.__file__).parent.parent


@pytest.fixture
def path(tmp_path):
    """A saved layer."""
    ist.save(layer(SMALL["o3"], "eval", torch.float32), tmp_path / "layer.safetensors")
    return tmp_path / "layer.safetensors"


def parts(path):
    """The manifest and the tensors of a file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return json.loads(header["__metadata__"][KEY]), safetensors.torch.load(data)


def forge(path, manifest, tensors, sign=True):
    """Write them as save does; with ``sign`` the digest is right."""
    if sign:
        manifest["sha256"] = _digest(manifest, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {KEY: _text(manifest)}))


def assert_refused(path, *words):
    with pytest.raises(RuntimeError) as error:
        ist.load(path)
    assert type(error.value) is RuntimeError
    assert str(error.value).startswith(f"{path}: expected "), error.value
    for word in words:
        assert word in str(error.value), (word, error.value)


# ---- bytes


@pytest.mark.parametrize("name", ["o3", "so2-r3", "d4", "o3-linear"])
def test_round_trip_is_identical(name, tmp_path):
    first, second, third = (tmp_path / f"{n}.safetensors" for n in range(3))
    module = nn.Sequential(layer(SMALL[name], "train", torch.float32), nn.Linear(3, 2))
    ist.save(module, first)
    ist.save(module, second)
    ist.save(ist.load(first), third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        ist.save(SMALL["so3"].layer(), path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_string_is_a_path_too(path):
    assert isinstance(ist.load(str(path)), ist.layers.ImplicitPointConv)


def test_equal_plans_are_written_once(tmp_path):
    ist.save(QM9Net(blocks=4), tmp_path / "net.safetensors")
    manifest, _ = parts(tmp_path / "net.safetensors")
    assert sum(entry.get("data") == "Plan" for entry in manifest["objects"]) == 2  # the blocks', the last convolution's


# ---- files that are refused


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        ist.load(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    assert_refused(path, "a safetensors file", "Copy it again")


def test_every_changed_byte_is_noticed(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    end_of_text = length + 8 - len(data[8 : 8 + length]) + len(data[8 : 8 + length].rstrip())  # after it only padding
    rng = np.random.default_rng(0)
    places = {8 + length, len(data) - 1, *rng.integers(0, end_of_text, 60), *rng.integers(8 + length, len(data), 60)}
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert_refused(path)


def test_another_programs_file(path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    assert_refused(path, "implicit_steer.save wrote", "another program")
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, {KEY: "{"})
    assert_refused(path, "implicit_steer.save wrote")
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, {KEY: "[1]"})
    assert_refused(path, "implicit_steer.save wrote", "format None")


def test_a_pickle(path):
    torch.save({"weight": torch.ones(2)}, path)
    assert_refused(path, "a safetensors file", "torch.load")


def test_newer_format(path):
    manifest, tensors = parts(path)
    forge(path, manifest | {"format": 3, "library": "9.1.0", "objects": {"laid out": "differently"}}, tensors)
    assert_refused(path, "format 2 or older, got format 3", "Install implicit_steer 9.1.0 or newer")


def test_changed_tensor_without_a_new_digest(path):
    manifest, tensors = parts(path)
    forge(path, manifest, tensors | {"state.bias": tensors["state.bias"] + 1}, sign=False)
    assert_refused(path, "SHA-256", "was changed after it was written")


def kind_of_a_later_version(manifest, tensors):
    manifest["objects"][-1]["module"] = "os.system"


def argument_missing(manifest, tensors):
    del manifest["objects"][-1]["arguments"]["backend"]


def object_that_comes_later(manifest, tensors):
    manifest["objects"][-1]["arguments"]["implicit_kernel"]["object"] = len(manifest["objects"])


def object_of_another_kind(manifest, tensors):
    manifest["objects"][-1]["arguments"]["in_type"] = {"object": 2}


def tensor_missing(manifest, tensors):
    del tensors["state.bias"]


def tensor_too_many(manifest, tensors):
    tensors["state.more"] = torch.ones(1)


def weights_too_short(manifest, tensors):
    tensors["state.implicit_kernel.linears.1.weights"] = tensors["state.implicit_kernel.linears.1.weights"][:-1]


def integers_as_weights(manifest, tensors):
    tensors["state.bias"] = tensors["state.bias"].long()


def array_missing(manifest, tensors):
    del tensors["array.3"]


def no_objects(manifest, tensors):
    manifest["objects"] = []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (kind_of_a_later_version, "'os.system'"),
        (argument_missing, "backend"),
        (object_that_comes_later, "objects before it"),
        (object_of_another_kind, ""),
        (tensor_missing, "'bias'"),
        (tensor_too_many, "'more'"),
        (weights_too_short, "linears.1.weights: expected shape"),
        (integers_as_weights, "a dtype like torch.float32"),
        (array_missing, "array.3"),
        (no_objects, "a module as the last"),
    ],
)
def test_forged(change, word, path):
    manifest, tensors = parts(path)
    change(manifest, tensors)
    forge(path, manifest, tensors)
    assert_refused(path, "the content of a saved module", f"written by implicit_steer {ist.__version__}", word)


INDICES = [
    *("coefficient", "partner", "attribute_partner", "columns", "out_start", "in_start", "index", "trivial"),
    *("measured", "row", "hidden_start"),
]


@pytest.mark.parametrize("name", ["o3", "so2-r3", "o3-mixed", "d4"])
def test_indices_out_of_range_never_reach_native_code(name, path):
    ist.save(layer(SMALL[name], "eval", torch.float32), path)
    manifest, tensors = parts(path)
    fields = [(field, value["array"]) for entry in manifest["objects"] for field, value in _arrays(entry)]
    forged = [(field, array) for field, array in fields if field in INDICES and tensors[array].numel()]
    assert {field for field, _ in forged} >= {"columns", "out_start", "in_start", "index", "row", "hidden_start"}
    for _, array in forged:
        for far in (-1, 10**6):
            changed = tensors[array].clone()
            changed.view(-1)[-1] = far
            forge(path, dict(manifest), tensors | {array: changed})
            assert_refused(path, "the content of a saved module")


def _arrays(entry):
    return [(name, v) for name, v in entry.get("fields", {}).items() if isinstance(v, dict) and "array" in v]


# ---- what cannot be saved


class Mine(nn.Module):
    """Of a user."""


class Changed(ImplicitPointConv):
    """A convolution that may compute anything."""


def conv(cls=ImplicitPointConv):
    types = SMALL["o3"].layer().in_type
    return cls(types, types, None, 1, 2)


def hooked():
    module = conv()
    module.implicit_kernel.register_forward_hook(lambda *_: None)
    return module


def tied():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    return module


def parametrised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (3, ["module: expected a torch.nn.Module, got int"]),
        (Mine(), ["Mine: expected one of", "ImplicitPointConv", "torch.Linear", "got test_deploy_files.Mine"]),
        (
            nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), Mine())}),
            ["a.1: expected", "the text of implicit_steer.deploy"],
        ),
        (nn.Sequential(conv(Changed)), ["0: expected", "Changed", "A subclass of a known module counts as unknown"]),
        (nn.Sequential(hooked()), ["0.implicit_kernel: expected no forward hooks, got 1", "remove them"]),
        (tied(), ["1.weight: expected a tensor of one module, got the tensor of '0.weight'"]),
        (parametrised(), ["0: expected", "ParametrizedLinear", "remove_parametrizations"]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_unsaveable(module, words, tmp_path):
    with pytest.raises(TypeError) as error:
        ist.save(module, tmp_path / "module.safetensors")
    assert all(word in str(error.value) for word in words), error.value
    assert list(tmp_path.iterdir()) == []


# ---- new kinds


class Network(nn.Module):
    """A composition with something of its own: conv, then inner, times scale."""

    def __init__(self, conv, width):
        super().__init__()
        self.conv, self.width = conv, width
        self.inner, self.scale = nn.Linear(width, width), nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.zeros(width))

    def arguments(self):
        return {"conv": self.conv, "width": self.width}

    def forward(self, x, *geometry):
        return self.scale * self.inner(values(self.conv(x, *geometry))) + self.shift


@saved_as(Network)
class Built(Network):
    """The network with a convolution built from escnn's types."""

    def __init__(self):
        super().__init__(conv(), 8)


@saved_as(Network)
class BuiltWithMore(Built):
    """Holds what the network has no place for."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.fixture
def _new_kind(monkeypatch):
    kind = kinds.Kind("Network", Network, Network.arguments)
    monkeypatch.setitem(kinds._BY_CLASS, Network, kind)
    monkeypatch.setitem(kinds.KINDS, "Network", kind)


@pytest.mark.usefixtures("_new_kind")
def test_a_new_kind_needs_arguments_and_a_place_in_the_table(tmp_path):
    original = Built().eval()
    with torch.no_grad():
        for tensor in (*original.parameters(), original.shift):
            tensor += torch.randn_like(tensor)
    before = torch.get_rng_state()
    ist.save(original, tmp_path / "net.safetensors")
    loaded = ist.load(tmp_path / "net.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    problem = SMALL["o3-linear"].inputs(SMALL["o3-linear"].layer())
    wrapped = original.conv.in_type(problem.x, problem.pos)
    expected = original(wrapped, problem.graph, problem.delta)
    assert type(loaded) is Network
    assert torch.equal(loaded(problem.x, problem.graph, problem.delta), expected)
    with pytest.raises(TypeError, match="more: expected a part of Network, got none"):
        ist.save(BuiltWithMore(), tmp_path / "more.safetensors")


# ---- without escnn


def test_without_escnn(tmp_path):
    deployed.write(tmp_path)
    command = [sys.executable, str(ROOT / "tests" / "support" / "deployed.py"), "check", str(tmp_path), "--block"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("0.0e+00")  # the same bits
