"""The operators as citizens of PyTorch: opcheck, torch.compile, torch.export, torch.func, autocast."""

import contextlib
import copy
import io
from dataclasses import replace

import escnn
import pytest
import torch
from escnn.nn import GeometricTensor
from helpers import BACKENDS, arguments_of, function_of, layer
from operators import operator_arguments
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from implicit_steer.nn import ImplicitConv
from implicit_steer.testing.cases import SMALL

CASES = ["o3", "so2-r3", "c4"]  # zonal, planar, dense coupling


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- opcheck


def test_every_operator_is_checked():
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "implicit_steer" in name
    }
    # Triton's, where a test has imported them, are those of tests/gpu/test_operators.py; instruments of the tests and
    # the bench; facts of a plan; a question to a device; those of test_bound_layers.py
    names = {name for name in names if not name.startswith("triton_")}
    others = {"fma_peak", "lane_function", "cuda_shared_bytes", "cuda_kernel_kind", "cuda_probe"}
    bound = {"bind_layer", "release_layer", "bind_graph", "release_graph"}
    bound |= {"layer_forward", "layer_forward_recorded", "layer_backward"}
    assert set(operator_arguments()) == names - others - bound


@pytest.mark.parametrize("name", operator_arguments())
def test_opcheck(name):
    results = opcheck(getattr(torch.ops.implicit_steer, name).default, operator_arguments()[name])
    assert set(results.values()) == {"SUCCESS"}


# ---- torch.compile


def gradients(run, conv, problem):
    """Output, then gradients in inputs and parameters; the layer's buffers are put back."""
    before = copy.deepcopy(conv.state_dict())
    leaves = [*problem.requires_grad(), *conv.parameters()]
    out = run(*arguments_of(problem))
    found = [out, *torch.autograd.grad(out.square().sum(), leaves), *map(torch.clone, conv.buffers())]
    conv.load_state_dict(before)
    return found


