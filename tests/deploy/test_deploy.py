"""Saved modules loaded again: the same numbers, gradients and statistics, in every mode and dtype, on plain tensors.

Tolerances: a loaded convolution runs the same code on the same plan, so its results are the same bits. Where escnn
expands weights itself (Linear, TensorProductModule) or normalises (its batch norm) sums are ordered differently:
relative deviations measured on all cases below are at most 9e-8 in float32 and 2e-16 in float64, 0 for QM9Net. The
bounds leave room for another machine's matrix products.
"""

import copy
import pickle

import escnn.nn as enn
import pytest
import torch
from deployed import molecules, particles
from escnn.gspaces import no_base_space
from helpers import BACKENDS, CONFIGURATIONS, deviations, layer, random_edges
from torch import nn

import implicit_steer as ist
from implicit_steer import Graph, layers
from implicit_steer.deploy import copy_state
from implicit_steer.experiments.models import NBodyNet
from implicit_steer.experiments.models.qm9 import QM9Net, TensorProduct
from implicit_steer.graph.structures import Structures
from implicit_steer.nn import (
    FourierActivation,
    IIDBatchNorm1d,
    ImplicitConv,
    ImplicitKernel,
    ImplicitPointConvWithDownsampling,
)
from implicit_steer.potentials import Potential
from implicit_steer.testing.cases import SMALL, SPACES, fields

BOUND = {torch.float32: 1e-6, torch.float64: 2e-15}
DTYPES = [torch.float32, torch.float64]
O3 = SPACES["O(3)"]()
FIELDS, MIXED = fields(O3, "2 scalar+vector"), fields(O3, "1 scalar, 2 vector, 1 scalar, 1 l2")


@pytest.fixture
def reloaded(tmp_path):
    """Saves a module and loads it."""

    def reload(module):
        ist.save(module, tmp_path / "module.safetensors")
        return ist.load(tmp_path / "module.safetensors")

    return reload


def learned(conv):
    """What the kernel learns, and the running statistics, in the operator's order; then the layer's bias."""
    parameters = conv.implicit_kernel.parameters_for_op()
    tensors = {f"linear {n} {k}": t for n, pair in enumerate(parameters.linears) for k, t in enumerate(pair)}
    for n, norm in enumerate(parameters.norms):
        tensors |= {f"norm {n} {k}": t[:, :1] if k == "mean" else t for k, t in norm._asdict().items()}
    return {k: t for k, t in (tensors | {"σ": parameters.shell_width, "bias": conv.bias}).items() if t is not None}


def outcome(run, leaves, state):
    """Name → output, gradients of inputs and parameters, state after the call."""
    out = run()
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    wanted = leaves | {k: t for k, t in state().items() if t.requires_grad}
    gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()), materialize_grads=True)
    result = {"out": out.detach()} | {f"grad {k}": g for k, g in zip(wanted, gradients, strict=True)}
    return result | {k: t.detach().clone() for k, t in state().items()}


def of_conv(conv, problem, plain):
    x, delta, *attributes = leaves = problem.requires_grad()
    attributes = attributes[0] if attributes else None

    def run():
        wrapped = conv.in_type(x, problem.pos)  # runs with and without escnn
        y = conv(wrapped, problem.graph, delta, attributes)
        assert isinstance(y, torch.Tensor) == plain
        return layers.values(y)

    return outcome(run, dict(zip(("x", "delta", "attributes"), leaves, strict=False)), lambda: learned(conv))


def assert_same(actual, expected, bound=0.0):
    wrong = {name: value for name, value in deviations(actual, expected).items() if not value <= bound}
    assert not wrong


