"""The interchangeable engines of the one operator. A backend asked for by name runs or raises; "auto" picks."""

from __future__ import annotations

import torch

from .._check import fail
from ..plan import Plan
from . import eager, reference

BACKENDS = {"reference": reference, "eager": eager}
_PREFERENCE = ("eager",)  # "auto": the first that supports the plan, fastest first


def availability() -> dict[str, tuple[bool, str]]:
    """Name → (available on this machine, why or why not)."""
    return {
        "reference": (True, "plain PyTorch; materialises the kernel of every edge (the oracle)"),
        "eager": (True, "plain PyTorch; factored"),
    }


def select(name: str, plan: Plan, device: torch.device, dtype: torch.dtype):
    """The backend module for ``name`` and the reason for the choice.

    Raises:
        ValueError: unknown name.
        RuntimeError: a backend asked for by name that does not support the plan, with its reason.
    """
    if name == "auto":
        for candidate in _PREFERENCE:
            ok, reason = BACKENDS[candidate].supports(plan, device, dtype)
            if ok:
                return BACKENDS[candidate], f"{candidate}: {reason}"
    if name not in BACKENDS:
        fail("backend", f"'auto' or one of {sorted(BACKENDS)}", repr(name), "See implicit_steer.info().")
    ok, reason = BACKENDS[name].supports(plan, device, dtype)
    if not ok:
        fail("backend", f"a plan that {name!r} supports", reason, "Use backend='auto'.", RuntimeError)
    return BACKENDS[name], f"{name}: {reason}"
