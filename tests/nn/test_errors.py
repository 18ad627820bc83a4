"""Bad input: each entry spoils one property of one argument; the error names it, what was expected and what came."""

import re
import subprocess
import sys

import pytest
import torch
from escnn import gspaces

from implicit_steer import Graph
from implicit_steer.experiments.models import QM9Net
from implicit_steer.nn import FourierActivation, ImplicitConv, ImplicitPointConv, ImplicitPointConvWithDownsampling
from implicit_steer.nn.kernel import ImplicitKernel
from implicit_steer.testing.cases import SPACES, fields

O3, SO3, PLANE = SPACES["O(3)"](), SPACES["SO(3)"](), SPACES["SO(2) on R2"]()
TYPE, OUT, SCALAR, VECTOR = (fields(O3, t) for t in ("2 scalar+vector", "1 vector", "1 scalar", "1 vector"))
FLAT, FLAT_VECTOR = fields(PLANE, "2 scalar+vector"), fields(PLANE, "1 vector")


def reads(error, argument, *words):
    """The message has the library's one form and contains the words."""
    message = str(error.value)
    assert re.match(rf"{re.escape(argument)}: expected .+, got .+\.", message, re.DOTALL), message
    for word in words:
        assert word in message, (word, message)


def raises(kind, argument, words, call):
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    reads(error, argument, *words)


# ---- building


def point_conv(in_type=TYPE, out_type=OUT, edge_attr_type=SCALAR, n_layers=2, n_channels=2, **options):
    return ImplicitPointConv(in_type, out_type, edge_attr_type, n_layers, n_channels, **options)


BUILD = [
    ({"in_type": 3}, TypeError, "in_type", ["FieldType", "int"]),
    ({"out_type": None}, TypeError, "out_type", ["FieldType", "NoneType"]),
    ({"out_type": fields(SO3, "1 vector")}, ValueError, "out_type", ["O(3)", "SO(3)"]),
    ({"edge_attr_type": fields(SO3, "1 scalar")}, ValueError, "edge_attr_type", ["O(3)", "SO(3)"]),
    ({"edge_attr_type": 1}, TypeError, "edge_attr_type", ["FieldType", "int"]),
    *[({"n_layers": n}, ValueError, "n_layers", ["an integer >= 1", repr(n)]) for n in (0, -1, 2.0, True, "2", None)],
    *[({"n_channels": n}, ValueError, "n_channels", ["an integer >= 1", repr(n)]) for n in (0, -1, 2.5, True, "2")],
    ({"init_scheme": "xavier"}, ValueError, "init_scheme", ["'he'", "'deltaorthonormal'", "'xavier'"]),
    ({"norm": "layer"}, ValueError, "norm", ["'batch' or None", "'layer'"]),
    ({"norm": False}, ValueError, "norm", ["'batch' or None", "False"]),
    ({"activation": "swish"}, ValueError, "activation", ["'silu'", "'swish'"]),
    ({"aggr": "max"}, ValueError, "aggr", ["'sum' or 'mean'", "'max'"]),
    ({"backend": "gpu"}, ValueError, "backend", ["'eager'", "'reference'", "'gpu'"]),
    *[({"cutoff": c}, ValueError, "cutoff", [str(c)]) for c in (0, -1.0, float("inf"), float("nan"))],
    ({"cutoff": "wide"}, TypeError, "cutoff", ["'wide'"]),
    *[
        ({"sampling": s}, ValueError, "sampling", ["'exact-N'", "'lebedev-N'", repr(s)])
        for s in ("exactly", "exact-", "exact-2.5", "exact--4", "lebedev", "escnn-3", "", None, 3)
    ],
    ({"sampling": "lebedev-27"}, ValueError, "sampling", ["26", "lebedev-27"]),
    ({"sampling": "lebedev-6"}, ValueError, "sampling", ["lebedev-6"]),  # 6 points, 9 coefficients
    ({"sampling": "exact-1"}, ValueError, "sampling", ["'exact-N'", "exact-1"]),
    ({"sampling": "exact-0"}, ValueError, "sampling", ["'exact-N'", "exact-0"]),
    ({"sampling": "exact", "edge_attr_type": VECTOR}, ValueError, "sampling", ["steerable edge attributes", "escnn"]),
    ({"sampling": "exact-12", "edge_attr_type": VECTOR}, ValueError, "sampling", ["steerable edge attributes"]),
]
PLANAR = {"in_type": FLAT, "out_type": FLAT, "edge_attr_type": None}
BUILD += [
    (PLANAR | {"sampling": "lebedev-26"}, ValueError, "sampling", ["sphere", "SO(2)"]),
    (PLANAR | {"sampling": "exact-5"}, ValueError, "sampling", ["exact-5"]),  # 7 coefficients
    (PLANAR | {"out_type": fields(SPACES["SO(2) on R3"](), "1 vector")}, ValueError, "out_type", []),
]


