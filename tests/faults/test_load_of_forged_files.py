"""``load`` of files that lie about sizes, and of what other damage leaves: a RuntimeError with the path, little memory.

A forged size once asked for 8 to 275 GB; errors of Python and torch came without the path; a kernel in two convolutions
loaded, and failed when it was called.
"""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from escnn import nn as enn
from helpers import layer
from torch import nn

import implicit_steer as ist
from implicit_steer.deploy.file import KEY, _digest
from implicit_steer.layers import ZBL
from implicit_steer.potentials import Potential
from implicit_steer.testing.cases import SMALL, SPACES, fields

O3 = SPACES["O(3)"]()
FIELDS = fields(O3, "2 scalar+vector")
SCALARS, VECTORS = O3.type(*[O3.trivial_repr] * 2), O3.type(*[O3.irrep(1, 1)] * 2)
HUGE = 10**12


@contextmanager
def little_memory(size):
    """Address space for twice ``size`` and 64 MB, and what libraries reserve."""
    (line,) = [n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith("VmSize")]
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(line.split()[1]) + 2 * size + 256 * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def parts(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"][KEY]), safetensors.torch.load(data)


def write(path, manifest, tensors, sign=True):
    if sign:
        manifest["sha256"] = _digest(manifest, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(manifest)}))


def refusal(path):
    """The text of the error after the path; the error is none of an allocator."""
    with little_memory(path.stat().st_size), pytest.raises(RuntimeError) as error:
        ist.load(path)
    text = str(error.value)
    assert type(error.value) is RuntimeError
    assert text.startswith(f"{path}: expected "), text
    assert "memory" not in text.lower(), text
    return text.removeprefix(f"{path}: ")


def point_conv():
    return layer(SMALL["o3"], "train", torch.float32)


def planar_conv():
    return layer(SMALL["so2-r3"], "train", torch.float32)


def grid_conv():
    return ist.nn.ImplicitConv(FIELDS, FIELDS, None, 3, 2, 3)


def potential():
    return Potential([1, 8], 2.5, channels=2, blocks=1)


def entry(manifest, kind, sort="module", number=-1):
    """Arguments or fields of the object of a kind."""
    found = [e for e in manifest["objects"] if e.get(sort) == kind]
    return found[number]["fields" if sort == "data" else "arguments"]


MODULES = {
    "embedding": lambda: nn.Embedding(5, 3),
    "linear of torch": lambda: nn.Linear(3, 2),
    "batch norm of torch": lambda: nn.BatchNorm1d(3),
    "layer norm": lambda: nn.LayerNorm([3]),
    "batch norm": lambda: ist.nn.IIDBatchNorm1d(FIELDS),
    "activation": lambda: ist.nn.FourierActivation(O3, 3, 1),
    "point conv": point_conv,
    "planar conv": planar_conv,
    "grid conv": grid_conv,
    "potential": potential,
    "block": lambda: ist.irreps.InteractionBlock("2x0e+1x1o", "2x0e+1x1o", 1, node_attr=2),
    "depthwise": lambda: ist.irreps.ImplicitPointConv("2x0e+1x1o", "2x0e+1x1o", depthwise=True),
    "square": lambda: ist.irreps.TensorSquare("2x0e+2x1o", "2x0e+2x1o"),
    "repulsion": lambda: ZBL((1, 8), 2.5),
    "radial": lambda: ist.irreps.ImplicitPointConv("2x0e", "2x0e", radial=ist.irreps.Cosines(3, 2.0)),
    "radial of a plan": lambda: ist.nn.ImplicitPointConv(SCALARS, SCALARS, radial=ist.nn.Bessel(3, 2.0)),
}
SIZES = [
    ("embedding", "module", "torch.Embedding", "num_embeddings"),
    ("embedding", "module", "torch.Embedding", "embedding_dim"),
    ("linear of torch", "module", "torch.Linear", "in_features"),
    ("batch norm of torch", "module", "torch.BatchNorm1d", "num_features"),
    ("layer norm", "module", "torch.LayerNorm", "normalized_shape"),
    ("batch norm", "data", "Fields", "size"),
    ("point conv", "data", "Fields", "size"),
    ("point conv", "module", "ImplicitPointConv", "n_bias"),
    ("point conv", "data", "Plan", "out_size"),
    ("point conv", "data", "Plan", "in_size"),
    ("point conv", "data", "Plan", "hidden_size"),
    ("point conv", "data", "Linear", "in_size"),
    ("point conv", "data", "Linear", "out_size"),
    ("point conv", "data", "Block", "offset"),
    ("point conv", "data", "Block", "n_in"),
    ("point conv", "data", "Activation", "channels"),
    ("point conv", "data", "Norm", "channels"),
    ("planar conv", "data", "Frame", "dim"),
    ("radial", "data", "Cosines", "n"),
    ("radial of a plan", "data", "Bessel", "n"),
    ("grid conv", "module", "ImplicitConv", "n_bias"),
    ("grid conv", "data", "Plan", "out_size"),
    ("potential", "module", "Gate", "channels"),
    ("potential", "module", "Gate", "max_frequency"),
    *(
        ("block", "module", "irreps.InteractionBlock", name)
        for name in ("edge_attr", "node_attr", "n_layers", "n_channels")
    ),
    *(("depthwise", "module", "irreps.ImplicitPointConv", name) for name in ("edge_attr", "n_layers", "n_channels")),
]


