"""The plan of an implicit kernel: immutable, hashable, printable data. It is all that a backend gets to know.

A plan describes ``K(x, a) = γ s(|x|) · mat(MLP(x ⊕ radial(|x|) ⊕ a))`` in *frame coordinates*: the MLP's hidden fields
are expressed by the few coefficients that survive in the edge's own frame ("exact" sampling) or, without a frame, by
all of them.

Names used throughout (one edge e):

====  =====================================================================================================
y     (n_in,) MLP input, then (W·c,) hidden coefficients: W channels of c coefficients each
z     W y + b: pre-activation coefficients; the activation is A⁻ φ(A z) per channel
h     (W·d,) full hidden features in the coupling's basis, d the size of one hidden field; h[-1] = 1 carries the biases
θ     the mixing weights of the last layer; B[b, o, i, m] its intertwiners
====  =====================================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .._check import require, require_integer
from .frame import Frame
from .frozen import FrozenArrays, fingerprint_of, require_indices, require_number, require_shape
from .layers import Activation, Linear, Norm
from .radial import Radial, size_of
from .table import Table


@dataclass(frozen=True, eq=False)
class Coupling(FrozenArrays):
    """Couples one type of output, of input and of hidden field: U × V × W fields share the intertwiners B.

    ``K[out_start[u] + o, in_start[v] + i] += Σ_{b,w,m} θ[u, v, w, b] B[b, o, i, m] h[hidden_start[w] + m]`` with
    ``θ[u, v, w, b] = parameter[row[u, v] + w n_b + b]``; the parameter is the last layer's ``weights`` or its ``bias``.

    A ``depthwise`` coupling acts channel by channel (e3nn's "uvu"): output u reads input u alone, by θ[u, 0, w, b].
    """

    parameter: str
    row: NDArray[Any]  # (U, V); (U, 1) where depthwise
    out_start: NDArray[Any]  # (U,)
    in_start: NDArray[Any]  # (V,)
    hidden_start: NDArray[Any]  # (W,)
    basis: NDArray[Any]  # (n_b, o, i, m)
    # where a shift of the hidden trivial coefficients goes: B[b, :, :, trivial t] = Σ_b' fold[b, t, b'] B_bias[b']
    fold: NDArray[Any]  # (n_b, n_trivial, n_b') for "weights", else empty
    fold_into: int  # position of that bias coupling in Plan.couplings, or -1
    depthwise: bool = False

    def validate(self) -> None:
        require(self.basis.ndim == 4, "basis", "shape (n_b, o, i, m)", self.basis.shape)
        require(isinstance(self.depthwise, bool), "depthwise", "True or False", repr(self.depthwise))
        n_out, n_in = len(self.out_start), len(self.in_start)
        require(not self.depthwise or n_out == n_in, "in_start", f"{n_out} fields, as many as go out", n_in)
        require_indices("row", self.row, self.end, (n_out, 1 if self.depthwise else n_in))
        read = self.row.size * len(self.hidden_start) * len(self.basis)
        require(read <= self.end, "row", f"{read} values of the parameter, each read once", f"{self.end} values")

    @property
    def end(self) -> int:
        """One past the last value of its parameter that it reads."""
        return int(self.row.max(initial=0)) + len(self.hidden_start) * len(self.basis)

    @property
    def theta_positions(self) -> NDArray[Any]:
        """(U, V, W, n_b) the position of every θ[u, v, w, b] in the parameter; V = 1 where depthwise."""
        n_w, n_b = len(self.hidden_start), len(self.basis)
        return self.row[:, :, None, None] + np.arange(n_w * n_b).reshape(n_w, n_b)

    @cached_property
    def nonzeros(self) -> tuple[tuple[int, int, int, int, float], ...]:
        """(b, o, i, m, value) of every nonzero of B."""
        index = np.argwhere(self.basis != 0).tolist()
        return tuple((b, o, i, m, float(self.basis[b, o, i, m])) for b, o, i, m in index)

    @cached_property
    def counts(self) -> tuple[int, int, int]:
        """How many nonzeros, products of features ((b, o, m) that occur) and slots ((b, o) that occur) there are."""
        nonzero = self.basis != 0
        nonzeros, products, slots = map(np.count_nonzero, (nonzero, nonzero.any(2), nonzero.any((2, 3))))
        return int(nonzeros), int(products), int(slots)

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
    table: Table | None = None  # splines of the hidden layers; where a plan has none, in their place
    radial: Radial | None = None  # functions of |x|, the first of the frame's attributes

    def validate(self) -> None:
        """Raise ``ValueError`` unless the layers fit together and the couplings stay inside the kernel and h."""
        for name in ("out_size", "in_size", "hidden_size"):
            require_integer(name, getattr(self, name), 0)
        require_number("gamma", self.gamma)
        most = self.frame.n_attributes
        require(size_of(self.radial) <= most, "radial", f"at most {most} functions, as the frame has", self.radial)
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
            require_indices("out_start", c.out_start, self.out_size - o + 1)
            require_indices("in_start", c.in_start, self.in_size - i + 1)
            require_indices("hidden_start", c.hidden_start, self.hidden_size - m + self.reads_one(c))
            into = self.couplings[c.fold_into] if 0 <= c.fold_into < len(self.couplings) else None
            ok = c.fold_into == -1 or (into is not None and into.parameter == "bias" and c.parameter == "weights")
            require(ok, "fold_into", "the position of a bias coupling or -1", (n, c.fold_into))
            if into is not None:
                require_shape("row", into.row, c.row.shape)
                require(
                    into.depthwise == c.depthwise, "depthwise", f"{c.depthwise}, as of coupling {n}", into.depthwise
                )
                n_trivial = len(self.norms[-1].trivial) if self.norms else c.fold.shape[1]
                require_shape("fold", c.fold, (n_b, n_trivial, len(into.basis)))

    def _validate_layers(self) -> None:
        """Raise ``ValueError`` unless each hidden layer takes what the one before it gives."""
        frame, coefficients = self.frame, len(self.frame.order)
        size = frame.n_position + frame.n_attributes
        for n, (layer, act) in enumerate(zip(self.linears, self.activations, strict=True)):
            require(layer.in_size == size, "linears", f"{size} inputs of layer {n}", layer.in_size)
            size = act.channels * act.samples.shape[1]
            require(layer.out_size == size, "linears", f"{size} outputs of layer {n}", layer.out_size)
            require(act.samples.shape[1] == coefficients, "samples", f"{coefficients} columns", act.samples.shape)
        full = self.hidden_size - 1
        if self.activations:
            size = self.activations[-1].channels * self.field_size
            reason = self.table_refusal if self.table else None
            require(reason is None, "table", "None", f"a table, but {reason}")
        elif self.table:
            ok = (frame.kind == "zonal" or (frame.kind == "planar" and frame.dim == 2)) and not frame.regular
            require(ok, "table", "a zonal frame, or a planar one on R², as splines have it", frame.kind)
            ok = full % self.field_size == 0 and frame.n_attributes == (self.table.types > 1)
            require(ok, "table", "whole hidden fields, and the number of a row where there are several", frame.kind)
            size = full
        require(full == size, "hidden_size", f"{size} hidden features and the constant one", self.hidden_size)
        for norm, act in zip(self.norms, self.activations, strict=False):
            require(norm.channels == act.channels, "channels", f"{act.channels}, as its activation has", norm.channels)
            require_indices("trivial", norm.trivial, coefficients)
            require_indices("measured", norm.measured, full // norm.channels)

    def reads_one(self, coupling: Coupling) -> bool:
        """Whether the coupling reads the constant hidden feature, the last column of h, and nothing else."""
        return coupling.basis.shape[3] == 1 and coupling.hidden_start.tolist() == [self.hidden_size - 1]

    @property
    def table_refusal(self) -> str | None:
        """Why the hidden coefficients are no functions of the radius alone; None where they are."""
        frame = self.frame
        if not self.activations:
            return "a kernel of one layer is linear in position and attributes: it has no MLP to tabulate"
        if frame.kind == "none":
            return (
                f"sampling {self.sampling!r} of {self.group} evaluates the MLP at the edge's direction, too: a table "
                "takes sampling='exact' with SO(3), O(3), SO(2) or O(2) and invariant attributes"
            )
        if frame.kind == "planar" and (frame.dim != 2 or not frame.regular):
            what = "positions in R³" if frame.dim != 2 else "attributes that rotate"
            return f"in the frame of {self.group} the MLP sees {what}: its values are no functions of the radius alone"
        return None

    @property
    def field_size(self) -> int:
        """d: coordinates of one hidden field."""
        if not self.activations and self.table is None:
            return 1
        return len(self.frame.coefficient if self.frame.kind == "zonal" else self.frame.order)

    @cached_property
    def per_edge(self) -> Plan:
        """The plan without its table: the MLP is evaluated for every edge."""
        return replace(self, table=None) if self.table else self

    @property
    def hidden_coefficients(self) -> int:
        """W · c: what the last hidden layer, or a spline of each, gives for an edge; inputs where there is neither."""
        if not self.activations and self.table is None:
            return self.frame.n_position + self.frame.n_attributes
        return (self.hidden_size - 1) // self.field_size * len(self.frame.order)

    @property
    def table_size(self) -> int:
        """How many spline coefficients the table of a plan without hidden layers has, (T, G + 3, W, c)."""
        table = cast(Table, self.table)
        return table.types * table.n_coefficients * self.hidden_coefficients

    @property
    def is_frozen(self) -> bool:
        """Whether splines stand in place of the hidden layers."""
        return self.table is not None and len(self.activations) == 0

    @property
    def n_attributes(self) -> int:
        """How many attributes are given with an edge: the frame's without the radial ones."""
        return self.frame.n_attributes - size_of(self.radial)

    @cached_property
    def is_depthwise(self) -> bool:
        """Whether it acts channel by channel, at least in part."""
        return any(c.depthwise for c in self.couplings)

    @property
    def n_last(self) -> tuple[int, int]:
        """How many values the last layer's weights and bias have."""
        ends = {"weights": 0, "bias": 0}
        for c in self.couplings:
            ends[c.parameter] = max(ends[c.parameter], c.end)
        return ends["weights"], ends["bias"]

    @property
    def fingerprint(self) -> NDArray[Any]:
        """Integers that differ where the same parameters, on another basis, mean another kernel."""
        hidden = [layer.fingerprint for layer in self.linears]
        return np.concatenate([*hidden, fingerprint_of(c.basis for c in self.couplings)])

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
            mixing += n_slots * n_hidden * c.row.size
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
        if self.is_depthwise:
            return False
        cost, edges = self.cost(), 16
        sparse = edges * cost["sparse coupling per edge"] + cost["mixing per node"]
        dense = edges * cost["outer product per edge"] + cost["dense mixing per node"]
        return self.frame.kind != "zonal" and dense < sparse

    def __str__(self) -> str:
        frame = self.frame
        lines = [
            f"Plan {self.digest[:12]}: {self.group}, sampling {self.sampling!r}",
            f"  frame      {frame.kind}{' (regular at the origin)' if frame.regular else ''}, "
            f"x in R^{frame.dim}, {frame.n_attributes} attributes"
            + (f", {self.radial.size} of them {self.radial}" if self.radial else ""),
        ]
        for n, (layer, act) in enumerate(zip(self.linears, self.activations, strict=True)):
            lines.append(
                f"  layer {n}    {layer.in_size} -> {layer.out_size}, {layer.n_nonzeros} nonzeros; {act.function} on "
                f"{len(act.samples)} samples ({len(act.index)} before merging) x {act.channels} channels"
                + ("; batch norm" if self.norms else "")
            )
        if self.table is not None:
            lines.append(f"  table      {self.table}")
        for c in self.couplings:
            lines.append(
                f"  coupling   {len(c.out_start)} x {len(c.in_start)} x {len(c.hidden_start)} fields ({c.parameter}), "
                f"{c.basis.shape[0]} intertwiners, {c.counts[0]} nonzeros, {c.counts[2]} slots"
                + (", channel by channel" if c.depthwise else "")
            )
        lines.append(
            f"  kernel     {self.out_size} x {self.in_size}, γ = {self.gamma:.4g}, cutoff {self.cutoff}, {self.aggr}"
        )
        form = "dense outer product" if self.dense_coupling else "sparse intertwiners"
        lines.append(f"  coupled by {form} (backend cpu)")
        lines += [f"  cost       {name}: {value:,}" for name, value in self.cost().items()]
        return "\n".join(lines)
