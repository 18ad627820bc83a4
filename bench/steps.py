"""What is measured: a backend at a sampling doing one step on a named case; and the gate that it has to pass first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from implicit_steer.nn import ImplicitPointConv
from implicit_steer.ops import select
from implicit_steer.ops.conv import implicit_conv
from implicit_steer.plan.moments import RUNNING
from implicit_steer.testing.cases import Case, fields

from . import related
from .compiled import compiled_call

TOLERANCE = 2e-5  # float32, relative to the largest entry of the reference's tensor
SAMPLINGS = ("auto", "escnn")
NORMS = {"forward": "batch", "train": None, "train-batch": "batch"}  # measure → norm
DEVICES = ("cpu", "cuda")
_device = [torch.device("cpu")]  # where every step runs
MEASURES = {
    "forward": "forward: evaluation mode, no gradients",
    "train": "forward + backward, norm=None",
    "train-batch": "forward + backward, norm='batch'",
}


def use_device(name: str) -> torch.device:
    """Let all further steps run on this device."""
    _device[0] = torch.device(name)
    return _device[0]


def device() -> torch.device:
    """Where steps run."""
    return _device[0]


@dataclass(frozen=True)
class Candidate:
    """A backend at a sampling (``"auto"`` or ``"escnn"``); or a layer of e3nn, ``sampling`` being its form."""

    backend: str
    sampling: str

    @property
    def label(self) -> str:
        """The name in tables and plots."""
        return "materialise" if self == MATERIALISE else f"{self.backend}, {self.sampling}"

    @property
    def measures(self) -> tuple[str, ...]:
        """What it is measured in. e3nn's layers have no batch norm; the backward pass that inductor (torch 2.13) makes
        of batch statistics writes past its buffers."""
        without_norm = self == COMPILED or self.backend == related.NAME
        return tuple(m for m in MEASURES if m != "train-batch" or not without_norm)


MATERIALISE = Candidate("reference", "escnn")  # the authors' algorithm
COMPILED = Candidate("eager, compiled", "auto")
# Forward and backward of `reference` hold about 6 tensors of the size of K: 805 MB measured where K has 131 MB.
_KERNELS_IN_MEMORY = 6
GATE_LIMIT = 1e9  # bytes, of a checked `reference`


def reference_bytes(case: Case) -> float:
    """Estimated peak memory of `reference`, forward and backward: 6 × E × C_out × C_in × 4 bytes."""
    n_out, n_in = (fields(case.gspace, names).size for names in (case.out, case.into))
    return _KERNELS_IN_MEMORY * case.edges * n_out * n_in * 4.0


def reference_limit() -> float:
    """Bytes that a timed `reference` may take: 4 GB, on a GPU half of its memory."""
    return torch.cuda.mem_get_info(_device[0])[1] / 2 if _device[0].type == "cuda" else 4e9


def candidates(case: Case, names: list[str], compile_eager: bool = False) -> tuple[list[Candidate], dict[str, str]]:
    """Who can run ``case``, and why others cannot: `materialise` (first), the backends ``names`` but `reference`, which
    is the same, e3nn's layers, and with ``compile_eager`` `eager` under torch.compile."""
    found, skipped = [MATERIALISE], {}
    if (needed := reference_bytes(case)) > reference_limit():
        found, skipped = [], {MATERIALISE.label: f"would need about {needed / 1e9:.1f} GB"}
    for sampling in SAMPLINGS:
        plan = case.layer(sampling=sampling, backend="reference").implicit_kernel.plan
        if sampling == "auto" and plan.sampling == "escnn":
            skipped[sampling] = "no exact sampling: the same as escnn"
            continue
        for name in (n for n in names if n != MATERIALISE.backend):
            candidate = Candidate(name, sampling)
            ok, reason = select.BACKENDS[name].supports(plan, _device[0], torch.float32)
            if not ok:
                skipped[candidate.label] = reason
            else:
                found.append(candidate)
    if compile_eager and (reason := _cannot_compile(case)):
        skipped[COMPILED.label] = reason
    elif compile_eager:
        found.append(COMPILED)
    if reason := related.why_not(case):
        skipped[related.NAME] = reason
    else:
        forms, others = related.forms(_device[0])
        found += [Candidate(related.NAME, form) for form in forms]
        skipped |= {f"{related.NAME}, {form}": reason for form, reason in others.items()}
    return found, skipped


