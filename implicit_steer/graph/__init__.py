"""Edges: :class:`Graph`, :class:`EdgeTypes`, neighbours of points, periodic cells, batches of atomic structures."""

from .edge_types import EdgeTypes
from .graph import Graph
from .neighbours import knn, knn_graph, periodic_radius_graph, radius, radius_graph

__all__ = ["EdgeTypes", "Graph", "knn", "knn_graph", "periodic_radius_graph", "radius", "radius_graph"]
