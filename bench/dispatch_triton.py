"""The host's side of a call of backend `triton`, without a GPU: the kernels that it launches, the operators of ATen
that it calls beside them, and its microseconds where launches are written down instead of being made.

An operator of ours counts for what it calls, not for one. Allocations and views are counted apart: neither launches
anything on a GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from implicit_steer.testing.cases import LARGE, Case

from .report import table
from .timing import interleaved, summary

# Narrow and small, since what PyTorch's own operators compute on CPU tensors is no host time of a GPU.
CASE = replace(LARGE["molecules"], into="1 scalar+vector", out="1 scalar+vector", nodes=4, degree=2, copies=1)
MEASURES = {"forward, batch norms folded in": ("batch", False), "forward": (None, False), "training": (None, True)}
# The most that a call may have, by sampling and whether it is training: "auto" runs narrow layers edge by edge; the
# authors' grid has kernels for every layer.
BOUNDS = {
    ("auto", False): {"launches": 3, "operators": 5, "adds": 60},
    ("auto", True): {"launches": 10, "operators": 12},
    ("escnn", False): {"launches": 4, "operators": 5},
    ("escnn", True): {"launches": 16, "operators": 18},
}
_ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided")


class HostCost(NamedTuple):
    """Of one call: kernels in the order of their launches; how often each operator, allocation and view is called;
    median microseconds, and those of ``torch.add`` on two small tensors."""

    launches: list[str]
    operators: Counter[str]
    allocations: int
    views: int
    microseconds: float
    of_add: float


class _Counting(TorchDispatchMode):
    """Counts operators of ATen, those inside of the Triton operators included."""

    def __init__(self, kernels: dict[str, Any]) -> None:
        super().__init__()
        self.kernels, self.found = kernels, Counter[tuple[str, str]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in self.kernels:
            with self:
                return self.kernels[name](*args, **(kwargs or {}))
        kind = "allocation" if name in _ALLOCATIONS else "view" if func.is_view else "operator"
        self.found[kind, name] += 1
        return func(*args, **(kwargs or {}))


def _call(case: Case, sampling: str, norm: str | None, training: bool) -> Callable[[], Any]:
    """A forward pass without gradients or, in training, with those of ½ |output|² in everything there is."""
    conv = case.layer(norm=norm, sampling=sampling, backend="triton").train(training)
    problem = case.inputs(conv)
    arguments = problem.arguments(conv)
    if not training:
        return torch.no_grad()(lambda: conv(*arguments))
    leaves = [*problem.requires_grad(), *conv.parameters()]
    arguments = problem.arguments(conv)

    def forward_backward() -> Any:
        output = conv(*arguments).tensor
        return torch.autograd.grad(output, leaves, output.detach(), materialize_grads=True)

    return forward_backward


def measure(case: Case, sampling: str, norm: str | None, training: bool, seconds: float = 2.0) -> HostCost:
    """What one call costs; where TRITON_INTERPRET is not set, for this call alone, the tensors being on the CPU."""
    from implicit_steer.ops.triton import launch, operators

    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}), launch.recording() as launches:
        run = _call(case, sampling, norm, training)
        run()  # makes the tables
        launches.clear()
        with _Counting(operators.KERNELS) as counted:
            run()
        names = [entry.kernel.__name__ for entry in launches]
        one = torch.ones(16)
        turns = {"call": lambda: (run(), launches.clear()), "add": lambda: torch.add(one, one)}
        timed = interleaved(turns, 9, seconds)
    kinds = Counter(kind for kind, _ in counted.found.elements())
    operators_found = Counter({name: n for (kind, name), n in counted.found.items() if kind == "operator"})
    microseconds, of_add = (1e3 * summary(timed[name])["median_ms"] for name in ("call", "add"))
    return HostCost(names, operators_found, kinds["allocation"], kinds["view"], microseconds, of_add)


def measure_all(case: Case = CASE, seconds: float = 2.0) -> list[dict[str, Any]]:
    """A record for each sampling and measure."""
    found = []
    for sampling in ("auto", "escnn"):
        for name, (norm, training) in MEASURES.items():
            cost = measure(case, sampling, norm, training, seconds)
            counts = {"launches": len(cost.launches), "operators": cost.operators.total()}
            counts |= {"allocations": cost.allocations, "views": cost.views}
            times = {"us": cost.microseconds, "adds": cost.microseconds / cost.of_add}
            found.append({"sampling": sampling, "call": name, "training": training} | counts | times)
    return found


def broken(records: list[dict[str, Any]]) -> list[str]:
    """The bounds that do not hold."""
    return [
        f"triton, {r['sampling']}, {r['call']}: {r[what]:.0f} {what}, at most {most}"
        for r in records
        for what, most in BOUNDS[r["sampling"], r["training"]].items()
        if r[what] > most
    ]


def text(records: list[dict[str, Any]]) -> str:
    """The table, and what breaks its bound."""
    columns = ["sampling", "call", "launches", "operators of ATen", "allocations", "views", "µs", "torch.adds"]
    rows = [
        [*(str(r[k]) for k in ("sampling", "call", "launches", "operators", "allocations", "views")),
         f"{r['us']:.0f}", f"{r['adds']:.0f}"]
        for r in records
    ]  # fmt: skip
    above = [f"- {line}" for line in broken(records) or ["nothing"]]
    title = "### The host's side of a call of `triton`, its launches written down"
    return "\n".join([title, "", table(columns, rows), "\nAbove the bound:", *above])
