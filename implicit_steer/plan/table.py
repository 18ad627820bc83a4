"""Tables: hidden coefficients as splines of the radius, one set for each distinct row of attributes.

In a zonal frame, and in a planar one on R², with invariant attributes a hidden coefficient c of order k depends on the
edge's radius r alone, and c / r^k is an even, smooth function of r. With u(r) odd, smooth and growing,

    c_k(r) = u^k Σ_j b_j B(u / s + ½ − j),        h[m] = (Σ_j b_j B(…)) · S_m(v),    v = x u / r,

B the cubic B-spline on the integers, s the distance of the knots u_n = (n + ½) s and S_m the solid harmonic, which is a
polynomial in v. Values f_n at the knots give b = f − δ²f/6 + δ⁴f/36 − δ⁶f/216, the first terms of the series of the
interpolating spline, whose rest is below the spline's own error for smooth f. Any function of the radius is
admissible: the kernel is equivariant for every number of knots, 4 included; h has two continuous derivatives in x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._check import require, require_integer
from .frozen import FrozenArrays, require_number

FEWEST_KNOTS = 4
_FARTHEST = 12.0  # the last knot without a cutoff, in units of Table.length


@dataclass(frozen=True, eq=False)
class Table(FrozenArrays):
    """Where the knots are, and which functions the splines stand for.

    Args:
        knots: G, how many.
        length: of a ``bounded`` table the cutoff; else the radius up to which knots are about evenly spaced.
        bounded: u = r / length, up to 1. Otherwise u = t (1 + t²)^(−1/4), t = r / length, which grows like √t: the last
            knot is at t = 12, where the shell of any edge that counts is 0; farther edges have the values there.
        even: whether c / r^k is even in r; not so where attributes are odd functions of the radius.
        types: T, how many rows of attributes there are. A plan without hidden layers has the splines of all.
        automatic: the layer chooses ``knots`` for its weights, and uses the table only where that takes fewer
            evaluations of the MLP than there are edges.
        error: of a plan without hidden layers: the largest error found, relative to the largest entry of K.
    """

    knots: int
    length: float
    bounded: bool
    even: bool = True
    types: int = 1
    automatic: bool = False
    error: float | None = None

    def validate(self) -> None:
        require_integer("knots", self.knots, FEWEST_KNOTS)
        require_integer("types", self.types, 1)
        require_number("length", self.length)
        require(self.length > 0, "length", "a positive radius", self.length)
        for name in ("bounded", "even", "automatic"):
            require(isinstance(getattr(self, name), bool), name, "True or False", repr(getattr(self, name)))
        if self.error is not None:
            require_number("error", self.error)

    def __str__(self) -> str:
        where = f"up to the cutoff {self.length:.4g}" if self.bounded else f"evenly spaced up to {self.length:.4g}"
        rows = f", {self.types} rows of attributes" if self.types > 1 else ""
        found = "" if self.error is None else f", error {self.error:.1e}"
        return f"cubic splines, {self.knots} knots, {where}{rows}{found}"

    @property
    def n_coefficients(self) -> int:
        """How many b_j one spline has: j = −2 … G."""
        return self.knots + 3

    @property
    def spacing(self) -> float:
        """s."""
        last = 1.0 if self.bounded else _FARTHEST * (1 + _FARTHEST**2) ** -0.25
        return last / (self.knots - 0.5)

    @cached_property
    def positions(self) -> NDArray[Any]:
        """(G + 4,) u at the knots, and at four more that the last splines read."""
        return (np.arange(self.knots + 4) + 0.5) * self.spacing

    @cached_property
    def radii(self) -> NDArray[Any]:
        """(G + 4,) r there."""
        u = self.positions
        t = u if self.bounded else np.sqrt((u**4 + np.sqrt(u**8 + 4 * u**4)) / 2)
        return self.length * t

    @cached_property
    def left(self) -> NDArray[Any]:
        """(5, 5): f_0 … f_4 → f_−5 … f_−1, mirrored where ``even``, else by the cubic polynomial of the first four."""
        if self.even:
            return np.fliplr(np.eye(5)).copy()
        cubic, at = np.vander(np.arange(4.0), 4), np.vander(np.arange(-5.0, 0), 4)
        return np.pad(at @ np.linalg.inv(cubic), ((0, 0), (0, 1)))


def _series() -> NDArray[Any]:
    """(7,): the coefficients of f_{n−3} … f_{n+3} in b_n."""
    term, total = np.array([1.0]), np.zeros(7)
    for power in range(4):
        total[3 - power : 4 + power] += term
        term = np.convolve(term, np.array([1, -2, 1]) / -6)
    return total


SERIES: tuple[float, ...] = tuple(_series().tolist())
