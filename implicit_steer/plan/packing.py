"""Parameters → the dense tensors a backend multiplies with. Differentiable, torch only, one small matmul per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._transforms import is_transformed
from .layers import Linear, Norm
from .plan import Coupling, Plan


def is_traced() -> bool:
    """Whether torch.compile, torch.export or a transform of torch.func traces this call. Tensors are then stand-ins,
    and what is made of them must not be kept."""
    return torch.compiler.is_compiling() or is_transformed()


class NormParameters(NamedTuple):
    """Affine parameters and running statistics of one batch norm, as escnn holds them."""

    weight: Tensor  # (channels, 1)
    bias: Tensor  # (channels, n_trivial)
    mean: Tensor  # (channels, d) in the coordinates of escnn's hidden field; 0 but for the trivial ones
    var: Tensor  # (channels, 1)


class CallCache:
    """What was made of a layer's tensors in its last call. What a backend packed is used again while the tensors hold
    the same bytes: every change is noticed, also one that leaves no trace in a tensor's version (by ``.data``, or by
    another process). Copies and pickles keep only ``native`` and ``triton``.

    Attributes:
        native: the plan as the native code takes it, or None; torch.compile needs it to be there already.
        triton: likewise, the plan as `triton` takes it.
        tensors: the tensors of the last call.
        parameters: the :class:`Parameters` that hold them.
        bound: what a backend made of ``parameters``.
        served: which backend served the last call, and what its choice rested on (ops/conv.py).
        hooks: how many hooks the process had registered when the layer's modules were last searched for hooks.
        table: what evaluation through a table keeps (ops/table.py).
    """

    def __init__(self, native: Any = None, triton: Any = None) -> None:
        self.native, self.triton = native, triton
        self.tensors: list[Any] | None = None
        self.parameters: Any = None
        self.bound: Any = None
        self.served: Any = None
        self.hooks: int | None = None
        self.table: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CallCache, (self.native, self.triton)


class Parameters(NamedTuple):
    """What a layer learns, as its modules hold it."""

    linears: tuple[tuple[Tensor, Tensor | None], ...]  # (weights, bias) of every linear map, the last one included
    norms: tuple[NormParameters, ...]
    shell_width: Tensor  # σ, any shape with one element
    cache: CallCache | None = None
    bias: tuple[Tensor, Tensor] | None = None  # of a convolution: values (n,), what they multiply (C_out, n)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Parameters:
        """``change`` of every tensor."""
        return self._replace(
            linears=tuple((change(w), None if b is None else change(b)) for w, b in self.linears),
            norms=tuple(type(norm)(*(change(t) for t in norm)) for norm in self.norms),
            shell_width=change(self.shell_width),
            bias=self.bias and (change(self.bias[0]), change(self.bias[1])),
        )


@dataclass
class Weights:
    """Dense weights in frame coordinates. ``linears[n]``: W (out, in), b (out,); ``theta[k]``: (U, V, W, n_b)."""

    linears: list[tuple[Tensor, Tensor]]
    theta: list[Tensor]
    shell_width: Tensor


_R = TypeVar("_R")


def cached(make: Callable[..., _R]) -> Callable[..., _R]:
    """``lru_cache`` for a function that makes tensors. It makes them outside of torch.inference_mode, since autograd
    would refuse them in later calls, and keeps none under torch.compile or torch.export, where they are stand-ins."""
    make = torch.inference_mode(False)(make)
    from_cache = lru_cache(maxsize=256)(make)

    @wraps(make)
    def call(*arguments: Any) -> _R:
        return make(*arguments) if torch.compiler.is_compiling() else from_cache(*arguments)

    return call


@cached
def _constant(owner: Any, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    array = getattr(owner, name)
    integer = array.dtype.kind == "i"
    return torch.tensor(array, dtype=torch.int64 if integer else dtype, device=device)


def constant(owner: Any, name: str, like: Tensor) -> Tensor:
    """The array ``owner.name`` of a piece of the plan as a tensor with the dtype and device of ``like``; cached."""
    return _constant(owner, name, like.dtype, like.device)


class Constants:
    """Arrays that a module multiplies with, exact in float64 (or int64) and cast to the dtype and device of each call.
    They are no buffers: ``.float().double()`` would round them."""

    def __init__(self, *arrays: NDArray[Any]) -> None:
        self.exact = tuple(torch.tensor(a, device="cpu") for a in arrays)  # also for modules on "meta"
        self._cache: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def like(self, x: Tensor) -> tuple[Tensor, ...]:
        """The arrays with the dtype and device of ``x``; integers keep their dtype."""
        key = x.dtype, x.device
        if key in self._cache:
            return self._cache[key]
        with torch.inference_mode(False):  # kept for calls that autograd sees
            found = tuple(t.to(x.device, x.dtype if t.is_floating_point() else None) for t in self.exact)
        if not is_traced():
            self._cache[key] = found
        return found


class Expansion:
    """What a linear layer learns → its matrix W (out, in) and b (out,): the plan's formula, on tensors that
    torch.compile can read."""

    def __init__(self, layer: Linear) -> None:
        self.shape = layer.out_size, layer.in_size
        self._reads = [(b.offset, b.end, (len(b.out_start), b.n_in, len(b.basis))) for b in layer.blocks]
        blocks = [a for b in layer.blocks for a in (b.columns, b.basis.reshape(len(b.basis), -1))]
        self._constants = Constants(layer.bias, _places(layer), *blocks)

    def __call__(self, weights: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """W and b; b is 0 without a bias."""
        shift, places, *blocks = self._constants.like(weights)
        values = []
        for (start, end, shape), columns, basis in zip(self._reads, blocks[::2], blocks[1::2], strict=True):
            theta = weights[start:end].view(shape).index_select(1, columns)
            values.append((theta @ basis).reshape(-1))
        dense = weights.new_zeros(self.shape).view(-1)
        if values:
            dense = dense.index_copy(0, places, torch.cat(values))
        return dense.view(self.shape), weights.new_zeros(self.shape[0]) if bias is None else shift @ bias


def _places(layer: Linear) -> NDArray[Any]:
    """Position in the flat W of every value that the blocks produce, in their (U, V, o, i) order."""
    places = [np.zeros(0, dtype=np.int64)]
    for block in layer.blocks:
        _, o, i = block.basis.shape
        rows = block.out_start[:, None, None, None] + np.arange(o)[:, None]
        places.append((rows * layer.in_size + block.in_start[:, None, None] + np.arange(i)).reshape(-1))
    return np.concatenate(places)


@cached
def _expansion(layer: Linear) -> Expansion:
    return Expansion(layer)


@cached
def _theta_index(coupling: Coupling, device: torch.device) -> Tensor:
    """(U·V·W·n_b,) :attr:`Coupling.theta_positions`."""
    return torch.tensor(coupling.theta_positions.reshape(-1)).to(device)


def mixing_weights(coupling: Coupling, weights: Tensor, bias: Tensor | None) -> Tensor:
    """θ (U, V, W, n_b) of a coupling, from the last layer's weights and bias."""
    parameter = weights if coupling.parameter == "weights" else cast(Tensor, bias)
    shape = (*coupling.row.shape, len(coupling.hidden_start), coupling.basis.shape[0])
    return parameter.index_select(0, _theta_index(coupling, parameter.device)).view(shape)


