"""Interatomic potentials: building, training on forces, molecular dynamics, ASE."""

from ..graph.structures import Structures
from ..layers.potential import PotentialNet, Prediction
from .potential import Potential, load_potential

__all__ = ["Potential", "PotentialNet", "Prediction", "Structures", "load_potential"]
