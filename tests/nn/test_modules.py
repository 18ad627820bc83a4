"""What users hold in their hands: checkpoints, copies, the plan and its explanation, activations, the kernel's MLP."""

import copy
import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from escnn import gspaces
from escnn import nn as enn
from escnn.group import directsum
from escnn.nn import FourierELU, IIDBatchNorm1d, QuotientFourierELU
from helpers import BACKENDS, SAMPLED, escnn_forward, layer, relative

from implicit_steer import _native
from implicit_steer.experiments.models import QM9Net
from implicit_steer.nn import FourierActivation, ImplicitConv, ImplicitPointConv, KernelMLP
from implicit_steer.nn import IIDBatchNorm1d as ImplicitNorm
from implicit_steer.nn.mlp import KernelLinear
from implicit_steer.plan import Plan
from implicit_steer.plan.packing import dense_kernel, pack
from implicit_steer.testing.cases import SMALL, SPACES, Case, fields


def golden_state(name):
    data = np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz")
    return {key[6:]: torch.tensor(data[key]) for key in data.files if key.startswith("state.")}


def point_layer(**options):
    """The layer of golden case o3_no_attr."""
    space = SPACES["O(3)"]()
    group = space.fibergroup
    field = directsum([group.trivial_representation, group.standard_representation()])
    into, out = (space.type(*[field] * n) for n in (3, 2))
    return ImplicitPointConv(into, out, None, 2, 5, sampling="escnn", **options)


def grid_layer(**options):
    """The layer of golden case grid_o3."""
    space = SPACES["O(3)"]()
    group = space.fibergroup
    field = directsum([group.trivial_representation, group.standard_representation()])
    into, out = fields(space, "2 scalar"), space.type(field, field)
    return ImplicitConv(into, out, None, 3, 2, 3, padding=1, sampling="escnn", **options)


# ---- checkpoints


@pytest.mark.parametrize("name", ["o3", "so2-r3", "o2", "c4", "o3-linear"])
def test_state_dict_does_not_depend_on_the_mode(name):
    conv = SMALL[name].layer()
    training, evaluation = conv.train().state_dict(), conv.eval().state_dict()
    assert list(training) == list(evaluation)
    assert all(torch.equal(training[key], evaluation[key]) for key in training)
    SMALL[name].layer(seed=1).eval().load_state_dict(training)
    SMALL[name].layer(seed=1).train().load_state_dict(evaluation)


@pytest.mark.parametrize(("golden", "build"), [("o3_no_attr", point_layer), ("grid_o3", grid_layer)])
def test_names_and_shapes_are_the_authors(golden, build):
    theirs = {key: value.shape for key, value in golden_state(golden).items()}
    assert {key: value.shape for key, value in build().state_dict().items()} == theirs


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(("golden", "build"), [("o3_no_attr", point_layer), ("grid_o3", grid_layer)])
def test_what_the_authors_derive_in_evaluation_mode_is_ignored(golden, build, mode):
    state = golden_state(golden)
    derived = [f"implicit_kernel.mlp.mlp.{n}.{what}" for n in (0, 3) for what in ("matrix", "expanded_bias")]
    extra = {key: torch.full((2, 2), float("nan")) for key in (*derived, "expanded_bias", "filter")}
    module = build().train(mode)
    given = state | extra
    module.load_state_dict(given, strict=True)
    assert given.keys() == state.keys() | extra.keys()
    assert module.state_dict().keys() == state.keys()
    for key, value in module.state_dict().items():
        # Bases and grids stay the layer's own: other processors round them otherwise (measured: at most 6e-8).
        atol = 1e-6 if "basis" in key or key.endswith((".A", ".Ainv")) else 0
        torch.testing.assert_close(value, state[key], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["o3", "so2-r3", "d4"])
def test_checkpoint_gives_the_same_function(name, tmp_path):
    conv = layer(SMALL[name], "train", torch.float32)
    problem = SMALL[name].inputs(conv)
    problem.run(conv)  # moves the running statistics
    torch.save(conv.state_dict(), tmp_path / "layer.pt")
    other = SMALL[name].layer(seed=5).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(problem.run(other), problem.run(conv.eval()))


def test_casting_a_network_leaves_those_built_later():
    QM9Net(blocks=0).double()
    enn.TensorProductModule(QM9Net(blocks=0).product.in_type, QM9Net(blocks=0).product.out_type).double()
    assert {t.dtype for t in QM9Net(blocks=0).state_dict().values() if t.is_floating_point()} == {torch.float32}