def kernel_positions(
    plan: Plan, c: Coupling, fields: Sequence[NDArray[Any]], entries: Sequence[NDArray[Any]], out: Any = None
) -> NDArray[Any]:
    """The position in the flat (C_out, C_in, H) kernel of every product θ[u, v, w, b] · B[b, o, i, m] of the coupling.

    Args:
        fields: u, v, w, the indices of the output field, the input field and the hidden channel.
        entries: o, i, m, the coordinates within them. All six broadcast with one another.
        out: where the result is written, as in NumPy.
    """
    (u, v, w), (o, i, m) = fields, entries
    rows = ((c.out_start[u] + o) * plan.in_size + c.in_start[u if c.depthwise else v] + i) * plan.hidden_size
    return np.add(rows, c.hidden_start[w] + m, out=out)


@cached
def _kernel_index(plan: Plan, device: torch.device) -> Tensor:
    """:func:`kernel_positions` of all values of θ·B, zeros included, in (U, o, V, i, W, m) order."""
    parts = []
    for c in plan.couplings:
        (n_u, n_v), (_, n_o, n_i, n_m) = c.row.shape, c.basis.shape
        u, o, v, i, w, m = np.ix_(*map(np.arange, (n_u, n_o, n_v, n_i, len(c.hidden_start), n_m)))
        parts.append(torch.tensor(kernel_positions(plan, c, (u, v, w), (o, i, m)).reshape(-1)))
    return torch.cat(parts).to(device)


def dense_kernel(plan: Plan, weights: Weights) -> Tensor:
    """dense (C_out, C_in, H) with K[o, i] = Σ_m dense[o, i, m] h[m], but for γ and the shell."""
    values = [
        torch.einsum("uvwb,boim->uoviwm", t, constant(c, "basis", t)).reshape(-1)
        for c, t in zip(plan.couplings, weights.theta, strict=True)
    ]
    dense = weights.shell_width.new_zeros(plan.out_size * plan.in_size * plan.hidden_size)
    if values:
        dense = dense.index_copy(0, _kernel_index(plan, dense.device), torch.cat(values))
    return dense.view(plan.out_size, plan.in_size, plan.hidden_size)


