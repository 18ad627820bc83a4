"""Modules with escnn's types → their counterparts on plain tensors, for :func:`implicit_steer.save`."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from ..lowering import _require_escnn  # noqa: F401

# isort: split
from collections import OrderedDict

import escnn.nn as enn
import numpy as np
import torch
from escnn.group import Representation
from numpy.typing import NDArray
from torch import nn

from .. import layers, plan
from .._check import require
from ..layers.exact import ExactBuffers
from ..layers.kernel import NORM_TENSORS
from ..lowering.linear import lower_expansion, sampled_blocks
from ..nn.activation import FourierActivation
from ..nn.batch_norm import IIDBatchNorm1d, channels_by_kind, constants_by_kind, field_kinds
from ..nn.gate import Gate
from ..nn.grid_conv import ImplicitConv
from ..nn.kernel import CheckedBias, ImplicitKernel
from ..nn.mlp import Linear
from ..nn.point_conv import ImplicitPointConv, ImplicitPointConvWithDownsampling
from .convert import Converter, converts, share_tensors

_POINT_CONVS = {
    ImplicitPointConv: layers.ImplicitPointConv,
    ImplicitPointConvWithDownsampling: layers.ImplicitPointConvWithDownsampling,
}


@converts(enn.FieldType)
def _fields(kind: enn.FieldType, convert: Converter) -> layers.Fields:
    return layers.Fields(kind.size, str(kind))


@converts(ImplicitKernel)
def _kernel(kernel: ImplicitKernel, convert: Converter) -> layers.ImplicitKernel:
    plain, learned = layers.ImplicitKernel(kernel.plan), kernel.parameters_for_op()
    for layer, (weights, bias) in zip(plain.linears, learned.linears, strict=True):
        share_tensors(layer, {"weights": weights, "bias": bias})
    for state, tensors, (norm, _) in zip(plain.norms, learned.norms, kernel._norms, strict=True):
        tensors = tensors._replace(mean=tensors.mean[:, : state.get_buffer("running_mean").shape[1]])
        share_tensors(state, dict(zip(NORM_TENSORS, tensors, strict=True)))
        share_tensors(state, {"num_batches_tracked": norm.get_buffer("num_batches_tracked")})
    share_tensors(plain, {"shell_width": learned.shell_width})
    return plain


_Conv = TypeVar("_Conv", bound=layers.kernel.Biased)


def _with_bias(plain: _Conv, conv: CheckedBias) -> _Conv:
    if conv.bias is not None:
        share_tensors(plain, {"bias": conv.bias})
        plain.share_exact(conv)
    return plain


@converts(*_POINT_CONVS)
def _point_conv(conv: ImplicitPointConv, convert: Converter) -> layers.ImplicitPointConv:
    own = conv.bias is None or any(owner is conv for owner, *_ in conv.implicit_kernel._tensors)
    remedy = "Give each convolution a kernel of its own, since the operator adds the bias of only one."
    name = f"{remedy} {convert.name(conv)}.implicit_kernel"
    require(own, name, "a kernel of this convolution", "the kernel of another one", kind=TypeError)
    plain = _POINT_CONVS[type(conv)](
        in_type=convert(conv.in_type),
        out_type=convert(conv.out_type),
        implicit_kernel=convert(conv.implicit_kernel),
        backend=conv.backend,
        n_bias=conv.n_bias,
    )
    return _with_bias(plain, conv)


@converts(ImplicitConv)
def _grid_conv(conv: ImplicitConv, convert: Converter) -> layers.ImplicitConv:
    plain = layers.ImplicitConv(
        in_type=convert(conv.in_type),
        out_type=convert(conv.out_type),
        implicit_kernel=convert(conv.implicit_kernel),
        grid=conv.exact("grid").numpy(),
        padding=conv.padding,
        stride=conv.stride,
        dilation=conv.dilation,
        padding_mode=conv.padding_mode,
        n_bias=conv.n_bias,
        moved_axes=conv.moved_axes,
    )
    return _with_bias(plain, conv)


@converts(FourierActivation)
def _activation(activation: FourierActivation, convert: Converter) -> layers.FourierActivation:
    samples, inverse_t = (m.numpy() for m in activation._merged.exact)
    fields, function = convert(activation.in_type), activation.function
    return layers.FourierActivation(fields, function, samples, inverse_t.T, activation._vector)


@converts(Gate)
def _gate(gate: Gate, convert: Converter) -> layers.GatedFields:
    types = convert(gate.in_type), convert(gate.out_type)
    return layers.GatedFields(*types, gate.function, gate.gate, gate._fields)


@converts(IIDBatchNorm1d, enn.IIDBatchNorm1d, enn.IIDBatchNorm2d, enn.IIDBatchNorm3d)
def _batch_norm(norm: enn.IIDBatchNorm1d, convert: Converter) -> layers.IIDBatchNorm1d:
    kinds, channels = field_kinds(norm), channels_by_kind(norm)
    n_trivial = [0 if kind.basis is None else kind.basis.shape[1] for kind in kinds]
    plain = layers.IIDBatchNorm1d(
        in_type=convert(norm.in_type),
        sizes=tuple((len(kind.var), kind.size, n) for kind, n in zip(kinds, n_trivial, strict=True)),
        channels=None if channels is None else channels.cpu().numpy(),
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    names = ("weight", "bias", "running_mean", "running_var")
    for state, kind, constants in zip(plain.kinds, kinds, constants_by_kind(norm), strict=True):
        share_tensors(state, dict(zip(names, kind[1:5], strict=True)))
        for name, exact in zip(("average", "basis"), constants, strict=True):
            if exact is not None:
                cast(ExactBuffers, state).set_exact(name, exact, kind.var.dtype)
    share_tensors(plain, {"num_batches_tracked": norm.num_batches_tracked})
    return plain


def _check_expanded(module: nn.Module, matrix: torch.Tensor) -> None:
    """In evaluation mode escnn computes with a matrix expanded earlier; refuse one that the weights no longer give."""
    expanded = getattr(module, "matrix", None)
    fresh = module.training or expanded is None or torch.allclose(expanded, matrix, rtol=1e-4, atol=1e-6)
    remedy = "Call .train() and .eval() on it, which expands its weights again."
    require(fresh, f"{remedy} {type(module).__name__}", "a matrix that its weights give", "another one")


def _lowered(linear: enn.Linear) -> plan.Linear:
    if isinstance(linear, Linear):
        return linear.lowered
    bias = None if linear.bias is None else linear.bias_expansion.detach().cpu().double().numpy()
    return lower_expansion(linear.basisexpansion, sampled_blocks(linear.basisexpansion), bias)


@converts(enn.Linear, Linear)
def _linear(linear: enn.Linear, convert: Converter) -> layers.Linear:
    _check_expanded(linear, linear.expand_parameters()[0])
    layer, has_bias = _lowered(linear), linear.bias is not None
    plain = layers.Linear(convert(linear.in_type), convert(linear.out_type), layer, has_bias)
    share_tensors(plain, {"weights": linear.weights, "bias": linear.bias})
    return plain


@converts(enn.TensorProductModule)
def tensor_product(product: enn.TensorProductModule, convert: Converter) -> layers.TensorProduct:
    """The counterpart of escnn's module, and of modules that differ from it only in how they keep the matrix."""
    _check_expanded(product, product.expand_parameters())
    types, layer = (convert(product.in_type), convert(product.out_type)), getattr(product, "lowered", None)
    if layer is None:
        layer = lower_expansion(product.basisexpansion, sampled_blocks(product.basisexpansion))
    plain = layers.TensorProduct(*types, layer, len(product.in_type))
    share_tensors(plain, {"weights": product.weights})
    return plain


