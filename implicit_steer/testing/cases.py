"""Named problems, shared by the tests and the benchmark: a layer, a graph, inputs. Needs the extra ``escnn``."""

from __future__ import annotations

from ..lowering import _require_escnn  # noqa: F401

# isort: split
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from escnn import gspaces
from escnn.group import GroupElement, Representation, directsum
from escnn.nn import FieldType
from torch import Tensor

from ..graph import Graph
from ..graph.neighbours import knn_graph
from ..nn import ImplicitPointConv

SPACES: dict[str, Callable[[], gspaces.GSpace]] = {
    "O(3)": gspaces.flipRot3dOnR3,
    "SO(3)": gspaces.rot3dOnR3,
    "O(2) on R2": gspaces.flipRot2dOnR2,
    "O(2) on R2, axis 0": lambda: gspaces.flipRot2dOnR2(axis=0.0),
    "SO(2) on R2": gspaces.rot2dOnR2,
    "SO(2) on R3": gspaces.rot2dOnR3,
    "cone O(2) on R3": gspaces.conicalOnR3,
    "dihedral O(2) on R3": gspaces.dihedralOnR3,
    "cylinder on R3": gspaces.cylindricalOnR3,
    "full cylinder on R3": gspaces.fullCylindricalOnR3,
    "mirror on R3": gspaces.mirOnR3,
    "inversion on R3": gspaces.invOnR3,
    "trivial on R3": gspaces.trivialOnR3,
    "C4 on R2": lambda: gspaces.rot2dOnR2(4),
    "D4 on R2": lambda: gspaces.flipRot2dOnR2(4),
    "C4 on R3": lambda: gspaces.rot2dOnR3(4),
    "D3 on R3": lambda: gspaces.dihedralOnR3(3),
    "icosahedral on R3": gspaces.icoOnR3,
    "octahedral on R3": gspaces.octaOnR3,
    "full octahedral on R3": gspaces.fullOctaOnR3,
}


def field(gspace: gspaces.GSpace, name: str) -> Representation:
    """One field by name: a sum, like ``"scalar+vector"``, of

    ``scalar``, ``vector`` (how positions transform), ``lN`` (O(3), SO(3): degree N, of the parity of functions on the
    sphere), ``regular`` (finite groups).
    """
    group, parts = gspace.fibergroup, []
    for part in name.split("+"):
        if part == "scalar":
            parts.append(group.trivial_representation)
        elif part == "vector":
            parts.append(gspace.basespace_action)
        elif part == "regular":
            parts.append(group.regular_representation)
        else:
            degree = int(part[1:])
            parts.append(group.irrep(degree) if group.name == "SO(3)" else group.irrep(degree % 2, degree))
    return parts[0] if len(parts) == 1 else directsum(parts)


def fields(gspace: gspaces.GSpace, names: str | None) -> FieldType | None:
    """A field type like ``"4 scalar+vector, 1 scalar"``; None for None."""
    if names is None:
        return None
    reprs = []
    for entry in names.split(", "):
        count, name = entry.split(" ")
        reprs += [field(gspace, name)] * int(count)
    return gspace.type(*reprs)


