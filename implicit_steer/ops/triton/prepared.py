"""A plan's tables on a device, and the constants of the hidden layers' weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ...plan import Plan
from ...plan.packing import cached
from .configuration import SAMPLES, LaunchConfig, choose
from .sizes import Sizes, next_power_of_2
from .tables import Tables, tables

_LEAST = 16  # rows and columns of a product on tensor cores


@dataclass(frozen=True, eq=False)
class Prepared:
    """A plan's tables on a device; ``prepared[name]`` is one of them, or some tensor where the plan has none of that
    name, since kernels that do not read a table are still given a pointer."""

    tables: Tables
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    mixing: tuple[Tensor, ...]  # per coupling (b, s, o)
    position: Tensor  # of every (s, v, w, u, o) of all couplings in the flat Θ

    @property
    def sizes(self) -> Sizes:
        return self.tables.sizes

    def config(self, kernel: Any) -> LaunchConfig:
        """How to launch a kernel."""
        return choose(kernel.__name__, self.sizes, self.dtype, self.position.device)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name] if name in self.tensors else self.tensors["scalars"]

    @property
    def widths(self) -> dict[str, int]:
        """Constants of layers.py: numbers N of inputs, of coefficients of order 0 and of the others, and the extents B
        of the blocks that hold them; NU: samples times channels, in whole tiles."""
        s = self.sizes
        return {
            "NI": s.n_inputs,
            "BI": next_power_of_2(s.n_inputs, _LEAST),
            "N0": s.n_zero,
            "B0": next_power_of_2(s.n_zero, _LEAST),
            "N1": s.n_rest,
            "B1": next_power_of_2(s.n_rest, _LEAST),
            "NU": -(-s.n_samples // SAMPLES) * SAMPLES,
        }

    def layer_offsets(self) -> list[tuple[int, int]]:
        """Where each layer's weights and inverse start; one more for the ends."""
        k, s = self.widths, self.sizes
        found = [(0, 0)]
        for n in range(s.n_layers):
            rows = k["BI"] + 1 + s.regular if n == 0 else k["B0"] + k["B1"] * s.regular + 1
            weights, inverse = found[-1]
            found.append((weights + rows * k["NU"], inverse + k["NU"] * (k["B0"] + k["B1"] * s.regular)))
        return found


def _inverse(found: Tables, prepared: Prepared) -> Tensor:
    """Q of all layers as layers.py reads it."""
    s, k = found.sizes, prepared.widths
    z, parts = s.n_zero // s.channels, []
    for inverse in torch.tensor(found.numbers["inverse"]):  # (c, S)
        # (w, s) x (ρ, w'): block diagonal in the channels
        full = torch.einsum("ks,wv->wskv", inverse, torch.eye(s.channels, dtype=inverse.dtype)).flatten(0, 1)
        for part, width in ((full[:, :z], k["B0"]), (full[:, z:], k["B1"])):
            matrix = part.flatten(1)
            parts.append(torch.nn.functional.pad(matrix, (0, width - matrix.shape[1], 0, k["NU"] - len(matrix))))
            if not s.regular:
                break
    return torch.cat([p.reshape(-1) for p in parts]) if parts else torch.zeros(1)


@cached
def prepare(plan: Plan, device: torch.device, dtype: torch.dtype) -> Prepared:
    """The plan on this device; cached."""
    found = tables(plan)

    def tensor(array: NDArray[Any], kind: torch.dtype) -> Tensor:
        return torch.tensor(array, dtype=kind, device=device).contiguous()

    tensors = {name: tensor(array, dtype) for name, array in found.numbers.items()}
    tensors |= {name: tensor(array, torch.int32) for name, array in found.indices.items()}
    mixing = tuple(tensor(m, dtype) for m in found.mixing)
    prepared = Prepared(found, tensors, dtype, mixing, torch.tensor(found.position, device=device))
    tensors["inverse"] = _inverse(found, prepared).to(device, dtype)
    return prepared
