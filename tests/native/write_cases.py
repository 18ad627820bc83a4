"""Writes the case files of the native tests: ``PYTHONPATH=.:tests/support python tests/native/write_cases.py DIR``;
those for the emulated CUDA kernels alone are in DIR/gpu.

A case file is a sequence of arrays, each a line of text ``name dtype size size ...\\n`` (one size per axis) followed by
the numbers, C order, little endian, and nothing else. dtype: int32, int64 or float64.

Inputs are what the native operators are called with, recorded. Expected results, always in float64, come from backend
`reference`: the output, the gradients of features, positions and attributes, and in training the batch norms'
statistics. The gradient of p, the vector of parameters that is packed, is compared along directions: p is linear in
each parameter θ of the layer, so with p₊ and p₋ recorded at θ ± v, ⟨∂L/∂p, (p₊ − p₋) / 2⟩ = ⟨∂L/∂θ, v⟩, the latter
from `reference`. Second derivatives are those of the output and of all gradients along one direction of everything.
"""

import copy
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from helpers import layer, outcome, random_edges, unchanged, with_edges
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_steer import EdgeTypes, Graph, irreps
from implicit_steer.layers.fields import values
from implicit_steer.ops.native.bound import BoundKernel
from implicit_steer.ops.select import BACKENDS
from implicit_steer.plan.moments import MEASURED
from implicit_steer.testing.cases import SMALL, Case, Problem

# Edges beyond the shell's reach are meant.
warnings.filterwarnings("ignore", message="edge_delta: the kernel's shell")

# No layer is bound under a number: the operators on tensors take everything that a case file holds.
BoundKernel.number = lambda kernel: None


@dataclass
class TypedProblem(Problem):
    """A problem whose edges have types in place of attributes."""

    types: EdgeTypes


class Recorder(TorchDispatchMode):
    """The arguments, by name, of every call of a native operator."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "implicit_steer":
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func._opname, dict(zip(names, args, strict=False))))
        return func(*args, **(kwargs or {}))

    def of(self, *names):
        """The arguments of the only call of one of these operators."""
        (found,) = (arguments for called, arguments in self.calls if called in names)
        return found


def run(problem, conv):
    """The layer's output; sources and targets may be different sets."""
    x = conv.in_type(problem.x, problem.pos), problem.graph.num_dst
    attributes = problem.types if isinstance(problem, TypedProblem) else problem.attributes
    return values(conv(x, problem.graph, problem.delta, attributes))


def flat(tensors):
    """All numbers as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def along_parameters(conv):
    """Name → a random direction of each parameter of the kernel."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, parameter in conv.implicit_kernel.named_parameters():
        found[name] = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return found


def directions(conv, problem, gradients):
    """Direction (n_parameters, n_packed) of what is packed along each parameter, slope (n_parameters,) of L."""
    parameters, steps, slopes = dict(conv.implicit_kernel.named_parameters()), [], []
    for name, v in along_parameters(conv).items():
        packed = []
        for sign in (1, -1):
            with torch.no_grad(), unchanged(conv), Recorder() as recorder:
                conv.backend = "cpu"
                parameters[name] += sign * v
                run(problem, conv)
                packed.append(flat(recorder.of("conv_pack", "conv_statistics")["parameters"]))
        steps.append((packed[0] - packed[1]) / 2)
        assert steps[-1].any(), name
        slopes.append((gradients[f"grad implicit_kernel.{name}"] * v).sum())
    return {"direction": torch.stack(steps), "slope": torch.stack(slopes)}


def second_order(conv, problem):
    """A direction of the inputs, "tangent_x" …; along it and all directions of the parameters at once, the derivatives
    of the output and of every gradient: "out_t", "grad_x_t" …, "slope_t"; from `reference`. Nothing depends on the
    numbers of types."""
    problem, v_parameters = copy.copy(problem), along_parameters(conv)
    inputs = dict(zip(("x", "delta", "attr"), problem.requires_grad(), strict=False))
    leaves = [*inputs.values(), *conv.implicit_kernel.parameters()]
    generator = torch.Generator().manual_seed(1)
    v_inputs = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in inputs.values()]
    with unchanged(conv):
        conv.backend = "reference"
        out = run(problem, conv)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).requires_grad_()
        gradients = torch.autograd.grad(out, leaves, weight, create_graph=True, materialize_grads=True)
        v = [*v_inputs, *v_parameters.values()]
        change = sum((g * t).sum() for g, t in zip(gradients, v, strict=True))
        of_out, *found = torch.autograd.grad(change, [weight, *leaves], materialize_grads=True)
    slopes = [(g * t).sum() for g, t in zip(found[len(inputs) :], v_parameters.values(), strict=True)]
    arrays = {"out_t": of_out, "slope_t": torch.stack(slopes)}
    arrays |= {f"tangent_{name}": t for name, t in zip(inputs, v_inputs, strict=True)}
    arrays |= {f"grad_{name}_t": g for name, g in zip(inputs, found, strict=False)}
    return arrays