def test_checkpoint_with_fields_out_of_order():
    case = Case("out of order", "C4 on R2", "1 scalar", "2 scalar, 1 vector, 1 scalar", "1 scalar", 1)
    conv, other = case.layer(), case.layer(seed=1)
    problem = case.inputs(conv)
    other.load_state_dict(copy.deepcopy(conv.state_dict()))
    assert torch.equal(problem.run(other), problem.run(conv))


@pytest.mark.parametrize("name", ["o2", "d4", "d3-r3"])
def test_basis_found_numerically_is_taken_from_the_checkpoint(name):
    theirs, ours = (layer(SMALL[name], "eval", seed=seed, sampling="escnn") for seed in (0, 1))
    problem = SMALL[name].inputs(ours)
    before = problem.run(theirs).detach()
    for linear in theirs.implicit_kernel.mlp.linears:  # as if escnn had found other signs where they come from
        for basis in linear.basisexpansion.buffers():
            if basis.dtype.is_floating_point:
                basis[::2] *= -1
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = escnn_forward(theirs, problem)
    assert relative(expected, before) > 0.1
    assert relative(problem.run(ours), expected) <= 1e-7
    exact = layer(SMALL[name], "eval", seed=1)
    exact.load_state_dict(theirs.state_dict())
    assert relative(problem.run(exact), expected) <= 0.05  # the grid's own error


@pytest.mark.parametrize("name", ["o2", "d4"])
def test_basis_that_is_none_is_refused(name):
    conv = layer(SMALL[name], "eval")
    problem = SMALL[name].inputs(conv)
    before, state = problem.run(conv), conv.state_dict()
    key = [k for k in state if k.endswith("sampled_basis")][-1]
    state[key] = torch.randn_like(state[key])
    with pytest.raises(RuntimeError, match="intertwiners"):
        conv.load_state_dict(state)
    assert torch.equal(problem.run(conv), before)


# ---- copies


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_independent_copy(conv, duplicate, problem):
    before = problem.run(conv)
    other = duplicate(conv)
    assert other.in_type == conv.in_type
    assert other.implicit_kernel.plan == conv.implicit_kernel.plan
    assert_immutable(other.implicit_kernel.plan)
    assert torch.equal(problem.run(other), before)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    problem.run(other.train())
    assert torch.equal(problem.run(conv), before)
    other.load_state_dict(conv.state_dict())
    assert torch.equal(problem.run(other.eval()), before)


@pytest.mark.parametrize("name", SMALL)
def test_deepcopy(name):
    conv = layer(SMALL[name], "eval")
    assert_independent_copy(conv, copy.deepcopy, SMALL[name].inputs(conv))


def test_deepcopy_of_a_model():
    conv = layer(SMALL["so2-r3"], "eval")
    act = FourierActivation(conv.in_type.gspace, 2, 1)
    model = torch.nn.Sequential(conv, torch.nn.ModuleDict({"act": act, "grid": grid_layer()}))
    twin = copy.deepcopy(model)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    x = act.in_type(torch.randn(3, act.in_type.size), torch.zeros(3, 3))
    assert torch.equal(twin[1]["act"](x).tensor, act(x).tensor)


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
@pytest.mark.parametrize("name", ["o3", "so2-r3", "d4"])
def test_pickle(name, duplicate):
    conv = layer(SMALL[name], "eval")
    assert_independent_copy(conv, duplicate, SMALL[name].inputs(conv))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_of_a_plan_stay_immutable(duplicate):
    plan = SMALL["so2-r3"].layer().implicit_kernel.plan
    other = duplicate(plan)
    assert other == plan
    assert hash(other) == hash(plan)
    assert_immutable(other)


@pytest.mark.parametrize("name", ["o3", "so2-r3", "o3-vector-attr", "c4"])
def test_dtypes(name):
    conv = layer(SMALL[name], "eval", torch.float32)
    problem = SMALL[name].inputs(conv)
    single = problem.run(conv)
    conv.double()
    problem.x, problem.delta, problem.attributes = (t.double() for t in (problem.x, problem.delta, problem.attributes))
    assert problem.run(conv).dtype == torch.float64
    conv.float()
    problem.x, problem.delta, problem.attributes = (t.float() for t in (problem.x, problem.delta, problem.attributes))
    assert torch.equal(problem.run(conv), single)
    moved = conv.to("meta")
    assert all(t.is_meta for t in moved.state_dict().values())


