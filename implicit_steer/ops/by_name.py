"""Operators of torch with their arguments by the names that their schemas give them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def by_name(operator: str) -> Any:
    """A named tuple with a place for each of the operator's arguments, None where none is given."""
    names = [a.name for a in getattr(torch.ops.implicit_steer, operator).default._schema.arguments]
    return namedtuple(operator, names, defaults=[None] * len(names))


def positional(operator: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of the operator's arguments by name, as torch calls it: with all of them by position."""
    arguments_of = by_name(operator)
    return lambda *arguments: function(arguments_of(*arguments))


def differentiable(
    operator: str, gradient: Callable[..., Any], save: Callable[..., None]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """What saves for the gradient, and the gradient, as torch.library takes them. ``save`` gets the arguments by name;
    ``gradient`` gets which of them need one, and the gradients of the results, and returns what it found, by name.
    """
    arguments_of = by_name(operator)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        save(ctx, arguments_of(*inputs), output)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return tuple(arguments_of(**gradient(ctx, arguments_of(*ctx.needs_input_grad), *grads)))

    return setup_context, backward
