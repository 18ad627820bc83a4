"""`eager` under torch.compile at its best: one call is recorded as a graph of tensor operators, and inductor
compiles that without a break.

The recording holds for one graph, one set of positions and their shapes (blocks of nodes, edges near the origin).
torch.compile of the layer itself breaks its graph some 20 times and is slower than `eager`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode

from implicit_steer.nn import ImplicitPointConv
from implicit_steer.testing.cases import Problem

_SHAPING = (Tensor.nonzero, Tensor.tolist, Tensor.__int__)


class _Concrete(TorchFunctionMode):
    """What shapes depend on is computed while recording and is a constant of the recording."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _SHAPING:
            return func(*args, **(kwargs or {}))
        with disable_proxy_modes_tracing():
            return func(*args, **(kwargs or {}))


def compiled_call(conv: ImplicitPointConv, problem: Problem) -> Callable[[], Tensor]:
    """``problem.run(conv)`` compiled; it differentiates in the problem's tensors and the layer's parameters.

    Raises ``RuntimeError`` (also at the first call) where torch cannot record or compile it.
    """
    inputs = {k: t for k in ("x", "delta", "attributes") if (t := getattr(problem, k)) is not None}
    parameters = dict(conv.named_parameters())

    def call(*tensors: Tensor) -> Tensor:
        values = iter(tensors)
        here = replace(problem, **{name: next(values) for name in inputs})
        state = {name: next(values) for name in parameters}
        return torch.func.functional_call(conv, state, here.arguments(conv)).tensor

    leaves = [*inputs.values(), *parameters.values()]
    with _Concrete():
        recorded = make_fx(call)(*leaves)
    return partial(torch.compile(recorded, dynamic=False), *leaves)
