"""Fourier activations on plain tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._check import require
from ..fourier import fourier
from ..packing import Constants
from ..plan import FUNCTIONS
from .fields import Fields, check_features


class FourierBase(torch.nn.Module):
    """y = A⁻ φ(A x) per field, on tensors. A subclass calls :meth:`_set_samples`."""

    function: str

    def _set_samples(self, function: str, samples: np.ndarray, inverse: np.ndarray) -> None:
        """φ, A (S, d) and A⁻ (d, S)."""
        require(function in FUNCTIONS, "function", f"one of {FUNCTIONS}", repr(function))
        self.function = function
        self._merged = Constants(samples, np.ascontiguousarray(inverse.T))

    def _evaluate(self, x: Tensor) -> Tensor:
        require(x.is_floating_point(), "x", "a floating point tensor", x.dtype, kind=TypeError)
        return fourier(self.function, x, *self._merged.like(x))


class FourierActivation(FourierBase):
    """y = A⁻ φ(A x) per field, without escnn: (N, C · d, ...) → the same shape, plain tensors.

    Args:
        in_type: size and name of the features, C fields of d coefficients.
        function: φ, one of ``FUNCTIONS``.
        samples, inverse: A (S, d) and A⁻ (d, S).
    """

    def __init__(self, in_type: Fields, function: str, samples: np.ndarray, inverse: np.ndarray):
        super().__init__()
        require(samples.shape == inverse.shape[::-1], "inverse", f"shape {samples.shape[::-1]}", inverse.shape)
        require(in_type.size % samples.shape[1] == 0, "samples", f"columns that divide {in_type.size}", samples.shape)
        self.in_type = self.out_type = in_type
        self._set_samples(function, samples, inverse)

    def arguments(self) -> dict:
        """What it is built from."""
        samples, inverse_t = (m.numpy() for m in self._merged.exact)
        return {"in_type": self.in_type, "function": self.function, "samples": samples, "inverse": inverse_t.T}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to every field."""
        check_features(x, self.in_type.size)
        return self._evaluate(x)

    def extra_repr(self) -> str:
        """What distinguishes this activation."""
        samples, _ = self._merged.exact
        return f"{self.in_type}, function={self.function!r}, {len(samples)} samples"
