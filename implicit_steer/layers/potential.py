"""An interatomic potential as a composition of its parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import silu

from .._check import fail, require, require_integer
from ..graph import EdgeTypes, Graph
from ..graph.structures import Structures
from ..plan import Cosines
from ..plan.packing import Constants
from .fields import values
from .kernel import KernelBase
from .point_conv import PointConvBase
from .zbl import ZBL

MAX_NUMBER = 118
_ROWS = 96  # of a Hessian at a time: each takes as much memory as one backward pass through the nodes


class Prediction(NamedTuple):
    """energy (B,) eV; energies (N,) eV, per atom; forces (N, 3) eV/Å; stress (B, 3, 3) eV/Å³, symmetric, or None.

    Energies are float64 in every potential, since their differences matter; the rest has the potential's dtype."""

    energy: Tensor
    energies: Tensor
    forces: Tensor
    stress: Tensor | None

    def detached(self) -> Prediction:
        """The same values without autograd's graph."""
        stress = None if self.stress is None else self.stress.detach()
        return Prediction(self.energy.detach(), self.energies.detach(), self.forces.detach(), stress)


class Gate(torch.nn.Module):
    """y_l[u] = g_l[u](q) · x_l[u] for l ≥ 1, y_0 = g_0(q), q = (x_0, √(1 + |x_l|²)), g a two-layer SiLU network.

    x, y (N, C · Σ_l (2l+1)): C fields of one irrep each of l = 0 … L. Exactly equivariant and smooth.
    """

    def __init__(self, channels: int, max_frequency: int) -> None:
        super().__init__()
        require_integer("channels", channels, 1)
        require_integer("max_frequency", max_frequency, 0)
        width = channels * (max_frequency + 1)
        self.channels, self.max_frequency = channels, max_frequency
        self.first, self.second = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"channels": self.channels, "max_frequency": self.max_frequency}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C · Σ(2l+1)) → the same shape."""
        sizes = [2 * l + 1 for l in range(self.max_frequency + 1)]  # noqa: E741
        scalars, *vectors = x.unflatten(1, (self.channels, -1)).split(sizes, -1)
        norms = [(1 + v.square().sum(-1)).sqrt() for v in vectors]
        gates = self.second(silu(self.first(torch.cat([scalars.squeeze(-1), *norms], 1))))
        first, *others = gates.unflatten(1, (self.channels, -1)).split(1, -1)
        return torch.cat([first, *(v * g for v, g in zip(vectors, others, strict=True))], -1).flatten(1)


class PotentialNet(torch.nn.Module):
    """E = Σ_i e_i,  e_i = shift[z_i] + scale[z_i] · MLP(scalars of x_i) + ½ Σ_j v(r_ij),  F = −∂E/∂pos,
    σ = (1/V) ∂E/∂ε, composed of its parts; :class:`implicit_steer.potentials.Potential` builds them.

    Args:
        species: atomic numbers that occur.
        cutoff: the largest distance between interacting atoms, in Å.
        radial: how many cosines of the distance the kernels see. Convolutions of a file that take them as attributes
            are made to compute them.
        embedding: species → scalars.
        convolutions, gates: one of each per layer.
        head: the MLP, (N, C) → (N, 1).
        products: None, or one per layer: a polynomial of a convolution's result that is added to it.
        zbl: None, or v, the repulsion of nuclei.

    Buffers (set by :meth:`fit`): shift (S,) eV, float64 whatever the potential's dtype; scale (S,) eV; degree (), mean
    number of neighbours.
    """

    species_index: Tensor
    shift: Tensor
    scale: Tensor
    degree: Tensor
    convolutions: torch.nn.ModuleList
    gates: torch.nn.ModuleList
    products: torch.nn.ModuleList | None
    zbl: ZBL | None

    def __init__(
        self,
        species: tuple[int, ...],
        cutoff: float,
        radial: int,
        embedding: torch.nn.Embedding,
        convolutions: torch.nn.ModuleList,
        gates: torch.nn.ModuleList,
        head: torch.nn.Module,
        products: torch.nn.ModuleList | None = None,
        zbl: ZBL | None = None,
    ) -> None:
        super().__init__()
        require(len(set(species)) == len(species), "species", "different atomic numbers", species)
        remedy = "Its pairs of species are numbered by them."
        require(zbl is None or zbl.species == tuple(species), "zbl", f"one of the species {species}", zbl, remedy)
        self.species, self.cutoff, self.radial = tuple(species), float(cutoff), radial
        self.embedding, self.convolutions, self.gates, self.head = embedding, convolutions, gates, head
        self.products, self.zbl = products, zbl
        _compute_cosines(convolutions, radial)
        pairs = _pairs(len(species))
        self._pairs = Constants(pairs)
        for conv in convolutions:
            cast(KernelBase, conv.implicit_kernel).remember_rows(torch.from_numpy(pairs))
        index = torch.full((MAX_NUMBER + 1,), -1)
        index[list(species)] = torch.arange(len(species))
        self.register_buffer("species_index", index)
        self.register_buffer("shift", torch.zeros(len(species), dtype=torch.float64))
        self.register_buffer("scale", torch.ones(len(species)))
        self.register_buffer("degree", torch.tensor(10.0))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("species", "cutoff", "radial", "embedding", "convolutions", "gates", "head", "products", "zbl")
        return {name: getattr(self, name) for name in names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PotentialNet:
        """Behind ``to``, ``float``, ``half``, …: ``shift`` moves, but stays float64."""
        shift = self.shift.double()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.shift.dtype != torch.float64:
            self.shift = shift.to(self.shift.device)
        return self

    def freeze_table(self, knots: int | str = 256) -> PotentialNet:
        """The same potential with splines of the distance in place of the kernels' MLPs, one set for each pair of
        species; its parameters are copies.

        Args:
            knots: how many, or ``"auto"``: see :meth:`~implicit_steer.layers.ImplicitPointConv.freeze_table`.
        """
        frozen = torch.nn.ModuleList(cast(PointConvBase, c).freeze_table(knots=knots) for c in self.convolutions)
        parts = {name: part for name, part in self.arguments().items() if name != "convolutions"}
        made = PotentialNet(**copy.deepcopy(parts), convolutions=frozen)
        made._buffers.update((name, buffer.clone()) for name, buffer in self.named_buffers(recurse=False))
        return made.train(self.training)

    def species_of(self, numbers: Tensor) -> Tensor:
        """(N,) atomic numbers → (N,) positions in ``species``; ``ValueError`` for one that is not among them."""
        known = self.species_index[numbers.clamp(0, MAX_NUMBER)]
        wrong = (known < 0) | (numbers != numbers.clamp(0, MAX_NUMBER))
        expected = f"atomic numbers among {list(self.species)}"
        if torch.compiler.is_compiling():  # a compiled program cannot wait for the answer: it stops where it is wrong
            torch._assert_async(~wrong.any(), f"numbers: expected {expected}, got others.")
        elif wrong.any():
            fail("numbers", expected, sorted(set(numbers[wrong].tolist())), "Build the potential with these species.")
        return known

    def atomic_energies(self, species: Tensor, graph: Graph, edge_delta: Tensor) -> Tensor:
        """e_i (N,) in eV, float64, from species (N,) as :meth:`species_of` gives them, N nodes and E edges of
        ``graph``, and edge_delta (E, 3), target minus source in Å, in the dtype of the weights."""
        delta = edge_delta / self.cutoff
        source, target = species.index_select(0, graph.src), species.index_select(0, graph.dst)
        pairs = EdgeTypes(source * len(self.shift) + target, *self._pairs.like(delta))
        x = self.embedding(species)
        products = [None] * len(self.gates) if self.products is None else self.products
        for conv, product, gate in zip(self.convolutions, products, self.gates, strict=True):
            message = _convolve(conv, x, graph, delta, pairs) / self.degree.sqrt()
            y = gate(message if product is None else message + product(message))
            x = _with_scalars(y, x, cast(Gate, gate).channels) if x.shape != y.shape else x + y
        scalars = x.unflatten(1, (self.embedding.embedding_dim, -1))[..., 0]
        interaction = self.scale[species] * self.head(scalars).squeeze(1)
        # float32 rounds the energies of free atoms, 10⁴ eV, to 10⁻³ eV. Some files have a float32 shift.
        energies = self.shift.double()[species] + interaction.double()
        if self.zbl is not None:
            energies = energies.scatter_add(0, graph.dst, 0.5 * self.zbl(pairs.index, edge_delta).double())
        return energies

    def _vectors(self, structures: Structures) -> Tensor:
        """(E, 3): the edges' vectors in the dtype of the weights, where there is a repulsion none of them 0."""
        delta = structures.edge_delta(self.embedding.weight.dtype)
        if self.zbl is not None:
            structures.require_apart(delta=delta)
        return delta

    def forward(self, structures: Structures) -> Tensor:
        """E (B,) in eV, float64, differentiable in ``structures.pos`` and ``structures.cell``."""
        graph, delta = _graph(structures), self._vectors(structures)
        energies = self.atomic_energies(self.species_of(structures.numbers), graph, delta)
        return _per_structure(energies + _lost(structures), structures)

    def predict(self, structures: Structures, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """Energies and their derivatives; they are NaN for structures with a NaN or infinite position.

        Args:
            structures: they have edges up to at least ``cutoff``, whose vectors are rounded to the potential's dtype.
            stress: whether to compute the stress, too; the cells must have a volume.
            create_graph: keep the graph, so that the results can be differentiated (training, Hessians with
                ``structures.pos.requires_grad_()``).

        Raises:
            ValueError: an unknown species, or ``stress`` without a cell; with ``zbl``, which diverges there, also two
                atoms in one place.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # which knows no derivatives
            with torch.inference_mode(False):
                return self.predict(structures.copied(), stress=stress, create_graph=create_graph)
        if stress:
            volume = torch.linalg.det(structures.cell.double()).abs()
            expected, got = "cells with three lattice vectors", "a cell without volume"
            if torch.compiler.is_compiling():
                torch._assert_async((volume > 0).all(), f"stress: expected {expected}, got {got}.")
            else:
                require(bool((volume > 0).all()), "stress", expected, got)
        with torch.enable_grad(), nullcontext() if create_graph else _constant(self):
            graph, species = _graph(structures), self.species_of(structures.numbers)
            delta = self._vectors(structures)
            if not delta.requires_grad:
                delta.requires_grad_()
            energies = self.atomic_energies(species, graph, delta)
            energies, forces, g = derivatives(energies, delta, structures, create_graph=create_graph)
            energy = _per_structure(energies, structures)
            sigma = None
            if stress:
                sigma = (strain_gradient(delta, g, structures) / volume[:, None, None]).to(forces.dtype)
        found = Prediction(energy, energies, forces, sigma)
        return found if create_graph else found.detached()

    def hessian(self, structures: Structures) -> Tensor:
        """∂²E/∂pos² (N, 3, N, 3) in eV/Å², float64, of one structure: minus the derivatives of its 3 N forces,
        symmetric to rounding. ASE makes vibrations of it: ``VibrationsData(atoms, hessian.numpy())``.

        Raises ``ValueError`` for several structures, and what :meth:`predict` raises.

        Example:
            >>> pos = torch.tensor([[0, 0, 0], [0.96, 0, 0], [0, 0.96, 0]], dtype=torch.float64)
            >>> water = Structures.single(torch.tensor([8, 1, 1]), pos, 4.0)
            >>> Potential([1, 8], cutoff=4.0).double().hessian(water).shape
            torch.Size([3, 3, 3, 3])
        """
        require(structures.num_graphs == 1, "structures", "one structure", f"{structures.num_graphs} of them")
        pos = structures.pos.detach().double().requires_grad_()
        with torch.enable_grad(), _constant(self):
            forces = self.predict(structures.moved(pos), create_graph=True).forces.flatten()
        unit, options = torch.eye(len(forces)).to(forces), {"retain_graph": True, "is_grads_batched": True}
        chunks = [unit[n : n + _ROWS] for n in range(0, len(forces), _ROWS)]
        rows = [torch.autograd.grad(forces, pos, chunk, **options)[0] for chunk in chunks]
        return -torch.cat([pos.new_zeros(0, *pos.shape), *rows]).view(*pos.shape, *pos.shape)

    def fit(self, structures: Structures, shift: Mapping[int, float] | None = None) -> None:
        """Set ``shift`` (by default by least squares of the energies on the composition), ``scale`` (r.m.s. force of
        each species times 1 Å) and ``degree`` from ``structures``, which hold energies and forces.

        ``shift``: eV of a single atom by atomic number, for all species.

        Raises ``ValueError`` where the structures hold no labels, or where one is NaN or infinite, which it names; and
        where ``shift`` lacks a species."""
        energy, forces = structures.energy, structures.forces
        if energy is None or forces is None:
            absent = "energy" if energy is None else "forces"
            fail("structures", f"some with {absent}", "some without")
        structures.require_finite_labels()
        species, count = self.species_of(structures.numbers), len(self.shift)
        owner = structures.batch * count + species
        composition = torch.bincount(owner, minlength=structures.num_graphs * count).view(-1, count)
        if shift is None:
            of_species, *_ = np.linalg.lstsq(composition.double().numpy(), energy.double().numpy(), rcond=None)
        else:
            missing = sorted(set(self.species) - set(shift))
            require(not missing, "shift", f"an energy of each of {list(self.species)}", f"none of {missing}")
            of_species = np.array([shift[number] for number in self.species], dtype=np.float64)
        squares = forces.double().square().mean(1)
        atoms = torch.bincount(species, minlength=count)
        variance = torch.zeros(count, dtype=torch.float64).index_add(0, species, squares) / atoms.clamp(min=1)
        self.shift = torch.from_numpy(of_species).to(self.shift.device)
        self.scale.copy_(torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance)))
        self.degree.fill_(max(1.0, structures.edge_index.shape[1] / len(species)))

    def extra_repr(self) -> str:
        """What distinguishes this potential."""
        return f"species={list(self.species)}, cutoff={self.cutoff} Å"


@contextmanager
def _constant(module: torch.nn.Module) -> Iterator[None]:
    """Within it no parameter requires a gradient. A derivative by positions alone would compute those of the weights,
    too: autograd does not tell a function which of its gradients are wanted."""
    changed = [] if torch.compiler.is_compiling() else _learned(module)
    try:
        for p in changed:
            p.requires_grad_(False)
        yield
    finally:
        for p in changed:
            p.requires_grad_()


def _learned(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that require a gradient. ``module.parameters()`` composes the names of all modules for them, which
    takes a twentieth of a step of molecular dynamics with 32 atoms."""
    found = [p for p in module._parameters.values() if p is not None and p.is_leaf and p.requires_grad]
    return found + [p for child in module._modules.values() if child is not None for p in _learned(child)]


def _graph(structures: Structures) -> Graph:
    return Graph(structures.edge_index, structures.pos.shape[0])


def _compute_cosines(convolutions: torch.nn.ModuleList, count: int) -> None:
    """Let the kernels compute the cosines themselves: in some files these are the first ``count`` of the attributes
    that a convolution is given."""
    for conv in convolutions:
        kernel = cast(KernelBase, conv.implicit_kernel)
        if count and kernel.plan.radial is None and not kernel.plan.is_frozen:
            kernel._set_plan(replace(kernel.plan, radial=Cosines(count, 1.0)))


def _pairs(count: int) -> NDArray[Any]:
    """(count², 2 count): the one-hot species of source and target of every pair, row source · count + target."""
    one_hot = np.eye(count, dtype=np.float32)
    return np.concatenate([np.repeat(one_hot, count, 0), np.tile(one_hot, (count, 1))], 1)


def derivatives(
    energies: Tensor, delta: Tensor, structures: Structures, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """energies (N,), forces (N, 3) and ∂E/∂delta (E, 3), from the energies of the atoms as a function of the edges'
    vectors ``delta`` (E, 3); energies and forces are NaN where a position is NaN or infinite."""
    (g,) = torch.autograd.grad(energies.sum(), delta, create_graph=create_graph)  # [E, 3]
    # ∂E/∂pos by the chain rule: each edge vector is target minus source
    (source, target), lost = structures.edge_index.unbind(0), _lost(structures)
    forces = g.new_zeros(structures.pos.shape).index_add(0, source, g).index_add(0, target, -g)
    return energies + lost, forces + lost[:, None].to(g.dtype), g


def strain_gradient(delta: Tensor, g: Tensor, structures: Structures) -> Tensor:
    """∂E/∂ε (B, 3, 3) in eV, symmetric, from the edges' vectors ``delta`` (E, 3) and ``g`` = ∂E/∂delta."""
    if structures.num_graphs == 1:  # one product of matrices
        sums = (delta.T @ g)[None]
    else:
        owner = structures.batch[structures.edge_index[1]]
        sums = g.new_zeros(structures.cell.shape).index_add(0, owner, delta[:, :, None] * g[:, None])
    return 0.5 * (sums + sums.mT)


def _lost(structures: Structures) -> Tensor:
    """(N,) float64: NaN where a position is NaN or infinite, else 0. An atom without neighbours has no NaN edge."""
    pos = structures.pos.detach().double()
    return (pos - pos).sum(1)


def _convolve(conv: Any, x: Tensor, graph: Graph, delta: Tensor, pairs: EdgeTypes) -> Tensor:
    """Apply ``conv`` to plain tensors."""
    coordinates = x.new_zeros(x.shape[0], 3)  # a GeometricTensor has some; the layer only passes them on
    return values(conv(conv.in_type(x, coordinates), graph, delta, pairs))


def _with_scalars(y: Tensor, scalars: Tensor, channels: int) -> Tensor:
    """y (N, C · d) with ``scalars`` (N, C) added to the first component of every field."""
    fields = y.unflatten(1, (channels, -1))
    return torch.cat([fields[..., :1] + scalars[..., None], fields[..., 1:]], -1).flatten(1)


def _per_structure(energies: Tensor, structures: Structures) -> Tensor:
    # No index_add: torch 2.13 cannot compile one into a tensor of a single element (torch._inductor, C++).
    return energies.new_zeros(structures.num_graphs).scatter_add(0, structures.batch, energies)
