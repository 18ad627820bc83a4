"""Kernels from splines alone: what is left of a kernel's MLP once its table has been made."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._check import fail, require
from ..graph import EdgeTypes
from ..ops import conv as op
from ..plan import Plan
from ..plan.packing import is_traced
from ..plan.tabulated import with_table
from .kernel import BasisFingerprint, KernelBase, LinearParameters


class _Places(NamedTuple):
    """Rows (n, A) that a call gave, the kernel's own (T, A) at that time, and where the former are among the latter
    (n,), in the dtype of the arithmetic."""

    given: Tensor
    own: Tensor
    numbers: Tensor


class FrozenKernel(BasisFingerprint, KernelBase):
    """K(x, a) = γ exp(−½ (|x| / σ)²) · mat(h(x, a)): hidden features h from splines of |x|, one set for each known row
    of attributes, mixed by the last layer. :meth:`~implicit_steer.layers.ImplicitPointConv.freeze_table` makes it.

    Args:
        plan: one with splines in place of its hidden layers.
        n_attributes: A, how many attributes an edge has.

    Called on positions (P, dim) and attributes (P, A), :class:`~implicit_steer.EdgeTypes` or None it returns
    (P, C_out, C_in). Attributes that it does not know, rounded to its dtype, are a ``ValueError``.

    Attributes:
        linears: the splines' coefficients, ``linears[0].weights`` (T (G + 3) W c,), and the last layer.
        rows: (T, A), the attributes that each set of splines stands for.
        shell_width: σ, learnable, (1, 1, 1).
    """

    rows: Tensor

    def __init__(self, plan: Plan, n_attributes: int) -> None:
        super().__init__()
        table = plan.table
        if table is None or not plan.is_frozen:
            fail("plan", "one with splines in place of its hidden layers", "another one")
        self.register_buffer("rows", torch.zeros(table.types, n_attributes))
        self.linears = torch.nn.ModuleList(LinearParameters(*n) for n in ((plan.table_size, 0), plan.n_last))
        self.shell_width = torch.nn.Parameter(torch.full((1, 1, 1), 0.5))
        self._places: _Places | None = None  # of the last call
        self._stamp(plan.fingerprint)
        self._find_tensors(list(self.linears), [])
        self._set_plan(plan)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"plan": self.plan, "n_attributes": self.n_attributes}

    def _set_plan(self, plan: Plan) -> None:
        super()._set_plan(plan)
        self.n_attributes = self.rows.shape[1]  # users give these; the plan's attribute is the number of a row

    def choose_knots(self, attributes: Tensor | EdgeTypes) -> None:
        """Do nothing: the knots of splines are fixed."""

    def check_points(
        self, prefix: str, delta: Tensor, attributes: Tensor | EdgeTypes | None, n: int | None
    ) -> Tensor | EdgeTypes:
        """Check positions and attributes; return the number of each point's row, (n, 1), or (n, 0) where there is one
        row."""
        given = super().check_points(prefix, delta, attributes, n)
        if self.n_attributes == 0:
            return given.attributes() if isinstance(given, EdgeTypes) else given
        name = "edge_attr" if prefix == "edge" else "attrs"
        types = given if isinstance(given, EdgeTypes) else EdgeTypes.from_rows(given)
        differentiated = types.rows.requires_grad and torch.is_grad_enabled()
        remedy = "Splines are known for these rows only: detach them, or differentiate the layer before it is frozen."
        require(not differentiated, f"{name}.rows", "rows that require no gradient", "some that do", remedy)
        numbers = self._numbers(name, types.rows)
        if len(self.rows) == 1:
            return numbers.new_empty(delta.shape[0], 0)
        return numbers.index_select(0, types.index)[:, None]

    def _numbers(self, name: str, rows: Tensor) -> Tensor:
        """(n,): where these rows (n, A) are among the kernel's own, as floating point numbers."""
        own, last = self.rows, self._places
        if is_traced():  # a compiled program cannot wait for the answer: it stops where it is wrong
            same = (rows.to(own.dtype)[:, None] == own).all(-1)
            torch._assert_async(same.any(1).all(), f"{name}: expected rows of the frozen kernel, got others.")
            return same.int().argmax(1).to(op.compute_dtype(self.parameters_for_op()))
        here = last is not None and last.own.device == own.device
        if last is not None and here and torch.equal(last.given, rows) and torch.equal(last.own, own):
            return last.numbers
        same = (rows.detach().to(own.dtype)[:, None] == own).all(-1)
        unknown = rows[~same.any(1)]
        if len(unknown):
            remedy = "Freeze the layer with these rows, too: freeze_table(rows)."
            expected = f"rows among the {len(own)} that the layer was frozen with"
            fail(name, expected, f"{len(unknown)} others, the first {unknown[0].tolist()}", remedy)
        numbers = same.int().argmax(1).to(op.compute_dtype(self.parameters_for_op()))
        self._places = _Places(rows.detach().clone(), own.clone(), numbers)
        return numbers


