"""How kernels are launched, and how launches are written down instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configuration import LaunchConfig


class Variant:
    """A kernel with its constants, BE edges (or rows) of a block among them, and options of the compiler.

    Triton looks up what it compiled by the types of all arguments, which takes longer than a launch does. A variant
    keeps the compiled kernels and looks them up by what can differ between its calls: the device, of every tensor the
    dtype and whether it begins at a multiple of 16 bytes, and whether an integer fits into 32 bits. Kernels ask Triton
    not to compile for special values of integers (``do_not_specialize``).
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], config: LaunchConfig) -> None:
        from triton.runtime import JITFunction

        self.kernel, self.constants = kernel, constants | {"BE": config.edges}
        self.edges, self.options = config.edges, {"num_warps": config.warps, "num_stages": config.stages}
        self._values = tuple(self.constants[name] for name in kernel.arg_names if name in self.constants)
        self._interpreted = not isinstance(kernel, JITFunction)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def run(self, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """``kernel[grid](*arguments, **constants)``."""
        if self._interpreted:
            self.kernel[grid](*arguments, **self.constants, **self.options)
            return
        facts = [(a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else a.bit_length() > 31 for a in arguments]
        key = torch.cuda.current_device(), *facts
        if (compiled := self._compiled.get(key)) is None:
            self._compiled[key] = self.kernel[grid](*arguments, **self.constants, **self.options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *self._values)


class Launch(NamedTuple):
    """One launch; ``values`` are the positional arguments."""

    variant: Variant
    grid: tuple[int, ...]
    values: Sequence[Any]

    @property
    def kernel(self) -> Any:
        return self.variant.kernel

    @property
    def arguments(self) -> dict[str, Any]:
        """The positional arguments by name."""
        return dict(zip(self.kernel.arg_names, self.values, strict=False))

    @property
    def constants(self) -> dict[str, Any]:
        return self.variant.constants

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler."""
        return self.variant.options


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


def launch(variant: Variant, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Launch a variant; nothing for an empty grid. What is assumed of the tensors is checked in operators.py."""
    if _recorded is not None:
        _recorded.append(Launch(variant, grid, arguments))
    elif all(grid):
        variant.run(grid, arguments)
