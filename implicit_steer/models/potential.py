"""An interatomic potential: invariant energy per atom, forces and stress as its exact derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from escnn import gspaces
from escnn import nn as enn
from escnn.group import directsum
from torch import Tensor
from torch.nn.functional import one_hot, silu

from .._check import fail, require
from ..graph import Graph
from ..nn import ImplicitPointConv
from ..structures import Structures

MAX_NUMBER = 118


class Prediction(NamedTuple):
    """energy (B,) eV; energies (N,) eV, per atom; forces (N, 3) eV/Å; stress (B, 3, 3) eV/Å³, symmetric, or None."""

    energy: Tensor
    energies: Tensor
    forces: Tensor
    stress: Tensor | None


class Gate(torch.nn.Module):
    """y_l[u] = g_l[u](q) · x_l[u] for l ≥ 1, y_0 = g_0(q), q = (x_0, √(1 + |x_l|²)), g a two-layer SiLU network.

    x, y (N, C · Σ_l (2l+1)): C fields of one irrep each of l = 0 … L. Exactly equivariant and smooth.
    """

    def __init__(self, channels: int, max_frequency: int):
        super().__init__()
        self.sizes = [2 * l + 1 for l in range(max_frequency + 1)]  # noqa: E741
        width = channels * len(self.sizes)
        self.channels = channels
        self.first, self.second = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C · Σ(2l+1)) → the same shape."""
        scalars, *vectors = x.unflatten(1, (self.channels, -1)).split(self.sizes, -1)
        norms = [(1 + v.square().sum(-1)).sqrt() for v in vectors]
        gates = self.second(silu(self.first(torch.cat([scalars.squeeze(-1), *norms], 1))))
        first, *others = gates.unflatten(1, (self.channels, -1)).split(1, -1)
        return torch.cat([first, *(v * g for v, g in zip(vectors, others, strict=True))], -1).flatten(1)


