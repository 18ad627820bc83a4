"""``python -m bench accuracy``: how equivariant each sampling is, and how fast ``"exact-N"`` converges with N."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from implicit_steer.testing.cases import Case, equivariance_error
from implicit_steer.training import viz

from .report import table

ELEMENTS = 20  # random group elements
COUNTS, LIMIT = (6, 8, 10, 12, 16, 24, 64), 96  # nodes compared, and the number they are compared with
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_COLUMNS = [f"{sampling}, {dtype}" for sampling in ("exact", "escnn") for dtype in _DTYPES]


def _case(space: str) -> Case:
    """O(3) and SO(3) have no exact frame for vector attributes; where there are vectors elsewhere, they are used."""
    attributes = "1 scalar" if space in ("O(3)", "SO(3)") else "1 scalar+vector"
    return Case(space, space, "4 scalar+vector", "4 scalar+vector", attributes, nodes=60, degree=8, knn=True)


def _error(case: Case, sampling: str, dtype: torch.dtype) -> float:
    """The layer's equivariance error over random elements of the whole group, evaluation mode."""
    conv = case.layer(sampling=sampling).to(dtype).eval()  # seeds the generator that escnn samples from
    elements = [conv.in_type.fibergroup.sample() for _ in range(ELEMENTS)]
    return equivariance_error(conv, case.inputs(conv), elements)


def equivariance(spaces: list[str]) -> list[dict[str, Any]]:
    """A record per space: the error of every sampling in every dtype."""
    records = []
    for space in tqdm(spaces, desc="equivariance", unit="space"):
        case = _case(space)
        record = {"space": space, "exact is": case.layer(sampling="exact").implicit_kernel.plan.sampling}
        for sampling in ("exact", "escnn"):
            for name, dtype in _DTYPES.items():
                record[f"{sampling}, {name}"] = _error(case, sampling, dtype)
        records.append(record)
    return records


def convergence(counts: tuple[int, ...] = COUNTS) -> list[dict[str, Any]]:
    """A record per network: relative deviation of the kernel with N polar nodes from that with 96, O(3), float64.

    The weights differ from their initial values by 0.2 N(0, 1); the 500 points are normally distributed.
    """
    pos = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attributes = torch.randn(500, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    networks = [(activation, n_layers) for activation in ("elu", "silu") for n_layers in (2, 3)]
    records = []
    for activation, n_layers in tqdm(networks, desc="convergence", unit="network"):
        case = Case("o3", "O(3)", "4 scalar+vector", "4 scalar+vector", "1 scalar", n_layers, 8)
        kernels = {}
        for n in (*counts, LIMIT):
            conv = case.layer(sampling=f"exact-{n}", activation=activation).double().eval()
            with torch.no_grad():
                kernels[n] = conv.implicit_kernel(pos, attributes)
        default = int(case.layer(activation=activation).implicit_kernel.plan.sampling.removeprefix("exact-"))
        errors = {n: float((kernels[n] - kernels[LIMIT]).norm() / kernels[LIMIT].norm()) for n in counts}
        records.append({"activation": activation, "n_layers": n_layers, "default": default, "errors": errors})
    return records


def text(results: dict[str, Any]) -> str:
    """Both tables."""
    rows = [[r["space"], r["exact is"], *(f"{r[c]:.1e}" for c in _COLUMNS)] for r in results["equivariance"]]
    found = results["convergence"]
    columns = ["N", *(f"{r['activation']}, n_layers={r['n_layers']}" for r in found)]
    by_count = [[str(n), *(f"{r['errors'][n]:.1e}" for r in found)] for n in found[0]["errors"]]
    return "\n".join(
        [
            f"### Equivariance error of a layer, {ELEMENTS} random elements of the group\n",
            "Largest over the elements of the deviation relative to the output (Frobenius norms).\n",
            table(["space", "exact is", *_COLUMNS], rows),
            f"\n### exact-N against exact-{LIMIT}, O(3), 4 scalars and vectors in and out\n",
            f"Relative deviation of the kernel (Frobenius norm). The default is N = {found[0]['default']}.\n",
            table(columns, by_count),
        ]
    )


def plot(results: dict[str, Any], out: Path) -> None:
    """``convergence.png``."""
    found = results["convergence"]
    errors = {f"{r['activation']}, n_layers={r['n_layers']}": list(r["errors"].values()) for r in found}
    figure = viz.convergence(
        list(found[0]["errors"]),
        errors,
        xlabel="N, polar nodes of sampling exact-N",
        ylabel=f"deviation from exact-{LIMIT}",
        title="Convergence of the exact sampling, O(3)",
        marks={f"default, N = {found[0]['default']}": found[0]["default"]},
    )
    figure.savefig(out / "convergence.png")