@pytest.mark.parametrize(("changes", "kind", "argument", "words"), BUILD, ids=lambda v: str(v)[:60])
def test_building(changes, kind, argument, words):
    with pytest.raises(kind) as error:
        point_conv(**changes)
    reads(error, argument, *words)


def test_exact_n_of_a_finite_group_is_its_order():
    c4 = SPACES["C4 on R2"]()
    regular = fields(c4, "1 regular")
    assert point_conv(regular, regular, None, sampling="exact-4").implicit_kernel.plan.sampling == "exact-4"
    words = ["exact-4", "exact-5"]
    raises(ValueError, "sampling", words, lambda: point_conv(regular, regular, None, sampling="exact-5"))


def test_space_without_positions():
    point = gspaces.no_base_space(O3.fibergroup)
    scalar = point.type(point.trivial_repr)
    raises(ValueError, "conv_in_type", ["dimension 2 or 3", "0"], lambda: ImplicitKernel(scalar, scalar))


# ---- calling


def inputs():
    """Arguments of a valid call."""
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(5, 3, generator=generator)
    return {
        "x": TYPE(torch.randn(5, 8, generator=generator), pos),
        "edge_index": torch.randint(5, (2, 7), generator=generator),
        "edge_delta": torch.randn(7, 3, generator=generator),
        "edge_attr": torch.randn(7, 1, generator=generator),
    }


def x_of(change):
    return lambda a: a | {"x": TYPE(change(a["x"].tensor), a["x"].coords)}


def edges_of(change):
    return lambda a: a | {"edge_index": change(a["edge_index"].clone())}


def edge_0_to(row, value):
    def change(edges):
        edges[row, 0] = value
        return edges

    return edges_of(change)


def delta_of(change):
    return lambda a: a | {"edge_delta": change(a["edge_delta"])}


def attr_of(change):
    return lambda a: a | {"edge_attr": change(a["edge_attr"])}


