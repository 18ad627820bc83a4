"""The most instructions that warps may execute in the loops of CUDA kernels: ``make cuda-gates`` holds them on sm_90.

The counts (executed.py) are those of case ``cloud``, 32 edges per node, and of the same case on the authors' grid for
grid kernels, with 16 fields or 16 channels for kernels of so many, with 256 knots in place of the MLP for those of
tables, with 8 fields of each of l = 0, 1 and 2 for tile kernels, but 64 scalars and vectors as inputs for those MLPs of
4 coefficients and for wide kernels, and the first of these cases that launches them for kernels of second derivatives.
A kernel of several passes is counted in the first one. A loop of this table has the comment ``// loop: NAME`` where its
``for`` stands in csrc/cuda. What it executes in another loop with a name counts there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

ARCHITECTURE = "sm_90"


@dataclass(frozen=True)
class Budget:
    """Warp instructions per ``edge`` or ``node``."""

    most: float
    per: str


WHOLE = "whole kernel"
BUDGETS: dict[str, dict[str, Budget]] = {
    "exact_forward<Exact<Elu, 8, 8, false>>": {
        WHOLE: Budget(124, "edge"),
        "chunks": Budget(70, "edge"),  # frame and MLP
        "T": Budget(29, "edge"),  # steps at the ends of nodes and chunks have fewer edges
        "nodes": Budget(600, "node"),  # mixing, 450 each time: a node that two warps share is mixed by both
    },
    "exact_backward<Exact<Elu, 8, 8, false>>": {
        WHOLE: Budget(320, "edge"),
        "chunks": Budget(182, "edge"),  # frame and MLP, forward again and back, with its weights' gradients
        "T": Budget(29, "edge"),  # as on the way forward
        "edges": Budget(62, "edge"),  # gradients of features and of coefficients
        "nodes": Budget(1150, "node"),  # gradients of T and of theta
    },
    # 16 fields
    "exact_forward<Exact<Elu, 8, 16, false>>": {
        WHOLE: Budget(220, "edge"),
        "chunks": Budget(70, "edge"),
        "T": Budget(52, "edge"),
        "nodes": Budget(2550, "node"),  # four times as many weights as with 8 fields; shared nodes are finished here
    },
    "exact_backward<Exact<Elu, 8, 16, false>>": {
        WHOLE: Budget(640, "edge"),
        "chunks": Budget(182, "edge"),
        "T": Budget(55, "edge"),
        "edges": Budget(140, "edge"),
        "nodes": Budget(4550, "node"),
    },
    # 16 channels
    "exact_forward<Exact<Elu, 16, 8, false>>": {
        WHOLE: Budget(236, "edge"),
        "chunks": Budget(156, "edge"),  # four times as many weights between layers as with 8 channels
        "T": Budget(40, "edge"),
        "nodes": Budget(1300, "node"),
    },
    "exact_backward<Exact<Elu, 16, 8, false>>": {
        WHOLE: Budget(715, "edge"),
        "chunks": Budget(400, "edge"),
        "T": Budget(40, "edge"),
        "edges": Budget(132, "edge"),
        "nodes": Budget(2450, "node"),
    },
    # a table
    "exact_forward<Tabulated<8, 8, false>>": {
        WHOLE: Budget(80, "edge"),
        "chunks": Budget(23, "edge"),  # frame and interpolation
        "T": Budget(32, "edge"),
        "nodes": Budget(600, "node"),
    },
    "exact_backward<Tabulated<8, 8, false>>": {
        WHOLE: Budget(295, "edge"),  # of which 50 are a block's beginning and end, for 512 edges here
        "chunks": Budget(110, "edge"),  # frame and interpolation, forward again and back; the splines' gradients
        "T": Budget(32, "edge"),
        "edges": Budget(65, "edge"),
        "nodes": Budget(1150, "node"),
    },
    # fields of l <= 2, in 57 slots
    "tile_layers<Tiled<Elu, 6, 8>>": {
        WHOLE: Budget(172, "edge"),  # 12 φ of a lane, where l <= 1 takes 4
    },
    "tile_layers<Tiled<Elu, 4, 8>>": {
        WHOLE: Budget(73, "edge"),
    },
    "tile_sums<float>": {
        WHOLE: Budget(548, "edge"),
        "direction": Budget(65, "edge"),  # harmonics and G
        "T": Budget(300, "edge"),  # 13 of them HMMA
        "constant T": Budget(42, "edge"),
        "nodes": Budget(66, "edge"),
    },
    "tile_backward<float>": {
        WHOLE: Budget(1260, "edge"),
        "direction": Budget(142, "edge"),  # once more, and the way back
        "nodes": Budget(640, "edge"),  # gradients of features, of G and of h, from dT
    },
    "tile_layers_backward<Tiled<Elu, 6, 8>>": {
        WHOLE: Budget(425, "edge"),
    },
    "tile_layers_backward<Tiled<Elu, 4, 8>>": {
        WHOLE: Budget(192, "edge"),
    },
    # second derivatives of exact and tiled layers: with tangents a product is three
    "tile_layers<WithTangents<Tiled<Elu, 4, 8>>>": {
        WHOLE: Budget(143, "edge"),
    },
    "tile_layers<WithTangents<Tiled<Elu, 6, 8>>>": {
        WHOLE: Budget(371, "edge"),
    },
    "tile_sums<Dual<float>>": {  # of 8 fields of l <= 1, as the next one
        WHOLE: Budget(232, "edge"),
        "T": Budget(126, "edge"),
    },
    "tile_backward<Dual<float>>": {
        WHOLE: Budget(590, "edge"),
        "nodes": Budget(290, "edge"),
    },
    "tile_layers_backward<WithTangents<Tiled<Elu, 4, 8>>>": {
        WHOLE: Budget(373, "edge"),
    },
    "tile_layers_backward<WithTangents<Tiled<Elu, 6, 8>>>": {
        WHOLE: Budget(920, "edge"),
    },
    # many fields: 64, in 15 slots
    "wide_sums<float>": {
        WHOLE: Budget(806, "edge"),
        "edges": Budget(651, "edge"),  # 88 of them T's multiply-adds
    },
    "wide_backward<float>": {
        WHOLE: Budget(2350, "edge"),
        "terms": Budget(1630, "edge"),  # gradients of features, of G and of h, from dT
        "features": Budget(230, "edge"),  # the gradients of features by input
    },
    "grid_forward<Grid<Elu, 8, 8>>": {
        WHOLE: Budget(313, "edge"),
        "chunks": Budget(250, "edge"),  # the MLP of 16 edges; of 29 HMMA 26 are the activations'
        "T": Budget(34, "edge"),
        "nodes": Budget(965, "node"),  # mixing and shared nodes, as in the exact kernel
    },
    "grid_backward<Grid<Elu, 8, 8>>": {
        WHOLE: Budget(840, "edge"),  # of which 65 are a block's beginning and end, for 512 edges here
        "chunks": Budget(620, "edge"),  # the MLP of 16 edges forward again and back; of 74 HMMA 64 are activations'
        "T": Budget(36, "edge"),
        "fields": Budget(27, "edge"),  # gradients of features
        "hidden": Budget(36, "edge"),  # gradients of what couplings read of the MLP
        "nodes": Budget(1900, "node"),  # gradients of T and of theta
    },
}


def spent(loops: Mapping[str | None, Counter[str]]) -> dict[str, float]:
    """Loop → instructions that warps execute in it, and those of the whole kernel."""
    found = {name: counts.total() for name, counts in loops.items() if name is not None}
    return found | {WHOLE: float(sum(counts.total() for counts in loops.values()))}


def failures(kernel: str, loops: Mapping[str | None, Counter[str]], sizes: Mapping[str, int]) -> list[str]:
    """The kernel's budgets that do not hold; ``sizes``: edges and nodes that ``loops`` were counted for."""
    found, of = [], spent(loops)
    for loop, budget in BUDGETS.get(kernel, {}).items():
        if loop not in of:
            found.append(
                f"{ARCHITECTURE} {kernel}: no loop '{loop}', expected one whose 'for' ends in '// loop: {loop}'"
            )
        elif of[loop] / sizes[budget.per] > budget.most:
            executed = f"{of[loop] / sizes[budget.per]:.0f} instructions per {budget.per}"
            found.append(f"{ARCHITECTURE} {kernel}: {executed} in '{loop}', expected at most {budget.most:g}")
    return found
