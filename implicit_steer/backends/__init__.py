"""The interchangeable engines of the one operator. A backend asked for by name runs or raises; "auto" picks."""

from __future__ import annotations

import torch

from .. import native
from .._check import fail, require
from ..plan import Plan
from . import cpu, cuda, eager, reference

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "cuda": cuda}

_PREFERENCE = ("cpu", "cuda", "eager")  # of "auto": the first that supports the plan, fastest first
_ABSENT = dict.fromkeys(("triton",), "not part of this version of implicit_steer")
NAMES = ("auto", *BACKENDS, *_ABSENT)


def availability() -> dict[str, tuple[bool, str]]:
    """Name → (available on this machine, why or why not)."""
    return {
        "reference": (True, "plain PyTorch; materialises the kernel of every edge (the oracle)"),
        "eager": (True, "plain PyTorch; factored"),
        "cpu": native.available(),
        "cuda": cuda.availability(),
        **{name: (False, reason) for name, reason in _ABSENT.items()},
    }


def select(name: str, plan: Plan, device: torch.device, dtype: torch.dtype):
    """The backend for ``name`` (an object with ``supports`` and ``forward``) and the reason for the choice.

    Raises:
        ValueError: unknown name.
        RuntimeError: a backend asked for by name that is not there or does not support the plan, with its reason.
    """
    if name == "auto":
        refused = ""
        for candidate in _PREFERENCE:
            ok, reason = BACKENDS[candidate].supports(plan, device, dtype)
            if ok:
                return BACKENDS[candidate], f"{candidate}: {reason}{refused}"
            refused += f"; not {candidate}: {reason}"
        fail("backend", "one that supports the plan", f"none{refused}", "See implicit_steer.info().", RuntimeError)
    require(name in NAMES, "backend", f"one of {NAMES}", repr(name), "See implicit_steer.info().")
    if name in _ABSENT:
        fail("backend", "one that is available", f"{name!r} ({_ABSENT[name]})", "Use backend='auto'.", RuntimeError)
    ok, reason = BACKENDS[name].supports(plan, device, dtype)
    if not ok:
        fail("backend", f"a plan that {name!r} supports", reason, "Use backend='auto'.", RuntimeError)
    return BACKENDS[name], f"{name}: {reason}"