# ---- the plan


def assert_immutable(data):
    """No field can be set, no array written to, at any depth."""
    for f in dataclasses.fields(data):
        value = getattr(data, f.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(data, f.name, value)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, np.ndarray):
                assert not item.flags.writeable
            if dataclasses.is_dataclass(item):
                assert_immutable(item)


@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_plan_is_data(name, sampling):
    plan = SMALL[name].layer(sampling=sampling).implicit_kernel.plan
    same = SMALL[name].layer(seed=1, sampling=sampling).implicit_kernel.plan
    assert isinstance(plan, Plan)
    assert plan == same
    assert hash(plan) == hash(same)
    assert len({plan, same}) == 1
    assert plan != plan.frame
    assert_immutable(plan)


def test_different_layers_have_different_plans():
    o3 = SMALL["o3"]
    changes = [
        {"aggr": "mean"},
        {"cutoff": 1.0},
        {"cutoff": 2.0},
        {"norm": None},
        {"activation": "silu"},
        {"sampling": "escnn"},
        {"sampling": "exact-12"},
        {"sampling": "lebedev-50"},
    ]
    plans = {o3.layer(**change).implicit_kernel.plan for change in [{}, *changes]}
    plans |= {dataclasses.replace(o3, **c).layer().implicit_kernel.plan for c in ({"n_layers": 2}, {"n_channels": 5})}
    plans |= {SMALL[name].layer().implicit_kernel.plan for name in ("so3", "o3-mixed", "o3-no-attr")}
    assert len(plans) == 14


@pytest.mark.parametrize(("name", "sampling"), [("o3", "auto"), ("o3", "escnn"), ("so2-r3", "auto"), ("c4", "auto")])
def test_explanation(name, sampling):
    conv = SMALL[name].layer(sampling=sampling)
    plan, text = conv.implicit_kernel.plan, conv.explain()
    assert str(plan) in text
    for word in (plan.group, repr(plan.sampling), plan.frame.kind, "per edge", "per node", "samples", "batch norm"):
        assert word in text
    assert "cpu: native" in text
    reference = SMALL[name].layer(sampling=sampling, backend="reference").explain()
    assert "reference: " in reference
    assert "sampling=" in repr(conv)


def test_dense_intertwiners_are_coupled_by_an_outer_product():
    regular = dataclasses.replace(SMALL["octa-r3"], into="1 regular", out="1 regular").layer()
    assert "coupled by dense outer product" in regular.explain()
    assert "coupled by sparse intertwiners" in SMALL["o3"].layer().explain()


def test_auto_picks_what_is_there(monkeypatch):
    conv = SMALL["o3"].layer()
    monkeypatch.setattr(_native, "available", lambda: (False, "not built"))
    assert "eager: factored plain PyTorch; not cpu: the native extension is missing" in conv.explain()


@pytest.mark.parametrize("name", SMALL)
def test_cost_counts_the_weights(name):
    conv = SMALL[name].layer(sampling="escnn")
    plan, cost = conv.implicit_kernel.plan, conv.implicit_kernel.plan.cost()
    with torch.no_grad():
        for p in conv.parameters():
            p.fill_(1.0)
        weights = pack(plan, conv.implicit_kernel.parameters_for_op(), fold=False)
    activations = sum(2 * a.channels * np.count_nonzero(a.samples) for a in plan.activations)
    assert cost["mlp per edge"] - activations >= sum(int((w != 0).sum()) for w, _ in weights.linears)
    assert cost["mlp per edge"] - activations <= sum(w.numel() for w, _ in weights.linears)
    assert cost["materialised kernel per edge"] == plan.out_size * plan.in_size * plan.hidden_size


# ---- weights


