"""What keeps its own precision under torch.autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def own_precision(function: Callable) -> Callable:
    """Decorator: inside ``function`` torch.autocast leaves the dtypes of operations alone, on the device of the first
    tensor among its arguments."""

    @functools.wraps(function)
    def run(*arguments, **keywords):
        tensors = (a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor))
        first = next(tensors, None)  # without one ``function`` complains itself
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return function(*arguments, **keywords)
        with torch.autocast(first.device.type, enabled=False):
            return function(*arguments, **keywords)

    return run
