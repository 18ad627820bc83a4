"""Interatomic potentials: building, training on forces, certificates, molecular dynamics, ASE."""

from ..graph.structures import Structures
from ..layers.potential import PotentialNet, Prediction
from .certificate import Certificate, certify
from .potential import Potential, load_potential

__all__ = ["Certificate", "Potential", "PotentialNet", "Prediction", "Structures", "certify", "load_potential"]
