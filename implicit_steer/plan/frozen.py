"""What a plan's pieces are made of: frozen dataclasses that hold arrays, and the checks of their fields."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import Field, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .._check import require


def _freeze(value: Any) -> Any:
    """Make float arrays read-only float64, integer arrays read-only int64, NumPy's scalars Python's; leave the rest."""
    if isinstance(value, np.generic):  # its repr, which is hashed, differs between NumPy 1 and 2
        return value.item()
    if not isinstance(value, np.ndarray):
        return value
    dtype, owner = np.int64 if value.dtype.kind in "iub" else np.float64, value if value.base is None else value.base
    nobody_writes = isinstance(owner, np.ndarray) and not owner.flags.writeable
    if nobody_writes and value.dtype == dtype and value.flags.c_contiguous:
        return value
    value = np.array(value, dtype=dtype, order="C")
    value.flags.writeable = False
    return value


class FrozenArrays:
    """Value semantics for frozen dataclasses that hold arrays: equality and hash by content."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _freeze(getattr(self, f.name)))
        self.validate()

    def validate(self) -> None:
        """Raise ``ValueError`` where the fields contradict each other. Native code relies on it: a plan may come from a
        file."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the class name and every field."""
        sha = hashlib.sha256(type(self).__name__.encode())

        def feed(value: Any) -> None:
            if isinstance(value, np.ndarray):
                sha.update(repr((value.shape, value.dtype.str)).encode())
                sha.update(value.reshape(-1).view(np.uint8).data)
            elif isinstance(value, tuple):
                sha.update(f"({len(value)}".encode())
                for item in value:
                    feed(item)
            elif isinstance(value, FrozenArrays):
                sha.update(value.digest.encode())
            else:
                sha.update(repr(value).encode())

        for f in fields(self):
            feed(getattr(self, f.name))
        return sha.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and unpickled plans are validated and read-only too
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, FrozenArrays) and self.digest == other.digest

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)


def require_indices(name: str, index: NDArray[Any], count: int, shape: tuple[int, ...] | None = None) -> None:
    """Raise unless ``index`` holds integers in 0 .. count-1 and has this shape (by default any of one dimension)."""
    ok = index.dtype.kind == "i" and (index.ndim == 1 if shape is None else index.shape == shape)
    require(ok, name, f"integers of shape {shape or '(*,)'}", f"{index.dtype} of shape {index.shape}")
    inside = bool(((index >= 0) & (index < count)).all())
    require(inside, name, f"indices in 0..{count - 1}", index)


def require_number(name: str, value: Any) -> None:
    """Raise unless this is a finite number."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(ok, name, "a finite number", repr(value))


def require_shape(name: str, array: NDArray[Any] | None, shape: tuple[int, ...]) -> None:
    """Raise unless there is an array of this shape."""
    require(array is not None and array.shape == shape, name, f"shape {shape}", getattr(array, "shape", None))


def components(starts: NDArray[Any], size: int) -> NDArray[Any]:
    """(F · size,) the components of F fields of one size that begin at ``starts`` (F,), field by field."""
    return (starts[:, None] + np.arange(size)).reshape(-1)


def fingerprint_of(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """(n,) integers, one per array. They differ where signs, orders or values do, but rounding changes them by ≤ 1."""
    return np.array([round(1e4 * _scrambled_sum(a.reshape(-1))) for a in arrays], dtype=np.int64)


def _scrambled_sum(a: NDArray[Any], at_once: int = 2**20) -> float:
    """Σ cos(n) a[n], in parts that need little memory."""
    parts = range(0, a.size, at_once)
    return sum(float(a[n : n + at_once] @ np.cos(np.arange(n, min(n + at_once, a.size)))) for n in parts)
