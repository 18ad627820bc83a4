"""Products, and the nonlinearities φ with two derivatives and their difference quotient, as in
``implicit_steer/plan/activations.py``.

All arguments are values in registers: u samples, b and k start and step of a difference quotient (u₀ and r w of
layers.py). FN is the function's place in ``plan.FUNCTIONS``. Comparisons are such that NaN passes through.

Of the numbers 0.707… is 1 / √2 and 0.398… is 1 / √(2 π), both of gelu; 0.069…, 0.330…, 0.669… and 0.930… are the nodes
of 4-point Gauss quadrature on [0, 1], 0.173… and 0.326… the weights of the outer and of the inner two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...plan import FUNCTIONS

ELU, RELU, SILU, GELU = (tl.constexpr(FUNCTIONS.index(name)) for name in ("elu", "relu", "silu", "gelu"))  # else tanh


@triton.jit
def dot(a, b, PREC: tl.constexpr):
    """a b in their own type."""
    return tl.dot(a, b, input_precision=PREC, out_dtype=a.dtype)


@triton.jit
def add_dot(acc, a, b, PREC: tl.constexpr):
    """acc + a b."""
    return tl.dot(a, b, acc, input_precision=PREC, out_dtype=a.dtype)


@triton.jit
def sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def tanh(u):
    t = tl.exp(-2.0 * tl.abs(u))
    t = (1.0 - t) / (1.0 + t)
    return tl.where(u < 0, -t, t)


@triton.jit
def value(u, FN: tl.constexpr):
    """φ."""
    if FN == ELU:
        return tl.where(u <= 0, tl.exp(tl.where(u <= 0, u, 0.0)) - 1.0, u)
    elif FN == RELU:
        return tl.where(u <= 0, 0.0, u)
    elif FN == SILU:
        return u * sigmoid(u)
    elif FN == GELU:
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    else:
        return tanh(u)


@triton.jit
def slope(u, FN: tl.constexpr):
    """φ′."""
    if FN == ELU:
        return tl.where(u > 0, 1.0, tl.exp(tl.where(u > 0, 0.0, u)))
    elif FN == RELU:
        return tl.where(u > 0, 1.0, 0.0 * u)
    elif FN == SILU:
        s = sigmoid(u)
        return s * (1.0 + u * (1.0 - s))
    elif FN == GELU:
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    else:
        t = tanh(u)
        return 1.0 - t * t


@triton.jit
def curvature(u, FN: tl.constexpr):
    """φ″."""
    if FN == ELU:
        return tl.where(u > 0, 0.0, tl.exp(tl.where(u > 0, 0.0, u)))
    elif FN == RELU:
        return 0.0 * u
    elif FN == SILU:
        s = sigmoid(u)
        return s * (1.0 - s) * (2.0 + u * (1.0 - 2.0 * s))
    elif FN == GELU:
        return (2.0 - u * u) * tl.exp(-0.5 * u * u) * 0.3989422804014327
    else:
        t = tanh(u)
        return -2.0 * t * (1.0 - t * t)


@triton.jit
def is_direct(b, k, FN: tl.constexpr, SMALL: tl.constexpr):
    """Where (φ(b + k) − φ(b)) / k itself is accurate; elsewhere it is the mean of φ′ over [b, b + k]."""
    direct = tl.abs(k) > SMALL
    if (FN == ELU) | (FN == RELU):  # a kink at 0
        direct = direct | (((b < 0) != (b + k < 0)) & (k != 0))
    return direct


@triton.jit
def quotient(b, k, FN: tl.constexpr, SMALL: tl.constexpr):
    """(φ(b + k) − φ(b)) / k, φ′(b) at k = 0; the mean of φ′ by 4-point Gauss quadrature."""
    direct = is_direct(b, k, FN, SMALL)
    far, near = tl.where(direct, k, 1.0), tl.where(direct, 0.0, k)
    mean = 0.17392742256872692 * (slope(b + 0.06943184420297371 * near, FN) + slope(b + 0.9305681557970262 * near, FN))
    mean += 0.32607257743127305 * (slope(b + 0.33000947820757187 * near, FN) + slope(b + 0.6699905217924281 * near, FN))
    return tl.where(direct, (value(b + far, FN) - value(b, FN)) / far, mean)


@triton.jit
def quotient_slopes(b, k, q, FN: tl.constexpr, SMALL: tl.constexpr):
    """Derivatives of the quotient q with respect to b and k."""
    direct = is_direct(b, k, FN, SMALL)
    far, near = tl.where(direct, k, 1.0), tl.where(direct, 0.0, k)
    outer_low = 0.17392742256872692 * curvature(b + 0.06943184420297371 * near, FN)
    outer_high = 0.17392742256872692 * curvature(b + 0.9305681557970262 * near, FN)
    inner_low = 0.32607257743127305 * curvature(b + 0.33000947820757187 * near, FN)
    inner_high = 0.32607257743127305 * curvature(b + 0.6699905217924281 * near, FN)
    of_b = outer_low + outer_high + inner_low + inner_high
    of_k = 0.06943184420297371 * outer_low + 0.9305681557970262 * outer_high
    of_k += 0.33000947820757187 * inner_low + 0.6699905217924281 * inner_high
    end = slope(b + far, FN)
    return tl.where(direct, (end - slope(b, FN)) / far, of_b), tl.where(direct, (end - q) / far, of_k)
