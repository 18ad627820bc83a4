"""Data sets of the experiments."""

from .qm9 import QM9, Batch, MoleculeSet

__all__ = ["QM9", "Batch", "MoleculeSet"]
