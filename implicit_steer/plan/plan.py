"""The plan of an implicit kernel: immutable, hashable, printable data. It is all that a backend gets to know.

A plan describes ``K(x, a) = γ s(|x|) · mat(MLP(x ⊕ a))`` in *frame coordinates*: the MLP's hidden fields are expressed
by the few numbers that survive in the edge's own frame ("exact" sampling) or, without a frame, by all of them.

Names used throughout (one edge e):

====  =====================================================================================================
y     (n_in,) MLP input, then (W·c,) hidden coefficients: W channels of c coefficients each
z     W y + b: pre-activation coefficients; the activation is A⁻ φ(A z) per channel
h     (W·d,) full hidden features in the coupling's basis, d the size of one hidden field; h[-1] = 1 carries the biases
θ     the mixing weights of the last layer; B[b, o, i, m] its intertwiners
====  =====================================================================================================
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from .._check import require, require_integer

MAX_ORDER = 1000  # of a frame's coefficients and attributes: powers up to it are written out
FUNCTIONS = ("elu", "relu", "silu", "gelu", "tanh")


def _freeze(value):
    """Float arrays become read-only float64, integer arrays read-only int64, NumPy's numbers Python's; others pass."""
    if isinstance(value, np.generic):  # which print, and so are hashed, differently in NumPy 1 and 2
        return value.item()
    if not isinstance(value, np.ndarray):
        return value
    dtype, owner = np.int64 if value.dtype.kind in "iub" else np.float64, value if value.base is None else value.base
    nobody_writes = isinstance(owner, np.ndarray) and not owner.flags.writeable
    if nobody_writes and value.dtype == dtype and value.flags.c_contiguous:
        return value
    value = np.array(value, dtype=dtype, order="C")
    value.flags.writeable = False
    return value


def _require_indices(name: str, index: np.ndarray, count: int, shape: tuple | None = None) -> None:
    """Raise unless these are integers in 0 .. count-1, of that shape (any 1-D one by default)."""
    ok = index.dtype.kind == "i" and (index.ndim == 1 if shape is None else index.shape == shape)
    require(ok, name, f"integers of shape {shape or '(*,)'}", f"{index.dtype} of shape {index.shape}")
    inside = bool(((index >= 0) & (index < count)).all())
    require(inside, name, f"indices in 0..{count - 1}", index)


def _fingerprint(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """(n,) integers, one per array: others for other signs, orders or values, but the same (± 1) after rounding."""
    return np.array([round(1e4 * _scrambled_sum(a.reshape(-1))) for a in arrays], dtype=np.int64)


def _scrambled_sum(a: np.ndarray, at_once: int = 2**20) -> float:
    """Σ cos(n) a[n], in parts that need little memory."""
    parts = range(0, a.size, at_once)
    return sum(float(a[n : n + at_once] @ np.cos(np.arange(n, min(n + at_once, a.size)))) for n in parts)


def _require_number(name: str, value: Any) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(ok, name, "a finite number", repr(value))


def _require_shape(name: str, array: np.ndarray | None, shape: tuple) -> None:
    require(array is not None and array.shape == shape, name, f"shape {shape}", getattr(array, "shape", None))


class FrozenArrays:
    """Value semantics for frozen dataclasses that hold arrays: equality and hash by content."""

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _freeze(getattr(self, f.name)))
        self.validate()

    def validate(self) -> None:
        """Raise ``ValueError`` where the fields contradict each other. Native code relies on it: a plan may come from a
        file."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the class name and every field."""
        sha = hashlib.sha256(type(self).__name__.encode())

        def feed(value):
            if isinstance(value, np.ndarray):
                sha.update(repr((value.shape, value.dtype.str)).encode())
                sha.update(value.reshape(-1).view(np.uint8))
            elif isinstance(value, tuple):
                sha.update(f"({len(value)}".encode())
                for item in value:
                    feed(item)
            elif isinstance(value, FrozenArrays):
                sha.update(value.digest.encode())
            else:
                sha.update(repr(value).encode())

        for f in fields(self):
            feed(getattr(self, f.name))
        return sha.hexdigest()

    def __reduce__(self):  # copies and unpickled plans are validated and read-only too
        return type(self), tuple(getattr(self, f.name) for f in fields(self))

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and self.digest == other.digest

    def __hash__(self) -> int:
        return int(self.digest[:15], 16)


