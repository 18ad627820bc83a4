"""The implicit kernel K(x, a): an equivariant MLP of position and attributes, whose value is read as a matrix."""

from __future__ import annotations

from functools import lru_cache
from numbers import Real

import numpy as np
import torch
from escnn.group import GroupElement, Representation, o2_group, o3_group
from escnn.gspaces import GSpace
from escnn.nn import FieldType
from scipy.linalg import block_diag
from torch import Tensor

from .._check import require
from ..layers._modules import in_mode
from ..layers.kernel import Biased, KernelBase
from ..lowering.kernel import KernelShape, lower
from ..lowering.sampling import distinct, invariants, is_orthogonal
from ..plan import Radial
from ..plan.radial import size_of
from ..plan.tabulated import with_table
from .building import built_by_escnn
from .equivariant import Errors, check_type, compare, like, transform
from .mlp import ANOTHER_BASIS, CLOSED_FORM, KernelMLP, check_basis, check_sizes, fiber_space, norm_names
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
def _matrices(out: Representation, into: Representation) -> Representation:
    """How vec K transforms, K → ρ_out K ρ_in⁻¹: by out ⊗ in*, where the dual in*(g) = in(g⁻¹)ᵀ is ``in`` itself if
    ``in`` is orthogonal. It is kept, since escnn computes it afresh at every call."""
    return out.tensor(_dual(into))


def _products(out_reprs: list[Representation], in_reprs: list[Representation]) -> list[Representation]:
    """:func:`_matrices` of every pair of fields, with the output's field slowest."""
    rows = {out: [_matrices(out, into) for into in in_reprs] for out in distinct(out_reprs)}
    return [rep for out in out_reprs for rep in rows[out]]


def _dual(rep: Representation) -> Representation:
    if is_orthogonal(rep):
        return rep
    basis, inverse = rep.change_of_basis_inv.T, rep.change_of_basis.T
    nonlinearities = sorted(rep.supported_nonlinearities)
    return Representation(rep.group, f"{rep.name}*", rep.irreps, basis, nonlinearities, change_of_basis_inv=inverse)


