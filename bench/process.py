"""Measurements in a fresh process, which peak memory and the first construction of a model need.

``python -m bench.process MODULE:FUNCTION ARGUMENT ... THREADS`` calls the function with these strings and prints its
result as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
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


def ask(function: Callable[..., Any], *arguments: str, threads: int) -> Any:
    """``function(*arguments)`` of a module of this package, called in a fresh process on so many threads; its result is
    passed on as JSON.

    Raises ``subprocess.CalledProcessError`` where it fails; its errors go to this process's standard error.
    """
    called = f"{function.__module__}:{function.__name__}"
    command = [sys.executable, "-m", "bench.process", called, *arguments, str(threads)]
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


if __name__ == "__main__":
    function, *arguments, threads = sys.argv[1:]
    module, _, name = function.partition(":")
    torch.set_num_threads(int(threads))
    print(json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
