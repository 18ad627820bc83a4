"""Atoms with their neighbours, as potentials take them: several structures side by side as one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .._check import fail, require
from .neighbours import periodic_radius_graph, radius_graph
from .periodic import checked_pbc

_ONE_PLACE = 1e-6  # Å: no method gives atoms that are closer an energy that means anything


@dataclass(frozen=True)
class Structures:
    """B structures with N atoms and E directed edges j → i in all. Lengths are in Å, energies in eV.

    numbers (N,) int64, atomic numbers; pos (N, 3); cell (B, 3, 3), rows = lattice vectors, 0 where there are none;
    edge_index (2, E) source j, target i; shift (E, 3) whole numbers, in the dtype of the edges' vectors
    ``pos[i] - pos[j] + shift @ cell``; batch (N,) structure of each atom, ascending; num_graphs = B;
    energy (B,) float64 and forces (N, 3), where they are known; stress (B, 3, 3) in eV/Å³, positive under tension, NaN
    for structures whose stress is not known.

    Raises ValueError where the shapes do not fit each other, TypeError for a shift that is not floating point.
    """

    numbers: Tensor
    pos: Tensor
    cell: Tensor
    edge_index: Tensor
    shift: Tensor
    batch: Tensor
    num_graphs: int
    energy: Tensor | None = None
    forces: Tensor | None = None
    stress: Tensor | None = None

    def __post_init__(self) -> None:
        n, edges, graphs = self.pos.shape[0], self.edge_index.shape[-1], self.num_graphs
        shapes = {"numbers": (n,), "pos": (n, 3), "cell": (graphs, 3, 3), "edge_index": (2, edges)}
        shapes |= {"shift": (edges, 3), "batch": (n,), "energy": (graphs,), "forces": (n, 3)}
        shapes["stress"] = (graphs, 3, 3)
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                require(tensor.shape == shape, name, f"shape {shape}", tuple(tensor.shape))
        remedy = "Its dtype is the dtype of the edges' vectors."
        require(self.shift.is_floating_point(), "shift", "floating point", self.shift.dtype, remedy, TypeError)

    @classmethod
    def single(cls, numbers: Tensor, pos: Tensor, r: float, cell: Tensor | None = None, pbc: Any = None) -> Structures:
        """One structure, with edges between all atoms at most ``r`` apart, across periodic boundaries too.

        numbers (N,) integers; pos (N, 3); cell (3, 3) or None, and pbc, as
        :func:`~implicit_steer.periodic_radius_graph` takes them. The tensors are copied.

        Raises what :func:`~implicit_steer.periodic_radius_graph` raises, TypeError where ``numbers`` are not integers,
        and ValueError where they do not fit ``pos``.

        Example:
            >>> pos = torch.tensor([[0, 0, 0], [0.96, 0, 0], [0, 0.96, 0]])
            >>> water = Structures.single(torch.tensor([8, 1, 1]), pos, 3.0)
            >>> water.edge_index.shape
            torch.Size([2, 6])
        """
        expected = "a tensor of integers, one atomic number per row of pos"
        ok = isinstance(numbers, Tensor) and not numbers.is_floating_point() and not numbers.is_complex()
        require(ok, "numbers", expected, getattr(numbers, "dtype", type(numbers).__name__), kind=TypeError)
        if cell is None:
            repeats = pbc is not None and checked_pbc(pbc, 3).any()
            require(not repeats, "cell", "the lattice vectors of a periodic box", None)
            edge_index = radius_graph(pos, r)
            shift, cell = pos.new_zeros(edge_index.shape[1], 3), pos.new_zeros(3, 3)
        else:
            edge_index, shift = periodic_radius_graph(pos, r, cell, pbc)
        require(pos.shape[1] == 3, "pos", "shape (N, 3)", tuple(pos.shape))
        require(numbers.shape == pos.shape[:1], "numbers", expected, tuple(numbers.shape))
        batch = torch.zeros(len(pos), dtype=torch.int64, device=pos.device)
        numbers, cell = numbers.to(torch.int64, copy=True), cell.to(pos, copy=True)[None]
        return cls(numbers, pos.clone(), cell, edge_index, shift, batch, 1)

    @classmethod
    def join(cls, parts: Sequence[Structures]) -> Structures:
        """The structures of ``parts`` (at least one) side by side; the stress is NaN in parts without one.

        Raises ValueError where there is no part, or where only some have an energy or forces.
        """
        require(len(parts) > 0, "parts", "at least one structure", "none")
        atoms, graphs, edges, batch = 0, 0, [], []
        for part in parts:
            edges.append(part.edge_index + atoms)
            batch.append(part.batch + graphs)
            atoms, graphs = atoms + len(part.pos), graphs + part.num_graphs
        for name in ("energy", "forces"):
            has = [getattr(part, name) is not None for part in parts]
            remedy = "Leave it out of all with dataclasses.replace, or join those that have it."
            got = f"{sum(has)} of {len(has)}"
            require(all(has) or not any(has), "parts", f"{name} in all or in none", got, remedy)
        rest: dict[str, Any] = {
            name: None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
            for name in ("numbers", "pos", "cell", "shift", "energy", "forces")
        }
        known = [part.stress for part in parts if part.stress is not None]
        if known:
            unknown = [torch.full_like(part.cell, torch.nan, dtype=known[0].dtype) for part in parts]
            rest["stress"] = torch.cat(
                [u if p.stress is None else p.stress for u, p in zip(unknown, parts, strict=True)]
            )
        return cls(edge_index=torch.cat(edges, 1), batch=torch.cat(batch), num_graphs=graphs, **rest)

    def to(self, where: torch.device | str | torch.dtype) -> Structures:
        """The same structures on a device, or with the edges' vectors (that is, shift), forces and stress in a dtype.

        pos and cell take a wider dtype, but not a narrower one, which has too few digits far from the origin, or from
        the home cell. The edges' vectors, which are differences, are rounded to it.
        """
        if not isinstance(where, torch.dtype):
            return self._changed([f.name for f in fields(self)], lambda tensor: tensor.to(where))
        cast = self._changed(("shift", "forces", "stress"), lambda tensor: tensor.to(where))
        return cast._changed(("pos", "cell"), lambda tensor: tensor.to(torch.promote_types(tensor.dtype, where)))

    def edge_delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """(E, 3): ``pos[i] - pos[j] + shift @ cell``, target minus source; computed in float64, then rounded to
        ``dtype``, by default the dtype of ``shift``."""
        source, target = self.edge_index
        pos, cell, shift = self.pos.double(), self.cell.double(), self.shift.double()
        delta = pos.index_select(0, target) - pos.index_select(0, source)
        if self.num_graphs == 1:  # without a cell of its own for every edge
            delta = delta + shift @ cell[0]
        else:
            delta = delta + torch.einsum("ea,eab->eb", shift, cell[self.batch[target]])
        return delta.to(self.shift.dtype if dtype is None else dtype)

    def copied(self) -> Structures:
        """The same structures in copies of their tensors."""
        return self._changed([f.name for f in fields(self)], Tensor.clone)

    def _changed(self, names: Sequence[str], change: Callable[[Tensor], Tensor]) -> Structures:
        tensors = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **changed)

    def moved(self, pos: Tensor) -> Structures:
        """The same atoms and edges at other positions (N, 3)."""
        return replace(self, pos=pos)

    def require_finite_labels(self, name: str = "structures") -> None:
        """Raise a ``ValueError`` that names the structures in which the energy or a force is NaN or infinite; ``name``
        is what it calls these structures."""
        finite = {}  # of each structure's energy, and of each atom's force: whether it is finite
        if self.energy is not None:
            finite["energy"] = self.energy.isfinite()
        if self.forces is not None:
            finite["forces"] = self.forces.isfinite().all(1)
        for label, right in finite.items():
            rows = (~right).nonzero().squeeze(1)
            wrong = (rows if label == "energy" else self.batch[rows].unique()).tolist()
            got = f"NaN or Inf in {len(wrong)} of {self.num_graphs}: indices {wrong[:10]}"
            require(not wrong, name, f"finite {label}", got, "Leave these out, or label them anew.")

    def require_apart(self, name: str = "structures", delta: Tensor | None = None) -> None:
        """Raise a ``ValueError`` that names two atoms in one place, and their structure, where there are such;
        ``name`` is what it calls these structures, and ``delta`` (E, 3) are the edges' vectors, if they are known."""
        squared = (self.edge_delta() if delta is None else delta.detach()).square().sum(1)
        near = squared < _ONE_PLACE**2
        expected = "atoms apart from each other"
        if torch.compiler.is_compiling():  # a compiled program cannot wait for the answer: it stops where it is wrong
            torch._assert_async(~near.any(), f"{name}: expected {expected}, got two in one place.")
        elif near.any():
            edge = int(near.nonzero()[0])
            structure = int(self.batch[self.edge_index[1, edge]])
            first, second = sorted((self.edge_index[:, edge] - (self.batch < structure).sum()).tolist())
            which = f" of structure {structure}" if self.num_graphs > 1 else ""
            got = f"{float(squared[edge].sqrt()):.1g} Å between atoms {first} and {second}{which}"
            fail(name, expected, got, "Remove one of the two.")

    def within(self, r: float) -> Structures:
        """The same structures without the edges longer than ``r``. Edges of a NaN position stay, so that it is seen."""
        keep = (~(self.edge_delta().square().sum(1) > r * r)).nonzero().squeeze(1)
        return replace(self, edge_index=self.edge_index[:, keep], shift=self.shift[keep])
