"""Data sets of the experiments."""

from .modelnet import Clouds, CloudSet, ModelNet
from .nbody import NBody, ParticleBatch, ParticleSet
from .qm9 import QM9, Batch, MoleculeSet

__all__ = ["QM9", "Batch", "CloudSet", "Clouds", "ModelNet", "MoleculeSet", "NBody", "ParticleBatch", "ParticleSet"]
