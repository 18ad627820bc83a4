"""Problems that the interpreter gets through in some seconds."""

from dataclasses import replace

from implicit_steer.cases import SMALL

_WIDE = ("o3-l2", "o3-mixed", "so3-mixed", "so2-mixed", "octa-r3", "cone-r3", "cylinder-r3", "full-cylinder-r3")


def small(name):
    """The case on a graph that the interpreter gets through in some seconds."""
    return replace(SMALL[name], nodes=2 if name in _WIDE else 4, degree=4)
