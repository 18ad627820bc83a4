"""These are PREDICTIONS, never measurements, of the CUDA kernels' times, in float32 for the benchmark's case
`cloud-batch`: 262,144 edges, 32 per node, 8 fields of l <= 1, three hidden layers of 8 channels; of tile kernels with 8
fields of each of l = 0, 1 and 2, of wide kernels with 64 fields as inputs.

A kernel takes the longest of four times: to issue its instructions, four in a cycle of a multiprocessor; to multiply on
tensor cores; to evaluate functions (MUFU), 16 in a cycle; to move each array that grows with the graph through DRAM
once. How many instructions warps execute is found from the machine code and the emulator (`bench/executed.py`).

The two ends of a range assume a good and an ordinary share of each throughput. Two kernels measured on an H100 set the
ordinary shares: a warp of the forward kernel of that time issued an instruction in 10.2 cycles, a sum over the edges of
each source moved its arrays at 53 % of the data sheet's bandwidth. Good are 80 % of the issue slots, and the bandwidth
of a copy, which was measured there, too. For tensor cores and MUFU nothing was measured: 85 % is taken as good, 45 %
and 50 % as ordinary. The prediction leaves out bank conflicts, L2 misses of gathered features, warps that wait for the
last one, and kernels whose work is not proportional to the graph. Launches and counts are those for the shared memory
of sm_90; where there is less, a warp takes fewer edges at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .predict import DEVICES, FLOP_OF_HMMA, SHARES, Device

EDGES = 262_144


_ON = DEVICES["H100-SXM"]  # where the following was measured (docs/gpu-h100.md)
_COPY = 2953.3  # GB/s
_SUM = EDGES * 140.3 / 20.8e3  # GB/s: a sum by source of so many bytes per edge took 20.8 µs

_ISSUE = 0.8  # of the slots, at best
# Between two instructions of a warp. The forward kernel took so many cycles with 16 resident warps, and 657
# instructions per edge.
CYCLES = 831_002 * 16 * _ON.multiprocessors / (657 * EDGES)
_SHARES = {
    "tensor": SHARES["tensor"],
    "MUFU": SHARES["issue"],
    "DRAM": tuple(gb_per_s / _ON.bandwidth for gb_per_s in (_COPY, _SUM)),
}


@dataclass(frozen=True)
class Prediction:
    """Cycles of a device at best and at worst, by bound."""

    device: Device
    parts: dict[str, tuple[float, float]]

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name][1])

    @property
    def cycles(self) -> tuple[float, float]:
        low, high = (max(part[n] for part in self.parts.values()) for n in (0, 1))
        return low, high

    @property
    def microseconds(self) -> tuple[float, float]:
        low, high = (n / (1e3 * self.device.clock) for n in self.cycles)
        return low, high


def predict(per_edge: Mapping[str, float], bytes_per_edge: float, warps: float, device: Device) -> Prediction:
    """``per_edge``: opcode → instructions that warps execute; ``warps``: that can be resident on a multiprocessor."""
    edges = EDGES / device.multiprocessors
    instructions = edges * sum(per_edge.values())
    hertz = 1e9 * device.clock
    products = EDGES * per_edge.get("HMMA", 0) * FLOP_OF_HMMA / (device.tf32 * device.mma_sync * 1e12) * hertz
    traffic = EDGES * bytes_per_edge / (device.bandwidth * 1e9) * hertz
    peaks = {"tensor": products, "MUFU": edges * per_edge.get("MUFU", 0) * 32 / 16, "DRAM": traffic}
    parts = {name: (least / _SHARES[name][0], least / _SHARES[name][1]) for name, least in peaks.items()}
    parts["issue"] = instructions / (4 * _ISSUE), instructions / min(4 * _ISSUE, warps / CYCLES)
    return Prediction(device, parts)


def per_edge(loops: Mapping[str | None, Counter[str]], edges: int) -> dict[str, float]:
    """Opcode → instructions per edge, of all loops."""
    total: Counter[str] = sum(loops.values(), Counter())
    return {opcode: n / edges for opcode, n in total.items()}
