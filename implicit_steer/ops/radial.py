"""Radial inputs of edges in plain PyTorch, and the attributes that the MLP reads: the radial ones, then the given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graph import EdgeTypes
from ..plan import Bessel, Cosines, Plan, Radial
from .kernel_mlp import safe_norm

_SERIES_TERMS = 10  # of sin(z) / z below z = 1, where they leave less than float64's rounding


def radial_values(radial: Radial, delta: Tensor) -> Tensor:
    """(E, radial.size): the functions of r = |delta| for edge vectors delta (E, dim), in their dtype.

    Differentiable any number of times; at r = 0 the derivatives of even functions are right, those of r are 0.
    """
    if isinstance(radial, Cosines):
        return _cosines(radial, delta)
    if isinstance(radial, Bessel):
        return _bessel(radial, delta)
    return safe_norm(delta)[:, None]


def _multiples(radial: Cosines | Bessel, delta: Tensor) -> Tensor:
    """(n,): k π, k = 1 … n."""
    return math.pi * torch.arange(1, radial.n + 1, dtype=delta.dtype, device=delta.device)


def _cosines(radial: Cosines, delta: Tensor) -> Tensor:
    """√2 cos(k π u), u = √(|delta / cutoff|² + ε²): the cosines change by ε², far below rounding, and no derivative
    divides by 0."""
    softening = torch.finfo(delta.dtype).eps ** 2
    length = ((delta / radial.cutoff).square().sum(1, keepdim=True) + softening).sqrt()
    return math.sqrt(2) * torch.cos(_multiples(radial, delta) * length)


def _bessel(radial: Bessel, delta: Tensor) -> Tensor:
    """√(2 / cutoff) (k π / cutoff) sin(z) / z, z = k π |delta| / cutoff; below z = 1 by its series in z², because the
    derivatives of the quotient lose their digits there."""
    multiples = _multiples(radial, delta)
    squared = (delta / radial.cutoff).square().sum(1, keepdim=True) * multiples.square()  # z²
    near = squared < 1
    small, z = torch.where(near, squared, 0), torch.where(near, 1, squared).sqrt()
    series = torch.ones_like(small)
    for j in range(_SERIES_TERMS - 1, 0, -1):
        series = 1 - small / (2 * j * (2 * j + 1)) * series
    return math.sqrt(2 / radial.cutoff) / radial.cutoff * multiples * torch.where(near, series, z.sin() / z)


def edge_attributes(plan: Plan, delta: Tensor, attributes: Tensor | EdgeTypes) -> Tensor:
    """(E, A), the attributes that the frame of ``plan`` counts, in the dtype of delta (E, dim): the radial inputs, then
    those that are given for each edge or for its type."""
    if isinstance(attributes, EdgeTypes):
        attributes = attributes.to(delta.dtype).attributes()
    elif attributes.dtype != delta.dtype:
        attributes = attributes.to(delta.dtype)
    return attributes if plan.radial is None else torch.cat([radial_values(plan.radial, delta), attributes], 1)
