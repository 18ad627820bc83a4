"""The native extension: where it is, whether it loaded, and the fake kernels of its operators.

``_ops.so`` registers its operators under ``torch.ops.implicit_steer``; ``_build_info`` tells how it was built.
Both may be absent (a pure Python install): :func:`available` then says why, and callers take their torch path.
"""

from __future__ import annotations

import functools
import importlib
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_ops.so")


def _load() -> tuple[bool, str]:
    if not LIBRARY.exists():
        remedy = "Install a C++ compiler, cmake and ninja, then reinstall with IMPLICIT_STEER_NATIVE=require"
        return False, f"not built: {LIBRARY.name} is not in {LIBRARY.parent}. {remedy}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return False, f"not loaded: {error}"
    return True, f"loaded from {LIBRARY}"


def _register_fakes() -> None:
    @torch.library.register_fake("implicit_steer::edges_in_range")
    def _(edge_index: Tensor, num_src: int, num_dst: int) -> Tensor:
        return edge_index.new_empty((), dtype=torch.bool)

    @torch.library.register_fake("implicit_steer::sort_by_key")
    def _(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return key.new_empty(key.shape), key.new_empty(n + 1)

    @torch.library.register_fake("implicit_steer::fourier_forward")
    def _(x: Tensor, samples: Tensor, inverse_t: Tensor, function: int, isa: int) -> Tensor:
        return torch.empty_like(x)

    @torch.library.register_fake("implicit_steer::fourier_backward")
    def _(grad: Tensor, x: Tensor, samples: Tensor, inverse_t: Tensor, function: int, isa: int) -> Tensor:
        return torch.empty_like(x)


_STATE = _load()
if _STATE[0]:
    _register_fakes()


def available() -> tuple[bool, str]:
    """``(True, where it was loaded from)`` or ``(False, why there is no native extension)``."""
    return _STATE


@functools.cache
def build_info() -> ModuleType | None:
    """The module with ``build_facts()`` and ``cpu_instruction_set()``; ``None`` in a pure Python install."""
    name = f"{__package__}._build_info"
    # Only beside this file: an editable install elsewhere on the machine would answer a plain import.
    if PathFinder.find_spec(name, [str(LIBRARY.parent)]) is None:
        return None
    return importlib.import_module(name)
