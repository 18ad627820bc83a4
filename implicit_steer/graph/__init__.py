"""Edges: :class:`Graph`, neighbours of points, periodic cells, batches of atomic structures."""

from .graph import Graph
from .neighbours import knn, knn_graph, periodic_radius_graph, radius, radius_graph

__all__ = ["Graph", "knn", "knn_graph", "periodic_radius_graph", "radius", "radius_graph"]
