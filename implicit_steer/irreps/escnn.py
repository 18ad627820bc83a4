"""Conversion between escnn's field types and irreps: of features, and of layers with all that they have learned.

In both libraries positions are (x, y, z), but the bases of an irrep of degree l differ: ``Y_l = R_l Y_l^escnn`` for the
spherical harmonics, with an orthogonal R_l, and likewise for features of that degree.
"""

from __future__ import annotations

from ..lowering import _require_escnn  # noqa: F401

# isort: split
import copy
from typing import Any, cast

import numpy as np
import torch
from escnn import gspaces
from escnn.group import O3, SO3, Group
from escnn.nn import FieldType, GeometricTensor
from numpy.typing import NDArray
from torch import Tensor

from .. import nn
from .._check import require
from ..layers.kernel import KernelBase
from ..lowering import so3
from ..lowering.sampling import hidden_space, identity_cache, solid_harmonics
from ..plan import Coupling, Plan
from ..plan import Linear as LinearMap
from ..plan.frozen import components
from ..plan.irreps import Irrep, Irreps, Term
from ..plan.packing import Parameters, Weights, dense_kernel, pack
from .linear import Linear
from .point_conv import ImplicitPointConv

_WAYS = (
    "an escnn FieldType or GeometricTensor of O(3) or SO(3) on R³, or an ImplicitPointConv or a Linear of "
    "implicit_steer.nn"
)
_ACCURACY = 1e-5  # relative, of a converted kernel, whose parameters are in float32


def from_escnn(x: Any) -> Any:
    """The counterpart of ``x`` on irreps.

    Args:
        x: a FieldType → its :class:`Irreps`; a GeometricTensor → a tensor in their basis; an
            :class:`implicit_steer.nn.ImplicitPointConv` with invariant edge attributes and exact sampling → an
            :class:`ImplicitPointConv` that computes the same of converted features, in the same dtype and mode; an
            :class:`implicit_steer.nn.Linear` → a :class:`Linear`, likewise.

    Raises:
        TypeError: ``x`` is none of these; a Gate is not, since gates on irreps keep unit variance and others do not.
        ValueError: ``x`` has another group, steerable edge attributes, or another sampling.

    Example:
        >>> gs = escnn.gspaces.flipRot3dOnR3()
        >>> str(from_escnn(gs.type(*[gs.trivial_repr] * 4, *[gs.irrep(1, 1)] * 4)))
        '4x0e+4x1o'
    """
    if isinstance(x, FieldType):
        return _irreps_of(x)
    if isinstance(x, GeometricTensor):
        return x.tensor @ _like(_basis(x.type).T, x.tensor)
    if isinstance(x, nn.Linear):
        _check_group(x.in_type)
        return _map_on_irreps(x, Linear(_irreps_of(x.in_type), _irreps_of(x.out_type), x.bias is not None))
    require(isinstance(x, nn.ImplicitPointConv), "x", _WAYS, type(x).__name__, kind=TypeError)
    plan = x.implicit_kernel.plan
    made = ImplicitPointConv(
        _irreps_of(x.in_type),
        _irreps_of(x.out_type),
        x.implicit_kernel.n_attributes,
        bias=x.bias is not None,
        **_options(x),
    )
    _require_same_frame(plan, made.implicit_kernel.plan)
    return _transferred(x, made, _basis(x.in_type), _basis(x.out_type))


