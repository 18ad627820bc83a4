"""Edges of a block, warps and pipeline stages of every kernel: a table, and what was measured to be faster on a device.

The table is keyed by kernel and by the widest hidden layer; in float32 no entry spills on sm_80, sm_90 or sm_100
(``python -m bench.gpu resources``), in float64, which is for checks, the hidden layers do. With blocks of 64 edges
sm_100 would use its fifth-generation tensor cores, whose kernels carry a trap for failed allocations and spill here:
all entries stay below. :func:`tune` (``python -m bench --device cuda --tune``) measures, and keeps what is fastest in a
file, which is read at the first launch; nothing is measured unasked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..._files import add_to_tuning_cache, tuning_cache
from .sizes import Sizes, next_power_of_2


class LaunchConfig(NamedTuple):
    """Edges of a block, warps, stages of the pipeline of loads."""

    edges: int
    warps: int
    stages: int = 1


# kernel: configurations for hidden layers in blocks of up to so many coefficients of one kind, and for float64
_TABLE: dict[str, dict[int, LaunchConfig]] = {
    "frame_forward": {512: LaunchConfig(32, 4)},
    "frame_backward": {512: LaunchConfig(32, 4)},
    "edges_forward": {512: LaunchConfig(128, 4)},
    "edges_backward": {512: LaunchConfig(128, 4)},
    "layers_forward": {32: LaunchConfig(32, 4), 128: LaunchConfig(16, 4), 512: LaunchConfig(16, 8)},
    "layers_backward_inputs": {32: LaunchConfig(32, 2, 2), 128: LaunchConfig(16, 4), 512: LaunchConfig(16, 8)},
    "layers_backward_weights": {32: LaunchConfig(16, 4), 512: LaunchConfig(16, 8)},
    "spline_forward": {512: LaunchConfig(32, 4)},
    "spline_backward": {512: LaunchConfig(32, 4)},
    "knot_sums": {512: LaunchConfig(32, 4)},
    "contract_forward": {512: LaunchConfig(16, 8)},
    "contract_backward_inputs": {512: LaunchConfig(32, 4)},
    "contract_backward_hidden": {512: LaunchConfig(32, 4)},
    "sum_by_source": {512: LaunchConfig(32, 4)},
    "pack": {512: LaunchConfig(1024, 4)},
}
_DOUBLE = {
    "frame": LaunchConfig(32, 4),
    "layers": LaunchConfig(16, 8),
    "edges": LaunchConfig(32, 1),
    "spline": LaunchConfig(32, 4),
    "knot": LaunchConfig(32, 4),
    "contract": LaunchConfig(16, 4),
    "sum": LaunchConfig(32, 4),
    "pack": LaunchConfig(1024, 4),
}
_MOST_ON_TENSOR_CORES = 32  # coefficients of order >= 1; three TF32 products of wider layers spill
CANDIDATES = tuple(LaunchConfig(e, w, s) for e in (16, 32, 64) for w in (2, 4, 8) for s in (1, 2))

_TUNED = "triton"  # name of the file in the cache folder

changes = 0  # how often this process has changed what choose gives
_override: dict[str, LaunchConfig] = {}


def choose(kernel: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> LaunchConfig:
    """What :func:`tune` found for this device, else the table's."""
    if kernel in _override:
        return _override[kernel]
    if (tuned := tuning_cache(_TUNED)) and (found := tuned.get(_key(kernel, sizes, dtype, device))):
        return LaunchConfig(*found)
    if dtype == torch.float64:
        return _DOUBLE[kernel.partition("_")[0]]
    width = next_power_of_2(max(sizes.n_zero, sizes.n_rest))
    return next(config for most, config in _TABLE[kernel].items() if width <= most)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float64 as it is; float32 exactly, or in TF32 where
    ``torch.set_float32_matmul_precision`` allows it."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def exact_product(sizes: Sizes) -> str:
    """How hidden layers multiply float32 exactly: three TF32 products on tensor cores, or multiply-adds."""
    return "tf32x3" if sizes.n_rest <= _MOST_ON_TENSOR_CORES else "ieee"


# ---- measuring


def _key(kernel: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}; {dtype}; {kernel}; {sizes}"


@contextmanager
def using(kernel: str, config: LaunchConfig) -> Iterator[None]:
    """Inside, the kernel runs with this configuration; behind it with that of before."""
    global changes, _override
    before, changes = _override, changes + 1
    _override = before | {kernel: config}
    try:
        yield
    finally:
        _override, changes = before, changes + 1


def seconds(run: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Per call, the device's work included; the first call, which compiles, does not count."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def tune(
    run: Callable[[], object],
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    measure: Callable[[Callable[[], object], torch.device], float] = seconds,
    candidates: tuple[LaunchConfig, ...] = CANDIDATES,
) -> dict[str, LaunchConfig]:
    """Measure ``run``, which calls a layer, with other configurations for one kernel after the other; keep the
    fastest ones in the cache folder and use them from now on. Candidates that do not fit the device are passed over.

    Returns:
        kernel → configuration.
    """
    from triton.runtime.errors import OutOfResources

    global changes
    found = {}
    for kernel in _TABLE:
        best, least = choose(kernel, sizes, dtype, device), measure(run, device)
        for candidate in candidates:
            with using(kernel, candidate):
                try:
                    took = measure(run, device)
                except OutOfResources:
                    continue
            if took < least:
                best, least = candidate, took
        found[kernel] = best
        add_to_tuning_cache(_TUNED, {_key(kernel, sizes, dtype, device): best})
        changes += 1
    return found
