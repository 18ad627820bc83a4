"""How kernels are launched, and how launches are written down instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .configuration import LaunchConfig


@dataclass(frozen=True)
class Launch:
    """One launch: positional arguments by name, constants, options of the compiler."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are written down instead of being made: ``with recording() as launches``. Results are then nonsense."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any], config: LaunchConfig
) -> None:
    """``kernel[grid](*arguments, **constants)`` with BE edges of a block; nothing for an empty grid. What is assumed of
    the tensors is checked in operators.py."""
    constants = constants | {"BE": config.edges}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        _recorded.append(Launch(kernel, grid, named, constants, options))
    elif all(grid):
        kernel[grid](*arguments, **constants, **options)