def running(p: NormParameters, trivial: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics that a batch norm keeps: mean (channels, n_trivial), var (channels,). ``trivial`` (n_trivial,):
    the trivial coordinates of its field."""
    return p.mean.index_select(1, trivial), p.var.view(-1)


def norm_affine(norm: Norm, p: NormParameters, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """A batch norm with these statistics, ``y → scale · y + shift``: scale = weight / sqrt(var + eps) (channels,) and,
    for the trivial coefficients alone, shift = bias − mean · scale (channels, n_trivial)."""
    scale = p.weight.view(-1) / (var + norm.eps).sqrt()
    return scale, p.bias - mean * scale[:, None]


def fold_norm(plan: Plan, weights: Weights, n: int, p: NormParameters, mean: Tensor, var: Tensor) -> None:
    """Fold batch norm ``n``, with these statistics, into what follows it in ``weights``: the next linear map, or θ."""
    norm = plan.norms[n]
    scale, shift = norm_affine(norm, p, mean, var)
    if n + 1 < len(weights.linears):
        weights.linears[n + 1] = _fold_into_linear(norm, *weights.linears[n + 1], scale, shift)
    else:
        weights.theta = _fold_into_theta(plan, weights.theta, scale, shift)


def _fold_into_linear(norm: Norm, w: Tensor, b: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """W · diag(scale), b + W · shift."""
    per_channel = w.view(w.shape[0], norm.channels, -1)
    trivial = per_channel.index_select(2, constant(norm, "trivial", w))
    return (per_channel * scale[:, None]).reshape(w.shape), b + torch.einsum("ows,ws->o", trivial, shift)


def _fold_into_theta(plan: Plan, theta: list[Tensor], scale: Tensor, shift: Tensor) -> list[Tensor]:
    """θ · scale, with the shift moved into the couplings of the bias."""
    folded = [t * scale[:, None] if c.parameter == "weights" else t for c, t in zip(plan.couplings, theta, strict=True)]
    for c, t in zip(plan.couplings, theta, strict=True):
        if c.fold_into >= 0:
            moved = torch.einsum("uvwb,bts,wt->uvs", t, constant(c, "fold", t), shift)
            folded[c.fold_into] = folded[c.fold_into] + moved[:, :, None]
    return folded


def learned_tensors(parameters: Parameters) -> list[Tensor]:
    """Hidden layers, batch norms, shell width, and last the last layer."""
    tensors = []
    for weights, bias in parameters.linears[:-1]:
        tensors += [weights] if bias is None or bias.numel() == 0 else [weights, bias]
    for norm in parameters.norms:
        tensors += [norm.weight, norm.bias] if norm.bias.numel() else [norm.weight]
    return [*tensors, parameters.shell_width, *(t for t in parameters.linears[-1] if t is not None)]


def parameter_sizes(plan: Plan) -> tuple[int, ...]:
    """How many entries each of :func:`learned_tensors` has, as far as the plan reads them."""
    sizes = [plan.table_size] if plan.is_frozen else []
    for layer in plan.linears:
        sizes += [layer.n_weights, *filter(None, [layer.bias.shape[1]])]
    for norm in plan.norms:
        sizes += [norm.channels, *filter(None, [norm.channels * len(norm.trivial)])]
    return *sizes, 1, *filter(None, plan.n_last)  # 1: the shell's width


class ParameterStarts(NamedTuple):
    """Where the :func:`learned_tensors` begin in one vector of them all."""

    splines: int  # of a plan without hidden layers, else 0
    linears: list[tuple[int, int]]  # weights and bias of every hidden layer; 0: no bias
    norms: list[tuple[int, int]]  # weight and bias of every batch norm; −1: no bias
    shell: int
    last: dict[str, int]  # the last layer's "weights" and "bias"; without a bias the end of them all


def parameter_starts(plan: Plan, sizes: Sequence[int]) -> ParameterStarts:
    """``sizes``: how many entries each of :func:`learned_tensors` has."""
    starts = iter(np.cumsum([0, *sizes]).tolist())
    return ParameterStarts(
        splines=next(starts) if plan.is_frozen else 0,
        linears=[(next(starts), next(starts) if layer.bias.shape[1] else 0) for layer in plan.linears],
        norms=[(next(starts), next(starts) if len(norm.trivial) else -1) for norm in plan.norms],
        shell=next(starts),
        last=dict(zip(("weights", "bias"), starts, strict=False)),
    )


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vector in pieces of these tensors' shapes, views of it."""
    pieces = zip(flat.split([t.numel() for t in like]), like, strict=True)
    return [piece if t.dim() == 1 else piece.view(t.shape) for piece, t in pieces]  # a view costs microseconds


def pack(plan: Plan, parameters: Parameters, fold: bool) -> Weights:
    """Dense weights from parameters; with ``fold`` the batch norms' running statistics are folded in (eval mode)."""
    hidden = () if plan.is_frozen else parameters.linears[:-1]  # else the splines' coefficients
    linears = [_expansion(layer)(w, b) for layer, (w, b) in zip(plan.linears, hidden, strict=True)]
    theta = [mixing_weights(c, *parameters.linears[-1]) for c in plan.couplings]
    weights = Weights(linears, theta, parameters.shell_width)
    if fold:
        for n, (norm, p) in enumerate(zip(plan.norms, parameters.norms, strict=True)):
            fold_norm(plan, weights, n, p, *running(p, constant(norm, "full_trivial", p.mean)))
    return weights
