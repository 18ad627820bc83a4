"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
