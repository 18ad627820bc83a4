"""The operators of the Triton kernels as citizens of torch."""

import fake_cuda
import pytest
import torch
from problems import DEVICE, INTERPRETED, layer
from torch.library import opcheck

from implicit_steer.ops.triton import dense, operators
from implicit_steer.ops.triton.prepared import prepare
from implicit_steer.plan.packing import pack
from implicit_steer.testing.cases import Case

TINY = Case("", "SO(2) on R2", "1 vector", "1 scalar", "1 scalar", 2, 2, nodes=2, degree=2)


def arguments_of(case, leaves=True):
    """Name → arguments of every operator, with gradients where it has them."""
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


@pytest.mark.parametrize("name", operators._KERNELS)
def test_opcheck(name):
    """torch.compile has no derivatives of gradients: of gradient operators those are not traced."""
    known = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    differentiated = "backward" not in name or "contract" in name
    operator, arguments = getattr(torch.ops.implicit_steer, name).default, arguments_of(TINY)[name]
    opcheck(operator, arguments, test_utils=known if differentiated else known[:3])
    if INTERPRETED:
        fake_cuda.check(operator, arguments, differentiated)


def test_unknown_plan():
    with pytest.raises(ValueError, match="plan: expected the digest"):
        torch.ops.implicit_steer.triton_frame("?", *torch.ones(4, 1, 1, device=DEVICE).unbind())
