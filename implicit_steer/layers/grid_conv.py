"""The convolution on pixel and voxel grids, on plain tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .._check import require, require_integer
from .fields import Fields, check_tensor
from .kernel import Biased, KernelBase

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


class GridConvBase(Biased):
    """out(p) = bias + Σ_t K(x_t, a) f(p + t), the kernel evaluated on the points x_t of a grid, on tensors.

    A subclass sets ``implicit_kernel``, the buffer ``grid`` (kernel_size^dim, dim), and the sizes and options below;
    ``moved_axes``: along which axes of the tensor the group moves points.
    """

    grid: Tensor
    dim: int
    kernel_size: int
    padding: int
    stride: int
    dilation: int
    padding_mode: str
    moved_axes: tuple[bool, ...] | None = None  # None: all
    _off_centre: frozenset[int] = frozenset()  # sizes that a warning has named

    def explain(self) -> str:
        """Group, sampling, frame, costs, and what evaluates the kernel at the grid's points."""
        return self.implicit_kernel.explain()

    def filters(self, attr: Tensor | None = None) -> Tensor:
        """(R, C_out, C_in, kernel_size, …): one filter per row of ``attr`` (R, A); R = 1 without attributes.

        Without attributes the points are always the same, so batch norms use the statistics of these points in both
        modes, as in the authors' module.
        """
        rows = 1
        batch_statistics: bool | None = True
        pos = self.grid.to(self.implicit_kernel.shell_width.dtype)
        n = self.implicit_kernel.n_attributes
        expected, got = f"a tensor of {n} attributes per sample" if n else "None", type(attr).__name__
        remedy = "A layer takes attributes exactly if it was built with an attribute type."
        require((attr is None) == (n == 0), "attr", expected, got, remedy)
        if attr is not None:
            width = self.implicit_kernel.shell_width
            check_tensor("attr", attr, (None, n), width.dtype, width.device)
            rows, batch_statistics = attr.shape[0], None
            attr = attr.repeat_interleave(len(pos), dim=0)
        k = self.implicit_kernel(pos.repeat(rows, 1), attr, batch_statistics=batch_statistics)
        k = k.view(rows, -1, *k.shape[1:]).permute(0, 2, 3, 1)
        return k.reshape(*k.shape[:3], *[self.kernel_size] * self.dim)

    def _span(self) -> int:
        """How many points of an axis one sample of the output covers, less the padding on both sides."""
        return self.dilation * (self.kernel_size - 1) + 1 - 2 * self.padding

    def output_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Y_1, …, Y_dim of X_1, …, X_dim."""
        return [(n - self._span()) // self.stride + 1 for n in sizes]

    def _warn_off_centre(self, sizes: torch.Size) -> None:
        """Warn, once for every size, where the output's samples are not centred in the input, as equivariance needs
        them. They are if the last one covers the last point of the padded axis."""
        moved = self.moved_axes or (True,) * self.dim
        for n, is_moved in zip(sizes, moved, strict=True):
            rest = (n - self._span()) % self.stride
            if is_moved and rest and n not in self._off_centre:
                self._off_centre |= {n}
                near = ", ".join(str(m) for m in (n - rest, n - rest + self.stride) if m > 0)
                warnings.warn(
                    f"x: the samples of an axis of {n} points are off its centre (stride {self.stride}, kernel_size "
                    f"{self.kernel_size}, padding {self.padding}, dilation {self.dilation}), so that the layer is not "
                    f"equivariant. Sizes n with (n + 2 padding - dilation (kernel_size - 1) - 1) a multiple of stride "
                    f"keep it: {near}.",
                    stacklevel=6,  # the call of the layer
                )

    def _evaluate(self, x: Tensor, attr: Tensor | None) -> Tensor:
        """(B, C_in, X_1, …, X_dim) → (B, C_out, Y_1, …, Y_dim)."""
        width = self.implicit_kernel.shell_width
        check_tensor("x", x, (None, self.in_type.size, *[None] * self.dim), width.dtype, width.device)
        batch = x.shape[0]
        if self.stride > 1 and not torch.compiler.is_compiling():
            self._warn_off_centre(x.shape[2:])
        if attr is not None:
            require(
                isinstance(attr, Tensor) and attr.dim() == 2 and attr.shape[0] in (1, batch),
                "attr",
                f"1 or {batch} rows (one per sample)",
                tuple(getattr(attr, "shape", ())),
            )
        filters = self.filters(attr).to(x.dtype)
        values, padding = x, self.padding
        if self.padding_mode != "zeros":
            values = F.pad(values, [self.padding] * (2 * self.dim), mode=PADDING_MODES[self.padding_mode])
            padding = 0
        conv = F.conv2d if self.dim == 2 else F.conv3d
        groups = filters.shape[0]
        if groups > 1:  # a filter per sample: the samples become groups of one convolution
            values = values.reshape(1, batch * self.in_type.size, *values.shape[2:])
        out = conv(
            values, filters.flatten(0, 1), stride=self.stride, padding=padding, dilation=self.dilation, groups=groups
        )
        out = out.view(batch, self.out_type.size, *out.shape[2:])
        bias = self.expand_bias()
        return out if bias is None else out + bias.to(out.dtype).view(-1, *[1] * self.dim)

    def extra_repr(self) -> str:
        """What distinguishes this layer."""
        return (
            f"{self.in_type} -> {self.out_type}, kernel_size={self.kernel_size}, padding={self.padding}, "
            f"stride={self.stride}, dilation={self.dilation}, padding_mode={self.padding_mode!r}"
        )


class ImplicitConv(GridConvBase):
    """out(p) = bias + Σ_t K(x_t, a) f(p + t) without escnn: (B, C_in, X_1, …) → (B, C_out, Y_1, …), plain tensors.

    Args:
        in_type, out_type: sizes and names of the features.
        implicit_kernel: K.
        grid: (kernel_size^dim, dim) the points x_t, the kernel's last axis running fastest.
        padding, stride, dilation, padding_mode: as in :class:`implicit_steer.nn.ImplicitConv`.
        n_bias: how many learned values the bias has.
        moved_axes: along which axes of the tensor the group moves points; None: all.
    """

    def __init__(
        self,
        in_type: Fields,
        out_type: Fields,
        implicit_kernel: KernelBase,
        grid: NDArray[Any],
        padding: int,
        stride: int,
        dilation: int,
        padding_mode: str,
        n_bias: int,
        moved_axes: tuple[bool, ...] | None = None,
    ) -> None:
        super().__init__()
        require(padding_mode in PADDING_MODES, "padding_mode", f"one of {list(PADDING_MODES)}", repr(padding_mode))
        require(grid.ndim == 2 and grid.shape[1] in (2, 3), "grid", "points in 2 or 3 dimensions", grid.shape)
        for name, value, least in (("padding", padding, 0), ("stride", stride, 1), ("dilation", dilation, 1)):
            require_integer(name, value, least)
        self.in_type, self.out_type = in_type, out_type
        self.padding, self.stride, self.dilation, self.padding_mode = padding, stride, dilation, padding_mode
        self.dim, self.moved_axes = grid.shape[1], moved_axes
        right = moved_axes is None or len(moved_axes) == self.dim
        require(right, "moved_axes", f"{self.dim} truth values or None", moved_axes)
        self.kernel_size = round(len(grid) ** (1 / self.dim))
        require(
            self.kernel_size**self.dim == len(grid), "grid", f"a cube of {self.dim} dimensions", f"{len(grid)} points"
        )
        position = implicit_kernel.plan.frame.dim
        require(position == self.dim, "implicit_kernel", f"positions in {self.dim} dimensions", position)
        self._set_bias(torch.zeros(out_type.size, n_bias))
        self.implicit_kernel = implicit_kernel
        self._check_sizes(out_type)
        implicit_kernel.prepare_values()
        self.set_exact("grid", torch.tensor(grid), torch.float64, persistent=False)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        names = ("in_type", "out_type", "implicit_kernel", "padding", "stride", "dilation", "padding_mode", "n_bias")
        given = {name: getattr(self, name) for name in (*names, "moved_axes")}
        return given | {"grid": self.exact("grid").numpy()}

    def forward(self, x: Tensor, attr: Tensor | None = None) -> Tensor:
        """Convolve x (B, C_in, X_1, …); attr: (B, A) one row per sample, (1, A) for all, None without attributes."""
        return self._evaluate(x, attr)
