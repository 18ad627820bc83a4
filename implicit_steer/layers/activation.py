"""Fourier activations on plain tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._check import require
from ..ops.fourier import fourier
from ..plan import FUNCTIONS
from ..plan.packing import Constants
from ._modules import NoTorchScript
from .fields import Fields, check_features

_SOFT = 1e-3  # ε of the lengths √(|v|² + ε²): their derivatives of every order exist where v = 0, too


class FourierBase(NoTorchScript, torch.nn.Module):
    """y = A⁻ φ(A x) per field, on tensors. A subclass calls :meth:`_set_samples`."""

    function: str

    def _set_samples(
        self, function: str, samples: NDArray[Any], inverse: NDArray[Any], vector: int | None = None
    ) -> None:
        """Set φ, A (S, d) and A⁻ (d, S). With ``vector``, fields are a scalar and a vector, which begins at that one of
        their four coordinates, and A and A⁻ belong to the pair (scalar, length of the vector)."""
        require(function in FUNCTIONS, "function", f"one of {FUNCTIONS}", repr(function))
        self.function, self._vector = function, vector
        self._merged = Constants(samples, np.ascontiguousarray(inverse.T))

    def _evaluate(self, x: Tensor) -> Tensor:
        require(x.is_floating_point(), "x", "a floating point tensor", x.dtype, kind=TypeError)
        if self._vector is None:
            return fourier(self.function, x, *self._merged.like(x))
        wide = x.float() if x.element_size() < 4 else x  # squares of 16 bits overflow
        return self._along_vectors(wide).to(x.dtype)

    def _along_vectors(self, x: Tensor) -> Tensor:
        """(s, v) → (s′, v · r′ / r), (s′, r′) = A⁻ φ(A (s, r)), r = √(|v|² + ε²), of every field."""
        fields, start = x.unflatten(1, (-1, 4)), self._vector or 0
        vector = fields[:, :, start : start + 3]
        scalar = fields[:, :, :1] if start else fields[:, :, 3:]
        length = (vector.square().sum(2, keepdim=True) + _SOFT**2).sqrt()
        pairs = torch.cat([scalar, length], 2).flatten(1, 2)
        scalar, along = fourier(self.function, pairs, *self._merged.like(x)).unflatten(1, (-1, 2)).split(1, 2)
        vector = vector * (along / length)
        return torch.cat([scalar, vector] if start else [vector, scalar], 2).flatten(1, 2)

    def is_like(self, other: FourierBase) -> bool:
        """Whether both apply the same function to every field."""
        if (self.function, self._vector) != (other.function, other._vector):
            return False
        pairs = list(zip(self._merged.exact, other._merged.exact, strict=True))
        return all(a.shape == b.shape for a, b in pairs) and all(torch.allclose(a, b, 0, 1e-6) for a, b in pairs)


class FourierActivation(FourierBase):
    """y = A⁻ φ(A x) per field, without escnn: (N, C · d, ...) → the same shape, plain tensors.

    Args:
        in_type: size and name of the features, C fields of d coefficients.
        function: φ, one of ``FUNCTIONS``.
        samples, inverse: A (S, d) and A⁻ (d, S).
        vector: None; or 0 or 1 for fields of a scalar and a vector, which begins at that one of their 4 coordinates:
            ``samples`` (S, 2) and ``inverse`` (2, S) then belong to the pair (scalar, length of the vector).
    """

    def __init__(
        self, in_type: Fields, function: str, samples: NDArray[Any], inverse: NDArray[Any], vector: int | None = None
    ) -> None:
        super().__init__()
        require(samples.shape == inverse.shape[::-1], "inverse", f"shape {samples.shape[::-1]}", inverse.shape)
        require(vector in (None, 0, 1), "vector", "None, 0 or 1", vector)
        require(vector is None or samples.shape[1] == 2, "samples", "two columns with 'vector'", samples.shape)
        size = samples.shape[1] if vector is None else 4
        require(in_type.size % size == 0, "in_type", f"fields of {size} coefficients", in_type.size)
        self.in_type = self.out_type = in_type
        self._set_samples(function, samples, inverse, vector)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        samples, inverse_t = (m.numpy() for m in self._merged.exact)
        given = {"in_type": self.in_type, "function": self.function, "vector": self._vector}
        return given | {"samples": samples, "inverse": inverse_t.T}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to every field."""
        check_features(x, self.in_type.size)
        return self._evaluate(x)

    def extra_repr(self) -> str:
        """What distinguishes this activation."""
        samples, _ = self._merged.exact
        return f"{self.in_type}, function={self.function!r}, {len(samples)} samples"
