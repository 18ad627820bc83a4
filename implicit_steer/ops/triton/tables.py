"""A plan as the kernels read it: sizes, and tables of numbers.

Hidden coefficients are numbered (coefficient, channel): ρ W + w, those of order 0 first. With q₀ = 1 and q the
harmonics of the edge's direction, a hidden coordinate is h[w, m] = Σ_{ρ, j} H[m, ρ, j] q_j y[ρ, w], and r = γ s(|x|) ·
(y, 1).

The coupling is cut into *blocks* of T. A block holds ``T[s, v, ω]`` for some slots s, fields v of one type, and columns
ω of r; its *terms* t say what an edge adds: ``Σ_t L_t[s, v] · r[column_t[ω]]``, ``L_t[s, v] = Σ_{i, j} C_t[i, j, s] q_j
f[start[v] + i]``. A slot is a pair (b, o) of the intertwiners, or a pair (i, m) where there are fewer of those (regular
representations); then Θ carries the intertwiners."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...plan import FUNCTIONS, Coupling, Plan

_TILE = 32  # S · V: rows of T that a program holds, where there are as many
_MOST_FIELDS, _MOST_COLUMNS = 32, 32  # of a block
_MOST_SLOTS = 16
MOST_COEFFICIENTS = 512  # of a hidden layer: they stay on chip
KINDS = {"none": 0, "zonal": 1, "regular planar": 2, "planar": 3}


def padded(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def _field_size(plan: Plan) -> int:
    """Coordinates of a hidden field."""
    if not plan.activations:
        return 1
    return len(plan.frame.coefficient) if plan.frame.kind == "zonal" else len(plan.frame.order)


def unsupported(plan: Plan) -> str | None:
    """Why the kernels cannot do this plan, or None."""
    order, activations = plan.frame.order, plan.activations
    if plan.frame.dim not in (1, 2, 3):
        return f"positions in 1 to 3 dimensions, not {plan.frame.dim}"
    if not activations:
        return None if plan.frame.kind == "none" else "without hidden layers, frame 'none'"
    first = activations[0]
    if any(a.function != first.function or a.channels != first.channels for a in activations):
        return "one activation function and one number of channels in all layers"
    if any(a.samples.shape != first.samples.shape for a in activations):
        return "equally many samples in all layers"
    if len(order) * first.channels > MOST_COEFFICIENTS:
        return f"at most {MOST_COEFFICIENTS} coefficients in a hidden layer, not {len(order) * first.channels}"
    if plan.frame.regular and _mixes_orders(plan):
        return "hidden layers that keep coefficients of order 0 apart"
    if plan.frame.kind != "none":
        d = _field_size(plan)
        if any(len(set(c.hidden_start % d)) > 1 for c in plan.couplings if not _reads_one(plan, c)):
            return "couplings that read the same coordinates of all hidden fields"
    return None


def _mixes_orders(plan: Plan) -> bool:
    """Whether a hidden layer of a regular frame maps order 0 to higher ones or back."""
    order, c = plan.frame.order, len(plan.frame.order)
    for n, layer in enumerate(plan.linears):
        into = np.tile(order, layer.in_size // c) if n else np.array([1] + [0] * (layer.in_size - 1))
        out = np.tile(order, layer.out_size // c)
        if (np.abs(layer.bias).sum(1) * out).any():
            return True
        for block in layer.blocks:
            _, o, i = np.nonzero(block.basis)
            rows, columns = out[block.out_start[:, None] + o], into[block.in_start[:, None] + i]
            if ((rows[:, None] == 0) != (columns[None] == 0)).any():
                return True
    return False


def _reads_one(plan: Plan, c: Coupling) -> bool:
    return len(c.hidden_start) == 1 and c.basis.shape[3] == 1 and c.hidden_start[0] == plan.hidden_size - 1


# ---- the way back of hidden coefficients, and the columns of r


class _Columns:
    """Where r holds what the couplings read."""

    def __init__(self, plan: Plan):
        self.plan, frame = plan, plan.frame
        self.d, self.channels = _field_size(plan), plan.activations[0].channels if plan.activations else 1
        self.used = self._used()  # coordinates of a hidden field that couplings read
        if not plan.activations:
            self.one = plan.hidden_size - 1
        elif frame.kind == "zonal":
            self.one = self.channels * (1 + max((int(frame.coefficient[m]) for m in self.used), default=0))
        else:
            self.one = self.channels * len(frame.order)
        order = frame.order[frame.coefficient] if frame.kind == "zonal" else frame.order
        rotated = list(range(self.d)) if plan.norms else self.used  # batch statistics are of all coordinates
        self.harmonics = [m for m in rotated if frame.kind == "zonal" and order[m] > 0]
        self.most = max((int(order[m]) for m in rotated), default=0) if frame.kind == "planar" else 0

    def _used(self) -> list[int]:
        found = set()
        for c in self.plan.couplings:
            if not _reads_one(self.plan, c):
                for m in np.flatnonzero(np.abs(c.basis).sum((0, 1, 2))):
                    found |= set(((c.hidden_start + m) % self.d).tolist())
        return sorted(found)

    @property
    def n_harmonics(self) -> int:
        return len(self.harmonics) + 2 * self.most

    def way_back(self, m: int) -> list[tuple[int, int, float]]:
        """(ρ, j, H[m, ρ, j]) of a hidden coordinate; j = 0: the constant one, else harmonic j − 1."""
        frame = self.plan.frame
        if frame.kind == "zonal":
            rho = int(frame.coefficient[m])
            if m in self.harmonics:
                return [(rho, 1 + self.harmonics.index(m), 1.0)]
            return [(rho, 0, float(frame.harmonics[m][(frame.powers == 0).all(1)].sum()))]
        k = int(frame.order[m]) if frame.kind == "planar" and self.plan.activations else 0
        if k == 0:
            return [(m, 0, 1.0)]
        return [(m, 2 * k - 1, 1.0), (int(frame.partner[m]), 2 * k, float(frame.sign[m]))]

    def all_ways_back(self) -> tuple[np.ndarray, np.ndarray]:
        """ρ and j (2, d), and H (2, d), of the two terms of every coordinate; the second may be 0."""
        places, values = np.zeros((2, 2, self.d), int), np.zeros((2, self.d))
        for m in range(self.d):
            for n, (rho, j, value) in enumerate(self.way_back(m)):
                places[:, n, m], values[n, m] = (rho, j), value
        return places, values

    def of(self, c: Coupling, m: int) -> list[tuple[tuple[int, ...], int, float]]:
        """(columns of r for each field, j, value) of coordinate m of the coupling's hidden fields."""
        if _reads_one(self.plan, c):
            return [((self.one,), 0, 1.0)]
        if not self.plan.activations:
            return [(tuple((c.hidden_start + m).tolist()), 0, 1.0)]
        fields, coordinates = np.divmod(c.hidden_start + m, self.d)
        if self.plan.frame.kind == "none":
            return [(tuple((coordinates * self.channels + fields).tolist()), 0, 1.0)]
        found = self.way_back(int(coordinates[0]))
        return [(tuple((rho * self.channels + fields).tolist()), j, value) for rho, j, value in found]


