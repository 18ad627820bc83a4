"""What can only be measured in a process of its own: peak memory, and the first construction of a model.

``python -m bench.process WHAT ... THREADS`` prints JSON: ``memory CASE BACKEND/SAMPLING ...``, ``scaling EDGES BACKEND
SAMPLING``, ``forces BACKEND SAMPLING``, ``lowering``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc: blocks from 64 kB on come from the system and return to it, so that what is resident is what is in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measures_memory() -> bool:
    """Whether this system tells the peak of the resident memory (Linux)."""
    return _CLEAR.exists()


def ask(*arguments: str | int) -> dict[str, Any]:
    """Run this module with ``arguments`` in a fresh process; what it prints.

    Raises ``subprocess.CalledProcessError`` where it fails; its errors go to this process's standard error.
    """
    command = [sys.executable, "-m", "bench.process", *map(str, arguments)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=os.environ | _MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of this process rises at most during ``run()``."""
    _CLEAR.write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    result = run()
    peak = _resident("VmHWM") - before
    del result
    return max(peak, 0)  # the system counts resident pages per core, and adds up to some dozens of each core late


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1])


def memory(case: str, *candidates: str) -> dict[str, dict[str, float]]:
    """Per candidate ("backend/sampling") the peak memory in MB of each measure, beyond the layer and its inputs."""
    from implicit_steer.testing import cases

    from .steps import Candidate, step

    named, peaks = cases.SMALL | cases.LARGE | cases.GROUPS, {}
    for name in candidates:
        candidate = Candidate(*name.split("/"))
        peaks[name] = {}
        for measure in candidate.measures:
            run = step(named[case], candidate, measure)
            run()  # what is made once and kept does not count
            peaks[name][measure] = peak_memory(run) / 1e6
    return peaks


def scaling(edges: str, backend: str, sampling: str) -> dict[str, dict[str, float]]:
    """Seconds (median) and peak bytes beyond the layer and its inputs, of each measure of the scaling section."""
    from .scaling import MEASURES, ROUNDS, SECONDS, sized
    from .steps import Candidate, step
    from .timing import interleaved, summary

    found = {}
    for measure in MEASURES:
        run = step(sized(int(edges)), Candidate(backend, sampling), measure)
        times = interleaved({measure: run}, ROUNDS, SECONDS)[measure]
        found[measure] = {"seconds": summary(times)["median_ms"] / 1e3, "bytes": peak_memory(run)}
    return found


def forces(backend: str, sampling: str) -> dict[str, int]:
    """Peak bytes of a training step on energies and forces, beyond the layer and its inputs."""
    from .forces import CASE, step
    from .steps import Candidate

    run = step(CASE, Candidate(backend, sampling))
    run()
    return {"bytes": peak_memory(run)}


def lowering() -> dict[str, float]:
    """Seconds to construct the paper's QM9 network (4 blocks, 9 convolutions), the first and the second time."""
    from implicit_steer.experiments.models import QM9Net

    seconds = {}
    for name in ("first", "second"):
        start = time.perf_counter()
        QM9Net()
        seconds[name] = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    what, *arguments, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    known = {"memory": memory, "scaling": scaling, "forces": forces, "lowering": lowering}
    print(json.dumps(known[what](*arguments)))
