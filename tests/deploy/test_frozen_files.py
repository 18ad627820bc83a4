"""Files with tables: frozen layers and potentials, what ``save(table=True)`` freezes, and forged files."""

import math

import pytest
import torch
from escnn import gspaces
from test_deploy_files import assert_refused, forge, parts
from torch import nn as tnn

import implicit_steer as ist
from implicit_steer import EdgeTypes, irreps, layers, nn
from implicit_steer.graph.structures import Structures
from implicit_steer.layers import values
from implicit_steer.potentials import Potential

N = 12
POS = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
GRAPH = ist.Graph(ist.knn_graph(POS, 4), N)
DELTA = POS[GRAPH.dst] - POS[GRAPH.src]
TYPES = EdgeTypes(torch.arange(GRAPH.num_edges) % 2, torch.eye(2))


@ist.register(name="network of test_frozen_files")
class Network(tnn.Module):
    """Two convolutions of escnn's types, of which the second has no table."""

    def __init__(self):
        super().__init__()
        space = gspaces.flipRot3dOnR3()
        kind = space.type(space.trivial_repr, space.irrep(1, 1))
        self.first = nn.ImplicitPointConv(kind, kind, space.type(*[space.trivial_repr] * 2), norm="batch")
        self.second = nn.ImplicitPointConv(kind, kind, None, sampling="escnn")

    def forward(self, x, types):
        y = self.first(self.first.in_type(x, POS), GRAPH, DELTA, types)
        return values(self.second(y, GRAPH, DELTA))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "module.safetensors"


def saved(module, path, **options):
    ist.save(module, path, **options)
    return ist.load(path)


def frozen(**options):
    torch.manual_seed(0)
    conv = irreps.ImplicitPointConv("2x0e + 1x1o", "1x0e + 1x1o", table=16, **options)
    return conv.freeze_table(torch.eye(2) if options.get("edge_attr") else None)


@pytest.mark.parametrize("options", [{}, {"edge_attr": 2}, {"depthwise": True}, {"norm": "batch", "cutoff": 2.0}])
def test_frozen_layers(options, path):
    conv = frozen(**options)
    loaded = saved(conv, path)
    x, types = torch.randn(N, 5), TYPES if conv.implicit_kernel.n_attributes else None
    assert torch.equal(loaded(x, GRAPH, DELTA, types), conv(x, GRAPH, DELTA, types))
    assert loaded.explain() == conv.explain()
    assert loaded.implicit_kernel.plan.table == conv.implicit_kernel.plan.table
    before = path.read_bytes()
    ist.save(loaded, path, table=True)  # a frozen layer stays as it is
    assert path.read_bytes() == before


@pytest.mark.parametrize("table", [4096, "auto"])
def test_layers_with_a_table_keep_it(table, path):
    space = gspaces.rot3dOnR3()
    kind = space.type(space.trivial_repr)
    for conv in (irreps.ImplicitPointConv("1x0e", "1x0e", table=table), nn.ImplicitPointConv(kind, kind, table=table)):
        loaded = saved(conv, path)
        assert loaded.implicit_kernel.table == table
        assert loaded.implicit_kernel.plan == conv.implicit_kernel.plan


