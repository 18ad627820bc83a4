"""The initial weights of a kernel, drawn so that every component, hidden or of the output, has unit variance.

In the limit of many channels the values u of a hidden field at the samples are Gaussian, with a covariance that the
layer's weights set; so the second moments of the components after the activation, ``A⁻ E[φ(u) φ(u)ᵀ] A⁻ᵀ``, are
integrals over two variables. Weights that read a component are divided by the root of its second moment.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layers.kernel import ImplicitKernel, LinearParameters
from ..plan import Activation, Plan
from ..plan.activations import phi

_NODES = 64  # of the Gauss-Hermite quadrature in each variable
_NOTHING = 1e-6  # a coefficient with a smaller second moment is always 0


def draw_weights(kernel: ImplicitKernel, width: float) -> None:
    """Draw the weights of a kernel on irreps so that the message of an edge of length ``width``, without the shell and
    the cutoff, has components of unit variance, if its features and attributes have.

    Biases are 0, except in the first layer of a kernel without attributes, whose scalars come from biases alone.
    """
    plan = kernel.plan
    linears = [cast(LinearParameters, layer) for layer in kernel.linears]
    for layer, deviation in zip(linears, weight_deviations(plan, width), strict=True):
        draw(layer.weights, deviation)
    if not plan.frame.n_attributes and linears[0].bias is not None:
        ones = np.ones(len(linears[0].bias))
        draw(linears[0].bias, ones if plan.linears else _last_deviations(plan, "bias", ones))


def draw(parameter: Tensor, deviation: NDArray[np.float64]) -> None:
    """Fill a parameter (n,) with normal values of these standard deviations; on "meta" there is nothing to fill."""
    if not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * torch.from_numpy(deviation).to(parameter))


def weight_deviations(plan: Plan, width: float) -> list[NDArray[np.float64]]:
    """The standard deviation of every weight, layer by layer."""
    if not plan.linears:  # K is linear in x, of mean square width² / 3 per component, and in the attributes
        return [_last_deviations(plan, "weights", np.array([1.0, width**2 / 3]))]
    channels, n = plan.activations[0].channels, plan.frame.n_attributes
    components = 2.0 * plan.frame.order + 1
    deviations = [
        np.concatenate([np.full(channels, np.sqrt(3) / width), np.full(channels * n, 1 / np.sqrt(max(n, 1)))])
    ]
    variances = (plan.frame.order < 2).astype(float)  # of a component of each degree, before the activation
    for act in plan.activations:
        moments = _second_moments(act, variances * components)
        if plan.norms:  # a norm leaves a mean square of 1 over all components
            moments *= components.sum() / moments.sum()
        moments /= components
        moments[moments < _NOTHING] = 1
        deviations.append(np.tile(1 / np.sqrt(channels * moments), channels * channels))
        variances = np.ones(len(components))
    return [*deviations[:-1], _last_deviations(plan, "weights", moments)]


def _second_moments(act: Activation, variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """E[y_l²] of ``y = A⁻ φ(A z)`` for independent Gaussian z_l of these variances."""
    covariance = (act.samples * variances) @ act.samples.T
    deviation = np.sqrt(np.diag(covariance))
    correlation = np.clip(covariance / np.outer(deviation, deviation), -1, 1)[..., None, None]
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights /= weights.sum()
    # u and u' = ρ u + √(1 − ρ²) v, u and v independent: (S, 1, nodes, 1), (S, S, nodes, nodes)
    first = deviation[:, None, None, None] * nodes[:, None]
    second = deviation[:, None, None] * (correlation * nodes[:, None] + np.sqrt(1 - correlation**2) * nodes)
    values = [phi(act.function, torch.from_numpy(u)).numpy() for u in (first, second)]
    products = np.einsum("qaij,qpij,i,j->qp", values[0], values[1], weights, weights, optimize=True)
    return np.einsum("lq,qp,lp->l", act.inverse, products, act.inverse)


def _last_deviations(plan: Plan, parameter: str, moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard deviations of the last layer's weights or biases: each of the n parameters that reach a component
    adds 1 / n to its variance. ``moments``: the second moment of a hidden component, by degree. Biases count where they
    are drawn."""
    drawn = ("weights",) if plan.linears or plan.frame.n_attributes else ("weights", "bias")
    deviations, elements = np.zeros(plan.n_last[parameter == "bias"]), np.zeros(plan.out_size)
    for c in plan.couplings:
        if c.parameter in drawn:
            elements[c.out_start] += c.row.shape[1] * len(c.hidden_start) * len(c.basis)
    for c in plan.couplings:
        if c.parameter == parameter:
            per_path = np.array([1 / np.sqrt(moments[_degree(plan, b)]) for b in c.basis])
            of_field = np.sqrt(1 / elements[c.out_start])
            deviations[c.theta_positions] = per_path * of_field[:, None, None, None]  # [u, v, w, b]
    return deviations


def _degree(plan: Plan, intertwiner: NDArray[np.float64]) -> int:
    """The degree of the hidden components that B (o, i, m) reads."""
    read = int(np.flatnonzero(intertwiner.any((0, 1)))[0])
    if plan.linears:
        return 0 if intertwiner.shape[2] == 1 else int(plan.frame.degrees[read])
    return int(intertwiner.shape[2] == 3)  # the position; else an attribute or the constant
