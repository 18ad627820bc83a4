"""The kernels as operators of torch: schemas, shapes (fake kernels) and derivatives.

``triton_conv`` is the whole convolution but for mean and bias, ``triton_conv_backward`` its gradient,
``triton_moments`` what batch norms measure, ``triton_knot_sums`` adds up the edges near each knot of a table. Further
derivatives are composed, in call.py, of PyTorch's own operators, ``triton_knot_sums`` and ``triton_contract``: T is
linear in x, r and Θ and affine in q, so the derivatives of its gradient are the same operators again, with a direction
in the place of one argument.

Operators take tensors and scalars only, so a plan goes by its digest, see ``handle.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._transforms import one_by_one
from ...plan.packing import unflatten
from ..by_name import differentiable, positional
from . import convolution, launch_contract, launch_spline
from .convolution import Learned, Points, Saved
from .handle import plan_of
from .launch_contract import Edges, Factors
from .prepared import Prepared, prepare
from .sizes import Sizes
from .tables import tables

_NAMESPACE = "implicit_steer"


def _prepared(digest: str, like: Tensor) -> Prepared:
    return prepare(plan_of(digest), like.device, like.dtype)


def _sizes(digest: str) -> Sizes:
    return tables(plan_of(digest)).sizes


_AS_IT_IS = nullcontext()


def _on_device(like: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it the tensors', where it is another one."""
    index = like.get_device()  # -1 of CPU tensors
    return _AS_IT_IS if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


# ---- schemas; kernels, of arguments `a` that have the names of the schemas

_GRAPH = "Tensor source, Tensor order, Tensor rowptr, Tensor by_source, Tensor colptr"
_LEARNED = "Tensor[] learned, Tensor[] statistics, bool measured"
_CONV = f"str plan, Tensor x, Tensor delta, Tensor attr, {_LEARNED}, {_GRAPH}"
_CONTRACT = f"str plan, Tensor x, Tensor q, Tensor r, Tensor theta, {_GRAPH}, bool has_one"
_SCHEMAS = {
    "triton_conv": f"({_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "triton_conv_backward": (
        f"({_CONV}, Tensor numbers, Tensor packed, Tensor q, Tensor r, Tensor gradient, bool[] needs)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "triton_knot_sums": "(str plan, Tensor values, Tensor weights, Tensor first) -> Tensor",
    "triton_moments": f"(str plan, Tensor delta, Tensor attr, {_LEARNED}, Tensor order, int n) -> Tensor",
    "triton_contract": f"({_CONTRACT}) -> Tensor",
    "triton_contract_backward": f"({_CONTRACT}, Tensor gradient, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
}