@dataclass(frozen=True, eq=False)
class Frame(FrozenArrays):
    """Where the MLP is evaluated, and how its hidden features return from there.

    ``kind``:

    - ``"none"``: at (x, a) itself.
    - ``"zonal"`` (O(3), SO(3), invariant attributes): at x₀ = r e; hidden field ψ of degree l keeps one coefficient and
      ``h[m] = c[coefficient[m]] · Y_m(x̂)``, Y the unit-norm solid harmonics ``harmonics`` (d, n_monomials) over the
      monomials x^i y^j z^k listed in ``powers``.
    - ``"planar"`` (one continuous rotation): x and a are rotated by −φ, φ the azimuth of x in ``plane`` (dim, 2);
      coefficients of order k return by a rotation by kφ: ``h[m] = cos(kφ) c[m] + sign[m] sin(kφ) c[partner[m]]``.

    ``order`` (c,) is the degree l or the order k of each hidden coefficient, ascending. Where ``regular``, coefficients
    of order > 0 vanish at radius 0 and are carried divided by the radius, so that values and derivatives are right
    there.
    """

    kind: str
    dim: int
    attribute: np.ndarray  # (A, A): attributes to frame coordinates, a' = attributeᵀ a
    order: np.ndarray  # (c,)
    regular: bool = False
    # zonal
    coefficient: np.ndarray | None = None  # (d,)
    powers: np.ndarray | None = None  # (n_monomials, 3)
    harmonics: np.ndarray | None = None  # (d, n_monomials)
    # planar
    plane: np.ndarray | None = None  # (dim, 2) orthonormal; azimuth 0 along the first column
    axis: np.ndarray | None = None  # (dim, dim - 2) the rest of position space
    partner: np.ndarray | None = None  # (c,)
    sign: np.ndarray | None = None  # (c,)
    attribute_order: np.ndarray | None = None  # (A,)
    attribute_partner: np.ndarray | None = None  # (A,)
    attribute_sign: np.ndarray | None = None  # (A,)

    def validate(self):
        """Raise ``ValueError`` unless the kind is known and its arrays fit together."""
        require_integer("dim", self.dim, 1)
        require(self.kind in ("none", "zonal", "planar"), "kind", "'none', 'zonal' or 'planar'", repr(self.kind))
        expected = {"none": (1, 2, 3), "zonal": (3,), "planar": (2, 3)}[self.kind]
        require(self.dim in expected, "dim", f"one of {expected} for a frame of kind {self.kind!r}", self.dim)
        require(isinstance(self.regular, bool), "regular", "True or False", repr(self.regular))
        require(
            self.attribute.ndim == 2 and self.attribute.shape[0] == self.attribute.shape[1],
            "attribute",
            "a square matrix",
            self.attribute.shape,
        )
        require(bool(np.all(np.diff(self.order) >= 0)), "order", "ascending", self.order)
        _require_indices("order", self.order, MAX_ORDER)
        if self.kind == "zonal":
            d = len(self.coefficient)
            _require_indices("coefficient", self.coefficient, len(self.order))
            _require_shape("powers", self.powers, (self.harmonics.shape[-1], 3))
            _require_indices("powers", self.powers, int(self.order.max(initial=0)) + 1, self.powers.shape)
            _require_shape("harmonics", self.harmonics, (d, len(self.powers)))
        if self.kind == "planar":
            c, a = len(self.order), self.n_attributes
            _require_shape("plane", self.plane, (self.dim, 2))
            _require_shape("axis", self.axis, (self.dim, self.dim - 2))
            _require_indices("partner", self.partner, c, (c,))
            _require_shape("sign", self.sign, (c,))
            _require_indices("attribute_order", self.attribute_order, MAX_ORDER, (a,))
            _require_indices("attribute_partner", self.attribute_partner, a, (a,))
            _require_shape("attribute_sign", self.attribute_sign, (a,))

    @property
    def n_attributes(self) -> int:
        """Size of the edge attributes."""
        return self.attribute.shape[0]

    @property
    def n_position(self) -> int:
        """Numbers that the position contributes to the MLP's input: all of x; (r,); (ρ, axis); or, in a planar frame
        that is not regular, (ρ, 0, axis), where the 0 has a derivative at ρ = 0."""
        return {"none": self.dim, "zonal": 1, "planar": self.dim - self.regular}[self.kind]