class Potential(torch.nn.Module):
    """E = Σ_i e_i,  e_i = shift[z_i] + scale[z_i] · MLP(scalars of x_i),  F = −∂E/∂pos,  σ = (1/V) ∂E/∂ε.

    x starts as an embedding of the species; each of ``blocks`` layers adds Gate(conv(x) / √degree), conv an
    :class:`~implicit_steer.nn.ImplicitPointConv` for O(3) whose kernel sees the edge vector, ``radial`` cosines of its
    length and the species of both ends, and which vanishes with two derivatives at ``cutoff``. So energies are
    invariant and forces equivariant to rounding, and smooth where an atom crosses the cutoff.

    Args:
        species: atomic numbers that occur, for example ``[1, 6, 8]``.
        cutoff: Å, the largest distance between interacting atoms.
        channels, max_frequency, blocks: fields per layer, each with l = 0 … max_frequency; number of layers.
        radial: cosines of the distance that the kernels see.
        kernel_layers, kernel_channels: size of the kernels' MLPs.
        activation: of the kernels' MLPs; a smooth one ("silu", "gelu", "tanh").
        backend, sampling: of the convolutions.

    Buffers (set by :meth:`fit`): shift, scale (S,) eV; degree (), mean number of neighbours.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example:
        >>> potential = Potential([1, 8], cutoff=4.0).double()
        >>> pos = torch.tensor([[0, 0, 0], [0.96, 0, 0], [0, 0.96, 0]], dtype=torch.float64)
        >>> water = Structures.single(torch.tensor([8, 1, 1]), pos, potential.cutoff)
        >>> potential.predict(water).forces.shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        species: Sequence[int],
        cutoff: float,
        *,
        channels: int = 16,
        max_frequency: int = 1,
        blocks: int = 2,
        radial: int = 6,
        kernel_layers: int = 3,
        kernel_channels: int = 8,
        activation: str = "silu",
        sampling: str = "auto",
        backend: str = "auto",
    ):
        super().__init__()
        species = _checked_species(species)
        number = isinstance(cutoff, float | int) and not isinstance(cutoff, bool) and 0 < cutoff < math.inf
        require(number, "cutoff", "a positive radius in Å", repr(cutoff))
        smooth = ("silu", "gelu", "tanh")
        require(activation in smooth, "activation", f"one of {smooth}: forces are to be smooth", repr(activation))
        sizes = {"channels": (channels, 1), "max_frequency": (max_frequency, 0), "blocks": (blocks, 1)}
        for name, (value, least) in {**sizes, "radial": (radial, 0)}.items():
            require(isinstance(value, int) and value >= least, name, f"an integer >= {least}", repr(value))
        self.options: dict[str, Any] = {
            "species": list(species),
            "cutoff": float(cutoff),
            "channels": channels,
            "max_frequency": max_frequency,
            "blocks": blocks,
            "radial": radial,
            "kernel_layers": kernel_layers,
            "kernel_channels": kernel_channels,
            "activation": activation,
            "sampling": sampling,
            "backend": backend,
        }
        self.cutoff, self.radial = float(cutoff), radial
        gspace = gspaces.flipRot3dOnR3()
        field = directsum([gspace.irrep(l % 2, l) for l in range(max_frequency + 1)])  # noqa: E741
        scalar_type, hidden_type = gspace.type(*[gspace.trivial_repr] * channels), gspace.type(*[field] * channels)
        no_space = gspaces.no_base_space(gspace.fibergroup)
        attributes = no_space.type(*[no_space.trivial_repr] * (radial + 2 * len(species)))
        settings = {"activation": activation, "sampling": sampling, "backend": backend, "norm": None, "cutoff": 1.0}
        self.embedding = torch.nn.Embedding(len(species), channels)
        self.convolutions = torch.nn.ModuleList(
            ImplicitPointConv(into, hidden_type, attributes, kernel_layers, kernel_channels, **settings)
            for into in [scalar_type, *[hidden_type] * (blocks - 1)]
        )
        self.gates = torch.nn.ModuleList(Gate(channels, max_frequency) for _ in range(blocks))
        self.head = torch.nn.Sequential(
            torch.nn.Linear(channels, channels), torch.nn.SiLU(), torch.nn.Linear(channels, 1)
        )
        index = torch.full((MAX_NUMBER + 1,), -1)
        index[species] = torch.arange(len(species))
        self.register_buffer("species_index", index)
        self.register_buffer("shift", torch.zeros(len(species)))
        self.register_buffer("scale", torch.ones(len(species)))
        self.register_buffer("degree", torch.tensor(10.0))

    def species_of(self, numbers: Tensor) -> Tensor:
        """(N,) atomic numbers → (N,) positions in ``species``; ``ValueError`` for one that is not among them."""
        known = self.species_index[numbers.clamp(0, MAX_NUMBER)]
        wrong = (known < 0) | (numbers != numbers.clamp(0, MAX_NUMBER))
        if wrong.any():
            expected = f"atomic numbers among {self.options['species']}"
            fail("numbers", expected, sorted(set(numbers[wrong].tolist())), "Build the potential with these species.")
        return known

    def atomic_energies(self, species: Tensor, graph: Graph, edge_delta: Tensor) -> Tensor:
        """e_i (N,) in eV from species (N,) as :meth:`species_of` gives them, N nodes and E edges of ``graph``, and
        edge_delta (E, 3), target minus source in Å."""
        delta = edge_delta / self.cutoff
        kinds = one_hot(species, len(self.shift)).to(delta.dtype)
        ends = [kinds.index_select(0, graph.src), kinds.index_select(0, graph.dst)]
        attributes = torch.cat([_cosines(delta, self.radial), *ends], 1)
        x = self.embedding(species)
        for conv, gate in zip(self.convolutions, self.gates, strict=True):
            y = gate(_convolve(conv, x, graph, delta, attributes) / self.degree.sqrt())
            x = _with_scalars(y, x, gate.channels) if x.shape != y.shape else x + y
        scalars = x.unflatten(1, (self.embedding.embedding_dim, -1))[..., 0]
        return self.shift[species] + self.scale[species] * self.head(scalars).squeeze(1)

    def forward(self, structures: Structures) -> Tensor:
        """E (B,) in eV, differentiable in ``structures.pos`` and ``structures.cell``."""
        energies, _ = self._energies(structures, structures.edge_delta())
        return _per_structure(energies, structures)

    def predict(self, structures: Structures, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """Energies and their derivatives.

        Args:
            structures: of the potential's dtype, with edges up to at least ``cutoff``.
            stress: also the stress; the cells must have a volume.
            create_graph: keep the graph, so that the results can be differentiated (training, Hessians with
                ``structures.pos.requires_grad_()``).

        Raises:
            ValueError: an unknown species; ``stress`` without a cell.
        """
        if stress:
            volume = torch.linalg.det(structures.cell).abs()
            require(bool((volume > 0).all()), "stress", "cells with three lattice vectors", "a cell without volume")
        with torch.enable_grad():
            delta = structures.edge_delta()
            if not delta.requires_grad:
                delta.requires_grad_()
            energies, graph = self._energies(structures, delta)
            (g,) = torch.autograd.grad(energies.sum(), delta, create_graph=create_graph)  # [E, 3]
            # ∂E/∂pos by the chain rule: each edge vector is target minus source
            forces = torch.zeros_like(structures.pos).index_add(0, graph.src, g).index_add(0, graph.dst, -g)
            energy = _per_structure(energies, structures)
            virial = None
            if stress:
                outer = 0.5 * (delta[:, :, None] * g[:, None] + g[:, :, None] * delta[:, None])
                owner = structures.batch[graph.dst]
                virial = torch.zeros_like(structures.cell).index_add(0, owner, outer) / volume[:, None, None]
        results = (energy, energies, forces, virial)
        return Prediction(*results) if create_graph else Prediction(*(r if r is None else r.detach() for r in results))

    def fit(self, structures: Structures) -> None:
        """Set ``shift`` (least squares of the energies on the composition), ``scale`` (r.m.s. force of each species
        times 1 Å) and ``degree`` from ``structures``, which hold energies and forces."""
        species, count = self.species_of(structures.numbers), len(self.shift)
        owner = structures.batch * count + species
        composition = torch.bincount(owner, minlength=structures.num_graphs * count).view(-1, count)
        shift, *_ = np.linalg.lstsq(composition.double().numpy(), structures.energy.double().numpy(), rcond=None)
        squares = structures.forces.double().square().mean(1)
        atoms = torch.bincount(species, minlength=count)
        variance = torch.zeros(count, dtype=torch.float64).index_add(0, species, squares) / atoms.clamp(min=1)
        self.shift.copy_(torch.from_numpy(shift))
        self.scale.copy_(torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance)))
        self.degree.fill_(max(1.0, structures.edge_index.shape[1] / len(species)))

    def save(self, path: str | Path) -> None:
        """Write the options and the weights; :func:`load_potential` reads them."""
        torch.save({"options": self.options, "state_dict": self.state_dict()}, path)

    def extra_repr(self) -> str:
        """What distinguishes this potential."""
        return f"species={self.options['species']}, cutoff={self.cutoff} Å"

    def _energies(self, structures: Structures, delta: Tensor) -> tuple[Tensor, Graph]:
        graph = Graph(structures.edge_index, len(structures.pos))
        return self.atomic_energies(self.species_of(structures.numbers), graph, delta), graph


def load_potential(path: str | Path) -> Potential:
    """The potential that :meth:`Potential.save` wrote, in its dtype, in evaluation mode.

    Raises ``ValueError`` where the file is no such file, or was written under another basis of the group.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        options, state = saved["options"], saved["state_dict"]
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        fail(str(path), "a file written by Potential.save", error)
    potential = Potential(**options).to(state["shift"].dtype)
    potential.load_state_dict(state)
    return potential.eval()