# ---- blocks of T


@dataclass
class _Block:
    """See the module's text. ``source`` (s, v, ω): row of the coupling's Θ that each number of T meets."""

    start: tuple[int, ...]  # (V,) of the fields
    terms: list[tuple[tuple[int, ...], np.ndarray]]  # columns (ω,), C (i, 1 + n_harmonics, s)
    source: np.ndarray


_Slot = dict[tuple[int, ...], np.ndarray]  # columns of r → C (i, 1 + n_harmonics)


def _slots(columns: _Columns, c: Coupling) -> tuple[list[_Slot], np.ndarray]:
    """The coupling's slots, and the numbers (b, s, o) by which θ makes Θ of them: the fewer of (b, o) and (i, m)."""
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
            for key, j, factor in back[m]:
                slot.setdefault(key, np.zeros((n_i, 1 + columns.n_harmonics)))[i, j] += value * factor
        slots.append(slot)
    return slots, mixing


def _groups(slots: list[_Slot], width: int) -> list[tuple[list[list[int]], list[tuple[list, int]]]]:
    """Slots that are computed together: ([slots of each row], [(columns, first slot's term)]).

    Slots that read the same rows of r make a group with a term per row. Rows that are read once, by slots of equal C,
    are put side by side: one term with the columns of them all.
    """
    by_rows: dict[tuple, list[int]] = {}
    for n, slot in enumerate(slots):
        by_rows.setdefault(tuple(sorted(slot)), []).append(n)
    side_by_side: dict[tuple, list[tuple[tuple[int, ...], list[int]]]] = {}
    groups = []
    for rows, members in by_rows.items():
        for at in range(0, len(members), width):
            part = members[at : at + width]
            if len(rows) == 1:
                key = tuple(slots[n][rows[0]].tobytes() for n in part)
                side_by_side.setdefault(key, []).append((rows[0], part))
            else:
                groups.append(([part], [([row], row) for row in rows]))
    for found in side_by_side.values():
        groups.append(([part for _, part in found], [([row for row, _ in found], found[0][0])]))
    return groups


