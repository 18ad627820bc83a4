"""Data sets of the experiments."""

from .forces import ForceData
from .modelnet import Clouds, CloudSet, ModelNet
from .nbody import NBody, ParticleBatch, ParticleSet
from .qm9 import QM9, Batch, MoleculeSet

__all__ = [
    "QM9",
    "Batch",
    "CloudSet",
    "Clouds",
    "ForceData",
    "ModelNet",
    "MoleculeSet",
    "NBody",
    "ParticleBatch",
    "ParticleSet",
]