def forward(
    p: Prepared,
    inputs: Sequence[Tensor],
    learned: Learned,
    graph: Sequence[Tensor],
    numbers: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``triton_conv`` itself, of x, delta and attr, and of the graph's tensors; ``numbers``: of :class:`Saved`, where
    they are there already."""
    x, delta, attr = _contiguous(*inputs)
    edges = Edges(*_contiguous(*graph))
    with _on_device(x):
        total, saved = convolution.forward(p, x, Points(delta, attr, edges.order), edges, learned, numbers)
    return total, *saved


def gradients(
    p: Prepared,
    inputs: Sequence[Tensor],
    learned: Learned,
    graph: Sequence[Tensor],
    saved: Saved,
    gradient: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """``triton_conv_backward`` itself."""
    x, delta, attr = _contiguous(*inputs)
    edges = Edges(*_contiguous(*graph))
    points = Points(delta, attr, edges.order)
    with _on_device(gradient):
        return convolution.gradients(p, gradient.contiguous(), x, points, edges, learned, saved, needs)


def _graph(a: Any) -> tuple[Tensor, ...]:
    return a.source, a.order, a.rowptr, a.by_source, a.colptr


def _learned(a: Any) -> Learned:
    return Learned(a.learned, a.statistics, a.measured)


def _conv(a: Any) -> Any:
    return forward(_prepared(a.plan, a.delta), (a.x, a.delta, a.attr), _learned(a), _graph(a))


def _conv_backward(a: Any) -> Any:
    of_call = (a.x, a.delta, a.attr), _learned(a), _graph(a), Saved(a.numbers, a.packed, a.q, a.r)
    return gradients(_prepared(a.plan, a.gradient), *of_call, a.gradient, a.needs)


def _moments(a: Any) -> Tensor:
    with _on_device(a.delta):
        points = Points(*_contiguous(a.delta, a.attr, a.order))
        return convolution.moments(_prepared(a.plan, a.delta), points, _learned(a), a.n)


def _knot_sums(a: Any) -> Tensor:
    with _on_device(a.values):
        return launch_spline.knot_sums(_prepared(a.plan, a.values), *_contiguous(a.values, a.weights, a.first))


def _factors_and_edges(a: Any) -> tuple[Factors, Edges]:
    return Factors(a.has_one, *_contiguous(a.x, a.q, a.r, a.theta)), Edges(*_contiguous(*_graph(a)))


def _contract(a: Any) -> Any:
    factors, edges = _factors_and_edges(a)
    with _on_device(a.x):
        return launch_contract.contract_forward(_prepared(a.plan, a.r), factors, edges)


def _contract_backward(a: Any) -> Any:
    factors, edges = _factors_and_edges(a)
    *of_factors, need_theta = a.needs
    d_theta = torch.zeros_like(factors.theta) if need_theta else None
    with _on_device(a.x):
        prepared, gradient = _prepared(a.plan, a.r), a.gradient.contiguous()
        found = launch_contract.contract_backward(prepared, gradient, factors, edges, of_factors, d_theta)
    return *found, a.theta.new_empty(0) if d_theta is None else d_theta


# ---- shapes


def _wanted(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of these tensors; empty where not needed."""
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(tensors, needs, strict=True))


def _conv_fake(a: Any) -> Any:
    s, n_edges = _sizes(a.plan), a.source.shape[0]
    n_numbers = sum(t.numel() for t in (*a.learned, *a.statistics))
    n_packed = s.n_weights + s.n_t * s.out_size
    saved = (n_numbers,), (n_packed,), (n_edges, s.n_harmonics), (n_edges, s.n_columns)
    return tuple(a.x.new_empty(shape) for shape in ((a.rowptr.shape[0] - 1, s.out_size), *saved))


def _conv_backward_fake(a: Any) -> Any:
    need_x, *of_geometry, need_learned = a.needs
    need_geometry = any(of_geometry) or need_learned
    n_learned = sum(t.numel() for t in a.learned) if need_learned else 0
    found = _wanted((a.x, a.delta, a.attr), (need_x, need_geometry, need_geometry))
    return *found, a.x.new_empty(n_learned)


def _moments_fake(a: Any) -> Tensor:
    return a.delta.new_empty(2, plan_of(a.plan).field_size, _sizes(a.plan).channels)


def _knot_sums_fake(a: Any) -> Tensor:
    return a.values.new_empty(_sizes(a.plan).n_rows, a.values.shape[1])


def _contract_fake(a: Any) -> Any:
    return a.x.new_empty(a.rowptr.shape[0] - 1, a.theta.shape[1])


def _contract_backward_fake(a: Any) -> Any:
    return _wanted((a.x, a.q, a.r, a.theta), a.needs)


# ---- derivatives


def _save(ctx: Any, a: Any, output: Any, more: Sequence[Tensor] = ()) -> None:
    """The arguments, by name, and more tensors."""
    ctx.save_for_backward(*(v for v in a if isinstance(v, Tensor)), *more)
    ctx.given = a._make(None if isinstance(v, Tensor) else v for v in a)


def _saved(ctx: Any) -> tuple[Any, Iterator[Tensor]]:
    """The same."""
    tensors = iter(ctx.saved_tensors)
    return ctx.given._make([next(tensors) if v is None else v for v in ctx.given]), tensors


def _save_conv(ctx: Any, a: Any, output: Any) -> None:
    """In place of its lists of tensors how many there are of each."""
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    counts = a._replace(learned=len(a.learned), statistics=len(a.statistics))
    _save(ctx, counts, output, (*a.learned, *a.statistics, *saved))


