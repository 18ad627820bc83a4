"""Files that appear complete or not at all; the cache folder, and what was measured on a device once, kept in it and
read from then on."""

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

# What to do about a file that another user wrote; the second is for those in the cache folder.
CHMOD = "Let its owner allow it (chmod a+r)"
READABLE = f"{CHMOD}, or set IMPLICIT_STEER_CACHE to a folder of your own."


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends, and disappears where it raises.

    It lies beside ``path`` under a name of its own, since other processes may be writing the same file; its mode is
    what the umask leaves, as of every other new file.
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
    """``cache``; else ``$IMPLICIT_STEER_CACHE``; else ``implicit_steer`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if cache is not None:
        return Path(cache)
    if os.environ.get("IMPLICIT_STEER_CACHE"):
        return Path(os.environ["IMPLICIT_STEER_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "implicit_steer"


def tuning_cache(name: str) -> dict[str, Any]:
    """What :func:`add_to_tuning_cache` has under this name. The file is read once: every launch of a kernel asks."""
    return _read(name, os.environ.get("IMPLICIT_STEER_CACHE"))


def add_to_tuning_cache(name: str, found: dict[str, Any]) -> None:
    """Add to what is kept, here and in ``NAME.json`` of the cache folder, where others may have added, too."""
    path, all_found = cache_folder(None) / f"{name}.json", tuning_cache(name)
    all_found |= _content(path) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:  # others may read meanwhile
        file.write((json.dumps(all_found, indent=1) + "\n").encode())


def forget_tuning_cache() -> None:
    """Read the files again, as another process would."""
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