def _blocks_of(columns: _Columns, c: Coupling, slots: list[_Slot], n_slots: int) -> list[_Block]:
    blocks, n_v, n_w = [], len(c.in_start), len(c.hidden_start)
    for parts, terms in _groups(slots, n_slots):
        wide = len(parts) * n_w  # columns of a term: (row, w)
        tables = [
            ([name for row in rows for name in row], np.stack([slots[n][key] for n in parts[0]], -1))
            for rows, key in terms
        ]
        row, w = np.divmod(np.arange(wide), n_w)
        source = (np.array(parts).T[:, None, row] * n_v + np.arange(n_v)[None, :, None]) * n_w + w  # (s, v, ω)
        for v in range(0, n_v, _MOST_FIELDS):
            for at in range(0, wide, _MOST_COLUMNS):
                some, here = slice(v, v + _MOST_FIELDS), slice(at, at + _MOST_COLUMNS)
                chosen = [(tuple(names[here]), table) for names, table in tables]
                blocks.append(_Block(tuple(c.in_start[some].tolist()), chosen, source[:, some, here]))
    return blocks


@dataclass(frozen=True)
class Sizes:
    """The numbers that kernels are compiled for."""

    kind: int  # one of KINDS
    dim: int
    n_attributes: int
    n_inputs: int  # of the first layer, the constant one of regular frames left out
    regular: bool
    channels: int
    n_zero: int  # hidden coefficients of order 0 (all where the frame is not regular), times channels
    n_rest: int  # the others, times channels
    n_columns: int  # of r
    n_samples: int  # times channels
    n_layers: int
    n_harmonics: int
    function: int  # in plan.FUNCTIONS
    in_size: int
    out_size: int
    n_t: int  # numbers of T per node
    slots: int  # S, V, W, D: slots, fields, columns and components that a program holds, padded
    fields: int
    columns: int
    components: int
    most_components: int  # of an input field, a multiple of `components`
    n_blocks: int
    n_groups: int  # of components of one type of field
    n_covered: int  # columns of x that the couplings read
    has_cutoff: bool


@dataclass(frozen=True, eq=False)
class Tables:
    """What the kernels read of a plan. ``numbers`` are real, ``indices`` integers; both become tensors on the
    device."""

    plan: Plan
    sizes: Sizes
    numbers: dict[str, np.ndarray]
    indices: dict[str, np.ndarray]
    mixing: list[np.ndarray]  # per coupling (b, s, o)
    position: np.ndarray  # of every (s, v, w, u, o) of all couplings in the flat Θ (n_t, C_out)
    pick: np.ndarray  # zonal: coordinates of q; planar: a coordinate of each order 1 .. most


def _pair_tables(frame, sizes_kind: int) -> dict[str, np.ndarray]:
    """Attributes of order 1 that can stand for the azimuth on the axis: (column, partner), the first one last."""
    if sizes_kind != KINDS["planar"]:
        return {"pairs": np.zeros((0, 2), int)}
    first = np.flatnonzero((frame.attribute_order == 1) & (frame.attribute_sign < 0))[::-1]
    return {"pairs": np.stack([first, frame.attribute_partner[first]], 1)}