@converts(enn.SequentialModule)
def _sequential(modules: enn.SequentialModule, convert: Converter) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, convert(part)) for name, part in modules._modules.items()))


@converts(enn.IdentityModule)
def _identity(module: enn.IdentityModule, convert: Converter) -> nn.Identity:
    return nn.Identity()


@converts(enn.ReLU)
def _relu(module: enn.ReLU, convert: Converter) -> nn.ReLU:
    return nn.ReLU()


@converts(enn.ELU)
def _elu(module: enn.ELU, convert: Converter) -> nn.ELU:
    return nn.ELU(module.alpha)


@converts(enn.LeakyReLU)
def _leaky_relu(module: enn.LeakyReLU, convert: Converter) -> nn.LeakyReLU:
    return nn.LeakyReLU(module._negative_slope)


# ---- escnn's poolings

_POOLINGS = {
    enn.PointwiseAdaptiveAvgPool2D: nn.AdaptiveAvgPool2d,
    enn.PointwiseAdaptiveAvgPool3D: nn.AdaptiveAvgPool3d,
    enn.PointwiseAdaptiveMaxPool2D: nn.AdaptiveMaxPool2d,
    enn.PointwiseAdaptiveMaxPool3D: nn.AdaptiveMaxPool3d,
    enn.PointwiseAvgPool2D: nn.AvgPool2d,
    enn.PointwiseAvgPool3D: nn.AvgPool3d,
    enn.PointwiseMaxPool2D: nn.MaxPool2d,
    enn.PointwiseMaxPool3D: nn.MaxPool3d,
}
_WINDOW = ("output_size", "kernel_size", "stride", "padding", "dilation", "ceil_mode")


