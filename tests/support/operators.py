"""Arguments for every native operator."""

import torch
from helpers import layer

from implicit_steer.ops.native.bound import BoundKernel
from implicit_steer.ops.table import Tabulation
from implicit_steer.plan.tabulated import with_table
from implicit_steer.testing.cases import SMALL


def operator_arguments():
    """Name → arguments of every native operator, with gradients where it has them."""
    conv = layer(SMALL["o3"])
    problem, parameters = SMALL["o3"].inputs(conv), conv.implicit_kernel.parameters_for_op()
    bound = BoundKernel(conv.implicit_kernel.plan, parameters.cache.native, parameters)
    with torch.no_grad():
        statistics, packed = bound.packed()
    graph, plan, arrays = problem.graph, bound.plan, bound.arrays

    def leaf(t):
        return t.detach().clone().requires_grad_()

    weights, x, delta, attr = map(leaf, (packed, problem.x, problem.delta, problem.attributes))
    fixed = [t.detach() for t in (weights, x, delta, attr)]
    edges, by_source = (graph.src, graph.order, graph.rowptr), (graph.order_by_source, graph.colptr)
    grad = torch.randn(graph.num_dst, plan.out_size, dtype=torch.float64)
    grad_h = torch.randn(len(delta), plan.hidden_size, dtype=torch.float64)
    directions = [torch.randn_like(t) for t in fixed]
    matrix, learned = bound.matrix, [leaf(t) for t in bound.learned]
    values, samples = [t.detach() for t in learned], torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    bias = bound.expansion, leaf(bound.bias)
    table = Tabulation(with_table(plan, 8, 0.5), parameters)
    splines = table.splines(1, parameters)
    knots = tuple(t.detach() for t in table.knots(fixed[1])[1:])
    n_knots, channels = len(knots[1]), (plan.hidden_size - 1) // plan.field_size
    at_knots = torch.randn(2 * n_knots, plan.hidden_size, dtype=torch.float64)
    of_splines = torch.randn(2 * (n_knots - 1) * channels * knots[1].shape[1], dtype=torch.float64)
    sizes = splines.plan.table.n_coefficients, splines.plan.field_size + 4 * len(plan.frame.order)
    two_kinds = torch.randperm(8), [2, 1], [2, 4]  # 2 fields of 2 coordinates, the first invariant; 1 of 4

    def per_kind(*shapes):
        return [torch.rand(shape, dtype=torch.float64) for shape in shapes]

    norm = (
        *two_kinds,
        per_kind((2, 2), (0, 4)),  # means
        per_kind((2, 1), (1, 1)),
        per_kind((2, 1), (1, 1)),
        per_kind((2, 1), (0,)),
        per_kind((2, 1), (0,)),
        1e-5,
    )
    return {
        "conv_forward": (*arrays, weights, x, delta, attr, *edges, *bias, True, plan.out_size, 0),
        "conv_backward": (*arrays, weights, x, delta, attr, *edges, leaf(grad), *by_source, *[True] * 4, 0),
        "conv_double_backward": (*arrays, *fixed, *edges, grad, *by_source, *directions, *[True] * 5, 0),
        "conv_hidden": (*arrays, weights, delta, attr, plan.hidden_size, 0),
        "conv_hidden_backward": (*arrays, weights, delta, attr, leaf(grad_h), 0),
        "conv_hidden_double_backward": (*arrays, fixed[0], *fixed[2:], grad_h, directions[0], *directions[2:], 0),
        "conv_pack": (*arrays, *matrix, learned, statistics),
        "conv_pack_backward": (*arrays, *matrix, statistics, leaf(packed), sum(t.numel() for t in learned)),
        "conv_gradients": (
            *arrays,
            *matrix,
            values,
            statistics,
            *fixed,
            *edges,
            grad,
            *by_source,
            bias[0],
            True,
            *[True] * 4,
            0,
        ),
        "conv_statistics": (*arrays, *matrix, values, *fixed[2:], *bound.native.statistics_shape, 0),
        "conv_moments": (*arrays, *fixed[:1], *fixed[2:], 1, plan.norms[1].channels * 16, 0),
        "conv_move_running": (
            statistics.view(2, -1),
            [torch.randn(n, 16, dtype=torch.float64) for n in (4, 4)],
            [torch.rand(n, 1, dtype=torch.float64) for n in (4, 4)],
            [torch.tensor(3), torch.tensor(3)],
            torch.tensor([[15], [15]]),
            [0.1, 0.1],
        ),
        "table_sums": (*splines.cache.native.arrays[torch.float64], fixed[2], fixed[3][:, :0].contiguous(), *sizes, 0),
        "table_splines": (leaf(at_knots), *knots, channels),
        "table_splines_backward": (leaf(of_splines), *knots, channels, plan.hidden_size),
        "same_values": (values, torch.cat([t.reshape(-1) for t in values])),
        "sort_by_key": (graph.src, graph.num_src),
        "edges_in_range": (graph.edge_index, graph.num_src, graph.num_dst),
        "field_statistics": (fixed[1][:, :8].contiguous(), *two_kinds, per_kind((2, 2), (0,))),
        "field_norm": (fixed[1][:, :8].contiguous(), *norm),
        "field_norm_backward": (*[fixed[1][:, :8].contiguous()] * 2, *norm),
        "fourier_forward": (x, *samples, 0, 0),
        "fourier_backward": (leaf(x), x, *samples, 0, 0),
    }
