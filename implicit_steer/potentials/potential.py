"""An interatomic potential: invariant energy per atom, forces and stress as its exact derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from .._check import fail, load_extra, require
from ..deploy.convert import saved_as
from ..irreps import ImplicitPointConv, TensorSquare
from ..layers.potential import MAX_NUMBER, Gate, PotentialNet
from ..layers.zbl import ZBL
from ..plan import Bessel, Cosines

RADIAL_BASES = {"cosine": Cosines, "bessel": Bessel}


@saved_as(PotentialNet)
class Potential(PotentialNet):
    """E = Σ_i e_i,  e_i = shift[z_i] + scale[z_i] · MLP(scalars of x_i),  F = −∂E/∂pos,  σ = (1/V) ∂E/∂ε.

    x starts as an embedding of the species; each of ``blocks`` layers adds Gate(m), m = conv(x) / √degree, conv an
    :class:`~implicit_steer.irreps.ImplicitPointConv` whose kernel sees the edge vector, ``radial`` functions of its
    length and the species of both ends, and which vanishes with two derivatives at ``cutoff``. So energies are
    invariant and forces equivariant to rounding, and smooth where an atom crosses the cutoff. It needs no escnn.

    Atoms in one place have finite energies, forces and second derivatives, the limit of small distances; with ``zbl``,
    which diverges there, they are an error that names them.

    Args:
        species: atomic numbers that occur, for example ``[1, 6, 8]``.
        cutoff: Å, the largest distance between interacting atoms.
        channels, max_frequency, blocks: fields per layer, each with l = 0 … max_frequency; number of layers.
        radial, radial_basis: how many functions of the distance r the kernels see, and which, both of r / cutoff:
            "cosine", :class:`~implicit_steer.irreps.Cosines`, or "bessel", :class:`~implicit_steer.irreps.Bessel`.
        kernel_layers, kernel_channels: size of the kernels' MLPs.
        activation: of the kernels' MLPs; a smooth one ("silu", "gelu", "tanh").
        depthwise: whether the kernels act channel by channel; it takes far fewer weights at many channels.
        correlation: 1, or 2: m + P(m) in place of m, P a :class:`~implicit_steer.irreps.TensorSquare`. The energy of an
            atom then depends on pairs of its neighbours at each layer.
        zbl: whether the repulsion of nuclei, :class:`~implicit_steer.layers.ZBL`, is added to the energy, so that atoms
            that come closer than in any training structure are pushed apart.
        backend: of the convolutions.

    Energies are float64 also in a float32 potential: interactions are computed in its dtype, edge vectors before, and
    sums with the large energies of free atoms after, in float64.

    Buffers (set by :meth:`fit`): shift (S,) eV, float64 whatever the potential's dtype; scale (S,) eV; degree (), mean
    number of neighbours.

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
        radial_basis: str = "cosine",
        kernel_layers: int = 3,
        kernel_channels: int = 8,
        activation: str = "silu",
        depthwise: bool = False,
        correlation: int = 1,
        zbl: bool = False,
        backend: str = "auto",
    ):
        species = _checked_species(species)
        number = isinstance(cutoff, float | int) and not isinstance(cutoff, bool) and 0 < cutoff < math.inf
        require(number, "cutoff", "a positive radius in Å", repr(cutoff))
        smooth = ("silu", "gelu", "tanh")
        require(activation in smooth, "activation", f"one of {smooth}: forces are to be smooth", repr(activation))
        sizes = {"channels": (channels, 1), "max_frequency": (max_frequency, 0), "blocks": (blocks, 1)}
        for name, (value, least) in {**sizes, "radial": (radial, 0)}.items():
            require(isinstance(value, int) and value >= least, name, f"an integer >= {least}", repr(value))
        require(radial_basis in RADIAL_BASES, "radial_basis", f"one of {tuple(RADIAL_BASES)}", repr(radial_basis))
        require(correlation in (1, 2), "correlation", "1 or 2", repr(correlation))
        require(isinstance(zbl, bool), "zbl", "True or False", repr(zbl), kind=TypeError)
        field = [(1, (degree, (-1) ** degree)) for degree in range(max_frequency + 1)]  # 0e, 1o, 2e, …
        scalars, hidden = f"{channels}x0e", field * channels
        kernel = {"n_layers": kernel_layers, "n_channels": kernel_channels, "activation": activation, "cutoff": 1.0}
        kernel |= {"depthwise": depthwise, "backend": backend}
        functions = RADIAL_BASES[radial_basis](radial, 1.0) if radial else None
        squares = [TensorSquare(hidden, hidden) for _ in range(blocks)] if correlation == 2 else []
        super().__init__(
            species=tuple(species),
            cutoff=cutoff,
            radial=radial,
            embedding=torch.nn.Embedding(len(species), channels),
            convolutions=torch.nn.ModuleList(
                ImplicitPointConv(into, hidden, 2 * len(species), radial=functions, **kernel)
                for into in [scalars, *[hidden] * (blocks - 1)]
            ),
            gates=torch.nn.ModuleList(Gate(channels, max_frequency) for _ in range(blocks)),
            head=torch.nn.Sequential(
                torch.nn.Linear(channels, channels), torch.nn.SiLU(), torch.nn.Linear(channels, 1)
            ),
            products=torch.nn.ModuleList(squares) if squares else None,
            zbl=ZBL(tuple(species), cutoff) if zbl else None,
        )
        self.options: dict[str, Any] = {
            "species": list(species),
            "cutoff": float(cutoff),
            "channels": channels,
            "max_frequency": max_frequency,
            "blocks": blocks,
            "radial": radial,
            "radial_basis": radial_basis,
            "kernel_layers": kernel_layers,
            "kernel_channels": kernel_channels,
            "activation": activation,
            "depthwise": depthwise,
            "correlation": correlation,
            "zbl": zbl,
            "backend": backend,
        }

    def save(self, path: str | Path) -> None:
        """Write the options and the weights; :func:`load_potential` reads them."""
        torch.save({"options": self.options, "state_dict": self.state_dict()}, path)


def load_potential(path: str | Path) -> Potential:
    """The potential that :meth:`Potential.save` wrote, in its dtype, in evaluation mode.

    A file with escnn's convolutions requires escnn to be converted; save the result to be rid of it.

    Raises ``ValueError`` where the file is no such file, ``RuntimeError`` where escnn is needed and missing.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        options, state = saved["options"], saved["state_dict"]
    except KeyError:
        fail(str(path), "a file written by Potential.save", "another one", "implicit_steer.load reads those of save.")
    except (RuntimeError, EOFError, OSError, TypeError, UnpicklingError, ValueError) as error:
        fail(str(path), "a file written by Potential.save", error)
    if "sampling" in options:
        load_extra("escnn", "escnn")
        options, state = import_module("._escnn_files", __package__).converted(options, state)
    potential = Potential(**options).to(state["embedding.weight"].dtype)
    potential.load_state_dict(state)
    return potential.eval()


def _checked_species(species: Any) -> list[int]:
    expected = f"different atomic numbers from 1 to {MAX_NUMBER}"
    require(isinstance(species, Sequence) and len(species) > 0, "species", expected, repr(species), kind=TypeError)
    whole = all(isinstance(z, int) and not isinstance(z, bool) and 1 <= z <= MAX_NUMBER for z in species)
    require(whole and len(set(species)) == len(species), "species", expected, repr(species))
    return list(species)
