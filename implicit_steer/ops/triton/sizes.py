"""The sizes that the kernels are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass

SAMPLES = 16  # that layers.py makes at a time
_LEAST = 16  # rows and columns of a product on tensor cores
FRAME_KINDS = {"none": 0, "zonal": 1, "regular planar": 2, "planar": 3}  # of frames


def next_power_of_2(n: int, least: int = 1) -> int:
    """The extent of a block that holds n entries: the least power of two >= n and >= ``least``. What is beyond n is
    padding: masked, or 0."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def cdiv(n: int, size: int) -> int:
    """How many blocks of ``size`` hold n entries. The function of this name in triton takes as long as a launch."""
    return -(-n // size)


@dataclass(frozen=True)
class Sizes:
    """The integers and flags of a plan that kernels take as constants: plans of equal sizes share binaries."""

    kind: int  # of the frame, one of FRAME_KINDS
    dim: int  # of the positions
    n_attributes: int
    n_inputs: int  # of the first layer, without the constant one of regular frames
    regular: bool  # whether coefficients of order >= 1 are divided by the radius
    channels: int
    n_zero: int  # hidden coefficients of order 0 (all where the frame is not regular), times channels
    n_rest: int  # the other hidden coefficients, times channels
    n_columns: int  # of r
    n_samples: int  # times channels
    n_layers: int
    n_knots: int  # of a table of splines that stand in place of the hidden layers; 0 without
    n_types: int  # rows of attributes that the table has splines for
    bounded: bool  # as in plan.Table
    even: bool
    n_harmonics: int  # of q, without the constant q₀ = 1
    function: int  # index in plan.FUNCTIONS
    in_size: int  # columns of x
    out_size: int  # columns of the output
    n_t: int  # entries of T per node
    # extents of the accumulator that a program holds
    slots: int
    fields: int
    columns: int
    components: int  # of the input fields that a program reads at a time
    most_components: int  # of an input field, rounded up to a multiple of `components`
    n_accumulators: int
    n_slices: int  # of x
    n_covered: int  # columns of x that the couplings read
    has_cutoff: bool
    edge_by_edge: bool  # whether edges.py makes r, else frame.py and layers.py do

    @property
    def widths(self) -> dict[str, int]:
        """Constants of layers.py: numbers N of inputs, of coefficients of order 0 and of the others, and the extents B
        of the blocks that hold them; NU: samples times channels, in whole tiles."""
        return {
            "NI": self.n_inputs,
            "BI": next_power_of_2(self.n_inputs, _LEAST),
            "N0": self.n_zero,
            "B0": next_power_of_2(self.n_zero, _LEAST),
            "N1": self.n_rest,
            "B1": next_power_of_2(self.n_rest, _LEAST),
            "NU": -(-self.n_samples // SAMPLES) * SAMPLES,
        }

    @property
    def coefficients(self) -> int:
        """Of a channel."""
        return (self.n_zero + self.n_rest) // self.channels

    @property
    def n_rows(self) -> int:
        """Coefficients of each spline of all types."""
        return self.n_types * (self.n_knots + 3)

    @property
    def n_weights(self) -> int:
        """Packed weights of all hidden layers, or coefficients of the splines in their place."""
        if self.n_knots:
            return self.n_rows * (self.n_columns - 1)
        if not self.edge_by_edge:
            return self.layer_offsets()[-1][0]
        first = (self.n_inputs + self.coefficients) * self.channels
        return first + (self.n_layers - 1) * (self.coefficients * self.channels + 1) * self.channels

    @property
    def gradient_shape(self) -> tuple[int, int, int]:
        """Of the gradients of all hidden layers' weights as edges.py leads to them: layers, a layer's inputs and behind
        them 1, its coefficients w NC + c."""
        n_z = self.channels * self.coefficients
        return self.n_layers, max(self.n_inputs, n_z) + 1, n_z

    @property
    def n_gradients(self) -> int:
        """Gradients of all hidden layers' packed weights, as the kernels lead to them."""
        return math.prod(self.gradient_shape) if self.edge_by_edge else self.n_weights

    def layer_offsets(self) -> list[tuple[int, int]]:
        """Where each layer's weights and inverse start, as layers.py reads them; one more for the ends."""
        k = self.widths
        found = [(0, 0)]
        for n in range(self.n_layers):
            rows = k["BI"] + 1 + self.regular if n == 0 else k["B0"] + k["B1"] * self.regular + 1
            weights, inverse = found[-1]
            found.append((weights + rows * k["NU"], inverse + k["NU"] * (k["B0"] + k["B1"] * self.regular)))
        return found