@converts(*_POOLINGS)
def _pooling(pool: enn.EquivariantModule, convert: Converter) -> nn.Module:
    return _POOLINGS[type(pool)](**{name: getattr(pool, name) for name in _WINDOW if hasattr(pool, name)})


def _blur(pool: enn.EquivariantModule, padding: tuple[int, ...], convert: Converter) -> layers.Blur:
    plain = layers.Blur(convert(pool.in_type), tuple(pool.filter.shape[2:]), pool.stride, padding)
    share_tensors(plain, {"filter": pool.filter})
    return plain


@converts(enn.PointwiseAvgPoolAntialiased2D, enn.PointwiseAvgPoolAntialiased3D)
def _antialiased_average(pool: enn.EquivariantModule, convert: Converter) -> layers.Blur:
    return _blur(pool, pool.padding, convert)


@converts(enn.PointwiseMaxPoolAntialiased2D, enn.PointwiseMaxPoolAntialiased3D)
def _antialiased_maximum(pool: enn.EquivariantModule, convert: Converter) -> nn.Sequential:
    maximum = nn.MaxPool2d if pool.d == 2 else nn.MaxPool3d
    dense = maximum(pool.kernel_size, 1, pool.padding, pool.dilation, ceil_mode=pool.ceil_mode)
    return nn.Sequential(dense, _blur(pool, pool._pad, convert))


def _field_numbers(kind: enn.FieldType) -> NDArray[Any]:
    """(C,) the index of every channel's field."""
    sizes = [r.size for r in kind.representations]
    return np.repeat(np.arange(len(sizes)), sizes)


def _subfield(representation: Representation) -> int:
    """Size of the subfields that escnn's ``InducedNormPool`` takes the norms of."""
    (name,) = (name for name in representation.supported_nonlinearities if name.startswith("induced_norm"))
    return int(name.split("_")[-1])


@converts(enn.GroupPooling, enn.NormPool, enn.InducedNormPool)
def _field_pool(pool: enn.EquivariantModule, convert: Converter) -> layers.FieldPool:
    part = {enn.GroupPooling: lambda r: 1, enn.NormPool: lambda r: r.size, enn.InducedNormPool: _subfield}[type(pool)]
    return layers.FieldPool(
        in_type=convert(pool.in_type),
        out_type=convert(pool.out_type),
        field=_field_numbers(pool.in_type),
        parts=np.array([part(r) for r in pool.in_type.representations], dtype=np.int64),
        norm=not isinstance(pool, enn.GroupPooling),
    )


@converts(enn.NormMaxPool)
def _norm_max_pool(pool: enn.NormMaxPool, convert: Converter) -> layers.NormMaxPool:
    window = {name: getattr(pool, name) for name in _WINDOW if hasattr(pool, name)}
    return layers.NormMaxPool(convert(pool.in_type), _field_numbers(pool.in_type), **window)
