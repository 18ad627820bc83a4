"""``python -m bench.blocks``: a layer on a cloud whose edges and features stay on disk or are made block by block.

First the same layer, whole and in blocks, on a small cloud: no timing where they differ.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from implicit_steer import Graph, radius_graph
from implicit_steer.layers import values
from implicit_steer.layers.blocks import Region, convolve_in_blocks
from implicit_steer.testing.cases import LARGE

DEGREE = 16  # neighbours on average
GATE_POINTS, GATE_BLOCK, TOLERANCE = 20_000, 1_000, 1e-5  # relative, float32


class PeakMemory:
    """Largest anonymous memory of this process in bytes, looked up every 5 ms; pages of mapped files do not count."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def cloud(points: int, seed: int = 0) -> tuple[Tensor, float]:
    """Uniform points in a cube of side 1, and the radius within which each has DEGREE neighbours, but for the faces."""
    pos = torch.rand(points, 3, generator=torch.Generator().manual_seed(seed))
    return pos, (DEGREE / points * 3 / (4 * torch.pi)) ** (1 / 3)


def lengths(region: Region) -> Tensor:
    """The layer's one attribute, (E, 1)."""
    return region.edge_delta.norm(dim=1, keepdim=True)


def difference(conv: torch.nn.Module) -> float:
    """Relative difference between results in blocks and on the whole cloud, of GATE_POINTS points."""
    pos, radius = cloud(GATE_POINTS)
    x = torch.randn(len(pos), conv.in_type.size, generator=torch.Generator().manual_seed(1))
    edges = radius_graph(pos, radius)
    delta = pos[edges[1]] - pos[edges[0]]
    graph = Graph(edges, len(pos))
    with torch.no_grad():
        whole = values(conv(conv.in_type(x, pos), graph, delta, delta.norm(dim=1, keepdim=True)))
    found = convolve_in_blocks(conv, x, pos, radius, GATE_BLOCK, edge_attr=lengths)
    return float((found - whole).norm() / whole.norm())


def measure(conv: torch.nn.Module, points: int, size: int, folder: Path) -> dict[str, float]:
    """Seconds, edges, bytes on disk, and peak memory beyond what the process had before; features in ``folder``."""
    widths = {"x": conv.in_type.size, "y": conv.out_type.size}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", "float32", (points, width))
        for name, width in widths.items()
    }
    rng = np.random.default_rng(0)
    for start in range(0, points, size):
        part = arrays["x"][start : start + size]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
    edges = 0

    def attributes(region: Region) -> Tensor:
        nonlocal edges
        edges += region.graph.num_edges
        return lengths(region)

    with PeakMemory() as memory:
        pos, radius = cloud(points)
        start = time.perf_counter()
        convolve_in_blocks(conv, arrays["x"], pos, radius, size, edge_attr=attributes, out=arrays["y"])
        seconds = time.perf_counter() - start
    finite = all(np.isfinite(arrays["y"][k : k + size]).all() for k in range(0, points, size))
    if not finite:
        raise RuntimeError("y: expected finite results, got NaN or Inf.")
    disk = sum(array.nbytes for array in arrays.values())
    return {"seconds": seconds, "edges": edges, "disk": disk, "bytes": memory.peak - memory.start}


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure and print; 1 where blocks and whole differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, metavar="N", default=5_000_000, help="(%(default)s)")
    parser.add_argument("--size", type=int, metavar="N", default=50_000, help="points of a block (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", default=2, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the features (the system's temporary folder)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    conv = LARGE["cloud"].layer().eval()
    error = difference(conv)
    print(f"{GATE_POINTS:,} points in blocks of {GATE_BLOCK:,} and whole: relative difference {error:.1e}")
    if error > TOLERANCE:
        return 1
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(conv, args.points, args.size, Path(folder))
    print(
        f"{args.points:,} points, {found['edges']:,} edges, blocks of {args.size:,}, {args.threads} threads: "
        f"{found['seconds']:.1f} s ({1e6 * found['seconds'] / args.points:.1f} µs per point), peak memory "
        f"{found['bytes'] / 1e6:,.0f} MB; features on disk {found['disk'] / 1e6:,.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
