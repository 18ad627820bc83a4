"""Networks of the experiments. They need escnn."""

from .modelnet import ModelNetNet
from .nbody import NBodyNet
from .potential import Potential, load_potential
from .qm9 import QM9Net

__all__ = ["ModelNetNet", "NBodyNet", "Potential", "QM9Net", "load_potential"]
