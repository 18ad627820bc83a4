"""Steerable implicit convolutions on point clouds and grids, evaluated without forming their kernels."""

from typing import Any

from .graph import Graph, knn_graph, radius_graph
from .info import info

__version__ = "0.1.0"

__all__ = ["Graph", "__version__", "info", "knn_graph", "load", "radius_graph", "save"]


def __getattr__(name: str) -> Any:
    # At the first use: they bring every layer and backend along.
    if name in ("load", "save"):
        from . import deploy

        return getattr(deploy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