def _is_real(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _lower_again(kernel: ImplicitKernel, _) -> None:
    """Lower the MLP after a checkpoint, whose basis may have replaced a numerical one, or filled a module on "meta"."""
    if any(tensor.is_meta for tensor in kernel.mlp.buffers()):
        return
    plan = with_table(lower(kernel.mlp, kernel._shape, kernel._sampling), *kernel._table)
    if isinstance(kernel.mlp.in_type.fibergroup, CLOSED_FORM):
        same = np.abs(plan.fingerprint - kernel.plan.fingerprint).max(initial=0) <= 1
        require(same, "state_dict", *ANOTHER_BASIS, RuntimeError)
    kernel._set_plan(plan)


class ImplicitKernel(KernelBase):
    """K(x, a) = γ exp(−½ (|x| / σ)²) · mat(MLP(x ⊕ radial(|x|) ⊕ a)), with K(gx, ρ_a(g) a) = ρ_out(g) K(x, a) ρ_in(g)⁻¹
    for g in G.

    Args:
        conv_in_type, conv_out_type: fields the kernel maps between, uniform or not; dimension 2 or 3.
        kernel_attr_type: fields of the attributes, without the radial ones, or None.
        n_layers: linear layers of the MLP; 1 gives a kernel linear in position and attributes.
        n_channels: hidden fields of the MLP.
        init_scheme: ``"he"`` or ``"deltaorthonormal"``.
        sampling: ``"auto" | "exact" | "exact-N" | "escnn" | "lebedev-N"``: how the MLP's activations are sampled.
            "exact" evaluates in the edge's own frame and is equivariant for every N; "escnn" is the authors' grid;
            "auto" is exact where it exists.
        norm: ``"batch"`` or None. ``torch.optim.swa_utils.update_bn`` ignores these norms, as it ignores
            :class:`IIDBatchNorm1d`: use :func:`implicit_steer.nn.update_bn`.
        activation: ``"elu" | "relu" | "silu" | "gelu" | "tanh"``.
        cutoff: radius beyond which the kernel is zero (smooth to second order), in the unit of the positions; or None.
        aggr: ``"sum"`` (or PyG's word for it, ``"add"``) or ``"mean"``: how a convolution with this kernel combines the
            edges of a node.
        width: initial σ, in the unit of the positions: about the length of an edge, since the kernel of far longer
            edges is almost 0.
        table: None, a number of knots or ``"auto"``: the MLP is evaluated at so many radii and interpolated; see
            :class:`implicit_steer.irreps.ImplicitPointConv`. It requires an exact sampling and invariant attributes.
        radial: further invariants, functions of |x|: :class:`Distance`, :class:`Cosines`, :class:`Bessel`, or None.

    Attributes:
        shell_width: σ, learnable, (1, 1, 1).
        plan: the lowered :class:`~implicit_steer.plan.Plan`.

    Raises:
        ValueError, TypeError: a wrong argument, or fields whose kernel takes more than half of the memory, or more than
            ``$IMPLICIT_STEER_BUILD_GB``, to build; the message names them.

    Example:
        >>> gs = escnn.gspaces.flipRot3dOnR3()
        >>> scalar, vector = gs.type(gs.trivial_repr), gs.type(gs.irrep(1, 1))
        >>> ImplicitKernel(scalar, vector, n_layers=2, n_channels=4)(torch.randn(10, 3)).shape
        torch.Size([10, 3, 1])

    Source: Zhdanov, Hoffmann, Cesa, *Implicit Convolutional Kernels for Steerable CNNs*, NeurIPS 2023, section 3.
    """

    @built_by_escnn
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
        width: float = 0.5,
        table: int | str | None = None,
        radial: Radial | None = None,
    ):
        super().__init__()
        check_type("conv_in_type", conv_in_type)
        gspace = conv_in_type.gspace
        require(gspace.dimensionality in (2, 3), "conv_in_type", "a space of dimension 2 or 3", gspace.dimensionality)
        check_type("conv_out_type", conv_out_type, gspace)
        require(cutoff is None or _is_real(cutoff), "cutoff", "a positive radius or None", repr(cutoff), kind=TypeError)
        require(_is_real(width), "width", "a positive length", repr(width), kind=TypeError)
        require(0 < width < np.inf, "width", "a positive length", width)
        attributes = [gspace.trivial_repr] * size_of(radial)
        if kernel_attr_type is not None:
            check_type("kernel_attr_type", kernel_attr_type, gspace)
            attributes += kernel_attr_type.representations
        aggr = "sum" if aggr == "add" else aggr
        shape = KernelShape(
            list(conv_out_type.representations), list(conv_in_type.representations), cutoff, aggr, radial
        )
        fiber = fiber_space(gspace.fibergroup, gspace.name)
        check_sizes(n_layers, n_channels)
        inputs = [position_representation(gspace), *attributes]
        check_kernel(shape.out_reprs, shape.in_reprs, inputs, n_layers, n_channels)
        self.mlp = KernelMLP(
            fiber.type(*inputs),
            fiber.type(*_products(shape.out_reprs, shape.in_reprs)),
            n_layers,
            n_channels,
            init_scheme,
            norm,
            activation,
        )
        self.shell_width = torch.nn.Parameter(torch.full((1, 1, 1), float(width)))
        self._shape, self._sampling = shape, sampling
        self.conv_in_type, self.conv_out_type = conv_in_type, conv_out_type
        self._find_tensors(self.mlp.linears, [(norm, norm_names(norm)) for norm in self.mlp.norms])
        self._table = table, float(width)
        self._set_plan(with_table(lower(self.mlp, shape, sampling), *self._table))
        self.register_load_state_dict_post_hook(_lower_again)

    def check_equivariance(self, atol: float = 1e-4, rtol: float = 1e-4) -> Errors:
        """Compare K(g x, ρ_a(g) a) with ρ_out(g) K(x, a) ρ_in(g)⁻¹ for 10 random elements g of the group, random points
        x and attributes a, in evaluation mode.

        Returns:
            [(g, relative error)], in the norm over all points.

        Raises:
            AssertionError: a value differs by more than ``atol + rtol · |value|``.
        """
        with in_mode(self, False), torch.no_grad():
            points = self.random_points(20)
            expected = self._at(points)
            inverse = lambda g: torch.as_tensor(self.conv_in_type.representation(~g)).to(expected)  # noqa: E731

            def pair(g: GroupElement) -> tuple[Tensor, Tensor]:
                actual = self._at(transform(points, self.point_type, g))
                return actual, transform(expected, self.conv_out_type, g) @ inverse(g)

            return compare(self.conv_in_type.gspace, pair, atol, rtol)

    @property
    def point_type(self) -> FieldType:
        """The type of x ⊕ a: of the MLP's input without the radial inputs."""
        position, *attributes = self.mlp.in_type.representations
        return FieldType(self.mlp.in_type.gspace, [position, *attributes[size_of(self.radial) :]])

    def random_points(self, n: int) -> Tensor:
        """(n, dim + A): positions where the kernel is neither 0 nor constant, and attributes."""
        points = torch.randn(n, self._dim + self.n_attributes, **like(self))
        radius = float(self.shell_width) if self.plan.cutoff is None else self.plan.cutoff / 3
        points[:, : self._dim] *= radius
        return points

    def _at(self, points: Tensor) -> Tensor:
        pos, attributes = points[:, : self._dim], points[:, self._dim :]
        return self(pos.contiguous(), attributes.contiguous() if self.n_attributes else None)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_basis(self.mlp, state_dict, prefix + "mlp.")  # before anything is copied
        super()._load_from_state_dict(state_dict, prefix, *args)


def trivial_bias(out_type: FieldType, bias: bool) -> Tensor:
    """(C_out, n), float64: columns that add a constant to each trivial irrep of the output; none without ``bias``."""
    require(isinstance(bias, bool), "bias", "True or False", repr(bias), kind=TypeError)
    if not bias:
        return torch.zeros(out_type.size, 0)
    return torch.from_numpy(block_diag(*(invariants(r) for r in out_type.representations)))


class CheckedBias(Biased):
    """Holds the equivariant bias of a convolution under the authors' names (``bias``, ``bias_expansion``)."""

    _derived = ("expanded_bias", "filter")  # names in checkpoints written in evaluation mode

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_basis(self.implicit_kernel.mlp, state_dict, prefix + "implicit_kernel.mlp.")  # before anything is copied
        for derived in self._derived:
            state_dict.pop(prefix + derived, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