@dataclass(frozen=True)
class Case:
    """A layer and the size of its graph."""

    name: str
    space: str
    into: str
    out: str
    attributes: str | None
    n_layers: int = 3
    n_channels: int = 4
    nodes: int = 12
    degree: int = 5  # mean number of edges per node; the graph is random unless knn
    knn: bool = False
    copies: int = 1  # disjoint clouds in one batch
    uniform: bool = False  # positions uniform in a cube, where `degree` neighbours have mean distance 1; else normal

    @property
    def edges(self) -> int:
        """The number of edges, where every node has enough neighbours."""
        return self.nodes * self.copies * self.degree

    @property
    def _side(self) -> float:
        """The side of the cube, in R³: a ball with `degree` points has the radius 4/3, which makes their mean distance
        1."""
        return (self.nodes * 4 / 3 * math.pi * (4 / 3) ** 3 / self.degree) ** (1 / 3)

    @property
    def gspace(self) -> gspaces.GSpace:
        """A fresh gspace."""
        return SPACES[self.space]()

    def layer(self, seed: int = 0, **options) -> ImplicitPointConv:
        """The layer with weights moved off their initial values, so that biases and norms count."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        gspace = self.gspace
        types = (fields(gspace, self.into), fields(gspace, self.out), fields(gspace, self.attributes))
        conv = ImplicitPointConv(*types, self.n_layers, self.n_channels, **options)
        with torch.no_grad():
            for p in conv.parameters():
                p += 0.2 * torch.randn_like(p)
        return conv

    def inputs(self, conv: ImplicitPointConv, seed: int = 0) -> Problem:
        """Random inputs for ``conv``, of its dtype and device."""
        generator = torch.Generator().manual_seed(seed)
        width = conv.implicit_kernel.shell_width
        dim, n = conv.in_type.gspace.dimensionality, self.nodes * self.copies

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(width)

        pos = normal(n, dim)
        if self.uniform:
            pos = self._side * torch.rand(n, dim, generator=generator).to(width)
        if self.knn:
            batch = torch.arange(self.copies).repeat_interleave(self.nodes)
            edges = knn_graph(pos.cpu(), self.degree, batch).to(width.device)
        else:
            edges = torch.randint(0, n, (2, n * self.degree), generator=generator).to(width.device)
        delta = pos[edges[1]] - pos[edges[0]]
        size = 0 if conv.edge_attr_type is None else conv.edge_attr_type.size
        attributes = normal(edges.shape[1], size) if size else None
        return Problem(normal(n, conv.in_type.size), pos, Graph(edges, n), delta, attributes)


@dataclass
class Problem:
    """Inputs of one call."""

    x: Tensor  # (N, C_in)
    pos: Tensor  # (N, dim)
    graph: Graph
    delta: Tensor  # (E, dim)
    attributes: Tensor | None  # (E, A)

    def arguments(self, conv: ImplicitPointConv) -> tuple:
        """What the layer is called with."""
        return conv.in_type(self.x, self.pos), self.graph, self.delta, self.attributes

    def run(self, conv: ImplicitPointConv) -> Tensor:
        """The layer's output (N, C_out)."""
        return conv(*self.arguments(conv)).tensor

    def requires_grad(self) -> list[Tensor]:
        """Make the inputs leaves that require gradients, and return them."""
        self.x, self.delta = (t.detach().clone().requires_grad_() for t in (self.x, self.delta))
        leaves = [self.x, self.delta]
        if self.attributes is not None:
            self.attributes = self.attributes.detach().clone().requires_grad_()
            leaves.append(self.attributes)
        return leaves


def _small() -> list[Case]:
    uniform, mixed = "2 scalar+vector", "1 scalar, 2 scalar+vector, 1 vector"
    cases = [
        Case("o3", "O(3)", uniform, "3 scalar+vector", "1 scalar"),
        Case("o3-no-attr", "O(3)", uniform, "3 scalar+vector", None, n_layers=2),
        Case("o3-l2", "O(3)", "1 scalar+l1+l2", "2 scalar+l1+l2", "1 scalar", n_layers=2, n_channels=3),
        Case("o3-vector-attr", "O(3)", uniform, "3 scalar", "1 scalar+vector"),
        Case("o3-mixed", "O(3)", mixed, "2 vector, 1 scalar+vector, 1 scalar", "2 scalar"),
        Case("o3-linear", "O(3)", uniform, "3 scalar+vector", "1 scalar+vector", n_layers=1),
        Case("so3", "SO(3)", uniform, "3 scalar+vector", "2 scalar"),
        Case("so3-mixed", "SO(3)", mixed, "1 l2, 2 scalar", None, n_layers=2),
        Case("o2", "O(2) on R2", uniform, "3 scalar+vector", "1 scalar+vector"),
        Case("so2", "SO(2) on R2", uniform, "3 scalar+vector", "2 scalar"),
        Case("so2-mixed", "SO(2) on R2", mixed, "1 vector, 1 scalar", "1 scalar, 1 vector"),
        Case("so2-r3", "SO(2) on R3", uniform, "3 scalar+vector", "1 scalar, 1 vector"),
        Case("cone-r3", "cone O(2) on R3", uniform, "2 scalar+vector", "1 vector"),
        Case("dihedral-r3", "dihedral O(2) on R3", uniform, "2 scalar+vector", "1 vector"),
        Case("cylinder-r3", "cylinder on R3", uniform, "2 scalar+vector", "1 vector", n_layers=2),
        Case("full-cylinder-r3", "full cylinder on R3", uniform, "2 scalar+vector", "1 scalar", n_layers=2),
        Case("mirror-r3", "mirror on R3", uniform, "2 scalar+vector", "1 vector"),
        Case("inversion-r3", "inversion on R3", uniform, "2 regular", "1 vector"),
        Case("trivial-r3", "trivial on R3", uniform, "2 scalar+vector", None),
        Case("c4", "C4 on R2", "2 regular", "3 regular", "1 vector"),
        Case("d4", "D4 on R2", "1 regular", "2 regular", "1 scalar", n_layers=2, n_channels=3),
        Case("d3-r3", "D3 on R3", uniform, "2 scalar+vector", "1 scalar", n_layers=2),
        Case("octa-r3", "octahedral on R3", uniform, "2 scalar+vector", "1 scalar", n_layers=2, n_channels=2),
    ]
    return cases


