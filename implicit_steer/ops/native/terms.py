"""The couplings of a plan as the native operator walks them: rows of hidden features, products of features, monomials.

The counterparts in C++ are ``CouplingView`` and ``PlanView`` of ``csrc/plan.h``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...plan import Coupling, Plan

ROW_OF_CHANNELS = 8  # rows have whole multiples of it: kChannels of csrc/plan.h


def padded(n: int) -> int:
    """Size of a row of n channels."""
    return -(-n // ROW_OF_CHANNELS) * ROW_OF_CHANNELS


def reads_one(plan: Plan, c: Coupling) -> bool:
    """Whether the coupling reads the constant hidden feature, the last column of h, and nothing else."""
    return len(c.hidden_start) == 1 and c.basis.shape[3] == 1 and c.hidden_start[0] == plan.hidden_size - 1


class Gathered:
    """Channels by field type: for each tuple of field starts, component by component, all fields side by side and what
    fills a row of channels."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, ...], int] = {}  # place of component 0
        self.channel: list[int] = []  # number of the channel at each place, −1 where there is none
        self.rows: list[tuple[int, int]] = []  # place and size of each component's row

    def add(self, starts: NDArray[Any], size: int) -> int:
        """The place of component 0 of the fields at ``starts``, of ``size`` components each."""
        key = tuple(starts.tolist())
        if key not in self._first:
            self._first[key] = len(self.channel)
            row = padded(len(key))
            self.rows += [(len(self.channel) + component * row, row) for component in range(size)]
            for component in range(size):
                self.channel += [*(start + component for start in key), *[-1] * (row - len(key))]
        return self._first[key]


_Factors = dict[int, list[tuple[int, float]]]  # input component i → (harmonic, value)s


class CouplingTerms(NamedTuple):
    """The slots of one coupling; the lists are those of ``CouplingView``."""

    out_at: int  # place of component 0 of its outputs
    slots: list[tuple[int, int]]  # (b, o)
    groups: list[tuple[int, int, int, int]]  # first slot, slots, first block, blocks
    blocks: list[tuple[int, int]]  # row, place of its products


