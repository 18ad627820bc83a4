"""Sizes of blocks, warps and stages of every kernel."""

from __future__ import annotations

from typing import NamedTuple

from .tables import Sizes, padded


class Choice(NamedTuple):
    """``edges``: of a block; ``tile``: samples of a tile (layers)."""

    edges: int
    warps: int = 4
    stages: int = 1
    tile: int = 16


def choose(kernel: str, sizes: Sizes) -> Choice:
    widest = padded(max(sizes.n_zero, sizes.n_rest), 16)
    if kernel.startswith("frame"):
        return Choice(64, 4)
    if kernel.startswith("layers"):
        return Choice(64 if widest <= 64 else 32 if widest <= 128 else 16, 4)
    if kernel.startswith("contract"):
        return Choice(32, 4)
    return Choice(32, 4)