# ---- point convolutions


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_point_convolution(name, configuration, reloaded):
    original = layer(SMALL[name], configuration)
    for dtype in DTYPES:
        original.to(dtype)
        problem = SMALL[name].inputs(original)
        loaded = reloaded(original)
        assert loaded.implicit_kernel.plan == original.implicit_kernel.plan
        assert_same(of_conv(loaded, problem, True), of_conv(original, problem, False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3", "d4"])
def test_backends(name, backend, reloaded):
    original = layer(SMALL[name], "train", sampling="escnn", backend=backend)
    problem, loaded = SMALL[name].inputs(original), reloaded(original)
    assert loaded.backend == backend
    assert loaded.explain() == original.explain()
    assert_same(of_conv(loaded, problem, True), of_conv(original, problem, False))


@pytest.mark.parametrize(
    "options", [{"cutoff": 1.5}, {"aggr": "mean"}, {"activation": "silu"}, {"sampling": "exact-6"}]
)
def test_options(options, reloaded):
    original = layer(SMALL["o3"], "train", **options)
    problem, loaded = SMALL["o3"].inputs(original), reloaded(original)
    assert_same(of_conv(loaded, problem, True), of_conv(original, problem, False))


def test_bipartite_and_downsampling(reloaded):
    original = ImplicitPointConvWithDownsampling(FIELDS, MIXED, None, 2, 3).eval()
    loaded = reloaded(original)
    x, pos, delta = torch.randn(9, 8), torch.randn(9, 3), torch.randn(20, 3)
    edges, chosen = random_edges(20, 9, 4), torch.tensor([7, 0, 0, 3])
    expected = original(FIELDS(x, pos), edges, delta, idx_downsampled=chosen).tensor
    assert torch.equal(loaded(x, edges, delta, idx_downsampled=chosen), expected)
    for target in (4, torch.zeros(4, 8)):
        assert torch.equal(loaded((x, target), edges, delta), expected)
        assert torch.equal(loaded((x, target), Graph(edges, (9, 4)), delta), expected)
    halves = original(FIELDS(x.bfloat16(), pos), random_edges(20, 9, 9), delta).tensor
    assert torch.equal(loaded(x.bfloat16(), random_edges(20, 9, 9), delta), halves)


def test_errors_of_a_loaded_layer(reloaded):
    loaded = reloaded(SMALL["o3"].layer())
    problem = SMALL["o3"].inputs(SMALL["o3"].layer())
    x, rest = problem.x, (problem.graph, problem.delta, problem.attributes)
    for bad, kind, words in [
        (x.numpy(), TypeError, "x: expected a torch.Tensor, got ndarray"),
        (x[:, :5], ValueError, r"x: expected shape \(\*, 8\), got \(12, 5\)"),
        (x.double(), TypeError, "x: expected dtype torch.float32"),
        ((x, x, x), ValueError, r"x: expected a tensor or a pair \(source, target\), got 3 entries"),
        ((x, "12"), TypeError, "x: expected a tensor or a number of nodes as target, got str"),
        ((x, 11), ValueError, "edge_index: expected a graph on 12 source and 11 target nodes"),
    ]:
        with pytest.raises(kind, match=words):
            loaded(bad, *rest)
    with pytest.raises(ValueError, match="edge_attr: expected a tensor of 1 attributes each, got None"):
        loaded(x, *rest[:2])


# ---- other layers


def both(original, loaded, *arguments):
    """Outcome of a module on features and of its counterpart on their numbers, with the parameters' gradients."""
    first, *rest = arguments

    def one(module, plain):
        x = first.detach().clone().requires_grad_()
        dim = original.in_type.gspace.dimensionality if x.dim() == 2 else 0
        coords = torch.zeros(len(x), dim, dtype=x.dtype) if dim else None
        out = layers.values(module(x if plain else original.in_type(x, coords), *rest))
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        wanted = {"x": x} | dict(module.named_parameters())
        gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()), materialize_grads=True)
        return {"out": out.detach()} | {f"grad {name}": g for name, g in zip(wanted, gradients, strict=True)}

    return one(loaded, True), one(original, False)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [("O(3)", {"padding": 1}), ("SO(2) on R2", {"stride": 2, "padding_mode": "circular", "padding": 2})],
)
@pytest.mark.parametrize("attributes", [None, "1 scalar"])
def test_grid_convolution(name, options, attributes, dtype, mode, reloaded):
    gspace = SPACES[name]()
    types = (fields(gspace, t) for t in ("2 scalar+vector", "1 scalar, 1 vector", attributes))
    original = ImplicitConv(*types, 3, 2, 3, **options).to(dtype).train(mode)
    x = torch.randn(2, original.in_type.size, *[5] * gspace.dimensionality, dtype=dtype)
    rest = [] if attributes is None else [torch.randn(2, 1, dtype=dtype)]
    loaded = reloaded(original)
    actual, expected = both(original, loaded, x, *rest)
    assert torch.equal(actual["out"], expected["out"])
    assert torch.equal(actual["grad x"], expected["grad x"])
    assert repr(loaded).splitlines()[1].partition("kernel_size")[2] in repr(original)


