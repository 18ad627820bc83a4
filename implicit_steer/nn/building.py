"""Building modules with escnn, whatever PyTorch's defaults are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from ..layers._modules import refuse_fake_tensors


def built_by_escnn(init: Callable) -> Callable:
    """Decorator for the ``__init__`` of a module that builds parts of escnn's: the module gets PyTorch's default dtype
    and device, as torch's own modules do.

    escnn's bases, which it keeps for the whole process, are made in float32 on the CPU. A module on device "meta" gets
    its values, the bases included, by ``load_state_dict(..., assign=True)``. Under ``FakeTensorMode`` building is
    refused.
    """

    @wraps(init)
    def build(self, *args, **options) -> None:
        refuse_fake_tensors(self)
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                init(self, *args, **options)
        finally:
            torch.set_default_dtype(dtype)
        if (device.type, dtype) != ("cpu", torch.float32):
            self.to(device, dtype)

    return build
