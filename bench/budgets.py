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
        WHOLE: Budget(122, "edge"),
        "chunks": Budget(70, "edge"),  # frame and MLP
        "T": Budget(29, "edge"),  # steps at the ends of nodes and chunks have fewer edges
        "nodes": Budget(591, "node"),  # mixing, 450 each time: a node that two warps share is mixed by both
    },
    "exact_backward<Exact<Elu, 8, 8, false>>": {
        WHOLE: Budget(280, "edge"),
        "chunks": Budget(174, "edge"),  # frame and MLP, forward again and back, with its weights' gradients
        "kept sums": Budget(10, "edge"),  # gradients of theta
        "edges": Budget(60, "edge"),  # gradients of features and of coefficients
        "nodes": Budget(661, "node"),  # gradients of T
    },
    # 16 fields
    "exact_forward<Exact<Elu, 8, 16, false>>": {
        WHOLE: Budget(202, "edge"),
        "chunks": Budget(70, "edge"),
        "T": Budget(45, "edge"),
        "nodes": Budget(2430, "node"),  # four times as many weights as with 8 fields; shared nodes are finished here
    },
    "exact_backward<Exact<Elu, 8, 16, false>>": {
        WHOLE: Budget(504, "edge"),
        "chunks": Budget(174, "edge"),
        "kept sums": Budget(53, "edge"),  # gradients of theta
        "edges": Budget(129, "edge"),
        "nodes": Budget(2290, "node"),
    },
    # 16 channels
    "exact_forward<Exact<Elu, 16, 8, false>>": {
        WHOLE: Budget(236, "edge"),
        "chunks": Budget(156, "edge"),  # four times as many weights between layers as with 8 channels
        "T": Budget(35, "edge"),
        "nodes": Budget(1300, "node"),
    },
    "exact_backward<Exact<Elu, 16, 8, false>>": {
        WHOLE: Budget(636, "edge"),
        "chunks": Budget(398, "edge"),
        "kept sums": Budget(26, "edge"),  # gradients of theta
        "edges": Budget(126, "edge"),
        "nodes": Budget(1440, "node"),
    },
    # a table
    "exact_forward<Tabulated<8, 8, false>>": {
        WHOLE: Budget(67, "edge"),
        "chunks": Budget(17, "edge"),  # frame and interpolation
        "T": Budget(29, "edge"),
        "nodes": Budget(589, "node"),
    },
    "exact_backward<Tabulated<8, 8, false>>": {
        WHOLE: Budget(237, "edge"),  # of which 28 are a block's beginning and end, for 512 edges here
        "chunks": Budget(121, "edge"),  # frame and interpolation, forward again and back; the splines' gradients
        "kept sums": Budget(10, "edge"),  # gradients of theta
        "edges": Budget(58, "edge"),
        "nodes": Budget(671, "node"),
    },
    # fields of l <= 2, in 57 slots
    "tile_layers<Tiled<Elu, 6, 8>>": {
        WHOLE: Budget(120, "edge"),  # 12 φ of a lane, where l <= 1 takes 4
    },
    "tile_layers<Tiled<Elu, 4, 8>>": {
        WHOLE: Budget(73, "edge"),
    },
    "tile_sums<float>": {
        WHOLE: Budget(534, "edge"),
        "direction": Budget(62, "edge"),  # harmonics and G
        "T": Budget(296, "edge"),  # 13 of them HMMA
        "constant T": Budget(40, "edge"),
        "nodes": Budget(60, "edge"),
    },
    "tile_backward<float>": {
        WHOLE: Budget(1240, "edge"),
        "direction": Budget(140, "edge"),  # once more, and the way back
        "nodes": Budget(612, "edge"),  # gradients of features, of G and of h, from dT
    },
    "tile_layers_backward<Tiled<Elu, 6, 8>>": {
        WHOLE: Budget(292, "edge"),
    },
    "tile_layers_backward<Tiled<Elu, 4, 8>>": {
        WHOLE: Budget(186, "edge"),
    },
    # second derivatives of exact and tiled layers: with tangents a product is three
    "tile_layers<WithTangents<Tiled<Elu, 4, 8>>>": {
        WHOLE: Budget(143, "edge"),
    },
    "tile_layers<WithTangents<Tiled<Elu, 6, 8>>>": {
        WHOLE: Budget(263, "edge"),
    },
    "tile_sums<Dual<float>>": {  # of 8 fields of l <= 1, as the next one
        WHOLE: Budget(227, "edge"),
        "T": Budget(126, "edge"),
    },
    "tile_backward<Dual<float>>": {
        WHOLE: Budget(577, "edge"),
        "nodes": Budget(282, "edge"),
    },
    "tile_layers_backward<WithTangents<Tiled<Elu, 4, 8>>>": {
        WHOLE: Budget(373, "edge"),
    },
    "tile_layers_backward<WithTangents<Tiled<Elu, 6, 8>>>": {
        WHOLE: Budget(657, "edge"),
    },
    # many fields: 64, in 15 slots
    "wide_sums<float>": {
        WHOLE: Budget(804, "edge"),
        "edges": Budget(651, "edge"),  # 88 of them T's multiply-adds
    },
    "wide_backward<float>": {
        WHOLE: Budget(2320, "edge"),
        "terms": Budget(1630, "edge"),  # gradients of features, of G and of h, from dT
        "features": Budget(221, "edge"),  # the gradients of features by input
    },
    "grid_forward<Grid<Elu, 8, 8>>": {
        WHOLE: Budget(300, "edge"),
        "chunks": Budget(240, "edge"),  # the MLP of 16 edges; of 29 HMMA 26 are the activations'
        "T": Budget(32, "edge"),
        "nodes": Budget(875, "node"),  # mixing and shared nodes, as in the exact kernel
    },
    "grid_backward<Grid<Elu, 8, 8>>": {
        WHOLE: Budget(734, "edge"),  # of which 30 are a block's beginning and end, for 512 edges here
        "chunks": Budget(604, "edge"),  # the MLP of 16 edges forward again and back; of 74 HMMA 64 are activations'
        "kept sums": Budget(10, "edge"),  # gradients of theta
        "fields": Budget(26, "edge"),  # gradients of features
        "hidden": Budget(34, "edge"),  # gradients of what couplings read of the MLP
        "nodes": Budget(939, "node"),  # gradients of T
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