def _masked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def _conv_gradient(ctx: Any, needs: Any, gradient: Tensor, *_: Any) -> dict[str, Any]:
    counts, tensors = _saved(ctx)
    learned, statistics = ([*islice(tensors, n)] for n in (counts.learned, counts.statistics))
    a, need_learned = counts._replace(learned=learned, statistics=statistics), any(needs.learned)
    needed = needs.x, needs.delta, needs.attr
    *found, flat = torch.ops.implicit_steer.triton_conv_backward(*a, *tensors, gradient, (*needed, need_learned))
    of_inputs = dict(zip(("x", "delta", "attr"), _masked(found, needed), strict=True))
    of_learned = unflatten(flat, learned) if need_learned else [None] * len(learned)
    return of_inputs | {"learned": of_learned, "statistics": [None] * len(statistics)}


_FACTORS = ("x", "q", "r", "theta")


def _contract_gradient(ctx: Any, needs: Any, gradient: Tensor) -> dict[str, Tensor | None]:
    a, _ = _saved(ctx)
    needed = [getattr(needs, name) for name in _FACTORS]
    found = torch.ops.implicit_steer.triton_contract_backward(*a, gradient, needed)
    return dict(zip(_FACTORS, _masked(found, needed), strict=True))


def _contract_backward_gradient(ctx: Any, needs: Any, *directions: Tensor | None) -> dict[str, Tensor]:
    a, _ = _saved(ctx)
    operators, totals = torch.ops.implicit_steer, dict[str, Tensor]()

    def add(name: str, more: Tensor) -> None:
        totals[name] = totals[name] + more if name in totals else more

    for name, direction, was_given in zip(_FACTORS, directions, a.needs, strict=True):
        if direction is None or not was_given:
            continue
        # T is affine in q: along a direction of q its constant counts as 0
        *moved, gradient, _ = a._replace(**{name: direction, "has_one": a.has_one and name != "q"})
        if needs.gradient:
            add("gradient", operators.triton_contract(*moved))
        others = [getattr(needs, other) and other != name for other in _FACTORS]
        if any(others):
            found = operators.triton_contract_backward(*moved, gradient, others)
            for other, need, more in zip(_FACTORS, others, found, strict=True):
                if need:
                    add(other, more)
    return totals


# ---- registration


class _Operator(NamedTuple):
    """Kernel and shapes, of arguments ``a`` by name. Its gradient gets, likewise by name, which arguments need one, and
    the gradients of the results; it returns, by name, those that it found. Operators without one are not
    differentiable."""

    kernel: Callable[[Any], Any]
    fake: Callable[[Any], Any]
    gradient: Callable[..., Any] | None = None
    save: Callable[..., None] = _save


_OPERATORS = {
    "triton_conv": _Operator(_conv, _conv_fake, _conv_gradient, _save_conv),
    "triton_conv_backward": _Operator(_conv_backward, _conv_backward_fake),
    "triton_moments": _Operator(_moments, _moments_fake),
    "triton_knot_sums": _Operator(_knot_sums, _knot_sums_fake),
    "triton_contract": _Operator(_contract, _contract_fake, _contract_gradient),
    "triton_contract_backward": _Operator(_contract_backward, _contract_backward_fake, _contract_backward_gradient),
}

_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


def _register(name: str, operator: _Operator) -> Callable[..., Any]:
    """The operator's kernel, which takes the arguments by position."""
    _library.define(name + _SCHEMAS[name])
    kernel = positional(name, operator.kernel)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    qualified = f"{_NAMESPACE}::{name}"
    torch.library.register_fake(qualified, positional(name, operator.fake), lib=_library)
    one_by_one(name)
    if operator.gradient is not None:
        save, backward = differentiable(name, operator.gradient, operator.save)
        torch.library.register_autograd(qualified, backward, setup_context=save, lib=_library)
    return kernel


_native.available()  # the native extension defines the namespace first, where there is one
KERNELS = {name: _register(name, operator) for name, operator in _OPERATORS.items()}
