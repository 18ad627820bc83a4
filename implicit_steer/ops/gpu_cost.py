"""How "auto" chooses between the GPU backends: by times that were measured on the device, else by a count of warp
instructions per edge.

`cuda` multiplies only where a matrix is not 0. The count is that of its generic kernels, on the ordinary units: 4
instructions per multiply-add and 16 per φ, of 32 lanes each; the splines of a table take about 100 per edge. The exact,
the grid and the tile kernels execute fewer (docs/cuda_kernels.md). For many fields the coupling takes 1.35 instructions
per multiply-add, of 32 lanes, and a library mixes the channels, at an assumed three quarters of the units' peak.

`triton` runs narrow layers of zonal frames edge by edge: 0.107 instructions per multiply-add and 2.4 per φ, difference
quotients near the origin included, are what the kernels for ``cloud`` with 8 and with 4 channels were compiled to,
548 and 267 per edge on sm_90. Other layers multiply whole matrices on tensor cores: three TF32 products, of 1,024
multiply-adds per instruction, at a quarter of the peak rate, and 8 instructions per φ. The splines of a table take 104
per edge, a multiply-add of the coupling 0.4 (docs/gpu-predictions.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from statistics import median

from .._files import add_to_tuning_cache, tuning_cache
from ..plan import Plan
from .native.terms import padded
from .triton.tables import runs_edge_by_edge

BACKENDS = ("cuda", "triton")  # those that run on a GPU and that "auto" compares
_MEASURED = "gpu"  # name of the tuning cache

_LANES, _NODE_DEGREE = 32, 16
_CUDA_PRODUCT, _CUDA_FUNCTION, _CUDA_SPLINES = 4 / _LANES, 16 / _LANES, 100.0
_CUDA_WIDE_COUPLING, _CUDA_LIBRARY = 1.35 / _LANES, 1 / 0.75 / _LANES
_MOST_SUMS, _MOST_PRODUCTS = 4096, 65536  # of a node: as in csrc/cuda/wide_plan.h
_TRITON_PRODUCT, _TRITON_FUNCTION, _TRITON_COUPLING = 4 * 3 / 1024, 8.0, 0.4
_TRITON_PRODUCT_OF_EDGE, _TRITON_FUNCTION_OF_EDGE, _TRITON_SPLINES = 0.107, 2.4, 104.0


@lru_cache(maxsize=256)
def instructions_per_edge(plan: Plan) -> dict[str, float]:
    """Backend → warp instructions per edge of a forward pass, predicted."""
    cost = plan.cost()
    coupling, mixing = cost["sparse coupling per edge"], cost["mixing per node"] / _NODE_DEGREE
    per_coupling, per_mixing = (_CUDA_WIDE_COUPLING, _CUDA_LIBRARY) if is_wide(plan) else (_CUDA_PRODUCT, _CUDA_PRODUCT)
    return {
        "cuda": _hidden_of_cuda(plan) + per_coupling * coupling + per_mixing * mixing,
        "triton": _hidden_of_triton(plan) + _TRITON_PRODUCT * mixing + _TRITON_COUPLING * coupling,
    }


def is_wide(plan: Plan) -> bool:
    """Whether `cuda` has a node's T in global memory, so many fields there are."""
    sums = 0
    for c in plan.couplings:
        stride = 1 if plan.reads_one(c) else padded(len(c.hidden_start))
        sums += c.counts[2] * padded(len(c.in_start) * stride)
    return sums > _MOST_SUMS or plan.cost()["mixing per node"] > _MOST_PRODUCTS


def _interpolates(plan: Plan) -> bool:
    """Whether calls on a GPU use a table."""
    return plan.table is not None and not plan.table.automatic


def _hidden_of_cuda(plan: Plan) -> float:
    """The instructions per edge that `cuda` takes for the hidden coefficients."""
    if _interpolates(plan):
        return _CUDA_SPLINES
    cost = plan.cost()
    return _CUDA_PRODUCT * cost["mlp per edge"] + _CUDA_FUNCTION * cost["φ per edge"]


def _hidden_of_triton(plan: Plan) -> float:
    """The instructions per edge that `triton` takes for the hidden coefficients."""
    if _interpolates(plan):
        return _TRITON_SPLINES
    cost = plan.cost()
    if runs_edge_by_edge(plan):
        return _TRITON_PRODUCT_OF_EDGE * cost["mlp per edge"] + _TRITON_FUNCTION_OF_EDGE * cost["φ per edge"]
    dense = sum(layer.out_size * layer.in_size for layer in plan.linears)
    dense += sum(2 * a.channels * a.samples.size for a in plan.activations)
    return _TRITON_PRODUCT * dense + _TRITON_FUNCTION * cost["φ per edge"]


def keep_times(device: str, times: Iterable[tuple[Plan, int, str, float]]) -> dict[str, float]:
    """Keep measured forward passes for the device of this name, so that "auto" chooses by them.

    Args:
        device: the device's name.
        times: (plan, edges, backend, seconds) of each measurement; other backends than :data:`BACKENDS` are left out.

    Returns:
        Backend → median seconds per predicted instruction, as it is kept; empty, and nothing is kept, where a backend
        has no measurement, because "auto" compares all of them.
    """
    found: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for plan, edges, backend, seconds in times:
        if backend in found:
            found[backend].append(seconds / (edges * instructions_per_edge(plan)[backend]))
    if not all(found.values()):
        return {}
    factors = {backend: median(of_backend) for backend, of_backend in found.items()}
    add_to_tuning_cache(_MEASURED, {device: factors})
    return factors


def nanoseconds_per_edge(plan: Plan, device: str) -> dict[str, float]:
    """Backend → nanoseconds per edge of a forward pass, from the times kept for this device; empty without."""
    predicted = instructions_per_edge(plan)
    return {
        backend: 1e9 * factor * predicted[backend]
        for backend, factor in tuning_cache(_MEASURED).get(device, {}).items()
    }
