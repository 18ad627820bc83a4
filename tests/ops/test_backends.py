"""Every backend is the same function, to rounding: all cases, dtypes and kinds of graph, and escnn's own modules."""

import copy

import pytest
import torch
from helpers import (
    BACKENDS,
    CONFIGURATIONS,
    SAMPLED,
    assert_close,
    escnn_forward,
    layer,
    outcome,
    random_edges,
    relative,
    unchanged,
    with_edges,
)
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_steer import Graph
from implicit_steer.nn import ImplicitPointConvWithDownsampling
from implicit_steer.plan import FUNCTIONS
from implicit_steer.testing.cases import LARGE, SMALL, Problem

# Largest deviation of `eager` from `reference` over SAMPLED x CONFIGURATIONS x 2 seeds, gradients included:
# 1.2e-5 and 8e-14.
BOUND = {torch.float32: 1e-4, torch.float64: 1e-12}


def assert_same_function(conv, problem, **options):
    expected = outcome(conv, problem, "reference", **options)
    assert expected["out"].isfinite().all()
    assert_close(outcome(conv, problem, "eager", **options), expected, BOUND[problem.x.dtype])


# ---- the same function on every case


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("name", "sampling"), SAMPLED)
def test_eager_is_reference(name, sampling, configuration, dtype):
    conv = layer(SMALL[name], configuration, dtype, sampling=sampling)
    assert_same_function(conv, SMALL[name].inputs(conv))


@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3", "d3-r3"])
@pytest.mark.parametrize("options", [{"aggr": "mean"}, {"cutoff": 1.5}, {"aggr": "mean", "cutoff": 0.7}], ids=str)
def test_options(name, options):
    conv = layer(SMALL[name], "train", **options)
    problem = SMALL[name].inputs(conv)
    assert_same_function(conv, problem)
    plain = SMALL[name].layer(norm="batch").double().train()  # the same weights
    plain.load_state_dict(conv.state_dict())
    assert relative(outcome(conv, problem)["out"], outcome(plain, problem)["out"]) > 1e-3


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("name", ["o3", "o2", "c4"])
def test_activations(name, activation):
    conv = layer(SMALL[name], "train", activation=activation)
    assert_same_function(conv, SMALL[name].inputs(conv))


def test_lebedev_sampling():
    conv = layer(SMALL["o3-vector-attr"], "train", sampling="lebedev-26")
    assert_same_function(conv, SMALL["o3-vector-attr"].inputs(conv))


# ---- escnn's own modules, one after the other, as an oracle of the lowering


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_escnn_sampling_is_escnn(name, configuration, dtype):
    conv = layer(SMALL[name], configuration, dtype, sampling="escnn")
    problem = SMALL[name].inputs(conv)
    with unchanged(conv), torch.no_grad():
        expected = escnn_forward(conv, problem)
        statistics = {k: b.clone() for k, b in conv.named_buffers()}
    ours = outcome(conv, problem)
    # Measured: 4.4e-7 and 5e-9 (escnn keeps its bases and grids in float32), statistics 2e-7 and 3e-16.
    assert relative(ours["out"], expected) <= (2e-6 if dtype == torch.float32 else 2e-8)
    for key, value in statistics.items():
        bound = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(ours[f"buffer {key}"], value, rtol=bound, atol=bound)


# Sampling with which the authors' kind of evaluation, on a grid, comes near the exact one.
FINE = {name: "lebedev-770" for name in SMALL if name.startswith(("o3", "so3")) and "vector-attr" not in name}
FINE |= {name: "escnn" for name in SMALL if name not in FINE and not name.startswith("o3")}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", FINE)
def test_exact_sampling_is_the_limit_of_a_grid(name, configuration):
    options = {"sampling": "exact-48"} if FINE[name] != "escnn" and name != "o3-linear" else {}
    exact, grid = layer(SMALL[name], configuration, **options), layer(SMALL[name], configuration, sampling=FINE[name])
    assert exact.implicit_kernel.plan != grid.implicit_kernel.plan or name == "o3-linear"
    problem = SMALL[name].inputs(exact)
    problem.delta = torch.randn(problem.delta.shape, generator=torch.Generator().manual_seed(2)).double()
    ours, theirs = outcome(exact, problem), outcome(grid, problem)
    assert_close(ours, theirs, 1e-2)  # measured: gradients 3e-3; ELU's second derivative jumps: grids converge slowly
    assert relative(ours["out"], theirs["out"]) <= 1e-3


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", ["o2", "so2", "so2-mixed", "so2-r3", "cone-r3", "cylinder-r3", "full-cylinder-r3"])
def test_derivatives_on_the_axis(name, configuration):
    exact, grid = (layer(SMALL[name], configuration, sampling=s, activation="silu") for s in ("exact", "escnn"))
    problem = SMALL[name].inputs(exact)
    problem.delta = torch.randn(problem.delta.shape, generator=torch.Generator().manual_seed(2)).double()
    problem.delta[::3, :2] = 0  # the axis is the third direction
    ours, theirs = outcome(exact, problem), outcome(grid, problem)
    assert relative(ours["out"], theirs["out"]) <= 1e-6
    assert relative(ours["grad delta"][::3], theirs["grad delta"][::3]) <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_over_several_batches(backend):
    case = SMALL["o3"]
    conv = case.layer(sampling="escnn", backend=backend).double()
    theirs = case.layer(sampling="escnn").double()
    for seed in range(3):
        problem = case.inputs(conv, seed)
        problem.run(conv)
        with torch.no_grad():
            escnn_forward(theirs, problem)
    statistics = {k: v for k, v in conv.state_dict().items() if "running" in k or "batches" in k}
    assert [int(v) for k, v in statistics.items() if "batches" in k] == [3, 3]
    for key, value in statistics.items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert relative(problem.run(conv.eval()), escnn_forward(theirs.eval(), problem)) <= 2e-8