@dataclass(frozen=True, eq=False)
class Block(FrozenArrays):
    """``W[out_start[u] + o, in_start[v] + i] = Σ_b weights[offset + (u n_in + columns[v]) n_b + b] basis[b, o, i]``."""

    offset: int
    n_in: int  # input fields in the parameter's layout, of which this block uses ``columns``
    columns: np.ndarray  # (V,)
    out_start: np.ndarray  # (U,)
    in_start: np.ndarray  # (V,)
    basis: np.ndarray  # (n_b, o, i)

    def validate(self):
        for name in ("offset", "n_in"):
            require_integer(name, getattr(self, name), 0)
        require(self.basis.ndim == 3, "basis", "shape (n_b, o, i)", self.basis.shape)
        _require_indices("columns", self.columns, self.n_in, self.in_start.shape)
        for name in ("columns", "out_start"):
            index = getattr(self, name)
            require(len(np.unique(index)) == len(index), name, "every one once", index)

    @property
    def end(self) -> int:
        """One past the last weight it reads."""
        return self.offset + len(self.out_start) * self.n_in * len(self.basis)


@dataclass(frozen=True, eq=False)
class Linear(FrozenArrays):
    """A hidden equivariant linear layer in frame coordinates, ``z = W y + bias @ b``: blocks, a static pattern."""

    in_size: int
    out_size: int
    blocks: tuple[Block, ...]
    bias: np.ndarray  # (out_size, n_bias)

    def validate(self):
        for name in ("in_size", "out_size"):
            require_integer(name, getattr(self, name), 0)
        _require_shape("bias", self.bias, (self.out_size, self.bias.shape[-1]))
        for block in self.blocks:
            _, o, i = block.basis.shape
            _require_indices("out_start", block.out_start, self.out_size - o + 1)
            _require_indices("in_start", block.in_start, self.in_size - i + 1)

    @property
    def n_weights(self) -> int:
        """How many weights it reads."""
        return max((block.end for block in self.blocks), default=0)

    @property
    def fingerprint(self) -> np.ndarray:
        """Integers by which weights that mean another map, on another basis, are told."""
        return _fingerprint(block.basis for block in self.blocks)

    @cached_property
    def n_nonzeros(self) -> int:
        """Structural nonzeros of W (multiply-adds per edge)."""
        return sum(int((np.abs(b.basis) > 0).any(0).sum()) * len(b.out_start) * len(b.in_start) for b in self.blocks)


@dataclass(frozen=True, eq=False)
class Activation(FrozenArrays):
    """``y = inverse · φ(samples · z)`` per channel, equal samples merged; ``index``: which one each original was."""

    channels: int
    function: str
    samples: np.ndarray  # (S, c)
    inverse: np.ndarray  # (c, S)
    index: np.ndarray  # (S_original,) values in 0..S-1

    def validate(self):
        require_integer("channels", self.channels, 0)
        require(self.function in FUNCTIONS, "activation", f"one of {FUNCTIONS}", repr(self.function))
        s, c = self.samples.shape
        require(self.inverse.shape == (c, s), "inverse", f"shape {(c, s)}", self.inverse.shape)
        _require_indices("index", self.index, s)

    @cached_property
    def unmerged(self) -> tuple[np.ndarray, np.ndarray]:
        """(S_original, c) and (c, S_original): the same function with every sample written out."""
        count = np.bincount(self.index, minlength=len(self.samples))
        return self.samples[self.index], (self.inverse / count)[:, self.index]


@dataclass(frozen=True, eq=False)
class Norm(FrozenArrays):
    """escnn's ``IIDBatchNorm1d``: one variance per channel, means and shifts on the trivial coefficients only."""

    channels: int
    trivial: np.ndarray  # (n_trivial,) coefficients of a channel in frame coordinates
    full_trivial: np.ndarray  # (n_trivial,) the same among the coordinates of escnn's hidden field
    measured: np.ndarray  # (n_trivial,) the same among the coordinates of h
    eps: float
    momentum: float

    def validate(self):
        require_integer("channels", self.channels, 0)
        _require_number("eps", self.eps)
        _require_number("momentum", self.momentum)
        for name in ("trivial", "full_trivial", "measured"):
            index = getattr(self, name)
            _require_indices(name, index, int(index.max(initial=0)) + 1, self.trivial.shape)

    @property
    def n_mean(self) -> int:
        """Coordinates of escnn's hidden field up to the last trivial one."""
        return int(self.full_trivial.max(initial=0)) + 1


