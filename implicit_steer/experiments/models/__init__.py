"""Networks of the experiments. They need the extra ``escnn``."""

from ...lowering import _require_escnn  # noqa: F401

# isort: split
from .modelnet import ModelNetNet
from .nbody import NBodyNet
from .qm9 import QM9Net

__all__ = ["ModelNetNet", "NBodyNet", "QM9Net"]
