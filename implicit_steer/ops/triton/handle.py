"""A plan as calls refer to it: by the digest under which the operators find it, with the few arrays that calls read
themselves. Importing this file does not import triton."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ..._check import require
from ...plan import Plan
from ...plan.packing import Constants

_plans: dict[str, Plan] = {}


class Handle:
    """Made by :func:`handle_of` before torch.compile looks on, which can read neither a plan's arrays nor register it.

    Attributes:
        key: the digest by which the operators find the plan.
        norms: of every batch norm how many channels it has, and how many trivial coordinates each of them.
    """

    def __init__(self, plan: Plan) -> None:
        frame = plan.frame
        self._plan, self.key = plan, plan.digest
        self.norms = [(norm.channels, len(norm.trivial)) for norm in plan.norms]
        self._is_in_frame = np.array_equal(frame.attribute, np.eye(frame.n_attributes))
        self._constants = Constants(frame.attribute, *(norm.measured for norm in plan.norms))

    def attributes_in_frame(self, attributes: Tensor) -> Tensor:
        """a' = attributeᵀ a (E, A), the attributes in frame coordinates; a itself where attribute is the identity."""
        return attributes if self._is_in_frame else attributes @ self._constants.like(attributes)[0]

    def trivial(self, norm: int, values: Tensor) -> Tensor:
        """Of values (d, W) of the hidden features those of the norm's trivial coordinates, (W, n_trivial)."""
        return values.index_select(0, self._constants.like(values)[1 + norm]).T.contiguous()

    def __reduce__(self) -> tuple[Any, ...]:  # another process has to register the plan, too
        return handle_of, (self._plan,)


@lru_cache(maxsize=256)
def handle_of(plan: Plan) -> Handle:
    """The plan's handle; the plan is registered for the operators."""
    _plans[plan.digest] = plan
    return Handle(plan)


def plan_of(key: str) -> Plan:
    """The plan that is registered under this digest."""
    require(key in _plans, "plan", "the digest of a plan of this process", key, "Call handle_of(plan) first.")
    return _plans[key]
