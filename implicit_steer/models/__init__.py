"""Networks of the experiments. They need the extra ``escnn``."""

from .. import _require_escnn  # noqa: F401

# isort: split
from .modelnet import ModelNetNet
from .nbody import NBodyNet
from .potential import Potential, load_potential
from .qm9 import QM9Net

__all__ = ["ModelNetNet", "NBodyNet", "Potential", "QM9Net", "load_potential"]