def _frame_tables(plan: Plan, columns: _Columns, kind: int) -> tuple[dict, dict, np.ndarray]:
    """Numbers and indices of frame.py, and what to pick from hidden.py's harmonics."""
    frame = plan.frame
    numbers = {"scalars": np.array([plan.gamma, 1 / plan.cutoff if plan.cutoff else 0.0])}
    indices = _pair_tables(frame, kind)
    pick = np.array(columns.harmonics, int)
    if frame.kind == "zonal":
        chosen = frame.harmonics[pick]  # (n_harmonics, n_monomials)
        monomials = np.flatnonzero(np.abs(chosen).sum(0) > 1e-14)
        numbers["harmonics"] = chosen[:, monomials].T
        indices["powers"] = frame.powers[monomials].T  # (3, n_monomials)
    elif frame.kind == "planar":
        orders = range(1, columns.most + 1)
        pick = np.array([int(np.flatnonzero(frame.order == k)[0]) for k in orders], int)
        numbers["plane"], numbers["axis"] = frame.plane, frame.axis
        numbers["attribute_sign"] = frame.attribute_sign
        indices["attribute_order"], indices["attribute_partner"] = frame.attribute_order, frame.attribute_partner
    return numbers, indices, pick


def _layer_tables(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Samples (layers, S, c) and inverse (layers, c, S)."""
    if not plan.activations:
        return np.zeros((0, 1, 1)), np.zeros((0, 1, 1))
    return np.stack([a.samples for a in plan.activations]), np.stack([a.inverse for a in plan.activations])


def _by_type(blocks: list[_Block], chunk: int) -> tuple[list[tuple[tuple[int, ...], int, int]], dict]:
    """Groups of components, (starts of the fields, components of a field, number of the chunk), and each one's
    number."""
    sizes = {b.start: b.terms[0][1].shape[0] for b in blocks}
    groups = [(start, n, k) for start, n in sizes.items() for k in range(-(-n // chunk))]
    return groups, {(start, k): g for g, (start, _, k) in enumerate(groups)}


def _flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets, and the lists one after the other."""
    return np.cumsum([0, *map(len, lists)]), np.array([entry for found in lists for entry in found], int)


def _filled(rows: list[tuple[int, ...]], width: int) -> np.ndarray:
    """(rows, width), −1 where a row is shorter."""
    found = np.full((len(rows), width), -1)
    for n, row in enumerate(rows):
        found[n, : len(row)] = row
    return found


def _block_tables(blocks: list[_Block], shape: tuple[int, int, int, int, int], n_columns: int, chunk: int):
    """Numbers and indices of contract.py. ``shape``: S, V, W, components padded to whole groups, 1 + n_harmonics."""
    n_s, n_v, n_w, n_i, n_q = shape
    terms = [(n, names, c) for n, block in enumerate(blocks) for names, c in block.terms]
    table, chunks = np.zeros((len(terms), n_i, n_q, n_s)), np.zeros((len(terms), 2), int)
    groups, group_of = _by_type(blocks, chunk)
    by_group: list[list[int]] = [[] for _ in groups]
    by_columns: list[list[int]] = [[] for _ in range(-(-n_columns // n_w))]
    for t, (n, names, c) in enumerate(terms):
        table[t, : c.shape[0], :, : c.shape[2]] = c
        read = np.flatnonzero(np.abs(c).sum((1, 2))) // chunk
        chunks[t] = read.min(), read.max() + 1
        for k in range(*chunks[t]):
            by_group[group_of[blocks[n].start, k]].append(t)
        for k in sorted({name // n_w for name in names}):
            by_columns[k].append(t)
    # of column k n_w + ω: its place among the term's columns
    where = [
        tuple(names.index(k * n_w + w) if k * n_w + w in names else -1 for w in range(n_w))
        for k, members in enumerate(by_columns)
        for names in (terms[t][1] for t in members)
    ]
    extent = [(*block.source.shape, block.terms[0][1].shape[0]) for block in blocks]
    offset = np.cumsum([0] + [block.source.size for block in blocks])
    indices = {
        "block_terms": np.cumsum([0] + [len(block.terms) for block in blocks]),
        "block_start": _filled([block.start for block in blocks], n_v),
        "block_extent": np.array(extent, int).reshape(-1, 4),
        "block_offset": offset[:-1],
        "term_block": np.array([n for n, *_ in terms], int),
        "term_column": _filled([names for _, names, _ in terms], n_w),
        "term_chunks": chunks,
        "group_chunk": np.array([k for *_, k in groups], int),
        "group_start": _filled([start for start, *_ in groups], n_v),
        "group_components": np.array([n for _, n, _ in groups], int),
        "column_where": _filled(where, n_w),
    }
    indices["group_terms"], indices["group_term"] = _flat(by_group)
    indices["column_terms"], indices["column_term"] = _flat(by_columns)
    covered = sum(len(start) * n for start, n, k in groups if k == 0)
    return {"coupling": table[:, :, 1:], "constant": table[:, :, 0]}, indices, int(offset[-1]), len(groups), covered


def _positions(plan: Plan, per_coupling: list[tuple[list[_Block], int]]) -> np.ndarray:
    """Of the values (s, v, w, u, o) of every coupling in the flat Θ (n_t, C_out)."""
    found, at = [], 0
    for c, (blocks, n_slots) in zip(plan.couplings, per_coupling, strict=True):
        row = np.full(n_slots * len(c.in_start) * len(c.hidden_start), -1)
        for block in blocks:
            n = block.source.size
            row[block.source.reshape(-1)] = at + np.arange(n)
            at += n
        out = (c.out_start[:, None] + np.arange(c.basis.shape[1])).reshape(-1)
        found.append((row[:, None] * plan.out_size + out).reshape(-1))
    return np.concatenate([*found, np.zeros(0, int)])


@lru_cache(maxsize=256)
def tables(plan: Plan) -> Tables:
    """The plan's tables; cached."""
    columns, frame, acts = _Columns(plan), plan.frame, plan.activations
    kind = KINDS["regular planar" if frame.kind == "planar" and frame.regular else frame.kind]
    numbers, indices, pick = _frame_tables(plan, columns, kind)
    numbers["samples"], numbers["inverse"] = _layer_tables(plan)
    if plan.norms:
        indices["way_back"], numbers["way_back_value"] = columns.all_ways_back()

    most_fields = min(_MOST_FIELDS, max((len(c.in_start) for c in plan.couplings), default=1))
    n_v = padded(most_fields)
    slots = [_slots(columns, c) for c in plan.couplings]
    n_s = min(padded(max((len(s) for s, _ in slots), default=1)), _MOST_SLOTS, max(1, _TILE // n_v))
    n_s = max(n_s, 16 // n_v)
    grouped = [(_blocks_of(columns, c, s, n_s), len(s)) for c, (s, _) in zip(plan.couplings, slots, strict=True)]
    blocks = [block for found, _ in grouped for block in found]
    widest = max((len(names) for b in blocks for names, _ in b.terms), default=1)
    n_w = padded(widest, 16)
    most_i = max((c.basis.shape[2] for c in plan.couplings), default=1)
    chunk = most_i if most_i <= 9 and columns.n_harmonics else min(most_i, 4)
    n_i = -(-most_i // chunk) * chunk
    n_columns = columns.one + 1
    shape = (n_s, n_v, n_w, n_i, 1 + columns.n_harmonics)
    more, more_indices, n_t, n_groups, covered = _block_tables(blocks, shape, n_columns, chunk)

    channels = acts[0].channels if acts else 1
    c = len(frame.order) if acts else 0
    zero = int(np.searchsorted(frame.order, 1)) if frame.regular else c
    sizes = Sizes(
        kind=kind,
        dim=frame.dim,
        n_attributes=frame.n_attributes,
        n_inputs=frame.n_position - frame.regular + frame.n_attributes,
        regular=frame.regular,
        channels=channels,
        n_zero=zero * channels,
        n_rest=(c - zero) * channels,
        n_columns=n_columns,
        n_samples=channels * numbers["samples"].shape[1],
        n_layers=len(acts),
        n_harmonics=columns.n_harmonics,
        function=FUNCTIONS.index(acts[0].function) if acts else 0,
        in_size=plan.in_size,
        out_size=plan.out_size,
        n_t=n_t,
        slots=n_s,
        fields=n_v,
        columns=n_w,
        components=chunk,
        most_components=n_i,
        n_blocks=len(blocks),
        n_groups=n_groups,
        n_covered=covered,
        has_cutoff=plan.cutoff is not None,
    )
    mixing, position = [m for _, m in slots], _positions(plan, grouped)
    return Tables(plan, sizes, numbers | more, indices | more_indices, mixing, position, pick)
