"""Modules that need escnn → plain modules. For each class that needs escnn, a function registered here makes the plain
counterpart."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from .. import irreps
from .._check import fail, require
from ..layers.exact import ExactBuffers
from ..layers.frozen import reason_against
from ..layers.point_conv import PointConvBase
from .kinds import KINDS, REGISTERED, is_plain, is_registered, kind_of
from .registry import check_attributes

_Make = TypeVar("_Make", bound="Callable[[Any, Converter], Any]")
_CONVERTERS: dict[type, Callable[[Any, Converter], Any]] = {}
_REGISTER = (
    "Decorate the class with @implicit_steer.register, or save its parts in a torch.nn.ModuleDict (see the text of "
    "implicit_steer.deploy)."
)
_REPLACE = "Replace this part, or compute what it does in the forward of a class that you register."
_REMOVE = "Remove the parametrisations first: torch.nn.utils.parametrize.remove_parametrizations(module, name)."
_KNOTS = 256  # of convolutions that have no table
_HOLD = "Hold what was added to it in a class of your own that you register (implicit_steer.register)."
_SUBCLASS = "A subclass of a known module counts as unknown, since it may compute something else."


def converts(*classes: type) -> Callable[[_Make], _Make]:
    """Decorator: ``function(module, convert)`` makes the plain counterpart of modules of exactly these classes, with
    the same Parameter objects; ``convert`` does so for the module's parts and field types."""

    def register(function: _Make) -> _Make:
        _CONVERTERS.update(dict.fromkeys(classes, function))
        return function

    return register


def saved_as(plain: type[torch.nn.Module]) -> Callable[[type], type]:
    """Class decorator: modules of this subclass of ``plain`` are ``plain`` modules, built from the same parts."""

    def register(cls: type) -> type:
        _CONVERTERS[cls] = lambda module, convert: convert.rebuilt(module, plain)
        return cls

    return register


