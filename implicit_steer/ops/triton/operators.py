"""The kernels as operators of torch: schemas, shapes (fake kernels), derivatives of every order.

``triton_frame``, ``triton_layers`` and ``triton_contract`` run in a row; each has a gradient operator made of kernels.
Derivatives of the gradients:

- of the contraction: T is linear in x, r and Θ and affine in q, so they are the same operators again, with a direction
  in the place of one argument;
- of frame and layers: formulas in PyTorch, which keep E values per sample in memory (``ops/kernel_mlp.py`` and
  ``dense.py``).

Operators take tensors and scalars only, so a plan goes by its digest; :func:`register_plan` stores the plan under it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._check import require
from ..._transforms import one_by_one
from ...plan import Plan
from . import dense, launch_contract, launch_mlp
from .launch_contract import Edges, Factors
from .launch_mlp import LayerInputs
from .prepared import Prepared, prepare
from .sizes import Sizes
from .tables import tables

_NAMESPACE = "implicit_steer"
_plans: dict[str, Plan] = {}


def register_plan(plan: Plan) -> str:
    """The digest by which the operators find the plan."""
    return _plans.setdefault(plan.digest, plan).digest


def _prepared(digest: str, like: Tensor) -> Prepared:
    require(digest in _plans, "plan", "the digest of a plan of this process", digest, "Call register_plan(plan) first.")
    return prepare(_plans[digest], like.device, like.dtype)


def _sizes(digest: str) -> Sizes:
    return tables(_plans[digest]).sizes


def _on_device(like: Tensor) -> Any:
    """Kernels are launched on the current device: make it the tensors'."""
    return torch.cuda.device_of(like)


# ---- schemas and kernels

