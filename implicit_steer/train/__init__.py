"""Training runs: ``python -m implicit_steer train TASK``, or the functions of this package from Python.

Each task is a module with ``HELP``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``main(args)``.
"""

from . import forces, modelnet, nbody, qm9
from .forces import ForcesOptions, train_forces
from .modelnet import ModelNetOptions, train_modelnet
from .nbody import NBodyOptions, train_nbody
from .qm9 import QM9Options, train_qm9

TASKS = {"qm9": qm9, "forces": forces, "nbody": nbody, "modelnet": modelnet}

__all__ = [
    "TASKS",
    "ForcesOptions",
    "ModelNetOptions",
    "NBodyOptions",
    "QM9Options",
    "train_forces",
    "train_modelnet",
    "train_nbody",
    "train_qm9",
]
