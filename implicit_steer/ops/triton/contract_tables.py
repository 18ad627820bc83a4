"""The tables of contract.py: the couplings as sums that programs hold on chip.

Of every target node i the kernels make T = Σ_{e→i} (C · q_e · f_j) ⊗ r_e. Its parts:

- A **slot** s is a pair (b, o) of an intertwiner and an output coordinate; or, where there are fewer of those (regular
  representations), a pair (i, m) of an input and a hidden coordinate, and Θ carries the intertwiners.
- An **accumulator** is the array ``T[s, v, ω]`` that one program sums for one node: some slots s of a coupling, some
  fields v of its input type, some **columns** ω, each of which is a column of r. T of a node is all accumulators one
  after the other.
- A **term** t is what the accumulator adds for an edge: ``L_t[s, v] · r[column_t[ω]]`` with ``L_t[s, v] = Σ_{i, j}
  C_t[i, j, s] q_j f[start[v] + i]``, q₀ = 1. An accumulator has a term per hidden coefficient that its slots read.
  Slots that read one coefficient each, with the same C, lie side by side: further columns of the same term.

For the gradients the same terms are listed twice more: by the part of x that they read, a **slice** (the fields of one
accumulator, D of their components: **chunk** k is components kD .. kD + D − 1), and by the part of r that they read, a
**window** (columns kW .. kW + W − 1).

Example: 2 vectors f[v] → 1 scalar under SO(2), without hidden layers, so that r = γ s · (h[0], h[1], 1) holds the two
vectors h[w], the edge's position and its one attribute. The intertwiners are B_0: f₀h₀ + f₁h₁ and B_1: f₁h₀ − f₀h₁
(fields in brackets, coordinates as indices)::

    x: column   0      1      2      3               r: column   0      1      2      3      4
                f[0]₀  f[0]₁  f[1]₀  f[1]₁                       h[0]₀  h[0]₁  h[1]₀  h[1]₁  1

There are two slots, (b, o) = (0, 0) and (1, 0), against four pairs (i, m). Both read h₀ and h₁, so there is one
accumulator T[s, v, ω], 2 x 2 x 2, of two terms::

    term   columns (ω = 0, 1)   C[i = 0, s]   C[i = 1, s]        adds to T[0, v, ω]       and to T[1, v, ω]
    0      0, 2: h₀ of w = ω     1   0          0   1             f[v]₀ h[ω]₀               f[v]₁ h[ω]₀
    1      1, 3: h₁ of w = ω     0  −1          1   0             f[v]₁ h[ω]₁              −f[v]₀ h[ω]₁

and the tables hold (rows are filled up with −1, C with 0, to the extents of the kernels' blocks)::

    acc_term_begin   [0, 2]         terms 0 and 1             slice_term_begin   [0, 2]    one slice: all of x
    acc_start        [[0, 2]]       of f[0], f[1] in x        slice_term         [0, 1]
    acc_extent       [[2, 2, 2, 2]] s, v, ω, components       slice_chunk        [0]       components 0, 1
    acc_offset       [0]            of its T in the node's    slice_start        [[0, 2]]
    term_acc         [0, 0]                                   slice_components   [2]       of a field
    term_column      [[0, 2], [1, 3]]                         window_term_begin  [0, 2]    one window: all of r
    term_chunks      [[0, 1], [0, 1]]   first, end            window_term        [0, 1]
                                                              window_place       [[0, −1, 1, −1], [−1, 0, −1, 1]]

``window_place``: of columns 0, 1, 2, 3 of r, the ω of each term. Then out[0] = Σ_{s, v, ω} θ[0, v, ω, s] T[s, v, ω].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...plan import Coupling, Plan
from .columns import Columns
from .sizes import next_power_of_2

_ROWS = 32  # S · V, rows of an accumulator, where there are as many
_LEAST_ROWS = 16  # of a product on tensor cores, and its least columns
_MOST_FIELDS, _MOST_COLUMNS, _MOST_SLOTS = 32, 32, 16  # of an accumulator
_MOST_COMPONENTS = 9  # that are read at once where there are harmonics, by which their products are shared

_Coefficient = tuple[int, ...]  # of each hidden field of a coupling the column of r that holds its coefficient ρ
_Slot = dict[_Coefficient, NDArray[Any]]  # → C (i, 1 + n_harmonics)


class Extents(NamedTuple):
    """What a program of contract.py holds or reads at a time; all but D are powers of two."""

    slots: int  # S
    fields: int  # V
    columns: int  # W
    components: int  # D
    most_components: int  # of an input field, in whole chunks


@dataclass(frozen=True)
class Accumulator:
    """T[s, v, ω] of some slots, fields and columns."""

    start: tuple[int, ...]  # (v,) first columns of the fields in x
    terms: list[tuple[_Coefficient, NDArray[Any]]]  # columns of r (ω,), C (i, 1 + n_harmonics, s)
    source: NDArray[Any]  # (s, v, ω) row of the coupling's Θ that each entry of T meets

    @property
    def components(self) -> int:
        """Of each field."""
        return self.terms[0][1].shape[0]


class _Bundle(NamedTuple):
    """Slots whose sums have the same C, term by term: part p holds ``slots[p]``, and its term t reads
    ``coefficients[t][p]``. The parts are the columns of one array, side by side."""

    slots: list[list[int]]
    coefficients: list[list[_Coefficient]]


def slots_of(columns: Columns, c: Coupling) -> tuple[list[_Slot], NDArray[Any]]:
    """The coupling's slots, the fewer of (b, o) and (i, m), and the coefficients (b, s, o) that make Θ of θ."""
    n_b, n_o, n_i, n_m = c.basis.shape
    back = [columns.of(c, m) for m in range(n_m)]
    present = np.abs(c.basis) > 0
    by_output, by_input = np.argwhere(present.any((2, 3))), np.argwhere(present.any((0, 1)))
    if len(by_output) <= len(by_input):
        entries = [[(i, m, c.basis[b, o, i, m]) for i, m in np.argwhere(present[b, o])] for b, o in by_output]
        mixing = np.zeros((n_b, len(by_output), n_o))
        for s, (b, o) in enumerate(by_output):
            mixing[b, s, o] = 1
    else:
        entries = [[(i, m, 1.0)] for i, m in by_input]
        mixing = c.basis[:, :, by_input[:, 0], by_input[:, 1]].transpose(0, 2, 1)
    slots = []
    for listed in entries:
        slot: _Slot = {}
        for i, m, value in listed:
            for coefficient, j, factor in back[m]:
                slot.setdefault(coefficient, np.zeros((n_i, 1 + columns.n_harmonics)))[i, j] += value * factor
        slots.append(slot)
    return slots, mixing


