"""Optional packages: imported where they are used, and named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from ._check import fail


def load_extra(module: str, extra: str = "train") -> ModuleType:
    """Import ``module``; a ``RuntimeError`` that names the extra to install if its package is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        fail(package, "an installed package", "none", f"Run: pip install implicit_steer[{extra}]", RuntimeError)
