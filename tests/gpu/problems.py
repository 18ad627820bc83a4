"""Where the checks run, on which backends, and problems of a size for it: on a GPU; on the processor with Triton's
interpreter, which gets through small ones in some seconds, or with the emulated kernels of `cuda`."""

import copy
from dataclasses import replace

import helpers
import torch

from implicit_steer import _native
from implicit_steer.ops.triton import backend as triton
from implicit_steer.ops.triton.handle import handle_of
from implicit_steer.plan.packing import learned_tensors
from implicit_steer.plan.tabulated import tabulated, with_table
from implicit_steer.testing.cases import SMALL

INTERPRETED, EMULATED = triton.interpreted(), bool(_native.ON_PROCESSOR)
DEVICE = torch.device("cpu" if INTERPRETED or EMULATED else "cuda")
BACKENDS = ["triton"] if INTERPRETED else ["cuda"] if EMULATED else ["cuda", "triton"]

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
    from implicit_steer.ops.triton import convolution  # which imports triton
    from implicit_steer.ops.triton.prepared import prepare

    conv = layer(case, "eval", activation="silu")
    problem, kernel = case.inputs(conv), conv.implicit_kernel
    plan, graph, parameters = kernel.plan, problem.graph, kernel.parameters_for_op()
    key, prepared = handle_of(plan).key, prepare(plan, DEVICE, torch.float64)

    def leaf(t):
        return t.detach().clone().requires_grad_(leaves)

    edges = graph.src, graph.order, graph.rowptr, graph.order_by_source, graph.colptr
    learned = [t.detach() for t in learned_tensors(parameters)]
    statistics = [t for norm in parameters.norms for t in (norm.mean, norm.var)]
    inputs = problem.x, problem.delta, problem.attributes
    with torch.no_grad():
        total, *saved = torch.ops.implicit_steer.triton_conv(key, *inputs, learned, statistics, False, *edges)
    packing = convolution.packing_of(prepared, convolution.Learned(learned, statistics, False))
    theta = saved[1][packing.layers_end :].view(-1, plan.out_size)
    sums = *map(leaf, (problem.x, *saved[2:], theta)), *edges, True
    output, n = torch.randn_like(total), len(problem.delta)
    values, weights = torch.randn(n, 3, device=DEVICE).double(), torch.randn(n, 4, device=DEVICE).double()
    first = torch.arange(n, dtype=torch.int32, device=DEVICE) % 5
    return {
        "triton_conv": (key, *map(leaf, inputs), [leaf(t) for t in learned], statistics, False, *edges),
        "triton_conv_backward": (key, *inputs, learned, statistics, False, *edges, *saved, output, [True] * 4),
        "triton_moments": (key, *inputs[1:], learned, statistics, False, graph.order, 0),
        "triton_knot_sums": (handle_of(tabulated(with_table(plan, 5, 1.0), 1)).key, values, weights, first),
        "triton_contract": (key, *sums),
        "triton_contract_backward": (key, *sums, leaf(output), [True] * 4),
    }
