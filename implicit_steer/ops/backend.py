"""What a backend is: the protocol that `reference`, `eager`, `cpu`, `cuda` and `triton` implement.

How to add one: docs/developers/backends.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..graph import Graph
from ..plan import Plan
from ..plan.moments import NormStatistics, StatisticsSource
from ..plan.packing import Parameters
from .kernel_mlp import normed_features, plain_kernel, table_sums


def refused_dtype(dtype: torch.dtype) -> str | None:
    """Why kernels do not compute in this dtype; None where they do."""
    return None if dtype in (torch.float32, torch.float64) else f"computes in float32 or float64, not {dtype}"


@runtime_checkable
class Backend(Protocol):
    """One way to compute the operator. ``ops/select.py`` holds one object of each and decides which of them runs.

    A backend knows plans and tensors, but no modules. Its methods assume valid arguments, which ``layers`` and ``nn``
    check: dtypes and devices of all tensors agree, and :meth:`supports` accepts the plan there. Tensors need not be
    contiguous. The object has no state but caches: the same inputs give the same bits.

    Both :meth:`forward` and :meth:`kernel` return what the batch norms measured beside their result, because the
    statistics of a norm fall out of the same pass over the edges. The list is empty where the norms use their
    running statistics.

    Attributes:
        name: how users ask for it, ``backend="..."``, and how errors name it.
        takes_tables: whether it evaluates splines where a plan has a table; `reference` evaluates the MLP.
    """

    name: str
    takes_tables: bool = True

    @abstractmethod
    def available(self) -> tuple[bool, str]:
        """Whether it runs on this machine for some plan, and why or why not; loads and compiles nothing."""

    @abstractmethod
    def supports(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether it runs ``plan`` on tensors of this device and dtype, and why or why not.

        It is asked at every call: what takes time is cached. The reason follows the backend's name in ``explain()``
        and the words "a plan that 'name' supports, got" in errors.
        """

    @abstractmethod
    def forward(
        self,
        plan: Plan,
        parameters: Parameters,
        statistics_from: StatisticsSource,
        graph: Graph,
        x: Tensor,
        delta: Tensor,
        attributes: Tensor,
    ) -> tuple[Tensor, Sequence[NormStatistics]]:
        """out_i = bias + Σ_{e: j→i} γ s(|x_e|) K(x_e, a_e) f_j.

        Differentiable in x, delta, attributes and every learned tensor, to second order at least; where it is not, it
        raises and never returns a gradient that lacks a part.

        Args:
            plan: what to compute.
            parameters: what was learned.
            statistics_from: where the batch norms take their statistics from; ``RUNNING`` without norms or edges.
            graph: N_src, N_dst nodes and E edges; E may be 0, and nodes may have no edges.
            x: (N_src, C_in) features.
            delta: (E, dim), position of the target minus that of the source.
            attributes: (E, A), A = 0 without attributes.

        Returns:
            (N_dst, C_out), and the statistics of every batch norm if they were measured.
        """

    def kernel(
        self,
        plan: Plan,
        parameters: Parameters,
        statistics_from: StatisticsSource,
        delta: Tensor,
        attributes: Tensor,
    ) -> tuple[Tensor, Sequence[NormStatistics]]:
        """K(x, a) = γ s(|x|) · mat(MLP(x ⊕ a)) at P points; this default, in plain PyTorch, serves backends that have
        no native code for the kernel alone.

        Args:
            plan, parameters, statistics_from: as in :meth:`forward`.
            delta: (P, dim).
            attributes: (P, A).

        Returns:
            (P, C_out, C_in), and the statistics of every batch norm if they were measured.
        """
        return plain_kernel(plan, parameters, statistics_from, delta, attributes)

    def hidden(
        self,
        plan: Plan,
        parameters: Parameters,
        statistics_from: StatisticsSource,
        delta: Tensor,
        attributes: Tensor,
    ) -> tuple[Tensor, Sequence[NormStatistics]]:
        """γ s(|x|) h(x, a) at P points, behind the last batch norm, (P, H), and the statistics of every batch norm if
        they were measured; arguments as in :meth:`kernel`. This default is plain PyTorch."""
        return normed_features(plan, parameters, statistics_from, delta, attributes)

    def table_sums(self, plan: Plan, native: Any, delta: Tensor, attributes: Tensor) -> Tensor:
        """How much the splines of a plan count among the edges, see :func:`~implicit_steer.ops.kernel_mlp.table_sums`;
        not differentiable. ``native``: the plan as native code takes it, or None. This default is plain PyTorch."""
        return table_sums(plan, delta, attributes)
