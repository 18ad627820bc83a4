"""Fourier activation on node features and inside the kernel MLP, which evaluates every distinct sample once."""

from __future__ import annotations

import re

import numpy as np
import torch
from escnn.group import O3, SO3, Group
from escnn.gspaces import GSpace
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import require, require_integer
from ..layers._modules import Fixed
from ..layers.activation import FourierBase
from ..lowering.sampling import (
    HiddenSpace,
    equispaced,
    escnn_matrices,
    gauss_matrices,
    hidden_space,
    lebedev_degrees,
    lebedev_matrices,
    merge_samples,
    rotation_matrices,
)
from ..plan import FUNCTIONS
from .building import built_by_escnn
from .equivariant import Steerable, check_input

_GAUSS = 24  # nodes along a vector's axis: equivariance does not depend on them; ELU has converged to 1e-5
# Largest frequency that a default quadrature integrates, per (max_frequency + 1), on the sphere and on the circle: the
# smoother φ is, the faster its harmonics decay.
_SMOOTH, _ELU, _RELU = (12, 24), (24, 64), (131, 512)
_DEGREES = {"elu": _ELU, "relu": _RELU}
_NAMES = re.compile(r"(auto|escnn)|(lebedev|circle|gauss)-([1-9]\d*)")


def paper_function(group: Group) -> str:
    """φ as the paper chooses it: ELU, but ReLU on groups of order 1 and 2."""
    return "relu" if not group.continuous and group.order() <= 2 else "elu"


def default_sampling(group: Group, max_frequency: int, function: str) -> str:
    """The sampling that ``"auto"`` stands for, see :class:`FourierActivation`."""
    if not group.continuous or max_frequency == 0:
        return "escnn"
    sphere, circle = (degree * (max_frequency + 1) for degree in _DEGREES.get(function, _SMOOTH))
    if not isinstance(group, SO3 | O3):
        return f"circle-{circle}"
    if max_frequency == 1:
        return f"gauss-{_GAUSS}"
    sizes = lebedev_degrees()
    return f"lebedev-{next((n for n, degree in sizes.items() if degree >= sphere), max(sizes))}"


def sample_matrices(space: HiddenSpace, sampling: str) -> tuple[np.ndarray, np.ndarray]:
    """A and A⁻ of the sampling ``"escnn"``, ``"lebedev-N"``, ``"circle-N"`` or ``"gauss-N"``."""
    _, kind, n = _NAMES.fullmatch(sampling).groups()
    if kind is None:
        return escnn_matrices(space)
    if kind == "lebedev":
        return lebedev_matrices(space, int(n))
    return gauss_matrices(space, int(n)) if kind == "gauss" else rotation_matrices(space, int(n), sampling)