@dataclass(frozen=True, eq=False)
class Coupling(FrozenArrays):
    """One type of output field, one of input field, one of hidden field: U × V × W fields share the intertwiners B.

    ``K[out_start[u] + o, in_start[v] + i] += Σ_{b,w,m} θ[u, v, w, b] B[b, o, i, m] h[hidden_start[w] + m]`` with
    ``θ[u, v, w, b] = parameter[row[u, v] + w n_b + b]``; the parameter is the last layer's ``weights`` or its ``bias``.
    """

    parameter: str
    row: np.ndarray  # (U, V)
    out_start: np.ndarray  # (U,)
    in_start: np.ndarray  # (V,)
    hidden_start: np.ndarray  # (W,)
    basis: np.ndarray  # (n_b, o, i, m)
    # where a shift of the hidden trivial coefficients goes: B[b, :, :, trivial t] = Σ_b' fold[b, t, b'] B_bias[b']
    fold: np.ndarray  # (n_b, n_trivial, n_b') for "weights" blocks, else empty
    fold_into: int  # position of that bias coupling in Plan.couplings, or -1

    def validate(self):
        require(self.basis.ndim == 4, "basis", "shape (n_b, o, i, m)", self.basis.shape)
        _require_indices("row", self.row, self.end, (len(self.out_start), len(self.in_start)))
        read = self.row.size * len(self.hidden_start) * len(self.basis)
        require(read <= self.end, "row", f"{read} numbers of the parameter, each read once", f"{self.end} numbers")

    @property
    def end(self) -> int:
        """One past the last number of its parameter that it reads."""
        return int(self.row.max(initial=0)) + len(self.hidden_start) * len(self.basis)

    @cached_property
    def nonzeros(self) -> tuple[tuple[int, int, int, int, float], ...]:
        """(b, o, i, m, value) of every nonzero of B."""
        index = np.argwhere(self.basis != 0)
        return tuple((*map(int, row), float(self.basis[tuple(row)])) for row in index)

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        """How many nonzeros, products of features ((b, o, m) that occur) and slots there are."""
        nonzero = self.basis != 0
        return tuple(int(np.count_nonzero(n)) for n in (nonzero, nonzero.any(2), nonzero.any((2, 3))))

    @cached_property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """(b, o) pairs that occur: T[slot, v, w] is what a node accumulates."""
        return tuple(sorted({(b, o) for b, o, *_ in self.nonzeros}))