def _cannot_compile(case: Case) -> str | None:
    """The reason, or None after compiling every measure."""
    try:
        for measure in COMPILED.measures:
            step(case, COMPILED, measure)()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def step(case: Case, candidate: Candidate, measure: str) -> Callable[[], dict[str, Tensor]]:
    """A call that runs ``measure`` once and returns its output and gradients by name; its graph is sorted beforehand.

    The loss is ½ |output|²: as a sum of terms of mostly one sign, its gradients lose no digits by cancellation.
    """
    return (_kept_step if candidate == COMPILED else _step)(case, candidate, measure)


def _step(case: Case, candidate: Candidate, measure: str) -> Callable[[], dict[str, Tensor]]:
    with_gradients = measure != "forward"
    conv = layer(case, candidate, NORMS[measure]).to(_device[0]).train(with_gradients)
    problem = case.inputs(conv)
    inputs = problem.requires_grad() if with_gradients else []
    module, call = conv, partial(problem.run, conv)
    if candidate.backend == related.NAME:
        size = 0 if conv.edge_attr_type is None else conv.edge_attr_type.size
        module = related.Layer(*map(related.irreps, (conv.in_type, conv.out_type)), size, candidate.sampling).to(
            _device[0]
        )
        call = partial(module, problem)

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return {"output": call()}

    def forward_backward() -> dict[str, Tensor]:
        output = call()
        gradients = torch.autograd.grad(output, list(leaves.values()), output.detach(), materialize_grads=True)
        return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))

    leaves = dict(zip(("x", "edge_delta", "edge_attr"), inputs, strict=False)) | dict(module.named_parameters())
    if candidate == COMPILED:
        with torch.set_grad_enabled(with_gradients):
            call = compiled_call(conv, problem)
    return forward_backward if with_gradients else forward


_kept_step = cache(_step)  # compiled once, for the gate and the clock


def operator_step(case: Case, candidate: Candidate, measure: str) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """What :func:`step` does, for the operator without the module around it: its output; in training the gradients of
    ½ |output|² in x, the edges' geometry and every parameter of the kernel."""
    with_gradients = measure != "forward"
    conv = layer(case, candidate, NORMS[measure]).to(_device[0]).train(with_gradients)
    problem, kernel = case.inputs(conv), conv.implicit_kernel
    leaves = [*problem.requires_grad(), *kernel.parameters()] if with_gradients else []
    attributes = problem.delta.new_zeros(len(problem.delta), 0) if problem.attributes is None else problem.attributes
    arguments = kernel.plan, kernel.parameters_for_op(), problem.graph, problem.x, problem.delta, attributes
    call = partial(implicit_conv, *arguments, statistics_from=RUNNING, backend=candidate.backend)

    def forward() -> Tensor:
        with torch.no_grad():
            return call()[0]

    def forward_backward() -> tuple[Tensor, ...]:
        output, _ = call()
        return torch.autograd.grad(output, leaves, output.detach())

    return forward_backward if with_gradients else forward


def layer(case: Case, candidate: Candidate, norm: str | None) -> ImplicitPointConv:
    """The case's layer with the candidate's backend and sampling; for e3nn one with the same fields."""
    if candidate.backend == related.NAME:
        return case.layer(norm=norm)
    backend = "eager" if candidate == COMPILED else candidate.backend
    return case.layer(norm=norm, sampling=candidate.sampling, backend=backend)


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


def checked_case(case: Case) -> Case:
    """``case``, on fewer nodes where `reference` would take more than 1 GB."""
    share = min(1.0, GATE_LIMIT / reference_bytes(case))
    return replace(case, nodes=max(case.degree + 1, int(share * case.nodes)))


def gate(case: Case, chosen: list[Candidate]) -> Iterator[Check]:
    """Compare output and all gradients of every backend with `reference` at the same sampling and dtype."""
    small = checked_case(case)
    for sampling in SAMPLINGS:
        others = [c for c in chosen if c.sampling == sampling and c.backend != "reference"]
        for measure in MEASURES if others else ():
            expected = step(small, Candidate("reference", sampling), measure)()
            for candidate in (c for c in others if measure in c.measures):
                got = step(small, candidate, measure)()
                errors = {name: relative_error(got[name], expected[name]) for name in expected}
                worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
                yield Check(case.name, candidate.backend, sampling, measure, worst, errors[worst])
