"""Radial inputs: invariants that a kernel's MLP reads beside an edge's attributes, functions of the edge's length r."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .._check import fail, require, require_integer
from .frozen import FrozenArrays, require_number


class Radial(FrozenArrays):
    """Functions of an edge's length r: :class:`Distance`, :class:`Cosines` or :class:`Bessel`.

    A layer with ``radial`` computes ``MLP(x ⊕ radial(|x|) ⊕ a)``: they come before the attributes a of the edge.

    Attributes:
        even: whether they are even in r, and so smooth functions of the position at r = 0, too.
    """

    even: ClassVar[bool]

    @property
    def size(self) -> int:
        """How many functions there are."""
        return 1


@dataclass(frozen=True, eq=False)
class Distance(Radial):
    """The length r itself. It has no derivative at r = 0, where the layers take 0."""

    even = False


@dataclass(frozen=True, eq=False)
class _Series(Radial):
    n: int
    cutoff: float

    even = True

    def validate(self) -> None:
        require_integer("n", self.n, 1)
        require_number("cutoff", self.cutoff)
        require(self.cutoff > 0, "cutoff", "a positive radius", self.cutoff)
        object.__setattr__(self, "cutoff", float(self.cutoff))

    @property
    def size(self) -> int:
        return self.n


@dataclass(frozen=True, eq=False)
class Cosines(_Series):
    """√2 cos(k π r / cutoff), k = 1 … n: orthonormal for r spread evenly over 0 … cutoff.

    Args:
        n: how many, at least 1.
        cutoff: > 0, in the unit of the positions.

    Raises:
        ValueError: a wrong argument; the message names it, what was expected and what came.
    """


@dataclass(frozen=True, eq=False)
class Bessel(_Series):
    """√(2 / cutoff) sin(k π r / cutoff) / r, k = 1 … n: the spherical Bessel functions of degree 0 that vanish at the
    cutoff, orthonormal over 0 … cutoff with the weight r².

    Args:
        n: how many, at least 1.
        cutoff: > 0, in the unit of the positions.

    Raises:
        ValueError: a wrong argument; the message names it, what was expected and what came.

    Source: Gasteiger, Groß, Günnemann, *Directional message passing for molecular graphs*, ICLR 2020.
    """


def size_of(radial: Radial | None) -> int:
    """How many radial inputs ``radial`` stands for; ``TypeError`` where it is neither a :class:`Radial` nor None."""
    if radial is None:
        return 0
    if not isinstance(radial, Radial):
        fail("radial", "Distance(), Cosines(n, cutoff), Bessel(n, cutoff) or None", repr(radial), kind=TypeError)
    return radial.size