@pytest.fixture
def path(tmp_path):
    """Where the file is."""
    return tmp_path / "forged.safetensors"


@pytest.mark.parametrize("value", [HUGE, 10**9, 2**63, -HUGE, 1e300, "x"])
@pytest.mark.parametrize(("module", "sort", "kind", "key"), SIZES, ids=lambda v: str(v))
def test_forged_sizes(module, sort, kind, key, value, saved):
    path, manifest, tensors = saved(module)
    entry(manifest, kind, sort)[key] = [value] if kind == "torch.LayerNorm" else value
    write(path, manifest, tensors)
    assert ", got " in refusal(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A path to write to, manifest and tensors of a module of MODULES."""
    folder, written = tmp_path_factory.mktemp("saved"), {}

    def get(name):
        if name not in written:
            written[name] = folder / f"{name.replace(' ', '-')}.safetensors"
            ist.save(MODULES[name](), written[name])
        return folder / "forged.safetensors", *parts(written[name])

    return get


@pytest.mark.parametrize(
    ("name", "kind", "field"),
    [
        ("point conv", "Coupling", "row"),
        ("point conv", "Norm", "full_trivial"),
        ("point conv", "Frame", "order"),
        ("point conv", "Frame", "powers"),
        ("planar conv", "Frame", "order"),
        ("planar conv", "Frame", "attribute_order"),
    ],
)
@pytest.mark.parametrize("value", [10**9, 2**40, -1])
def test_forged_numbers_in_arrays(name, kind, field, value, saved):
    """Numbers from which sizes follow: parameters, running means, powers of the frame's functions."""
    path, manifest, tensors = saved(name)
    array = entry(manifest, kind, "data")[field]["array"]
    assert tensors[array].numel()
    tensors[array].view(-1)[-1] = value
    write(path, manifest, tensors)
    assert ", got " in refusal(path)


@pytest.mark.parametrize("key", ["irreps_in", "irreps_out"])
@pytest.mark.parametrize("text", [f"{HUGE}x0e", "100000x1o", "2x12e", "x", "1x0", 3, None])
def test_forged_irreps(text, key, saved):
    kinds = {"block": "InteractionBlock", "depthwise": "ImplicitPointConv", "square": "TensorSquare"}
    for module, kind in kinds.items():
        path, manifest, tensors = saved(module)
        entry(manifest, f"irreps.{kind}")[key] = text
        write(path, manifest, tensors)
        assert ", got " in refusal(path)


def test_species_that_repeat(saved):
    """A potential and a repulsion keep a row for every pair of them."""
    for module, kind in (("potential", "PotentialNet"), ("repulsion", "ZBL")):
        path, manifest, tensors = saved(module)
        entry(manifest, kind)["species"] = [1] * 10**5
        write(path, manifest, tensors)
        assert "species: expected different atomic numbers" in refusal(path)


@pytest.mark.parametrize(("key", "value"), [("species", ["x"]), ("species", [97]), ("cutoff", 0), ("cutoff", "x")])
def test_forged_repulsions(key, value, saved):
    path, manifest, tensors = saved("repulsion")
    entry(manifest, "ZBL")[key] = value
    write(path, manifest, tensors)
    assert ", got " in refusal(path)


def test_sizes_of_a_batch_norm(saved):
    """Consistent ones: fields and type are both too large."""
    path, manifest, tensors = saved("batch norm")
    entry(manifest, "Fields", "data")["size"] = 4 * HUGE
    entry(manifest, "IIDBatchNorm1d")["sizes"] = [[HUGE, 4, 1]]
    write(path, manifest, tensors)
    assert ", got " in refusal(path)
    entry(manifest, "IIDBatchNorm1d")["channels"] = {"array": "array.0"}
    write(path, manifest, tensors | {"array.0": torch.arange(8)})
    assert ", got " in refusal(path)


@pytest.mark.parametrize("value", [10**9, 2**40, -1])
def test_sizes_of_a_pooling(value, path):
    """The numbers of fields, of which it makes lists."""
    ist.save(enn.NormPool(FIELDS), path)
    manifest, tensors = parts(path)
    tensors[entry(manifest, "FieldPool")["field"]["array"]][-1] = value
    write(path, manifest, tensors)
    assert ", got " in refusal(path)


def test_empty_tensors_of_enormous_shape(saved):
    path, manifest, tensors = saved("linear of torch")
    entry(manifest, "torch.Linear")["in_features"] = 0
    entry(manifest, "torch.Linear")["out_features"] = HUGE
    write(path, manifest, tensors | {"state.weight": torch.zeros(HUGE, 0)})
    assert ", got " in refusal(path)


# ---- errors of others, without the path


def test_samples_of_no_coefficients(saved):
    """By their number the fields were counted: a ZeroDivisionError."""
    path, manifest, tensors = saved("activation")
    (array,) = [v["array"] for k, v in entry(manifest, "FourierActivation").items() if k == "samples"]
    (other,) = [v["array"] for k, v in entry(manifest, "FourierActivation").items() if k == "inverse"]
    write(path, manifest, tensors | {array: torch.zeros(4, 0), other: torch.zeros(0, 4)})
    assert "samples" in refusal(path)


def test_asserts_of_torch(saved):
    path, manifest, tensors = saved("embedding")
    entry(manifest, "torch.Embedding")["padding_idx"] = 17
    write(path, manifest, tensors)
    assert "AssertionError" in refusal(path)


def test_arguments_that_nobody_wrote(saved):
    """Such as a device, which torch would take."""
    path, manifest, tensors = saved("linear of torch")
    entry(manifest, "torch.Linear")["device"] = "cuda:3"
    write(path, manifest, tensors)
    assert "device" in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"format":1,"objects":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"format":1,"objects":[],"sha256":NaN}',
        '{"format":1,"library":1e999}',
        '{"format":1,"library":NaN}',
        '{"format":' + "1" * 5000 + "}",
        '{"format":1,"library":"\\ud800"}',
    ],
    ids=["nested", "nested deeper", "NaN digest", "infinity", "NaN", "digits", "half a character"],
)
def test_texts_that_json_cannot_read(text, path):
    path.write_bytes(safetensors.torch.save({"x": torch.ones(2)}, {KEY: text}))
    assert ", got " in refusal(path)


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_lengths_of_the_header(length, path):
    ist.save(nn.Linear(3, 2), path)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert ", got " in refusal(path)


