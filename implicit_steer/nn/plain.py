"""Modules with escnn's types → their counterparts on plain tensors, for :func:`implicit_steer.save`."""

from __future__ import annotations

from collections import OrderedDict

import escnn.nn as enn
import torch
from torch import nn

from .. import layers
from .._check import require
from ..deploy.convert import Converter, adopt, converts
from ..layers.kernel import NORM_TENSORS
from ..lowering import lower_expansion
from .activation import FourierActivation
from .batch_norm import IIDBatchNorm1d, channels_by_kind, field_kinds
from .gate import Gate
from .grid_conv import ImplicitConv
from .kernel import CheckedBias, ImplicitKernel
from .mlp import Linear
from .point_conv import ImplicitPointConv, ImplicitPointConvWithDownsampling

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
        adopt(layer, {"weights": weights, "bias": bias})
    for state, tensors, (norm, _) in zip(plain.norms, learned.norms, kernel._norms, strict=True):
        tensors = tensors._replace(mean=tensors.mean[:, : state.running_mean.shape[1]])
        adopt(state, dict(zip(NORM_TENSORS, tensors, strict=True)))
        adopt(state, {"num_batches_tracked": norm.num_batches_tracked})
    adopt(plain, {"shell_width": learned.shell_width})
    return plain


def _with_bias(plain: layers.kernel.Biased, conv: CheckedBias) -> layers.kernel.Biased:
    if conv.bias is not None:
        adopt(plain, {"bias": conv.bias, "bias_expansion": conv.bias_expansion})
    return plain


@converts(*_POINT_CONVS)
def _point_conv(conv: ImplicitPointConv, convert: Converter) -> layers.ImplicitPointConv:
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
        grid=conv.grid.double().cpu().numpy(),
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
    names = ("weight", "bias", "running_mean", "running_var", "average", "basis")
    for state, kind in zip(plain.kinds, kinds, strict=True):
        adopt(state, dict(zip(names, kind[1:], strict=True)))
    adopt(plain, {"num_batches_tracked": norm.num_batches_tracked})
    return plain


def _check_expanded(module: nn.Module, matrix: torch.Tensor) -> None:
    """In evaluation mode escnn computes with a matrix expanded earlier; refuse one that the weights no longer give."""
    expanded = getattr(module, "matrix", None)
    fresh = module.training or expanded is None or torch.allclose(expanded, matrix, rtol=1e-4, atol=1e-6)
    remedy = "Call .train() and .eval() on it, which expands its weights again."
    require(fresh, type(module).__name__, "a matrix that its weights give", "another one", remedy)


@converts(enn.Linear, Linear)
def _linear(linear: enn.Linear, convert: Converter) -> layers.Linear:
    _check_expanded(linear, linear.expand_parameters()[0])
    has_bias = linear.bias is not None
    layer = lower_expansion(linear.basisexpansion, linear.bias_expansion if has_bias else None)
    plain = layers.Linear(convert(linear.in_type), convert(linear.out_type), layer, has_bias)
    adopt(plain, {"weights": linear.weights, "bias": linear.bias})
    return plain


@converts(enn.TensorProductModule)
def tensor_product(product: enn.TensorProductModule, convert: Converter) -> layers.TensorProduct:
    """Of escnn's module, and of those that differ from it only in how they keep the matrix."""
    _check_expanded(product, product.expand_parameters())
    layer, types = lower_expansion(product.basisexpansion), (convert(product.in_type), convert(product.out_type))
    plain = layers.TensorProduct(*types, layer, len(product.in_type))
    adopt(plain, {"weights": product.weights})
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
