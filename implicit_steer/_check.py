"""Error messages in one form: the argument, what was expected, what came, what to do. Imports of optional packages."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any, NoReturn

_SAMPLING = re.compile(r"^(auto|escnn|exact(?:-(?P<exact>\d+))?|lebedev-(?P<lebedev>\d+))$")


def fail(name: str, expected: str, got: Any, remedy: str = "", kind: type[Exception] = ValueError) -> NoReturn:
    """Raise ``kind`` with the message ``name: expected ..., got .... remedy``."""
    message = f"{name}: expected {expected}, got {got}."
    raise kind(f"{message} {remedy}" if remedy else message)


def is_explained(error: BaseException) -> bool:
    """Whether :func:`fail` raised ``error``: its message needs no traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code is fail.__code__


def require(ok: bool, name: str, expected: str, got: Any, remedy: str = "", kind: type[Exception] = ValueError) -> None:
    """Call :func:`fail` unless ``ok``."""
    if not ok:
        fail(name, expected, got, remedy, kind)


def require_integer(name: str, value: Any, least: int) -> None:
    """Call :func:`fail` unless ``value`` is an ``int``, no ``bool``, of at least ``least``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, name, f"an integer >= {least}", repr(value))


def parse_sampling(name: str) -> tuple[str, int | None]:
    """Split the name of a sampling into ("auto" | "escnn" | "exact" | "lebedev", N or None).

    Raises:
        ValueError: ``name`` is not one of ``"auto" | "exact" | "exact-N" | "escnn" | "lebedev-N"``.
    """
    match = _SAMPLING.match(name) if isinstance(name, str) else None
    if match is None:
        fail("sampling", "'auto', 'exact', 'exact-N', 'escnn' or 'lebedev-N'", repr(name))
    number = match["exact"] or match["lebedev"]
    require(number is None or int(number) > 0, "sampling", "'exact-N' or 'lebedev-N' with N >= 1", repr(name))
    return name.split("-")[0], None if number is None else int(number)


def load_extra(module: str, extra: str = "train") -> ModuleType:
    """Import ``module``.

    Raises:
        RuntimeError: its package is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        fail(package, "an installed package", "none", f"Run: pip install implicit_steer[{extra}]", RuntimeError)