CALLS = {
    "x plain": (lambda a: a | {"x": a["x"].tensor}, TypeError, "x", ["GeometricTensor", "Tensor", "in_type(tensor"]),
    "x None": (lambda a: a | {"x": None}, TypeError, "x", ["GeometricTensor", "NoneType"]),
    "x type": (lambda a: a | {"x": OUT(torch.zeros(5, 3), a["x"].coords)}, TypeError, "x", ["GeometricTensor"]),
    "x dtype": (x_of(torch.Tensor.double), TypeError, "x", ["torch.float32", "torch.float64", ".double()"]),
    "x device": (lambda a: a | {"x": TYPE(torch.zeros(5, 8, device="meta"), a["x"].coords)}, ValueError, "x", ["meta"]),
    "x triple": (lambda a: a | {"x": (a["x"],) * 3}, ValueError, "x", ["pair", "3"]),
    "x target": (lambda a: a | {"x": (a["x"], "5")}, TypeError, "x", ["number of nodes", "str"]),
    "x target negative": (lambda a: a | {"x": (a["x"], -1)}, TypeError, "x", ["number of nodes"]),
    "x target bool": (lambda a: a | {"x": (a["x"], True)}, TypeError, "x", ["number of nodes", "True"]),
    "edges list": (edges_of(torch.Tensor.tolist), TypeError, "edge_index", ["torch.Tensor", "list"]),
    "edges float": (edges_of(torch.Tensor.float), TypeError, "edge_index", ["integers", "torch.float32"]),
    "edges bool": (edges_of(torch.Tensor.bool), TypeError, "edge_index", ["integers", "torch.bool"]),
    "edges transposed": (edges_of(torch.Tensor.t), ValueError, "edge_index", ["(2, E)", "(7, 2)"]),
    "edges flat": (edges_of(torch.Tensor.flatten), ValueError, "edge_index", ["(2, E)", "(14,)"]),
    "edges source": (edge_0_to(0, 5), ValueError, "edge_index[0]", ["0 .. 4", "5", "sources"]),
    "edges target": (edge_0_to(1, 5), ValueError, "edge_index[1]", ["0 .. 4", "5", "targets"]),
    "edges negative": (edge_0_to(1, -1), ValueError, "edge_index[1]", ["0 .. 4", "-1"]),
    "graph size": (edges_of(lambda e: Graph(e, 6)), ValueError, "edge_index", ["5 source", "6"]),
    "graph device": (edges_of(lambda e: Graph(e, 5).to("meta")), ValueError, "edge_index", ["cpu", "meta"]),
    "delta None": (lambda a: a | {"edge_delta": None}, TypeError, "edge_delta", ["torch.Tensor", "NoneType"]),
    "delta list": (delta_of(torch.Tensor.tolist), TypeError, "edge_delta", ["torch.Tensor", "list"]),
    "delta columns": (delta_of(lambda d: d[:, :2]), ValueError, "edge_delta", ["(7, 3)", "(7, 2)"]),
    "delta rows": (delta_of(lambda d: d[:6]), ValueError, "edge_delta", ["(7, 3)", "(6, 3)"]),
    "delta rank": (delta_of(torch.Tensor.flatten), ValueError, "edge_delta", ["(7, 3)", "(21,)"]),
    "delta float64": (delta_of(torch.Tensor.double), TypeError, "edge_delta", ["torch.float32", "torch.float64"]),
    "delta int": (delta_of(torch.Tensor.long), TypeError, "edge_delta", ["torch.float32", "torch.int64"]),
    "delta complex": (delta_of(lambda d: d + 0j), TypeError, "edge_delta", ["torch.float32", "torch.complex64"]),
    "delta device": (delta_of(lambda d: d.to("meta")), ValueError, "edge_delta", ["cpu", "meta"]),
    "attr missing": (lambda a: a | {"edge_attr": None}, ValueError, "edge_attr", ["1 attributes", "None"]),
    "attr list": (attr_of(torch.Tensor.tolist), TypeError, "edge_attr", ["torch.Tensor", "list"]),
    "attr columns": (attr_of(lambda t: t.repeat(1, 2)), ValueError, "edge_attr", ["(7, 1)", "(7, 2)"]),
    "attr rows": (attr_of(lambda t: t[:6]), ValueError, "edge_attr", ["(7, 1)", "(6, 1)"]),
    "attr rank": (attr_of(torch.Tensor.flatten), ValueError, "edge_attr", ["(7, 1)", "(7,)"]),
    "attr dtype": (attr_of(torch.Tensor.double), TypeError, "edge_attr", ["torch.float32", "torch.float64"]),
    "attr device": (attr_of(lambda t: t.to("meta")), ValueError, "edge_attr", ["cpu", "meta"]),
    "attr type": (
        attr_of(lambda t: O3.type(O3.irrep(1, 0))(t, torch.zeros(7, 3))),  # a pseudoscalar
        TypeError,
        "edge_attr",
        ["irrep_0,0", "irrep_1,0"],
    ),
    "one edge": (
        lambda a: {"x": a["x"]} | {k: v[..., :1] if k == "edge_index" else v[:1] for k, v in a.items() if k != "x"},
        ValueError,
        "edge_delta",
        ["at least 2", "norm='batch'", ".eval()"],
    ),
}


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    return point_conv().train()


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("name", CALLS)
def test_calling(conv, name, backend):
    conv.backend = backend
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    spoil, kind, argument, words = CALLS[name]
    raises(kind, argument, words, lambda: conv(**spoil(inputs())))
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
    conv(**inputs())  # what was not spoiled is valid


@pytest.mark.parametrize("attr", [torch.zeros(7, 1), torch.zeros(7, 2), [0.0] * 7], ids=["tensor", "wide", "list"])
def test_attributes_where_none_are_expected(attr):
    conv = point_conv(edge_attr_type=None)
    words = ["None", type(attr).__name__, "attribute type"]
    raises(ValueError, "edge_attr", words, lambda: conv(**inputs() | {"edge_attr": attr}))


def test_backend_that_is_not_there_when_called(conv):
    conv.backend = "tpu"
    raises(ValueError, "backend", ["'eager'", "'tpu'"], lambda: conv(**inputs()))
    conv.backend = "auto"


DOWNSAMPLING = [
    ([0, 1], TypeError, ["1-D integer tensor", "list"]),
    (torch.tensor([0.0, 1.0]), TypeError, ["1-D integer tensor", "torch.float32"]),
    (torch.tensor([True, False, True, False, False]), TypeError, ["1-D integer tensor", "torch.bool"]),
    (torch.tensor([[0, 1]]), TypeError, ["1-D integer tensor"]),
    (torch.tensor([0, 5]), ValueError, ["0..4", "5"]),
    (torch.tensor([-1, 3]), ValueError, ["0..4", "-1"]),
]


