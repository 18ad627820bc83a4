"""Steerable convolution on pixel and voxel grids with an implicit kernel."""

from __future__ import annotations

import warnings
from itertools import permutations, product

import numpy as np
import torch
from escnn.group import O3, SO3, GroupElement
from escnn.gspaces import GSpace
from escnn.nn import FieldType, GeometricTensor
from torch import Tensor

from .._check import require, require_integer
from ..layers.grid_conv import PADDING_MODES, GridConvBase
from ..lowering.sampling import equispaced
from .building import built_by_escnn
from .equivariant import ELEMENTS, Errors, Steerable, check_shape, check_type, compare, like, transform
from .kernel import CheckedBias, ImplicitKernel, trivial_bias

AXES = ("authors", "escnn")


def grid_elements(gspace: GSpace) -> list[GroupElement]:
    """The group's elements that map a cubic grid to itself: its actions that are signed permutation matrices."""
    group = gspace.fibergroup
    if isinstance(group, SO3 | O3):
        turns = [np.eye(3)[list(p)] * signs for p in permutations(range(3)) for signs in product((1, -1), repeat=3)]
        matrices = [m for m in turns if np.linalg.det(m) > 0]
        if isinstance(group, SO3):
            return [group.element(m, "MAT") for m in matrices]
        return [group.element((flip, m), "MAT") for flip in (0, 1) for m in matrices]
    candidates = equispaced(group, 4) if group.continuous else list(group.elements)
    return [g for g in candidates if np.allclose(np.abs(gspace.basespace_action(g)).round(9) % 1, 0)]


def moved_axes(gspace: GSpace, axes: str) -> tuple[bool, ...]:
    """Along which axes of the tensor the group moves points."""
    group, dim = gspace.fibergroup, gspace.dimensionality
    if isinstance(group, SO3 | O3):
        return (True,) * dim
    elements = equispaced(group, 3) if group.continuous else group.elements
    fixed = np.all([np.diag(gspace.basespace_action(g)) > 1 - 1e-6 for g in elements], axis=0)
    return tuple(bool(moved) for moved in (~fixed if axes == "authors" else ~fixed[::-1]))


def kernel_grid(kernel_size: int, dim: int, axes: str = "authors") -> Tensor:
    """(kernel_size^dim, dim), float64: positions in [−1, 1]^dim of a kernel's points, the last axis fastest; ``axes``:
    see :class:`ImplicitConv`."""
    centre = kernel_size // 2 if axes == "authors" else (kernel_size - 1) / 2
    along = (torch.arange(kernel_size, dtype=torch.float64) - centre) / max(centre, 1 if axes == "authors" else 0.5)
    return _cube(along, dim, axes)


def _cube(along: Tensor, dim: int, axes: str) -> Tensor:
    """(n^dim, dim) points whose coordinates are ``along`` (n,), in the order of the tensor's axes."""
    grid = torch.stack(torch.meshgrid(*[along] * dim, indexing="ij"), dim=-1).reshape(-1, dim)
    return grid.flip(1) * along.new_tensor([1.0, -1.0, -1.0])[:dim] if axes == "escnn" else grid


class ImplicitConv(CheckedBias, GridConvBase, Steerable):
    """out(p) = bias + Σ_t K(x_t, a) f(p + t), the kernel evaluated on the points x_t of a grid in 2 or 3 dimensions.

    Args:
        in_type, out_type: field types on one gspace; its dimension is the grid's.
        kernel_attr_type: fields of global attributes (one row per sample), or None.
        kernel_size: points along each axis. With the authors' axes take an odd one: an even grid is half a point off
            its centre there, so that the layer warns that it is not equivariant.
        n_layers, n_channels, init_scheme, sampling, norm, activation: the kernel's MLP, see :class:`ImplicitKernel`.
        padding, stride, dilation: as in ``torch.nn.Conv2d``; one integer for every axis.
        padding_mode: ``"zeros" | "reflect" | "replicate" | "circular"``.
        axes: how the coordinates of positions, and so of vector fields, lie in the tensor. "authors": coordinate n
            along spatial axis n. "escnn": x along the last axis, y and z against the ones before, as in escnn's
            ``R2Conv``, ``R3Conv`` and ``GeometricTensor.transform``. Layers of one network must agree: each is
            equivariant, together they are not where reflections or rotations change the fields between them.
        width: initial σ of the shell exp(−½ (r / σ)²); the kernel's points reach from −1 to 1.
        bias: whether a learned constant is added to the invariants of the output.

    Raises:
        ValueError, TypeError: a wrong argument; the message names it, what was expected and what came.

    Example:
        >>> gs = escnn.gspaces.flipRot2dOnR2()
        >>> scalars, vectors = gs.type(*[gs.trivial_repr] * 3), gs.type(*[gs.irrep(1, 1)] * 4)
        >>> conv = ImplicitConv(scalars, vectors, kernel_size=5, padding=2)
        >>> conv(scalars(torch.randn(2, 3, 32, 32))).shape
        torch.Size([2, 8, 32, 32])

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
        self.axes, self.moved_axes = axes, moved_axes(in_type.gspace, axes)
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

    def evaluate_output_shape(self, input_shape: tuple) -> tuple:
        """(B, C_in, X_1, …, X_dim) → (B, C_out, Y_1, …, Y_dim)."""
        batch, _, *sizes = check_shape(input_shape, self.in_type)
        require(len(sizes) == self.dim, "input_shape", f"{self.dim} sizes after the channels", tuple(input_shape))
        return batch, self.out_type.size, *self.output_sizes(sizes)

    def check_equivariance(self, atol: float = 1e-4, rtol: float = 1e-4) -> Errors:
        """Compare f(g x) with g f(x) for random features x on a cubic grid, in evaluation mode, where g is one of at
        most 10 random elements of the group that map the grid to itself: rotations by 90°, reflections of axes. Other
        elements would interpolate pixels, and the error would not be the layer's.

        Returns:
            [(g, relative error)], in the norm over all features.

        Raises:
            AssertionError: a value differs by more than ``atol + rtol · |value|``.
        """
        return super().check_equivariance(atol, rtol)

    def _check(self, atol: float, rtol: float) -> Errors:
        size = self._span()
        while size < max(self.kernel_size, self.padding + 1):
            size += self.stride
        x = torch.randn(2, self.in_type.size, *[size] * self.dim, **like(self))
        kind, attr = self.kernel_attr_type, None
        if kind is not None:
            attr = torch.randn(2, kind.size, **like(self))
        expected = self(self.in_type(x), attr).tensor

        def pair(g: GroupElement) -> tuple[Tensor, Tensor]:
            turned = None if attr is None else transform(attr, kind, g)
            actual = self(self.in_type(self._turned(x, self.in_type, g)), turned).tensor
            return actual, self._turned(expected, self.out_type, g)

        elements = grid_elements(self.in_type.gspace)
        chosen = [elements[n] for n in torch.randperm(len(elements))[:ELEMENTS].tolist()]
        return compare(self.in_type.gspace, pair, atol, rtol, chosen)

    def _turned(self, x: Tensor, kind: FieldType, element: GroupElement) -> Tensor:
        """ρ(g) f(g⁻¹ p) for features f on a cubic grid that g maps to itself."""
        along = torch.arange(x.shape[2], dtype=torch.float64)
        points = _cube(along - along.mean(), self.dim, self.axes)
        sources = points @ torch.as_tensor(kind.gspace.basespace_action(element), dtype=points.dtype)
        index = torch.cdist(sources, points).argmin(1).to(x.device)
        return transform(x.flatten(2)[:, :, index], kind, element).view_as(x)
