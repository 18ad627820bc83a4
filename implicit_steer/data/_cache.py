"""Processed data on disk: chunks that are complete or absent, so that an interrupted preparation goes on."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from .._check import fail, require


def save_chunk(path: Path, chunk: dict[str, np.ndarray]) -> None:
    """Write ``chunk``; ``path`` appears complete or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, **chunk)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def load_chunk(path: Path, rows: np.ndarray, what: str) -> dict[str, np.ndarray]:
    """Read a chunk of ``what``, numbers ``rows``; ``ValueError`` where the file is not the one that was written."""
    expected, remedy = f"the processed {what} {rows[0]}, ... ({len(rows)})", "Delete the file: it is made anew."
    try:
        with np.load(path) as file:  # a zip archive: every array has its checksum
            chunk = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, EOFError, ValueError, OSError) as error:
        fail(str(path), expected, f"a damaged file ({error})", remedy)
    intact = "row" in chunk and np.array_equal(chunk["row"], rows)
    require(intact, str(path), expected, f"other {what}", remedy)
    return chunk
