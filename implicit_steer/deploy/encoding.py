"""Plain modules and pieces of plans as a list of JSON objects and named arrays, and back.

Every module and every piece of a plan is one object, ``{"module": kind, "arguments": {...}}``, ``{"registered": name,
"origin": where, "arguments": {...}}`` for a class of a user, or ``{"data": kind, "fields": {...}}``. It comes after the
objects it refers to; what occurs twice is written once and shared again after decoding. The last object is the module
itself. Values are JSON's own, with a list for a tuple, ``{"object": n}`` for another object, ``{"array": name}`` for an
array; and ``{"list": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"dtype": name}``, ``{"float": "inf"}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import fail, require
from ..plan import FrozenArrays
from .kinds import DATA, IRREPS, KINDS, REGISTERED, kind_of
from .limits import Placeholders, check_irreps, check_size

ARRAY = "array."  # names of arrays in the file begin with this
# Fields, and arguments of the package's own modules, that were added later are written only where they differ, so that
# versions without them can read the file.
_LATER_DEFAULTS: tuple[tuple[str, Any], ...] = (
    ("depthwise", False),
    ("linear", None),
    ("products", None),
    ("radial", None),
    ("table", None),
    ("zbl", None),
)


def _without_defaults(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if (name, value) not in _LATER_DEFAULTS}


class _Encoder:
    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[Any, int] = {}  # modules by identity, data by content

    def value(self, value: Any) -> Any:
        """The JSON that stands for an argument or a field."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, tuple):
            return [self.value(item) for item in value]
        if isinstance(value, list):
            return {"list": [self.value(item) for item in value]}
        if isinstance(value, dict):
            return {"dict": [[self.value(key), self.value(item)] for key, item in value.items()]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, np.ndarray):
            name = f"{ARRAY}{len(self.tensors)}"
            self.tensors[name] = torch.tensor(value)
            return {"array": name}
        if isinstance(value, torch.nn.Module):
            return {"object": self.module(value)}
        if isinstance(value, FrozenArrays):
            return {"object": self.data(value)}
        expected = "numbers, strings, arrays, plans, modules and tuples of these"
        fail("Build the module from plain values. arguments", expected, repr(value), kind=TypeError)

    def module(self, module: torch.nn.Module) -> int:
        if id(module) not in self._known:
            kind = kind_of(type(module))
            given = kind.arguments(module)
            arguments = {k: self.value(v) for k, v in (given if kind.origin else _without_defaults(given)).items()}
            head = {"registered": kind.name, "origin": kind.origin} if kind.origin else {"module": kind.name}
            self._known[id(module)] = self._add({**head, "arguments": arguments})
        return self._known[id(module)]

    def data(self, data: FrozenArrays) -> int:
        if data not in self._known:
            given = {f.name: getattr(data, f.name) for f in fields(data)}
            content = {name: self.value(value) for name, value in _without_defaults(given).items()}
            self._known[data] = self._add({"data": type(data).__name__, "fields": content})
        return self._known[data]

    def _add(self, entry: dict[str, Any]) -> int:
        self.objects.append(entry)
        return len(self.objects) - 1


def encode(module: torch.nn.Module) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The objects and arrays of a plain module; its parameters and buffers are not among them."""
    encoder = _Encoder()
    encoder.module(module)
    return encoder.objects, encoder.tensors


def unregistered(objects: Any) -> list[str]:
    """Name and origin of each class of a user in ``objects`` that is not registered here."""
    entries = [entry for entry in objects if isinstance(entry, dict)] if isinstance(objects, list) else []
    found = {
        entry.get("registered"): entry.get("origin") for entry in entries if isinstance(entry.get("registered"), str)
    }
    return [f"{name!r} ({origin})" for name, origin in found.items() if name not in REGISTERED]


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "dtype": {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}.__getitem__,
}


class _Decoder:
    def __init__(self, tensors: dict[str, Tensor], state: Iterable[Tensor]) -> None:
        self.tensors = tensors
        self._learned = sum(tensor.numel() for tensor in state)
        self.built: list[Any] = []
        self._numbers = sum(tensor.numel() for tensor in tensors.values())

    def value(self, encoded: Any) -> Any:
        """The argument or field that this JSON stands for."""
        if isinstance(encoded, list):
            return tuple(map(self.value, encoded))
        if not isinstance(encoded, dict):
            return encoded
        ((sort, content),) = encoded.items()
        if sort == "array":
            return self.tensors[content].numpy()
        if sort == "object":
            require(0 <= content < len(self.built), "object", "one of the objects before it", content)
            return self.built[content]
        if sort == "list":
            return list(map(self.value, content))
        if sort == "dict":
            return dict(map(self.value, content))
        return _SCALARS[sort](content)

    def add(self, entry: dict[str, Any]) -> None:
        """Build the object that comes next."""
        sort = next((sort for sort in _TABLES if sort in entry), "module")
        table, content = _TABLES[sort], entry["fields" if sort == "data" else "arguments"]
        name = entry[sort]
        require(name in table, sort, f"one of {sorted(table)}", repr(name))
        build = table[name] if sort == "data" else table[name].build
        arguments = {key: self.value(value) for key, value in content.items()}
        if name in IRREPS:
            check_irreps(arguments, self._learned)
        made = build(**arguments)
        if sort == "data":
            check_size(made, self._numbers)
        self.built.append(made)


_TABLES: dict[str, dict[str, Any]] = {"data": DATA, "registered": REGISTERED, "module": KINDS}


def decode(objects: list[dict[str, Any]], tensors: dict[str, Tensor], state: Iterable[Tensor]) -> torch.nn.Module:
    """The module that :func:`encode` was given, with placeholders for its parameters and buffers, which are ``state``.

    Raises:
        ValueError: a kind that is not known here, content that contradicts itself, or sizes that the tensors do not
            account for. Objects that ``encode`` did not make may raise any of
            :data:`~implicit_steer.deploy.file.FORGED`.
    """
    state = list(state)
    decoder = _Decoder(tensors, state)
    with Placeholders(state):
        for entry in objects:
            decoder.add(entry)
    built = decoder.built
    require(bool(built) and isinstance(built[-1], torch.nn.Module), "objects", "a module as the last", len(built))
    return built[-1]
