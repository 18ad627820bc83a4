"""Spherical harmonics and Clebsch-Gordan coefficients of SO(3), in e3nn's basis.

A vector is (x, y, z). The polar axis is y, and the azimuth runs from z to x, so that the harmonics of degree 1 are
(x, y, z) themselves; the order within a degree is m = −l … l.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, perm, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Polynomial = dict[tuple[int, int, int], float]  # powers of x, y, z → coefficient


def degrees(highest: int) -> NDArray[Any]:
    """((L + 1)²,) the degree of every harmonic up to L."""
    return np.repeat(np.arange(highest + 1), 2 * np.arange(highest + 1) + 1)


@lru_cache(maxsize=16)
def solid_harmonics(highest: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The solid harmonics r^l Y_lm of degrees 0 … L, scaled to Σ_m Y_lm² = 1 on the unit sphere.

    Returns:
        powers (n_monomials, 3) of x, y, z, and coefficients ((L + 1)², n_monomials); both read-only.
    """
    powers = [(i, j, n - i - j) for n in range(highest + 1) for i in range(n, -1, -1) for j in range(n - i, -1, -1)]
    column = {power: k for k, power in enumerate(powers)}
    rows = [_solid_harmonic(degree, m) for degree in range(highest + 1) for m in range(-degree, degree + 1)]
    coefficients = np.zeros((len(rows), len(powers)))
    for row, polynomial in enumerate(rows):
        for power, value in polynomial.items():
            coefficients[row, column[power]] = value
    found = np.array(powers), coefficients
    for array in found:
        array.flags.writeable = False
    return found


def _solid_harmonic(degree: int, m: int) -> _Polynomial:
    """r^l Y_lm = N Π_l^|m|(y, r²) · Re or Im of (z + i x)^|m|: Im for m < 0.

    Π_l^m = Σ_k (−1)^k 2^−l C(l, k) C(2 l − 2 k, l) (l − 2 k)! / (l − 2 k − m)! r^2k y^(l − 2 k − m), and
    N² = (2 − δ_m0) (l − m)! / (l + m)!.
    """
    order, found = abs(m), {}
    norm = sqrt((2 - (m == 0)) * factorial(degree - order) / factorial(degree + order))
    for k in range((degree - order) // 2 + 1):
        along = (-1) ** k * comb(degree, k) * comb(2 * degree - 2 * k, degree) * perm(degree - 2 * k, order) / 2**degree
        for (i, j), around in _azimuthal(order, imaginary=m < 0):
            for (a, b, c), radial in _squared_radius(k):
                power = (i + a, degree - 2 * k - order + b, j + c)
                found[power] = found.get(power, 0.0) + norm * along * around * radial
    return {power: value for power, value in found.items() if value}


def _azimuthal(order: int, imaginary: bool) -> Iterator[tuple[tuple[int, int], int]]:
    """((power of x, power of z), coefficient) of Re or Im of (z + i x)^order."""
    for i in range(int(imaginary), order + 1, 2):
        yield (i, order - i), (-1) ** (i // 2) * comb(order, i)


def _squared_radius(k: int) -> Iterator[tuple[tuple[int, int, int], int]]:
    """Powers and coefficients of (x² + y² + z²)^k."""
    for a in range(k + 1):
        for b in range(k - a + 1):
            yield (2 * a, 2 * b, 2 * (k - a - b)), comb(k, a) * comb(k - a, b)


@lru_cache(maxsize=1024)
def clebsch_gordan(first: int, second: int, third: int) -> NDArray[Any]:
    """C (2 l₁ + 1, 2 l₂ + 1, 2 l₃ + 1), the invariant tensor of degrees l₁, l₂, l₃, with norm 1 and the sign of e3nn's
    ``wigner_3j``; read-only.

    Raises:
        ValueError: l₃ < |l₁ − l₂| or l₃ > l₁ + l₂, where there is none.
    """
    if not abs(first - second) <= third <= first + second:
        raise ValueError(f"There is no invariant tensor of degrees {first}, {second} and {third}.")
    q1, q2, q3 = (_complex_harmonics(degree) for degree in (first, second, third))
    tensor = np.einsum(
        "ij,kl,mn,ikn->jlm", q1, q2, q3.conj().T, _complex_coefficients(first, second, third), optimize=True
    ).real
    tensor[np.abs(tensor) < 1e-14] = 0  # structural zeros
    tensor /= np.linalg.norm(tensor)
    tensor.flags.writeable = False
    return tensor


def _complex_harmonics(degree: int) -> NDArray[Any]:
    """(2 l + 1, 2 l + 1): how complex spherical harmonics (rows) consist of real ones, up to the factor (−i)^l, which
    makes the coefficients real."""
    q = np.zeros((2 * degree + 1, 2 * degree + 1), dtype=complex)
    q[degree, degree] = 1
    for m in range(1, degree + 1):
        q[degree - m, [degree + m, degree - m]] = 1 / sqrt(2), -1j / sqrt(2)
        q[degree + m, [degree + m, degree - m]] = (-1) ** m / sqrt(2), 1j * (-1) ** m / sqrt(2)
    return (-1j) ** degree * q


def _complex_coefficients(first: int, second: int, third: int) -> NDArray[Any]:
    """⟨l₁ m₁ l₂ m₂ | l₃ m₃⟩ (2 l₁ + 1, 2 l₂ + 1, 2 l₃ + 1)."""
    found = np.zeros((2 * first + 1, 2 * second + 1, 2 * third + 1))
    for m1 in range(-first, first + 1):
        for m2 in range(max(-second, -third - m1), min(second, third - m1) + 1):
            value = _coefficient(first, m1, second, m2, third)
            found[first + m1, second + m2, third + m1 + m2] = value
    return found


def _coefficient(j1: int, m1: int, j2: int, m2: int, j3: int) -> float:
    """⟨j₁ m₁ j₂ m₂ | j₃ m₁ + m₂⟩ by Racah's formula: the root of an exact fraction, times an exact fraction."""
    f, m3 = factorial, m1 + m2
    triangle = Fraction(f(j3 + j1 - j2) * f(j3 - j1 + j2) * f(j1 + j2 - j3), f(j1 + j2 + j3 + 1))
    squared = (2 * j3 + 1) * triangle * f(j3 + m3) * f(j3 - m3) * f(j1 - m1) * f(j1 + m1) * f(j2 - m2) * f(j2 + m2)
    total = Fraction(0)
    for k in range(max(0, j2 - j3 - m1, j1 - j3 + m2), min(j1 + j2 - j3, j1 - m1, j2 + m2) + 1):
        below = (k, j1 + j2 - j3 - k, j1 - m1 - k, j2 + m2 - k, j3 - j2 + m1 + k, j3 - j1 - m2 + k)
        total += Fraction((-1) ** k, prod(map(f, below)))
    return sqrt(squared) * float(total)
