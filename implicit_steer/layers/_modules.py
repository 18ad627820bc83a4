"""What modules share: they refuse TorchScript and settings that come too late, and change their mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch._guards import detect_fake_mode

from .._check import fail, require


class NoTorchScript:
    """Base class of modules for which, as for networks that contain one, ``torch.jit.script`` and ``trace`` raise."""

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script asks every module for a stand-in
        self._refuse("torch.jit.script")

    def _slow_forward(
        self, *arguments: Any, **options: Any
    ) -> NoReturn:  # called instead of ``forward`` under torch.jit.trace
        self._refuse("torch.jit.trace")

    def _refuse(self, what: str) -> NoReturn:
        remedy = (
            "For a program without Python: torch.export.export. For a file that needs no escnn: implicit_steer.save, "
            "implicit_steer.load. For speed: torch.compile."
        )
        fail(type(self).__name__, "another way than TorchScript, which cannot express it", what, remedy, RuntimeError)


class Fixed:
    """An attribute that is fixed when its Module is built: getting it calls ``read(module)``, setting it raises."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else self._read(module)

    def __set__(self, module: Any, value: Any) -> NoReturn:
        remedy = f"It would have no effect on what is built: build another {type(module).__name__}."
        fail(self._name, f"{self._read(module)!r}, as the layer was built", repr(value), remedy, AttributeError)


def refuse_fake_tensors(module: torch.nn.Module) -> None:
    """Raise ``RuntimeError`` where ``module`` is built under ``FakeTensorMode``, which has no values to build from."""
    remedy = "Build it outside of FakeTensorMode, or under torch.device('meta')."
    require(detect_fake_mode() is None, type(module).__name__, "real tensors", "fake ones", remedy, RuntimeError)


@contextmanager
def in_mode(module: torch.nn.Module, training: bool) -> Iterator[None]:
    """``module`` in training or evaluation mode; afterwards every part is in its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            if part.training != mode:
                part.train(mode)  # a method, since escnn's modules expand their weights in it; parents come first
