"""How "auto" chooses between the GPU backends: by times that were measured on the device, else by a count of warp
instructions per edge.

`cuda` multiplies only where a matrix is not 0, on the ordinary units. The count is 4 instructions per multiply-add and
16 per φ, of 32 lanes each; for the benchmark's case ``cloud`` it is within a third of the one in docs/cuda_kernels.md.
`triton` multiplies whole matrices on tensor cores: three TF32 products, of 1,024 multiply-adds per instruction, at a
quarter of the peak rate. Its 8 instructions per φ and 0.4 per multiply-add of the coupling were found in the kernels
compiled for ``cloud`` (docs/gpu-predictions.md). On an H100 (docs/gpu-h100.md) `cuda` was 2.2 times as fast as `triton`
on eight such clouds, where the counts say 3.8, and 2.3 times on the authors' grid, where they say 2.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from statistics import median

from .._files import add_to_tuning_cache, tuning_cache
from ..plan import Plan

BACKENDS = ("cuda", "triton")  # those that run on a GPU and that "auto" compares
_MEASURED = "gpu"  # name of the tuning cache

_LANES, _NODE_DEGREE = 32, 16
_CUDA_PRODUCT, _CUDA_FUNCTION = 4 / _LANES, 16 / _LANES
_TRITON_PRODUCT, _TRITON_FUNCTION, _TRITON_COUPLING = 4 * 3 / 1024, 8.0, 0.4


@lru_cache(maxsize=256)
def instructions_per_edge(plan: Plan) -> dict[str, float]:
    """Backend → warp instructions per edge of a forward pass, predicted."""
    cost = plan.cost()
    coupling, phi = cost["sparse coupling per edge"], cost["φ per edge"]
    mixing = cost["mixing per node"] / _NODE_DEGREE
    dense = sum(layer.out_size * layer.in_size for layer in plan.linears)
    dense += sum(2 * a.channels * a.samples.size for a in plan.activations)
    return {
        "cuda": _CUDA_PRODUCT * (cost["mlp per edge"] + coupling + mixing) + _CUDA_FUNCTION * phi,
        "triton": _TRITON_PRODUCT * (dense + mixing) + _TRITON_FUNCTION * phi + _TRITON_COUPLING * coupling,
    }


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
