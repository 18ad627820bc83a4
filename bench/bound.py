"""How near the exact forward pass comes to the arithmetic that its plan asks for.

A lane operation is one vector instruction on one lane: a multiply-add, or one step of φ. The count holds what any
evaluation of the plan in the factored form does, and nothing of what an implementation adds: no gathers, no radius, no
harmonics, no radial factor, no transposition, no padding of tiles. The bound is the count over the multiply-adds per
second that the machine reaches (``torch.ops.implicit_steer.fma_peak``: independent accumulators in the widest vectors,
float32, same number of threads), as if each lane operation took one slot of a multiply-add.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from implicit_steer import _native
from implicit_steer.plan import Coupling, Plan
from implicit_steer.testing.cases import Case

from .report import table
from .steps import Candidate, operator_step, step
from .timing import interleaved, summary

# Vector instructions of an efficient φ. e^x takes 9: scale and round (2), remainder (1), polynomial of degree 5 (5),
# scaling by 2^n (1). A division counts as one.
_EXP = 9
PHI = {
    "relu": 1,
    "elu": _EXP + 2,  # min(x, 0), blend; the −1 goes into the polynomial
    "silu": _EXP + 2,  # x / (1 + e^−x)
    "tanh": _EXP + 4,  # (1 − e) / (1 + e), sign
    "gelu": _EXP + 11,  # erf: exp, a polynomial of degree 7, division, blend; product with x
}
CANDIDATE = Candidate("cpu", "auto")


def _coefficients_read(plan: Plan, coupling: Coupling) -> list[int]:
    """Coefficient of the hidden field behind each of its coordinates."""
    size = coupling.basis.shape[3]
    return plan.frame.coefficient.tolist() if plan.frame.kind == "zonal" and size > 1 else list(range(size))


def _sample_nonzeros(plan: Plan, n: int) -> int:
    """Nonzeros of layer n's sample matrices: of A in the coefficients that its linear layer reaches, of A⁻ in those
    that are read afterwards."""
    act, layer = plan.activations[n], plan.linears[n]
    reached = np.abs(layer.bias).sum(1) > 0
    for block in layer.blocks:
        rows = np.flatnonzero(np.abs(block.basis).sum((0, 2)))
        reached[(block.out_start[:, None] + rows).ravel()] = True
    reached = reached.reshape(act.channels, -1).any(0)
    read = np.ones_like(reached)
    if n + 1 == len(plan.activations):
        weights = [c for c in plan.couplings if c.parameter == "weights"]
        used = {_coefficients_read(plan, c)[m] for c in weights for _, _, _, m, _ in c.nonzeros}
        read = np.isin(np.arange(len(reached)), list(used)) | (plan.frame.kind == "planar")
    return int((act.samples[:, reached] != 0).sum() + (act.inverse[read] != 0).sum())


def _coupling(plan: Plan, c: Coupling) -> int:
    """Lane operations per edge: t[v] = Σ B f[v] over the nonzeros, then T[slot, v, w] += t[v] h[w] for every
    coefficient it meets."""
    if c.parameter != "weights":  # it multiplies the constant one
        return len(c.nonzeros) * len(c.in_start)
    behind = _coefficients_read(plan, c)
    products = {(b, o, behind[m]) if plan.frame.kind == "zonal" else (b, o, m) for b, o, _, m, _ in c.nonzeros}
    return len(c.in_start) * (len(c.nonzeros) + len(products) * len(c.hidden_start))


def lane_operations(plan: Plan, nodes_per_edge: float) -> dict[str, float]:
    """Lane operations per edge of the forward pass, by part; mixing, done per node, is shared out over the edges."""
    cost, acts = plan.cost(), plan.activations
    turn = 2 * acts[-1].channels * len(plan.frame.order) if acts and plan.frame.kind == "planar" else 0
    return {
        "linear layers": sum(layer.n_nonzeros for layer in plan.linears),
        "samples": sum(act.channels * _sample_nonzeros(plan, n) for n, act in enumerate(acts)),
        "φ": sum(act.channels * len(act.samples) * PHI[act.function] for act in acts),
        "coupling": sum(_coupling(plan, c) for c in plan.couplings) + turn,
        "mixing": cost["mixing per node"] * nodes_per_edge,
    }


def measure(cases: list[Case], rounds: int, budget: float) -> dict[str, Any]:
    """The peak, and per case the count per edge by part, the bound, the times of operator and module, and the shares
    of the bound that they reach. Empty without cases or the native extension."""
    if not cases or not _native.available()[0]:
        return {}
    peak = torch.ops.implicit_steer.fma_peak(0)
    records = []
    for case in tqdm(cases, desc="bound", unit="case"):
        plan = case.layer(sampling=CANDIDATE.sampling).implicit_kernel.plan
        count = lane_operations(plan, case.nodes * case.copies / case.edges)
        bound = 1e3 * sum(count.values()) * case.edges / peak
        runs = {kind: make(case, CANDIDATE, "forward") for kind, make in _KINDS.items()}
        times = {kind: summary(t)["median_ms"] for kind, t in interleaved(runs, rounds, budget).items()}
        shares = {f"{kind} share": bound / t for kind, t in times.items()}
        records.append({"case": case.name, "count": count, "bound_ms": bound} | times | shares)
    return {"peak": peak, "records": records}


_KINDS = {"operator": operator_step, "module": step}


def text(results: dict[str, Any]) -> str:
    """The table; nothing without results."""
    if not results:
        return ""
    parts = list(results["records"][0]["count"])
    rows = []
    for r in results["records"]:
        counts = [f"{sum(r['count'].values()):,.0f}", *(f"{n:,.0f}" for n in r["count"].values())]
        times = [f"{r[kind]:.3f} ({100 * r[f'{kind} share']:.0f}%)" for kind in _KINDS]
        rows.append([r["case"], *counts, f"{r['bound_ms']:.3f}", *times])
    columns = ["case", "per edge", *parts, "bound / ms", *(f"{kind} / ms (share of the bound)" for kind in _KINDS)]
    return "\n".join(
        [
            "### Exact forward against its arithmetic\n",
            f"Lane operations per edge, counted from the plan (bench/bound.py says how), over the measured peak of "
            f"{results['peak'] / 1e9:.1f}·10⁹ multiply-adds per second.\n",
            table(columns, rows),
        ]
    )