_FRAME = "str plan, Tensor delta, Tensor attr, Tensor order, Tensor shell_width"
_OF_FRAME = "Tensor d_inputs, Tensor d_radius, Tensor d_factor, Tensor d_q"
_LAYERS = "str plan, Tensor inputs, Tensor radius, Tensor factor, Tensor weights"
_CONTRACT = (
    "str plan, Tensor x, Tensor q, Tensor r, Tensor theta, Tensor source, Tensor rowptr, Tensor order, "
    "Tensor by_source, Tensor colptr, bool has_one"
)
_SCHEMAS = {
    "triton_frame": f"({_FRAME}) -> (Tensor, Tensor, Tensor, Tensor)",
    "triton_frame_backward": f"({_FRAME}, {_OF_FRAME}) -> (Tensor, Tensor, Tensor)",
    "triton_layers": f"({_LAYERS}) -> Tensor",
    "triton_layers_backward": (
        f"({_LAYERS}, Tensor gradient, bool need_inputs, bool need_weights) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "triton_contract": f"({_CONTRACT}) -> Tensor",
    "triton_contract_backward": (f"({_CONTRACT}, Tensor gradient, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"),
    "triton_hidden": f"({_LAYERS}, int n_layers) -> Tensor",
}


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


# What stands for an argument list below: each operator's tensors after ``plan``, in the order of its schema.


class FrameInputs(NamedTuple):
    """Of ``triton_frame``."""

    delta: Tensor
    attr: Tensor
    order: Tensor
    shell_width: Tensor


def _layer_inputs(tensors: Sequence[Tensor]) -> LayerInputs:
    return LayerInputs(*_contiguous(*tensors))


def _factors_and_edges(arguments: Sequence[Any]) -> tuple[Factors, Edges]:
    """Of ``triton_contract``: x, q, r, theta; source, rowptr, order, by_source, colptr; has_one."""
    *tensors, has_one = arguments
    return Factors(has_one, *_contiguous(*tensors[:4])), Edges(*_contiguous(*tensors[4:]))


def _frame(plan: str, *tensors: Tensor) -> Any:
    given = FrameInputs(*_contiguous(*tensors))
    with _on_device(given.delta):
        return launch_mlp.frame_forward(_prepared(plan, given.delta), *given)


def _frame_backward(plan: str, *tensors: Tensor) -> Any:
    given, gradients = FrameInputs(*_contiguous(*tensors[:4])), _contiguous(*tensors[4:])
    with _on_device(given.delta):
        return launch_mlp.frame_backward(_prepared(plan, given.delta), *given, gradients)


def _layers(plan: str, *tensors: Tensor) -> Any:
    given = _layer_inputs(tensors)
    with _on_device(given.factor):
        return launch_mlp.layers_forward(_prepared(plan, given.factor), given)


def _layers_backward(plan: str, *arguments: Any) -> Any:
    *tensors, gradient, need_inputs, need_weights = arguments
    given = _layer_inputs(tensors)
    with _on_device(given.factor):
        prepared = _prepared(plan, given.factor)
        return launch_mlp.layers_backward(prepared, given, gradient.contiguous(), need_inputs, need_weights)


def _hidden(plan: str, *arguments: Any) -> Any:
    *tensors, n_layers = arguments
    given = _layer_inputs(tensors)
    with _on_device(given.factor):
        return launch_mlp.hidden_coefficients(_prepared(plan, given.factor), given, n_layers)


def _contract(plan: str, *arguments: Any) -> Any:
    factors, edges = _factors_and_edges(arguments)
    with _on_device(factors.x):
        return launch_contract.contract_forward(_prepared(plan, factors.r), factors, edges)


def _contract_backward(plan: str, *arguments: Any) -> Any:
    *inputs, gradient, needs = arguments
    factors, edges = _factors_and_edges(inputs)
    with _on_device(factors.x):
        prepared = _prepared(plan, factors.r)
        return launch_contract.contract_backward(prepared, gradient.contiguous(), factors, edges, needs)


# ---- shapes


def _wanted(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of these tensors; empty where not needed."""
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True))


def _frame_fake(plan: str, *tensors: Tensor) -> Any:
    s, delta = _sizes(plan), FrameInputs(*tensors).delta
    n = delta.shape[0]
    radius = delta.new_empty(n) if s.regular else delta.new_empty(0)
    return delta.new_empty(n, s.n_inputs), radius, delta.new_empty(n), delta.new_empty(n, s.n_harmonics)


def _frame_backward_fake(plan: str, *tensors: Tensor) -> Any:
    given = FrameInputs(*tensors[:4])
    return torch.empty_like(given.delta), torch.empty_like(given.attr), torch.empty_like(given.shell_width)


def _layers_fake(plan: str, *tensors: Tensor) -> Any:
    factor = LayerInputs(*tensors).factor
    return factor.new_empty(factor.shape[0], _sizes(plan).n_columns)


def _layers_backward_fake(plan: str, *arguments: Any) -> Any:
    *tensors, _, need_inputs, need_weights = arguments
    return _wanted(tensors, (need_inputs,) * 3 + (need_weights,))


def _hidden_fake(plan: str, *arguments: Any) -> Any:
    s, factor = _sizes(plan), LayerInputs(*arguments[:-1]).factor
    return factor.new_empty(factor.shape[0], s.n_zero + s.n_rest)


def _contract_fake(plan: str, *arguments: Any) -> Any:
    factors, edges = _factors_and_edges(arguments)
    return factors.x.new_empty(edges.rowptr.shape[0] - 1, factors.theta.shape[1])


def _contract_backward_fake(plan: str, *arguments: Any) -> Any:
    *inputs, _, needs = arguments
    return _wanted(inputs[:4], needs)


# ---- derivatives


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))
    ctx.plan, ctx.others = inputs[0], [v for v in inputs[1:] if not isinstance(v, Tensor)]


def _masked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def _derivatives_of_gradients(
    function: Callable[..., Sequence[Tensor]],
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    directions: Sequence[Tensor | None],
) -> list[Tensor]:
    """The derivatives of Σ ⟨direction, gradient⟩ with respect to primals and cotangents, where the gradients are those
    of Σ ⟨cotangent, output⟩ with respect to the primals, outputs = ``function``(*primals)."""
    live = torch.is_grad_enabled()
    with torch.enable_grad():
        fresh = [t.view_as(t) if live and t.requires_grad else t.detach().requires_grad_() for t in primals]
        given = [t.view_as(t) if live and t.requires_grad else t.detach().requires_grad_() for t in cotangents]
        outputs = function(*fresh)
        outputs, weights = zip(*((o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad), strict=True)
        firsts = torch.autograd.grad(outputs, fresh, weights, create_graph=True, materialize_grads=True)
        kept = [(f, v) for f, v in zip(firsts, directions, strict=True) if v is not None and f.requires_grad]
        if not kept:
            return [torch.zeros_like(t) for t in (*primals, *cotangents)]
        firsts, weights = zip(*kept, strict=True)
        found = torch.autograd.grad(
            firsts, [*fresh, *given], weights, create_graph=live, allow_unused=True, materialize_grads=True
        )
    return list(found)


def _frame_gradient(ctx: Any, *gradients: Tensor) -> Any:
    delta, attr, order, shell_width = ctx.saved_tensors
    found = torch.ops.implicit_steer.triton_frame_backward(ctx.plan, delta, attr, order, shell_width, *gradients)
    d_delta, d_attr, d_shell = _masked(found, [ctx.needs_input_grad[n] for n in (1, 2, 4)])
    return None, d_delta, d_attr, None, d_shell


def _frame_backward_gradient(ctx: Any, *directions: Tensor) -> Any:
    delta, attr, order, shell_width, *gradients = ctx.saved_tensors
    plan = _plans[ctx.plan]

    def geometry(delta: Tensor, attr: Tensor, shell_width: Tensor) -> Any:
        return dense.geometry(tables(plan), delta, attr, order, shell_width)

    d_delta, d_attr, d_shell, *rest = _derivatives_of_gradients(
        geometry, (delta, attr, shell_width), gradients, directions
    )
    return None, d_delta, d_attr, None, d_shell, *rest


def _layers_gradient(ctx: Any, gradient: Tensor) -> Any:
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad
    some = any(needs[1:4])
    found = torch.ops.implicit_steer.triton_layers_backward(ctx.plan, *tensors, gradient, some, needs[4])
    return None, *_masked(found, needs[1:5])


def _layers_backward_gradient(ctx: Any, *directions: Tensor) -> Any:
    *tensors, gradient = ctx.saved_tensors
    prepared = _prepared(ctx.plan, gradient)
    need_inputs, need_weights = ctx.others
    given = [v if need else None for v, need in zip(directions, (need_inputs,) * 3 + (need_weights,), strict=True)]

    def hidden(*tensors: Tensor) -> Any:
        return (dense.layers(prepared, *tensors),)

    found = _derivatives_of_gradients(hidden, tensors, [gradient], given)
    return None, *found, None, None


def _contract_gradient(ctx: Any, gradient: Tensor) -> Any:
    needs = ctx.needs_input_grad[1:5]
    arguments = ctx.plan, *ctx.saved_tensors, *ctx.others, gradient, needs
    found = torch.ops.implicit_steer.triton_contract_backward(*arguments)
    return None, *_masked(found, needs), *[None] * 6


def _contract_backward_gradient(ctx: Any, *directions: Tensor) -> Any:
    *inputs, source, rowptr, order, by_source, colptr, gradient = ctx.saved_tensors
    (has_one, given), graph = ctx.others, (source, rowptr, order, by_source, colptr)
    needs, of_gradient = ctx.needs_input_grad[1:5], ctx.needs_input_grad[11]
    totals: list[Tensor | None] = [None] * 5

    def add(n: int, more: Tensor) -> None:
        before = totals[n]
        totals[n] = more if before is None else before + more

    operators = torch.ops.implicit_steer
    for n, (direction, was_given) in enumerate(zip(directions, given, strict=True)):
        if direction is None or not was_given:
            continue
        # T is affine in q: along a direction of q its constant counts as 0
        moved = [direction if k == n else t for k, t in enumerate(inputs)]
        one = has_one and n != 1
        if of_gradient:
            add(4, operators.triton_contract(ctx.plan, *moved, *graph, one))
        others = [need and k != n for k, need in enumerate(needs)]
        if any(others):
            found = operators.triton_contract_backward(ctx.plan, *moved, *graph, one, gradient, others)
            for k in range(4):
                if others[k]:
                    add(k, found[k])
    return None, *totals[:4], *[None] * 6, totals[4], None


# ---- registration

_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any] | None]] = {
    "triton_frame": (_frame, _frame_fake, _frame_gradient),
    "triton_frame_backward": (_frame_backward, _frame_backward_fake, _frame_backward_gradient),
    "triton_layers": (_layers, _layers_fake, _layers_gradient),
    "triton_layers_backward": (_layers_backward, _layers_backward_fake, _layers_backward_gradient),
    "triton_contract": (_contract, _contract_fake, _contract_gradient),
    "triton_contract_backward": (_contract_backward, _contract_backward_fake, _contract_backward_gradient),
    "triton_hidden": (_hidden, _hidden_fake, None),
}

_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def _register() -> None:
    _native.available()  # the native extension defines the namespace first, where there is one
    for name, (kernel, fake, gradient) in _KERNELS.items():
        _library.define(name + _SCHEMAS[name])
        for key in ("CPU", "CUDA"):
            _library.impl(name, kernel, key)
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
        one_by_one(name)
        if gradient is not None:
            qualified = f"{_NAMESPACE}::{name}"
            torch.library.register_autograd(qualified, gradient, setup_context=_save, lib=_library)


_register()
