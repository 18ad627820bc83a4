"""Modules that users build with: escnn field types in, escnn field types out. Needs the extra ``escnn``."""

from .._extras import load_extra

load_extra("escnn", "escnn")

from .. import _escnn_changes, _escnn_pickle  # noqa: E402
from . import plain as _plain  # noqa: E402, F401
from .activation import FourierActivation  # noqa: E402
from .batch_norm import IIDBatchNorm1d  # noqa: E402
from .grid_conv import ImplicitConv  # noqa: E402
from .kernel import ImplicitKernel  # noqa: E402
from .mlp import KernelMLP  # noqa: E402
from .point_conv import ImplicitPointConv, ImplicitPointConvWithDownsampling  # noqa: E402

_escnn_pickle.register()
_escnn_changes.apply()

__all__ = [
    "FourierActivation",
    "IIDBatchNorm1d",
    "ImplicitConv",
    "ImplicitKernel",
    "ImplicitPointConv",
    "ImplicitPointConvWithDownsampling",
    "KernelMLP",
]
