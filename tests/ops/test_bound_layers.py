"""Layers that the native extension has under a number: whatever happens to a layer's tensors between calls, forward and
backward pass are those of `reference`; and what such a call refuses.

Where IMPLICIT_STEER_CUDA_LIBRARY names the kernels that run on the processor (`make test-gpu-emulated`), all this is
asked of backend `cuda`, whose kernels then run on CPU tensors, else of `cpu`."""

import copy
import gc
import threading
from dataclasses import replace

import pytest
import torch
from helpers import arguments_of, assert_close, function_of, layer, outcome, random_edges
from torch.func import functional_call
from torch.library import opcheck
from torch.nn.utils import parametrize

from implicit_steer import Graph, _native
from implicit_steer.irreps import ImplicitPointConv
from implicit_steer.ops.gpu_cost import is_wide
from implicit_steer.ops.native.bound import BoundKernel
from implicit_steer.ops.select import BACKENDS
from implicit_steer.testing.cases import SMALL, Problem

BACKEND = "cuda" if _native.ON_PROCESSOR else "cpu"
of_cpu = pytest.mark.skipif(BACKEND != "cpu", reason="of CPU tensors alone")


class Halved(torch.nn.Module):
    def forward(self, weights):
        return weights / 2


def weights_of(conv):
    return conv.implicit_kernel.mlp.linears[-1].weights


def optimizer_step(conv, **options):
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.1, **options)
    for p in conv.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def in_place(conv):
    with torch.no_grad():
        weights_of(conv).mul_(2)


def by_data(conv):
    weights_of(conv).data = 2 * weights_of(conv).data


def strided_data(conv):
    """In memory that is not contiguous."""
    weights = weights_of(conv)
    weights.data = torch.stack([2 * weights.data, weights.data], 1)[:, 0]


def another_parameter(conv):
    kernel = conv.implicit_kernel
    kernel.shell_width = torch.nn.Parameter(2 * kernel.shell_width.detach())


def without_bias(conv):
    conv.bias = None


def loaded(conv):
    conv.load_state_dict({k: 1.5 * v if k.endswith("weights") else v for k, v in conv.state_dict().items()})


def assigned(conv):
    conv.load_state_dict({k: v.clone() for k, v in conv.state_dict().items()}, assign=True)


def there_and_back(conv):
    conv.float().double()


def swapped(conv):
    """As .to() does where it swaps tensors instead of their data."""
    torch.utils.swap_tensors(weights_of(conv), torch.nn.Parameter(2 * weights_of(conv).detach()))


def shared(conv):
    conv.share_memory()


def statistics_moved(conv):
    next(b for n, b in conv.named_buffers() if n.endswith("running_var")).mul_(2)


def trained(conv):
    """A call in training mode, which moves the running statistics."""
    mode = conv.training
    SMALL["o3"].inputs(conv).run(conv.train())
    conv.train(mode)


def parametrised(conv):
    parametrize.register_parametrization(conv.implicit_kernel.mlp.linears[-1], "weights", Halved())


CHANGES = [optimizer_step, in_place, by_data, strided_data, another_parameter, without_bias, loaded, assigned]
CHANGES += [there_and_back, swapped, shared, statistics_moved, trained, parametrised]
CHANGES += [lambda conv: optimizer_step(conv, foreach=True)]


def assert_is_reference(conv, problem, bound=1e-10):
    ours, expected = outcome(conv, problem, BACKEND), outcome(conv, problem, "reference")
    assert_close(ours, expected, bound)
    conv.backend = BACKEND
    with torch.no_grad():  # the call without a backward pass
        assert_close({"out": problem.run(conv)}, {"out": expected["out"]}, bound)


