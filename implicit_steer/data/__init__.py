"""Data sets of the experiments."""

from .forces import ForceData
from .nbody import NBody, ParticleBatch, ParticleSet
from .qm9 import QM9, Batch, MoleculeSet

__all__ = ["QM9", "Batch", "ForceData", "MoleculeSet", "NBody", "ParticleBatch", "ParticleSet"]
