"""Training runs: ``python -m implicit_steer train TASK``, or the functions of this package from Python.

Each task is a module with ``HELP``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``main(args)``.
"""

from .modelnet import ModelNetOptions, train_modelnet
from .nbody import NBodyOptions, train_nbody
from .qm9 import QM9Options, train_qm9

__all__ = ["ModelNetOptions", "NBodyOptions", "QM9Options", "train_modelnet", "train_nbody", "train_qm9"]