@pytest.mark.parametrize("name", SMALL)
def test_dense_weights_are_escnn_s(name):
    conv = layer(SMALL[name], sampling="escnn")
    kernel = conv.implicit_kernel
    weights = pack(kernel.plan, kernel.parameters_for_op(), fold=False)
    *hidden, last = kernel.mlp.linears
    assert len(weights.linears) == len(hidden)
    # escnn keeps its bases in float32
    for (w, b), linear in zip(weights.linears, hidden, strict=True):
        matrix, bias = linear.expand_parameters()
        torch.testing.assert_close(w, matrix, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(b, torch.zeros_like(b) if bias is None else bias, rtol=1e-6, atol=1e-6)
    matrix, bias = last.expand_parameters()
    rows = torch.cat([matrix, torch.zeros(len(matrix), 1) if bias is None else bias[:, None]], 1)
    dense, start, row = dense_kernel(kernel.plan, weights), 0, 0
    for out in conv.out_type.representations:
        column = 0
        for into in conv.in_type.representations:
            block = rows[row : row + out.size * into.size].view(out.size, into.size, -1)
            ours = dense[start : start + out.size, column : column + into.size]
            torch.testing.assert_close(ours, block, rtol=1e-6, atol=1e-6)
            row, column = row + out.size * into.size, column + into.size
        start += out.size


# ---- activations and the MLP


def quotient(stabiliser):
    return lambda gspace, irreps: QuotientFourierELU(gspace, stabiliser, 3, irreps, type="ico", inplace=False)


def regular(*grid):
    return lambda gspace, irreps: FourierELU(gspace, 3, irreps, *grid, inplace=False)


ACTIVATIONS = [
    ("O(3)", 1, quotient((False, False, -1)), 30),
    ("O(3)", 3, quotient((False, False, -1)), 30),
    ("SO(3)", 2, quotient((False, -1)), 30),
    ("SO(2) on R2", 3, regular(40), 40),
    ("SO(2) on R2", 2, regular(125), 125),
    ("O(2) on R2", 3, regular(40), 80),
    ("SO(2) on R3", 3, regular(40), 40),
    ("C4 on R2", 0, regular("regular", 4), 4),
    ("D4 on R2", 0, regular("regular", 4), 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(("space", "max_frequency", "build", "samples"), ACTIVATIONS)
def test_activation_is_escnn_s(space, max_frequency, build, samples, spatial, dtype):
    gspace = SPACES[space]()
    ours = FourierActivation(gspace, 3, max_frequency, sampling="escnn")
    irreps = list(dict.fromkeys(ours.in_type.representations[0].irreps))
    theirs = build(gspace, irreps)
    assert theirs.in_type.representations[0].irreps == ours.in_type.representations[0].irreps
    shape = (4, ours.in_type.size, *((5, 6, 3)[: gspace.dimensionality] if spatial else ()))
    x = torch.randn(shape, dtype=dtype)
    coords = () if spatial else (torch.zeros(4, gspace.dimensionality, dtype=dtype),)
    out, expected = ours.to(dtype)(ours.in_type(x, *coords)), theirs.to(dtype)(theirs.in_type(x, *coords)).tensor
    assert out.tensor.shape == shape == ours.evaluate_output_shape(shape)
    assert relative(out.tensor, expected) <= (1e-6 if dtype == torch.float32 else 2e-7)  # float32 grids on their side
    assert f"{samples} samples" in repr(ours)


@pytest.mark.parametrize("function", ["relu", "silu", "gelu", "tanh"])
def test_activation_functions(function):
    act = FourierActivation(SPACES["C4 on R2"](), 2, 0, function)
    x = torch.randn(3, 8)
    values = x.view(3, 2, 4) @ act.A.T
    expected = getattr(torch.nn.functional, function)(values) @ act.Ainv.T
    out = act(act.in_type(x, torch.zeros(3, 2))).tensor
    torch.testing.assert_close(out, expected.view(3, 8), rtol=1e-5, atol=1e-6)


def test_finer_grids_are_more_equivariant():
    gspace, errors = SPACES["O(3)"](), []
    element = gspace.fibergroup.sample()
    for sampling in ("escnn", "lebedev-110", "lebedev-5810"):
        act = FourierActivation(gspace, 4, 2, sampling=sampling).double()
        rho = torch.tensor(act.in_type.representation(element))
        x = torch.randn(50, act.in_type.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        coords = torch.zeros(50, 3, dtype=torch.float64)
        run = lambda x, act=act, coords=coords: act(act.in_type(x, coords)).tensor  # noqa: E731
        errors.append(relative(run(x @ rho.T), run(x) @ rho.T))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-3


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_mlp_children(n_layers, norm):
    gspace = gspaces.no_base_space(SPACES["O(3)"]().fibergroup)
    vector, scalar = gspace.irrep(1, 1), gspace.trivial_repr
    mlp = KernelMLP(gspace.type(vector, scalar), gspace.type(vector, vector), n_layers, 3, norm=norm)
    stage = [KernelLinear, FourierActivation] + ([IIDBatchNorm1d] if norm else [])
    assert [type(m) for m in mlp.mlp] == stage * (n_layers - 1) + [KernelLinear]
    assert len(mlp.linears) == n_layers
    assert len(mlp.norms) == (n_layers - 1 if norm else 0)
    for before, after in zip(list(mlp.mlp)[:-1], list(mlp.mlp)[1:], strict=True):
        assert before.out_type == after.in_type
    assert mlp.mlp.in_type == mlp.in_type
    assert mlp.mlp.out_type == mlp.out_type
    if n_layers > 1:
        assert len(list(mlp.mlp)[1].in_type) == 3
        assert list(mlp.mlp)[1].max_frequency == 2  # highest frequency of the output plus one


@pytest.mark.parametrize(("name", "function"), [("mirror-r3", "relu"), ("trivial-r3", "relu"), ("d3-r3", "elu")])
def test_elu_is_relu_on_tiny_groups(name, function):
    plan = SMALL[name].layer().implicit_kernel.plan
    assert {a.function for a in plan.activations} == {function}


@pytest.mark.parametrize("scheme", ["he", "deltaorthonormal"])
def test_initialisation_keeps_the_scale(scheme):
    conv = SMALL["o3"].layer(init_scheme=scheme)
    torch.manual_seed(0)
    fresh = ImplicitPointConv(conv.in_type, conv.out_type, conv.edge_attr_type, 3, 16, scheme)
    k = fresh.implicit_kernel(torch.randn(500, 3), torch.randn(500, 1))
    assert 0.01 < float(k.detach().std()) < 10
    assert not fresh.bias.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_is_what_the_layer_applies(backend):
    conv = layer(SMALL["o3"], "eval", backend=backend)
    problem = SMALL["o3"].inputs(conv)
    k = conv.implicit_kernel(problem.delta, problem.attributes)
    messages = (k @ problem.x[problem.graph.src][..., None])[..., 0]
    expected = torch.stack([messages[problem.graph.dst == node].sum(0) for node in range(12)]) + conv.expand_bias()
    assert relative(problem.run(conv), expected) <= 1e-13


# ---- what else users do


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_can_be_taken_away(backend):
    conv = layer(SMALL["o3"])
    conv.backend, problem = backend, SMALL["o3"].inputs(conv)
    with torch.no_grad():
        conv.bias.normal_()
    shift = conv.expand_bias().detach()
    expected = problem.run(conv) - shift
    conv.bias = None
    torch.testing.assert_close(problem.run(conv), expected, rtol=1e-12, atol=1e-12)


def test_checkpoint_of_another_layer_is_named():
    """Other widths are no question of Clebsch-Gordan coefficients."""
    small, large = (point_layer().state_dict() if n == 5 else _wider().state_dict() for n in (5, 6))
    for conv, state in ((_wider(), small), (point_layer(), large)):
        with pytest.raises(RuntimeError, match="other types, n_layers or n_channels"):
            conv.load_state_dict(state)


def _wider():
    conv = point_layer()
    return ImplicitPointConv(conv.in_type, conv.out_type, None, 2, 6, sampling="escnn")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_layers_of_16_bits_take_float32(half):
    """Positions above all, which 16 bits round."""
    conv = layer(SMALL["o3"], dtype=torch.float32)
    problem = SMALL["o3"].inputs(conv)
    expected = problem.run(conv)
    out = problem.run(conv.to(half))
    assert out.dtype == torch.float32
    assert relative(out, expected) < (1e-2 if half == torch.float16 else 5e-2)


def test_node_layers_name_a_wrong_dtype():
    gspace = SPACES["O(3)"]()
    activation = FourierActivation(gspace, 2, 1)
    norm, pos = ImplicitNorm(activation.in_type), torch.zeros(5, 3)
    with pytest.raises(TypeError, match=r"x: expected dtype torch\.float32 or a 16-bit float, got torch\.float64"):
        norm(norm.in_type(torch.zeros(5, norm.in_type.size, dtype=torch.float64), pos))
    with pytest.raises(TypeError, match=r"x: expected a floating point tensor, got torch\.int64"):
        activation(norm.in_type(torch.zeros(5, norm.in_type.size, dtype=torch.int64), pos))
    for bad in (-1, 1.5, "1"):
        with pytest.raises(ValueError, match="max_frequency: expected an integer >= 0"):
            FourierActivation(gspace, 2, bad)
    with pytest.raises(TypeError, match="gspace: expected an escnn GSpace"):
        FourierActivation(None, 2, 1)
