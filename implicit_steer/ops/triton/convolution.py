"""The convolution by kernels: out, its gradients, and the batch statistics of its hidden features; none of them
differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dense, launch_contract, launch_edges, launch_mlp, launch_pack, launch_spline
from .launch_contract import Edges, Factors
from .launch_mlp import LayerInputs
from .launch_pack import PackingOnDevice
from .prepared import Prepared


class Learned(NamedTuple):
    """What the weights are made of: the tensors of ``learned_tensors``; mean and variance of every batch norm."""

    tensors: Sequence[Tensor]
    statistics: Sequence[Tensor]
    measured: bool  # whether a call measured the statistics: means (W, n_trivial); else norms keep them: (W, d)

    def numbers(self) -> Tensor:
        """All of them in one tensor."""
        return torch._C._nn.flatten_dense_tensors([*self.tensors, *self.statistics])


class Saved(NamedTuple):
    """What the forward pass saves for the gradients, rows being edges sorted by target."""

    numbers: Tensor  # parameters and statistics
    packed: Tensor  # weights of the hidden layers, and behind them Θ
    q: Tensor  # (E, n_harmonics)
    r: Tensor  # (E, n_columns)


class Points(NamedTuple):
    """The edges' geometry, in their own order."""

    delta: Tensor  # (E, dim)
    attr: Tensor  # (E, A), in frame coordinates
    order: Tensor  # (E,) the edge of each row


def packing_of(p: Prepared, learned: Learned) -> PackingOnDevice:
    """How these tensors are packed."""
    key = learned.measured, *(t.numel() for t in learned.tensors)
    if (found := p.made.get(key)) is None:
        arguments = p.tables.plan, key[1:], learned.measured, p.position.device, p.dtype
        p.made[key] = found = launch_pack.prepare_packing(*arguments)
    return found


def _frame(p: Prepared, points: Points, shell: Tensor, weights: Tensor) -> tuple[LayerInputs, Tensor]:
    inputs, radius, factor, q = launch_mlp.frame_forward(p, *points, shell)
    return LayerInputs(inputs, radius, factor, weights), q


def _hidden(p: Prepared, points: Points, shell: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """q (E, n_harmonics) and r (E, n_columns)."""
    if p.sizes.n_knots:
        return launch_spline.forward(p, points, shell, weights)
    if p.sizes.edge_by_edge:
        return launch_edges.forward(p, points, shell, weights, p.sizes.n_layers, True)
    given, q = _frame(p, points, shell, weights)
    return q, launch_mlp.layers_forward(p, given) if p.sizes.n_layers else _linear(given)


def _linear(given: LayerInputs) -> Tensor:
    """r without hidden layers."""
    return torch.cat([given.inputs * given.factor[:, None], given.factor[:, None]], 1)


def _coefficients(p: Prepared, points: Points, shell: Tensor, weights: Tensor, n_layers: int) -> tuple[Tensor, Tensor]:
    """q, and the hidden coefficients (E, n_zero + n_rest) of layer ``n_layers`` − 1."""
    if p.sizes.edge_by_edge:
        return launch_edges.forward(p, points, shell, weights, n_layers, False)
    given, q = _frame(p, points, shell, weights)
    return q, launch_mlp.hidden_coefficients(p, given, n_layers)


def _hidden_backward(
    p: Prepared, points: Points, shell: Tensor, weights: Tensor, d_q: Tensor, d_r: Tensor, d_weights: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of delta and attr, and parts of that of the shell's width, from those of q and r; those of the weights
    are written to ``d_weights``."""
    if p.sizes.n_knots:
        return launch_spline.backward(p, points, shell, weights, d_q, d_r, d_weights)
    if p.sizes.edge_by_edge:
        return launch_edges.backward(p, points, shell, weights, d_q, d_r, d_weights)
    given, _ = _frame(p, points, shell, weights)
    found = launch_mlp.layers_backward(p, given, d_r, d_weights) if p.sizes.n_layers else _of_linear(given, d_r)
    return launch_mlp.frame_backward(p, *points, shell, (*found, d_q))


def _theta(p: Prepared, packed: Tensor, first: int) -> Tensor:
    """Θ (n_t, C_out) among the packed weights, or its gradient among theirs, which begins at ``first``."""
    size = p.sizes.out_size
    return packed.as_strided((p.sizes.n_t, size), (size, 1), packed.storage_offset() + first)


def forward(
    p: Prepared, x: Tensor, points: Points, edges: Edges, learned: Learned, numbers: Tensor | None = None
) -> tuple[Tensor, Saved]:
    """Σ_{e: j→i} K(x_e, a_e) f_j (N, C_out), and what its gradients need; ``numbers`` as in :class:`Saved`, unless they
    are yet to be made."""
    packing = packing_of(p, learned)
    numbers = learned.numbers() if numbers is None else numbers
    packed = launch_pack.packed(p, packing, numbers)
    q, r = _hidden(p, points, learned.tensors[packing.shell[0]], packed)
    total = launch_contract.contract_forward(p, Factors(True, x, q, r, _theta(p, packed, packing.layers_end)), edges)
    return total, Saved(numbers, packed, q, r)


def gradients(
    p: Prepared,
    grad: Tensor,
    x: Tensor,
    points: Points,
    edges: Edges,
    learned: Learned,
    saved: Saved,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """From the gradient of the sums those of x, delta, attr and all learned tensors (n_parameters,); where ``needs``
    says that one is not needed, it is empty."""
    packing, (need_x, need_delta, need_attr, need_learned) = packing_of(p, learned), needs
    need_geometry = need_delta or need_attr or need_learned
    d_packed = d_weights = d_theta = None
    if need_learned:
        d_packed = grad.new_empty(packing.gradients_end + p.sizes.n_t * p.sizes.out_size)
        d_weights, d_theta = d_packed[: packing.gradients_end], _theta(p, d_packed, packing.gradients_end)
    factors = Factors(True, x, saved.q, saved.r, _theta(p, saved.packed, packing.layers_end))
    need = (need_x, need_geometry and p.sizes.n_harmonics > 0, need_geometry)
    d_x, d_q, d_r = launch_contract.contract_backward(p, grad, factors, edges, need, d_theta)
    d_delta = d_attr = d_learned = grad.new_empty(0)
    if need_geometry:
        shell, d_q = learned.tensors[packing.shell[0]], d_q if p.sizes.n_harmonics else saved.q
        d_delta, d_attr, d_shell = _hidden_backward(p, points, shell, saved.packed, d_q, d_r, d_weights)
    if d_packed is not None:
        d_learned = launch_pack.parameter_gradients(p, packing, saved.numbers, d_packed)
        torch.sum(d_shell, 0, keepdim=True, out=d_learned[packing.shell[1] : packing.shell[1] + 1])
    return d_x, d_delta, d_attr, d_learned


def _of_linear(given: LayerInputs, d_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of inputs, radius and factor from that of r, without hidden layers."""
    of_factor = (d_r[:, :-1] * given.inputs).sum(1) + d_r[:, -1]
    return (d_r[:, :-1] * given.factor[:, None]).contiguous(), given.radius, of_factor


def moments(p: Prepared, points: Points, learned: Learned, n: int) -> Tensor:
    """(2, d, W): mean over the edges of the hidden features of batch norm n, and sum of squared deviations from it;
    the statistics of the norms before it are given."""
    packing = packing_of(p, learned)
    packed = launch_pack.packed(p, packing, learned.numbers())
    q, y = _coefficients(p, points, learned.tensors[packing.shell[0]], packed, n + 1)
    return dense.feature_moments(p, y, q)