def _bundles(slots: list[_Slot], most: int) -> list[_Bundle]:
    """Slots that read the same coefficients, at most ``most`` of them, with a term per coefficient; where that is one
    coefficient, all those with the same C side by side."""
    by_coefficients: dict[tuple[_Coefficient, ...], list[int]] = {}
    for n, slot in enumerate(slots):
        by_coefficients.setdefault(tuple(sorted(slot)), []).append(n)
    bundles: list[Any] = []
    side_by_side: dict[Any, Any] = {}
    for coefficients, members in by_coefficients.items():
        for first in range(0, len(members), most):
            part = members[first : first + most]
            if len(coefficients) > 1:
                bundles.append(_Bundle([part], [[coefficient] for coefficient in coefficients]))
                continue
            same = tuple(slots[n][coefficients[0]].tobytes() for n in part)
            found = side_by_side.setdefault(same, _Bundle([], [[]]))
            found.slots.append(part)
            found.coefficients[0].append(coefficients[0])
    return [*bundles, *side_by_side.values()]


def accumulators_of(c: Coupling, slots: list[_Slot], most: int) -> list[Accumulator]:
    """The coupling's T, cut into arrays of at most ``most`` slots."""
    found, n_v, n_w = [], len(c.in_start), len(c.hidden_start)
    for bundle in _bundles(slots, most):
        terms = [
            ([column for coefficient in parts for column in coefficient],
             np.stack([slots[n][parts[0]] for n in bundle.slots[0]], -1))
            for parts in bundle.coefficients
        ]  # fmt: skip
        width = len(bundle.slots) * n_w  # columns of a term: (part, w)
        part, w = np.divmod(np.arange(width), n_w)
        source = (np.array(bundle.slots).T[:, None, part] * n_v + np.arange(n_v)[None, :, None]) * n_w + w  # (s, v, ω)
        for v in range(0, n_v, _MOST_FIELDS):
            for column in range(0, width, _MOST_COLUMNS):
                fields, here = slice(v, v + _MOST_FIELDS), slice(column, column + _MOST_COLUMNS)
                chosen = [(tuple(names[here]), table) for names, table in terms]
                found.append(Accumulator(tuple(c.in_start[fields].tolist()), chosen, source[:, fields, here]))
    return found