@pytest.mark.parametrize("mode", [True, False])
def test_kernel(mode, reloaded):
    original = ImplicitKernel(FIELDS, MIXED, fields(O3, "1 scalar"), n_layers=3, n_channels=4).train(mode)
    loaded, points = reloaded(original), (torch.randn(7, 3), torch.randn(7, 1))
    assert torch.equal(loaded(*points), original(*points))
    assert torch.equal(loaded(*points), original(*points))  # with the statistics after the first call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["O(3)", "SO(2) on R2", "D4 on R2", "icosahedral on R3"])
def test_fourier_activation(name, dtype, reloaded):
    original = FourierActivation(SPACES[name](), 3, 2, "silu")
    x = torch.randn(5, original.in_type.size, dtype=dtype)
    actual, expected = both(original, reloaded(original), x)
    assert_same(actual, expected)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [IIDBatchNorm1d, enn.IIDBatchNorm1d])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
@pytest.mark.parametrize("kind", [FIELDS, MIXED, fields(O3, "2 vector")], ids=["one kind", "mixed", "no scalars"])
def test_batch_norm(kind, options, cls, dtype, mode, reloaded):
    original = cls(kind, **options)
    with torch.no_grad():
        for tensor in (*original.parameters(), *original.buffers()):
            if tensor.is_floating_point() and tensor.shape[-1:] == (1,):
                tensor.uniform_(0.5, 1.5)
    original.to(dtype).train(mode)
    loaded, x = reloaded(original), torch.randn(6, kind.size, dtype=dtype)
    for _ in range(2):  # the second time with the statistics after the first
        actual, expected = both(original, loaded, x)
        bound = 0.0 if cls is IIDBatchNorm1d else BOUND[dtype]
        assert_same(*({name: result[name] for name in ("out", "grad x")} for result in (actual, expected)), bound)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("into", ["2 scalar+vector", "2 l2, 1 vector, 1 scalar"])
def test_linear(into, bias, dtype, mode, reloaded):
    gspace = no_base_space(O3.fibergroup)
    types = [gspace.type(*fields(O3, text).representations) for text in (into, "1 scalar, 2 vector, 1 scalar")]
    original = enn.Linear(*types, bias=bias).train().to(dtype)
    if bias:
        nn.init.normal_(original.bias)
    original.train(mode)
    loaded, x = reloaded(original), torch.randn(5, types[0].size, dtype=dtype)
    if mode:
        assert_same(*both(original, loaded, x), BOUND[dtype])
    else:  # escnn has expanded the weights: no gradient flows to them
        assert_same({"out": loaded(x).detach()}, {"out": original(types[0](x)).tensor.detach()}, BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("cls", "into"), [(TensorProduct, FIELDS), (enn.TensorProductModule, fields(O3, "2 scalar"))], ids=["ours", "escnn"]
)
def test_tensor_product(cls, into, dtype, reloaded):
    original = cls(into, fields(O3, "2 scalar+l1+l2")).to(dtype)
    assert_same(*both(original, reloaded(original), torch.randn(5, into.size, dtype=dtype)), BOUND[dtype])


@pytest.mark.parametrize("mode", [True, False])
def test_sequence_of_escnns(mode, reloaded):
    space = no_base_space(SPACES["D4 on R2"]().fibergroup)
    regular = space.type(*[space.regular_repr] * 2)
    layers_ = [enn.Linear(regular, regular), enn.ReLU(regular), IIDBatchNorm1d(regular), enn.IdentityModule(regular)]
    layers_ += [enn.ELU(regular, alpha=0.5), enn.LeakyReLU(regular, negative_slope=0.2)]
    original = enn.SequentialModule(*layers_).train(mode)
    loaded, x = reloaded(original), torch.randn(6, regular.size)
    assert [type(part) for part in loaded] == [
        *(layers.Linear, nn.ReLU, layers.IIDBatchNorm1d, nn.Identity),
        *(nn.ELU, nn.LeakyReLU),
    ]
    assert_same({"out": loaded(x).detach()}, {"out": original(regular(x)).tensor.detach()}, BOUND[torch.float32])