def test_only_training_moves_statistics():
    conv = layer(SMALL["o3"], "eval")
    problem = SMALL["o3"].inputs(conv)
    before = copy.copy({k: v.clone() for k, v in conv.state_dict().items()})
    problem.run(conv)
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())


# ---- dtypes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["o3", "so2-r3", "c4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_features_float32_arithmetic(name, dtype, backend):
    conv = layer(SMALL[name], "train", torch.float32, backend=backend)
    problem = SMALL[name].inputs(conv)
    problem.x = problem.x.to(dtype)
    exact = copy.copy(problem)
    exact.x = problem.x.float()
    half, full = outcome(conv, problem), outcome(conv, exact)
    assert half["out"].dtype == half["grad x"].dtype == dtype
    # one rounding of the result, not one of every step
    assert torch.equal(half["out"], full["out"].to(dtype))
    assert half["grad delta"].dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert relative(half["grad x"], full["grad x"]) <= 2 * eps
    assert relative(half["grad delta"], full["grad delta"]) <= 2 * eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_positions_and_attributes(dtype):
    conv = layer(SMALL["o3"], "eval", torch.float32)
    problem = SMALL["o3"].inputs(conv)
    problem.delta, problem.attributes = problem.delta.to(dtype), problem.attributes.to(dtype)
    rounded = copy.copy(problem)
    rounded.delta, rounded.attributes = problem.delta.float(), problem.attributes.float()
    assert torch.equal(problem.run(conv), rounded.run(conv))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_near_float64(backend):
    for name, sampling in SAMPLED:
        conv = layer(SMALL[name], "eval", torch.float32, sampling=sampling, backend=backend)
        problem = SMALL[name].inputs(conv)
        single = problem.run(conv)
        conv.double()
        problem.x, problem.delta = problem.x.double(), problem.delta.double()
        problem.attributes = None if problem.attributes is None else problem.attributes.double()
        assert relative(single, problem.run(conv)) <= 2e-6, (name, sampling)


# ---- graphs


def bipartite(conv, num_src, num_dst, num_edges, seed=0, isolated=0):
    """Problem of a graph between two sets; nobody sends to the last ``isolated`` targets."""
    generator = torch.Generator().manual_seed(seed)
    attributes = conv.implicit_kernel.plan.frame.n_attributes
    dim = conv.in_type.gspace.dimensionality

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(conv.implicit_kernel.shell_width)

    edges = random_edges(num_edges, num_src, num_dst - isolated, seed)
    attributes = normal(num_edges, attributes) if attributes else None
    graph = Graph(edges, (num_src, num_dst))
    return Problem(normal(num_src, conv.in_type.size), normal(num_src, dim), graph, normal(num_edges, dim), attributes)


def run_bipartite(problem, conv):
    """Features of the sources, a number of targets."""
    x = (conv.in_type(problem.x, problem.pos), problem.graph.num_dst)
    return conv(x, problem.graph, problem.delta, problem.attributes).tensor


