"""Operations that keep their dtypes under torch.autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A guard inside which torch.autocast leaves the dtypes of operations on the device of ``x`` as they are."""
    kind = x.device.type
    active = kind != "meta" and torch.is_autocast_enabled(kind)  # "meta" has no autocast
    return torch.autocast(kind, enabled=False) if active else nullcontext()