def statistics(conv, delta, attributes):
    """Of every batch norm mean [W, n_trivial] and variance [W] over the edges."""
    kernel = conv.implicit_kernel
    parameters = kernel.parameters_for_op()
    _, found = BACKENDS["reference"].kernel(kernel.plan, parameters, MEASURED, delta, attributes)
    return flat(t for of_norm in found for t in of_norm)


def arrays_of(conv, problem):
    """Everything a case file holds, by name: in training "statistics", expected, else "running", those to be used."""
    if conv.bias is not None:
        torch.nn.init.zeros_(conv.bias)  # added outside the operator
    with Recorder() as recorder:
        outcome(conv, problem, "cpu", run)
    expected = outcome(conv, problem, "reference", run)
    assert expected["out"].norm() > 1e-3 or len(problem.delta) == 0  # a kernel of 0 would show nothing
    call = recorder.of("conv_gradients")
    arrays = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    del arrays["weights"]  # packed anew
    arrays["parameters"], running = flat(call["parameters"]), arrays.pop("statistics")
    if conv.training:
        arrays["statistics"] = statistics(conv, call["delta"], call["attr"])
    else:
        arrays["running"] = running
    arrays |= {"out": expected["out"], "grad_x": expected["grad x"], "grad_delta": expected["grad delta"]}
    nothing = torch.zeros_like(call["attr"])  # where there are no attributes, or types in their place
    arrays |= {"grad_attr": expected.get("grad attributes", nothing), "tangent_attr": nothing, "grad_attr_t": nothing}
    near = call["delta"].norm(dim=1).min() < 0.1 if len(call["delta"]) else False  # see conv_test.cpp
    arrays["near"] = torch.tensor([int(near)])
    return arrays | directions(conv, problem, expected) | second_order(conv, problem)


def write(path, arrays):
    """One case file."""
    with open(path, "wb") as file:
        for name, tensor in arrays.items():
            array = tensor.detach().numpy()
            file.write(f"{' '.join(map(str, (name, array.dtype, *array.shape)))}\n".encode())
            file.write(np.ascontiguousarray(array).tobytes())


# ---- the cases

WIDE = Case("wide", "O(3)", "9 scalar+vector", "11 scalar, 2 vector", "1 scalar", n_layers=2, n_channels=9)
# Whose T has more numbers than WidePlan::kMostSums of csrc/cuda/wide_plan.h.
WIDE_FIELDS = replace(WIDE, into="49 scalar+vector", out="3 scalar+vector")
# Of 8 channels, with more fields than exact kernels have, or of l = 2.
TILE_FIELDS = replace(WIDE_FIELDS, n_channels=8)
TILE = Case("tile", "O(3)", "8 scalar+l1+l2", "8 scalar+l1+l2", "1 scalar", n_layers=3, n_channels=8)


def on(problem, edges, sizes):
    """The problem with other edges between ``sizes`` nodes, everything else drawn again."""
    generator, (sources, _), e = torch.Generator().manual_seed(0), sizes, edges.shape[1]

    def normal(like, rows):
        return None if like is None else torch.randn(rows, like.shape[1], generator=generator, dtype=like.dtype)

    x, pos = normal(problem.x, sources), normal(problem.pos, sources)
    return Problem(x, pos, Graph(edges, sizes), normal(problem.delta, e), normal(problem.attributes, e))


def skewed_edges():
    """1000 edges, int32; the degrees of 60 targets fall from 250 to a few, some sources have none."""
    u = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    return torch.stack([(40 * u.roll(1) ** 2).int(), (60 * u**3).int()])