@pytest.mark.parametrize("configuration", ["train", "eval", "no norm"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_without_a_break_and_once_for_all_sizes(name, configuration):
    """The first call compiles for its sizes, the second for all, none after that."""
    conv = layer(SMALL[name], configuration)
    run, counter = function_of(conv), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for nodes in (12, 15, 23, 40):
        problem = replace(SMALL[name], nodes=nodes).inputs(conv)
        for a, b in zip(gradients(compiled, conv, problem), gradients(run, conv, problem), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 2


@pytest.mark.parametrize("aggr", ["sum", "mean"])
def test_inductor(aggr):
    conv = layer(SMALL["o3"], "no norm", torch.float32, aggr=aggr)
    run, problem = function_of(conv), SMALL["o3"].inputs(conv)
    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(gradients(compiled, conv, problem), gradients(run, conv, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_graph_made_inside():
    conv = layer(SMALL["o3"])
    run, problem = function_of(conv), SMALL["o3"].inputs(conv)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, pos, graph, *rest = arguments_of(problem)
    torch.testing.assert_close(compiled(x, pos, graph.edge_index, *rest), problem.run(conv), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="edge_index: expected indices of nodes"):
        compiled(x, pos, graph.edge_index + 1, *rest)


def test_forces_inside_a_compiled_function():
    conv = layer(SMALL["o3"], "no norm", activation="silu")
    problem = SMALL["o3"].inputs(conv)

    def energy_and_forces(x, pos, graph, attributes):
        pos = pos.detach().requires_grad_()
        delta = pos[graph.dst] - pos[graph.src]
        out = conv(GeometricTensor(x, conv.in_type, pos), graph, delta, attributes).tensor
        energy = out.square().sum()
        return energy.detach(), -torch.autograd.grad(energy, pos)[0]

    arguments = problem.x, problem.pos, problem.graph, problem.attributes
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(energy_and_forces, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(compiled, energy_and_forces(*arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compiled_grid_convolution():
    gspace = escnn.gspaces.rot2dOnR2(-1, maximum_frequency=2)
    fields = gspace.type(gspace.trivial_repr, gspace.irrep(1))
    conv = ImplicitConv(fields, fields, None, kernel_size=3, n_layers=2, n_channels=4).double().eval()
    x = torch.randn(2, fields.size, 6, 6, dtype=torch.float64)

    def run(x):
        return conv(GeometricTensor(x, fields)).tensor

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x), rtol=0, atol=0)


# ---- torch.export


class Exported(torch.nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x, pos, edge_index, delta, attributes):
        x = GeometricTensor(x, self.conv.in_type, pos)
        return self.conv(x, edge_index, delta, attributes).tensor


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_export_and_back(name, strict):
    """Through a file, to another number of nodes and edges."""
    conv = layer(SMALL[name])
    module = Exported(conv).eval()
    nodes, edges = torch.export.Dim("nodes", min=2), torch.export.Dim("edges", min=2)

    def inputs(problem):
        return problem.x, problem.pos, problem.graph.edge_index, problem.delta, problem.attributes

    given = inputs(SMALL[name].inputs(conv))
    sizes = ({0: nodes}, {0: nodes}, {1: edges}, {0: edges}, None if given[-1] is None else {0: edges})
    program = torch.export.export(module, given, dynamic_shapes=sizes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = inputs(replace(SMALL[name], nodes=31).inputs(conv))
    torch.testing.assert_close(loaded(*other), module(*other), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_export_leaves_nothing_behind(backend):
    """Plain PyTorch's tables, first asked for under export, are none of the tracer's stand-ins for the calls after it;
    also where export fails, as `eager`'s does: it counts edges."""
    case = replace(SMALL["c4"], n_channels=len(backend))  # of no other test: its tables are not there yet
    conv = layer(case, backend=backend)
    problem = case.inputs(conv)
    given = problem.x, problem.pos, problem.graph.edge_index, problem.delta, problem.attributes
    with contextlib.suppress(GuardOnDataDependentSymNode):
        torch.export.export(Exported(conv).eval(), given, strict=False)
    out = Exported(conv)(*given)
    conv.backend = "cpu"
    torch.testing.assert_close(out, Exported(conv)(*given), rtol=0, atol=1e-13)  # measured: 4e-15


# ---- torch.func


def test_functional_call():
    conv = layer(SMALL["o3"])
    problem, scaled = SMALL["o3"].inputs(conv), copy.deepcopy(conv)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(1.1)
    parameters = {name: 1.1 * p for name, p in conv.named_parameters()}
    out = torch.func.functional_call(conv, parameters, problem.arguments(conv)).tensor
    torch.testing.assert_close(out, problem.run(scaled), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_an_ensemble_of_weights(name):
    conv = layer(SMALL[name])
    problem = SMALL[name].inputs(conv)
    scales = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64)
    stacked = {n: torch.stack([s * p.detach() for s in scales]).requires_grad_() for n, p in conv.named_parameters()}

    def member(parameters):
        return torch.func.functional_call(conv, parameters, problem.arguments(conv)).tensor

    together = torch.func.vmap(member)(stacked)
    single = torch.stack([member({n: p[k] for n, p in stacked.items()}) for k in range(len(scales))])
    torch.testing.assert_close(together, single, rtol=0, atol=0)
    leaves = list(stacked.values())
    gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (together, single))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_other_transforms_are_refused(transform):
    conv = layer(SMALL["o3"], backend="cpu")
    problem = SMALL["o3"].inputs(conv)

    def loss(x):
        return replace(problem, x=x).run(conv).square().sum()

    with pytest.raises(RuntimeError, match=r"Use torch\.autograd\.grad"):
        transform(loss)(problem.x)
    with pytest.raises(Exception, match=r"Use torch\.func outside of compiled functions"):
        torch.compile(transform(loss), fullgraph=True, backend="aot_eager")(problem.x)


@pytest.mark.parametrize("name", ["x", "delta", "attributes", "weights"])
def test_forward_mode_is_refused(name):
    """Of every input and parameter, also where nothing requires gradients."""
    conv = layer(SMALL["o3"]).requires_grad_(False)
    problem, ad = SMALL["o3"].inputs(conv), torch.autograd.forward_ad
    with ad.dual_level():
        assert problem.run(conv).isfinite().all()
        if name == "weights":
            linear = conv.implicit_kernel.mlp.mlp[0]
            values = {"implicit_kernel.mlp.mlp.0.weights": ad.make_dual(linear.weights, linear.weights)}
            call = lambda: torch.func.functional_call(conv, values, problem.arguments(conv))  # noqa: E731
        else:
            value = getattr(problem, name)
            call = lambda: replace(problem, **{name: ad.make_dual(value, value)}).run(conv)  # noqa: E731
        with pytest.raises(RuntimeError, match="backend: expected one with forward-mode derivatives, got 'cpu'"):
            call()


# ---- checkpointing, autocast


def test_checkpoint():
    conv = layer(SMALL["o3"], "no norm")
    problem = SMALL["o3"].inputs(conv)
    leaves = [*problem.requires_grad(), *conv.parameters()]

    def run(x, delta):
        return replace(problem, x=x, delta=delta).run(conv)

    again = checkpoint(run, problem.x, problem.delta, use_reentrant=False)
    gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (again, problem.run(conv)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("configuration", ["train", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, configuration):
    """The layer keeps its own precision, and the dtype of its features."""
    conv = layer(SMALL["o3"], configuration, torch.float32, backend=backend)
    problem, before = SMALL["o3"].inputs(conv), copy.deepcopy(conv.state_dict())

    def results(problem):
        conv.load_state_dict(before)
        out = problem.run(conv)
        return [
            out,
            *torch.autograd.grad(out.square().sum(), list(conv.parameters())),
            *map(torch.clone, conv.buffers()),
        ]

    expected = results(problem)
    with torch.autocast("cpu", torch.bfloat16):
        halved = replace(problem, x=problem.x.bfloat16()).run(conv)
        found = results(problem)
        kernel = conv.implicit_kernel(problem.delta, problem.attributes)
    assert torch.equal(found[0], expected[0])
    for a, b in zip(found, expected, strict=True):
        # A backward pass of plain PyTorch that runs inside takes products in bfloat16. Measured: 0.012.
        bound = 0.0 if backend == "cpu" else 0.05
        torch.testing.assert_close(a, b, rtol=0, atol=bound * b.abs().max().item())
    assert (halved.dtype, kernel.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(halved.float(), expected[0], rtol=0.03, atol=0.03)  # bfloat16 keeps 8 bits


def test_autocast_of_a_compiled_layer():
    conv = layer(SMALL["o3"], "no norm", torch.float32)
    run, problem = function_of(conv), SMALL["o3"].inputs(conv)
    compiled, expected = torch.compile(run, fullgraph=True, backend="aot_eager"), problem.run(conv)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*arguments_of(problem)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_an_ensemble_in_training(backend):
    """Batch norms with the statistics of each member, which move its own running ones."""
    conv = layer(SMALL["o3"], "train")
    conv.backend, problem = backend, SMALL["o3"].inputs(conv)
    scales = torch.tensor([0.9, 1.1], dtype=torch.float64)
    parameters = {n: torch.stack([s * p.detach() for s in scales]) for n, p in conv.named_parameters()}
    names = [n for n, _ in conv.named_buffers() if n.endswith(("_mean", "_var", "_tracked"))]
    kept = {n: torch.stack([conv.get_buffer(n)] * 2) for n in names}

    def member(parameters, buffers):
        return torch.func.functional_call(conv, parameters | buffers, problem.arguments(conv)).tensor

    together = torch.func.vmap(member)(parameters, kept)
    for k in range(2):
        own = {n: conv.get_buffer(n).clone() for n in names}
        alone = member({n: p[k] for n, p in parameters.items()}, own)
        torch.testing.assert_close(together[k], alone, rtol=1e-12, atol=1e-12)
        for n in names:
            torch.testing.assert_close(kept[n][k], own[n], rtol=1e-12, atol=1e-12)


def test_transforms_of_eager():
    conv = layer(SMALL["o3"], backend="eager")
    problem = SMALL["o3"].inputs(conv)

    def loss(x):
        return replace(problem, x=x).run(conv).square().sum()

    x = problem.x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(problem.x), torch.autograd.grad(loss(x), x)[0])
