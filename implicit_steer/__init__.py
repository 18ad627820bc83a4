"""Steerable implicit convolutions on point clouds and grids, evaluated without forming their kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .graph import EdgeTypes, Graph, knn, knn_graph, periodic_radius_graph, radius, radius_graph
from .info import info

if TYPE_CHECKING:  # imported at their first use, see below
    from . import deploy as deploy
    from . import experiments as experiments
    from . import irreps as irreps
    from . import layers as layers
    from . import nn as nn
    from . import potentials as potentials
    from .deploy import load, register, save
    from .potentials import lammps as lammps
    from .training import viz as viz

__all__ = [
    "EdgeTypes",
    "Graph",
    "__version__",
    "info",
    "knn",
    "knn_graph",
    "load",
    "periodic_radius_graph",
    "radius",
    "radius_graph",
    "register",
    "save",
]


# Imported at their first use, because they import every layer and backend; nn also imports escnn.
_FOUND = {name: f".{name}" for name in ("deploy", "experiments", "irreps", "layers", "nn", "potentials")}
_FOUND |= {"lammps": ".potentials.lammps", "viz": ".training.viz"}


def __getattr__(name: str) -> Any:
    if name in ("load", "register", "save"):
        return getattr(import_module(".deploy", __name__), name)
    if name in _FOUND:
        return import_module(_FOUND[name], __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_FOUND})
