"""Networks of the experiments. They need escnn."""

from .qm9 import QM9Net

__all__ = ["QM9Net"]
