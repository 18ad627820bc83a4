"""What makes the modules here escnn's ``EquivariantModule``: shapes, export, and checks with random elements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from escnn.group import GroupElement
from escnn.gspaces import GSpace
from escnn.nn import EquivariantModule, FieldType, GeometricTensor
from torch import Tensor

from .._check import fail, require
from ..layers._modules import NoTorchScript, in_mode

ELEMENTS = 10  # how many random elements a check draws
Errors = list[tuple[GroupElement, float]]


def check_type(name: str, value, gspace: GSpace | None = None) -> None:
    """Raise unless ``value`` is a FieldType (of ``gspace``'s group, if given) in coordinates that can be inverted."""
    require(isinstance(value, FieldType), name, "an escnn FieldType", type(value).__name__, kind=TypeError)
    names = Counter(rep.name for rep in set(value.representations))
    remedy = "escnn tells representations apart by their names: give each its own."
    for rep_name, n in names.items():
        require(n == 1, name, "representations of different names", f"{n} of the name {rep_name}", remedy)
    for rep in set(value.representations):
        condition = np.linalg.cond(rep.change_of_basis)
        remedy = "Give the coordinates of its fields comparable units."
        require(condition < 1e6, name, "changes of basis of condition < 1e6", f"{condition:.0e} of {rep.name}", remedy)
    if gspace is not None:
        require(value.fibergroup == gspace.fibergroup, name, f"fields of {gspace.fibergroup}", value.fibergroup)


def check_input(x: Any, kind: FieldType) -> None:
    """Raise unless ``x`` is a GeometricTensor of ``kind``."""
    if not isinstance(x, GeometricTensor) or (x.type is not kind and x.type != kind):
        fail("x", f"a GeometricTensor of {kind}", getattr(x, "type", type(x)), kind=TypeError)


def check_shape(shape: Any, kind: FieldType) -> tuple[int, ...]:
    """``shape`` as a tuple; raise unless features of ``kind`` can have it."""
    right = len(shape) > 1 and shape[1] == kind.size
    require(right, "input_shape", f"(*, {kind.size}, ...)", tuple(shape))
    return tuple(shape)


def transform(x: Tensor, kind: FieldType, element: GroupElement) -> Tensor:
    """ρ(g) x for features x (N, C, ...) of ``kind``, in the precision of x."""
    matrix = torch.as_tensor(kind.representation(element), dtype=x.dtype, device=x.device)
    return torch.einsum("oi,ni...->no...", matrix, x)


def compare(
    gspace: GSpace,
    pair: Callable[[GroupElement], tuple[Tensor, Tensor]],
    atol: float,
    rtol: float,
    elements: list[GroupElement] | None = None,
) -> Errors:
    """[(g, ‖f(g x) − g f(x)‖ / ‖f(x)‖)] over random elements g of the group.

    Args:
        gspace: the space of the fields.
        pair: g → (f(g x), g f(x)).
        atol, rtol: the tolerances, as ``numpy.allclose`` has them.
        elements: the elements g, or None for 10 that ``gspace.fibergroup.sample()`` draws.

    Raises:
        AssertionError: unless ``|f(g x) − g f(x)| ≤ atol + rtol |g f(x)|`` everywhere.
    """
    errors: Errors = []
    group = gspace.fibergroup
    for element in elements or [group.sample() for _ in range(ELEMENTS)]:
        actual, expected = pair(element)
        error = float((actual - expected).norm() / expected.norm().clamp(min=torch.finfo(expected.dtype).tiny))
        worst = float((actual - expected).abs().max()) if actual.numel() else 0.0
        if not torch.allclose(actual, expected, rtol=rtol, atol=atol):
            errors = f"relative error {error:.1e}, largest difference {worst:.1e}"
            raise AssertionError(f"not equivariant for the element {element} of {group}: {errors}")
        errors.append((element, error))
    return errors


class Steerable(NoTorchScript, EquivariantModule):
    """A module from the features of points to features of the same points, as escnn's modules are.

    A subclass has ``in_type`` and ``out_type`` and maps GeometricTensors (N, C, ...) point by point.
    """

    in_type: FieldType
    out_type: FieldType

    def evaluate_output_shape(self, input_shape: tuple) -> tuple:
        """(N, C_in, ...) → (N, C_out, ...)."""
        n, _, *space = check_shape(input_shape, self.in_type)
        return n, self.out_type.size, *space

    def check_equivariance(self, atol: float = 1e-4, rtol: float = 1e-4) -> Errors:
        """Compare f(g x) with g f(x) for 10 random elements g of the group and random features x, in evaluation mode.

        Returns:
            [(g, relative error)], in the norm over all features.

        Raises:
            AssertionError: a value differs by more than ``atol + rtol · |value|``.
        """
        with in_mode(self, False), torch.no_grad():
            return self._check(atol, rtol)

    def _check(self, atol: float, rtol: float) -> Errors:
        x = torch.randn(20, self.in_type.size, **like(self))
        coords = x.new_zeros(20, self.in_type.gspace.dimensionality)

        def run(x: Tensor) -> Tensor:
            given = GeometricTensor(x, self.in_type, coords) if coords.shape[1] else GeometricTensor(x, self.in_type)
            return self(given).tensor

        expected = run(x)

        def pair(g: GroupElement) -> tuple[Tensor, Tensor]:
            return run(transform(x, self.in_type, g)), transform(expected, self.out_type, g)

        return compare(self.in_type.gspace, pair, atol, rtol)

    def export(self) -> NoReturn:
        """Raise ``RuntimeError``; use :func:`implicit_steer.save`, whose files need no escnn, or ``torch.export``."""
        refuse_export(self)


def like(module: torch.nn.Module) -> dict[str, Any]:
    """dtype (float32 or float64) and device of tensors to call a module with; float64 where it has no float tensor."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
            return {"dtype": wide, "device": tensor.device}
    return {"dtype": torch.float64, "device": None}


def refuse_export(module: torch.nn.Module) -> NoReturn:
    """Raise the error of ``export()``, which names what takes its place."""
    remedy = (
        "Plain PyTorch without escnn: implicit_steer.save(module, path), then implicit_steer.load(path). A program: "
        "torch.export.export."
    )
    fail(f"{type(module).__name__}.export", "another way to deploy", "escnn's export()", remedy, RuntimeError)