@pytest.mark.parametrize("configuration", ["train", "eval"])
@pytest.mark.parametrize(("num_src", "num_dst", "num_edges"), [(9, 4, 30), (4, 9, 30), (1, 3, 5), (5, 1, 4), (3, 3, 2)])
def test_bipartite(num_src, num_dst, num_edges, configuration):
    conv = layer(SMALL["o3"], configuration)
    problem = bipartite(conv, num_src, num_dst, num_edges)
    assert_same_function(conv, problem, run=run_bipartite)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bipartite_is_the_block_of_a_whole_graph(backend):
    conv = layer(SMALL["so2-r3"], backend=backend)
    problem = bipartite(conv, 6, 4, 25)
    x, nodes = conv.in_type, 4
    coords = torch.randn(nodes, 3, dtype=torch.float64)
    targets = x(torch.randn(nodes, x.size, dtype=torch.float64), coords)
    sources = x(problem.x, problem.pos)
    out = conv((sources, targets), problem.graph, problem.delta, problem.attributes)
    assert out.coords is coords
    joined = x(torch.cat([problem.x, targets.tensor]), torch.cat([problem.pos, coords]))
    edges = problem.graph.edge_index + torch.tensor([[0], [6]])
    whole = conv(joined, edges, problem.delta, problem.attributes).tensor
    torch.testing.assert_close(out.tensor, whole[6:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("configuration", ["train", "eval"])
@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3", "so2", "c4", "o3-linear"])
def test_isolated_repeated_and_self_loops(name, configuration):
    conv = layer(SMALL[name], configuration)
    problem = SMALL[name].inputs(conv)
    edges = problem.graph.edge_index.clone()
    edges[1] %= 8  # nodes 8 … 11 receive nothing
    edges[0] %= 9  # nodes 9 … 11 send nothing
    edges[:, :6] = edges[:, :1]  # repeated edges, with different positions
    edges[0, 10:20] = edges[1, 10:20]  # self-loops
    problem.delta = problem.delta.clone()
    problem.delta[10:20] = 0
    problem.graph = Graph(edges, 12)
    assert_same_function(conv, problem)
    bias = 0 if conv.bias is None else conv.bias_expansion @ conv.bias
    out = outcome(conv, problem)
    assert torch.equal(out["out"][8:], torch.zeros_like(out["out"][8:]) + bias)
    assert not out["grad x"][9:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3", "c4", "o3-linear"])
def test_no_edges(name, configuration, backend):
    conv = layer(SMALL[name], configuration, torch.float32, backend=backend)
    problem = with_edges(SMALL[name].inputs(conv), slice(0))
    result = outcome(conv, problem)
    bias = conv.bias_expansion @ conv.bias
    assert torch.equal(result["out"], bias.expand(12, -1))
    before = dict(conv.named_buffers())
    for key, value in result.items():
        if key.startswith("grad") and key != "grad bias":
            assert not value.any(), key
        if key.startswith("buffer"):
            assert torch.equal(value, before[key.removeprefix("buffer ")])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_nodes(backend):
    conv = layer(SMALL["o3"], "train", torch.float32, backend=backend)
    x = conv.in_type(torch.zeros(0, 8), torch.zeros(0, 3))
    out = conv(x, torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3), torch.zeros(0, 1))
    assert out.tensor.shape == (0, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("configuration", ["train", "eval"])
@pytest.mark.parametrize("name", ["o3", "so2-r3"])
def test_order_of_edges_does_not_matter(name, configuration, backend):
    conv = layer(SMALL[name], configuration, backend=backend)
    problem = SMALL[name].inputs(conv)
    permutation = torch.randperm(problem.graph.num_edges, generator=torch.Generator().manual_seed(3))
    expected, permuted = outcome(conv, problem), outcome(conv, with_edges(problem, permutation))
    for key in ("grad delta", "grad attributes"):
        expected[key] = expected[key][permutation]
    assert_close(permuted, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8], ids=str)
def test_index_types_and_graph_objects(dtype, backend):
    conv = layer(SMALL["o3"], "eval", torch.float32, backend=backend)
    problem = SMALL["o3"].inputs(conv)
    expected = outcome(conv, problem)
    edges = problem.graph.edge_index.to(dtype)
    for graph in (Graph(edges, 12), edges, edges.t().contiguous().t()):
        problem.graph = graph
        actual = outcome(conv, problem)
        assert all(torch.equal(actual[key], value) for key, value in expected.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["o3", "so2-r3", "c4"])
def test_non_contiguous_inputs(name, backend):
    conv = layer(SMALL[name], "train", backend=backend)
    problem = SMALL[name].inputs(conv)
    strided = copy.copy(problem)
    for key in ("x", "delta", "attributes"):
        value = getattr(problem, key)
        storage = torch.full((2 * value.shape[1], 3 * value.shape[0]), float("nan"), dtype=value.dtype)
        view = storage.t()[::3, ::2]
        view.copy_(value)
        setattr(strided, key, view)
        assert not view.is_contiguous()
    expected = problem.run(conv)
    conv = layer(SMALL[name], "train", backend=backend)
    assert relative(strided.run(conv), expected) <= 1e-14


# ---- numbers that are none


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["x", "delta", "attributes"])
@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3", "c4"])
def test_not_a_number_stays_where_it_belongs(name, where, value, backend):
    conv = layer(SMALL[name], "eval", torch.float32, backend=backend)
    problem = SMALL[name].inputs(conv)
    clean = problem.run(conv)
    spoiled = copy.copy(problem)
    setattr(spoiled, where, getattr(problem, where).clone())
    src, dst = problem.graph.edge_index
    row = int(src[7]) if where == "x" else 7
    getattr(spoiled, where)[row, 0] = value
    touched = torch.zeros(12, dtype=torch.bool)
    touched[dst[src == row] if where == "x" else dst[7]] = True
    out = spoiled.run(conv)
    torch.testing.assert_close(out[~touched], clean[~touched], rtol=1e-5, atol=1e-5)
    if where == "x" or value != value:
        assert not out[touched].isfinite().all(1).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("configuration", ["train", "eval"])
@pytest.mark.parametrize("name", ["o3", "o3-vector-attr", "so2-r3", "o2", "c4"])
def test_uninitialised_memory_is_never_read(name, configuration, backend):
    conv = layer(SMALL[name], configuration, torch.float32, backend=backend)
    problem = SMALL[name].inputs(conv)
    edges = problem.graph.edge_index.clone()
    edges[1] %= 7
    expected = outcome(conv, with_edges_of(problem, edges))
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # torch.empty is now full of NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = outcome(conv, with_edges_of(problem, edges))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(poisoned, expected, 1e-4)


def with_edges_of(problem, edges):
    """The problem on another graph with as many edges."""
    return Problem(problem.x, problem.pos, Graph(edges, len(problem.x)), problem.delta, problem.attributes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["o3", "so2-r3", "c4"])
def test_same_inputs_same_bits(name, backend):
    conv = layer(SMALL[name], "train", torch.float32, backend=backend)
    problem = SMALL[name].inputs(conv)
    first = outcome(conv, problem)
    for _ in range(3):
        again = outcome(conv, problem)
        assert all(torch.equal(again[key], value) for key, value in first.items())


# ---- memory


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("configuration", ["train", "no norm"])
@pytest.mark.parametrize("sampling", ["exact", "escnn"])
def test_eager_never_materialises(sampling, configuration):
    case = LARGE["cloud"]  # O(3), 32 channels in and out
    conv = layer(case, configuration, torch.float32, sampling=sampling, backend="eager")
    problem = bipartite(conv, 2500, 2500, 10000)
    plan = conv.implicit_kernel.plan
    kernels = 10000 * plan.out_size * plan.in_size
    products = 2500 * plan.in_size * plan.hidden_size
    with LargestTensor() as largest:
        outcome(conv, problem, run=run_bipartite)
    assert largest.numel < min(kernels, products) / 3
    conv.backend = "reference"
    with LargestTensor() as largest, torch.no_grad():
        run_bipartite(problem, conv)
    assert largest.numel >= kernels  # the recorder sees what it should


# ---- downsampling


@pytest.mark.parametrize("backend", BACKENDS)
def test_downsampling(backend):
    plain = layer(SMALL["o3"], "eval", backend=backend)
    types = plain.in_type, plain.out_type, plain.edge_attr_type
    conv = ImplicitPointConvWithDownsampling(*types, 3, 4, backend=backend).double().eval()
    conv.load_state_dict(plain.state_dict())
    problem = SMALL["o3"].inputs(conv)
    x = conv.in_type(problem.x, problem.pos)
    everywhere = plain(x, problem.graph, problem.delta, problem.attributes)
    same = conv(x, problem.graph, problem.delta, problem.attributes, None)
    assert torch.equal(same.tensor, everywhere.tensor)
    assert torch.equal(same.coords, problem.pos)

    kept = torch.tensor([7, 2, 2, 11], dtype=torch.int32)
    position = torch.full((12,), -1)
    position[kept.long()] = torch.arange(4)  # node 2 is kept twice; its edges go to the second copy
    edge = position[problem.graph.dst] >= 0
    edges = torch.stack([problem.graph.src[edge], position[problem.graph.dst[edge]]])
    for graph in (edges, Graph(edges, (12, 4))):
        out = conv(x, graph, problem.delta[edge], problem.attributes[edge], kept)
        expected = everywhere.tensor[kept.long()]
        expected[1] = conv.expand_bias()  # no edges
        torch.testing.assert_close(out.tensor, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(out.coords, problem.pos[kept.long()])
    none = conv(x, torch.zeros(2, 0, dtype=torch.long), problem.delta[:0], problem.attributes[:0], kept[:0])
    assert none.tensor.shape == (0, 12)
