"""Writing files that appear complete or not at all; the cache folder; and in it the tuning cache, which keeps what was
measured on a device."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

# Remedies for a file that this user may not read; the second one is for files in the cache folder.
CHMOD = "Let its owner allow it (chmod a+r)"
READABLE = f"{CHMOD}, or set IMPLICIT_STEER_CACHE to a folder of your own."


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` when the block ends, and is deleted where the block raises.

    The new file lies beside ``path`` under a random name, because other processes may write the same file. The umask
    decides its mode, as for any new file.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder(cache: str | Path | None) -> Path:
    """The cache folder: ``cache`` if it is given; else ``$IMPLICIT_STEER_CACHE``; else ``implicit_steer`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if cache is not None:
        return Path(cache)
    if os.environ.get("IMPLICIT_STEER_CACHE"):
        return Path(os.environ["IMPLICIT_STEER_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicit_steer"


def tuning_cache(name: str) -> dict[str, Any]:
    """What :func:`add_to_tuning_cache` has stored under ``name``. A process reads the file once, because every
    launch of a kernel asks for it."""
    return _read(name, os.environ.get("IMPLICIT_STEER_CACHE"))


def add_to_tuning_cache(name: str, found: dict[str, Any]) -> None:
    """Add ``found`` to the tuning cache ``name``, in this process and in ``NAME.json`` of the cache folder, where
    the entries of other processes stay."""
    path, all_found = cache_folder(None) / f"{name}.json", tuning_cache(name)
    all_found |= _content(path) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:  # others may read meanwhile
        file.write((json.dumps(all_found, indent=1) + "\n").encode())


def forget_tuning_cache() -> None:
    """Forget what this process has read: the files are read again."""
    _read.cache_clear()


@lru_cache(maxsize=16)
def _read(name: str, folder: str | None) -> dict[str, Any]:
    return _content(cache_folder(folder) / f"{name}.json")


def _content(path: Path) -> dict[str, Any]:
    remedy = "; delete the file, or measure again."
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        reason = f"expected a JSON object, got {type(found).__name__}"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError as error:
        reason, remedy = f"no permission to read the file ({error.strerror})", f". {READABLE}"
    except (OSError, ValueError) as error:
        reason = str(error)
    warnings.warn(f"{path}: {reason}. What was measured is ignored{remedy}", stacklevel=2)
    return {}