def skewed(problem):
    """The problem on skewed_edges."""
    return on(problem, skewed_edges(), (50, 60))


def near_origin(problem):
    """Edges that regular frames treat apart, among others: every third of about 1e-3, edge 0 of 0, and some that are
    near only in float."""
    problem.delta[::3] *= 1e-3
    problem.delta[1::12] *= 2e-2
    problem.delta[0] = 0
    return problem


def near_skewed(problem):
    """Both changes."""
    return near_origin(skewed(problem))


def short_edges(problem):
    """The problem with lengths from 0 to 0.2 side by side, around that at which regular frames change."""
    lengths = torch.linspace(0, 0.2, len(problem.delta), dtype=problem.delta.dtype)
    problem.delta = lengths[:, None] * torch.nn.functional.normalize(problem.delta)
    return problem


def short_edges_of_skewed(problem):
    """Both changes."""
    return short_edges(skewed(problem))


def all_near_origin(problem):
    """Only edges near the origin."""
    problem.delta *= 1e-3
    return problem


def hub(problem):
    """10,000 edges into one of 40 nodes, a few into the others."""
    edges = random_edges(10_200, 40, 40)
    edges[1, 100:10_100] = 7
    return on(problem, edges, (40, 40))


def few_targets(problem):
    """150 edges into 3 of 4 nodes."""
    numbers = torch.arange(150)
    return on(problem, torch.stack([numbers % 4, numbers % 3]), (4, 4))


def nodes(n, e):
    """The problem on n nodes with e random edges."""
    return lambda problem: on(problem, random_edges(e, n, n), (n, n))


def table(case, change=lambda problem: problem, rows=None, knots=9, **options):
    """A layer with splines in place of its hidden layers, for each of these rows of attributes, and its problem."""
    conv = layer(case, "eval", **options)
    problem = change(case.inputs(conv))
    if rows is not None:
        types = EdgeTypes(torch.arange(len(problem.delta)) % len(rows), rows)
        problem = TypedProblem(**vars(problem) | {"attributes": None}, types=types)
    return conv.freeze_table(rows, knots), problem


def depthwise(irreps_in, irreps_out, edges, configuration, **options):
    """A layer whose kernel acts channel by channel, without the map that mixes its outputs, and its problem."""
    generator, n = torch.Generator().manual_seed(0), int(edges.max()) + 1
    conv = irreps.ImplicitPointConv(irreps_in, irreps_out, 1, norm="batch", width=1.0, depthwise=True, **options)
    conv = conv.double().train(configuration == "train")
    conv.linear = None
    sizes = (n, conv.irreps_in.size), (n, 3), (edges.shape[1], 3), (edges.shape[1], 1)
    x, pos, delta, attributes = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return conv, Problem(x, pos, Graph(edges, n), delta, attributes)


def radius(r):
    """The problem with every other edge of that length."""

    def change(problem):
        problem.delta[::2] = r * torch.nn.functional.normalize(problem.delta[::2])
        return problem

    return change


CLOUD = Case("cloud", "O(3)", "8 scalar+vector", "8 scalar+vector", "1 scalar", n_layers=3, n_channels=8)
TYPES = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)  # rows of attributes


def with_layer(change, case="o3", configuration="eval", activation="silu", **options):
    """A layer and a changed problem."""
    case = SMALL.get(case, case)
    conv = layer(case, configuration, activation=activation, **options)
    return conv, change(case.inputs(conv))


def no_edges(problem):
    return with_edges(problem, slice(0))