def row_extents(plan: Plan, slots: Sequence[list[_Slot]]) -> tuple[int, int]:
    """S and V: rows of an accumulator."""
    fields = next_power_of_2(min(_MOST_FIELDS, max((len(c.in_start) for c in plan.couplings), default=1)))
    most = next_power_of_2(max(map(len, slots), default=1))
    return max(min(most, _MOST_SLOTS, max(1, _ROWS // fields)), _LEAST_ROWS // fields), fields


def extents_of(plan: Plan, columns: Columns, rows: tuple[int, int], accumulators: Sequence[Accumulator]) -> Extents:
    """What a program holds, given S and V."""
    widest = max((len(names) for a in accumulators for names, _ in a.terms), default=1)
    components = max((c.basis.shape[2] for c in plan.couplings), default=1)
    at_once = components if components <= _MOST_COMPONENTS and columns.n_harmonics else min(components, 4)
    in_chunks = -(-components // at_once) * at_once
    return Extents(*rows, next_power_of_2(widest, _LEAST_ROWS), at_once, in_chunks)


# ---- tables


def _listed(name: str, lists: list[list[int]]) -> dict[str, NDArray[Any]]:
    """The terms of every slice or window one after the other, and where each begins."""
    begin = np.cumsum([0, *map(len, lists)])
    return {f"{name}_term_begin": begin, f"{name}_term": np.array([t for found in lists for t in found], int)}


def _filled(rows: list[tuple[int, ...]], width: int) -> NDArray[Any]:
    """(rows, width), −1 where a row is shorter."""
    found = np.full((len(rows), width), -1)
    for n, row in enumerate(rows):
        found[n, : len(row)] = row
    return found


class ContractTables:
    """The tables of all accumulators, built one after the other.

    Attributes:
        numbers, indices: the tables; ``coupling`` (t, i, j, s) and ``constant`` (t, i, s) are C_t of the harmonics and
            of q₀; the others: see the module's example.
        n_t: entries of T per node.
        n_slices: how many slices x has.
        n_covered: columns of x that belong to one.
    """

    def __init__(self, accumulators: Sequence[Accumulator], extents: Extents, columns: Columns) -> None:
        self.accumulators, self.extents = accumulators, extents
        self.terms = [(n, names, c) for n, a in enumerate(accumulators) for names, c in a.terms]
        self.slices = self._slices()
        sizes = [a.source.size for a in accumulators]
        self.n_t, self.n_slices = sum(sizes), len(self.slices)
        self.n_covered = sum(len(start) * n for start, n, chunk in self.slices if chunk == 0)
        table, chunks = self._couplings(1 + columns.n_harmonics)
        self.numbers = {"coupling": table[:, :, 1:], "constant": table[:, :, 0]}
        self.indices = {
            "acc_term_begin": np.cumsum([0] + [len(a.terms) for a in accumulators]),
            "acc_start": _filled([a.start for a in accumulators], extents.fields),
            "acc_extent": np.array([(*a.source.shape, a.components) for a in accumulators], int).reshape(-1, 4),
            "acc_offset": np.cumsum([0, *sizes])[:-1],
            "term_acc": np.array([n for n, *_ in self.terms], int),
            "term_column": _filled([names for _, names, _ in self.terms], extents.columns),
            "term_chunks": chunks,
        }
        self.indices |= self._slice_tables(chunks) | self._window_tables(columns.one + 1)

    def _slices(self) -> list[tuple[tuple[int, ...], int, int]]:
        """(starts of the fields, components of a field, chunk) of every slice of x."""
        components = {a.start: a.components for a in self.accumulators}
        return [(start, n, k) for start, n in components.items() for k in range(-(-n // self.extents.components))]

    def _couplings(self, n_q: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """C (t, i, 1 + n_harmonics, s), and first and end of the chunks of components that each term reads (t, 2)."""
        table = np.zeros((len(self.terms), self.extents.most_components, n_q, self.extents.slots))
        chunks = np.zeros((len(self.terms), 2), int)
        for t, (_, _, c) in enumerate(self.terms):
            table[t, : c.shape[0], :, : c.shape[2]] = c
            read = np.flatnonzero(np.abs(c).sum((1, 2))) // self.extents.components
            chunks[t] = read.min(), read.max() + 1
        return table, chunks

    def _slice_tables(self, chunks: NDArray[Any]) -> dict[str, NDArray[Any]]:
        number = {(start, chunk): n for n, (start, _, chunk) in enumerate(self.slices)}
        members: list[list[int]] = [[] for _ in self.slices]
        for t, (n, _, _) in enumerate(self.terms):
            for chunk in range(*chunks[t]):
                members[number[self.accumulators[n].start, chunk]].append(t)
        return _listed("slice", members) | {
            "slice_chunk": np.array([chunk for *_, chunk in self.slices], int),
            "slice_start": _filled([start for start, *_ in self.slices], self.extents.fields),
            "slice_components": np.array([n for _, n, _ in self.slices], int),
        }

    def _window_tables(self, n_columns: int) -> dict[str, NDArray[Any]]:
        width = self.extents.columns
        members: list[list[int]] = [[] for _ in range(-(-n_columns // width))]
        for t, (_, names, _) in enumerate(self.terms):
            for k in sorted({name // width for name in names}):
                members[k].append(t)
        place = [
            tuple(names.index(column) if column in names else -1 for column in range(k * width, (k + 1) * width))
            for k, terms in enumerate(members)
            for names in (self.terms[t][1] for t in terms)
        ]
        return _listed("window", members) | {"window_place": _filled(place, width)}


def positions_of(plan: Plan, per_coupling: Sequence[tuple[list[Accumulator], int]]) -> NDArray[Any]:
    """Of the values (s, v, w, u, o) of every coupling in the flat Θ (n_t, C_out), from its accumulators and its number
    of slots; of a depthwise coupling, where v is u, (s, w, u, o). Elsewhere Θ is 0."""
    found, entry = [], 0
    for c, (accumulators, n_slots) in zip(plan.couplings, per_coupling, strict=True):
        row = np.full(n_slots * len(c.in_start) * len(c.hidden_start), -1)
        for accumulator in accumulators:
            n = accumulator.source.size
            row[accumulator.source.reshape(-1)] = entry + np.arange(n)
            entry += n
        rows = row.reshape(n_slots, len(c.in_start), len(c.hidden_start), 1, 1)
        rows = rows.transpose(0, 3, 2, 1, 4) if c.depthwise else rows
        out = c.out_start[:, None] + np.arange(c.basis.shape[1])
        found.append((rows * plan.out_size + out).reshape(-1))
    return np.concatenate([*found, np.zeros(0, int)])
