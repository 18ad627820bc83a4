"""The couplings of a plan as the native operator walks them: rows of hidden features, products of features, monomials.

The counterparts in C++ are ``CouplingView`` and ``PlanView`` of ``csrc/plan.h``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...plan import Coupling, Plan

ROW_OF_CHANNELS = 8  # rows have whole multiples of it: kChannels of csrc/plan.h
PANEL = 16  # outputs side by side in the forward pass's θ: kPanel of csrc/plan.h
# Products side by side in a bundle. More do not fill vectors better, and the channels of a slot, read one after the
# other when they are mixed, lie further apart: at 64 channels the forward pass takes 1.1 times as long.
_WIDEST_BUNDLE = 64


def padded(n: int) -> int:
    """Size of a row of n channels."""
    return -(-n // ROW_OF_CHANNELS) * ROW_OF_CHANNELS


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
    places: list[tuple[int, ...]]  # of each group among a node's sums T, see ``CouplingView``


@dataclass
class _Group:
    """Slots of one coupling that read the same rows (−1: the constant one).

    Attributes:
        slots, factors: (b, o), and the factors of each.
        inputs, size: place of component 0 of the coupling's inputs; size of a row of a component's channels.
        blocks, place: what ``CouplingTerms`` keeps of it.
    """

    rows: tuple[int, ...]
    slots: list[tuple[int, int]]
    factors: dict[tuple[int, int], dict[int, _Factors]]
    inputs: int
    size: int
    n_hidden: int
    blocks: list[tuple[int, int]] = field(default_factory=list)
    place: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Of its slots' products side by side."""
        return len(self.slots) * self.size


def _bundles(groups: list[_Group]) -> list[list[_Group]]:
    """Groups that read the same rows together, as many as a bundle takes."""
    found: list[list[_Group]] = []
    latest: dict[tuple[int, ...], list[_Group]] = {}
    for group in groups:
        bundle = latest.get(group.rows)
        if bundle is None or sum(other.width for other in bundle) + group.width > _WIDEST_BUNDLE:
            bundle = latest[group.rows] = []
            found.append(bundle)
        bundle.append(group)
    return found


class Terms:
    """The couplings as ``T[slot, w, v] += h[row, w] · t[v]``, with products ``t[v] = Σ_g f[i_g, v] G_g`` and
    ``G = Σ value · Y[m]``. Slots of a coupling that read the same rows form a group; a block is one of these rows, and
    the products that it meets in the group's slots, which lie side by side. Groups of several couplings that read the
    same rows form a bundle: their products lie side by side, so that a row meets all of them at once.

    ``position`` (c,): where the native code keeps each coefficient of a channel.

    Attributes:
        inputs, outputs: where the channels of both are gathered.
        rows: the positions of a row's W channels among the hidden coefficients → the row's number.
        products, product_size: four integers for each product, as in ``PlanView``; the size of all of them.
        factors: of each G the places of its input and of its product, and the size of both.
        g_first: where the nonzeros of each G begin.
        nz_harmonic, nz_value: of each nonzero its harmonic, −1 for none, and its value.
        couplings: one for each coupling.
        n_sums, n_slot_sums: numbers of a node's T as [w][slot, v] and as [slot, v][w], rows padded.
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
        self.n_sums = self.n_slot_sums = 0
        found = [self._factors(c) for c in couplings]  # first, as it numbers all rows
        groups = [self._groups(c, factors) for c, factors in zip(couplings, found, strict=True)]
        for bundle in _bundles([group for own in groups for group in own]):
            self._place(bundle)
        self.couplings = [self._coupling(c, own) for c, own in zip(couplings, groups, strict=True)]
        order = np.argsort(position)
        used = max((int(order[p % len(order)]) for row in self.rows for p in row), default=0)
        self.used = len(order) if plan.frame.kind == "planar" else used + 1

    def _read(self, c: Coupling, m: int) -> tuple[int, int]:
        """Row (−1: the constant one) and harmonic (−1: none) of coordinate m of the coupling's hidden fields."""
        if self.plan.reads_one(c):
            return -1, -1
        channel, coefficient = np.divmod(c.hidden_start + m, self.plan.field_size)
        harmonic = -1
        if self.plan.frame.kind == "zonal":
            harmonic, coefficient = m, self.plan.frame.coefficient[coefficient]
        positions = channel * len(self.position) + self.position[coefficient]
        return self.rows.setdefault(tuple(map(int, positions)), len(self.rows)), harmonic

    def _factors(self, c: Coupling) -> dict[tuple[int, int], dict[int, _Factors]]:
        """Slot (b, o) → row → the factors of its product."""
        found: dict[tuple[int, int], dict[int, _Factors]] = {}
        for b, o, i, m, value in c.nonzeros:
            row, harmonic = self._read(c, m)
            found.setdefault((b, o), {}).setdefault(row, {}).setdefault(i, []).append((harmonic, value))
        return found

    def _groups(self, c: Coupling, factors: dict[tuple[int, int], dict[int, _Factors]]) -> list[_Group]:
        inputs, size = self.inputs.add(c.in_start, c.basis.shape[2]), padded(len(c.in_start))
        found: dict[tuple[int, ...], _Group] = {}
        for slot in c.slots:
            rows = tuple(sorted(factors[slot]))
            found.setdefault(rows, _Group(rows, [], factors, inputs, size, len(c.hidden_start))).slots.append(slot)
        return list(found.values())

    def _place(self, bundle: list[_Group]) -> None:
        """The products of a bundle row by row, and the places of its sums."""
        rows, n_hidden = bundle[0].rows, bundle[0].n_hidden
        for row in rows:
            for group in bundle:
                group.blocks.append((row if row >= 0 else len(self.rows), self.product_size))
                for slot in group.slots:
                    self._add_product(group.inputs, group.size, group.factors[slot][row])
        width, column, stride = sum(group.width for group in bundle), 0, padded(n_hidden) if rows[0] >= 0 else 1
        for group in bundle:
            group.place = self.n_sums + column, width, self.n_slot_sums + column * stride, column == 0
            column += group.width
        self.n_sums += width * n_hidden
        self.n_slot_sums += width * stride

    def _coupling(self, c: Coupling, groups: list[_Group]) -> CouplingTerms:
        found = CouplingTerms(self.outputs.add(c.out_start, c.basis.shape[1]), [], [], [], [])
        for group in groups:
            found.groups.append((len(found.slots), len(group.slots), len(found.blocks), len(group.blocks)))
            found.slots.extend(group.slots)
            found.blocks.extend(group.blocks)
            found.places.append(group.place)
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