def tile_cases():
    """Fields of l <= 2, or many; wide ones are those whose T has more than WidePlan::kMostSums numbers."""
    cloud_wide = replace(CLOUD, into="64 scalar+vector")
    tile_l2 = replace(TILE_FIELDS, into="20 scalar+l1+l2", out="2 scalar+l2")
    tile_odd = replace(TILE, into="5 scalar+l1+l2, 2 l1", out="7 scalar, 3 l2, 1 l1", attributes="2 scalar", n_layers=4)
    tile_so3 = replace(tile_odd, space="SO(3)", into="3 scalar+l1+l2", n_layers=3)
    tile_channels = replace(CLOUD, into="12 scalar+vector", out="17 scalar, 3 vector", n_channels=16)
    tile_l2_channels = replace(TILE, into="3 scalar+l1+l2", out="2 scalar, 3 l2", n_channels=16)
    tile_scalars = replace(TILE, into="11 scalar", out="4 scalar+l1+l2", attributes=None, n_layers=2)
    wide_planar = replace(WIDE_FIELDS, space="SO(2) on R2", into="70 scalar+vector", out="2 scalar+vector")
    wide_dense = replace(WIDE_FIELDS, space="C4 on R2", into="40 regular", out="2 regular", attributes="1 vector")
    return {
        "tile": with_layer(nodes(16, 512), TILE, "no norm", "elu"),
        "tile-fields": with_layer(nodes(16, 512), cloud_wide, "no norm", "elu"),
        "tile-one-edge": with_layer(nodes(5, 1), TILE_FIELDS, width=1.0),
        "tile-no-edges": with_layer(no_edges, TILE_FIELDS),
        "tile-hub": with_layer(few_targets, TILE_FIELDS),
        "tile-isolated-nodes": with_layer(nodes(300, 90), tile_odd),
        "tile-near": with_layer(lambda problem: near_origin(nodes(7, 60)(problem)), tile_l2, "eval", cutoff=2.0),
        "tile-short-edges-train": with_layer(short_edges_of_skewed, tile_odd, "train"),
        "tile-so3-train": with_layer(near_skewed, tile_so3, "train", "elu"),
        "tile-scalars": with_layer(skewed, tile_scalars, "eval", width=1.0),
        "tile-l2-channels-train": with_layer(near_skewed, tile_l2_channels, "train"),
        "tile-to-l2-train": with_layer(near_skewed, replace(TILE, into="3 scalar, 9 l1"), "train", "elu"),
        "tile-channels-train": with_layer(short_edges_of_skewed, tile_channels, "train"),
        "tile-table": table(replace(TILE, into="9 scalar+l1+l2", attributes=None), near_skewed, cutoff=2.0),
        "tile-table-types": table(tile_channels, nodes(65, 300), TYPES),
        "wide": with_layer(nodes(16, 512), cloud_wide, "no norm", "tanh"),
        "wide-one-edge": with_layer(nodes(5, 1), WIDE_FIELDS),
        "wide-no-edges": with_layer(no_edges, WIDE_FIELDS),
        "wide-hub": with_layer(few_targets, WIDE_FIELDS),
        "wide-planar": with_layer(nodes(7, 60), wide_planar, "train", "tanh"),
        "wide-dense": with_layer(nodes(7, 60), wide_dense),
        "wide-table": table(WIDE_FIELDS, nodes(7, 60), TYPES),
    }


def grid_cases():
    """Hidden channels on the authors' grid."""

    def grid(change, case=CLOUD, configuration="no norm", activation="elu", **options):
        return with_layer(change, case, configuration, activation, sampling="escnn", **options)

    odd = replace(CLOUD, into="5 scalar+vector, 2 vector", out="7 scalar, 3 vector", attributes="2 scalar", n_layers=4)
    one_layer = replace(CLOUD, into="3 scalar, 1 vector", out="4 scalar, 1 vector", attributes=None, n_layers=2)
    return {
        "grid": grid(nodes(16, 512)),
        "grid-one-edge": grid(nodes(5, 1)),
        "grid-no-edges": grid(no_edges),
        "grid-isolated-nodes": grid(nodes(300, 90)),
        "grid-skewed": grid(skewed),
        "grid-odd-sizes-train": grid(near_skewed, odd, "train", "silu", cutoff=2.0),
        "grid-short-edges-train": grid(short_edges_of_skewed, CLOUD, "train", "silu"),
        "grid-one-layer": grid(skewed, one_layer, "eval", width=1.0),
    }


