"""The frame of an edge: where the MLP is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._check import require, require_integer
from .frozen import FrozenArrays, require_indices, require_shape

MAX_ORDER = 1000  # orders of coefficients and attributes are below this: powers up to the order are written out
_ABSENT: Any = None  # in place of arrays that belong to other kinds of frames


@dataclass(frozen=True, eq=False)
class Frame(FrozenArrays):
    """Where the MLP is evaluated, and how its hidden features are rotated back from there.

    ``kind``:

    - ``"none"``: at (x, a) itself.
    - ``"zonal"`` (O(3), SO(3), invariant attributes): at x₀ = r e; hidden field ψ of degree l keeps one coefficient and
      ``h[m] = c[coefficient[m]] · Y_m(x̂)``, Y the unit-norm solid harmonics ``harmonics`` (d, n_monomials) over the
      monomials x^i y^j z^k listed in ``powers``.
    - ``"planar"`` (one continuous rotation): x and a are rotated by −φ, φ the azimuth of x in ``plane`` (dim, 2);
      coefficients of order k return by a rotation by kφ: ``h[m] = cos(kφ) c[m] + sign[m] sin(kφ) c[partner[m]]``.

    ``order`` (c,) is the degree l or the order k of each hidden coefficient, ascending. Where ``regular``, coefficients
    of order > 0 vanish at radius 0 and are carried divided by the radius, so that values and derivatives are right
    there.
    """

    kind: str
    dim: int
    attribute: NDArray[Any]  # (A, A): attributes to frame coordinates, a' = attributeᵀ a
    order: NDArray[Any]  # (c,)
    regular: bool = False
    # zonal
    coefficient: NDArray[Any] = _ABSENT  # (d,)
    powers: NDArray[Any] = _ABSENT  # (n_monomials, 3)
    harmonics: NDArray[Any] = _ABSENT  # (d, n_monomials)
    # planar
    plane: NDArray[Any] = _ABSENT  # (dim, 2) orthonormal; azimuth 0 along the first column
    axis: NDArray[Any] = _ABSENT  # (dim, dim - 2) the rest of position space
    partner: NDArray[Any] = _ABSENT  # (c,)
    sign: NDArray[Any] = _ABSENT  # (c,)
    attribute_order: NDArray[Any] = _ABSENT  # (A,)
    attribute_partner: NDArray[Any] = _ABSENT  # (A,)
    attribute_sign: NDArray[Any] = _ABSENT  # (A,)

    def validate(self) -> None:
        """Raise ``ValueError`` unless the kind is known and its arrays fit together."""
        require_integer("dim", self.dim, 1)
        require(self.kind in ("none", "zonal", "planar"), "kind", "'none', 'zonal' or 'planar'", repr(self.kind))
        expected = {"none": (1, 2, 3), "zonal": (3,), "planar": (2, 3)}[self.kind]
        require(self.dim in expected, "dim", f"one of {expected} for a frame of kind {self.kind!r}", self.dim)
        require(isinstance(self.regular, bool), "regular", "True or False", repr(self.regular))
        require(
            self.attribute.ndim == 2 and self.attribute.shape[0] == self.attribute.shape[1],
            "attribute",
            "a square matrix",
            self.attribute.shape,
        )
        require(bool(np.all(np.diff(self.order) >= 0)), "order", "ascending", self.order)
        require_indices("order", self.order, MAX_ORDER)
        if self.kind == "zonal":
            d = len(self.coefficient)
            require_indices("coefficient", self.coefficient, len(self.order))
            require_shape("powers", self.powers, (self.harmonics.shape[-1], 3))
            require_indices("powers", self.powers, int(self.order.max(initial=0)) + 1, self.powers.shape)
            require_shape("harmonics", self.harmonics, (d, len(self.powers)))
        if self.kind == "planar":
            c, a = len(self.order), self.n_attributes
            require_shape("plane", self.plane, (self.dim, 2))
            require_shape("axis", self.axis, (self.dim, self.dim - 2))
            require_indices("partner", self.partner, c, (c,))
            require_shape("sign", self.sign, (c,))
            require_indices("attribute_order", self.attribute_order, MAX_ORDER, (a,))
            require_indices("attribute_partner", self.attribute_partner, a, (a,))
            require_shape("attribute_sign", self.attribute_sign, (a,))

    @property
    def n_attributes(self) -> int:
        """Size of the edge attributes, radial inputs included."""
        return self.attribute.shape[0]

    @property
    def degrees(self) -> NDArray[Any]:
        """(d,) the degree or order of each coordinate of a hidden field."""
        return self.order[self.coefficient] if self.kind == "zonal" else self.order

    @property
    def n_zero(self) -> int:
        """How many hidden coefficients are of order 0: the first ones."""
        return int(np.searchsorted(self.order, 1))

    @property
    def n_position(self) -> int:
        """How many values the position contributes to the MLP's input: all of x; (r,); (ρ, axis); or, in a planar
        frame that is not regular, (ρ, 0, axis), where the 0 has a derivative at ρ = 0."""
        return {"none": self.dim, "zonal": 1, "planar": self.dim - self.regular}[self.kind]