class Converter:
    """Makes plain counterparts of the parts of one module; a part that occurs twice has one counterpart. With
    ``freeze`` those of convolutions are frozen, where they can be."""

    def __init__(self, root: torch.nn.Module, freeze: bool) -> None:
        self._freeze = freeze
        self._names = {id(module): name or type(root).__name__ for name, module in root.named_modules()}
        self._made: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        """The plain counterpart of a module or a field type, also inside of containers; other values are kept."""
        if isinstance(value, tuple | list):
            items = [self(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if not isinstance(value, torch.nn.Module) and type(value) not in _CONVERTERS:
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, self._make(value)
        return self._made[id(value)][1]

    def _make(self, value: Any) -> Any:
        cls = type(value)
        if isinstance(value, torch.nn.Module):
            name = self.name(value)
            if cls not in _CONVERTERS and not is_plain(cls):
                _refuse(name, value)
            hooks = len(value._forward_hooks) + len(value._forward_pre_hooks)
            remedy = "Forward hooks cannot be saved: remove them."
            require(not hooks, f"{remedy} {name}", "no forward hooks", hooks, kind=TypeError)
            if is_registered(cls):
                check_attributes(name, value, _CONVERTERS.__contains__)
            if self._freeze and isinstance(value, PointConvBase) and self._can_be_frozen(value):
                return value.freeze_table(knots=_KNOTS if value.implicit_kernel.plan.table is None else None)
            if self._freeze and cls is irreps.InteractionBlock:
                return self.rebuilt(value, irreps.Interaction)
        if cls in _CONVERTERS:
            return _CONVERTERS[cls](value, self)
        arguments = kind_of(cls).arguments(value)
        same = all(converted is part or converted == part for part, converted in self._converted(arguments))
        return value if same else self.rebuilt(value, cls)

    def _can_be_frozen(self, conv: PointConvBase) -> bool:
        """Whether the convolution gets splines; a warning says why not, unless it has them."""
        kernel = conv.implicit_kernel
        reason = reason_against(kernel)
        if reason is not None and not kernel.plan.is_frozen:
            warnings.warn(f"table: {self.name(conv)} is saved with its MLP: {reason}.", stacklevel=2)
        return reason is None

    def name(self, module: torch.nn.Module) -> str:
        """The path of ``module`` in the module that is converted."""
        return self._names.get(id(module), type(module).__name__)

    def _converted(self, arguments: dict[str, Any]) -> list[tuple[Any, Any]]:
        """(part, its counterpart) of the arguments that may have one."""
        parts = [part for part in arguments.values() if isinstance(part, torch.nn.Module | tuple)]
        return [(part, self(part)) for part in parts]

    def rebuilt(self, module: torch.nn.Module, plain: type[torch.nn.Module]) -> torch.nn.Module:
        """A ``plain`` module built from the converted parts of ``module``, with its other parameters and buffers."""
        kind = kind_of(plain)
        made = kind.build(**{name: self(value) for name, value in kind.arguments(module).items()})
        self._share_rest(made, module)
        return made

    def _share_rest(self, made: torch.nn.Module, module: torch.nn.Module) -> None:
        share_tensors(made, {**module._parameters, **module._buffers})
        if isinstance(made, ExactBuffers) and isinstance(module, ExactBuffers):
            made.share_exact(module)
        for name, child in module._modules.items():
            if child is not None and id(child) not in self._made:
                found = name in made._modules
                require(found, f"{_HOLD} {name}", f"a part of {type(made).__name__}", "none", kind=TypeError)
                self._share_rest(made.get_submodule(name), child)

    def set_modes(self) -> None:
        """Put every counterpart in the mode of its module, with those of its parts that are no counterparts."""
        counterparts = {id(made) for _, made in self._made.values()}

        def put(made: torch.nn.Module, mode: bool) -> None:
            made.training = mode
            for child in made.children():
                if id(child) not in counterparts:
                    put(child, mode)

        for module, made in self._made.values():
            if isinstance(module, torch.nn.Module) and made is not module:
                put(made, module.training)


def share_tensors(module: torch.nn.Module, tensors: dict[str, torch.Tensor | None]) -> None:
    """Replace the parameters and buffers of ``module`` by these; where a parameter was, a tensor becomes one."""
    for name, tensor in tensors.items():
        if name in module._buffers:
            module._buffers[name] = tensor
        elif name not in module._parameters:
            fail(f"{_HOLD} {name}", f"a parameter or buffer of {type(module).__name__}", "neither", kind=TypeError)
        elif tensor is None or isinstance(tensor, torch.nn.Parameter):
            module._parameters[name] = tensor
        else:
            module._parameters[name] = torch.nn.Parameter(tensor.detach())


def _refuse(name: str, module: torch.nn.Module) -> NoReturn:
    """Raise the ``TypeError`` of a part that has no plain counterpart."""
    cls = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        remedy = _REMOVE
    else:
        remedy = _REPLACE if cls.__module__.partition(".")[0] in ("escnn", "torch") else _REGISTER
    classes = [*sorted(KINDS), *sorted(f"{c.__module__}.{c.__name__}" for c in _CONVERTERS), *sorted(REGISTERED)]
    got = f"{cls.__module__}.{cls.__name__}"
    fail(f"{remedy} {name}", f"one of {', '.join(classes)}", got, _SUBCLASS, TypeError)


def convert(module: torch.nn.Module, freeze: bool = False) -> torch.nn.Module:
    """The plain counterpart of ``module``, with the same Parameter objects; ``module`` itself where it needs no escnn.
    With ``freeze`` its convolutions are frozen, where they can be, and have copies of the parameters.

    Raises:
        TypeError: a part has no plain counterpart; the message names it.
    """
    if sys.modules.get("escnn"):  # else no module needs it
        importlib.import_module("implicit_steer.deploy.plain")
    converter = Converter(module, freeze)
    with torch.random.fork_rng(devices=[]):  # the values that modules draw as they are built are replaced
        plain = converter(module)
    converter.set_modes()
    return plain
