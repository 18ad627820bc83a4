"""The container: one safetensors file, whose metadata is one JSON text with the format's version and a SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._check import fail
from .._files import replacing

FORMAT = 2  # raise it when files written before would be read differently, or new ones by older versions
KEY = "implicit_steer"  # of the JSON text in the metadata
# What Python, NumPy and torch raise for files that ``write`` did not make.
FORGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _digest(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the manifest without its own digest, and over every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(_text({k: v for k, v in manifest.items() if k != "sha256"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write(path: str | os.PathLike[str], content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write ``content`` (JSON values) and ``tensors`` (on the CPU) to ``path``, at once or not at all."""
    import safetensors.torch

    from .._version import __version__

    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # safetensors refuses views
    manifest = {"format": FORMAT, "library": __version__, **content}
    manifest["sha256"] = _digest(manifest, tensors)
    data = safetensors.torch.save(tensors, {KEY: _text(manifest)})
    with replacing(Path(path)) as file:
        file.write(data)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write` wrote: the manifest and the tensors.

    Raises:
        OSError: there is no such file, or it cannot be read.
        RuntimeError: the file is damaged, foreign or of a newer format; the message names the path.
    """
    import safetensors.torch

    data = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, *FORGED) as error:
        remedy = "Copy it again if it was cut short or changed; checkpoints of torch.save need torch.load."
        _refuse(path, "a safetensors file", error, remedy)
    origin = "a file that implicit_steer.save wrote"
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = header.get("__metadata__", {}).get(KEY)
        manifest: Any = None if text is None else json.loads(text)
    except FORGED as error:
        _refuse(path, origin, error)
    if text is None:
        _refuse(path, origin, "a safetensors file of another program")
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or not isinstance(version, int) or version < 1:
        _refuse(path, origin, f"format {version!r}")
    if version > FORMAT:
        remedy = f"Install implicit_steer {manifest.get('library')} or newer, which wrote it."
        _refuse(path, f"format {FORMAT} or older", f"format {version}", remedy)
    expected = manifest.get("sha256")
    try:
        found = _digest(manifest, tensors)
    except FORGED as error:
        _refuse(path, f"content with SHA-256 {expected}", error)
    if expected != found:
        _refuse(path, f"content with SHA-256 {expected}", found, "The file was changed after it was written.")
    return manifest, tensors


def _refuse(path: str | os.PathLike[str], expected: str, got: Any, remedy: str = "") -> NoReturn:
    fail(str(path), expected, got, remedy, RuntimeError)
