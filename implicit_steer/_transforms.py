"""The native operators under transforms other than plain autograd.

Two vmaps work: ``torch.func.vmap``, and the older one of batched gradients,
``torch.autograd.grad(..., is_grads_batched=True)``, with which ``torch.autograd.functional.jacobian`` and ``hessian``
vectorise. Under both, an operator is called once for each entry of the batch, and the results are stacked. Derivatives
by ``torch.func`` and by forward mode are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from ._check import fail, require

_NAMESPACE = "implicit_steer"
_LIBRARY = torch.library.Library(_NAMESPACE, "IMPL")  # what it registers lives as long as it does
_LEVELS = range(1, 65)  # the numbers that the older vmap gives to batches of batches

# ---- derivatives


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, …) is active."""
    return torch._C._are_functorch_transforms_active()


def is_differentiated() -> bool:
    """Whether torch.func differentiates (grad, vjp, jvp, jacrev, jacfwd, hessian)."""
    return any(t.key() in (TransformType.Grad, TransformType.Jvp) for t in get_interpreter_stack() or ())


def in_forward_mode() -> bool:
    """Whether forward mode is active, in which tensors may have tangents."""
    return forward_ad._current_level >= 0


def have_tangents(tensors: Sequence[Tensor]) -> bool:
    """Whether forward mode differentiates one of ``tensors``."""
    return in_forward_mode() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def refuse_derivatives(*tensors: Tensor) -> None:
    """Raise where torch.func or forward mode would differentiate a backward pass that reads ``tensors``: they would
    get 0."""
    if is_differentiated() or have_tangents(tensors):
        expected = "a backward pass that torch.autograd alone differentiates"
        remedy = "Use torch.autograd.grad with create_graph=True; or, of a convolution, backend='reference'."
        fail("grad_outputs", expected, "one under torch.func or forward mode", remedy, RuntimeError)


def refuse_transforms(backend: str) -> None:
    """Raise where torch.func would differentiate the operators, whose derivatives it cannot see; inside torch.compile,
    raise under any transform."""
    if torch.compiler.is_compiling():
        wrong = is_transformed()
        expected = "one that torch.func can transform inside torch.compile"
        remedy = "Use torch.func outside of compiled functions, or backend='reference'."
    else:
        wrong = is_differentiated()
        expected = "one that torch.func.grad, vjp, jvp, jacrev, jacfwd and hessian can transform"
        remedy = "Use torch.autograd.grad, also inside torch.func.vmap's ensembles, or backend='reference'."
    if wrong:
        fail("backend", expected, repr(backend), remedy, RuntimeError)


def refuse_tangents(backend: str, tensors: Sequence[Tensor]) -> None:
    """Raise where forward mode would differentiate the operators: it would get 0."""
    if have_tangents(tensors):
        remedy = "Use torch.autograd.grad, or backend='reference'."
        fail("backend", "one with forward-mode derivatives", repr(backend), remedy, RuntimeError)


def recorder(function: type[torch.autograd.Function]) -> Callable:
    """``function.apply`` without its detour for torch.func, for callers that know that no transform is active.

    ``torch.autograd.Function.apply`` is Python that first asks for transforms and binds its arguments to the signature
    of ``forward``; the method of the same name of its base class, in C++, is what records the call for autograd.
    """
    return super(torch.autograd.Function, function).apply


# ---- batches


def one_by_one(name: str) -> None:
    """Let the operator ``name`` run under both vmaps; it takes tensors, lists of tensors and scalars."""
    operator = getattr(torch.ops.implicit_steer, name).default

    def rule(info, dims, *arguments):
        return _stacked(operator, info.batch_size, arguments, dims), 0

    torch.library.register_vmap(f"{_NAMESPACE}::{name}", rule)
    # PyTorch's own loop for the older vmap cannot take lists of tensors.
    _LIBRARY.impl(name, partial(_of_older_vmap, operator), "Batched")


def _stacked(operator: Callable, size: int, arguments: Any, dims: Any) -> Any:
    """What the operator gives for each of ``size`` entries, stacked. ``dims``: for every argument the dimension that
    holds the entries, or None where all entries share the argument."""
    require(size > 0, "vmap", "a batch of at least one entry", "none", kind=RuntimeError)

    def entry(n: int) -> Any:
        return tree_map(lambda a, dim: a if dim is None else a.select(dim, n).contiguous(), arguments, dims)

    return tree_map(lambda *parts: torch.stack(parts), *(operator(*entry(n)) for n in range(size)))


def _of_older_vmap(operator: Callable, *arguments: Any) -> Any:
    """The rule for the older vmap. The tensors themselves tell its level, because a backward pass may run in another
    thread."""
    # PyTorch gives a tensor its levels in ascending order, so the last one goes first.
    level = max(map(_last_level, tree_leaves(arguments)))
    batches = tree_map(lambda a: _batch(a, level), arguments)
    size = next(len(batch) for batch in tree_leaves(batches) if batch is not None)
    whole = tree_map(lambda a, batch: a if batch is None else batch, arguments, batches)
    found = _stacked(operator, size, whole, tree_map(lambda batch: None if batch is None else 0, batches))
    return tree_map(lambda t: torch._add_batch_dim(t, 0, level), found)


def _is_batched(argument: Any) -> bool:
    return isinstance(argument, Tensor) and is_legacy_batchedtensor(argument)


def _batch(argument: Any, level: int) -> Tensor | None:
    """The tensor with its batch of this level in front; None where it has none."""
    if not _is_batched(argument):
        return None
    batch = torch._remove_batch_dim(argument, level, 0, 0)  # without such a batch, the tensor expanded to size 0
    return batch if len(batch) else None


def _last_level(argument: Any) -> int:
    """The last level of a tensor's batches; 0 where it has none."""
    last = 0
    for level in _LEVELS:
        if not _is_batched(argument):
            break
        batch = _batch(argument, level)
        if batch is not None:
            argument, last = batch, level
    return last