@pytest.mark.parametrize(("index", "kind", "words"), DOWNSAMPLING, ids=lambda v: str(v)[:40])
def test_downsampling(index, kind, words):
    conv = ImplicitPointConvWithDownsampling(TYPE, OUT, SCALAR, 2, 2)
    arguments = inputs()
    arguments["edge_index"][1] %= 2
    raises(kind, "idx_downsampled", words, lambda: conv(**arguments, idx_downsampled=index))
    conv(**arguments, idx_downsampled=torch.tensor([0, 4]))


KERNEL = [
    ({"pos": torch.zeros(4, 2)}, ValueError, "pos", ["(*, 3)", "(4, 2)"]),
    ({"pos": torch.zeros(4, 3, dtype=torch.float64)}, TypeError, "pos", ["torch.float32", "torch.float64"]),
    ({"pos": torch.zeros(4, 3, device="meta")}, ValueError, "pos", ["cpu", "meta"]),
    ({"pos": [0.0]}, TypeError, "pos", ["torch.Tensor", "list"]),
    ({"attrs": None}, ValueError, "attrs", ["1 attributes", "None"]),
    ({"attrs": torch.zeros(3, 1)}, ValueError, "attrs", ["(4, 1)", "(3, 1)"]),
    ({"pos": torch.zeros(1, 3), "attrs": torch.zeros(1, 1)}, ValueError, "pos", ["at least 2", "norm='batch'"]),
]


@pytest.mark.parametrize(("changes", "kind", "argument", "words"), KERNEL, ids=lambda v: str(v)[:40])
def test_kernel(changes, kind, argument, words):
    kernel = ImplicitKernel(TYPE, OUT, SCALAR, 2, 2)
    raises(kind, argument, words, lambda: kernel(**{"pos": torch.zeros(4, 3), "attrs": torch.zeros(4, 1)} | changes))


# ---- grids


def grid_conv(kernel_attr_type=FLAT_VECTOR, kernel_size=3, **options):
    return ImplicitConv(FLAT, FLAT, kernel_attr_type, kernel_size, 2, 2, **options)


GRID_BUILD = [
    ({"axes": "image"}, ValueError, "axes", ["authors", "escnn", "image"]),
    *[({"kernel_size": v}, ValueError, "kernel_size", ["an integer >= 1", repr(v)]) for v in (0, True, 3.0, (3, 3))],
    *[({"padding": v}, ValueError, "padding", ["an integer >= 0", repr(v)]) for v in (-1, "same")],
    ({"stride": 0}, ValueError, "stride", ["an integer >= 1", "0"]),
    ({"dilation": 0}, ValueError, "dilation", ["an integer >= 1", "0"]),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode", ["'reflect'", "'mirror'"]),
    ({"sampling": "lebedev-26"}, ValueError, "sampling", ["sphere"]),
    ({"kernel_size": 1, "kernel_attr_type": None}, ValueError, "kernel_size", ["norm='batch'", "1"]),
]
PIXELS, ROWS = torch.zeros(2, 6, 5, 5), torch.zeros(2, 2)
GRID_CALL = [
    ({"x": PIXELS}, TypeError, "x", ["GeometricTensor", "Tensor"]),
    ({"x": FLAT_VECTOR(torch.zeros(2, 2, 5, 5))}, TypeError, "x", ["GeometricTensor"]),
    ({"x": FLAT(PIXELS[:, :, 0, 0], torch.zeros(2, 2))}, ValueError, "x", ["(*, 6, *, *)", "(2, 6)"]),
    ({"x": FLAT(PIXELS.double())}, TypeError, "x", ["torch.float32", "torch.float64"]),
    ({"x": FLAT(PIXELS.to("meta"))}, ValueError, "x", ["cpu", "meta"]),
    ({"attr": None}, ValueError, "attr", ["2 attributes", "None"]),
    ({"attr": torch.zeros(3, 2)}, ValueError, "attr", ["1 or 2 rows", "(3, 2)"]),
    ({"attr": torch.zeros(2)}, ValueError, "attr", ["1 or 2 rows", "(2,)"]),
    ({"attr": torch.zeros(2, 3)}, ValueError, "attr", ["(*, 2)", "(2, 3)"]),
    ({"attr": ROWS.double()}, TypeError, "attr", ["torch.float32", "torch.float64"]),
    ({"attr": ROWS.to("meta")}, ValueError, "attr", ["cpu", "meta"]),
]


@pytest.mark.parametrize(("changes", "kind", "argument", "words"), GRID_BUILD, ids=lambda v: str(v)[:40])
def test_grid_building(changes, kind, argument, words):
    raises(kind, argument, words, lambda: grid_conv(**changes))


