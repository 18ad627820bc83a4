"""Classes of users: :func:`register`, and how a module of such a class is taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

import numpy as np
import torch

from .._check import fail, require
from ..layers import Fields
from ..plan import Radial
from .kinds import REGISTERED, Kind, add_registered, is_plain, is_registered

_M = TypeVar("_M", bound=torch.nn.Module)
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))  # names that torch.nn.Module sets
_NOT_OWN = ("escnn", "implicit_steer", "torch")
_PLAIN = (bool, float, int, str, type(None), torch.dtype)
_EXPECTED = (
    "numbers, strings, None, lists, tuples and dicts of these, NumPy arrays, dtypes, field types or radial inputs"
)


@overload
def register(cls: type[_M], *, name: str | None = None) -> type[_M]: ...
@overload
def register(cls: None = None, *, name: str | None = None) -> Callable[[type[_M]], type[_M]]: ...
def register(cls: Any = None, *, name: str | None = None) -> Any:
    """Make modules of a class of your own saveable, and loadable where the class is registered, too.

    :func:`~implicit_steer.load` makes such a module without calling its ``__init__``, which may need escnn: it gets

    - its children, each as :func:`~implicit_steer.save` takes it: layers with escnn's types come back as layers on
      plain tensors;
    - the parameters and buffers that it holds itself, also those buffers that are not persistent;
    - its other attributes: numbers, strings, None, lists, tuples and dicts of these, NumPy arrays, dtypes, radial
      inputs, and field types, of which size and name remain (:class:`~implicit_steer.layers.Fields`).

    So ``forward`` should make features with a layer's ``in_type``, which without escnn returns the tensor itself, and
    read them with :func:`implicit_steer.layers.values` instead of ``.tensor``; then it runs on both. The module that
    defines the class should import escnn only where the class is built, in ``__init__``.

    Args:
        cls: a subclass of ``torch.nn.Module``; left out, ``register`` is a decorator with arguments.
        name: what files call the class, by default its qualified name. It has to be the same where they are loaded.

    Returns:
        ``cls``.

    Raises:
        TypeError: ``cls`` is no such class, or one of this library's, escnn's or torch's.
        ValueError: another class is registered under that name. The same class defined anew, as in a notebook,
            replaces the one before.

    Example:
        >>> @implicit_steer.register
        ... class Network(torch.nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         from escnn import gspaces
        ...         gs = gspaces.flipRot3dOnR3()
        ...         scalars = gs.type(*[gs.trivial_repr] * channels)
        ...         self.conv = implicit_steer.nn.ImplicitPointConv(scalars, scalars, None, 2, 4)
        ...         self.head = torch.nn.Linear(channels, 1)
        ...
        ...     def forward(self, x, pos, edges):
        ...         x = self.conv(self.conv.in_type(x, pos), edges, pos[edges[1]] - pos[edges[0]])
        ...         return self.head(implicit_steer.layers.values(x))
        >>> implicit_steer.save(Network(8), "network.safetensors")
        >>> network = implicit_steer.load("network.safetensors")  # there: after importing the module with Network
    """
    if cls is None:
        return partial(register, name=name)
    is_module = isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls is not torch.nn.Module
    own = is_module and (not is_plain(cls) or is_registered(cls)) and cls.__module__.partition(".")[0] not in _NOT_OWN
    require(own, "cls", "a class of your own, derived from torch.nn.Module", repr(cls), kind=TypeError)
    name = cls.__qualname__ if name is None else name
    require(isinstance(name, str) and name != "", "name", "a string", repr(name), kind=TypeError)
    before = REGISTERED.get(name)
    same = before is None or before.origin == _origin(cls)
    remedy = "Give one of them another name: register(cls, name=...)."
    require(same, "name", f"another one than {name!r}, which is {before and before.origin}", _origin(cls), remedy)
    add_registered(cls, Kind(name, partial(_build, cls), _parts, _origin(cls)))
    return cls


def _origin(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def _form(tensor: torch.Tensor | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def _parts(module: torch.nn.Module) -> dict[str, Any]:
    return {
        "children": tuple(module._modules.items()),
        "attributes": tuple(_attributes(module).items()),
        "parameters": tuple((name, _form(tensor)) for name, tensor in module._parameters.items()),
        "buffers": tuple((name, _form(tensor)) for name, tensor in module._buffers.items()),
        "not_persistent": tuple(sorted(module._non_persistent_buffers_set)),
    }


def _placeholder(form: tuple[tuple[int, ...], torch.dtype] | None) -> torch.Tensor | None:
    return None if form is None else torch.empty(form[0], dtype=form[1], device="meta")


def _build(
    cls: type[torch.nn.Module],
    children: tuple[tuple[str, Any], ...],
    attributes: tuple[tuple[str, Any], ...],
    parameters: tuple[tuple[str, Any], ...],
    buffers: tuple[tuple[str, Any], ...],
    not_persistent: tuple[str, ...],
) -> torch.nn.Module:
    """A module of ``cls``, made without running any code of the class: the names come from a file."""
    names = [name for name, _ in (*children, *attributes, *parameters, *buffers)]
    right = all(isinstance(name, str) and name and name not in _OF_EVERY_MODULE for name in names)
    require(right and len(set(names)) == len(names), "names", "different ones, none of torch.nn.Module's own", names)
    require(not any("." in name for name, _ in (*children, *parameters, *buffers)), "names", "no dots", names)
    for name, child in children:
        require(child is None or isinstance(child, torch.nn.Module), name, "a module", type(child).__name__)
    require(set(not_persistent) <= {name for name, _ in buffers}, "not_persistent", "buffers", not_persistent)
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    vars(module).update(attributes)
    module._modules.update(children)
    for name, form in parameters:
        tensor = _placeholder(form)
        module._parameters[name] = None if tensor is None else torch.nn.Parameter(tensor)
    module._buffers.update((name, _placeholder(form)) for name, form in buffers)
    module._non_persistent_buffers_set.update(not_persistent)
    return module


def check_attributes(name: str, module: torch.nn.Module, has_counterpart: Callable[[type], bool]) -> None:
    """Raise unless the attributes of ``module``, the part ``name`` of what is saved, can be written.

    ``has_counterpart``: whether values of a class, such as field types, are saved as something else.
    """

    def check(where: str, value: Any) -> None:
        """Raise unless ``value``, which the error calls ``where``, can be written; containers are searched."""
        cls = type(value)
        if cls in (list, tuple, torch.Size):
            for item in value:
                check(where, item)
        elif cls is dict:
            for item in value.items():
                check(where, item)
        elif isinstance(value, torch.Tensor):
            remedy = "Make it a buffer (self.register_buffer) or a parameter."
            fail(f"{remedy} {where}", _EXPECTED, "a tensor", kind=TypeError)
        elif isinstance(value, torch.nn.Module):
            remedy = "Hold modules as attributes of their own, or in a torch.nn.ModuleList or ModuleDict."
            fail(f"{remedy} {where}", _EXPECTED, cls.__name__, kind=TypeError)
        else:
            array = isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc" and value.dtype.isnative
            remedy = "Make it a local variable of __init__, or hold plain values, buffers or modules instead."
            ok = cls in (*_PLAIN, Fields) or isinstance(value, Radial) or array or has_counterpart(cls)
            require(ok, f"{remedy} {where}", _EXPECTED, cls.__name__, kind=TypeError)

    for key, value in _attributes(module).items():
        check(f"{name}.{key}", value)
