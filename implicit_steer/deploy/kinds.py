"""The tables of what can be in a file: modules that need no escnn, pieces of plans, and classes of users."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .. import irreps, layers, plan
from .._check import require


class Kind(NamedTuple):
    """How a module of one class is taken apart and built again.

    ``origin`` is the full name, ``module.Class``, of a class that a user registered; empty for the package's own.
    """

    name: str
    build: Callable[..., Any]
    arguments: Callable[[Any], dict[str, Any]]
    origin: str = ""


# Modules with ``arguments()``, by the name of their class.
_PLAIN = (
    layers.Blur,
    layers.CloudNet,
    layers.FieldPool,
    layers.FourierActivation,
    layers.FrozenKernel,
    layers.Gate,
    layers.GatedFields,
    layers.IIDBatchNorm1d,
    layers.ImplicitConv,
    layers.ImplicitKernel,
    layers.ImplicitPointConv,
    layers.ImplicitPointConvWithDownsampling,
    layers.Linear,
    layers.MoleculeNet,
    layers.NormMaxPool,
    layers.ParticleNet,
    layers.PotentialNet,
    layers.ResidualBlock,
    layers.TensorProduct,
    layers.TensorReadout,
    layers.ZBL,
)
_IRREPS = (
    irreps.Gate,
    irreps.ImplicitPointConv,
    irreps.InteractionBlock,
    irreps.Linear,
    irreps.Norm,
    irreps.TensorSquare,
)
_OF_PARTS = (irreps.Interaction,)

# torch's modules, with the arguments of their constructors, which are attributes of the same names.
_WINDOWS = ("kernel_size", "stride", "padding", "ceil_mode")
_AVERAGES = (*_WINDOWS, "count_include_pad", "divisor_override")
_MAXIMA = (*_WINDOWS, "dilation", "return_indices")
_TORCH: dict[type[nn.Module], tuple[str, ...]] = {
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveAvgPool3d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.AdaptiveMaxPool3d: ("output_size", "return_indices"),
    nn.AvgPool2d: _AVERAGES,
    nn.AvgPool3d: _AVERAGES,
    nn.BatchNorm1d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.Dropout: ("p",),
    nn.ELU: ("alpha",),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.GELU: ("approximate",),
    nn.Identity: (),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.LeakyReLU: ("negative_slope",),
    nn.Linear: ("in_features", "out_features"),
    nn.MaxPool2d: _MAXIMA,
    nn.MaxPool3d: _MAXIMA,
    nn.ReLU: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Tanh: (),
}


def _torch_kind(cls: type[nn.Module], names: tuple[str, ...]) -> Kind:
    def arguments(module: nn.Module) -> dict[str, Any]:
        bias_left_out = getattr(module, "weight", None) is not None and getattr(module, "bias", 0) is None
        return {name: getattr(module, name) for name in names} | ({"bias": False} if bias_left_out else {})

    def build(**given: Any) -> nn.Module:
        allowed = {*names, "bias"}  # torch takes others, too, such as a device
        require(given.keys() <= allowed, cls.__name__, f"arguments among {sorted(allowed)}", sorted(given))
        return cls(**given)

    return Kind(f"torch.{cls.__name__}", build, arguments)


def _children(module: nn.Module) -> dict[str, Any]:
    return {"modules": tuple(module._modules.items())}


_CONTAINERS = {
    nn.Sequential: lambda modules: nn.Sequential(OrderedDict(modules)),
    nn.ModuleDict: lambda modules: nn.ModuleDict(OrderedDict(modules)),
    nn.ModuleList: lambda modules: nn.ModuleList(module for _, module in modules),
}

_BY_CLASS: dict[type, Kind] = {
    **{cls: Kind(cls.__name__, cls, cls.arguments) for cls in _PLAIN},
    **{cls: Kind(f"irreps.{cls.__name__}", cls, cls.arguments) for cls in (*_IRREPS, *_OF_PARTS)},
    **{cls: _torch_kind(cls, names) for cls, names in _TORCH.items()},
    **{cls: Kind(f"torch.{cls.__name__}", build, _children) for cls, build in _CONTAINERS.items()},
}
IRREPS = {_BY_CLASS[cls].name for cls in _IRREPS}  # built from irreps and sizes alone
KINDS: dict[str, Kind] = {kind.name: kind for kind in _BY_CLASS.values()}
REGISTERED: dict[str, Kind] = {}  # by the names under which users registered their classes

_DATA = (
    layers.Fields,
    plan.Activation,
    plan.Bessel,
    plan.Block,
    plan.Cosines,
    plan.Coupling,
    plan.Distance,
    plan.Frame,
    plan.Linear,
    plan.Norm,
    plan.Plan,
    plan.Table,
)
DATA: dict[str, Callable[..., Any]] = {cls.__name__: cls for cls in _DATA}


def is_plain(cls: type) -> bool:
    """Whether modules of exactly this class can be in a file as they are."""
    return cls in _BY_CLASS


def kind_of(cls: type) -> Kind:
    """How plain modules of exactly this class are taken apart and built."""
    return _BY_CLASS[cls]


def add_registered(cls: type, kind: Kind) -> None:
    """Let files hold modules of this class of a user."""
    REGISTERED[kind.name] = _BY_CLASS[cls] = kind


def is_registered(cls: type) -> bool:
    """Whether modules of exactly this class can be in a file because a user registered it."""
    return cls in _BY_CLASS and bool(_BY_CLASS[cls].origin)
