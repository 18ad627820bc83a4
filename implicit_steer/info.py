"""What is installed, what was built, which backends run here, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from . import _native
from ._version import __version__

_PACKAGES = ("numpy", "scipy", "safetensors", "escnn", "py3nj", "triton", "lightning", "rdkit")


@dataclass(frozen=True, repr=False)
class Info:
    """The facts of :func:`info`; prints as a table.

    Attributes:
        versions: name → version, or ``"not installed"``.
        backends: name → (whether it runs here, why or why not).
        native: (whether the native extension is loaded, from where or why not).
        build: compiler, flags, OpenMP and so on of the native extension; empty without one.
        instruction_set: what this machine runs: ``"AVX-512"``, ``"AVX2"`` or ``"baseline"``; ``"unknown"`` without the
            native extension, which asks the processor.
        instruction_sets: what the native extension was compiled for.
        cuda_architectures: what its CUDA kernels were compiled for; empty when it has none.
        cuda_device: the name of torch's current CUDA device, or why there is none.
    """

    versions: dict[str, str]
    backends: dict[str, tuple[bool, str]]
    native: tuple[bool, str]
    build: dict[str, str]
    instruction_set: str
    instruction_sets: tuple[str, ...]
    cuda_architectures: tuple[str, ...]
    cuda_device: str

    def __repr__(self) -> str:
        rows = [("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items()))]
        rows += [(f"backend {name}", _state(*state)) for name, state in self.backends.items()]
        rows.append(("native extension", _state(*self.native)))
        if self.build:
            rows.append(("built with", ", ".join(f"{name} {value}" for name, value in self.build.items())))
        compiled = " ".join(self.instruction_sets) or "nothing"
        rows.append(("instruction set", f"this machine runs {self.instruction_set}; compiled for {compiled}"))
        cuda = " ".join(self.cuda_architectures) or "none: this build has no CUDA kernels"
        rows += [("CUDA architectures", cuda), ("CUDA device", self.cuda_device)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def info() -> Info:
    """Everything about this installation that a bug report needs.

    Returns:
        an :class:`Info`; ``print(info())`` shows it as a table.

    Example:
        >>> import implicit_steer as ist
        >>> ist.info().versions["torch"]  # doctest: +SKIP
        '2.13.0+cpu'
    """
    # Imported here because it imports every backend.
    from .ops import select

    versions = {"implicit_steer": __version__, "python": platform.python_version(), "torch": torch.__version__}
    built = _native.build_info()
    facts = built.build_facts() if built else {}
    return Info(
        versions=versions | {name: _version(name) for name in _PACKAGES},
        backends=select.availability(),
        native=_native.available(),
        instruction_sets=tuple(facts.pop("instruction_sets", "").split()),
        cuda_architectures=tuple(facts.pop("cuda_architectures", "").split()),
        build=facts,
        instruction_set=built.cpu_instruction_set() if built else "unknown",
        cuda_device=_cuda_device(),
    )


def _state(ok: bool, reason: str) -> str:
    return f"{'yes' if ok else 'no'} ({reason})" if reason else "yes" if ok else "no"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_device() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch has CUDA {torch.version.cuda} but finds no device"
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