@dataclass(frozen=True, eq=False)
class Plan(FrozenArrays):
    """Everything that defines the operator but its weights. See the module's text for the notation."""

    group: str
    sampling: str
    frame: Frame
    linears: tuple[Linear, ...]
    activations: tuple[Activation, ...]
    norms: tuple[Norm, ...]  # one per activation, or ()
    couplings: tuple[Coupling, ...]
    out_size: int
    in_size: int
    hidden_size: int  # columns of h, the constant one included
    gamma: float
    cutoff: float | None
    aggr: str

    def validate(self):
        """Raise ``ValueError`` unless the layers fit together and the couplings stay inside the kernel and h."""
        for name in ("out_size", "in_size", "hidden_size"):
            require_integer(name, getattr(self, name), 0)
        _require_number("gamma", self.gamma)
        require(self.aggr in ("sum", "mean"), "aggr", "'sum' or 'mean'", repr(self.aggr))
        require(
            self.cutoff is None or 0 < self.cutoff < float("inf"), "cutoff", "a positive radius or None", self.cutoff
        )
        require(
            len(self.linears) == len(self.activations) and len(self.norms) in (0, len(self.activations)),
            "linears",
            "one hidden layer per activation and norm",
            (len(self.linears), len(self.activations), len(self.norms)),
        )
        self._validate_layers()
        for n, c in enumerate(self.couplings):
            n_b, o, i, m = c.basis.shape
            require(c.parameter in ("weights", "bias"), "parameter", "'weights' or 'bias'", repr(c.parameter))
            _require_indices("out_start", c.out_start, self.out_size - o + 1)
            _require_indices("in_start", c.in_start, self.in_size - i + 1)
            one = m == 1 and c.hidden_start.tolist() == [self.hidden_size - 1]
            _require_indices("hidden_start", c.hidden_start, self.hidden_size - m + one)
            into = self.couplings[c.fold_into] if 0 <= c.fold_into < len(self.couplings) else None
            ok = c.fold_into == -1 or (into is not None and into.parameter == "bias" and c.parameter == "weights")
            require(ok, "fold_into", "the position of a bias coupling or -1", (n, c.fold_into))
            if into is not None:
                _require_shape("row", into.row, c.row.shape)
                n_trivial = len(self.norms[-1].trivial) if self.norms else c.fold.shape[1]
                _require_shape("fold", c.fold, (n_b, n_trivial, len(into.basis)))

    def _validate_layers(self) -> None:
        """Each hidden layer takes what the one before it gives."""
        frame, coefficients = self.frame, len(self.frame.order)
        size = frame.n_position + frame.n_attributes
        for n, (layer, act) in enumerate(zip(self.linears, self.activations, strict=True)):
            require(layer.in_size == size, "linears", f"{size} inputs of layer {n}", layer.in_size)
            size = act.channels * act.samples.shape[1]
            require(layer.out_size == size, "linears", f"{size} outputs of layer {n}", layer.out_size)
            require(act.samples.shape[1] == coefficients, "samples", f"{coefficients} columns", act.samples.shape)
        full = self.hidden_size - 1
        if self.activations:
            size = self.activations[-1].channels * len(frame.coefficient if frame.kind == "zonal" else frame.order)
        require(full == size, "hidden_size", f"{size} hidden features and the constant one", self.hidden_size)
        for norm, act in zip(self.norms, self.activations, strict=False):
            require(norm.channels == act.channels, "channels", act.channels, norm.channels)
            _require_indices("trivial", norm.trivial, coefficients)
            _require_indices("measured", norm.measured, full // norm.channels)

    @property
    def n_last(self) -> tuple[int, int]:
        """How many numbers the last layer's weights and bias have."""
        ends = {"weights": 0, "bias": 0}
        for c in self.couplings:
            ends[c.parameter] = max(ends[c.parameter], c.end)
        return ends["weights"], ends["bias"]

    @property
    def fingerprint(self) -> np.ndarray:
        """Integers by which parameters that mean another kernel, on another basis, are told."""
        hidden = [layer.fingerprint for layer in self.linears]
        return np.concatenate([*hidden, _fingerprint(c.basis for c in self.couplings)])

    def cost(self) -> dict[str, int]:
        """Multiply-adds and evaluations of φ, per edge and per node, of the factored form (counted, not measured)."""
        mlp = sum(layer.n_nonzeros for layer in self.linears)
        mlp += sum(2 * a.channels * int((np.abs(a.samples) > 0).sum()) for a in self.activations)
        phi = sum(a.channels * len(a.samples) for a in self.activations)
        nonzeros = coupling = mixing = 0
        for c in self.couplings:
            n_in, n_hidden = len(c.in_start), len(c.hidden_start)
            n_nonzeros, n_products, n_slots = c.counts
            nonzeros += (n_nonzeros if c.parameter == "weights" else 0) * n_in * n_hidden
            coupling += n_nonzeros * n_in + n_products * n_in * n_hidden
            mixing += n_slots * n_in * n_hidden * len(c.out_start)
        return {
            "mlp per edge": mlp,
            "φ per edge": phi,
            "coupling nonzeros per edge": nonzeros,
            "sparse coupling per edge": coupling,
            "mixing per node": mixing,
            "outer product per edge": self.in_size * self.hidden_size,
            "dense mixing per node": self.in_size * self.hidden_size * self.out_size,
            "materialised kernel per edge": self.in_size * self.hidden_size * self.out_size,
        }

    @cached_property
    def dense_coupling(self) -> bool:
        """Whether the outer product f ⊗ h of whole features, mixed by one dense matrix per node, takes fewer
        multiply-adds than the sparse coupling, at 16 edges per node. In zonal frames h is never written out."""
        cost, edges = self.cost(), 16
        sparse = edges * cost["sparse coupling per edge"] + cost["mixing per node"]
        dense = edges * cost["outer product per edge"] + cost["dense mixing per node"]
        return self.frame.kind != "zonal" and dense < sparse

    def __str__(self) -> str:
        frame = self.frame
        lines = [
            f"Plan {self.digest[:12]}: {self.group}, sampling {self.sampling!r}",
            f"  frame      {frame.kind}{' (regular at the origin)' if frame.regular else ''}, "
            f"x in R^{frame.dim}, {frame.n_attributes} attributes",
        ]
        for n, (layer, act) in enumerate(zip(self.linears, self.activations, strict=True)):
            lines.append(
                f"  layer {n}    {layer.in_size} -> {layer.out_size}, {layer.n_nonzeros} nonzeros; {act.function} on "
                f"{len(act.samples)} samples ({len(act.index)} before merging) x {act.channels} channels"
                + ("; batch norm" if self.norms else "")
            )
        for c in self.couplings:
            lines.append(
                f"  coupling   {len(c.out_start)} x {len(c.in_start)} x {len(c.hidden_start)} fields ({c.parameter}), "
                f"{c.basis.shape[0]} intertwiners, {c.counts[0]} nonzeros, {c.counts[2]} slots"
            )
        lines.append(
            f"  kernel     {self.out_size} x {self.in_size}, γ = {self.gamma:.4g}, cutoff {self.cutoff}, {self.aggr}"
        )
        form = "dense outer product" if self.dense_coupling else "sparse intertwiners"
        lines.append(f"  coupled by {form} (backend cpu)")
        lines += [f"  cost       {name}: {value:,}" for name, value in self.cost().items()]
        return "\n".join(lines)
