"""Error messages of one form: the argument, what was expected, what came, what to do."""

from __future__ import annotations

from typing import Any, NoReturn


def fail(name: str, expected: str, got: Any, remedy: str = "", kind: type[Exception] = ValueError) -> NoReturn:
    """Raise ``kind`` with the message ``name: expected ..., got .... remedy``."""
    message = f"{name}: expected {expected}, got {got}."
    raise kind(f"{message} {remedy}" if remedy else message)


def is_explained(error: BaseException) -> bool:
    """Whether :func:`fail` raised it: its message says it all."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code is fail.__code__


def require(ok: bool, name: str, expected: str, got: Any, remedy: str = "", kind: type[Exception] = ValueError) -> None:
    """:func:`fail` unless ``ok``."""
    if not ok:
        fail(name, expected, got, remedy, kind)


def require_integer(name: str, value: Any, least: int) -> None:
    """:func:`fail` unless ``value`` is an ``int``, no ``bool``, of at least ``least``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, name, f"an integer >= {least}", repr(value))
