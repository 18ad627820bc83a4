"""The interchangeable engines of the one operator. A backend asked for by name runs or raises; "auto" picks."""

from __future__ import annotations

import torch

from .. import _native
from .._check import fail
from ..plan import Plan
from .gpu_cost import instructions_per_edge, nanoseconds_per_edge
from .native import cpu, cuda
from .reference import eager, reference
from .triton import backend as triton

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "cuda": cuda, "triton": triton}

_PREFERENCE = ("cpu", "cuda", "triton", "eager")  # of "auto": the first that supports the plan
NAMES = ("auto", *BACKENDS)


def availability() -> dict[str, tuple[bool, str]]:
    """Name → (available on this machine, why or why not)."""
    return {
        "reference": (True, "plain PyTorch; materialises the kernel of every edge (the oracle)"),
        "eager": (True, "plain PyTorch; factored"),
        "cpu": _native.available(),
        "cuda": cuda.available(),
        "triton": triton.available(),
    }


def check(name: str, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
    """Raise, as :func:`choose` does, where the backend could run neither here nor after ``.cuda()``."""
    backend = BACKENDS.get(name)
    if backend is None or not backend.supports(plan, torch.device("cuda"), dtype)[0]:
        choose(name, plan, device, dtype)


def _by_preference(plan: Plan, device: torch.device) -> tuple[tuple[str, ...], str]:
    """The backends, the one to be preferred first, and on a GPU why."""
    if device.type != "cuda":
        return _PREFERENCE, ""
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    if cost := nanoseconds_per_edge(plan, name):
        what, where = "ns per edge", f", by what was measured on {name}"
    else:
        cost, what, where = instructions_per_edge(plan), "warp instructions per edge", ""
    first, second = sorted(cost, key=cost.get)
    reason = f"; predicted {cost[first]:,.1f} {what}, {second} {cost[second]:,.1f}{where}"
    return (first, second, *(name for name in _PREFERENCE if name not in cost)), reason


def choose(name: str, plan: Plan, device: torch.device, dtype: torch.dtype):
    """The backend for ``name`` (an object with ``supports`` and ``forward``) and the reason for the choice.

    Raises:
        ValueError: unknown name.
        RuntimeError: a backend asked for by name that is not there or does not support the plan, with its reason.
    """
    if name == "auto":
        if device.type == "cpu":
            _native.found()
        refused, (preferred, why) = "", _by_preference(plan, device)
        for candidate in preferred:
            ok, reason = BACKENDS[candidate].supports(plan, device, dtype)
            if ok:
                return BACKENDS[candidate], f"{candidate}: {reason}{why if candidate == preferred[0] else refused}"
            refused += f"; not {candidate}: {reason}"
        fail("backend", "one that supports the plan", f"none{refused}", "See implicit_steer.info().", RuntimeError)
    if name not in BACKENDS:
        fail("backend", f"one of {NAMES}", repr(name), "See implicit_steer.info().")
    ok, reason = BACKENDS[name].supports(plan, device, dtype)
    if not ok:
        fail("backend", f"a plan that {name!r} supports", reason, "Use backend='auto'.", RuntimeError)
    return BACKENDS[name], f"{name}: {reason}"