# ---- torch's modules and containers


TORCH = [
    nn.Linear(4, 4, bias=False),
    nn.BatchNorm1d(4, momentum=None),
    nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    nn.LayerNorm([4], bias=False),
    nn.ELU(0.5),
    nn.GELU("tanh"),
    nn.LeakyReLU(0.3),
    nn.Softplus(2.0),
    nn.Sequential(nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.Identity(), nn.Dropout(0.25), nn.Flatten()),
]


@pytest.mark.parametrize("module", TORCH, ids=lambda module: type(module).__name__)
def test_torch_modules(module, reloaded):
    state = torch.get_rng_state()
    loaded = reloaded(module)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is initialised at random
    assert repr(loaded) == repr(module)
    x = torch.randn(5, 4)
    for mode in (True, False):
        torch.manual_seed(1)
        actual = loaded.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(actual, module.train(mode)(x))


def test_embedding(reloaded):
    module, index = nn.Embedding(7, 3, padding_idx=2), torch.tensor([0, 2, 6])
    loaded = reloaded(module)
    assert torch.equal(loaded(index), module(index))
    assert loaded.padding_idx == 2


def test_containers_and_what_they_share(reloaded):
    conv, act = SMALL["so2-r3"].layer(), FourierActivation(SPACES["SO(2) on R3"](), 2, 1)
    original = nn.ModuleDict({"list": nn.ModuleList([conv, act]), "again": nn.Sequential(act), "conv": conv})
    loaded = reloaded(original)
    assert loaded["conv"] is loaded["list"][0]
    assert loaded["again"][0] is loaded["list"][1]
    assert list(loaded) == list(original)
    assert isinstance(conv, type(original["conv"]))  # the original keeps its parts
    assert original["again"][0] is act


def test_modes_and_frozen_parameters_are_kept(reloaded):
    original = nn.Sequential(SMALL["o3"].layer(), nn.BatchNorm1d(4), IIDBatchNorm1d(FIELDS)).train()
    original[1].eval()
    original[0].implicit_kernel.eval()
    original[2].requires_grad_(False)
    before = [module.training for module in original.modules()]
    loaded = reloaded(original)
    assert [module.training for module in original.modules()] == before
    assert loaded.training
    assert loaded[0].training
    assert not loaded[0].implicit_kernel.training
    assert not loaded[0].implicit_kernel.norms[0].training
    assert not loaded[1].training
    assert loaded[2].kinds[0].training
    assert [p.requires_grad for p in loaded[2].parameters()] == [False, False]
    assert all(p.requires_grad for p in loaded[0].parameters())