class FourierActivation(FourierBase, Steerable):
    """y = A⁻ φ(A x) per field: sample a band-limited function on the group or the sphere, apply φ, transform back.

    On the authors' grids it is the function of escnn's ``QuotientFourierELU`` / ``FourierELU``, but samples that
    coincide are evaluated once (for O(3) only 30 of the 120 icosahedral ones differ).

    Args:
        gspace: its fibre group chooses the representation: functions on the sphere for SO(3) and O(3), else on the
            group.
        channels: number of fields.
        max_frequency: highest frequency L (without effect for finite groups, which keep every irrep).
        function: ``"elu" | "relu" | "silu" | "gelu" | "tanh"``.
        sampling: ``"auto"``, or one of

            - ``"escnn"``: the authors' grid; exact for finite groups, equivariant to 1e-3 (L = 1) … 1e-1 (L = 3) for
              SO(3) and O(3);
            - ``"gauss-N"`` (SO(3), O(3), L = 1): N Gauss nodes on the axis of each field's vector v, of length
              √(|v|² + 10⁻⁶): equivariant to rounding for every N;
            - ``"lebedev-N"`` (SO(3), O(3)): a quadrature of N points on the sphere;
            - ``"circle-N"``: N equispaced rotations (SO(2), O(2) and their extensions; the authors take 125).

            ``"auto"`` is equivariant to 5e-6 (relative, random elements, features of unit variance), but ReLU with
            L ≥ 2 on the sphere only to 1e-4. It is ``"escnn"`` for finite groups and L = 0; ``"gauss-24"`` for SO(3)
            and O(3) with L = 1, which takes the time of the authors' grid; for L ≥ 2 the Lebedev rule of degree
            24 (L + 1) for ELU, 12 (L + 1) for SiLU, GELU and tanh, at most 131, and 131 for ReLU; on the circle
            ``"circle-N"`` with N = 64 (L + 1), 24 (L + 1) and 512 (L + 1) for these. ELU on thousands of points takes
            a hundred times the time of the authors' grid: for L ≥ 2 SiLU, or :class:`Gate`, which is exact, may be
            the better choice.

    Attributes:
        sampling: what ``"auto"`` stands for here; ``"state"`` after loading samples of another origin.

    Loading a ``state_dict`` takes over its samples, the buffers ``A`` and ``Ainv``: an activation that was saved on the
    authors' grid gives the same values again.

    Shape: x and y (N, channels · d, ...) as GeometricTensor of ``in_type == out_type``.

    Raises:
        ValueError: unknown function or sampling, or a continuous group without a known grid.
        TypeError: input that is no GeometricTensor of ``in_type``.

    Source: escnn's Fourier activations; Zhdanov, Hoffmann, Cesa, NeurIPS 2023 for the choice of grids.
    """

    A: Tensor
    Ainv: Tensor
    sampling = Fixed(lambda activation: activation._sampling)
    max_frequency = Fixed(lambda activation: activation._max_frequency)

    @built_by_escnn
    def __init__(
        self, gspace: GSpace, channels: int, max_frequency: int, function: str = "elu", sampling: str = "auto"
    ):
        super().__init__()
        require(isinstance(gspace, GSpace), "gspace", "an escnn GSpace", type(gspace).__name__, kind=TypeError)
        require_integer("max_frequency", max_frequency, 0)
        require(function in FUNCTIONS, "function", f"one of {FUNCTIONS}", repr(function))
        require_integer("channels", channels, 1)
        known = isinstance(sampling, str) and _NAMES.fullmatch(sampling) is not None
        require(known, "sampling", "'auto', 'gauss-N', 'escnn', 'lebedev-N' or 'circle-N'", repr(sampling))
        if sampling == "auto":
            sampling = default_sampling(gspace.fibergroup, max_frequency, function)
        self._max_frequency, self.function = max_frequency, function
        space = hidden_space(gspace.fibergroup, max_frequency)
        self.in_type = self.out_type = FieldType(gspace, [space.rho] * channels)
        a, inverse = sample_matrices(space, sampling)
        # the authors' buffers, kept for checkpoints; forward uses the merged matrices
        self.register_buffer("A", torch.tensor(a, dtype=torch.get_default_dtype()))
        self.register_buffer("Ainv", torch.tensor(inverse, dtype=torch.get_default_dtype()))
        self._take_samples(sampling, a, inverse)

    @property
    def _space(self) -> HiddenSpace:
        return hidden_space(self.in_type.fibergroup, self.max_frequency)

    def _take_samples(self, sampling: str, a: np.ndarray, inverse: np.ndarray) -> None:
        self._sampling, field = sampling, self._space.rho
        if a.shape[1] == field.size:
            self._set_samples(self.function, *merge_samples(a, inverse)[:2])
        else:  # functions of the field's scalar and its vector's length
            scalar_first = field.group.irrep(*field.irreps[0]).size == 1
            self._set_samples(self.function, a, inverse, vector=int(scalar_first))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        a, inverse = (state_dict.get(prefix + name) for name in ("A", "Ainv"))
        numbers = a is not None and inverse is not None and not a.is_meta
        if numbers and a.dim() == 2 and inverse.shape == a.shape[::-1]:
            self._adopt_samples(a, inverse)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _adopt_samples(self, a: Tensor, inverse: Tensor) -> None:
        """Evaluate on the samples of a checkpoint: where a known sampling has them, on its exact matrices."""
        names = self._samplings_like(a)
        if names is None:  # the samples of another field, for which torch raises
            return
        matrices = [m.detach().cpu().double().numpy() for m in (a, inverse)]
        for name in names:
            known = sample_matrices(self._space, name)
            if all(m.shape == k.shape and np.allclose(m, k, 0, 1e-4) for m, k in zip(matrices, known, strict=True)):
                break
        else:
            name, known = "state", matrices
        if name != self.sampling or name == "state":
            self.A, self.Ainv = (torch.tensor(m).to(self.A) for m in known)
            self._take_samples(name, *known)

    def _samplings_like(self, a: Tensor) -> list[str] | None:
        """The samplings whose A may be ``a``; None where ``a`` belongs to another field."""
        (n, size), space, degree = a.shape, self._space, 2 * self.max_frequency
        sphere, circle = isinstance(space.group, SO3 | O3), space.group.continuous
        if size != space.rho.size:
            return [f"gauss-{n}"] if sphere and degree == 2 and size == 2 and n > 1 else None
        if sphere:
            return ["escnn", *([f"lebedev-{n}"] if lebedev_degrees().get(n, -1) >= degree else [])]
        rotations = n // len(equispaced(space.group, 1)) if circle else 0
        return ["escnn", *([f"circle-{rotations}"] if rotations > degree else [])]

    def forward(self, x: GeometricTensor) -> GeometricTensor:
        """Apply the activation to every field."""
        check_input(x, self.in_type)
        return GeometricTensor(self._evaluate(x.tensor), self.out_type, x.coords)

    def extra_repr(self) -> str:
        """What distinguishes this activation."""
        samples, _ = self._merged.exact
        return f"{self.in_type}, function={self.function!r}, sampling={self.sampling!r}, {len(samples)} samples"
