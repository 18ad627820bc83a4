"""Hooks inside a kernel, whose operator reads the modules' tensors and calls none of the modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

# Hooks of torch.nn.utils that make a tensor before a forward pass, from parameters under other names.
_MAKERS = (BasePruningMethod, SpectralNorm, WeightNorm)
_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def registered() -> int:
    """A count that grows with every hook that is registered anywhere in the process."""
    return RemovableHandle.next_id


def make_tensors(modules: Iterable[torch.nn.Module]) -> None:
    """Let ``weight_norm``, ``spectral_norm`` and ``prune`` make the tensors of ``modules``, as calling them would."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _MAKERS):
                hook(module, ())


def warn_of_others(modules: Iterable[tuple[str, torch.nn.Module]]) -> None:
    """Warn of other hooks of ``modules`` (name, module), which never fire."""
    idle = [
        name
        for name, module in modules
        for hook in (hook for table in _TABLES for hook in getattr(module, table).values())
        if not isinstance(hook, _MAKERS)
    ]
    if idle:
        warnings.warn(
            f"hooks: those registered on {', '.join(dict.fromkeys(idle))} do not fire, since a convolution reads the "
            "tensors of its kernel without calling the modules that hold them. Register them on the convolution; to "
            "change weights use torch.nn.utils.parametrizations.",
            stacklevel=2,
        )
