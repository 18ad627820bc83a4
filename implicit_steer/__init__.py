"""Steerable implicit convolutions on point clouds and grids, evaluated without forming their kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .graph import Graph
from .info import info
from .neighbours import knn, knn_graph, periodic_radius_graph, radius, radius_graph

if TYPE_CHECKING:  # found at the first use, see below
    from . import deploy as deploy
    from . import layers as layers
    from . import models as models
    from . import nn as nn
    from . import viz as viz
    from .deploy import load, register, save

__version__ = "0.1.0"

__all__ = [
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


# Found at the first use: they bring every layer and backend along; nn and models also escnn.
_SUBMODULES = ("deploy", "layers", "models", "nn", "viz")


def __getattr__(name: str) -> Any:
    if name in ("load", "register", "save"):
        return getattr(import_module(".deploy", __name__), name)
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
