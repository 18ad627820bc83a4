"""The equivariant MLP whose value is the kernel, laid out and named as the authors' module is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import escnn.nn
import torch
from escnn.group import O3, SO2, SO3, CyclicGroup, Group
from escnn.gspaces import GSpace0D, no_base_space
from escnn.nn import FieldType

from .._check import fail, require, require_integer
from ..layers.kernel import NORM_TENSORS
from ..lowering.clebsch_gordan import install
from ..lowering.linear import lower_map, polished_blocks
from ..lowering.sampling import identity_cache, max_frequency
from ..plan import FUNCTIONS
from ..plan.packing import Expansion
from .activation import FourierActivation, paper_function
from .building import built_by_escnn
from .equivariant import Steerable, check_input, check_type
from .expansion import ANOTHER_LAYER, BiasExpansion, MatrixExpansion
from .size import check_linear, check_orthonormal

_INIT = ("he", "deltaorthonormal")
_MOST_DERIVED = 2**22  # a state_dict holds at most so many values that follow from the fields
# Suffixes of the buffers that fix what weights mean; escnn derives them from the group's Clebsch-Gordan coefficients.
_BASIS = (".sampled_basis", ".A", ".Ainv", "_avg", "_change_of_basis")


@identity_cache
def fiber_space(group: Group, name: str) -> GSpace0D:
    """The gspace of the kernel MLPs on the space ``name``: one object, so that all layers share escnn's cache of bases.

    There is one per space, not per group: escnn's cache tells representations apart by their names, and the actions of
    one group on two spaces may have the same name.
    """
    install(group)
    return no_base_space(group)


def _at_a_point(kind: FieldType) -> FieldType:
    if isinstance(kind.gspace, GSpace0D):
        return kind
    return fiber_space(kind.fibergroup, kind.gspace.name).type(*kind.representations)


class KernelLinear(Steerable, escnn.nn.Linear):
    """escnn's Linear as a layer of a kernel's MLP, from which plans are lowered, for any number of fields. Its weights
    start as 0.

    Its ``state_dict`` is the same in training and evaluation mode: it keeps no expanded matrix. It is escnn's where
    C_out (C_in + n_bias) ≤ 2²²; for a larger layer it lacks what follows from the fields, ``bias_expansion`` and the
    indices of :class:`MatrixExpansion`. A checkpoint may have them or not.

    Attributes:
        expand_bias: the :class:`BiasExpansion` bias → b.
    """

    @built_by_escnn
    def __init__(self, in_type: FieldType, out_type: FieldType):
        check_linear(in_type.representations, out_type.representations)
        super(escnn.nn.Linear, self).__init__()  # escnn's __init__ makes dense tensors
        self.in_type, self.out_type = in_type, out_type
        points = _at_a_point(in_type), _at_a_point(out_type)
        self.space, self._basisexpansion = points[0].gspace, MatrixExpansion(*points)
        self.expand_bias = BiasExpansion(out_type)
        n_bias = self.expand_bias.shape[1]
        self.bias = torch.nn.Parameter(torch.zeros(n_bias)) if n_bias else None
        self.weights = torch.nn.Parameter(torch.zeros(self.basisexpansion.dimension()))

    @property
    def bias_expansion(self) -> torch.Tensor:
        """(C_out, n_bias), which escnn keeps; here each access makes it anew."""
        return self.expand_bias.dense(self.bias.detach())

    def expand_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (C_out, C_in) and b (C_out,), or None without a bias."""
        return self.basisexpansion(self.weights)[..., 0], None if self.bias is None else self.expand_bias(self.bias)

    def forward(self, x: escnn.nn.GeometricTensor) -> escnn.nn.GeometricTensor:
        """W x + b."""
        check_input(x, self.in_type)
        return escnn.nn.GeometricTensor(
            torch.nn.functional.linear(x.tensor, *self.expand_parameters()), self.out_type, x.coords
        )

    def train(self, mode: bool = True):
        """Set the mode; nothing is expanded or dropped."""
        return torch.nn.Module.train(self, mode)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        n_out, n_bias = self.expand_bias.shape
        if n_out * (self.in_type.size + n_bias) <= _MOST_DERIVED:
            for name, index in self.basisexpansion.indices().items():
                destination[f"{prefix}_basisexpansion.{name}"] = index
            if self.bias is not None:
                destination[f"{prefix}bias_expansion"] = self.bias_expansion

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for derived in ("matrix", "expanded_bias"):  # in checkpoints that escnn wrote in evaluation mode
            state_dict.pop(prefix + derived, None)
        name = prefix + "bias_expansion"
        if self.bias is not None and name in state_dict:
            self.expand_bias.blocks = self.expand_bias.read(name, state_dict.pop(name))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear(KernelLinear):
    """y = W x + b with an intertwiner W and an invariant b: escnn's Linear, but its basis is exact in float64, where
    escnn's is rounded to float32.

    Args:
        in_type, out_type: fields on any space; the features of each point are mapped separately.
        init_scheme: ``"he"`` or ``"deltaorthonormal"`` (escnn.nn.init); None leaves the weights 0. b starts as 0.

    Shape: x (N, C_in), y (N, C_out), GeometricTensors.

    Raises:
        TypeError: a type is no FieldType, or the input is no GeometricTensor of ``in_type``.
        ValueError: a wrong argument, or fields whose layer takes too much memory to build.
    """

    @built_by_escnn
    def __init__(self, in_type: FieldType, out_type: FieldType, init_scheme: str | None = "he"):
        for name, kind in (("in_type", in_type), ("out_type", out_type)):
            check_type(name, kind)
        super().__init__(in_type, out_type)
        if init_scheme is not None:
            initialise(self, init_scheme)
        read_basis(self)
        self.register_load_state_dict_post_hook(read_basis)

    def expand_parameters(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (C_out, C_in) and b (C_out,), or None without a bias."""
        matrix, shift = self._expansion(self.weights, self.bias)
        return matrix, None if self.bias is None else shift

    def export(self) -> torch.nn.Linear:
        """The same map on plain tensors, with weights of its own, in evaluation mode."""
        matrix, shift = self.expand_parameters()
        plain = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=shift is not None).to(matrix)
        with torch.no_grad():
            plain.weight.copy_(matrix)
            if shift is not None:
                plain.bias.copy_(shift)
        return plain.eval()


def read_basis(linear: torch.nn.Module, *_: object) -> None:
    """Lower an equivariant map with a ``basisexpansion``: when it is built, and after a checkpoint, which may have
    brought another basis."""
    if not any(tensor.is_meta for tensor in linear.buffers()):
        linear.lowered = lower_map(linear)
        linear._expansion = Expansion(linear.lowered)


def check_sizes(n_layers: int, n_channels: int) -> None:
    """Raise ``ValueError`` unless both are positive integers."""
    for name, value in (("n_layers", n_layers), ("n_channels", n_channels)):
        require_integer(name, value, 1)


class KernelMLP(Steerable):
    """Equivariant MLP: Linear, Fourier activation (and batch norm) ``n_layers − 1`` times, then a Linear.

    Args:
        in_type, out_type: field types on a :func:`fiber_space`, the position first.
        n_layers: linear layers, ≥ 1.
        n_channels: hidden fields.
        init_scheme: ``"he"`` or ``"deltaorthonormal"`` (escnn.nn.init).
        norm: ``"batch"`` (``IIDBatchNorm1d`` after each activation) or None.
        activation: φ. ``"elu"`` means the paper's choice: ELU, but ReLU on groups of order 1 and 2.

    Attributes:
        mlp: the escnn modules.

    Source: Zhdanov, Hoffmann, Cesa, NeurIPS 2023, section 3. The max_frequency of hidden fields is one above the
    highest frequency of ``out_type``.
    """

    @built_by_escnn
    def __init__(
        self,
        in_type: FieldType,
        out_type: FieldType,
        n_layers: int = 2,
        n_channels: int = 16,
        init_scheme: str = "he",
        norm: str | None = "batch",
        activation: str = "elu",
    ):
        super().__init__()
        check_sizes(n_layers, n_channels)
        require(init_scheme in _INIT, "init_scheme", f"one of {_INIT}", repr(init_scheme))
        require(norm in ("batch", None), "norm", "'batch' or None", repr(norm))
        require(activation in FUNCTIONS, "activation", f"one of {FUNCTIONS}", repr(activation))
        self.in_type, self.out_type, self.n_channels = in_type, out_type, n_channels
        group, gspace = in_type.fibergroup, in_type.gspace
        if activation == "elu":
            activation = paper_function(group)
        modules, hidden = [], in_type
        if n_layers > 1:
            highest = max_frequency(out_type.representations) + 1
        for _ in range(n_layers - 1):
            act = FourierActivation(gspace, n_channels, highest, activation, sampling="escnn")
            modules += [KernelLinear(hidden, act.in_type), act]
            if norm == "batch":
                modules.append(escnn.nn.IIDBatchNorm1d(act.out_type))
            hidden = act.out_type
        self.mlp = escnn.nn.SequentialModule(*modules, KernelLinear(hidden, out_type))
        for layer in self.linears:
            initialise(layer, init_scheme)

    def forward(self, x: escnn.nn.GeometricTensor) -> escnn.nn.GeometricTensor:
        """The authors' function, layer by layer."""
        check_input(x, self.in_type)
        return self.mlp(x)

    @property
    def linears(self) -> list[KernelLinear]:
        """The linear layers in order."""
        return [m for m in self.mlp if isinstance(m, KernelLinear)]

    @property
    def norms(self) -> list[escnn.nn.IIDBatchNorm1d]:
        """The batch norms in order."""
        return [m for m in self.mlp if isinstance(m, escnn.nn.IIDBatchNorm1d)]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        check_basis(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def norm_names(norm: escnn.nn.IIDBatchNorm1d) -> tuple[str, ...]:
    """The names of a batch norm's tensors, in the order of NORM_TENSORS."""
    name = norm.in_type.representations[0].name.replace(".", "^")  # as escnn escapes it
    return tuple(f"{name}_{what}" for what in NORM_TENSORS)


# The groups whose Clebsch-Gordan coefficients escnn has in closed form.
CLOSED_FORM = SO2 | SO3 | O3 | CyclicGroup
ANOTHER_BASIS = (
    "the fingerprint of this installation's basis",
    "another basis",
    "Clebsch-Gordan coefficients differ in sign with and without py3nj and between escnn versions, so the "
    "checkpoint's weights would mean another function here. Load it where it was written (see "
    "implicit_steer.info()), or install the same escnn and py3nj.",
)


def check_basis(mlp: KernelMLP, state_dict: dict, prefix: str) -> None:
    """Refuse a checkpoint whose basis would make its weights mean another function.

    The basis buffers are the fingerprint. Where escnn has closed forms of Clebsch-Gordan coefficients, they must agree
    with this installation's. For other groups escnn's own bases, and so those of older checkpoints, have arbitrary
    signs: there the checkpoint's basis is taken over, if it consists of intertwiners.
    """
    closed_form, another = isinstance(mlp.in_type.fibergroup, CLOSED_FORM), False
    for name, own in mlp.named_buffers():
        theirs = state_dict.get(prefix + name)
        if theirs is None or not name.endswith(_BASIS):
            continue
        if theirs.shape != own.shape:
            fail(prefix + name, f"shape {tuple(own.shape)}", tuple(theirs.shape), ANOTHER_LAYER, RuntimeError)
        if own.is_meta:  # there are no values to compare; the plan that is lowered from theirs is compared
            another = not closed_form
        elif torch.allclose(theirs.to(own), own, atol=1e-4, rtol=0):
            state_dict[prefix + name] = own.detach().clone()
        elif closed_form or not name.endswith(".sampled_basis"):
            fail(prefix + name, *ANOTHER_BASIS, RuntimeError)
        else:
            another = True
    for n, layer in enumerate(mlp.mlp):
        if isinstance(layer, KernelLinear):
            layer_prefix = f"{prefix}mlp.{n}."
            _check_bias(layer, state_dict, layer_prefix + "bias_expansion", closed_form, another)
            polished_blocks(layer.basisexpansion, lambda key, start=layer_prefix: state_dict.get(start + key))


def _check_bias(layer: KernelLinear, state_dict: dict, name: str, closed_form: bool, another: bool) -> None:
    """Refuse a checkpoint whose ``bias_expansion`` gives the bias of ``layer`` another meaning; or, if ``another``
    (the rest of the basis may differ), one without it, which does not say what the bias means."""
    if layer.bias is None:
        return
    if name in state_dict:
        own, theirs = layer.expand_bias.blocks, layer.expand_bias.read(name, state_dict[name])
        another = closed_form and any(theirs[rep] is not block for rep, block in own.items())
    require(not another, name, *ANOTHER_BASIS, RuntimeError)


def he_deviation(expansion: escnn.nn.modules.basismanager.BlocksBasisExpansion) -> torch.Tensor:
    """(n_weights,) standard deviations of escnn's generalised He scheme: 1/√(n_ψ n_w) for a weight from an irrep ψ of
    the input to one irrep of the output, which n_ψ different irreps reach, ψ through n_w weights.

    escnn describes every weight for this; here the weights of all fields of one representation are counted at once.
    """
    blocks, counts = {}, defaultdict(Counter)
    for pair in expansion._representations_pairs:
        block = getattr(expansion, f"block_expansion_{expansion._escape_pair(pair)}")
        blocks[pair] = [(attr["in_irrep"], (pair[1], attr["out_irrep_idx"])) for attr in block.get_basis_info()]
        for into, out in blocks[pair]:
            counts[out][into] += expansion._in_count[pair[0]]
    found = []
    for pair, ends in blocks.items():
        deviation = torch.tensor([1 / math.sqrt(len(counts[out]) * counts[out][into]) for into, out in ends])
        found.append(deviation.repeat(expansion._in_count[pair[0]] * expansion._out_count[pair[1]]))
    return torch.cat(found)


def initialise(layer: KernelLinear, scheme: str) -> None:
    """Draw the weights, ``"he"`` or ``"deltaorthonormal"``; the bias stays 0."""
    if layer.weights.numel() == 0:
        return
    if scheme == "he":
        with torch.no_grad():
            layer.weights.copy_(he_deviation(layer.basisexpansion) * torch.randn_like(layer.weights))
    else:
        check_orthonormal(layer.in_type.representations, layer.out_type.representations)
        escnn.nn.init.deltaorthonormal_init(layer.weights.data, layer.basisexpansion)