def reason_against(kernel: KernelBase) -> str | None:
    """Why the kernel cannot be frozen as it is; None where it can."""
    if kernel.plan.is_frozen:
        return "it is frozen already"
    if (reason := kernel.plan.table_refusal) is not None:
        return reason
    known = kernel.n_attributes == 0 or kernel.known_rows is not None
    return None if known else "it was not called with EdgeTypes, so that the rows of attributes are not known"


def freeze(kernel: KernelBase, rows: Tensor | None, knots: int | str | None) -> FrozenKernel:
    """The kernel of evaluation mode with splines in place of its hidden layers, for rows (T, A) of attributes; the
    arguments are those of :meth:`~implicit_steer.layers.ImplicitPointConv.freeze_table`. The tensors are copies, on
    the CPU."""
    plan, width = kernel.plan, kernel.shell_width
    require(not plan.is_frozen, "table", "a layer with an MLP", "a frozen one")
    if knots is not None or plan.table is None:
        remedy = "Build the layer with a table, or say how many knots there are to be: freeze_table(knots=256)."
        require(knots is not None, "table", "a layer with a table", None, remedy)
        plan = with_table(plan, knots, width.item())
    rows = _checked_rows(kernel, rows).to("cpu", width.dtype)
    parameters = kernel.parameters_on_cpu()
    plan, coefficients = op.frozen(plan, parameters, rows)
    made = FrozenKernel(plan, rows.shape[1])
    splines, last = (cast(LinearParameters, layer) for layer in made.linears)
    splines.weights = torch.nn.Parameter(coefficients.to(width.dtype))
    weights, bias = parameters.linears[-1]
    last.weights, last.bias = copied(weights), None if bias is None else copied(bias)
    made.shell_width, made.rows = copied(width), rows.clone()
    return made.train(kernel.training)


def copied(tensor: Tensor) -> torch.nn.Parameter:
    """A parameter of these values on the CPU, frozen where they are."""
    return torch.nn.Parameter(tensor.detach().cpu().clone(), tensor.requires_grad)


def _checked_rows(kernel: KernelBase, rows: Tensor | None) -> Tensor:
    size = kernel.n_attributes
    if rows is None:
        rows = kernel.known_rows if size else kernel.shell_width.new_zeros(1, 0)
    remedy = "Call the layer with EdgeTypes before, or pass their rows: freeze_table(EdgeTypes.from_rows(a).rows)."
    if rows is None:
        fail("rows", f"the rows (T, {size}) of attributes that edges have", None, remedy)
    ok = isinstance(rows, Tensor) and rows.is_floating_point()
    require(ok, "rows", "a floating point tensor", getattr(rows, "dtype", type(rows).__name__), kind=TypeError)
    ok = rows.dim() == 2 and rows.shape[1] == size and len(rows) > 0
    require(ok, "rows", f"shape (T, {size}), T at least 1", tuple(rows.shape))
    return rows.detach()
