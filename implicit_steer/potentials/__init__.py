"""Interatomic potentials: building, training on forces, molecular dynamics, ASE."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..graph.structures import Structures
from ..layers.potential import PotentialNet, Prediction

if TYPE_CHECKING:  # imported at its first use, because it needs escnn
    from .potential import Potential, load_potential

__all__ = ["Potential", "PotentialNet", "Prediction", "Structures", "load_potential"]


def __getattr__(name: str) -> Any:
    if name in ("Potential", "load_potential"):
        return getattr(import_module(".potential", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