def cloud_cases():
    """Scalars and vectors with exact sampling, or a table."""
    cloud_fields = replace(CLOUD, into="16 scalar+vector", out="16 scalar+vector")
    cloud_channels = replace(CLOUD, n_channels=16)
    cloud_so3 = replace(CLOUD, space="SO(3)", into="7 scalar+vector, 1 vector", out="5 scalar+vector", n_layers=4)
    so3_fields = replace(cloud_so3, into="12 scalar+vector, 1 vector", out="9 scalar+vector", n_layers=3)
    so3_channels = replace(cloud_so3, n_layers=3, n_channels=16)
    # Hidden features of fewer degrees than the kernels have.
    from_scalars, to_scalars = replace(CLOUD, into="8 scalar"), replace(CLOUD, out="5 scalar", attributes="2 scalar")
    scalars = replace(CLOUD, into="6 scalar", out="4 scalar")
    return {
        "cloud": with_layer(nodes(16, 512), CLOUD, "no norm", "elu"),
        "cloud-one-edge": with_layer(nodes(5, 1), CLOUD, "no norm", "elu"),
        "cloud-no-edges": with_layer(no_edges, CLOUD, "no norm", "elu"),
        "cloud-isolated-nodes": with_layer(nodes(300, 90), CLOUD, "no norm", "elu"),
        "cloud-hub": with_layer(hub, CLOUD, "no norm", "elu"),
        "cloud-short-edges-train": with_layer(short_edges_of_skewed, CLOUD, "train"),
        "cloud-from-scalars-train": with_layer(short_edges_of_skewed, from_scalars, "train", "elu"),
        "cloud-to-scalars": with_layer(near_origin, to_scalars),
        "cloud-scalars-train": with_layer(near_skewed, scalars, "train"),
        "cloud-channels": with_layer(nodes(16, 512), cloud_channels, "no norm", "elu"),
        "cloud-channels-short-edges-train": with_layer(short_edges_of_skewed, cloud_channels, "train"),
        "cloud-fields": with_layer(nodes(16, 512), cloud_fields, "no norm", "elu"),
        "cloud-fields-short-edges-train": with_layer(short_edges_of_skewed, cloud_fields, "train"),
        "cloud-so3": with_layer(near_origin, cloud_so3, "train", "elu"),
        "cloud-so3-fields": with_layer(short_edges_of_skewed, so3_fields, "train"),
        "cloud-table": table(replace(CLOUD, attributes=None), nodes(16, 512), None, 256, activation="silu"),
        "cloud-table-hub": table(CLOUD, hub, TYPES),
        "cloud-table-so3": table(replace(so3_channels, attributes=None), near_skewed),
        "cloud-table-so3-fields": table(so3_fields, short_edges_of_skewed, TYPES, cutoff=2.0),
        "cloud-one-layer": with_layer(
            skewed, replace(CLOUD, into="4 scalar+vector", out="3 scalar, 2 vector", n_layers=2)
        ),
    }


def gpu_cases():
    """More kinds of layers and graphs, for the emulated CUDA kernels."""
    return {
        **tile_cases(),
        **grid_cases(),
        **cloud_cases(),
        "one-edge": with_layer(nodes(5, 1), width=1.0),
        "1-node": with_layer(nodes(1, 40)),
        "65-nodes": with_layer(nodes(65, 300)),
        "130-nodes": with_layer(nodes(130, 500), "so2"),
        "hub": with_layer(hub),
        "radius-0": with_layer(radius(0), "o3-l2"),
        "radius-1e-6": with_layer(radius(1e-6), "o3-l2"),
    }


