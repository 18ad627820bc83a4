"""``python -m bench dispatch``: what a call costs the host, without a GPU.

The kernels of backend `cuda` are those that the tests emulate on the processor (tests/simt), built when they are asked
for; their launches are written down instead of being made. So the host's side of a call runs as on a GPU, on CPU
tensors: what it launches, allocates and calls beside that is counted, and its time is compared with that of
``torch.add`` on two small tensors. What CUDA itself takes for a launch is not in it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from implicit_steer import _native
from implicit_steer.ops.conv import implicit_conv
from implicit_steer.plan.moments import RUNNING

from . import process
from .report import table
from .small import CASE
from .timing import interleaved

MEASURES = {  # what is called → the norm, whether gradients are asked for
    "forward, batch norms folded in": ("batch", False),
    "forward, norm=None": (None, False),
    "forward + backward, norm=None": (None, True),
}
BOUNDS = {  # the most that a call may have, in evaluation and in training
    False: {"launches": 2, "operators": 0, "allocations": 3, "adds": 12},
    True: {"launches": 6, "operators": 0},
}
_ROOT = Path(__file__).resolve().parent.parent
_BUILD = _ROOT / "build" / "emulated" / "fast"
_ALLOCATIONS = ("aten::empty", "aten::new_empty")


def build_kernels() -> Path:
    """The library of emulated kernels, built where it is not up to date.

    Raises:
        subprocess.CalledProcessError: cmake or the compiler failed.
    """
    for command in (
        ["-S", _ROOT / "tests" / "simt", "-B", _BUILD, "-G", "Ninja", "-DMODE=fast"],
        ["--build", _BUILD, "--target", "emulated_cuda"],
    ):
        subprocess.run(["cmake", *command], check=True, stdout=subprocess.DEVNULL)
    return _BUILD / "libemulated_cuda.so"


def measure(rounds: int, budget: float) -> list[dict[str, Any]]:
    """A record per call: of backends `cpu` and `cuda`, by the module and by the operator without the module."""
    os.environ["IMPLICIT_STEER_CUDA_LIBRARY"] = str(build_kernels())
    try:
        return process.ask(measure_here, str(rounds), str(budget), threads=1)
    finally:
        del os.environ["IMPLICIT_STEER_CUDA_LIBRARY"]


def measure_here(rounds: str, budget: str) -> list[dict[str, Any]]:
    """What :func:`measure` gives, in a process that opens the emulated kernels."""
    records, one, launches = [], torch.ones(16), _Launches()
    for what, (norm, with_gradients) in MEASURES.items():
        for backend in ("cpu", "cuda"):
            runs = {"add": partial(torch.add, one, one)} | _calls(backend, norm, with_gradients)
            with torch.set_grad_enabled(with_gradients):
                times = interleaved(runs, int(rounds), float(budget))
                add = 1e6 * min(times["add"])  # the fastest rounds: no bound shall break by what else runs
                for name in (name for name in runs if name != "add"):
                    microseconds = 1e6 * min(times[name])
                    record = {"call": what, "of": name, "backend": backend, "training": with_gradients}
                    record |= _counts(runs[name], launches) | {"us": microseconds, "adds": microseconds / add}
                    records.append(record)
    return records


def _calls(backend: str, norm: str | None, with_gradients: bool) -> dict[str, Callable[[], Any]]:
    """The layer of the case called as a module, and by its operator."""
    conv = CASE.layer(norm=norm, backend=backend).train(with_gradients)
    problem, kernel = CASE.inputs(conv), conv.implicit_kernel
    leaves = [*problem.requires_grad(), *kernel.parameters()] if with_gradients else []
    attributes = problem.delta.new_zeros(len(problem.delta), 0) if problem.attributes is None else problem.attributes
    x, grad = conv.in_type(problem.x, problem.pos), torch.ones(problem.graph.num_dst, conv.out_type.size)
    called = {
        "module": lambda: conv(x, problem.graph, problem.delta, problem.attributes).tensor,
        "operator": lambda: implicit_conv(
            kernel.plan,
            kernel.parameters_for_op(),
            problem.graph,
            problem.x,
            problem.delta,
            attributes,
            statistics_from=RUNNING,
            backend=backend,
        )[0],
    }
    if not with_gradients:
        return called
    return {name: lambda call=call: torch.autograd.grad(call(), leaves, grad) for name, call in called.items()}


class _Launches:
    """Launches of the emulated kernels, written down instead of being made."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(_native.CUDA_LIBRARY))
        self._library.simt_recorded.restype = ctypes.c_char_p
        self.restart()

    def restart(self) -> None:
        """Forget those of before."""
        self._library.simt_record(ctypes.c_bool(True))

    def names(self) -> list[str]:
        """The kernels since the last restart, in order."""
        return self._library.simt_recorded().decode().split()


def _counts(run: Callable[[], Any], launches: _Launches) -> dict[str, Any]:
    launches.restart()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    kernels, found = launches.names(), Counter(event.name for event in seen.events())
    operators = {
        name: n for name, n in found.items() if name.startswith("aten::") and not name.startswith(_ALLOCATIONS)
    }
    memory = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    gained = [event for event in memory if event.nbytes() > 0]
    counts = {"launches": len(kernels), "operators": sum(operators.values()), "allocations": len(gained)}
    return counts | {"kernels": kernels, "names": operators}


def broken(records: list[dict[str, Any]]) -> list[str]:
    """The bounds of backend `cuda` that do not hold; its time is bounded without the module."""
    return [
        f"{r['call']}, {r['of']}: {r[what]:.0f} {what}, at most {most}"
        for r in records
        for what, most in BOUNDS[r["training"]].items()
        if r["backend"] == "cuda" and (what != "adds" or r["of"] == "operator") and r[what] > most
    ]


def text(records: list[dict[str, Any]]) -> str:
    """The table, what is launched, and what breaks its bound."""
    columns = ["call", "of", "backend", "launches", "operators of ATen", "allocations", "µs", "torch.adds"]
    rows = [
        [r["call"], r["of"], r["backend"], *(str(r[k]) for k in ("launches", "operators", "allocations")),
         f"{r['us']:.1f}", f"{r['adds']:.1f}"]
        for r in records
    ]  # fmt: skip
    kernels = {f"- {r['call']}: {', '.join(r['kernels'])}" for r in records if r["backend"] == "cuda"}
    return "\n".join(
        [
            f"### The host's side of a call: {CASE.nodes} nodes, {CASE.edges} edges, float32\n",
            "On CPU tensors, the launches of `cuda` written down; the times of `cpu` are with its arithmetic. Of "
            "the rounds the fastest.\n",
            table(columns, rows),
            "\nKernels of `cuda`:",
            *sorted(kernels),
            "\nAbove the bound:",
            *(f"- {line}" for line in broken(records) or ["nothing"]),
        ]
    )
