"""Networks of the experiments. They need escnn."""

from .modelnet import ModelNetNet
from .potential import Potential, load_potential
from .qm9 import QM9Net

__all__ = ["ModelNetNet", "Potential", "QM9Net", "load_potential"]