def _checked_species(species: Any) -> list[int]:
    expected = f"different atomic numbers from 1 to {MAX_NUMBER}"
    require(isinstance(species, Sequence) and len(species) > 0, "species", expected, repr(species), kind=TypeError)
    whole = all(isinstance(z, int) and not isinstance(z, bool) and 1 <= z <= MAX_NUMBER for z in species)
    require(whole and len(set(species)) == len(species), "species", expected, repr(species))
    return list(species)


def _cosines(delta: Tensor, count: int) -> Tensor:
    """(E, count): √2 cos(π n |delta|), n = 1 … count; smooth at 0 too, being even."""
    length = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    n = torch.arange(1, count + 1, dtype=delta.dtype, device=delta.device)
    return math.sqrt(2) * torch.cos(math.pi * n * length)


def _convolve(conv: ImplicitPointConv, x: Tensor, graph: Graph, delta: Tensor, attributes: Tensor) -> Tensor:
    """``conv`` between plain tensors."""
    coordinates = x.new_zeros(len(x), 3)  # a GeometricTensor has some; the layer only passes them on
    return conv(enn.GeometricTensor(x, conv.in_type, coordinates), graph, delta, attributes).tensor


def _with_scalars(y: Tensor, scalars: Tensor, channels: int) -> Tensor:
    """y (N, C · d) with ``scalars`` (N, C) added to the first component of every field."""
    fields = y.unflatten(1, (channels, -1))
    return torch.cat([fields[..., :1] + scalars[..., None], fields[..., 1:]], -1).flatten(1)


def _per_structure(energies: Tensor, structures: Structures) -> Tensor:
    return energies.new_zeros(structures.num_graphs).index_add(0, structures.batch, energies)
