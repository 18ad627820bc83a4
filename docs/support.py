"""What is supported: ``python docs/support.py`` asks the code and prints two tables; ``--write`` puts them into
README.md and docs/support.md.

- Samplings: a layer with 8 fields of l <= 1 (of regular fields for small finite groups), three hidden layers and 8
  channels is built for every space of ``implicit_steer.testing.cases``, with scalar and with vector edge attributes.
- Backends: ``supports`` is asked about the plan of every layer that could be built. `triton` answers as its interpreter
  does; `cuda` answers as on a machine whose GPU has its kernels and enough shared memory.
- Derivatives: a small layer is run and compared with `reference` in float64, `triton` interpreted. Of `cuda`, which
  runs on GPUs only, the operators that are registered for CUDA tensors decide.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from torch import Tensor

from implicit_steer import _native
from implicit_steer.ops import select
from implicit_steer.plan import Plan
from implicit_steer.testing.cases import GROUPS, SPACES, Case, Problem

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "support.md")
MARKS = "<!-- python docs/support.py --write -->", "<!-- end -->"

FAMILIES = {
    "O(3), SO(3)": ("O(3)", "SO(3)"),
    "O(2), SO(2) in the plane": ("O(2) on R2", "O(2) on R2, axis 0", "SO(2) on R2"),
    "SO(2) about an axis, also with mirrors or half turns": (
        *("SO(2) on R3", "cone O(2) on R3", "dihedral O(2) on R3", "cylinder on R3", "full cylinder on R3"),
    ),
    "C_N, D_N in the plane and about an axis": ("C4 on R2", "D4 on R2", "C4 on R3", "D3 on R3"),
    "icosahedral, octahedral": ("icosahedral on R3", "octahedral on R3", "full octahedral on R3"),
    "mirror, inversion, trivial": ("mirror on R3", "inversion on R3", "trivial on R3"),
}
SAMPLINGS = {
    "exact": ("exact", "1 scalar"),
    "exact, vector attributes": ("exact", "1 scalar+vector"),
    "escnn": ("escnn", "1 scalar+vector"),
    "lebedev": ("lebedev-26", "1 scalar+vector"),
}
TINY = Case("tiny", "O(3)", "1 scalar", "1 scalar", None, n_layers=2, n_channels=1, nodes=3, degree=2)
DTYPES = (torch.float32, torch.float64)


class Notes:
    """Reasons of what is not supported, numbered in the order in which they come up."""

    def __init__(self):
        self.texts: list[str] = []

    def cell(self, reasons: list[str]) -> str:
        """``yes`` without reasons, else ``no`` with the numbers of their notes."""
        if not reasons:
            return "yes"
        texts = list(dict.fromkeys(re.sub(r"\s+", " ", reason).strip() for reason in reasons))
        self.texts += [text for text in texts if text not in self.texts]
        return f"no ({', '.join(str(self.texts.index(text) + 1) for text in texts)})"


# ---- groups: samplings and backends


def plan_of(space: str, sampling: str, attributes: str) -> Plan | str:
    """The plan of the layer, or why it cannot be built."""
    case = replace(GROUPS[space], attributes=attributes)
    try:
        return case.layer(sampling=sampling).implicit_kernel.plan
    except ValueError as error:
        if not str(error).startswith("sampling:"):
            raise
        return str(error).replace(str(case.gspace.fibergroup), "this group")


def refusal(backend: str, plan: Plan) -> list[str]:
    """Why the backend does not take the plan; empty where it does."""
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    answers = (select.BACKENDS[backend].supports(plan, device, dtype) for dtype in DTYPES)
    return [reason for ok, reason in answers if not ok]


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """Lets `cuda` find kernels that were built, and a GPU that can run them."""
    gpu = mock.Mock(shared_memory_per_block_optin=math.inf)
    with (
        mock.patch.multiple(_native, cuda_available=lambda: (True, ""), cuda_usable=lambda device: (True, "")),
        mock.patch.multiple(torch.cuda, is_available=lambda: True, get_device_properties=lambda device: gpu),
        mock.patch.object(torch.ops.implicit_steer, "cuda_shared_bytes", return_value=0),
        mock.patch.object(torch.ops.implicit_steer, "cuda_kernel_kind", return_value="generic\n"),
    ):
        yield


def groups() -> str:
    """The table of groups."""
    notes, rows = Notes(), []
    for family, spaces in FAMILIES.items():
        cells, plans = [], []
        for sampling, attributes in SAMPLINGS.values():
            built = [plan_of(space, sampling, attributes) for space in spaces]
            cells.append(notes.cell([plan for plan in built if isinstance(plan, str)]))
            plans += [plan for plan in built if not isinstance(plan, str)]
        with cuda_kernels():
            for backend in select.BACKENDS:
                cells.append(notes.cell([reason for plan in plans for reason in refusal(backend, plan)]))
        rows.append([family, *cells])
    head = ["group", *SAMPLINGS, *(f"`{name}`" for name in select.BACKENDS)]
    return table(head, rows, notes)


# ---- derivatives and transforms


def small(backend: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Problem, dict[str, Tensor], Callable]:
    """A layer as a function of features and edge vectors, its problem, its parameters, and the layer."""
    conv = TINY.layer(norm=None, activation="silu").double()
    conv.backend = backend
    problem = TINY.inputs(conv)

    def run(x: Tensor, delta: Tensor) -> Tensor:
        return replace(problem, x=x, delta=delta).run(conv)

    return run, problem, dict(conv.named_parameters()), conv


def derivative(order: int) -> Callable[[str], list[Tensor]]:
    """A question: derivatives of this order by features, edge vectors and parameters."""

    def ask(backend: str) -> list[Tensor]:
        run, problem, parameters, _ = small(backend)
        leaves = [problem.x.requires_grad_(), problem.delta.requires_grad_(), *parameters.values()]
        found = [run(problem.x, problem.delta)]
        for n in range(order):
            loss = sum(t.square().sum() for t in found)
            found = torch.autograd.grad(loss, leaves, create_graph=n + 1 < order)
        return list(found)

    return ask


def compiled(backend: str) -> list[Tensor]:
    """A question: torch.compile without a break, forward and backward, as without it."""
    run, problem, parameters, _ = small(backend)
    torch._dynamo.reset()
    outs = [call(problem.x, problem.delta) for call in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)]
    found, expected = ([out, *torch.autograd.grad(out.square().sum(), list(parameters.values()))] for out in outs)
    check(found, expected)
    return found


def ensemble(backend: str) -> list[Tensor]:
    """A question: torch.func.vmap over weights."""
    _, problem, parameters, conv = small(backend)
    stacked = {name: torch.stack([s * p.detach() for s in (0.9, 1.1)]) for name, p in parameters.items()}

    def member(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(conv, values, problem.arguments(conv)).tensor

    return [torch.func.vmap(member)(stacked)]


def functional(backend: str) -> list[Tensor]:
    """A question: torch.func.grad."""
    run, problem, _, _ = small(backend)
    return [torch.func.grad(lambda delta: run(problem.x, delta).square().sum())(problem.delta)]


def forward_mode(backend: str) -> list[Tensor]:
    """A question: the derivative along a direction, in forward mode."""
    run, problem, _, conv = small(backend)
    conv.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.delta, problem.delta)
        tangent = torch.autograd.forward_ad.unpack_dual(run(problem.x, dual)).tangent
    if tangent is None:
        raise RuntimeError("forward mode: expected a tangent, got none.")
    return [tangent]


QUESTIONS = {
    "first derivatives": derivative(1),
    "second": derivative(2),
    "third": derivative(3),
    "`torch.compile`": compiled,
    "`vmap` over weights": ensemble,
    "`torch.func.grad`": functional,
    "forward mode": forward_mode,
}
OPERATORS = {"first derivatives": "conv_backward", "second": "conv_double_backward"}


class WrongNumbers(Exception):
    """They are no answer."""


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    """Raise where numbers differ by more than rounding."""
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    if max(errors) > 1e-6:
        raise WrongNumbers(errors)


def reason(error: Exception) -> str:
    """The line of its message that says what was expected; of another error its type."""
    lines = [line.strip() for line in str(error).splitlines() if ": expected " in line]
    return lines[0].removeprefix("RuntimeError: ") if lines else f"`{type(error).__name__}`, raised inside PyTorch."


def answer(ask: Callable[[str], list[Tensor]], backend: str) -> list[Tensor] | str:
    """The numbers that were asked for, or why there are none."""
    try:
        return ask(backend)
    except WrongNumbers:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return reason(error)


def derivatives() -> str:
    """The table of backends."""
    expected = {name: answer(ask, "reference") for name, ask in QUESTIONS.items()}
    notes, rows = Notes(), []
    for backend in select.BACKENDS:
        cells = []
        for name, ask in QUESTIONS.items():
            found = answer(ask, "cpu" if backend == "cuda" else backend)  # the same operators
            if backend == "cuda" and (operator := OPERATORS.get(name)):
                registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"implicit_steer::{operator}", "CUDA")
                found = found if registered else f"{operator} has no CUDA kernel"
            if not isinstance(found, str) and not isinstance(expected[name], str):
                check(found, expected[name])
            cells.append(notes.cell([found] if isinstance(found, str) else []))
        rows.append([f"`{backend}`", *cells])
    return table(["backend", *QUESTIONS], rows, notes)


# ---- pages


def table(head: list[str], rows: list[list[str]], notes: Notes) -> str:
    """Markdown."""
    lines = [" | ".join(row) for row in ([head, ["---"] * len(head), *rows])]
    numbered = [f"{n}. {text}" for n, text in enumerate(notes.texts, 1)]
    return "\n".join([*(f"| {line} |" for line in lines), "", *numbered]).rstrip() + "\n"


def written(page: str, tables: str) -> str:
    """A page with the tables between its marks."""
    start, end = MARKS
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n\n{tables}\n{end}{after}"


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {' and '.join(p.name for p in PAGES)}")
    write = parser.parse_args().write
    left_out = set(SPACES).symmetric_difference(space for spaces in FAMILIES.values() for space in spaces)
    if left_out:
        parser.error(f"FAMILIES: expected every space of SPACES once, got a difference in {sorted(left_out)}.")
    tables = f"{groups()}\n{derivatives()}"
    print(tables, end="")
    for page in PAGES if write else ():
        page.write_text(written(page.read_text(), tables))


if __name__ == "__main__":
    main()
