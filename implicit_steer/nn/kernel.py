"""The implicit kernel K(x, a): an equivariant MLP of position and attributes, its value read as a matrix."""

from __future__ import annotations

from functools import lru_cache
from numbers import Real

import numpy as np
import torch
from escnn.group import Representation, o2_group, o3_group
from escnn.gspaces import GSpace
from escnn.nn import FieldType
from torch import Tensor

from .._check import require
from ..layers.kernel import Biased, KernelBase
from ..lowering import KernelShape, lower
from .mlp import KernelMLP, check_basis, check_sizes, fiber_space, norm_names
from .size import check_kernel


def position_representation(gspace: GSpace) -> Representation:
    """How positions transform: the space's own action, under the authors' name for it where the two agree."""
    return _named_action(gspace.basespace_action)


@lru_cache(maxsize=64)
def _named_action(action: Representation) -> Representation:
    full = o3_group() if action.size == 3 else o2_group()
    if action.group == full:
        standard = full.standard_representation()
        if all(np.allclose(standard(g), action(g)) for g in full.testing_elements()):
            return standard
    return action


@lru_cache(maxsize=1024)
def _tensor(out: Representation, into: Representation) -> Representation:
    """out ⊗ in; escnn computes it afresh at every call."""
    return out.tensor(into)


def check_type(name: str, value, gspace: GSpace | None = None) -> None:
    """Raise unless ``value`` is a FieldType (of ``gspace``'s group, if given)."""
    require(isinstance(value, FieldType), name, "an escnn FieldType", type(value).__name__, kind=TypeError)
    if gspace is not None:
        require(value.fibergroup == gspace.fibergroup, name, f"fields of {gspace.fibergroup}", value.fibergroup)


def _lower_again(kernel: ImplicitKernel, _) -> None:
    """After a checkpoint: its basis may have replaced a numerically found one."""
    kernel._set_plan(lower(kernel.mlp, kernel._shape, kernel._sampling))


class ImplicitKernel(KernelBase):
    """K(x, a) = γ exp(−½ (|x| / σ)²) · mat(MLP(x ⊕ a)), with K(gx, ρ_a(g) a) = ρ_out(g) K(x, a) ρ_in(g)⁻¹ for g in G.

    Args:
        conv_in_type, conv_out_type: fields the kernel maps between, uniform or not; dimension 2 or 3.
        kernel_attr_type: fields of the attributes, or None.
        n_layers: linear layers of the MLP; 1 gives a kernel linear in position and attributes.
        n_channels: hidden fields of the MLP.
        init_scheme: ``"he"`` or ``"deltaorthonormal"``.
        sampling: ``"auto" | "exact" | "exact-N" | "escnn" | "lebedev-N"``: how the MLP's activations are sampled.
            "exact" evaluates in the edge's own frame and is equivariant for every N; "escnn" is the authors' grid;
            "auto" is exact where it exists.
        norm: ``"batch"`` or None.
        activation: ``"elu" | "relu" | "silu" | "gelu" | "tanh"``.
        cutoff: radius beyond which the kernel is zero (smooth to second order), in the unit of the positions; or None.
        aggr: ``"sum"`` or ``"mean"``: how the convolution that it is for adds over a node's edges.

    Attributes:
        shell_width: σ, learnable, (1, 1, 1), 0.5 at first, in the unit of the positions.
        plan: the lowered :class:`~implicit_steer.plan.Plan`.

    Raises:
        ValueError, TypeError: wrong argument, naming it; fields whose kernel takes more than half of the memory, or
            more than ``$IMPLICIT_STEER_BUILD_GB``, to build, naming them.

    Example:
        >>> gs = escnn.gspaces.flipRot3dOnR3()
        >>> scalar, vector = gs.type(gs.trivial_repr), gs.type(gs.irrep(1, 1))
        >>> ImplicitKernel(scalar, vector, n_layers=2, n_channels=4)(torch.randn(10, 3)).shape
        torch.Size([10, 3, 1])

    Source: Zhdanov, Hoffmann, Cesa, *Implicit Convolutional Kernels for Steerable CNNs*, NeurIPS 2023, section 3.
    """

    def __init__(
        self,
        conv_in_type: FieldType,
        conv_out_type: FieldType,
        kernel_attr_type: FieldType | None = None,
        n_layers: int = 2,
        n_channels: int = 16,
        init_scheme: str = "he",
        *,
        sampling: str = "auto",
        norm: str | None = "batch",
        activation: str = "elu",
        cutoff: float | None = None,
        aggr: str = "sum",
    ):
        super().__init__()
        check_type("conv_in_type", conv_in_type)
        gspace = conv_in_type.gspace
        require(gspace.dimensionality in (2, 3), "conv_in_type", "a space of dimension 2 or 3", gspace.dimensionality)
        check_type("conv_out_type", conv_out_type, gspace)
        number = isinstance(cutoff, Real) and not isinstance(cutoff, bool)
        require(cutoff is None or number, "cutoff", "a positive radius or None", repr(cutoff), kind=TypeError)
        attributes = []
        if kernel_attr_type is not None:
            check_type("kernel_attr_type", kernel_attr_type, gspace)
            attributes = list(kernel_attr_type.representations)
        shape = KernelShape(list(conv_out_type.representations), list(conv_in_type.representations), cutoff, aggr)
        fiber = fiber_space(gspace.fibergroup, gspace.name)
        check_sizes(n_layers, n_channels)
        inputs = [position_representation(gspace), *attributes]
        check_kernel(shape.out_reprs, shape.in_reprs, inputs, n_layers, n_channels)
        tensor_reprs = [_tensor(out, into) for out in shape.out_reprs for into in shape.in_reprs]
        self.mlp = KernelMLP(
            fiber.type(*inputs),
            fiber.type(*tensor_reprs),
            n_layers,
            n_channels,
            init_scheme,
            norm,
            activation,
        )
        self.shell_width = torch.nn.Parameter(0.5 * torch.ones(1, 1, 1))
        self._shape, self._sampling = shape, sampling
        self._find_tensors(self.mlp.linears, [(norm, norm_names(norm)) for norm in self.mlp.norms])
        self._set_plan(lower(self.mlp, shape, sampling))
        self.register_load_state_dict_post_hook(_lower_again)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_basis(self.mlp, state_dict, prefix + "mlp.")  # before anything is copied
        super()._load_from_state_dict(state_dict, prefix, *args)


def trivial_bias(out_type: FieldType) -> Tensor:
    """(C_out, n) columns that add a constant to each trivial irrep of the output."""
    columns, start = [], 0
    for r in out_type.representations:
        position = 0
        for ident in r.irreps:
            irrep = r.group.irrep(*ident)
            if irrep.is_trivial():
                column = torch.zeros(out_type.size)
                column[start : start + r.size] = torch.tensor(r.change_of_basis[:, position], dtype=column.dtype)
                columns.append(column)
            position += irrep.size
        start += r.size
    return torch.stack(columns, 1) if columns else torch.zeros(out_type.size, 0)


class CheckedBias(Biased):
    """Holds the equivariant bias of a convolution under the authors' names (``bias``, ``bias_expansion``)."""

    _derived = ("expanded_bias", "filter")  # in checkpoints written in evaluation mode

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_basis(self.implicit_kernel.mlp, state_dict, prefix + "implicit_kernel.mlp.")  # before anything is copied
        for derived in self._derived:
            state_dict.pop(prefix + derived, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
