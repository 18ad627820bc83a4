"""The sizes that the kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {"none": 0, "zonal": 1, "regular planar": 2, "planar": 3}  # of frames


def next_power_of_2(n: int, least: int = 1) -> int:
    """The extent of a block that holds n entries: the least power of two >= n and >= ``least``. What is beyond n is
    padding: masked, or 0."""
    return max(least, 1 << max(n - 1, 0).bit_length())


@dataclass(frozen=True)
class Sizes:
    """The integers and flags of a plan that kernels take as constants: plans of equal sizes share binaries."""

    kind: int  # of the frame, one of KINDS
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
