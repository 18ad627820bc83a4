"""Training runs: ``python -m implicit_steer train TASK``, or the functions of this package from Python.

Each task is a module with ``HELP``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``main(args)``.
"""

from . import forces, nbody, qm9
from .forces import ForcesOptions, train_forces
from .nbody import NBodyOptions, train_nbody
from .qm9 import QM9Options, train_qm9

TASKS = {"qm9": qm9, "forces": forces, "nbody": nbody}

__all__ = ["TASKS", "ForcesOptions", "NBodyOptions", "QM9Options", "train_forces", "train_nbody", "train_qm9"]
