"""The hidden layers of a plan: structured linear maps, Fourier activations, batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._check import require, require_integer
from .frozen import FrozenArrays, fingerprint_of, require_indices, require_number, require_shape

FUNCTIONS = ("elu", "relu", "silu", "gelu", "tanh")


@dataclass(frozen=True, eq=False)
class Block(FrozenArrays):
    """``W[out_start[u] + o, in_start[v] + i] = Σ_b weights[offset + (u n_in + columns[v]) n_b + b] basis[b, o, i]``."""

    offset: int
    n_in: int  # input fields in the parameter's layout, of which this block uses ``columns``
    columns: NDArray[Any]  # (V,)
    out_start: NDArray[Any]  # (U,)
    in_start: NDArray[Any]  # (V,)
    basis: NDArray[Any]  # (n_b, o, i)

    def validate(self) -> None:
        for name in ("offset", "n_in"):
            require_integer(name, getattr(self, name), 0)
        require(self.basis.ndim == 3, "basis", "shape (n_b, o, i)", self.basis.shape)
        require_indices("columns", self.columns, self.n_in, self.in_start.shape)
        for name in ("columns", "out_start"):
            index = getattr(self, name)
            require(len(np.unique(index)) == len(index), name, "every one once", index)

    @property
    def end(self) -> int:
        """One past the last weight it reads."""
        return self.offset + len(self.out_start) * self.n_in * len(self.basis)


@dataclass(frozen=True, eq=False)
class Linear(FrozenArrays):
    """A hidden equivariant linear layer in frame coordinates, ``z = W y + bias @ b``; W is 0 outside of its blocks."""

    in_size: int
    out_size: int
    blocks: tuple[Block, ...]
    bias: NDArray[Any]  # (out_size, n_bias)

    def validate(self) -> None:
        for name in ("in_size", "out_size"):
            require_integer(name, getattr(self, name), 0)
        require_shape("bias", self.bias, (self.out_size, self.bias.shape[-1]))
        for block in self.blocks:
            _, o, i = block.basis.shape
            require_indices("out_start", block.out_start, self.out_size - o + 1)
            require_indices("in_start", block.in_start, self.in_size - i + 1)

    @property
    def n_weights(self) -> int:
        """How many weights it reads."""
        return max((block.end for block in self.blocks), default=0)

    @property
    def fingerprint(self) -> NDArray[Any]:
        """Integers that differ where the same weights, on another basis, mean another map."""
        return fingerprint_of(block.basis for block in self.blocks)

    @cached_property
    def n_nonzeros(self) -> int:
        """Structural nonzeros of W (multiply-adds per edge)."""
        return sum(int((np.abs(b.basis) > 0).any(0).sum()) * len(b.out_start) * len(b.in_start) for b in self.blocks)


@dataclass(frozen=True, eq=False)
class Activation(FrozenArrays):
    """``y = inverse · φ(samples · z)`` per channel. Equal samples are merged: ``index`` holds the merged sample of each
    original one."""

    channels: int
    function: str
    samples: NDArray[Any]  # (S, c)
    inverse: NDArray[Any]  # (c, S)
    index: NDArray[Any]  # (S_original,) values in 0..S-1

    def validate(self) -> None:
        require_integer("channels", self.channels, 0)
        require(self.function in FUNCTIONS, "activation", f"one of {FUNCTIONS}", repr(self.function))
        s, c = self.samples.shape
        require(self.inverse.shape == (c, s), "inverse", f"shape {(c, s)}", self.inverse.shape)
        require_indices("index", self.index, s)

    @cached_property
    def unmerged(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """samples (S_original, c) and inverse (c, S_original) of the same function before equal samples were merged."""
        count = np.bincount(self.index, minlength=len(self.samples))
        return self.samples[self.index], (self.inverse / count)[:, self.index]


@dataclass(frozen=True, eq=False)
class Norm(FrozenArrays):
    """escnn's ``IIDBatchNorm1d``: one variance per channel, means and shifts on the trivial coefficients only."""

    channels: int
    trivial: NDArray[Any]  # (n_trivial,) coefficients of a channel in frame coordinates
    full_trivial: NDArray[Any]  # (n_trivial,) the same among the coordinates of escnn's hidden field
    measured: NDArray[Any]  # (n_trivial,) the same among the coordinates of h
    eps: float
    momentum: float

    def validate(self) -> None:
        require_integer("channels", self.channels, 0)
        require_number("eps", self.eps)
        require_number("momentum", self.momentum)
        for name in ("trivial", "full_trivial", "measured"):
            index = getattr(self, name)
            require_indices(name, index, int(index.max(initial=0)) + 1, self.trivial.shape)

    @property
    def n_mean(self) -> int:
        """How many coordinates of escnn's hidden field there are up to the last trivial one."""
        return int(self.full_trivial.max(initial=0)) + 1
