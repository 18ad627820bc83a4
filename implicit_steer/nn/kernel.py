"""The implicit kernel K(x, a): an equivariant MLP of position and attributes, its value read as a matrix."""

from __future__ import annotations

import operator
from functools import lru_cache
from numbers import Real

import numpy as np
import torch
from escnn.group import Representation, o2_group, o3_group
from escnn.gspaces import GSpace
from escnn.nn import FieldType
from torch import Tensor

from .. import op
from .._check import fail, require
from ..lowering import KernelShape, lower
from ..packing import Kept, NormParameters, Parameters, is_traced
from ..plan import Plan
from .mlp import KernelMLP, check_basis, fiber_space, norm_names


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


class ImplicitKernel(torch.nn.Module):
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

    Attributes:
        shell_width: σ, learnable, (1, 1, 1), 0.5 at first, in the unit of the positions.
        plan: the lowered :class:`~implicit_steer.plan.Plan`.

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
        tensor_reprs = [_tensor(out, into) for out in shape.out_reprs for into in shape.in_reprs]
        self.mlp = KernelMLP(
            fiber.type(position_representation(gspace), *attributes),
            fiber.type(*tensor_reprs),
            n_layers,
            n_channels,
            init_scheme,
            norm,
            activation,
        )
        self.shell_width = torch.nn.Parameter(0.5 * torch.ones(1, 1, 1))
        self._shape, self._sampling, self._values = shape, sampling, False
        self._linears, self._norms, self._kept = self.mlp.linears, self.mlp.norms, Kept()
        tensors = [(layer, name) for layer in self._linears for name in ("weights", "bias")]
        tensors += [(norm, name) for norm in self._norms for name in norm_names(norm)]
        tensors.append((self, "shell_width"))
        # With the dictionary in which torch keeps each, which spares the detour over Module.__getattr__.
        self._tensors = [(m, "_buffers" if name in m._buffers else "_parameters", name) for m, name in tensors]
        self._set_plan(lower(self.mlp, shape, sampling))
        self.register_load_state_dict_post_hook(_lower_again)

    def _set_plan(self, plan: Plan) -> None:
        self.plan = plan
        # Numbers that torch.compile would look for in the plan's arrays.
        self._dim, self._n_attributes = plan.frame.dim, plan.frame.n_attributes
        self._trivial = [norm.full_trivial.tolist() for norm in plan.norms]
        self._kept.native = op.prepared(plan, self.parameters_for_op(), values=self._values)

    def prepare_values(self) -> None:
        """Make ready what the kernel's values take beyond a convolution; torch.compile cannot at the first call."""
        self._values = True
        self._set_plan(self.plan)

    def parameters_for_op(self) -> Parameters:
        """The learned tensors as the operator takes them; the same object while they are the same."""
        kept = self._kept
        try:
            tensors = [getattr(module, kind)[name] for module, kind, name in self._tensors]
        except KeyError:  # a parametrised one is not stored plainly
            tensors = [getattr(module, name) for module, _, name in self._tensors]
        traced = is_traced()
        if not traced and kept.tensors is not None and all(map(operator.is_, tensors, kept.tensors)):
            return kept.parameters
        n = 2 * len(self._linears)
        linears, norms, (shell_width,) = tensors[:n], tensors[n:-1], tensors[-1:]
        norms = tuple(NormParameters(*norms[k : k + 4]) for k in range(0, len(norms), 4))
        parameters = Parameters(tuple(zip(linears[::2], linears[1::2], strict=True)), norms, shell_width, kept)
        if not traced and all(
            t is None or t.is_leaf for t in tensors
        ):  # others hold a graph that is not to be kept alive
            kept.tensors, kept.parameters = tensors, parameters
        return parameters

    def uses_batch_statistics(self, n_points: int, argument: str = "edge_delta") -> bool:
        """Whether batch norms take their statistics from these points (training mode).

        Raises:
            ValueError: one single point, which has no variance.
        """
        live = self.training and bool(self.plan.norms)
        if live and n_points == 1:
            expected = "at least 2 points in training mode with norm='batch'"
            fail(argument, expected, "1", "Call .eval(), use larger graphs, or norm=None.")
        return live

    def update_running(self, statistics: list) -> None:
        """Update the batch norms' running statistics after a training pass."""
        for norm, trivial, s in zip(self._norms, self._trivial, statistics, strict=False):
            self.mlp.update_running(norm, trivial, s.mean, s.var)

    def check_points(self, prefix: str, delta: Tensor, attributes: Tensor | None, n: int | None) -> Tensor:
        """Validate positions and attributes; returns the attributes, (n, 0) where there are none."""
        width = self.shell_width
        position, attribute = {"edge": ("edge_delta", "edge_attr"), "kernel": ("pos", "attrs")}[prefix]
        size = self._n_attributes
        check_tensor(position, delta, (n, self._dim), width.dtype, width.device)
        if attributes is None:
            if size:
                remedy = "The layer was built with an attribute type: pass the attributes."
                fail(attribute, f"a tensor of {size} attributes each", None, remedy)
            return delta.new_zeros(delta.shape[0], 0)
        if size == 0 and getattr(attributes, "shape", ())[-1:] != (0,):
            got = f"{type(attributes).__name__} of shape {tuple(getattr(attributes, 'shape', ()))}"
            remedy = "The layer was built without an attribute type: leave the attributes out, or build it with one."
            fail(attribute, "None", got, remedy)
        check_tensor(attribute, attributes, (delta.shape[0], size), width.dtype, width.device)
        return attributes

    def forward(self, pos: Tensor, attrs: Tensor | None = None, *, batch_statistics: bool | None = None) -> Tensor:
        """K at P points.

        Args:
            pos: (P, dim).
            attrs: (P, A), or None without attributes.
            batch_statistics: take batch statistics from these points; None: in training mode.

        Returns:
            (P, C_out, C_in).
        """
        attributes = self.check_points("kernel", pos, attrs, None)
        live = self.uses_batch_statistics(pos.shape[0], "pos") if batch_statistics is None else batch_statistics
        k, statistics = op.implicit_kernel(self.plan, self.parameters_for_op(), pos, attributes, batch_statistics=live)
        if self.training:
            self.update_running(statistics)
        return k

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_basis(self.mlp, state_dict, prefix + "mlp.")  # before anything is copied
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The kernel in one line."""
        p = self.plan
        return f"{p.group}, {p.out_size} x {p.in_size}, sampling={p.sampling!r}, frame={p.frame.kind!r}"


_HALVES = (torch.float16, torch.bfloat16)


def check_tensor(name: str, value, shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless ``value`` is a tensor of ``shape`` (None: any), of ``dtype`` or a 16-bit float, on ``device``."""
    if not isinstance(value, Tensor):
        fail(name, "a torch.Tensor", type(value).__name__, kind=TypeError)
    right = value.dim() == len(shape)
    for expected, size in zip(shape, value.shape, strict=False):
        right = right and (expected is None or expected == size)
    if not right:
        fail(name, f"shape ({', '.join('*' if s is None else str(s) for s in shape)})", tuple(value.shape))
    if value.dtype != dtype and value.dtype not in _HALVES:
        remedy = "Convert the input, or the layer with .float() / .double()."
        fail(name, f"dtype {dtype} or a 16-bit float", value.dtype, remedy, TypeError)
    if value.device != device:
        fail(name, f"device {device}", value.device, "Move it with .to().")


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


class BiasedModule(torch.nn.Module):
    """Holds the equivariant bias of a convolution under the authors' names (``bias``, ``bias_expansion``)."""

    _derived = ("expanded_bias", "filter")  # in checkpoints written in evaluation mode

    def _register_bias(self, out_type: FieldType) -> None:
        expansion = trivial_bias(out_type)
        self.bias = None
        if expansion.shape[1]:
            self.register_buffer("bias_expansion", expansion)
            self.bias = torch.nn.Parameter(torch.zeros(expansion.shape[1]))

    def expand_bias(self) -> Tensor | None:
        """(C_out,) or None."""
        bias = self.bias
        return None if bias is None else self.bias_expansion @ bias

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_basis(self.implicit_kernel.mlp, state_dict, prefix + "implicit_kernel.mlp.")  # before anything is copied
        for derived in self._derived:
            state_dict.pop(prefix + derived, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
