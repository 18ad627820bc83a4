"""These are PREDICTIONS, never measurements, of the Triton kernels' times. An H100 has run the case `cloud-batch` with
kernels that `edges_forward` and `edges_backward` have replaced there, `layers_forward` and `layers_backward_weights`
among them: their forward pass took what was predicted, their backward pass 1.5 times the upper end of the range
([gpu-h100.md](gpu-h100.md)).

The prediction for a launch is the least time that three throughputs allow: DRAM (each tensor that the kernel is given
crosses it once), instructions issued, and tensor cores. Instructions and tensor-core operations are counted in the
compiled code; what stands in a loop counts once per trip, also what only edges near the origin need. The peaks are
taken from data sheets. The two ends of a range assume a good and an ordinary share of the peaks. The prediction leaves
out latencies that few resident warps do not hide, bank conflicts, L2 misses of gathered features, and products of
cuBLAS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from implicit_steer.ops.triton import aot
from implicit_steer.ops.triton.launch import Launch
from implicit_steer.plan import Plan

NODES, DEGREE = 31_250, 32  # 1,000,000 edges
_SAMPLE = 64  # nodes of the graph whose launches are counted; everything grows with their number


@dataclass(frozen=True)
class Device:
    """GB/s, TFLOP/s of dense TF32, multiprocessors, GHz; the share of the tensor peak that mma.sync reaches."""

    architecture: int
    bandwidth: float
    tf32: float
    multiprocessors: int
    clock: float
    mma_sync: float


DEVICES = {
    "A100-SXM-80GB": Device(80, 2039, 156, 108, 1.41, 1.0),
    "H100-SXM": Device(90, 3350, 495, 132, 1.755, 0.63),
}
SHARES = {"DRAM": (0.90, 0.65), "issue": (0.85, 0.50), "tensor": (0.85, 0.45)}
_LAUNCH = (2.0, 4.0)  # microseconds
FLOP_OF_HMMA = 2 * 16 * 8 * 8  # m16n8k8, TF32


@dataclass(frozen=True)
class Prediction:
    """Microseconds at best and at worst, by bound."""

    kernel: str
    programs: int
    megabytes: float
    instructions: float  # of warps, in millions
    parts: dict[str, tuple[float, float]]

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name][1])

    @property
    def microseconds(self) -> tuple[float, float]:
        return tuple(max(part[n] for part in self.parts.values()) + _LAUNCH[n] for n in (0, 1))


def _trips(entry: Launch, degree: int) -> float:
    """How often a kernel goes through its inner loop: samples, tiles of them, or for every block of edges the terms of
    an accumulator, a slice of x or a window of r, on average."""
    constants, name = entry.constants, entry.kernel.__name__
    if name.startswith("edges"):
        return constants["NS"]
    if name.startswith("layers"):
        return 1 if name.endswith("weights") else constants["NU"] / constants["BU"]
    if not name.startswith("contract"):
        return 1
    part = {"forward": "acc", "inputs": "slice", "hidden": "window"}[name.rpartition("_")[2]]
    offsets = entry.arguments[f"p_{part}_term_begin"]
    return float(offsets[-1]) / (len(offsets) - 1) * -(-degree // constants["BE"])


def bytes_of(entry: Launch, nodes: int, edges: int) -> int:
    """Bytes of the tensors that grow with the graph."""
    grows = {nodes, nodes + 1, edges}
    tensors = {id(t): t for t in entry.arguments.values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values() if grows & set(t.shape))


def of_launch(entry: Launch, device: Device, found: aot.Resources) -> Prediction:
    """The prediction for NODES nodes of DEGREE edges from a launch for _SAMPLE nodes."""
    growth, trips = NODES / _SAMPLE, _trips(entry, DEGREE)
    programs = entry.grid[0] * (entry.grid[1] if len(entry.grid) > 1 else 1) * growth
    executed = (sum(found.instructions.values()) + (trips - 1) * found.in_loops) * found.warps * programs
    multiplied = (found.tensor_instructions + (trips - 1) * found.tensor_in_loops) * found.warps * programs
    megabytes = bytes_of(entry, _SAMPLE, _SAMPLE * DEGREE) * growth / 1e6
    peaks = {
        "DRAM": megabytes * 1e6 / (device.bandwidth * 1e9),
        "issue": executed / (4 * device.clock * 1e9 * device.multiprocessors),
        "tensor": multiplied * FLOP_OF_HMMA / (device.tf32 * device.mma_sync * 1e12),
    }
    parts = {name: tuple(1e6 * least / share for share in SHARES[name]) for name, least in peaks.items()}
    return Prediction(found.kernel, round(programs), megabytes, executed / 1e6, parts)


def predict(plan: Plan, device: Device) -> list[Prediction]:
    """The prediction for every launch of a forward and a backward pass in float32."""
    launches = aot.launches_of(plan, nodes=_SAMPLE, degree=DEGREE)
    return [of_launch(entry, device, aot.resources(entry, device.architecture)) for entry in launches]


def totals(predictions: Sequence[Prediction]) -> dict[str, tuple[float, float]]:
    """Milliseconds of the forward and the backward pass, which runs the hidden layers and T again."""
    found = {"forward": [0.0, 0.0], "backward": [0.0, 0.0]}
    for p in predictions:
        forward = p.kernel.endswith("forward") or p.kernel == "pack"
        again = p.kernel in ("contract_forward", "layers_forward_kept")
        for name, counts in (("forward", forward), ("backward", again or not forward)):
            for n in (0, 1):
                found[name][n] += counts * p.microseconds[n] / 1e3
    return {name: tuple(values) for name, values in found.items()}