class Terms:
    """The couplings as ``T[slot, w, v] += h[row, w] · t[v]``, with products ``t[v] = Σ_g f[i_g, v] G_g`` and
    ``G = Σ value · Y[m]``. Slots that read the same rows form a group; a block is one of these rows, and the products
    that it meets in the group's slots, which lie side by side.

    ``position`` (c,): where the native code keeps each coefficient of a channel.

    Attributes:
        inputs, outputs: where the channels of both are gathered.
        rows: the positions of a row's W channels among the hidden coefficients → the row's number.
        products, product_size: four integers for each product, as in ``PlanView``; the size of all of them.
        factors: of each G the places of its input and of its product, and the size of both.
        g_first: where the nonzeros of each G begin.
        nz_harmonic, nz_value: of each nonzero its harmonic, −1 for none, and its value.
        couplings: one for each coupling.
        used: how many coefficients of a channel the couplings read, the first ones.
    """

    def __init__(self, plan: Plan, couplings: tuple[Coupling, ...], position: NDArray[Any]) -> None:
        self.plan, self.position = plan, position
        self.products: list[int] = []
        self.product_size = 0
        self.inputs, self.outputs = Gathered(), Gathered()
        self.rows: dict[tuple[int, ...], int] = {}
        self.factors: list[tuple[int, int, int]] = []
        self.g_first = [0]
        self.nz_harmonic: list[int] = []
        self.nz_value: list[float] = []
        found = [self._factors(c) for c in couplings]  # first, as it numbers all rows
        self.couplings = [self._coupling(c, factors) for c, factors in zip(couplings, found, strict=True)]
        order = np.argsort(position)
        used = max((int(order[p % len(order)]) for row in self.rows for p in row), default=0)
        self.used = len(order) if plan.frame.kind == "planar" else used + 1

    def _read(self, c: Coupling, m: int) -> tuple[int, int]:
        """Row (−1: the constant one) and harmonic (−1: none) of coordinate m of the coupling's hidden fields."""
        if reads_one(self.plan, c):
            return -1, -1
        field, coefficient = np.divmod(c.hidden_start + m, self.plan.field_size)
        harmonic = -1
        if self.plan.frame.kind == "zonal":
            harmonic, coefficient = m, self.plan.frame.coefficient[coefficient]
        positions = field * len(self.position) + self.position[coefficient]
        return self.rows.setdefault(tuple(map(int, positions)), len(self.rows)), harmonic

    def _factors(self, c: Coupling) -> dict[tuple[int, int], dict[int, _Factors]]:
        """Slot (b, o) → row → the factors of its product."""
        found: dict[tuple[int, int], dict[int, _Factors]] = {}
        for b, o, i, m, value in c.nonzeros:
            row, harmonic = self._read(c, m)
            found.setdefault((b, o), {}).setdefault(row, {}).setdefault(i, []).append((harmonic, value))
        return found

    def _coupling(self, c: Coupling, factors: dict[tuple[int, int], dict[int, _Factors]]) -> CouplingTerms:
        _, n_out, n_in, _ = c.basis.shape
        inputs, outputs = self.inputs.add(c.in_start, n_in), self.outputs.add(c.out_start, n_out)
        by_rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for slot in c.slots:
            by_rows.setdefault(tuple(sorted(factors[slot])), []).append(slot)
        found = CouplingTerms(outputs, [], [], [])
        for rows, members in by_rows.items():
            found.groups.append((len(found.slots), len(members), len(found.blocks), len(rows)))
            found.slots.extend(members)
            for row in rows:
                found.blocks.append((row if row >= 0 else len(self.rows), self.product_size))
                for slot in members:
                    self._add_product(inputs, padded(len(c.in_start)), factors[slot][row])
        return found

    def _add_product(self, inputs: int, size: int, factors: _Factors) -> None:
        first = len(self.factors)
        for i, g in factors.items():
            self.factors.append((inputs + i * size, self.product_size, size))
            self.nz_harmonic += [harmonic for harmonic, _ in g]
            self.nz_value += [value for _, value in g]
            self.g_first.append(len(self.nz_value))
        self.products += [self.product_size, size, first, len(self.factors)]
        self.product_size += size

    def adjoint(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The products backwards, ``df[i, v] = Σ dt[v] G`` over the products that read f[i]: as ``products``, and per
        term the place of the product and the number of G."""
        reading: dict[int, list[tuple[int, int]]] = {}
        for g, (place, product, _) in enumerate(self.factors):
            reading.setdefault(place, []).append((product, g))
        adjoint: list[int] = []
        terms: list[tuple[int, int]] = []
        for place, size in self.inputs.rows:
            found = reading.get(place, [])
            adjoint += [place, size, len(terms), len(terms) + len(found)]
            terms += found
        return adjoint, terms

    def harmonic_terms(self) -> tuple[list[tuple[int, ...]], list[float]]:
        """``dY[m] = Σ value Σ_v f[v] dt[v]``: (m, place of f, of t, size) and value of each term, by m."""
        g_of = np.repeat(range(len(self.factors)), np.diff(self.g_first))  # of each nonzero
        read = sorted((m, z) for z, m in enumerate(self.nz_harmonic) if m >= 0)
        return [(m, *self.factors[g_of[z]]) for m, z in read], [self.nz_value[z] for _, z in read]


class Monomials:
    """Monomials of x, y, z: 1, then each an earlier one times a coordinate."""

    def __init__(self) -> None:
        self.number = {(0, 0, 0): 0}
        self.factors = [(0, 0)]  # per monomial: number of the earlier one, coordinate

    def add(self, powers: tuple[int, int, int]) -> int:
        """The number of x^i y^j z^k."""
        if powers not in self.number:
            axis = max(k for k in range(3) if powers[k])
            x, y, z = (n - (k == axis) for k, n in enumerate(powers))
            earlier = self.add((x, y, z))
            self.number[powers] = len(self.factors)
            self.factors.append((earlier, axis))
        return self.number[powers]
