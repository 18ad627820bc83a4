"""The fixed tables of what can be in a file: modules that need no escnn, and pieces of plans."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .. import layers, plan


class Kind(NamedTuple):
    """How a module of one class is taken apart and built again."""

    name: str
    build: Callable[..., Any]
    arguments: Callable[[Any], dict[str, Any]]


# Modules with ``arguments()``, by the name of their class.
_PLAIN = (
    layers.CloudNet,
    layers.FourierActivation,
    layers.Gate,
    layers.GatedFields,
    layers.IIDBatchNorm1d,
    layers.ImplicitConv,
    layers.ImplicitKernel,
    layers.ImplicitPointConv,
    layers.ImplicitPointConvWithDownsampling,
    layers.Linear,
    layers.MoleculeNet,
    layers.ParticleNet,
    layers.PotentialNet,
    layers.ResidualBlock,
    layers.TensorProduct,
    layers.TensorReadout,
)

# torch's: their constructors' arguments, which are attributes too.
_TORCH: dict[type[nn.Module], tuple[str, ...]] = {
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
    nn.ReLU: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Tanh: (),
}
_EMPTY = (nn.BatchNorm1d, nn.Embedding, nn.LayerNorm, nn.Linear)  # built without drawing random numbers


def _torch_kind(cls: type[nn.Module], names: tuple[str, ...]) -> Kind:
    def arguments(module: nn.Module) -> dict[str, Any]:
        bias_left_out = getattr(module, "weight", None) is not None and getattr(module, "bias", 0) is None
        return {name: getattr(module, name) for name in names} | ({"bias": False} if bias_left_out else {})

    def build(**given: Any) -> nn.Module:
        return cls(**given, device="meta") if cls in _EMPTY else cls(**given)

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
    **{cls: _torch_kind(cls, names) for cls, names in _TORCH.items()},
    **{cls: Kind(f"torch.{cls.__name__}", build, _children) for cls, build in _CONTAINERS.items()},
}
KINDS: dict[str, Kind] = {kind.name: kind for kind in _BY_CLASS.values()}

_DATA = (
    layers.Fields,
    plan.Activation,
    plan.Block,
    plan.Coupling,
    plan.Frame,
    plan.Linear,
    plan.Norm,
    plan.Plan,
)
DATA: dict[str, Callable[..., Any]] = {cls.__name__: cls for cls in _DATA}


def is_plain(cls: type) -> bool:
    """Whether modules of exactly this class can be in a file as they are."""
    return cls in _BY_CLASS


def kind_of(cls: type) -> Kind:
    """How plain modules of exactly this class are taken apart and built."""
    return _BY_CLASS[cls]