def to_escnn(x: Any, kind: FieldType | None = None) -> Any:
    """The counterpart of ``x`` with escnn's types: the inverse of :func:`from_escnn`.

    Args:
        x: irreps, or a string → a FieldType on R³ with a field for every copy; a tensor (N, C) → a GeometricTensor of
            the type ``kind``, with coordinates NaN; an :class:`ImplicitPointConv` that is not depthwise → an
            :class:`implicit_steer.nn.ImplicitPointConv`; a :class:`Linear` → an :class:`implicit_steer.nn.Linear`.
        kind: the type of a tensor's features.

    Raises:
        TypeError: ``x`` is none of these, or a tensor comes without ``kind``.
        ValueError: ``x`` is a depthwise layer, which has no counterpart with escnn's types, or has no irreps.

    Example:
        >>> to_escnn("4x0e + 4x1o").size
        16
    """
    if isinstance(x, Irreps | str):
        return _type_of(Irreps.of(x))
    if isinstance(x, Tensor):
        require(isinstance(kind, FieldType), "kind", "the FieldType of the tensor", type(kind).__name__, kind=TypeError)
        values = x @ _like(np.linalg.inv(_basis(kind)).T, x)
        return GeometricTensor(values, kind, x.new_full((len(x), 3), float("nan")))
    if isinstance(x, Linear):
        return _map_of_fields(x, nn.Linear(_type_of(x.irreps_in), _type_of(x.irreps_out), init_scheme=None))
    expected = "irreps, a tensor, or an ImplicitPointConv or a Linear of implicit_steer.irreps"
    require(isinstance(x, ImplicitPointConv), "x", expected, type(x).__name__, kind=TypeError)
    require(not x.depthwise, "x", "a layer that is not depthwise", "a depthwise one")
    into, out, n = _type_of(x.irreps_in), _type_of(x.irreps_out), x.implicit_kernel.n_attributes
    attributes = into.gspace.type(*[into.gspace.trivial_repr] * n) if n else None
    made = nn.ImplicitPointConv(into, out, attributes, bias=x.bias is not None, **_options(x))
    return _transferred(x, made, np.linalg.inv(_basis(into)), np.linalg.inv(_basis(out)))


# ---- types


def _irreps_of(kind: FieldType) -> Irreps:
    _check_group(kind)
    terms: list[Term] = []
    for ident in (ident for field in kind.representations for ident in field.irreps):
        irrep = _irrep(kind.fibergroup, ident)
        if terms and terms[-1].irrep == irrep:
            terms[-1] = Term(terms[-1].multiplicity + 1, irrep)
        else:
            terms.append(Term(1, irrep))
    return Irreps(tuple(terms))


def _irrep(group: Group, ident: tuple[int, ...]) -> Irrep:
    """escnn's (j, l) of O(3), odd where j is 1, and (l,) of SO(3)."""
    *odd, degree = ident
    parity = 0 if isinstance(group, SO3) else -1 if odd[0] else 1
    return Irrep(degree, parity)


def _type_of(irreps: Irreps) -> FieldType:
    require(len(irreps) > 0, "x", "at least one irrep", "none")
    gspace = gspaces.flipRot3dOnR3() if irreps.has_parity else gspaces.rot3dOnR3()
    fields = []
    for multiplicity, (degree, parity) in irreps:
        fields += [gspace.irrep(int(parity < 0), degree) if parity else gspace.irrep(degree)] * multiplicity
    return gspace.type(*fields)


def _check_group(kind: FieldType) -> None:
    ok = isinstance(kind.fibergroup, SO3 | O3) and kind.gspace.dimensionality in (0, 3)
    require(ok, "x", "fields of O(3) or SO(3) on R³", kind.gspace)


def _basis(kind: FieldType) -> NDArray[np.float64]:
    """M (C, C): features on irreps are M times the features in escnn's basis."""
    blocks = []
    for field in kind.representations:
        turn = [_harmonic_basis(kind.fibergroup, _irrep(kind.fibergroup, ident).degree) for ident in field.irreps]
        blocks.append(_block_diagonal(turn) @ field.change_of_basis_inv)
    return _block_diagonal(blocks)


