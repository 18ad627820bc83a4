"""The registry of backends: their names, and who runs a call and why. Every such decision is made here.

A backend asked for by name runs or raises with its reason. ``"auto"`` takes the first one that supports the plan: on
CPU tensors `cpu`, else `eager`; on CUDA tensors `cuda` or `triton`, whichever is predicted to be faster, else the other
one, else `reference` where the kernels of all edges fit the memory, and at last `eager`, which on an H100 took 2 to 5
times as long. Inside torch.compile, which cannot follow that search, it is `cpu`, or `cuda` before `triton`. The kernel
alone comes from native code where that supports the plan, else from `reference`.
"""

from __future__ import annotations

import torch

from .. import _native
from .._check import fail
from ..plan import Plan
from ..plan.packing import Parameters
from .backend import Backend
from .gpu_cost import instructions_per_edge, nanoseconds_per_edge
from .native.cpu import Cpu
from .native.cuda import Cuda
from .reference.eager import Eager
from .reference.reference import Reference
from .triton import backend as triton

BACKENDS: dict[str, Backend] = {b.name: b for b in (Reference(), Eager(), Cpu(), Cuda(), triton.BACKEND)}
NAMES = ("auto", *BACKENDS)

_PREFERENCE: tuple[str, ...] = ("cpu", "cuda", "triton", "eager")  # of "auto": the first that supports the plan
_SHARE = 0.5  # of the free memory of a GPU that `reference` may take
_OF_KERNEL = ("cpu", "cuda")  # of the kernel alone, else `reference`


def availability() -> dict[str, tuple[bool, str]]:
    """Name → (available on this machine, why or why not)."""
    return {name: backend.available() for name, backend in BACKENDS.items()}


def check(name: str, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
    """Raise, as :func:`choose` does, where the backend could run neither here nor after ``.cuda()``."""
    backend = BACKENDS.get(name)
    if backend is None or not backend.supports(plan, torch.device("cuda"), dtype)[0]:
        choose(name, plan, device, dtype)


def choose(
    name: str, plan: Plan, device: torch.device, dtype: torch.dtype, edges: int | None = None
) -> tuple[Backend, str]:
    """The backend for ``name`` and the reason for the choice; ``edges``: of the call, if it is known.

    Raises:
        ValueError: unknown name.
        RuntimeError: a backend asked for by name that is not there or does not support the plan, with its reason.
    """
    if name == "auto":
        preferred, why = _PREFERENCE, ""
        if device.type == "cpu":
            _native.found()
        elif device.type == "cuda":
            preferred, why = _by_predicted_time(plan, device, dtype, edges)
        found, reason, refused = _first_that_supports(preferred, plan, device, dtype)
        if found is not None:
            return found, f"{found.name}: {reason}{refused or why}"
        fail("backend", "one that supports the plan", f"none{refused}", "See implicit_steer.info().", RuntimeError)
    if name not in BACKENDS:
        fail("backend", f"one of {NAMES}", repr(name), "See implicit_steer.info().")
    ok, reason = BACKENDS[name].supports(plan, device, dtype)
    if not ok:
        fail("backend", f"a plan that {name!r} supports", reason, "Use backend='auto'.", RuntimeError)
    return BACKENDS[name], f"{name}: {reason}"


def for_comparison(plan: Plan) -> Backend:
    """What evaluates a plan with its table and without, to compare the two: in float64 on the CPU."""
    return choose("auto", plan, torch.device("cpu"), torch.float64)[0]


def _first_that_supports(
    names: tuple[str, ...], plan: Plan, device: torch.device, dtype: torch.dtype
) -> tuple[Backend | None, str, str]:
    """The first of these backends that supports the plan, and its reason; and the refusals of those before it."""
    refused = ""
    for name in names:
        ok, reason = BACKENDS[name].supports(plan, device, dtype)
        if ok:
            return BACKENDS[name], reason, refused
        refused += f"; not {name}: {reason}"
    return None, "", refused


def _by_predicted_time(
    plan: Plan, device: torch.device, dtype: torch.dtype, edges: int | None
) -> tuple[tuple[str, ...], str]:
    """The backends in order of preference on a GPU, and the reason for the order."""
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    if cost := nanoseconds_per_edge(plan, name):
        what, where = "ns per edge", f", by what was measured on {name}"
    else:
        cost, what, where = instructions_per_edge(plan), "warp instructions per edge", ""
    first, *others = sorted(cost, key=lambda name: cost[name])
    rivals = "".join(f", {name} {cost[name]:,.1f}" for name in others)
    last = ("reference",) if edges is not None and _fits(plan, edges, dtype, device) else ()
    preferred = (first, *others, *last, *(name for name in _PREFERENCE if name not in cost))
    return preferred, f"; predicted {cost[first]:,.1f} {what}{rivals}{where}"


def _fits(plan: Plan, edges: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `reference` can train on so many edges: kernels and hidden values, and their gradients, fit the memory.
    Not for plans with a table, which it does not use."""
    if plan.table is not None or not torch.cuda.is_available():
        return False
    cost = plan.cost()
    numbers = plan.out_size * plan.in_size + plan.hidden_size + 2 * cost["φ per edge"]
    return 2 * edges * numbers * dtype.itemsize < _SHARE * torch.cuda.mem_get_info(device)[0]


def choose_for_kernel(plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend that evaluates the kernel alone, and the reason for the choice."""
    if device.type == "cpu":
        _native.found()
    found, reason, refused = _first_that_supports(_OF_KERNEL, plan, device, dtype)
    if found is not None:
        return found, f"{found.name}: {reason}"
    return BACKENDS["reference"], f"reference: plain PyTorch{refused}"


def choose_in_compiled(name: str, parameters: Parameters, device: torch.device) -> Backend | None:
    """Inside torch.compile the backend for ``name`` if that is `cpu`, `cuda` or `triton`, whose plans are made before;
    "auto" takes `cuda` before `triton`. Else, and outside of torch.compile, None: :func:`choose` decides.

    Raises:
        RuntimeError: on CUDA tensors "auto" or "triton" where no such plan was made, with the remedy.
    """
    if not torch.compiler.is_compiling() or (cache := parameters.cache) is None:
        return None
    on_gpu, native = device.type == "cuda", cache.native is not None
    if on_gpu and native and name in ("auto", "cuda") and _native.cuda_usable(device)[0]:
        return BACKENDS["cuda"]
    if cache.triton is not None and (name == "triton" or (on_gpu and name == "auto")):
        return BACKENDS["triton"]
    if on_gpu and name in ("auto", "triton"):
        expected = "'cuda' or 'triton' inside torch.compile, with a plan that it supports"
        remedy = "Install triton or the CUDA kernels, freeze a table, or call the layer outside of compiled functions."
        fail("backend", expected, repr(name), remedy, RuntimeError)
    return BACKENDS["cpu"] if native and name in ("auto", "cpu") and device.type == "cpu" else None
