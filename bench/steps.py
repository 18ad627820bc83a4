"""What is measured: a backend at a sampling doing one step on a named case; and the gate that it has to pass first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_steer import backends
from implicit_steer.cases import Case

TOLERANCE = 2e-5  # float32, relative to the largest entry of the reference's tensor
SAMPLINGS = ("auto", "escnn")
NORMS = {"forward": "batch", "train": None, "train-batch": "batch"}  # measure → norm
MEASURES = {
    "forward": "forward: evaluation mode, no gradients",
    "train": "forward + backward, norm=None",
    "train-batch": "forward + backward, norm='batch'",
}


@dataclass(frozen=True)
class Candidate:
    """A backend at a sampling (``"auto"`` or ``"escnn"``)."""

    backend: str
    sampling: str

    @property
    def label(self) -> str:
        """For tables and plots."""
        return "materialise" if self == MATERIALISE else f"{self.backend}, {self.sampling}"


MATERIALISE = Candidate("reference", "escnn")  # the authors' algorithm


def candidates(case: Case, names: list[str]) -> tuple[list[Candidate], dict[str, str]]:
    """Who can run ``case``, the comparator first, and why the others of the backends ``names`` cannot."""
    found, skipped = [MATERIALISE], {}
    for sampling in SAMPLINGS:
        plan = case.layer(sampling=sampling, backend="reference").implicit_kernel.plan
        if sampling == "auto" and plan.sampling == "escnn":
            skipped[sampling] = "no exact sampling: the same as escnn"
            continue
        for name in names:
            candidate = Candidate(name, sampling)
            ok, reason = backends.BACKENDS[name].supports(plan, torch.device("cpu"), torch.float32)
            if not ok:
                skipped[candidate.label] = reason
            elif candidate not in found:
                found.append(candidate)
    return found, skipped


def step(case: Case, candidate: Candidate, measure: str) -> Callable[[], dict[str, Tensor]]:
    """A call that runs ``measure`` once and returns its output and gradients by name; its graph is sorted beforehand.

    The loss is ½ |output|²: as a sum of terms of mostly one sign, its gradients lose no digits by cancellation.
    """
    conv = case.layer(norm=NORMS[measure], sampling=candidate.sampling, backend=candidate.backend)
    problem = case.inputs(conv)
    conv.train(measure != "forward")

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": problem.run(conv)}

    if measure == "forward":
        return forward
    inputs = problem.requires_grad()
    leaves = dict(zip(("x", "edge_delta", "edge_attr"), inputs, strict=False)) | dict(conv.named_parameters())

    def forward_backward() -> dict[str, Tensor]:
        output = problem.run(conv)
        gradients = torch.autograd.grad(output, list(leaves.values()), output.detach(), materialize_grads=True)
        return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))

    return forward_backward


@dataclass(frozen=True)
class Check:
    """Largest relative error of a candidate's tensors, and which tensor that is."""

    case: str
    backend: str
    sampling: str
    measure: str
    tensor: str
    error: float

    @property
    def ok(self) -> bool:
        """Within the tolerance; NaN is not."""
        return self.error <= TOLERANCE

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self) | {"ok": self.ok}


def relative_error(value: Tensor, expected: Tensor) -> float:
    """max |value − expected| / max |expected|; the absolute error where everything expected is 0, inf where shapes or
    dtypes differ."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    return float((value - expected).abs().max()) / (scale or 1.0)


def gate(case: Case, chosen: list[Candidate]) -> Iterator[Check]:
    """Compare output and all gradients of every candidate with `reference` at the same sampling and dtype."""
    for sampling in SAMPLINGS:
        others = [c for c in chosen if c.sampling == sampling and c.backend != "reference"]
        for measure in MEASURES if others else ():
            expected = step(case, Candidate("reference", sampling), measure)()
            for candidate in others:
                got = step(case, candidate, measure)()
                errors = {name: relative_error(got[name], expected[name]) for name in expected}
                worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
                yield Check(case.name, candidate.backend, sampling, measure, worst, errors[worst])
