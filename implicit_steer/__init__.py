"""Steerable implicit convolutions on point clouds and grids, evaluated without forming their kernels."""

from .deploy import load, save
from .graph import Graph, knn_graph, radius_graph
from .info import info

__version__ = "0.1.0"

__all__ = ["Graph", "__version__", "info", "knn_graph", "load", "radius_graph", "save"]
