"""Steerable convolution on pixel and voxel grids with an implicit kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import require
from .kernel import BiasedModule, ImplicitKernel, check_tensor, check_type

_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def kernel_grid(kernel_size: int, dim: int) -> Tensor:
    """(kernel_size^dim, dim) centred positions in [−1, 1]^dim; coordinate n runs along spatial axis n."""
    axis = torch.arange(kernel_size) - kernel_size // 2
    grid = torch.stack(torch.meshgrid(*[axis] * dim, indexing="ij"), dim=-1)
    return grid.reshape(-1, dim).to(torch.get_default_dtype()) / max(kernel_size // 2, 1)


class ImplicitConv(BiasedModule):
    """out(p) = bias + Σ_t K(x_t, a) f(p + t), the kernel evaluated on the points x_t of a grid in 2 or 3 dimensions.

    Coordinate n of a position, and so of a vector field, runs along spatial axis n of the tensor (the authors'
    convention; escnn's own ``GeometricTensor.transform`` takes the last axis as x and the one before as −y).

    Args:
        in_type, out_type: field types on one gspace; its dimension is the grid's.
        kernel_attr_type: fields of global attributes (one row per sample), or None.
        kernel_size: points along each axis.
        n_layers, n_channels, init_scheme, sampling, norm, activation: the kernel's MLP, see :class:`ImplicitKernel`.
        padding, stride, dilation: as in ``torch.nn.Conv2d``; one integer for every axis.
        padding_mode: ``"zeros" | "reflect" | "replicate" | "circular"``.

    Source: Zhdanov, Hoffmann, Cesa, NeurIPS 2023, section 3.4.
    """

    def __init__(
        self,
        in_type: FieldType,
        out_type: FieldType,
        kernel_attr_type: FieldType | None,
        kernel_size: int,
        n_layers: int,
        n_channels: int,
        init_scheme: str = "he",
        padding: int = 0,
        stride: int = 1,
        dilation: int = 1,
        padding_mode: str = "zeros",
        *,
        sampling: str = "auto",
        norm: str | None = "batch",
        activation: str = "elu",
    ):
        super().__init__()
        check_type("in_type", in_type)
        check_type("out_type", out_type, in_type.gspace)
        require(in_type.gspace == out_type.gspace, "out_type", f"fields on {in_type.gspace}", out_type.gspace)
        lowest = {"kernel_size": 1, "padding": 0, "stride": 1, "dilation": 1}
        for name, value in zip(lowest, (kernel_size, padding, stride, dilation), strict=True):
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= lowest[name]
            require(ok, name, f"an integer >= {lowest[name]}", repr(value))
        require(padding_mode in _PADDING_MODES, "padding_mode", f"one of {list(_PADDING_MODES)}", repr(padding_mode))
        self.in_type, self.out_type, self.kernel_attr_type = in_type, out_type, kernel_attr_type
        self.kernel_size, self.padding, self.stride, self.dilation = kernel_size, padding, stride, dilation
        self.padding_mode, self.dim = padding_mode, in_type.gspace.dimensionality
        self._register_bias(out_type)
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
        )
        ok = kernel_size > 1 or kernel_attr_type is not None or not self.implicit_kernel.plan.norms
        remedy = "The statistics of one point have no variance: use norm=None."
        require(ok, "kernel_size", "at least 2 with norm='batch' and no attributes", kernel_size, remedy)
        self.implicit_kernel.prepare_values()
        self.register_buffer("grid", kernel_grid(kernel_size, self.dim), persistent=False)

    def filters(self, attr: Tensor | None = None) -> Tensor:
        """(R, C_out, C_in, kernel_size, …): one filter per row of ``attr`` (R, A); R = 1 without attributes.

        Without attributes the points are always the same, so batch norms use their statistics in both modes, as the
        authors' module does.
        """
        rows, batch_statistics = 1, True
        pos = self.grid.to(self.implicit_kernel.shell_width.dtype)
        n = self.implicit_kernel.plan.frame.n_attributes
        expected, got = f"a tensor of {n} attributes per sample" if n else "None", type(attr).__name__
        remedy = "A layer takes attributes exactly if it was built with an attribute type."
        require((attr is None) == (n == 0), "attr", expected, got, remedy)
        if attr is not None:
            width = self.implicit_kernel.shell_width
            check_tensor("attr", attr, (None, n), width.dtype, width.device)
            rows, batch_statistics = len(attr), None
            attr = attr.repeat_interleave(len(pos), dim=0)
        k = self.implicit_kernel(pos.repeat(rows, 1), attr, batch_statistics=batch_statistics)
        k = k.view(rows, -1, *k.shape[1:]).permute(0, 2, 3, 1)
        return k.reshape(*k.shape[:3], *[self.kernel_size] * self.dim)

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
        width = self.implicit_kernel.shell_width
        check_tensor("x", x.tensor, (None, self.in_type.size, *[None] * self.dim), width.dtype, width.device)
        batch = len(x.tensor)
        if attr is not None:
            require(
                isinstance(attr, Tensor) and attr.dim() == 2 and len(attr) in (1, batch),
                "attr",
                f"1 or {batch} rows (one per sample)",
                tuple(getattr(attr, "shape", ())),
            )
        filters = self.filters(attr).to(x.tensor.dtype)
        values, padding = x.tensor, self.padding
        if self.padding_mode != "zeros":
            values = F.pad(values, [self.padding] * (2 * self.dim), mode=_PADDING_MODES[self.padding_mode])
            padding = 0
        conv = F.conv2d if self.dim == 2 else F.conv3d
        groups = len(filters)
        if groups > 1:  # a filter per sample: the samples become groups of one convolution
            values = values.reshape(1, batch * self.in_type.size, *values.shape[2:])
        out = conv(
            values, filters.flatten(0, 1), stride=self.stride, padding=padding, dilation=self.dilation, groups=groups
        )
        out = out.view(batch, self.out_type.size, *out.shape[2:])
        bias = self.expand_bias()
        if bias is not None:
            out = out + bias.to(out.dtype).view(-1, *[1] * self.dim)
        return GeometricTensor(out, self.out_type)

    def extra_repr(self) -> str:
        """What distinguishes this layer."""
        return (
            f"{self.in_type} -> {self.out_type}, kernel_size={self.kernel_size}, padding={self.padding}, "
            f"stride={self.stride}, dilation={self.dilation}, padding_mode={self.padding_mode!r}"
        )
