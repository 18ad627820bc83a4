"""Where the checks run, on which backends, and problems of a size for it: on a GPU, or with Triton's interpreter, which
gets through small ones in some seconds."""

import copy
from dataclasses import replace

import helpers
import torch

from implicit_steer.ops.triton import backend as triton
from implicit_steer.plan.packing import pack
from implicit_steer.testing.cases import SMALL

INTERPRETED = triton.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BACKENDS = ["triton"] if INTERPRETED else ["cuda", "triton"]

_WIDE = ("o3-l2", "o3-mixed", "so3-mixed", "so2-mixed", "octa-r3", "cone-r3", "cylinder-r3", "full-cylinder-r3")


def small(name):
    """The case on a graph of that size."""
    if INTERPRETED:
        return replace(SMALL[name], nodes=2 if name in _WIDE else 4, degree=4)
    return replace(SMALL[name], nodes=67, degree=9)


def layer(*arguments, **options):
    """helpers.layer, on the device."""
    return helpers.layer(*arguments, **options).to(DEVICE)


def outcome(conv, problem, backend, **options):
    """helpers.outcome for the loss |out|² / 2: gradients whose terms do not cancel, on graphs of any size."""
    return helpers.outcome(conv, problem, backend, weight=torch.clone, **options)


def expected(conv, problem, **options):
    """What `reference` has in float64 on the processor, rounded to the problem's dtype."""
    exact = copy.copy(problem)
    for name in ("x", "pos", "delta", "attributes"):
        if getattr(problem, name) is not None:
            setattr(exact, name, getattr(problem, name).cpu().double())
    exact.graph = problem.graph.to("cpu")
    found = outcome(copy.deepcopy(conv).cpu().double(), exact, "reference", **options)
    return {k: v.to(problem.x.dtype) if v.is_floating_point() else v for k, v in found.items()}


def triton_arguments(case, leaves=True):
    """Name → arguments of every operator of Triton's kernels, with gradients where it has them."""
    from implicit_steer.ops.triton import dense, operators  # which import triton
    from implicit_steer.ops.triton.prepared import prepare

    conv = layer(case, "no norm", activation="silu")
    problem, kernel = case.inputs(conv), conv.implicit_kernel
    plan, graph = kernel.plan, problem.graph
    key, prepared = operators.register_plan(plan), prepare(plan, DEVICE, torch.float64)

    def leaf(t):
        return t.detach().clone().requires_grad_(leaves)

    ops = torch.ops.implicit_steer
    with torch.no_grad():
        weights = pack(plan, kernel.parameters_for_op(), fold=True)
        frame = problem.delta, problem.attributes, graph.order, weights.shell_width
        inputs, radius, factor, q = ops.triton_frame(key, *frame)
        packed, theta = dense.pack_layers(prepared, weights.linears), dense.pack_theta(prepared, weights.theta)
        r = ops.triton_layers(key, inputs, radius, factor, packed)
    delta, attr, order, shell = frame
    frame = leaf(delta), leaf(attr), order, leaf(shell)
    hidden = tuple(map(leaf, (inputs, radius, factor, packed)))
    edges = graph.src[graph.order], graph.rowptr, graph.order, graph.order_by_source, graph.colptr
    sums = *map(leaf, (problem.x, q, r, theta)), *edges, True
    gradients = [leaf(torch.randn_like(t)) for t in (inputs, radius, factor, q)]
    output = torch.randn(graph.num_dst, plan.out_size, dtype=torch.float64, device=DEVICE)
    return {
        "triton_frame": (key, *frame),
        "triton_frame_backward": (key, *frame, *gradients),
        "triton_layers": (key, *hidden),
        "triton_layers_backward": (key, *hidden, leaf(torch.randn_like(r)), True, True),
        "triton_contract": (key, *sums),
        "triton_contract_backward": (key, *sums, leaf(output), [True] * 4),
        "triton_hidden": (key, inputs, radius, factor, packed, 1),
    }