def _block_diagonal(blocks: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return torch.block_diag(*map(torch.from_numpy, blocks)).numpy()


@identity_cache
def _harmonic_basis(group: Group, degree: int) -> NDArray[np.float64]:
    """R_l (2 l + 1, 2 l + 1)."""
    space, start = hidden_space(group, degree), 0
    for ident in space.rho.irreps:
        size = group.irrep(*ident).size
        if size == 2 * degree + 1:
            break
        start += size
    powers, theirs = solid_harmonics(space)
    return _change(powers, theirs[start : start + size], degree)


def _change(powers: NDArray[Any], theirs: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """R with ``Y_l = R theirs``: ``theirs`` (2 l + 1, n) are polynomials, with the powers (n, 3) of their monomials."""
    own_powers, ours = so3.solid_harmonics(degree)
    column = {tuple(power): k for k, power in enumerate(powers.tolist())}
    ours = ours[so3.degrees(degree) == degree]
    target = np.zeros((len(ours), len(powers)))
    target[:, [column[tuple(power)] for power in own_powers.tolist()]] = ours
    return np.linalg.lstsq(theirs.T, target.T, rcond=None)[0].T


# ---- layers


def _options(conv: Any) -> dict[str, Any]:
    """The arguments that both layers take beside their types."""
    kernel = conv.implicit_kernel
    names = ("norm", "cutoff", "aggr", "radial")
    channels = kernel.plan.activations[0].channels if kernel.plan.activations else 1
    return {
        **{name: getattr(kernel, name) for name in names},
        "n_layers": len(kernel.plan.linears) + 1,
        "n_channels": channels,
        "activation": kernel.activation or "silu",
        "width": float(kernel.shell_width.detach()),
        "backend": conv.backend,
    }


def _require_same_frame(theirs: Plan, ours: Plan) -> None:
    steerable = theirs.linears and theirs.frame.kind != "zonal"
    require(not steerable, "x", "a layer with invariant edge attributes and sampling='exact'", theirs.sampling)
    same = all(
        a.samples.shape == b.samples.shape and np.allclose(a.samples, b.samples, atol=1e-9)
        for a, b in zip(theirs.activations, ours.activations, strict=True)
    )
    require(same, "x", f"a layer with sampling={ours.sampling!r}", repr(theirs.sampling))


def _transferred(source: Any, made: Any, into: NDArray[np.float64], out: NDArray[np.float64]) -> Any:
    """``made`` with what ``source`` has learned; its features are ``into`` and ``out`` times the features of
    ``source``."""
    made.to(source.implicit_kernel.shell_width.dtype)
    with torch.no_grad():
        _transfer_kernel(copy.deepcopy(source.implicit_kernel).double(), made.implicit_kernel, into, out)
        if source.bias is not None:
            constant = torch.from_numpy(out) @ source.expand_bias().double()
            made.bias.copy_(torch.linalg.lstsq(made.bias_expansion.double(), constant).solution)
    made.to(source.implicit_kernel.shell_width.device)
    return made.train(source.training)


def _map_on_irreps(source: nn.Linear, made: Linear) -> Linear:
    """``made`` with the map of ``source``: by Schur's lemma each block between two irreps is a number times 1."""
    into, out = (torch.from_numpy(_basis(kind)) for kind in (source.in_type, source.out_type))
    made.to(source.weights.dtype)
    with torch.no_grad():
        matrix, shift = copy.deepcopy(source).double().expand_parameters()
        matrix = out @ matrix @ torch.linalg.inv(into)
        columns, rows = made.irreps_in.fields, made.irreps_out.fields
        numbers = [matrix[rows[irrep]][:, columns[irrep]].reshape(-1) for irrep in rows if irrep in columns]
        made.weights.copy_(torch.cat(numbers))
        if made.bias is not None:
            made.bias.copy_((out @ cast(Tensor, shift))[made.irreps_out.scalars])
    return made.to(source.weights.device).train(source.training)


def _map_of_fields(source: Linear, made: nn.Linear) -> nn.Linear:
    """``made`` with the map of ``source``, which is read off its values at unit vectors."""
    into, out = (torch.from_numpy(_basis(kind)) for kind in (made.in_type, made.out_type))
    made.to(source.weights.dtype)
    with torch.no_grad():
        exact = copy.deepcopy(source).double().cpu()
        shift = exact(into.new_zeros(1, len(into)))[0]
        matrix = (exact(torch.eye(len(into), dtype=into.dtype)) - shift).T
        made.weights.copy_(_linear_weights(made.lowered, torch.linalg.solve(out, matrix @ into)))
        if made.bias is not None:
            wanted = torch.linalg.solve(out, shift)
            made.bias.copy_(torch.linalg.lstsq(torch.tensor(made.lowered.bias), wanted).solution)
    return made.to(source.weights.device).train(source.training)


def _transfer_kernel(
    source: KernelBase, target: KernelBase, into: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """Give ``target`` the function of ``source``: each linear map of ``source`` is projected onto the basis of its
    counterpart."""
    given, own, plan = source.parameters_for_op(), target.parameters_for_op(), target.plan
    weights = pack(source.plan, given, fold=False)
    for layer, (weight, bias), (matrix, shift) in zip(plan.linears, own.linears, weights.linears, strict=False):
        weight.copy_(_linear_weights(layer, matrix))
        if bias is not None:
            bias.copy_(torch.linalg.lstsq(torch.tensor(layer.bias), shift).solution)
    wanted = _last_layer(source.plan, weights, plan, torch.from_numpy(into), torch.from_numpy(out)) / plan.gamma
    last = dict(zip(("weights", "bias"), own.linears[-1], strict=True))
    for coupling in plan.couplings:
        parameter = cast(Tensor, last[coupling.parameter])
        parameter.index_copy_(0, *_coupling_weights(coupling, wanted, parameter.dtype))
    _transfer_norms(source, target)
    own.shell_width.copy_(given.shell_width)
    found = dense_kernel(plan, pack(plan, _double(target), fold=False))
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    require(error < _ACCURACY, "x", "a layer whose kernel has a counterpart", f"a deviation of {error:.0e}")


def _transfer_norms(source: KernelBase, target: KernelBase) -> None:
    pairs = zip(source.parameters_for_op().norms, target.parameters_for_op().norms, strict=True)
    for n, (given, own) in enumerate(pairs):
        for name in ("weight", "bias", "var"):
            getattr(own, name).copy_(getattr(given, name))
        theirs, ours = (kernel.plan.norms[n].full_trivial.tolist() for kernel in (source, target))
        own.mean[:, ours] = given.mean[:, theirs].to(own.mean)
        counts = [cast(Tensor, kernel._norms[n][0].num_batches_tracked) for kernel in (source, target)]
        counts[1].copy_(counts[0])


def _double(kernel: KernelBase) -> Parameters:
    return copy.deepcopy(kernel).double().parameters_for_op()


def _last_layer(source: Plan, weights: Weights, target: Plan, into: Tensor, out: Tensor) -> Tensor:
    """γ times the dense kernel (C_out, C_in, H) of ``source``, in the bases of ``target``."""
    dense = dense_kernel(source, weights) * source.gamma
    dense = torch.einsum("po,oih,iq->pqh", out, dense, torch.linalg.inv(into))
    if not source.linears:  # h is x, a, 1
        return dense
    turn = torch.from_numpy(_hidden_basis(source, target))
    *_, constant = dense.unbind(2)
    channels = dense[..., :-1].unflatten(2, (-1, len(turn)))
    return torch.cat([(channels @ turn).flatten(2), constant[..., None]], 2)


def _hidden_basis(source: Plan, target: Plan) -> NDArray[np.float64]:
    """T (d, d) of a hidden field: h_source = T h_target."""
    frames = source.frame, target.frame
    degrees = [frame.degrees for frame in frames]
    turn = np.zeros((len(degrees[0]), len(degrees[1])))
    for degree in source.frame.order:
        parts = [_change(f.powers, f.harmonics[d == degree], int(degree)) for f, d in zip(frames, degrees, strict=True)]
        turn[np.ix_(degrees[0] == degree, degrees[1] == degree)] = parts[0].T @ parts[1]
    return turn


def _linear_weights(layer: LinearMap, matrix: Tensor) -> Tensor:
    """The weights from which ``layer`` makes the matrix (out, in)."""
    weights = matrix.new_zeros(layer.n_weights)
    for block in layer.blocks:
        n_b, o, i = block.basis.shape
        rows, columns = components(block.out_start, o).tolist(), components(block.in_start, i).tolist()
        part = matrix[rows][:, columns].view(len(block.out_start), o, len(block.in_start), i)
        theta = torch.einsum("uovi,boi->uvb", part, torch.from_numpy(_dual(block.basis)))
        places = (
            block.offset
            + (np.arange(len(block.out_start))[:, None, None] * block.n_in + block.columns[:, None]) * n_b
            + np.arange(n_b)
        )
        weights[torch.from_numpy(places)] = theta
    return weights


def _coupling_weights(coupling: Coupling, kernel: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions and values of the parameters from which ``coupling`` makes its part of the kernel (C_out, C_in, H)."""
    _, o, i, m = coupling.basis.shape
    starts = coupling.out_start, coupling.in_start, coupling.hidden_start
    rows, columns, hidden = (components(start, size).tolist() for start, size in zip(starts, (o, i, m), strict=True))
    part = kernel[rows][:, columns][..., hidden]
    part = part.view(len(starts[0]), o, len(starts[1]), i, len(starts[2]), m)
    theta = torch.einsum("uoviwm,boim->uvwb", part, torch.from_numpy(_dual(coupling.basis)))
    return torch.from_numpy(coupling.theta_positions.reshape(-1)), theta.reshape(-1).to(dtype)


def _dual(basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """D with ⟨D_b, B_b'⟩ = δ_bb'."""
    flat = basis.reshape(len(basis), -1)
    return np.linalg.solve(flat @ flat.T, flat).reshape(basis.shape)


def _like(matrix: NDArray[np.float64], x: Tensor) -> Tensor:
    return torch.from_numpy(matrix).to(x)