def _large() -> list[Case]:
    def o3(name: str, fields: str = "8 scalar+vector", attributes: str = "1 scalar", **size) -> Case:
        return Case(name, "O(3)", fields, fields, attributes, 3, 8, knn=True, **size)

    cloud = {"nodes": 1000, "degree": 32}
    molecule = {"attributes": "14 scalar", "nodes": 18, "degree": 2}
    return [
        o3("cloud", **cloud),
        o3("cloud-batch", nodes=1024, degree=32, copies=8),
        o3("molecules", **molecule, copies=32),
        o3("molecules-128", **molecule, copies=128),
        o3("materials", nodes=10_000, degree=60, uniform=True),
        o3("cloud-16", "16 scalar+vector", **cloud),
        o3("cloud-32", "32 scalar+vector", **cloud),
        o3("cloud-l2", "8 scalar+l1+l2", **cloud),
        replace(o3("cloud-so2", **cloud), space="SO(2) on R3"),
    ]


# Finite groups of order up to 8: the intertwiners of larger regular fields are dense and take GB to build.
_REGULAR = ("mirror on R3", "inversion on R3", "trivial on R3", "C4 on R2", "C4 on R3", "D3 on R3", "D4 on R2")


def _groups() -> list[Case]:
    kinds = {name: "4 regular" if name in _REGULAR else "8 scalar+vector" for name in SPACES}
    size = {"nodes": 500, "degree": 16, "knn": True}
    return [Case(name, name, kind, kind, "1 scalar", 3, 8, **size) for name, kind in kinds.items()]


SMALL: dict[str, Case] = {c.name: c for c in _small()}  # every group and feature, for tests
LARGE: dict[str, Case] = {c.name: c for c in _large()}  # realistic sizes, for the benchmark
GROUPS: dict[str, Case] = {c.name: c for c in _groups()}  # every space at one size, for the benchmark


def equivariance_error(conv: ImplicitPointConv, problem: Problem, elements: list[GroupElement]) -> float:
    """max over g of |conv(g · inputs) − g · conv(inputs)| / |conv(inputs)|, the Frobenius norm over all nodes."""

    def turn(rep: Representation, g: GroupElement, t: Tensor) -> Tensor:
        return t @ torch.tensor(rep(g), dtype=t.dtype, device=t.device).T

    attributes = conv.edge_attr_type and conv.edge_attr_type.representation
    errors = []
    with torch.no_grad():
        out = problem.run(conv)
        for g in elements:
            moved = replace(
                problem,
                x=turn(conv.in_type.representation, g, problem.x),
                delta=turn(conv.in_type.gspace.basespace_action, g, problem.delta),
                attributes=None if problem.attributes is None else turn(attributes, g, problem.attributes),
            )
            errors.append((moved.run(conv) - turn(conv.out_type.representation, g, out)).norm() / out.norm())
    return max(errors).item()