def test_save_freezes_what_can_be_frozen(path):
    torch.manual_seed(0)
    network, x = Network(), torch.randn(N, 4)
    network(x, TYPES)
    expected = network.eval()(x, TYPES)
    with pytest.warns(UserWarning, match="table: second is saved with its MLP: sampling 'escnn' of O.3.") as found:
        loaded = saved(network, path, table=True)
    assert len([w for w in found if "is saved with its MLP" in str(w.message)]) == 1
    assert isinstance(loaded.first.implicit_kernel, layers.FrozenKernel)
    assert loaded.first.implicit_kernel.table == 256
    assert f"error {loaded.first.implicit_kernel.plan.table.error:.1e}" in loaded.first.explain()
    assert not loaded.training
    torch.testing.assert_close(loaded(x, TYPES), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(network.first, nn.ImplicitPointConv)  # the module itself is as it was
    assert torch.equal(network(x, TYPES), expected)


def test_attributes_that_are_not_known(path):
    conv = irreps.ImplicitPointConv("1x0e", "1x0e", 2)
    with pytest.warns(UserWarning, match=r"table: ImplicitPointConv is saved with its MLP: .* with EdgeTypes"):
        loaded = saved(conv, path, table=True)
    assert isinstance(loaded, irreps.ImplicitPointConv)


def test_interaction_blocks(path):
    torch.manual_seed(0)
    block = irreps.InteractionBlock("4x0e", "4x0e + 2x1o", 2, node_attr=2, degree=4.0, depthwise=True).double()
    x, attributes, delta = (t.double() for t in (torch.randn(N, 4), torch.randn(N, 2), DELTA))
    types = TYPES.to(torch.float64)
    expected = block(x, GRAPH, delta, types, attributes)
    loaded = saved(block, path, table=True)
    assert type(loaded) is irreps.Interaction
    assert isinstance(loaded.conv.implicit_kernel, layers.FrozenKernel)
    torch.testing.assert_close(loaded(x, GRAPH, delta, types, attributes), expected, rtol=1e-5, atol=1e-6)
    assert saved(block, path).state_dict().keys() == block.state_dict().keys()


def test_potentials(path):
    torch.manual_seed(0)
    potential = Potential([1, 8], cutoff=4.0, channels=4).double()
    potential.shift.copy_(torch.tensor([-13.0, -2000.0]))
    water = Structures.single(torch.tensor([8, 1, 1] * 4), 1.5 * POS.double(), 4.0)
    expected, frozen = potential.predict(water), potential.eval().freeze_table()
    assert all(isinstance(conv.implicit_kernel, layers.FrozenKernel) for conv in frozen.convolutions)
    assert not frozen.training
    for found in (frozen.predict(water), saved(potential, path, table=True).predict(water)):
        assert float((found.energy - expected.energy).abs()) < 1e-6
        assert float((found.forces - expected.forces).abs().max() / expected.forces.abs().max()) < 1e-4
        assert float(found.forces.sum(0).abs().max()) < 1e-12
    coarse = potential.freeze_table(knots=16)
    assert coarse.convolutions[0].implicit_kernel.table == 16
    assert torch.equal(saved(coarse, path).predict(water).forces, coarse.predict(water).forces)
    assert torch.equal(coarse.shift, potential.shift)
    coarse.shift.zero_()
    assert potential.shift.abs().min() > 0


# ---- forged files


def change(field, value):
    def changed(entries, tensors):
        next(e for e in entries if e.get("data") == "Table")["fields"][field] = value

    return changed


def kernel_of_rows(count):
    def changed(entries, tensors):
        entries[-2]["arguments"]["n_attributes"] = count

    return changed


def an_mlp_is_claimed(entries, tensors):
    entries[-2]["module"] = "ImplicitKernel"
    del entries[-2]["arguments"]["n_attributes"]


def coefficients_missing(entries, tensors):
    name = "state.implicit_kernel.linears.0.weights"
    tensors[name] = tensors[name][:-1]


def no_table(entries, tensors):
    del next(e for e in entries if e.get("data") == "Plan")["fields"]["table"]


def another_frame(**values):
    def changed(entries, tensors):
        next(e for e in entries if e.get("data") == "Frame")["fields"].update(values)

    return changed


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (change("knots", 3), "knots: expected an integer >= 4, got 3"),
        (change("knots", 17), "parameters and buffers of"),
        (change("knots", 10**12), "table: expected at most 1000000 knots"),
        (change("knots", 16.0), "knots"),
        (change("knots", 15), "linears.0.weights: expected shape"),
        (change("types", 3), "parameters and buffers of"),
        (change("types", 1), "table: expected whole hidden fields"),
        (change("types", 0), "types: expected an integer >= 1"),
        (change("types", 10**9), "parameters and buffers"),
        (change("length", -1.0), "length: expected a positive radius"),
        (change("length", {"float": "nan"}), "length: expected a finite number"),
        (change("bounded", 1), "bounded: expected True or False"),
        (change("even", None), "even: expected True or False"),
        (change("error", "small"), "error: expected a finite number"),
        (kernel_of_rows(1), "rows: expected shape"),
        (kernel_of_rows(10**12), "parameters and buffers"),
        (an_mlp_is_claimed, "plan: expected one with an MLP"),
        (coefficients_missing, "linears.0.weights: expected shape"),
        (no_table, ""),
        (another_frame(regular=True), ""),
        (another_frame(kind="none"), ""),
        (another_frame(kind="planar"), ""),
    ],
)
def test_forged(changed, word, path):
    ist.save(frozen(edge_attr=2), path)
    manifest, tensors = parts(path)
    assert manifest["objects"][-2]["module"] == "FrozenKernel"
    changed(manifest["objects"], tensors)
    forge(path, manifest, tensors)
    assert_refused(path, "the content of a saved module", word)


def test_tables_of_any_size_in_other_files(path):
    """The tables of layers with an MLP ask for no memory either."""
    conv = irreps.ImplicitPointConv("1x0e", "1x0e", table=8)
    ist.save(conv, path)
    manifest, tensors = parts(path)
    manifest["objects"][-1]["arguments"]["table"] = 10**12
    forge(path, manifest, tensors)
    assert_refused(path, "table: expected at most 1000000 knots")
    space = gspaces.rot3dOnR3()
    ist.save(nn.ImplicitPointConv(space.type(space.trivial_repr), space.type(space.trivial_repr), table=8), path)
    manifest, tensors = parts(path)
    change("knots", 10**12)(manifest["objects"], tensors)
    forge(path, manifest, tensors)
    assert_refused(path, "table: expected at most 1000000 knots")


def test_the_error_is_in_the_file(path):
    conv = frozen()
    ist.save(conv, path)
    (table,) = [e["fields"] for e in parts(path)[0]["objects"] if e.get("data") == "Table"]
    assert math.isclose(table["error"], conv.implicit_kernel.plan.table.error)
