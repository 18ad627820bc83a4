"""Products of a feature with itself, channel by channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._check import require
from ..layers._modules import NoTorchScript
from ..layers.fields import check_dtype, check_features, fields_of
from ..lowering.so3 import clebsch_gordan
from ..plan.frozen import components
from ..plan.irreps import Irrep, Irreps, Term, check_same_group
from ..plan.packing import Constants
from .linear import Linear

_MOST_COMPONENTS = 64  # of a channel: its 2080 products then have a matrix of 2080² values at most


class TensorSquare(NoTorchScript, torch.nn.Module):
    """y = Linear(⊕ c C_l(x_l₁[u], x_l₂[u])): the products of every two irreps of a channel u, mixed over the channels.

    C_l are the Clebsch-Gordan coefficients, one product for each pair of irreps and each l of ``irreps_out`` with
    |l₁ − l₂| ≤ l ≤ l₁ + l₂ and parity p₁ p₂; of a pair of equal irreps those of even l₁ + l₂ + l, the others being 0.
    This is e3nn's product "uuu" of x with itself, and the second order of MACE's products. c keeps unit variance:
    E[(c C_l(x, x))²] = 1 for standard normal x. Equivariant to rounding, and a polynomial, so that it has all
    derivatives.

    Args:
        irreps_in: the irreps of x, as many copies of each; the u-th copies are channel u, of at most 64 components.
        irreps_out: the irreps of y. One that no product reaches gets 0.

    Attributes:
        linear: the :class:`Linear`, without a bias.

    Shape: x (N, irreps_in.size), y (N, irreps_out.size); 16-bit features are computed in the dtype of the weights.

    Raises:
        ValueError: a term that is no irrep; irreps of different groups; different numbers of copies; no product that
            reaches ``irreps_out``.

    Example:
        >>> TensorSquare("8x0e + 8x1o", "8x0e + 8x1o + 8x2e")(torch.randn(10, 32)).shape
        torch.Size([10, 72])

    Source: Batatia et al., *MACE: Higher Order Equivariant Message Passing Neural Networks for Fast and Accurate Force
    Fields*, NeurIPS 2022, equation 10 for ν = 2.
    """

    def __init__(self, irreps_in: Any, irreps_out: Any) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = Irreps.of(irreps_in, "irreps_in"), Irreps.of(irreps_out, "irreps_out")
        check_same_group(irreps_in=self.irreps_in, irreps_out=self.irreps_out)
        self.in_type, self.out_type = fields_of(self.irreps_in), fields_of(self.irreps_out)
        fields = self.irreps_in.fields
        copies, size = {len(starts) for starts in fields.values()}, sum(irrep.size for irrep in fields)
        given = repr(str(self.irreps_in))
        require(len(copies) == 1, "irreps_in", "as many copies of each irrep", given)
        expected = f"at most {_MOST_COMPONENTS} components in a channel"
        require(size <= _MOST_COMPONENTS, "irreps_in", expected, f"{size} of {given}")
        self._sizes = copies.pop(), size
        found = _products(list(fields), set(self.irreps_out.fields))
        got = f"{given} with {str(self.irreps_out)!r}"
        require(len(found) > 0, "irreps_out", "an irrep that products of irreps_in reach", got)
        of_channel = tuple(Term(1, product.irrep) for product in found)
        self.linear = Linear(Irreps(of_channel * self._sizes[0]), self.irreps_out, bias=False)
        columns = [components(np.array(starts), irrep.size).reshape(-1, irrep.size) for irrep, starts in fields.items()]
        matrix = np.concatenate([product.matrix for product in found], 1)
        self._constants = Constants(np.concatenate(columns, 1).reshape(-1), *np.triu_indices(size), matrix)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {"irreps_in": str(self.irreps_in), "irreps_out": str(self.irreps_out)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, irreps_in.size) → (N, irreps_out.size)."""
        check_features(x, self.irreps_in.size)
        check_dtype("x", x, self.linear.weights.dtype)
        given, x = x.dtype, x.to(self.linear.weights.dtype)
        read, first, second, matrix = self._constants.like(x)
        channels = x.index_select(1, read).unflatten(1, self._sizes)
        products = channels.index_select(2, first) * channels.index_select(2, second)  # [N, channels, pairs]
        return self.linear((products @ matrix).flatten(1)).to(given)

    def extra_repr(self) -> str:
        """What distinguishes this product."""
        return f"{self.irreps_in} -> {self.irreps_out}"


class _Product(NamedTuple):
    """One irrep in the product of a channel with itself: which, and its components as sums over the pairs a ≤ b of
    components of the channel, (pairs, irrep.size)."""

    irrep: Irrep
    matrix: NDArray[Any]


def _products(irreps: list[Irrep], wanted: set[Irrep]) -> list[_Product]:
    """All of a channel with one copy of each of ``irreps`` whose irrep is ``wanted``."""
    ends = np.cumsum([irrep.size for irrep in irreps])
    first, second = np.triu_indices(ends[-1])
    found = []
    for j, right in enumerate(irreps):
        for i, left in enumerate(irreps[: j + 1]):
            for degree in range(abs(left.degree - right.degree), left.degree + right.degree + 1):
                irrep = Irrep(degree, left.parity * right.parity)
                antisymmetric = i == j and (2 * left.degree + degree) % 2
                if antisymmetric or irrep not in wanted:
                    continue
                tensor = np.zeros((ends[-1], ends[-1], irrep.size))
                places = (slice(ends[n] - irreps[n].size, ends[n]) for n in (i, j))
                tensor[tuple(places)] = clebsch_gordan(left.degree, right.degree, degree)
                both = tensor + tensor.transpose(1, 0, 2)  # of x_a x_b and x_b x_a, which for a = b are one
                matrix = both[first, second] * np.where(first == second, 0.5, 1.0)[:, None]
                found.append(_Product(irrep, matrix / _deviation(matrix, first == second)))
    return found


def _deviation(matrix: NDArray[Any], squares: NDArray[Any]) -> float:
    """√E[y²] of the components y = Σ x_a x_b ``matrix``[(a, b)] for standard normal x, the same for all components of
    one irrep; ``squares``: where a = b."""
    of_squares = matrix[squares]
    variance = (matrix**2).sum() + (of_squares**2).sum() + (of_squares.sum(0) ** 2).sum()
    return float(np.sqrt(variance / matrix.shape[1]))