@pytest.mark.parametrize("aggr", ["sum", "mean"])
@pytest.mark.parametrize("configuration", ["eval", "train", "no norm"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_change_counts(change, configuration, aggr):
    if configuration == "no norm" and change in (statistics_moved, trained):
        pytest.skip("it has no statistics")
    conv = layer(SMALL["o3"], configuration, aggr=aggr)
    problem = SMALL["o3"].inputs(conv)
    assert_is_reference(conv, problem)
    change(conv)
    assert_is_reference(conv, problem)


def test_evaluation_and_training_mode_by_turns():
    conv = layer(SMALL["o3"])
    problem = SMALL["o3"].inputs(conv)
    for mode in (True, False, True, False):
        assert_is_reference(conv.train(mode), problem)


def test_graphs_by_turns():
    conv = layer(SMALL["o3"])
    problems = [replace(SMALL["o3"], nodes=n).inputs(conv) for n in (8, 12)]
    for problem in [*problems, *problems]:
        assert_is_reference(conv, problem)


def test_functional_call():
    """Tensors in place of the parameters, leaves or not, and the parameters again after it."""
    conv = layer(SMALL["o3"], backend=BACKEND)
    problem = SMALL["o3"].inputs(conv)
    arguments, before = problem.arguments(conv), problem.run(conv)
    for scale in (2, 3):
        values = {name: scale * p for name, p in conv.named_parameters()}
        other = copy.deepcopy(conv)
        other.load_state_dict(values, strict=False)
        for given in (values, {name: v.detach() for name, v in values.items()}):
            assert torch.equal(functional_call(conv, given, arguments).tensor, problem.run(other))
    assert torch.equal(problem.run(conv), before)


def test_autocast():
    conv = layer(SMALL["o3"], dtype=torch.float32, backend=BACKEND)
    problem = SMALL["o3"].inputs(conv)
    before = problem.run(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(problem.run(conv), before)


def test_half_precision_features_between_others():
    conv = layer(SMALL["o3"], dtype=torch.float32, backend=BACKEND)
    problem = SMALL["o3"].inputs(conv)
    before = problem.run(conv)
    halved = replace(problem, x=problem.x.bfloat16())
    assert halved.run(conv).dtype == torch.bfloat16
    assert torch.equal(problem.run(conv), before)


@of_cpu
def test_compiled_between_calls():
    torch._dynamo.reset()
    conv = layer(SMALL["o3"], backend=BACKEND)
    problem, function = SMALL["o3"].inputs(conv), function_of(conv)
    arguments = arguments_of(problem)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=1e-12)
        in_place(conv)


def test_hooks_of_the_convolution():
    conv = layer(SMALL["o3"], backend=BACKEND)
    problem, seen = SMALL["o3"].inputs(conv), []
    handles = [conv.register_forward_hook(lambda *_: seen.append("forward"))]
    handles.append(weights_of(conv).register_hook(lambda grad: seen.append("grad") or 2 * grad))
    problem.run(conv).square().sum().backward()
    assert seen == ["forward", "grad"]
    hooked, conv.implicit_kernel.mlp.linears[-1].weights.grad = weights_of(conv).grad, None
    for handle in handles:
        handle.remove()
    problem.run(conv).square().sum().backward()
    torch.testing.assert_close(hooked, 2 * weights_of(conv).grad)


@of_cpu  # tables
@pytest.mark.parametrize("table", [None, 16])
def test_frozen_and_tabulated(table):
    conv = ImplicitPointConv("2x0e + 2x1o", "2x0e + 2x1o", table=16, width=1.0).double()
    conv = conv if table is None else conv.freeze_table(knots=table)
    problem = SMALL["o3"].inputs(layer(SMALL["o3"]))
    x, arguments = torch.randn(len(problem.pos), 8).double(), (problem.graph, problem.delta)
    for _ in range(2):
        conv.backend = "eager"
        expected = conv(x, *arguments)
        conv.backend = BACKEND
        torch.testing.assert_close(conv(x, *arguments), expected, rtol=0, atol=1e-10)
        optimizer_step(conv)


def run_on_irreps(problem, conv):
    return conv(problem.x, problem.graph, problem.delta, problem.attributes)


@pytest.mark.parametrize("aggr", ["sum", "mean"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("irreps_in", ["4x0e + 3x1o", "70x0e + 60x1o"], ids=["few fields", "many fields"])
def test_layers_on_irreps(irreps_in, depthwise, dtype, bound, aggr):
    """Nodes without edges, nodes that many warps share, a bias: what kernels finish themselves."""
    conv = ImplicitPointConv(irreps_in, "2x0e + 1x1o", 1, aggr=aggr, width=1.0, depthwise=depthwise).to(dtype)
    if not depthwise:
        torch.nn.init.normal_(conv.bias)
    edges = random_edges(300, 40, 40)
    edges[1] = edges[1] % 30
    edges[1, 100:] = 7
    sizes = (40, conv.irreps_in.size), (300, 3), (300, 1)
    x, delta, attributes = (torch.randn(size, dtype=dtype) for size in sizes)
    problem = Problem(x, x, Graph(edges, 40), delta, attributes)

    found, known = (outcome(conv, problem, backend, run_on_irreps) for backend in (BACKEND, "reference"))
    assert_close(found, known, bound)


@pytest.mark.parametrize("aggr", ["sum", "mean"])
@pytest.mark.parametrize(
    ("irreps", "options"),
    [
        ("8x0e + 8x1o", {}),
        ("8x0e + 4x1o + 4x1e", {}),
        ("16x0e + 10x1o", {"activation": "silu"}),
        ("5x0e + 8x1o", {"n_channels": 16}),
        ("8x0e + 8x1o", {"table": 32, "edge_attr": 0}),
    ],
    ids=["8 fields", "products u x x", "16 fields", "16 channels", "a table"],
)
def test_gradients_from_sums_that_the_forward_pass_kept(irreps, options, aggr):
    """Nodes with many edges, some with none: 28 nodes of 450 edges, of which one has 150."""
    options = {"edge_attr": 1, "n_channels": 8} | options
    conv = ImplicitPointConv(irreps, irreps, n_layers=3, width=1.0, aggr=aggr, **options)
    edges = random_edges(450, 28, 28)
    edges[1] = edges[1] % 25
    edges[1, 300:] = 7
    sizes = (28, conv.irreps_in.size), (450, 3), (450, options["edge_attr"])
    x, delta, attributes = (torch.randn(size) for size in sizes)
    problem = Problem(x, x, Graph(edges, 28), delta, attributes if options["edge_attr"] else None)

    exact = "eager" if "table" in options else "reference"  # of splines, and of what they interpolate
    found, known = (outcome(conv, problem, backend, run_on_irreps) for backend in (BACKEND, exact))
    assert_close(found, known, 1e-5)


def test_sums_are_kept_for_nodes_with_many_edges():
    number = number_of(ImplicitPointConv("8x0e + 8x1o", "8x0e + 8x1o"))
    for degree, expected in ((15, False), (16, BACKEND == "cuda")):
        graph = Graph(torch.arange(4 * degree).expand(2, -1) % 4, 4)
        inputs = torch.randn(4, 32), torch.randn(4 * degree, 3), torch.empty(4 * degree, 0)
        for kept in (True, False):
            operator = torch.ops.implicit_steer.layer_forward_recorded
            *_, sums = operator(number.number, graph.number, *inputs, False, kept)
            assert (sums.numel() > 0) == (expected and kept)


# ---- between a call and its backward pass


def test_second_derivatives():
    conv = layer(replace(SMALL["o3"], nodes=3), activation="silu", backend=BACKEND)
    problem = replace(SMALL["o3"], nodes=3).inputs(conv)
    _, delta, _ = problem.requires_grad()
    found = {}
    for conv.backend in (BACKEND, "reference"):
        (force,) = torch.autograd.grad(problem.run(conv).square().sum(), delta, create_graph=True)
        leaves = dict(conv.named_parameters())
        grads = torch.autograd.grad(force.square().sum(), list(leaves.values()), materialize_grads=True)
        found[conv.backend] = dict(zip(leaves, grads, strict=True))
    assert_close(found[BACKEND], found["reference"], 1e-9)


def test_parameters_written_in_between_are_refused():
    conv = layer(SMALL["o3"], backend=BACKEND)
    out = SMALL["o3"].inputs(conv).run(conv)
    in_place(conv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_layer_can_be_bound_anew_in_between():
    conv = layer(SMALL["o3"], backend=BACKEND)
    problem = SMALL["o3"].inputs(conv)
    problem.run(conv).square().sum().backward()
    expected = weights_of(conv).grad
    out, weights = problem.run(conv), weights_of(conv)
    weights.grad = None
    weights.data = weights.data.clone()
    problem.run(conv)
    out.square().sum().backward()
    assert torch.equal(weights.grad, expected)


@of_cpu
def test_calls_of_several_threads():
    conv = layer(SMALL["o3"], backend=BACKEND)
    problem, found = SMALL["o3"].inputs(conv), []
    before = problem.run(conv).detach()

    def call():
        with torch.no_grad():
            found.extend(problem.run(conv) for _ in range(20))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(out, before) for out in found)


# ---- the operators


def number_of(conv):
    """The layer's, under which the native extension has it."""
    parameters = conv.implicit_kernel.parameters_for_op()
    kernel: BoundKernel = BACKENDS[BACKEND].bound(conv.implicit_kernel.plan, parameters.cache.native, parameters)
    return kernel.number()


def bound_call():
    """A layer, and the arguments of a call of its operators."""
    conv = layer(SMALL["o3"])
    problem, number = SMALL["o3"].inputs(conv), number_of(conv)
    return number, problem, (number.number, problem.graph.number, problem.x, problem.delta, problem.attributes)


def test_opcheck():
    """Fake tensors never reach these operators: they have no fake kernels."""
    number, problem, arguments = bound_call()
    operators, utils = torch.ops.implicit_steer, ("test_schema", "test_autograd_registration")
    out, packed, statistics, sums = operators.layer_forward_recorded(*arguments, False, True)
    calls = {
        operators.layer_forward: arguments,
        operators.layer_forward_recorded: (*arguments, True, True),
        operators.layer_backward: (
            arguments[0],
            problem.graph.number_by_source,
            *arguments[2:],
            packed,
            statistics,
            sums,
            torch.ones_like(out),
            *[True] * 4,
        ),
    }
    for operator, given in calls.items():
        assert set(opcheck(operator.default, given, test_utils=utils).values()) == {"SUCCESS"}
    del number


@pytest.mark.skipif(BACKEND != "cuda", reason="of CUDA kernels alone")
@pytest.mark.parametrize(
    ("irreps", "options", "expected"),
    [
        ("8x0e + 8x1o", {}, "exact kernels, second derivatives tiled kernels"),
        ("8x0e + 8x1o", {"n_layers": 7}, "exact kernels, second derivatives generic kernels"),
        ("16x0e + 16x1o", {}, "exact kernels"),
        ("8x0e + 8x1o", {"n_channels": 16}, "exact kernels, second derivatives generic kernels"),
        ("16x0e + 8x1o + 8x1e", {}, "exact kernels"),  # with products u x x
        ("8x0e + 4x1o + 4x1e", {"n_channels": 16}, "tiled kernels because of 16 hidden channels with the product"),
        ("8x0e + 4x1o + 4x1e", {"n_channels": 16, "table": 64}, "exact kernels"),
        ("8x0e + 8x1o", {"table": 64, "activation": "tanh"}, "exact kernels"),
        ("8x0e + 8x1o", {"table": 64, "n_channels": 12}, "generic kernels because of hidden layers of other than"),
        ("16x0e + 16x1o", {"n_channels": 16}, "tiled kernels because of too many scalars or vectors"),
        ("4x0e + 4x2e", {"n_channels": 16}, "hidden features of l > 3, second derivatives generic kernels"),
        ("4x0e + 4x2e", {"n_channels": 16, "n_layers": 5}, "hidden features of l > 3, backward generic kernels"),
        (
            "4x0e + 4x2e",
            {"n_channels": 16, "table": 64},
            "tiled kernels because of fields other than scalars and vectors",
        ),
        (
            "8x0e + 8x1o",
            {"n_channels": 16, "n_layers": 6},
            "forward exact kernels, backward tiled kernels",
        ),
        ("8x0e + 8x1o", {"n_channels": 16, "n_layers": 7}, "backward generic kernels because of layers too large"),
        ("17x0e + 17x1o", {}, "tiled kernels because of too many scalars or vectors"),
        ("27x0e + 27x1o", {}, "tiled kernels because of too many scalars or vectors"),
        ("64x0e + 64x1o", {"depthwise": True}, "tiled kernels because of too many scalars or vectors"),
        ("27x0e + 27x1o", {"n_channels": 9}, "wide kernels because of hidden layers of other than 8 or 16 channels"),
        ("64x0e + 64x1o", {"depthwise": True, "table": 64}, "tiled kernels because of too many scalars or vectors"),
        ("4x0e + 4x2e", {}, "tiled kernels because of hidden features of l > 3"),
        ("8x0e + 8x1o + 8x1e + 8x2e", {}, "tiled kernels because of hidden features of l > 3"),
        ("4x0e + 4x2e", {"n_layers": 5}, "hidden features of l > 3, second derivatives generic kernels"),
        ("27x0e + 27x1o", {"n_channels": 16}, "scalars or vectors, second derivatives wide kernels"),
        ("4x0e + 4x2e", {"n_layers": 9}, "hidden features of l > 3, backward generic kernels"),
        ("4x0e + 4x2e", {"n_layers": 80}, "cuda: generic kernels"),
        ("4x0e + 4x3o", {}, "generic kernels because of hidden features of l > 3"),
        ("4x0e + 4x1o", {"activation": "tanh"}, "generic kernels because of an activation other than ELU and SiLU"),
        ("4x0e + 4x1o", {"n_channels": 12}, "generic kernels because of hidden layers of other than 8 or 16 channels"),
    ],
)
def test_explain_names_the_kernels(irreps, options, expected):
    options = {"n_layers": 3, "n_channels": 8} | options
    conv = ImplicitPointConv(irreps, irreps, 1, backend=BACKEND, **options)
    assert expected in conv.explain()
    general = "wide" if is_wide(conv.implicit_kernel.plan) else "generic"
    assert general == "wide" or "wide" not in expected
    assert f"cuda: {general} kernels because of float64" in conv.double().explain()


@of_cpu
def test_packed_weights_are_kept():
    number, _, arguments = bound_call()
    packed = [torch.ops.implicit_steer.layer_forward_recorded(*arguments, False, True)[1] for _ in range(2)]
    assert packed[0].data_ptr() == packed[1].data_ptr()
    del number


def test_numbers_live_as_long_as_their_objects():
    number, problem, arguments = bound_call()
    assert torch.ops.implicit_steer.layer_forward(*arguments).isfinite().all()
    layer_number, graph_number = arguments[:2]
    del number
    gc.collect()
    with pytest.raises(RuntimeError, match=f"number: expected one that is bound, got {layer_number}"):
        torch.ops.implicit_steer.layer_forward(*arguments)
    other, _, others = bound_call()
    del problem
    gc.collect()
    with pytest.raises(RuntimeError, match=f"number: expected one that is bound, got {graph_number}"):
        torch.ops.implicit_steer.layer_forward(others[0], graph_number, *others[2:])
    del other


def test_copies_of_graphs_have_numbers_of_their_own():
    _, problem, _ = bound_call()
    assert copy.deepcopy(problem.graph).number != problem.graph.number


@pytest.mark.parametrize("wrong", ["x", "delta", "attr"])
def test_wrong_sizes_are_refused(wrong):
    number, _, arguments = bound_call()
    place = {"x": 2, "delta": 3, "attr": 4}[wrong]
    given = [t[:, :-1].contiguous() if k == place else t for k, t in enumerate(arguments)]
    with pytest.raises(RuntimeError, match=f"{wrong}: expected .* numbers"):
        torch.ops.implicit_steer.layer_forward(*given)
    del number
