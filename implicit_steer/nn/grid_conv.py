"""Steerable convolution on pixel and voxel grids with an implicit kernel."""

from __future__ import annotations

import warnings

import torch
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import require, require_integer
from ..layers.grid_conv import PADDING_MODES, GridConvBase
from .building import built_by_escnn
from .kernel import CheckedBias, ImplicitKernel, check_type, trivial_bias

AXES = ("authors", "escnn")


def kernel_grid(kernel_size: int, dim: int, axes: str = "authors") -> Tensor:
    """(kernel_size^dim, dim), float64: positions in [−1, 1]^dim of a kernel's points, the last axis fastest; ``axes``:
    see :class:`ImplicitConv`."""
    centre = kernel_size // 2 if axes == "authors" else (kernel_size - 1) / 2
    along = (torch.arange(kernel_size, dtype=torch.float64) - centre) / max(centre, 1 if axes == "authors" else 0.5)
    grid = torch.stack(torch.meshgrid(*[along] * dim, indexing="ij"), dim=-1).reshape(-1, dim)
    if axes == "escnn":
        grid = grid.flip(1) * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)[:dim]
    return grid


class ImplicitConv(CheckedBias, GridConvBase):
    """out(p) = bias + Σ_t K(x_t, a) f(p + t), the kernel evaluated on the points x_t of a grid in 2 or 3 dimensions.

    Args:
        in_type, out_type: field types on one gspace; its dimension is the grid's.
        kernel_attr_type: fields of global attributes (one row per sample), or None.
        kernel_size: points along each axis; with the authors' axes odd: their even grid is half a point off its centre,
            so that the layer is not equivariant, and warns.
        n_layers, n_channels, init_scheme, sampling, norm, activation: the kernel's MLP, see :class:`ImplicitKernel`.
        padding, stride, dilation: as in ``torch.nn.Conv2d``; one integer for every axis.
        padding_mode: ``"zeros" | "reflect" | "replicate" | "circular"``.
        axes: how the coordinates of positions, and so of vector fields, lie in the tensor. "authors": coordinate n
            along spatial axis n. "escnn": x along the last axis, y and z against the ones before, as in escnn's
            ``R2Conv``, ``R3Conv`` and ``GeometricTensor.transform``. Layers of one network must agree: each is
            equivariant, together they are not where reflections or rotations change the fields between them.
        width: σ of the shell exp(−½ (r / σ)²) at first; the kernel's points reach from −1 to 1.
        bias: whether a learned constant is added to the invariants of the output.

    Source: Zhdanov, Hoffmann, Cesa, NeurIPS 2023, section 3.4.
    """

    @built_by_escnn
    def __init__(
        self,
        in_type: FieldType,
        out_type: FieldType,
        kernel_attr_type: FieldType | None = None,
        kernel_size: int = 3,
        n_layers: int = 3,
        n_channels: int = 8,
        init_scheme: str = "he",
        padding: int = 0,
        stride: int = 1,
        dilation: int = 1,
        padding_mode: str = "zeros",
        *,
        sampling: str = "auto",
        norm: str | None = "batch",
        activation: str = "elu",
        axes: str = "authors",
        width: float = 0.5,
        bias: bool = True,
    ):
        super().__init__()
        check_type("in_type", in_type)
        check_type("out_type", out_type, in_type.gspace)
        require(in_type.gspace == out_type.gspace, "out_type", f"fields on {in_type.gspace}", out_type.gspace)
        lowest = {"kernel_size": 1, "padding": 0, "stride": 1, "dilation": 1}
        for name, value in zip(lowest, (kernel_size, padding, stride, dilation), strict=True):
            require_integer(name, value, lowest[name])
        require(padding_mode in PADDING_MODES, "padding_mode", f"one of {list(PADDING_MODES)}", repr(padding_mode))
        require(axes in AXES, "axes", f"one of {list(AXES)}", repr(axes))
        if kernel_size % 2 == 0 and axes == "authors":
            off_centre = "the points of an even grid are off its centre, so that the layer is not equivariant"
            warnings.warn(f"kernel_size: {kernel_size}: {off_centre}. Use an odd one, or axes='escnn'.", stacklevel=2)
        self.in_type, self.out_type, self.kernel_attr_type = in_type, out_type, kernel_attr_type
        self.kernel_size, self.padding, self.stride, self.dilation = kernel_size, padding, stride, dilation
        self.padding_mode, self.dim = padding_mode, in_type.gspace.dimensionality
        self._set_bias(trivial_bias(out_type, bias))
        self.implicit_kernel = ImplicitKernel(
            in_type,
            out_type,
            kernel_attr_type,
            n_layers,
            n_channels,
            init_scheme,
            sampling=sampling,
            norm=norm,
            activation=activation,
            width=width,
        )
        ok = kernel_size > 1 or kernel_attr_type is not None or not self.implicit_kernel.plan.norms
        remedy = "The statistics of one point have no variance: use norm=None."
        require(ok, "kernel_size", "at least 2 with norm='batch' and no attributes", kernel_size, remedy)
        self.implicit_kernel.prepare_values()
        self.set_exact("grid", kernel_grid(kernel_size, self.dim, axes), persistent=False)

    def forward(self, x: GeometricTensor, attr: Tensor | None = None) -> GeometricTensor:
        """Convolve.

        Args:
            x: features of ``in_type``, (B, C_in, X_1, …, X_dim).
            attr: (B, A) one row per sample, or (1, A) for all; None if the layer has no attribute type.

        Returns:
            (B, C_out, Y_1, …, Y_dim) of ``out_type``.
        """
        ok = isinstance(x, GeometricTensor) and x.type == self.in_type
        got = x.type if isinstance(x, GeometricTensor) else type(x).__name__
        require(ok, "x", f"a GeometricTensor of type {self.in_type}", got, "Wrap it: in_type(tensor).", TypeError)
        return GeometricTensor(self._evaluate(x.tensor, attr), self.out_type)