@pytest.mark.parametrize(("changes", "kind", "argument", "words"), GRID_CALL, ids=lambda v: str(v)[:40])
def test_grid_calling(changes, kind, argument, words):
    conv = grid_conv().train()
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    raises(kind, argument, words, lambda: conv(**{"x": FLAT(PIXELS), "attr": ROWS} | changes))
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())


def test_grid_without_attributes_takes_none():
    conv = grid_conv(kernel_attr_type=None)
    raises(ValueError, "attr", ["None"], lambda: conv(FLAT(PIXELS), ROWS))


# ---- activations


ACTIVATION = [
    ({"function": "swish"}, "function", ["'silu'", "'swish'"]),
    ({"channels": 0}, "channels", [">= 1", "0"]),
    ({"channels": True}, "channels", [">= 1", "True"]),
    ({"sampling": "exact"}, "sampling", ["'escnn', 'lebedev-N' or 'circle-N'", "'exact'"]),
    ({"sampling": "lebedev-27"}, "sampling", ["26", "lebedev-27"]),
]


@pytest.mark.parametrize(("changes", "argument", "words"), ACTIVATION, ids=lambda v: str(v)[:40])
def test_activation(changes, argument, words):
    arguments = {"gspace": O3, "channels": 2, "max_frequency": 1} | changes
    raises(ValueError, argument, words, lambda: FourierActivation(**arguments))


def test_activation_input():
    act = FourierActivation(O3, 2, 1)
    raises(TypeError, "x", ["GeometricTensor"], lambda: act(torch.zeros(3, 8)))
    raises(TypeError, "x", ["GeometricTensor"], lambda: act(OUT(torch.zeros(3, 3), torch.zeros(3, 3))))


# ---- checkpoints


def of_another_basis(suffix, change):
    def spoil(state):
        key = next(k for k in state if k.endswith(suffix) and state[k].numel() and "mlp" in k)
        state[key] = change(state[key].clone())
        return key

    return spoil


BASES = {
    "sign": of_another_basis(".sampled_basis", lambda b: -b),
    "size": of_another_basis(".sampled_basis", lambda b: 1.01 * b),
    "NaN": of_another_basis(".sampled_basis", lambda b: b * float("nan")),
    "shape": of_another_basis(".sampled_basis", lambda b: b[:, :-1]),
    "samples": of_another_basis(".A", lambda a: a.flip(1)),
    "bias": of_another_basis(".bias_expansion", lambda a: -a),
}


@pytest.mark.parametrize(("what", "spoil"), BASES.items(), ids=BASES)
def test_checkpoint_of_another_basis(conv, what, spoil):
    other = point_conv()
    with torch.no_grad():
        for p in other.parameters():
            p += 1
    state = other.state_dict()
    key = spoil(state)
    conv.load_state_dict(point_conv().state_dict())
    before, plan = {k: v.clone() for k, v in conv.state_dict().items()}, conv.implicit_kernel.plan
    words = ["shape", "other types", "n_channels"] if what == "shape" else ["basis", "py3nj"]
    raises(RuntimeError, key, words, lambda: conv.load_state_dict(state))
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
    assert conv.implicit_kernel.plan == plan


def test_checkpoint_keys(conv):
    state = conv.state_dict()
    weights = "implicit_kernel.mlp.mlp.0.weights"
    del state[weights]
    with pytest.raises(RuntimeError, match=f"Missing key.*{re.escape(weights)}"):
        conv.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*implicit_kernel\.other"):
        conv.load_state_dict(conv.state_dict() | {"implicit_kernel.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=f"size mismatch for {re.escape(weights)}"):
        conv.load_state_dict(conv.state_dict() | {weights: torch.zeros(1)})


def test_checkpoint_of_a_missing_basis(conv):
    state = conv.state_dict()
    key = next(k for k in state if k.endswith("sampled_basis"))
    del state[key]
    with pytest.raises(RuntimeError, match=f"Missing key.*{re.escape(key)}"):
        conv.load_state_dict(state)


# ---- extras


def test_missing_extra():
    code = """
import sys
sys.modules["escnn"] = None  # as if it were not installed
import implicit_steer
try:
    import implicit_steer.nn
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.startswith("escnn: expected an installed package, got none.")
    assert "pip install implicit_steer[escnn]" in done.stdout


@pytest.mark.parametrize("option", [{"invariants": 0}, {"blocks": -1}, {"tensors": 1.5}, {"invariants": True}])
def test_sizes_of_a_network(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= ., got {value}"):
        QM9Net(**option)


def test_reach_of_a_network():
    with pytest.raises(ValueError, match="reach: expected a positive width, got 0"):
        QM9Net(reach=0)
