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
        kind = next(a.device.type for a in arguments if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*arguments, **keywords)
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **keywords)

    return run
