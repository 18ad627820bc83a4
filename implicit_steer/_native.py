"""The native extension: where it is, whether it loaded, and the fake kernels of its operators on graphs.

``_ops.so`` registers its operators under ``torch.ops.implicit_steer`` and tells how it was built. It may be absent (a
pure Python install): :func:`available` then says why, and callers run plain PyTorch; layers call :func:`found`, which
also warns.
"""

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._transforms import one_by_one

LIBRARY = Path(__file__).with_name("_ops.so")
# Opened by _ops.so at the first CUDA call. Where the variable names another library, its kernels run on the processor,
# on CPU tensors: for tests and measurements of what the host does (bench/dispatch.py).
ON_PROCESSOR = os.environ.get("IMPLICIT_STEER_CUDA_LIBRARY")
CUDA_LIBRARY = Path(ON_PROCESSOR or Path(__file__).with_name("libimplicit_steer_cuda.so"))
RECORD = Path(__file__).with_name("_not_built.txt")  # written by setup.py: "off", or what was missing


def _load() -> tuple[bool, str]:
    if not LIBRARY.exists():
        return False, f"not built: {_why_not_built()}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return False, f"not loaded: {error}. Reinstall implicit_steer on this machine"
    return True, f"loaded from {LIBRARY}"


def _why_not_built() -> str:
    missing = RECORD.read_text(encoding="utf-8") if RECORD.exists() else None
    reinstall = "reinstall implicit_steer with IMPLICIT_STEER_NATIVE=require"
    if missing is None:
        place = f"{LIBRARY.name} is not in {LIBRARY.parent}"
        return f"{place}. Install a C++ compiler, cmake and ninja, then {reinstall}"
    if missing == "off":
        return f"it was installed with IMPLICIT_STEER_NATIVE=off. To have it, {reinstall}"
    return f"the machine that it was installed on lacked {missing}. Install that, then {reinstall}"


def _edges_in_range(edge_index: Tensor, num_src: int, num_dst: int) -> Tensor:
    return edge_index.new_empty((), dtype=torch.bool)


def _sort_by_key(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return key.new_empty(key.shape), key.new_empty(n + 1)


def _field_statistics(x, channels, counts, sizes, averages) -> tuple[list[Tensor], list[Tensor]]:
    kinds = zip(counts, sizes, averages, strict=True)
    means = [x.new_empty(count if average.numel() else 0, size) for count, size, average in kinds]
    return means, [x.new_empty(count, 1) for count in counts]


def _field_norm(x, *_) -> Tensor:
    return x.new_empty(x.shape)


def _field_norm_backward(
    grad, x, channels, counts, sizes, means, variances, weights, biases, bases, eps
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return x.new_empty(x.shape), *([t.new_empty(t.shape) for t in tensors] for tensors in (weights, biases))


# Operators with a fake kernel and rules for both vmaps; those of convolutions are in ops/native/operators.py.
_FAKES = {
    "edges_in_range": _edges_in_range,
    "sort_by_key": _sort_by_key,
    "field_statistics": _field_statistics,
    "field_norm": _field_norm,
    "field_norm_backward": _field_norm_backward,
}

_STATE = _load()
if _STATE[0]:
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"implicit_steer::{name}", fake)
        one_by_one(name)


def available() -> tuple[bool, str]:
    """``(True, where it was loaded from)`` or ``(False, why there is no native extension)``."""
    return _STATE


def found() -> bool:
    """Whether the extension is :func:`available`, for callers that continue in plain PyTorch without it. The first call
    without it warns, with the reason, unless the package was installed with ``IMPLICIT_STEER_NATIVE=off``."""
    if not _STATE[0]:
        _warn()
    return _STATE[0]


# torch.compile takes the result as a constant; so it does with cuda_usable, below.
found._dynamo_marked_constant = True


def is_native(x: Tensor) -> bool:
    """Whether ``x`` is a tensor of the CPU that the extension's operators take; they are :func:`found`."""
    return x.is_cpu and x.dtype in (torch.float32, torch.float64) and found()


@cache
def _warn() -> None:
    if not RECORD.exists() or RECORD.read_text(encoding="utf-8") != "off":
        slow = "on CPU tensors layers run in plain PyTorch, many times as slow"
        warnings.warn(f"The native extension is missing, {slow}: {_STATE[1]}.", stacklevel=2)


def cuda_available() -> tuple[bool, str]:
    """``(True, where they are)`` or ``(False, why there are no CUDA kernels)``; needs no driver and no device."""
    if not _STATE[0]:
        return False, f"the native extension is missing: {_STATE[1]}"
    if not CUDA_LIBRARY.exists():
        return False, "this build has no CUDA kernels. Reinstall where nvcc is found, with IMPLICIT_STEER_CUDA=require"
    return True, f"kernels in {CUDA_LIBRARY}"


def cuda_usable(device: torch.device) -> tuple[bool, str]:
    """As :func:`cuda_available`, for one device: whether it and its driver can run the kernels."""
    return _probed(torch.cuda.current_device() if device.index is None else device.index)


# torch.compiler.assume_constant_result sets the same attribute, but imports the compiler.
cuda_usable._dynamo_marked_constant = True


@cache
def _probed(device: int) -> tuple[bool, str]:
    built, reason = cuda_available()
    if not built:
        return False, reason
    try:
        torch.ops.implicit_steer.cuda_probe(device)
    except RuntimeError as error:
        return False, f"cuda:{device} cannot run the CUDA kernels: {str(error).splitlines()[0]}"
    return True, reason


class Number:
    """A number under which the native extension keeps an object, as long as this one lives.

    Args:
        number: what the operator that bound the object gave.
        release: the operator that lets go of it.
    """

    def __init__(self, number: int, release: Callable[[int], None]) -> None:
        self.number = number
        weakref.finalize(self, release, number).atexit = False


class BuildInfo:
    """What the native extension tells about itself, through two C functions."""

    def __init__(self):
        self._library = ctypes.CDLL(str(LIBRARY))

    def _text(self, function: str) -> str:
        call = getattr(self._library, f"implicit_steer_{function}")
        call.restype = ctypes.c_char_p
        return call().decode()

    def build_facts(self) -> dict[str, str]:
        """Name → the compiler, its flags, OpenMP's version date, torch's headers, the compiled targets."""
        return dict(line.split("=", 1) for line in self._text("build_facts").splitlines())

    def cpu_instruction_set(self) -> str:
        """``'AVX-512'``, ``'AVX2'`` or ``'baseline'``: what this machine runs."""
        return self._text("cpu_instruction_set")


def build_info() -> BuildInfo | None:
    """How the native extension was built; ``None`` without one."""
    return BuildInfo() if _STATE[0] else None
