"""Plain modules and pieces of plans as a list of JSON objects and named arrays, and back.

Every module and every piece of a plan is one object, ``{"module": kind, "arguments": {...}}`` or ``{"data": kind,
"fields": {...}}``, after those it refers to: what occurs twice is written once and shared again after decoding. The
last object is the module itself. Values are JSON's own; lists for tuples, ``{"object": n}`` for another object,
``{"array": name}`` for an array.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._check import fail, require
from ..plan import Data
from .kinds import DATA, KINDS, kind_of

ARRAY = "array."  # names of arrays in the file begin with this


class _Encoder:
    def __init__(self):
        self.objects: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[Any, int] = {}  # modules by identity, data by content

    def value(self, value: Any) -> Any:
        """The JSON that stands for an argument or a field."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, tuple):
            return [self.value(item) for item in value]
        if isinstance(value, np.ndarray):
            name = f"{ARRAY}{len(self.tensors)}"
            self.tensors[name] = torch.tensor(value)
            return {"array": name}
        if isinstance(value, torch.nn.Module):
            return {"object": self.module(value)}
        if isinstance(value, Data):
            return {"object": self.data(value)}
        fail("arguments", "numbers, strings, arrays, plans, modules and tuples of these", repr(value), kind=TypeError)

    def module(self, module: torch.nn.Module) -> int:
        if id(module) not in self._known:
            kind = kind_of(type(module))
            arguments = {k: self.value(v) for k, v in kind.arguments(module).items()}
            self._known[id(module)] = self._add({"module": kind.name, "arguments": arguments})
        return self._known[id(module)]

    def data(self, data: Data) -> int:
        if data not in self._known:
            content = {f.name: self.value(getattr(data, f.name)) for f in fields(data)}
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


def decode(objects: list[dict[str, Any]], tensors: dict[str, Tensor]) -> torch.nn.Module:
    """The module that :func:`encode` was given, its parameters and buffers at their initial values.

    Raises:
        ValueError: a kind that is not known here, or content that contradicts itself. ``AttributeError``,
            ``IndexError``, ``KeyError`` and ``TypeError`` too come from objects that ``encode`` did not make.
    """
    built: list[Any] = []

    def value(encoded: Any) -> Any:
        if isinstance(encoded, list):
            return tuple(value(item) for item in encoded)
        if isinstance(encoded, dict):
            if "array" in encoded:
                return tensors[encoded["array"]].numpy()
            number = encoded["object"]
            require(0 <= number < len(built), "object", "one of the objects before it", number)
            return built[number]
        return encoded

    tables = {"data": (DATA, "fields"), "module": ({name: kind.build for name, kind in KINDS.items()}, "arguments")}
    for entry in objects:
        sort = "data" if "data" in entry else "module"
        table, content = tables[sort]
        require(entry[sort] in table, sort, f"one of {sorted(table)}", repr(entry[sort]))
        built.append(table[entry[sort]](**{name: value(v) for name, v in entry[content].items()}))
    require(bool(built) and isinstance(built[-1], torch.nn.Module), "objects", "a module as the last", len(built))
    return built[-1]