# ---- life after loading


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("name", ["o3", "so2-r3", "d4"])
def test_copies(name, duplicate, reloaded):
    original = layer(SMALL[name], "eval")
    problem, loaded = SMALL[name].inputs(original), reloaded(original)
    other, arguments = duplicate(loaded), (problem.x, problem.graph, problem.delta, problem.attributes)
    expected = loaded(*arguments)
    assert torch.equal(other(*arguments), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.train()(*arguments)
    assert torch.equal(loaded(*arguments), expected)
    other.load_state_dict(loaded.state_dict())
    assert torch.equal(other.eval()(*arguments), expected)


def test_state_dict_on_another_basis_is_refused(reloaded):
    loaded = reloaded(SMALL["o3"].layer())
    other = reloaded(SMALL["o3"].layer())
    other.load_state_dict(loaded.double().state_dict())
    state = loaded.state_dict()
    state["implicit_kernel.fingerprint"] = -state["implicit_kernel.fingerprint"]
    with pytest.raises(RuntimeError, match=r"implicit_kernel\.fingerprint: expected this module's basis"):
        other.load_state_dict(state)


def test_dtypes_and_training(reloaded):
    original = layer(SMALL["o3"], "train", torch.float32)
    problem, loaded = SMALL["o3"].inputs(original), reloaded(original)
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (original, loaded)]
    for _ in range(3):
        outputs = problem.run(original), loaded(problem.x, problem.graph, problem.delta, problem.attributes)
        for optimizer, out in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            out.square().sum().backward()
            optimizer.step()
    assert torch.equal(*outputs)
    assert list(loaded.train().state_dict()) == list(loaded.eval().state_dict())
    double = loaded.double()
    wide = double(problem.x.double(), problem.graph, problem.delta.double(), problem.attributes.double())
    assert wide.dtype == torch.float64
    assert torch.equal(reloaded(double).bias, double.bias)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_qm9_network(dtype, configuration, reloaded):
    norm = None if configuration == "no norm" else "batch"
    original = QM9Net(edge_attr="bonds", blocks=2, norm=norm).to(dtype)
    batch = molecules(dtype)
    for _ in range(3):
        original(batch)  # moves the running statistics
    original.train(configuration == "train")
    loaded = reloaded(original)
    results = []
    for module in (loaded, original):
        out = module(batch)
        gradients = torch.autograd.grad(out @ torch.tensor([1.0, -0.5], dtype=dtype), list(module.parameters()))
        norms = sorted(float(g.norm()) for g in gradients)  # the two count their parameters in different orders
        results.append({"out": out.detach(), "grad": torch.tensor(norms, dtype=dtype)})
    assert_same(*results, BOUND[dtype])
    assert loaded.blocks[1].activation is loaded.activation


def test_what_was_learned_goes_into_a_network_with_escnns_types(reloaded):
    """It has the loaded one's state, and is trained further as that one is; another network is left as it was."""
    first, second = (QM9Net(edge_attr="bonds", blocks=1) for _ in range(2))
    batch, states = molecules(torch.float32), first.state_dict()
    first(batch)  # moves the running statistics
    loaded = reloaded(first)
    copy_state(loaded, second)
    assert all(torch.equal(tensor, states[name]) for name, tensor in second.state_dict().items())
    for part in (loaded, second):
        optimizer = torch.optim.SGD(part.parameters(), 0.1)
        part(batch).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert_same({"out": second.eval()(batch)}, {"out": loaded.eval()(batch)}, BOUND[torch.float32])
    [*_, fingerprint] = [buffer for name, buffer in loaded.named_buffers() if name.endswith("fingerprint")]
    fingerprint.neg_()  # of the last part on a basis: the others would have been copied
    sizes = r"blocks.1.conv1.bias: expected shape \(8,\), got none. Build the module with the arguments"
    others = [
        (QM9Net(edge_attr="bonds", blocks=2), ValueError, sizes),
        (QM9Net(edge_attr="bonds", blocks=1), RuntimeError, "fingerprint: expected this module's basis"),
    ]
    for other, error, message in others:
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(error, match=message):
            copy_state(loaded, other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_networks_of_tensors_and_vectors(dtype, reloaded):
    tensors = QM9Net(edge_attr="bonds", blocks=1, tensors=2)
    for net, batch in {tensors: molecules(dtype), NBodyNet(blocks=1, channels=2): particles(dtype)}.items():
        net = net.to(dtype)
        net(batch)
        original = net.eval()
        torch.testing.assert_close(reloaded(original)(batch), original(batch), rtol=0, atol=BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_potential(dtype, reloaded):
    original = Potential([8, 1], cutoff=2.5, channels=4, blocks=2).to(dtype)
    original.shift.copy_(torch.tensor([1.0, -2.0]))
    numbers, pos = torch.tensor([8, 1, 1, 8]), 2 * torch.rand(4, 3, dtype=dtype)
    cell = 3 * torch.eye(3, dtype=dtype)
    structures = Structures.single(numbers, pos, original.cutoff, cell, True)
    loaded = reloaded(original)
    assert (loaded.cutoff, loaded.species) == (original.cutoff, original.species)
    for ours, theirs in zip(
        loaded.predict(structures, stress=True), original.predict(structures, stress=True), strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"numbers: expected atomic numbers among \[8, 1\], got \[6\]"):
        loaded.species_of(torch.tensor([6, 1]))