def test_a_header_that_is_no_text(path):
    ist.save(nn.Linear(3, 2), path)
    data = bytearray(path.read_bytes())
    data[20] = 0xFF
    path.write_bytes(data)
    assert ", got " in refusal(path)


@pytest.mark.parametrize("objects", [None, 3, "x", {"a": 1}, [3], [None], [[]], [{}], [{"module": []}], [{"data": {}}]])
def test_objects_of_another_form(objects, saved):
    path, manifest, tensors = saved("linear of torch")
    write(path, manifest | {"objects": objects}, tensors)
    assert ", got " in refusal(path)


def test_hidden_features_beyond_their_end(path):
    """A coupling that reads fields and the constant one at once: native code would read behind the features."""
    attributes = fields(O3, "2 scalar")
    ist.save(ist.nn.ImplicitPointConv(SCALARS, SCALARS, attributes, 1, 1), path)
    manifest, tensors = parts(path)
    one = entry(manifest, "Plan", "data")["hidden_size"] - 1
    couplings = [e["fields"] for e in manifest["objects"] if e.get("data") == "Coupling"]
    (array,) = {c["hidden_start"]["array"] for c in couplings if len(tensors[c["hidden_start"]["array"]]) == 2}
    tensors[array] = torch.tensor([3, one])
    write(path, manifest, tensors)
    assert "hidden_start" in refusal(path)


# ---- one kernel in two convolutions


def shared():
    """Convolutions, of which the second has the first's kernel, and a bias of its own."""
    pair = nn.ModuleList(ist.nn.ImplicitPointConv(VECTORS, SCALARS, None, 1, 2) for _ in range(2))
    pair[1].implicit_kernel = pair[0].implicit_kernel
    return pair


def test_a_kernel_of_two_convolutions_is_not_saved(path):
    with pytest.raises(TypeError, match=r"^Give each convolution a kernel of its own.* 1\.implicit_kernel: expected"):
        ist.save(shared(), path)


def test_a_kernel_of_two_convolutions_is_not_loaded(path):
    pair = nn.ModuleList(ist.nn.ImplicitPointConv(VECTORS, SCALARS, None, 1, 2) for _ in range(2))
    ist.save(pair, path)
    manifest, tensors = parts(path)
    first, second = (entry(manifest, "ImplicitPointConv", number=n)["implicit_kernel"] for n in range(2))
    second["object"] = first["object"]
    write(path, manifest, tensors)
    assert "Give each convolution a kernel of its own" in refusal(path)


def test_a_kernel_of_two_convolutions_without_bias_works(path):
    pair = nn.ModuleList(ist.nn.ImplicitPointConv(SCALARS, VECTORS, None, 2, 2) for _ in range(2)).eval()
    pair[1].implicit_kernel = pair[0].implicit_kernel
    ist.save(pair, path)
    loaded = ist.load(path)
    assert loaded[1].implicit_kernel is loaded[0].implicit_kernel
    x, pos, edges = torch.randn(5, 2), torch.randn(5, 3), torch.randint(5, (2, 12))
    for mine, theirs in zip(loaded, pair, strict=True):
        delta = pos[edges[1]] - pos[edges[0]]
        assert torch.equal(mine(x, edges, delta), theirs(SCALARS(x, pos), edges, delta).tensor)