def cases():
    """Name → layer, problem: all frames, all activations, with and without batch statistics, kinds of graph; tables."""

    def made(case, configuration="eval", change=lambda problem: problem, **options):
        case = SMALL.get(case, case)
        conv = layer(case, configuration, **options)
        return conv, change(case.inputs(conv))

    sizes = {"n_layers": 3, "n_channels": 8}  # that CUDA kernels are specialised for
    specialised = Case("specialised", "O(3)", "6 scalar+vector", "3 scalar+vector", "2 scalar", **sizes)
    specialised_l2 = Case("specialised-l2", "O(3)", "2 scalar+vector+l2", "2 scalar+l2", "1 scalar", **sizes)
    specialised_deep = replace(specialised, n_layers=4)
    specialised_odd = replace(specialised_deep, into="5 scalar+vector, 2 vector")
    many_channels = replace(specialised, into="5 scalar+vector", n_channels=16)
    many_fields = replace(specialised, into="9 scalar+vector", out="1 scalar, 9 vector", attributes=None)

    specialised_grid = replace(specialised, attributes="1 scalar")
    many_table = replace(specialised, into="8 scalar+vector", attributes="1 scalar")
    wide_out = replace(WIDE_FIELDS, into="45 scalar+vector, 7 vector", out="20 scalar, 2 vector", n_channels=11)
    wide_irreps = "140x0e + 40x1o", "1x0e + 1x1o"
    plain = {name: replace(SMALL[name], attributes=None) for name in ("o3-l2", "so2")}
    rows = torch.tensor([[0.3], [-1.2], [0.9]], dtype=torch.float64)

    return {
        "grid-odd": made(specialised_grid, "eval", nodes(6, 40), sampling="escnn"),
        "zonal": made("o3"),
        "zonal-wide": made(WIDE),
        "zonal-specialised": made(specialised, "no norm", skewed),
        "zonal-specialised-short-edges": made(specialised_deep, "eval", short_edges_of_skewed),
        "tile-l2-train": made(specialised_l2, "train", near_skewed),
        "zonal-specialised-channels": made(many_channels, "eval", lambda problem: short_edges(nodes(3, 12)(problem))),
        "zonal-specialised-fields": made(many_fields, "eval", lambda problem: short_edges(nodes(3, 12)(problem))),
        "zonal-specialised-odd": made(specialised_odd, activation="silu", cutoff=2.0),
        "zonal-odd-sizes-train": made("o3-mixed", "train", activation="gelu"),
        "zonal-cutoff": made("o3-l2", activation="silu", cutoff=1.5),
        "zonal-near-origin": made("o3-l2", "no norm", near_origin),
        "zonal-near-origin-train": made("o3", "train", near_skewed, activation="gelu"),
        "zonal-all-near-origin": made("o3", "eval", all_near_origin, activation="silu"),
        "depthwise": depthwise(
            "5x0e + 3x1o + 2x2e", "1x0e + 1x1o + 1x1e", skewed_edges(), "eval", n_layers=2, n_channels=3
        ),
        "tile-depthwise-train": depthwise("9x0e + 9x1o", "1x0e + 1x1o", random_edges(60, 9, 9), "train"),
        "depthwise-exact": depthwise("4x0e + 3x1o", "1x0e + 1x1o", random_edges(60, 9, 9), "eval"),
        "wide-train": made(wide_out, "train", lambda problem: short_edges(nodes(9, 60)(problem))),
        "wide-depthwise": depthwise(*wide_irreps, random_edges(40, 9, 9), "train", n_layers=2, n_channels=9),
        "planar": made("o2", activation="tanh"),
        "planar-axis-train": made("so2-r3", "train", activation="silu"),
        "planar-dense-train": made("so2-mixed", "train"),
        "planar-near-origin": made("so2", "eval", near_skewed),
        "planar-cylinder-near-origin-train": made("full-cylinder-r3", "train", near_origin),
        "none-grid-cutoff": made("o3-vector-attr", cutoff=2.0, activation="relu"),
        "none-no-attributes": made("trivial-r3", activation="tanh"),
        "dense": made("d4"),
        "dense-train": made("c4", "train"),
        "linear": made("o3-linear"),
        "table": table(plain["o3-l2"], near_skewed, activation="silu"),
        "table-planar": table(plain["so2"], skewed),
        "table-types": table(WIDE, near_skewed, rows, cutoff=2.0),
        "zonal-specialised-table": table(many_table, near_skewed, rows, cutoff=2.0),
        "zonal-specialised-table-fields": table(many_fields, nodes(3, 12), activation="silu"),
        "tile-table-fields": table(replace(many_fields, into="17 scalar+l1+l2"), nodes(3, 40)),
        "table-blocks": table(SMALL["o3"], nodes(100, 2500), rows, 4),
        "no-edges": made("o3", "eval", lambda problem: with_edges(problem, slice(0))),
        "isolated-nodes": made("o3", "eval", lambda problem: on(problem, random_edges(150, 30, 400), (30, 400))),
        "skewed": made("o3", "eval", skewed),
        "skewed-train": made("so2", "train", skewed),
        "blocks-train": made("o3", "train", nodes(100, 2500)),  # of csrc/cpu/blocks.h: four of them
        "blocks-many-nodes": made("so2", "no norm", nodes(1500, 1500)),
        "blocks-dense": made("c4", "eval", nodes(60, 2500)),
    }


def main():
    for subfolder, made in (("", cases()), ("gpu", gpu_cases())):
        folder = Path(sys.argv[1]) / subfolder
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.case"):
            stale.unlink()
        for name, (conv, problem) in made.items():
            write(folder / f"{name}.case", arrays_of(conv, problem))


if __name__ == "__main__":
    main()
