"""Tensors in, kernels launched, tensors out. What is assumed of the tensors is checked in operators.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...plan import Plan
from ...plan.activations import SMALL
from ...plan.packing import cached
from ..kernel_mlp import NEAR, SOFTENING, ZERO
from . import contract, frame, layers
from .configuration import TILE, LaunchConfig, choose, exact_product
from .tables import Sizes, Tables, padded, tables

_NODES, _NUMBERS = 4096, 1 << 23  # of the workspace for T, at most
_EDGES = 1 << 18  # whose hidden coefficients the backward pass holds at a time
_PROGRAMS = {"cpu": 3, "cuda": 1024}  # partial sums of a weight gradient, at most


@dataclass(frozen=True)
class Launch:
    """One launch: positional arguments by name, constants, options of the compiler."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


_recorded: list[Launch] | None = None


@contextmanager
def recording():
    """Launches are written down instead of being made: ``with recording() as launches``. Results are then nonsense."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(kernel, grid: tuple[int, ...], arguments: Sequence, constants: dict, choice: LaunchConfig) -> None:
    """``kernel[grid](*arguments, **constants)``; nothing for an empty grid."""
    options = {"num_warps": choice.warps, "num_stages": choice.stages}
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        _recorded.append(Launch(kernel, grid, named, constants, options))
    elif all(grid):
        kernel[grid](*arguments, **constants, **options)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float64 as it is; float32 exactly, or in TF32 where
    ``torch.set_float32_matmul_precision`` allows it."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan's tables on a device."""

    tables: Tables
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    mixing: tuple[Tensor, ...]  # per coupling (b, s, o)
    position: Tensor

    @property
    def sizes(self) -> Sizes:
        return self.tables.sizes

    def choice(self, kernel) -> LaunchConfig:
        """How to launch a kernel."""
        return choose(kernel.__name__, self.sizes, self.dtype, self.position.device)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name] if name in self.tensors else self.tensors["scalars"]

    @property
    def widths(self) -> dict[str, int]:
        """Constants of layers.py. HP: samples times channels, padded to whole tiles."""
        s = self.sizes
        return {
            "NI": s.n_inputs,
            "KI": padded(s.n_inputs, 16),
            "N0": s.n_zero,
            "K0": padded(s.n_zero, 16),
            "N1": s.n_rest,
            "K1": padded(s.n_rest, 16),
            "HP": -(-s.n_samples // TILE) * TILE,
        }

    def layer_offsets(self) -> list[tuple[int, int]]:
        """Where each layer's weights and inverse start; one more for the ends."""
        k, s = self.widths, self.sizes
        found = [(0, 0)]
        for n in range(s.n_layers):
            rows = k["KI"] + 1 + s.regular if n == 0 else k["K0"] + k["K1"] * s.regular + 1
            base, at = found[-1]
            found.append((base + rows * k["HP"], at + k["HP"] * (k["K0"] + k["K1"] * s.regular)))
        return found


def _inverse(found: Tables, prepared: Prepared) -> Tensor:
    """Q of all layers as layers.py reads it."""
    s, k = found.sizes, prepared.widths
    z, parts = s.n_zero // s.channels, []
    for inverse in torch.tensor(found.numbers["inverse"]):  # (c, S)
        # (w, s) x (ρ, w'): block diagonal in the channels
        full = torch.einsum("ks,wv->wskv", inverse, torch.eye(s.channels, dtype=inverse.dtype)).flatten(0, 1)
        for part, width in ((full[:, :z], k["K0"]), (full[:, z:], k["K1"])):
            block = part.flatten(1)
            parts.append(torch.nn.functional.pad(block, (0, width - block.shape[1], 0, k["HP"] - len(block))))
            if not s.regular:
                break
    return torch.cat([p.reshape(-1) for p in parts]) if parts else torch.zeros(1)


@cached
def prepare(plan: Plan, device: torch.device, dtype: torch.dtype) -> Prepared:
    """The plan on this device; cached."""
    found = tables(plan)

    def tensor(array, kind):
        return torch.tensor(array, dtype=kind, device=device).contiguous()

    tensors = {name: tensor(array, dtype) for name, array in found.numbers.items()}
    tensors |= {name: tensor(array, torch.int32) for name, array in found.indices.items()}
    mixing = tuple(tensor(m, dtype) for m in found.mixing)
    prepared = Prepared(found, tensors, dtype, mixing, torch.tensor(found.position, device=device))
    tensors["inverse"] = _inverse(found, prepared).to(device, dtype)
    return prepared


# ---- frame


def _frame_constants(p: Prepared) -> tuple[list[Tensor], dict]:
    s = p.sizes
    names = ["harmonics", "powers", "plane", "axis", "attribute_order", "attribute_partner", "attribute_sign", "pairs"]
    indices = p.tables.indices
    degrees = (indices[name].max(initial=0) for name in ("powers", "attribute_order") if name in indices)
    monomials = indices["powers"].shape[1] if "powers" in indices else 0
    constants = {
        "KIND": s.kind,
        "DIM": s.dim,
        "A": s.n_attributes,
        "AP": padded(s.n_attributes),
        "NI": s.n_inputs,
        "NM": monomials,
        "NMP": padded(monomials, 16),
        "NQ": s.n_harmonics,
        "NQP": padded(s.n_harmonics, 16),
        "DEGREE": int(max(degrees, default=0)),
        "PAIRS": len(indices["pairs"]),
        "CUTOFF": s.has_cutoff,
        "SOFT": SOFTENING[p.dtype],
        "ZERO": ZERO[p.dtype],
        "PREC": "ieee" if p.dtype == torch.float64 else "tf32x3",
    }
    return [p["scalars"], *(p[name] for name in names)], constants


def frame_forward(p: Prepared, delta: Tensor, attr: Tensor, order: Tensor, shell: Tensor) -> tuple[Tensor, ...]:
    """(E, dim), (E, A) → inputs (E, n_inputs), radius (E,) or (0,), factor (E,), q (E, n_harmonics), all in rows of
    ``order``."""
    s, n = p.sizes, len(delta)
    out = (
        delta.new_empty(n, s.n_inputs),
        delta.new_empty(n if s.regular else 0),
        delta.new_empty(n),
        delta.new_empty(n, s.n_harmonics),
    )
    fixed, constants = _frame_constants(p)
    choice = p.choice(frame.frame_forward)
    grid = (triton.cdiv(n, choice.edges),)
    arguments = delta, attr, order, shell, *fixed, *out, n
    launch(frame.frame_forward, grid, arguments, constants | {"BE": choice.edges}, choice)
    return out


def frame_backward(p: Prepared, delta, attr, order, shell, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of delta, attr and the shell's width from those of frame_forward's results."""
    n = len(delta)
    fixed, constants = _frame_constants(p)
    choice = p.choice(frame.frame_backward)
    programs = triton.cdiv(n, choice.edges)
    out = torch.empty_like(delta), torch.empty_like(attr), delta.new_empty(programs)
    arguments = delta, attr, order, shell, *fixed, *gradients, *out, n
    launch(frame.frame_backward, (programs,), arguments, constants | {"BE": choice.edges}, choice)
    return out[0], out[1], out[2].sum().view_as(shell)


# ---- layers


def _layer_constants(p: Prepared) -> dict:
    s, multiply = p.sizes, precision(p.dtype)
    return p.widths | {
        "REGULAR": s.regular,
        "FN": s.function,
        "NEAR": NEAR[p.dtype],
        "SMALL": SMALL[p.dtype],
        "TH": TILE,
        "PREC": exact_product(s) if multiply == "tf32x3" else multiply,
    }


def _layers_forward(p, inputs, radius, factor, weights, r, y, begin, end, n_layers) -> None:
    choice = p.choice(layers.layers_forward)
    constants = _layer_constants(p) | {
        "NL": n_layers,
        "NR": p.sizes.n_columns,
        "STORE_R": r is not None,
        "STORE_Y": y is not None,
        "BE": choice.edges,
    }
    grid = (triton.cdiv(end - begin, choice.edges),)
    arguments = inputs, radius, factor, weights, p["inverse"], *(factor if t is None else t for t in (r, y))
    launch(layers.layers_forward, grid, (*arguments, begin, end, end - begin), constants, choice)


def layers_forward(p: Prepared, inputs: Tensor, radius: Tensor, factor: Tensor, weights: Tensor) -> Tensor:
    """r (E, n_columns)."""
    r = factor.new_empty(len(factor), p.sizes.n_columns)
    _layers_forward(p, inputs, radius, factor, weights, r, None, 0, len(factor), p.sizes.n_layers)
    return r


def hidden_coefficients(p: Prepared, inputs, radius, factor, weights, n_layers: int) -> Tensor:
    """(E, n_zero + n_rest) of layer ``n_layers`` − 1, without the factor; ``weights`` of so many layers."""
    n = len(factor)
    y = factor.new_empty(n_layers, n, p.sizes.n_zero + p.sizes.n_rest)
    _layers_forward(p, inputs, radius, factor, weights, None, y, 0, n, n_layers)
    return y[-1]


def layers_backward(
    p: Prepared, inputs, radius, factor, weights, grad: Tensor, need_inputs: bool, need_weights: bool
) -> tuple[Tensor, ...]:
    """Gradients of inputs, radius, factor and weights from that of r; those not needed are empty."""
    s, n = p.sizes, len(factor)
    out = torch.empty_like(inputs), torch.empty_like(radius), torch.empty_like(factor)
    d_weights = torch.zeros_like(weights)
    for begin in range(0, n, _EDGES):
        end = min(begin + _EDGES, n)
        y = factor.new_empty(s.n_layers, end - begin, s.n_zero + s.n_rest)
        _layers_forward(p, inputs, radius, factor, weights, None, y, begin, end, s.n_layers)
        used, here = s.n_columns - 1, grad[begin:end]
        out[2][begin:end] = (here[:, :used] * y[-1][:, :used]).sum(1) + here[:, used]
        d_y = torch.zeros_like(y[0])
        d_y[:, :used] = here[:, :used] * factor[begin:end, None]
        arguments = (p, inputs, radius, weights, y, d_y, out, begin, end)
        _layers_chunk(*arguments, need_inputs, d_weights if need_weights else None)
    return (*(t if need_inputs else t.new_empty(0) for t in out), d_weights if need_weights else weights.new_empty(0))


def _layers_chunk(p, inputs, radius, weights, y, d_y, out, begin, end, need_inputs, d_weights) -> None:
    """The reverse sweep of edges begin .. end−1; d_weights is added to."""
    s, constants = p.sizes, _layer_constants(p)
    offsets = p.layer_offsets()
    for n in reversed(range(s.n_layers)):
        (base, at), first = offsets[n], n == 0
        here = constants | {"FIRST": first, "KI": constants["KI"] if first else constants["K0"]}
        shared = (inputs, radius, y[max(n - 1, 0)], d_y, weights, p["inverse"])
        if d_weights is not None:
            choice = p.choice(layers.layers_backward_weights)
            programs = min(triton.cdiv(end - begin, choice.edges), _PROGRAMS[d_y.device.type])
            last = offsets[n + 1][0]
            partial = d_weights.new_empty(programs, last - base)
            grid = (programs, here["HP"] // here["TH"])
            arguments = (*shared, partial, begin, end, base, at, last - base)
            launch(layers.layers_backward_weights, grid, arguments, here | {"BE": choice.edges}, choice)
            d_weights[base:last] += partial.sum(0)
        if first and not need_inputs:
            return
        choice = p.choice(layers.layers_backward_inputs)
        d_in = out[0] if first else torch.empty_like(d_y)
        more = {"ADD": n < s.n_layers - 1, "BE": choice.edges}
        grid = (triton.cdiv(end - begin, choice.edges),)
        arguments = (*shared, d_in, out[1], begin, end, base, at)
        launch(layers.layers_backward_inputs, grid, arguments, here | more, choice)
        d_y = d_in


# ---- contraction


def _batches(s: Sizes, n: int) -> list[tuple[int, int]]:
    """Ranges of nodes whose T fits into the workspace."""
    size = max(1, min(_NODES, _NUMBERS // max(s.n_t, 1)))
    return [(node, min(node + size, n)) for node in range(0, n, size)]


def _contract_constants(p: Prepared, has_one: bool, edges: int) -> dict:
    s = p.sizes
    return {
        "C_IN": s.in_size,
        "NQ": s.n_harmonics,
        "NQP": padded(s.n_harmonics, 16),
        "NR": s.n_columns,
        "NT": s.n_t,
        "S": s.slots,
        "V": s.fields,
        "W": s.columns,
        "D": s.components,
        "DALL": s.most_components,
        "HAS_ONE": has_one,
        "BE": edges,
        "PREC": precision(p.dtype),
    }


def _t_of(p: Prepared, x, q, r, source, rowptr, has_one: bool, node: int, end: int) -> Tensor:
    """T (end − node, n_t) of nodes node .. end−1."""
    t, choice = x.new_empty(end - node, p.sizes.n_t), p.choice(contract.contract_forward)
    names = [
        "coupling",
        "constant",
        "block_terms",
        "block_start",
        "block_extent",
        "block_offset",
        "term_column",
        "term_chunks",
    ]
    arguments = (x, q, r, source, rowptr, *(p[name] for name in names), t, node)
    constants = _contract_constants(p, has_one, choice.edges)
    launch(contract.contract_forward, (end - node, p.sizes.n_blocks), arguments, constants, choice)
    return t


def contract_forward(p: Prepared, x, q, r, theta, source, rowptr, has_one: bool) -> Tensor:
    """(N, C_out): T Θ. ``has_one``: whether q₀ = 1, or 0 (for directional derivatives)."""
    n = len(rowptr) - 1
    out = x.new_empty(n, p.sizes.out_size)
    for node, end in _batches(p.sizes, n):
        torch.mm(_t_of(p, x, q, r, source, rowptr, has_one, node, end), theta, out=out[node:end])
    return out


def contract_backward(
    p: Prepared, grad, x, q, r, theta, source, rowptr, order, by_source, colptr, has_one: bool, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, q, r and Θ from that of the output; those not needed are empty."""
    s, (need_x, need_q, need_r, need_theta) = p.sizes, needs
    edges, n = len(r), len(rowptr) - 1
    rows = x.new_empty(edges, s.in_size) if s.n_covered == s.in_size else x.new_zeros(edges, s.in_size)
    d_q, d_r, d_theta = q.new_empty(s.n_groups, *q.shape), torch.empty_like(r), torch.zeros_like(theta)
    for node, end in _batches(s, n):
        g = grad[node:end]
        if need_theta:
            d_theta.addmm_(_t_of(p, x, q, r, source, rowptr, has_one, node, end).T, g)
        if need_x or need_q or need_r:
            d_t = g @ theta.T
        if need_x or need_q:
            _backward_inputs(p, x, q, r, source, rowptr, order, d_t, rows, d_q, node, end, has_one, need_x, need_q)
        if need_r:
            _backward_hidden(p, x, q, source, rowptr, d_t, d_r, node, end, has_one)
    d_x = x.new_empty(x.shape if need_x else 0)
    if need_x:
        choice = p.choice(contract.sum_by_source)
        width = min(padded(s.in_size), 64)
        grid, constants = (len(x), triton.cdiv(s.in_size, width)), {"C": s.in_size, "BC": width, "BE": choice.edges}
        launch(contract.sum_by_source, grid, (rows, by_source, colptr, d_x), constants, choice)
    d_q = d_q[0] if s.n_groups == 1 else d_q.sum(0)
    found = (d_x, d_q, d_r, d_theta)
    return tuple(t if need else t.new_empty(0) for t, need in zip(found, needs, strict=True))


def _backward_inputs(p, x, q, r, source, rowptr, order, d_t, rows, d_q, node, end, has_one, need_x, need_q) -> None:
    choice = p.choice(contract.contract_backward_inputs)
    names = "coupling constant block_extent block_offset term_block term_column group_terms group_term group_chunk"
    fixed = (p[name] for name in (*names.split(), "group_start", "group_components"))
    arguments = (x, q, r, source, rowptr, order, *fixed, d_t, rows, d_q, node, len(r))
    constants = _contract_constants(p, has_one, choice.edges) | {"NEED_X": need_x, "NEED_Q": need_q}
    launch(contract.contract_backward_inputs, (end - node, p.sizes.n_groups), arguments, constants, choice)


def _backward_hidden(p, x, q, source, rowptr, d_t, d_r, node, end, has_one) -> None:
    choice = p.choice(contract.contract_backward_hidden)
    names = "coupling constant block_start block_extent block_offset term_block term_chunks column_terms column_term"
    fixed = (p[name] for name in (*names.split(), "column_where"))
    arguments = (x, q, source, rowptr, *fixed, d_t, d_r, node)
    grid = (end - node, triton.cdiv(p.sizes.n_columns, p.sizes.columns))
    launch(contract.contract_backward_hidden, grid, arguments, _contract_constants(p, has_one, choice.edges), choice)
