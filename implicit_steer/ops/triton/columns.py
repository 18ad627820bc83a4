"""Where r holds the hidden features that the couplings read.

Coefficient ρ of channel w is column ρ W + w of the MLP's output y (W channels; coefficients of order 0 come first), and
r = γ s(|x|) · (y, 1). With q₀ = 1 and q_j, j >= 1, the harmonics of the edge's direction, coordinate m of a hidden
field is

    h[w, m] = Σ_{ρ, j} H[m, ρ, j] q_j y[ρ, w].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...plan import Coupling, Plan


class Columns:
    """The columns of r of every coordinate of the hidden features, and the harmonics that go with them.

    Attributes:
        d, channels: coordinates of a hidden field, and fields.
        has_fields: whether there are hidden layers, or splines in their place; else h are the MLP's inputs.
        used: the coordinates of a hidden field that couplings read.
        one: the column of r that holds γ s(|x|) · 1, its last.
        harmonics: zonal frames: the coordinates of order >= 1, whose spherical harmonics q holds.
        most: planar frames: the highest order k of the pairs (cos kφ, sin kφ) that q holds.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, frame = plan, plan.frame
        self.d, self.has_fields = plan.field_size, bool(plan.activations) or plan.is_frozen
        self.channels = (plan.hidden_size - 1) // self.d if self.has_fields else 1
        self.used = self._used()
        if not self.has_fields:
            self.one = plan.hidden_size - 1
        elif frame.kind == "zonal":
            self.one = self.channels * (1 + max((int(frame.coefficient[m]) for m in self.used), default=0))
        else:
            self.one = self.channels * len(frame.order)
        degrees = frame.degrees
        rotated = list(range(self.d)) if plan.norms else self.used  # batch statistics are of all coordinates
        self.harmonics = [m for m in rotated if frame.kind == "zonal" and degrees[m] > 0]
        self.most = max((int(degrees[m]) for m in rotated), default=0) if frame.kind == "planar" else 0

    def _used(self) -> list[int]:
        found = set()
        for c in self.plan.couplings:
            if not self.plan.reads_one(c):
                for m in np.flatnonzero(np.abs(c.basis).sum((0, 1, 2))):
                    found |= set(((c.hidden_start + m) % self.d).tolist())
        return sorted(found)

    @property
    def n_harmonics(self) -> int:
        return len(self.harmonics) + 2 * self.most

    def way_back(self, m: int) -> list[tuple[int, int, float]]:
        """(ρ, j, H[m, ρ, j]) of a hidden coordinate: one term, or two."""
        frame = self.plan.frame
        if frame.kind == "zonal":
            rho = int(frame.coefficient[m])
            if m in self.harmonics:
                return [(rho, 1 + self.harmonics.index(m), 1.0)]
            return [(rho, 0, float(frame.harmonics[m][(frame.powers == 0).all(1)].sum()))]
        k = int(frame.order[m]) if frame.kind == "planar" and self.has_fields else 0
        if k == 0:
            return [(m, 0, 1.0)]
        return [(m, 2 * k - 1, 1.0), (int(frame.partner[m]), 2 * k, float(frame.sign[m]))]

    def all_ways_back(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """ρ and j (2, 2, d) and H (2, d) of the two terms of every coordinate; H of a second term that is not there is
        0."""
        places, values = np.zeros((2, 2, self.d), int), np.zeros((2, self.d))
        for m in range(self.d):
            for n, (rho, j, value) in enumerate(self.way_back(m)):
                places[:, n, m], values[n, m] = (rho, j), value
        return places, values

    def of(self, c: Coupling, m: int) -> list[tuple[tuple[int, ...], int, float]]:
        """(column of r for each hidden field of the coupling, j, H) of coordinate m of those fields."""
        if self.plan.reads_one(c):
            return [((self.one,), 0, 1.0)]
        if not self.has_fields:
            return [(tuple((c.hidden_start + m).tolist()), 0, 1.0)]
        fields, coordinates = np.divmod(c.hidden_start + m, self.d)
        if self.plan.frame.kind == "none":
            return [(tuple((coordinates * self.channels + fields).tolist()), 0, 1.0)]
        found = self.way_back(int(coordinates[0]))
        return [(tuple((rho * self.channels + fields).tolist()), j, value) for rho, j, value in found]
