"""The pointwise nonlinearities φ, their derivatives, and the difference quotient (φ(b + k) − φ(b)) / k."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class _Activation(NamedTuple):
    value: Callable[[Tensor], Tensor]  # φ
    prime: Callable[[Tensor], Tensor]  # φ′
    second: Callable[[Tensor], Tensor]  # φ″; at a kink its limit from below
    kinked: bool  # φ or φ′ has a kink at 0


def _silu_prime(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _silu_second(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 - s) * (2 + u * (1 - 2 * s))


def _normal_density(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _gelu_prime(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * _normal_density(u)


def _exp_below(u: Tensor, above: float) -> Tensor:
    """exp(u) for u ≤ 0, else ``above``."""
    return torch.where(u > 0, torch.full_like(u, above), torch.exp(u.clamp(max=0)))


def _tanh_second(u: Tensor) -> Tensor:
    t = torch.tanh(u)
    return -2 * t * (1 - t.square())


_TABLE: dict[str, _Activation] = {
    "elu": _Activation(F.elu, lambda u: _exp_below(u, 1.0), lambda u: _exp_below(u, 0.0), True),
    "relu": _Activation(F.relu, lambda u: (u > 0).to(u.dtype), torch.zeros_like, True),
    "silu": _Activation(F.silu, _silu_prime, _silu_second, False),
    "gelu": _Activation(F.gelu, _gelu_prime, lambda u: (2 - u * u) * _normal_density(u), False),
    "tanh": _Activation(torch.tanh, lambda u: 1 - torch.tanh(u).square(), _tanh_second, False),
}

# Below this |k| the quotient is the mean of φ′ over [b, b + k] by 4-point Gauss quadrature (error ~ 6e-10 k⁸ φ⁽⁹⁾),
# above it the plain quotient (error ~ eps / k).
SMALL = {torch.float32: 0.5, torch.float64: 0.05}
_NODES, _WEIGHTS = (v.tolist() for v in np.polynomial.legendre.leggauss(4))


def phi(name: str, u: Tensor) -> Tensor:
    """φ(u)."""
    return _TABLE[name].value(u)


def phi_prime(name: str, u: Tensor) -> Tensor:
    """φ′(u)."""
    return _TABLE[name].prime(u)


def phi_second(name: str, u: Tensor) -> Tensor:
    """φ″(u); at a kink its limit from below."""
    return _TABLE[name].second(u)


def difference_quotient(name: str, b: Tensor, k: Tensor) -> Tensor:
    """(φ(b + k) − φ(b)) / k to full relative precision, φ′(b) at k = 0; differentiable in b and k."""
    value, prime, _, kinked = _TABLE[name]
    direct = k.abs() > SMALL[k.dtype]
    if kinked:
        direct = direct | (((b < 0) != (b + k < 0)) & (k != 0))
    k_far = torch.where(direct, k, torch.ones_like(k))
    k_near = torch.where(direct, torch.zeros_like(k), k)
    mean = sum(w / 2 * prime(b + k_near * ((1 + t) / 2)) for t, w in zip(_NODES, _WEIGHTS, strict=True))
    return torch.where(direct, (value(b + k_far) - value(b)) / k_far, mean)
