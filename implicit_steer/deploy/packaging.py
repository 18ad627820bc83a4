"""A model as a package that runs without Python, compiled ahead of time by PyTorch's AOTInductor."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._check import require
from ..graph import Graph
from ..graph.structures import Structures
from ..layers.potential import PotentialNet, derivatives, strain_gradient
from .convert import convert


def package(
    module: torch.nn.Module,
    path: str | os.PathLike[str],
    inputs: Sequence[Tensor] | None = None,
    dynamic_shapes: Any = None,
) -> None:
    """Compile ``module`` into the package ``path`` (``.pt2``), which ``torch::inductor::AOTIModelPackageLoader`` runs
    in C++ and ``torch._inductor.aoti_load_package`` in Python.

    The program loads torch's libraries and, before the package, this one's ``_ops.so``, which knows no Python
    (``implicit_steer.deploy.OPERATORS`` is its path). A package is for the kind of processor that made it, for torch's
    version, and for tensors on the CPU. What was learned is inside, at the values that it has now, in evaluation mode.

    A :class:`~implicit_steer.potentials.Potential` becomes the program

        (numbers, pos, cell, edge_index, shift) → (energy (1,), energies (N,), forces (N, 3), virial (3, 3))

    of one structure, with two or more atoms and edges: numbers (N,) int64; pos (N, 3) and cell (3, 3) in float64, Å,
    rows = lattice vectors, anything where nothing repeats; edge_index (2, E) int64, row 0 = source j, row 1 = target i,
    each pair in both directions, up to the cutoff or beyond; shift (E, 3), whole numbers in the potential's dtype:
    an edge's vector is ``pos[i] - pos[j] + shift @ cell``. Energies are in eV and float64, forces in eV/Å and the
    virial, −V σ, in eV, both in the potential's dtype.

    Args:
        module: a potential; or a layer or network, as :func:`implicit_steer.save` takes it, on plain tensors.
        path: the package's file.
        inputs, dynamic_shapes: of another module than a potential: what its ``forward`` takes as an example, and which
            sizes vary, as ``torch.export.export`` takes them.

    Raises:
        TypeError: a part of ``module`` cannot be saved.
        ValueError: ``path`` has another ending; a potential with ``inputs``, another module without.
        RuntimeError: the native extension is missing.
    """
    available, reason = _native.available()
    require(available, "package", "the native extension", reason, kind=RuntimeError)
    path = Path(path)
    require(path.suffix == ".pt2", "path", "a file that ends in .pt2", str(path))
    plain = copy.deepcopy(convert(module)).eval().requires_grad_(False)
    is_potential = isinstance(plain, PotentialNet)
    expected = "none for a potential" if is_potential else "an example of what forward takes"
    require(is_potential == (inputs is None), "inputs", expected, "none" if inputs is None else "some")
    if isinstance(plain, PotentialNet):
        program = _with_forces(plain)
    else:
        program = torch.export.export(plain, tuple(inputs or ()), dynamic_shapes=dynamic_shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


class _Energies(torch.nn.Module):
    """The energies of the atoms, (N,), from numbers (N,), edge_index (2, E) and the edges' vectors (E, 3)."""

    def __init__(self, potential: PotentialNet) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, numbers: Tensor, edge_index: Tensor, delta: Tensor) -> Tensor:
        graph = Graph(edge_index, numbers.shape[0])
        return self.potential.atomic_energies(self.potential.species_of(numbers), graph, delta)


def _with_forces(potential: PotentialNet) -> torch.export.ExportedProgram:
    """The program of a potential. torch.export takes no derivative inside; make_fx does, and cannot tell this package
    that it traces. So the one exports the energies, and the other takes the derivative of what that gave."""
    from torch.fx.experimental.proxy_tensor import make_fx

    dtype = potential.embedding.weight.dtype
    atoms, edges = torch.export.Dim("atoms", min=2), torch.export.Dim("edges", min=2)
    n, n_edges = 5, 7  # unlike each other and all other sizes: make_fx takes equal sizes as one
    numbers, edge_index = torch.full((n,), potential.species[0]), torch.arange(2 * n_edges).view(2, -1) % n
    pos, cell = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    shift = torch.zeros(n_edges, 3, dtype=dtype)
    sizes: Any = ({0: atoms}, {1: edges}, {0: edges})
    energies = torch.export.export(_Energies(potential), (numbers, edge_index, shift), dynamic_shapes=sizes).module()

    def derived(numbers: Tensor, pos: Tensor, cell: Tensor, edge_index: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        batch = torch.zeros_like(numbers)
        structures = Structures(numbers, pos, cell[None], edge_index, shift, batch, 1)
        delta = structures.edge_delta(dtype).requires_grad_()
        found, forces, g = derivatives(energies(numbers, edge_index, delta), delta, structures)
        of_strain = strain_gradient(delta, g, structures)
        return found.sum(0, keepdim=True).detach(), found.detach(), forces, -of_strain[0].detach()

    given = numbers, pos, cell, edge_index, shift
    traced = make_fx(derived, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*given)
    sizes = ({0: atoms}, {0: atoms}, None, {1: edges}, {0: edges})
    return torch.export.export(traced, given, dynamic_shapes=sizes)
