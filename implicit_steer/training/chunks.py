"""Processed data on disk: chunks that are complete or absent, so that an interrupted preparation goes on."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .._check import fail, require
from .._files import READABLE, replacing


def save_chunk(path: Path, chunk: dict[str, np.ndarray]) -> None:
    """Write ``chunk``; ``path`` appears complete or not at all."""
    with replacing(path) as file:
        np.savez(file, **chunk)


def load_chunk(path: Path, rows: np.ndarray, what: str) -> dict[str, np.ndarray]:
    """Read the chunk that holds the entries ``rows`` of ``what``.

    Raises ``ValueError`` where the file is not the one that was written, ``PermissionError`` where it may not be read.
    """
    expected, remedy = f"the processed {what} {rows[0]}, ... ({len(rows)})", "Delete the file: it is made anew."
    try:
        with np.load(path) as file:  # a zip archive: every array has its checksum
            chunk = {name: file[name] for name in file.files}
    except PermissionError as error:
        fail(str(path), expected, f"no permission to read the file ({error.strerror})", READABLE, PermissionError)
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        fail(str(path), expected, f"a damaged file ({error})", remedy)
    intact = "row" in chunk and np.array_equal(chunk["row"], rows)
    require(intact, str(path), expected, f"other {what}", remedy)
    return chunk
